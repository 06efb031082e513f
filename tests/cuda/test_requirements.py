"""What a machine lacks for CuPy arrays, and what the messages say to do about it."""

import types

import pytest

from fastbn import check, environment

cupy = pytest.importorskip("cupy")
if int(cupy.__version__.partition(".")[0]) < 13:
    pytest.skip("CuPy is older than 13", allow_module_level=True)

from fastbn import cuda  # noqa: E402 - after CuPy is known to be there
from fastbn.cuda import requirements  # noqa: E402 - likewise


@pytest.fixture
def no_device(monkeypatch):
    """A runtime that finds no device, with the driver and the CUDA that it claims to be of."""

    def pretend(driver, runtime=12090, error=35):
        def fail(*_):
            raise cupy.cuda.runtime.CUDARuntimeError(error)

        monkeypatch.setattr(cupy.cuda, "Device", fail)
        monkeypatch.setattr(cupy.cuda.runtime, "driverGetVersion", lambda: driver)
        monkeypatch.setattr(cupy.cuda.runtime, "runtimeGetVersion", lambda: runtime)

    return pretend


@pytest.mark.parametrize(
    ("driver", "runtime", "message"),
    [
        (0, 12090, "no NVIDIA driver was found; install the driver of your GPU, one that supports CUDA 12"),
        (11080, 12090, r"driver supports CUDA 11\.8, older than CUDA 12, for which .*; update the driver$"),
        (12040, 13000, r"driver supports CUDA 12\.4, older than CUDA 13, .*update the driver or install cupy-cuda12x"),
        (12090, 12090, "CUDA finds no GPU to use .*CUDA_VISIBLE_DEVICES"),
    ],
)
def test_no_driver_or_an_old_one(no_device, driver, runtime, message):
    no_device(driver, runtime)
    with pytest.raises(RuntimeError, match=message):
        requirements.attributes(0)


def test_a_gpu_too_old():
    with pytest.raises(RuntimeError, match=r"compute capability 6\.1; fastbn's kernels need 7\.0 \(Volta, 2017\)"):
        requirements.check_architecture(61)
    for supported in (70, 75, 80, 86, 89, 90, 100, 120):
        requirements.check_architecture(supported)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CuPy failed to load libnvrtc.so.12: OSError: libnvrtc.so.12: cannot open shared object file"),
        ImportError("libnvrtc.so.12: cannot open shared object file: No such file or directory"),
        OSError("libnvrtc.so.12: cannot open shared object file"),
    ],
)
def test_no_compiler(error):
    class Kernel:
        @property
        def kernel(self):
            raise error

    with pytest.raises(RuntimeError, match=r"NVRTC.*pip install 'cupy-cuda1[23]x\[ctk\]'"):
        requirements.compiled(Kernel())


def test_other_errors_of_the_compiler_stay_themselves():
    class Kernel:
        @property
        def kernel(self):
            raise ValueError("nvrtc: error: invalid value")

    with pytest.raises(ValueError, match="invalid value"):
        requirements.compiled(Kernel())


def test_an_old_cupy(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "cupy", types.SimpleNamespace(__version__="12.3.0"))
    with pytest.raises(ImportError, match=r"CuPy 13 or later, found 12\.3\.0; install cupy-cuda12x or cupy-cuda13x"):
        requirements.cupy()


def test_the_command_line_says_what_is_missing(monkeypatch):
    monkeypatch.setattr(cuda.launch, "device", lambda _: (_ for _ in ()).throw(RuntimeError("no NVIDIA driver")))
    assert environment.backend_state("cupy") == "installed, but not usable: no NVIDIA driver"
    assert environment.ready_backends() == ["numpy"]


def test_the_command_lines_check_on_cupy_arrays(cuda_device):
    assert environment.backend_state("cupy") == "ready"
    jobs = check.jobs("cupy", ("nist", "offset", "constant"), quick=True)
    rows = [row for job in jobs for row in job.run()]
    assert len(rows) > 20
    assert all(row.name.startswith("cupy ") for row in rows)
    assert [row.name for row in rows if not row.ok] == []
