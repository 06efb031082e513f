"""How tests are shared among workers; what several test files ask for."""

import gc
import importlib
import os
import re
from pathlib import Path

import numpy as np
import pytest

import fastbn
from fastbn import call
from fastbn.cpu import gradient_plans, plans
from tests.support import DTYPES

# What test modules share has asserts, too.
pytest.register_assert_rewrite("tests.adapters", "tests.cases", "tests.cpu", "tests.cuda")

os.environ.setdefault("FASTBN_COMPILE_HELPER", "0")  # tests have a worker on each core

_lines = (Path(__file__).parent / "slow.txt").read_text().splitlines()
SLOW = re.compile("|".join(re.escape(line).replace(r"\*", ".*") for line in _lines if line and line[0] != "#"))

try:
    from xdist.scheduler import LoadScopeScheduling
except ModuleNotFoundError:
    LoadScopeScheduling = object


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    return ByKernels(config, log)


class ByKernels(LoadScopeScheduling):
    """A file's tests of one dtype or architecture go to one worker: two would compile the same kernels at a time.

    Names are asked, not marks of groups: pytest-xdist 3.8 does not see the marks under pytest 9.2, and says nothing.
    """

    def _split_scope(self, nodeid):
        path, _, name = nodeid.partition("::")
        words = re.split(r"\W", name)
        return " ".join([path, *(word for word in words if word in DTYPES or word.startswith("sm_"))])


@pytest.hookimpl(tryfirst=True)  # before those that are slow are left out
def pytest_collection_modifyitems(items):
    for item in items:
        if SLOW.fullmatch(item.nodeid):
            item.add_marker(pytest.mark.slow)


def pytest_collection_finish():
    """Garbage is looked for less often, and not in what was collected, which stays: compilations take 15 % less."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


def pytest_addoption(parser):
    parser.addoption(
        "--require-cuda-harness", action="store_true", help="fail where CUDA kernels cannot be compiled or executed"
    )
    parser.addoption("--require-browser", action="store_true", help="fail where published pages cannot be opened")
    parser.addoption(
        "--ptx",
        type=int,
        choices=(80, 90),
        help="run CuPy arrays' kernels by the PTX compiled for a compute capability",
    )
    parser.addoption("--require-cuda", action="store_true", help="run the matrix of CuPy arrays on a GPU, or fail")


def missing(request, reason, option="--require-cuda-harness"):
    """Skip, visibly; fail where what is missing is required."""
    if request.config.getoption(option.removeprefix("--").replace("-", "_")):
        pytest.fail(f"{option}: {reason}")
    pytest.skip(reason)


@pytest.fixture(scope="module")
def cuda_device(request):
    """Kernels for CuPy arrays are executed on the CPU. What was launched is in the result."""
    from tests import ptx, simt

    architecture = request.config.getoption("ptx")
    cuda = importlib.import_module(f"{(ptx if architecture else simt).__name__}.cuda")
    reason = cuda.available()
    if reason is not None:
        missing(request, reason)
    with cuda.installed(architecture) if architecture else cuda.installed() as emulated:
        yield emulated


@pytest.fixture
def cuda_arrays(request):
    """fastbn's functions for NumPy arrays, computed on CuPy arrays."""
    from tests.on_cupy import OnCupy, OnGpu, without_gpu

    if request.config.getoption("require_cuda"):
        reason = without_gpu()
        if reason is not None:
            pytest.fail(f"--require-cuda: {reason}")
        return OnGpu()
    request.getfixturevalue("cuda_device")
    return OnCupy()


@pytest.fixture
def example(monkeypatch):
    """Import a program of the examples by its name."""
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "examples")
    return importlib.import_module


@pytest.fixture(scope="session", autouse=True)
def compiled_signatures():
    """The first call of a process may be signed in another way than those that follow."""
    fastbn.mean(np.ones(3))


@pytest.fixture
def fresh_plans():
    """For tests that change how work is divided: nothing planned before counts, nor after."""
    forget()
    yield
    forget()


def forget():
    call.forget()
    for plan in (plans.moments, plans.normalize, plans.forward):
        plan.cache_clear()
    for plan in (gradient_plans.grad_sums, gradient_plans.grad_input, gradient_plans.backward):
        plan.cache_clear()


@pytest.fixture
def found(monkeypatch):
    """Signatures whose calls were prepared before."""
    signatures, find = [], call.find

    def noted(signature):
        prepared = find(signature)
        signatures.extend([signature] * (prepared is not None))
        return prepared

    monkeypatch.setattr(call, "_prepared", {})
    for module in ("functional", "primitives"):
        monkeypatch.setattr(f"fastbn.{module}.find", noted)
    return signatures
