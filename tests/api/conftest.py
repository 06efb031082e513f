"""What tests of public functions ask for."""

import numpy as np
import pytest

from tests.cases.layers import Place
from tests.on_cupy import without_gpu


@pytest.fixture(params=["numpy", "cupy"])
def place(request):
    if request.param == "numpy":
        return Place(np, lambda a: a, lambda a: a)
    if request.config.getoption("require_cuda"):
        if reason := without_gpu():
            pytest.fail(f"--require-cuda: {reason}")
        import cupy

        return Place(cupy, cupy.asarray, cupy.asnumpy)
    request.getfixturevalue("cuda_device")
    import cupy

    from tests.simt import host_cupy

    return Place(cupy, host_cupy.to_cupy, host_cupy.to_numpy)
