"""What fastbn takes of Numba's private parts: a new Numba that changes one says here which.

They stand in `fastbn.numba_parts`.

Numba has no upper bound in pyproject.toml: most releases change none of this, and a bound would keep users of a new
one from kernels that work.
"""

import ctypes
import hashlib
import importlib
import importlib.util
import inspect
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import llvmlite.binding as llvm
import numba
import numpy as np
import pytest
from numba import types
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import CompilerBase, DefaultPassBuilder, Flags
from numba.core.compiler_machinery import PassManager
from numba.core.registry import cpu_target

from fastbn.cpu import machines
from fastbn.cpu.kernels import compiler
from fastbn.cpu.kernels.simd import load, store
from fastbn.cpu.records import INTEGER_RECORDS, Options, Shape
from fastbn.numba_parts import compiling, version
from tests import interpreters
from tests.support import DTYPES

# Of Numba's passes, those that kernels go without, and why.
LEFT_OUT = {
    "WithLifting": "no with statements",
    "InlineClosureLikes": "no closures",
    "RewriteDynamicRaises": "nothing is raised",
    "MakeFunctionToJitFunction": "no functions inside of functions",
    "InlineInlinables": "LLVM inlines",
    "FindLiterallyCalls": "no literally()",
    "LiteralUnroll": "no literal_unroll()",
    "LiteralPropagationSubPipelinePass": "the same",
    "InlineOverloads": "LLVM inlines",
    "NopythonRewrites": "no array expressions",
    "NoPythonSupportedFeatureValidation": "for messages to people",
    "AnnotateTypes": "for people",
    "IRLegalization": "deletes variables, which hold nothing that is counted",
    "DumpParforDiagnostics": "no parallel loops",
}


def parameters(function):
    return tuple(inspect.signature(function).parameters)


def test_passes():
    """Those of its own pipeline are ours, in our order, and those that were looked at and left out."""
    state = SimpleNamespace(func_ir=None, flags=Flags())
    theirs = [one.__name__ for one, _ in DefaultPassBuilder.define_nopython_pipeline(state).passes]
    new = set(theirs) - set(LEFT_OUT) - {one.__name__ for one in compiling.PASSES}
    assert not new, f"Numba {numba.__version__} has passes that nobody has looked at: are {new} needed by kernels?"
    ours = iter(theirs)
    missing = [one.__name__ for one in compiling.PASSES if one.__name__ not in ours]
    assert not missing, f"Numba {numba.__version__} runs {missing} earlier, or not at all"


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (
            CompilerBase.__init__,
            ("self", "typingctx", "targetctx", "library", "args", "return_type", "flags", "locals"),
        ),
        (CompilerBase.define_pipelines, ("self",)),
        (PassManager.__init__, ("self", "pipeline_name")),
        (PassManager.finalize, ("self",)),
        (JITCodeLibrary.__init__, ("self", "codegen", "name")),
        (JITCodeLibrary.add_llvm_module, ("self", "ll_module")),
        (JITCodeLibrary.add_ir_module, ("self", "ir_module")),
        (JITCodeLibrary.add_linking_library, ("self", "library")),
        (JITCodeLibrary.create_ir_module, ("self", "name")),
        (JITCodeLibrary.finalize, ("self",)),
        (JITCodeLibrary.get_pointer_to_function, ("self", "name")),
        (cpu_target.typing_context.resolve_function_type, ("func", "args", "kws")),
        (cpu_target.target_context.declare_function, ("module", "fndesc")),
        (cpu_target.target_context.make_tuple, ("builder", "typ", "values")),
        (cpu_target.target_context.call_conv.call_function, ("builder", "callee", "resty", "argtys", "args")),
    ],
    ids=lambda given: getattr(given, "__qualname__", ""),
)
def test_methods(function, expected):
    """Those that are called or replaced have the parameters that they are taken to have, and maybe more behind."""
    found = parameters(function)
    assert found[: len(expected)] == expected, f"Numba {numba.__version__}: {function.__qualname__}{found}"


def test_library():
    library = compiling.Part(cpu_target.target_context.codegen(), "empty")
    for name in ("_codegen", "_final_module", "_linking_libraries", "_get_module_for_linking", "_ensure_finalized"):
        assert hasattr(library, name), f"Numba {numba.__version__}: a code library has no {name}"
    assert library._codegen._data_layout


def test_number_of_threads():
    """What is asked in place of `numba.get_num_threads`; the second is there once Numba's threads are."""
    parallel, chosen = importlib.import_module("numba.np.ufunc.parallel"), numba.get_num_threads()
    for name in ("_is_initialized", "_get_num_threads"):
        assert hasattr(parallel, name), f"Numba {numba.__version__}: numba.np.ufunc.parallel has no {name}"
    assert parallel._is_initialized is True
    assert parallel._get_num_threads() == chosen, f"Numba {numba.__version__}: _get_num_threads tells something else"


def test_file_of_the_version():
    """Machine code is found by it."""
    assert version.fingerprint() != hashlib.sha256(b"").hexdigest()
    found = Path(importlib.util.find_spec("numba").origin).with_name("_version.py")
    assert found.is_file(), f"Numba {numba.__version__} has no file {found.name} that names its version"
    assert numba.__version__ in found.read_text(), f"Numba {numba.__version__}: {found.name} does not name it"


@compiler.kernel
def double(thread, first, last, x, shape, scale, relu, y):
    """Every kind of argument."""
    for i in range(first, last):
        if relu is None:
            store(y, i, load(x.values, i * x.outer + shape.channel, 4))
        y[i] = y[i] * scale


def test_a_kernel_by_itself():
    """What comes out runs without Numba, from words alone."""
    kinds = ["x:f4[]", "shape:Shape", "scale:f8", "relu:none", "y:f4*"]
    (made,) = compiler.object_code(double, kinds, "double-here", [None])
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), machines.machine_for(None))
    engine.add_object_file(llvm.ObjectFileRef.from_data(made))
    engine.finalize_object()
    run = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 4)(engine.get_function_address("double-here"))
    x, y = np.arange(9, dtype=np.float32), np.zeros(3, np.float32)
    strides, shape, scale = np.array([0, 2, 1]), np.array([1, 3, 2, 1]), np.array([2.0])
    words = np.array([x.ctypes.data, strides.ctypes.data, shape.ctypes.data, scale.view(np.int64)[0], 0, y.ctypes.data])
    run(words.ctypes.data, 0, 0, 3)
    assert y.tolist() == [4.0, 8.0, 12.0]


def test_records_of_integers():
    kind = compiler.KINDS["Shape"]
    assert (kind.instance_class, kind.fields, set(kind.types)) == (Shape, Shape._fields, {types.int64})
    assert set(INTEGER_RECORDS) <= set(compiler.KINDS)


def test_groups():
    kind = compiler._kind("Options(bool|none|none|bool|none)")
    assert (kind.instance_class, kind.fields) == (Options, Options._fields)
    assert kind.types == (types.boolean, types.none, types.none, types.boolean, types.none)


NAMES = """
import sys
from fastbn.cpu import team_words
team_words.POSSIBLE, team_words.FUTEX = {possible}, 0
from fastbn.cpu.kernels import calls, compiler
sys.stdout.buffer.write(compiler.object_code(calls.call, (), "symbol", [None])[0])
"""
POSIX = {"clock_gettime"} | {f"pthread_{name}" for name in ("mutex_lock", "mutex_unlock", "cond_wait", "cond_signal")}


@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm")
@pytest.mark.parametrize(("possible", "names"), [(False, set()), (True, POSIX)], ids=["Windows", "macOS"])
def test_code_names_what_the_system_has(possible, names, tmp_path):
    """LLVM ends the process where code refers to a function that is not there."""
    made = subprocess.run([sys.executable, "-c", NAMES.format(possible=possible)], capture_output=True, check=True)
    (tmp_path / "calls.o").write_bytes(made.stdout)
    command = ["nm", "--undefined-only", "--format=posix", "calls.o"]
    listed = subprocess.run(command, cwd=tmp_path, capture_output=True, check=True, text=True)
    assert {line.split()[0] for line in listed.stdout.splitlines()} == names


BUILT = """
import ctypes, hashlib, sys, warnings
import numpy as np
import fastbn
from fastbn.cpu import code
from fastbn.environment import float_dtypes

dtype, kernels = float_dtypes()[sys.argv[1]], code.record()
warnings.simplefilter("ignore")
for shape in (8, 32, 20, 20), (500, 3):
    x, gamma = np.ones(shape, dtype), np.ones(shape[1], np.float32)
    y, saved = fastbn.batch_norm(x, gamma, gamma, activation="relu")
    fastbn.batch_norm_backward(x, saved)
    fastbn.batch_norm_backward(x, saved._replace(y=y, beta=None))
for axis in 0, 1:
    fastbn.var(np.ones((30, 10), dtype), axis=axis), fastbn.nanvar(np.ones((300, 200), dtype), axis=axis)
if sys.argv[3] == "flushing":
    library, environment = ctypes.CDLL(None), (ctypes.c_uint32 * 8)()  # glibc's fenv_t, whose last word is MXCSR
    library.fegetenv(environment)
    environment[7] |= 0x8040
    library.fesetenv(environment)
    assert np.float32([1e-40]) * np.float32(1) == 0
for name, kinds in [kernel for kernel in kernels if sys.argv[2] in kernel[0]]:
    _, (built,) = code.build(name, kinds, [code.level_here()])
    print(name, *kinds, hashlib.sha256(built).hexdigest())
"""


@pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64", reason="the mode is set as glibc does it there"
)
@pytest.mark.parametrize(
    ("dtype", "names"),
    [("bfloat16", ".backward"), *(pytest.param(d, "", marks=pytest.mark.slow) for d in DTYPES)],
)
def test_the_same_code_where_subnormal_numbers_are_flushed(dtype, names):
    """As `torch.set_flush_denormal` has it: what is compiled there is kept, and runs elsewhere too."""
    if dtype == "bfloat16":
        pytest.importorskip("ml_dtypes")
    commands = [interpreters.python(BUILT, dtype, names, mode) for mode in ("plain", "flushing")]
    (plain, _), (flushing, _) = interpreters.end(*map(interpreters.begin, commands))
    assert plain.count("\n") > 1
    assert plain == flushing
