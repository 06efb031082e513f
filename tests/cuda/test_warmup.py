"""Kernels compiled for a GPU that is not here are those that calls there ask for, and are found there."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

import fastbn
from fastbn import warmup as calls
from fastbn.__main__ import main
from tests import cuda_compile, cuda_variants
from tests.conftest import missing
from tests.simt import cuda as simt
from tests.simt import host_cupy

cupy = pytest.importorskip("cupy")

from fastbn.cuda import cubins, launch, warmup  # noqa: E402 - after CuPy is known to be there

IMAGES, VECTORS = (8, 64, 14, 14), (32, 128)


def test_chips():
    """Those for which the tests compile, but for their threads."""
    for architecture, chip in cuda_variants.CHIPS.items():
        assert warmup.device_of(architecture)[1:] == (architecture, chip.processors, chip.shared)
    assert warmup.device_of(103)[1:] == (103, *warmup.CHIPS[100])
    assert warmup.device_of(86, 28).processors == 28
    with pytest.raises(RuntimeError, match=r"compute capability 6\.1; fastbn's kernels need 7\.0"):
        warmup.device_of(61)


@pytest.fixture
def asked(monkeypatch):
    """The kernels that calls ask for on an H100, where they do nothing."""
    if reason := host_cupy.available():
        pytest.skip(reason)
    found, compiled = {}, launch.function

    def function(number, kernel, macros):
        if number == launch.ABSENT:
            return compiled(number, kernel, macros)
        found[launch.Kernel(kernel, macros)] = None
        return lambda *_arguments, **_options: None

    monkeypatch.setattr(launch, "function", function)
    monkeypatch.setattr(launch, "blocks_per_processor", lambda *_: 2)
    monkeypatch.setattr(launch, "device", lambda number: warmup.device_of(90)._replace(number=number))
    with host_cupy.installed():
        simt.forget()
        yield found
        simt.forget()


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("shape", [IMAGES, VECTORS], ids=str)
def test_what_calls_ask_for(asked, monkeypatch, shape, dtype):
    """The calls that `fastbn warmup` makes of NumPy arrays, and statistics."""
    monkeypatch.setattr(calls, "np", cupy)
    flat = (*shape[:2], int(np.prod(shape[2:])))
    for layout in calls.LAYOUTS if len(shape) > 2 else ("NHWC",):
        for options in calls.OPTIONS.values():
            calls._call_all(dtype, layout, flat, options)
    n, channels, *image = shape
    for of_layout, axis in ((shape, 1), ((n, *image, channels), len(shape) - 1)):
        x = cupy.zeros(of_layout, dtype)
        for statistic in (fastbn.mean, fastbn.var, fastbn.mean_var, fastbn.nanmean, fastbn.nanvar):
            statistic(x, tuple(set(range(x.ndim)) - {axis}))
            statistic(x)
    assert len(asked) > 10
    wanted = warmup.kernels(warmup.device_of(90), [dtype], [shape])
    assert [kernel for kernel in asked if kernel not in wanted] == []


COMPILE = """
from fastbn.cuda import cubins, warmup
wanted = warmup.kernels(warmup.device_of(90), ["float32"], [(4, 8)])[:2]
with cubins.compiling(wanted, 90, 2) as work:
    for job in work:
        job.run()
print(cubins.count())
"""

LOAD = """
import sys
import cupy
from cupy.cuda import compiler
from fastbn.cuda import launch, warmup
from tests.simt import host_cupy

class Module(compiler.function.Module):
    def load(self, code):
        print(len(code), code[:4])

class Program(compiler._NVRTCProgram):
    def compile(self, *given):
        assert self.method == "ptx", "compiled"  # of an empty text: NVRTC's version is in it
        return super().compile(*given)

class RawKernel(cupy.RawKernel):  # on a device of compute capability 9.0 whose driver loads nothing
    shared_size_bytes = max_dynamic_shared_size_bytes = 0

    @property
    def kernel(self):
        names = "code", "file_path", "options", "backend", "translate_cucomplex", "enable_cooperative_groups", "jitify"
        state = self.__getstate__()
        return cupy._core.raw._get_raw_module.__wrapped__(*(state[name] for name in names), None, None)

compiler.function = type("functions", (), {"Module": Module})
compiler._NVRTCProgram, cupy.RawKernel = Program, RawKernel
compiler._get_arch = lambda: "90"
compiler._get_arch_for_options_for_nvrtc = compiler._get_arch_for_options_for_nvrtc.__wrapped__
with host_cupy.installed():
    for name, macros in warmup.kernels(warmup.device_of(90), ["float32"], [(4, 8)])[: int(sys.argv[1])]:
        launch.function(0, name, macros)
"""


def test_a_later_process_finds_them(request, tmp_path):
    """`launch.function` goes through CuPy's own `RawKernel` and loads what was compiled before, without compiling."""
    if reason := cuda_compile.without_compiler() or host_cupy.available():
        missing(request, reason)

    def run(code, *arguments):
        environment = os.environ | {"CUPY_CACHE_DIR": str(tmp_path)}
        return subprocess.run(
            [sys.executable, "-c", code, *arguments], env=environment, capture_output=True, text=True, check=False
        )

    compiled = run(COMPILE)
    assert (compiled.stdout, compiled.stderr) == ("2\n", "")
    sizes = sorted(file.stat().st_size - 40 for file in tmp_path.glob("*.cubin"))  # CuPy puts a hash before them
    loaded = run(LOAD, "2")
    assert sorted(loaded.stdout.splitlines()) == sorted(f"{size} b'\\x7fELF'" for size in sizes), loaded.stderr
    assert "AssertionError: compiled" in run(LOAD, "3").stderr


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def compiled(monkeypatch, tmp_path):
    """What the command compiles: here in no time."""
    found = []

    def compile_(kernel, architecture):
        found.append((kernel, architecture))
        (tmp_path / f"{hash(kernel)}-{architecture}.cubin").touch()

    monkeypatch.setenv("CUPY_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(cubins, "_compile", compile_)
    if reason := cuda_compile.without_compiler():
        pytest.skip(reason)
    return found


def test_command(compiled, capsys, tmp_path):
    arguments = ["warmup", "--cuda", "sm_80:54", "sm_90", "--dtype", "float32", "--shape", "4,8", "--shape", "2,8,3,3"]
    assert main([*arguments, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    expected = [
        (kernel, device.architecture)
        for device in (warmup.device_of(80, 54), warmup.device_of(90))
        for kernel in warmup.kernels(device, ["float32"], [(4, 8), (2, 8, 3, 3)])
    ]
    assert sorted(compiled) == sorted(expected)
    assert (printed["compiled"], printed["loaded"]) == (len(expected), 0)
    assert printed["kernel_cache"] == str(tmp_path)
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert f"0 kernels compiled, {len(expected)} there already" in out
    assert f"kept in {tmp_path}" in out


def test_command_for_the_gpu_that_is_here(compiled, monkeypatch):
    monkeypatch.setattr(launch, "device", lambda number: launch.Device(number, 86, 28, 99 << 10))
    assert main(["warmup", "--cuda", "here", "--dtype", "float16", "--shape", "4,8"]) == 0
    assert [k for k, _ in compiled] == warmup.kernels(warmup.device_of(86, 28), ["float16"], [(4, 8)])


def test_command_without_a_cache(compiled, capsys, monkeypatch):
    monkeypatch.setenv("CUPY_CACHE_IN_MEMORY", "1")
    assert main(["warmup", "--cuda", "sm_80", "--dtype", "float32", "--shape", "4,8"]) == 0
    assert "not kept: CUPY_CACHE_IN_MEMORY is 1" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("gpu", "message"),
    [
        ("90", "expected a compute capability such as sm_90, or here, got '90'"),
        ("sm_90:0", "expected a compute capability such as sm_90, or here, got 'sm_90:0'"),
        ("sm_61", "this GPU has compute capability 6.1; fastbn's kernels need 7.0"),
        ("here", "no NVIDIA driver was found"),
    ],
)
def test_wrong_gpus(gpu, message, capsys, monkeypatch):
    monkeypatch.setattr(launch, "device", lambda _: (_ for _ in ()).throw(RuntimeError("no NVIDIA driver was found")))
    with pytest.raises(SystemExit) as stopped:
        main(["warmup", "--cuda", gpu])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_an_architecture_that_the_compiler_does_not_know(request, capsys):
    if reason := cuda_compile.without_compiler():
        missing(request, reason)
    assert main(["warmup", "--cuda", "sm_77", "--dtype", "float32", "--shape", "4,8"]) == 1
    assert "sm_77: expected an architecture that NVRTC" in capsys.readouterr().err


def test_without_cupy(capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        main(["warmup", "--cuda", "sm_90"])
    assert "CUDA kernels need CuPy: pip install" in capsys.readouterr().err
