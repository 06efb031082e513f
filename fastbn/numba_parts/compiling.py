"""Numba's compiler, made to do what kernels need and no more."""

from numba import types
from numba.core import typed_passes, untyped_passes
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import CompilerBase
from numba.core.compiler_lock import global_compiler_lock as lock
from numba.core.compiler_machinery import PassManager
from numba.core.registry import cpu_target

__all__ = ["OF_PARTS", "PASSES", "Part", "lock", "lowered", "target"]

target = cpu_target.target_context


class Part(JITCodeLibrary):
    """The code of an inlined function, ready to be linked into a kernel, and no more.

    Numba would optimize each by itself and make machine code of it too: a fifth to a quarter of a first call.
    """

    def add_llvm_module(self, module):
        module.data_layout = self._codegen._data_layout
        self._final_module.link_in(module)

    def finalize(self):
        self._finalized = True

    def link_all(self):
        """The code of all that this one calls, once each: linking at every level is a tenth of a first call."""
        found, queue = {self}, [self]
        while queue:
            for library in queue.pop()._linking_libraries:
                if library not in found:
                    found.add(library)
                    queue.append(library)
                    self._final_module.link_in(library._get_module_for_linking(), preserve=True)

    def get_pointer_to_function(self, name):
        self._ensure_finalized()
        return 0  # as of a function that is not there

    @property
    def codegen(self):
        return self  # asked for `set_env` alone

    def set_env(self, name, environment):
        """What Python calls need; there are none."""


# Numba's passes that kernels need. The others (closures, literal unrolling, array expressions, annotations for people,
# ends of variables' lives) find nothing to do in them and take 40 % of the time.
PASSES = (
    untyped_passes.TranslateByteCode,
    untyped_passes.FixupArgs,
    untyped_passes.IRProcessing,
    untyped_passes.RewriteSemanticConstants,
    untyped_passes.DeadBranchPrune,  # of options that are None
    untyped_passes.GenericRewrites,
    untyped_passes.ReconstructSSA,
    untyped_passes.DeadBranchPrune,
    typed_passes.NopythonTypeInference,
    typed_passes.PreLowerStripPhis,
    typed_passes.NativeLowering,
    typed_passes.NoPythonBackend,
)


_signatures = {}


class _Context:
    """One of Numba's that is up to date: refreshing it for each function is a fiftieth of a first call."""

    def __init__(self, context):
        self._context = context

    def __getattr__(self, name):
        return getattr(self._context, name)

    def refresh(self):
        """What other packages register meanwhile is not for kernels."""


class _Typing(_Context):
    """Numba's typing context, which remembers how functions other than kernels' own are typed.

    It tries every overload of ``+`` anew for each addition, NumPy's and those of dates among them.
    """

    def resolve_function_type(self, function, args, kws):
        if kws or not isinstance(function, types.Function):
            return self._context.resolve_function_type(function, args, kws)
        key = function, args
        found = _signatures.get(key)
        if found is None:
            found = _signatures[key] = self._context.resolve_function_type(function, args, kws)
        return found


class _Target(_Context):
    """Numba's target context."""

    def subtarget(self, **options):
        """Numba asks it for the size of each variable, 0.3 ms each, to tell debuggers, which kernels tell nothing."""
        context = self._context.subtarget(**options)
        context.get_abi_sizeof = lambda kind: 0
        return context


class _PartCompiler(CompilerBase):
    def __init__(self, typingctx, targetctx, library, *rest):
        super().__init__(_Typing(typingctx), _Target(targetctx), Part(targetctx.codegen(), "part"), *rest)

    def define_pipelines(self):
        passes = PassManager("kernels")
        for one in PASSES:
            passes.add_pass(one, one.__name__)
        passes.finalize()
        return [passes]


OF_PARTS = {
    "pipeline_class": _PartCompiler, "no_cpython_wrapper": True, "no_cfunc_wrapper": True, "forceinline": True,
    "_nrt": False,
}  # fmt: skip
"""Options of `numba.njit` for functions that become part of kernels and are never called from Python."""


def lowered(part, signature, symbol, enter):
    """LLVM's module of a function for such arguments, and of all that it calls.

    ``enter(module, symbol, call, signature)`` adds another function by this name, in which ``call(builder, arguments)``
    calls it. Ours raise nothing.
    """
    target.refresh()
    part.compile(signature)
    code = part.overloads[signature]

    def call(builder, arguments):
        function = target.declare_function(builder.module, code.fndesc)
        _, result = target.call_conv.call_function(builder, function, code.fndesc.restype, signature, arguments)
        return result

    library = Part(target.codegen(), symbol)
    module = library.create_ir_module(symbol)
    enter(module, symbol, call, signature)
    library.add_ir_module(module)
    library.add_linking_library(code.library)
    library.finalize()
    library.link_all()
    return library._final_module
