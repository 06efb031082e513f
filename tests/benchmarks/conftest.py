"""What tests of the benchmarks ask for."""

import contextlib

import pytest

from fastbn import environment
from tests.benchmarks.gpu_stand_in import PROPERTIES, Event, Graph, Pool, Stream, raw_kernel
from tests.conftest import missing
from tests.simt import cuda, host_cupy


@pytest.fixture
def device(request, monkeypatch):
    """CuPy's events, streams and graphs, and PyTorch's, on a machine without a GPU."""
    reason = cuda.available()
    if reason is not None:
        missing(request, reason)
    import cupy

    for stand_in, real in ((Event, cupy.cuda.Event), (Stream, cupy.cuda.Stream), (Graph, cupy.cuda.graph.Graph)):
        names = {name for name in vars(stand_in) if name[0] != "_"} - {"time", "capturing", "launches", "replay"}
        assert names <= set(dir(real))
    runtime = cupy.cuda.runtime
    with cuda.installed() as emulated:
        for owner, name, stand_in in (
            (cupy.cuda, "Event", Event),
            (cupy.cuda, "Stream", Stream),
            (cupy.cuda, "get_elapsed_time", lambda start, stop: 1e3 * (stop.time - start.time)),
            (cupy, "RawKernel", raw_kernel),
            (cupy, "get_default_memory_pool", Pool),
            (runtime, "getDeviceProperties", lambda number: PROPERTIES),
            (runtime, "memGetInfo", lambda: (1 << 30, 2 << 30)),
        ):
            assert hasattr(owner, name)
            monkeypatch.setattr(owner, name, stand_in)
        monkeypatch.setitem(host_cupy.ATTRIBUTES, "L2CacheSize", 600)  # two buffers of the toy
        torch = environment.optional("torch")
        if torch is not None:
            assert hasattr(torch.cuda.CUDAGraph, "replay")
            monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
            monkeypatch.setattr(torch.backends.cudnn, "version", lambda: None)  # which looks for a device where it can
            monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
            monkeypatch.setattr(torch.cuda, "graph", contextlib.nullcontext)
            monkeypatch.setattr(torch, "as_tensor", lambda a, device: torch.from_numpy(host_cupy.to_numpy(a)))
        yield emulated
