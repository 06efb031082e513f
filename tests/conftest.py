"""How tests are shared among workers."""

import pytest

from fastbn import repeated
from fastbn.cpu import plans


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """A file's tests go to one worker, unless they name a group: two workers would compile the same kernels."""
    for item in items:
        if item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(item.path.stem))


@pytest.fixture(scope="module")
def cuda_device():
    """Kernels for CuPy arrays run: executed on the CPU. What was launched is in the result."""
    from tests.simt import cuda

    reason = cuda.available()
    if reason is not None:
        pytest.skip(reason)
    with cuda.installed() as emulated:
        yield emulated


@pytest.fixture
def cuda_arrays(cuda_device):
    """fastbn's functions for NumPy arrays, computed on CuPy arrays."""
    from tests.simt import cuda

    return cuda.OnCupy()


@pytest.fixture
def fresh_plans():
    """For tests that change how work is divided: nothing planned before counts, nor after."""
    forget()
    yield
    forget()


def forget():
    repeated.forget()
    for plan in (plans.moments, plans.normalize, plans.forward, plans.grad_sums, plans.grad_input, plans.backward):
        plan.cache_clear()
