"""What tests of calls on CuPy arrays ask for."""

import types
import weakref

import numpy as np
import pytest

from tests.cuda.harness import Counted
from tests.simt import cuda, host_cupy, host_memory


@pytest.fixture
def nothing_waits(cuda_device, monkeypatch):
    """No call brings anything to the host or waits for the device."""
    import cupy

    def waited(*_args, **_keywords):
        raise AssertionError("a call waited for the device")

    for name in ("deviceSynchronize", "streamSynchronize", "memcpy"):
        monkeypatch.setattr(cupy.cuda.runtime, name, waited)
    monkeypatch.setattr(cupy.cuda.Stream, "synchronize", waited)
    monkeypatch.setattr(cupy.cuda.Device, "synchronize", waited)
    yield
    assert host_cupy.operations["get"] == 0


@pytest.fixture
def counted(cuda_device):
    """Runs calls with nothing planned before, nor after the test."""
    cuda.forget()
    yield Counted(cuda_device)
    cuda.forget()


@pytest.fixture
def buffers(cuda_device):
    """Weak references to all memory that is allocated, on the device that is the current one then."""
    import cupy

    found, pointer = [], type(host_cupy.allocate(0))

    def allocate(size):
        buffer = np.full(size + 512, host_cupy.POISON, np.uint8)
        found.append(weakref.ref(buffer))
        start = buffer.ctypes.data + -buffer.ctypes.data % 512
        for watcher in host_memory.WATCHERS:
            watcher(start, size, buffer)
        return pointer(cupy.cuda.UnownedMemory(start, size, buffer, cupy.cuda.runtime.getDevice()), 0)

    before = cupy.cuda.get_allocator()
    cupy.cuda.set_allocator(allocate)
    yield found
    cupy.cuda.set_allocator(before)


@pytest.fixture
def devices(counted, buffers, monkeypatch):
    """Two devices, and on which of them kernels are launched."""
    import cupy

    from fastbn.cuda import launch

    current, launched, function, device = [0], [], launch.function, launch.device

    class Device:
        def __init__(self, number=None):
            self.id = current[-1] if number is None else number

        def __enter__(self):
            current.append(self.id)
            return self

        def __exit__(self, *_):
            current.pop()

    def noted(number, *args):
        compiled = function(number, *args)

        def run(*given, **options):
            launched.append((number, current[-1]))
            return compiled(*given, **options)

        return run

    monkeypatch.setattr(cupy.cuda, "Device", Device)
    monkeypatch.setattr(cupy.cuda.runtime, "getDevice", lambda: current[-1])
    monkeypatch.setattr(launch, "device", lambda number: device(number)._replace(number=number))
    monkeypatch.setattr(launch, "function", noted)
    yield types.SimpleNamespace(current=current, launched=launched)
    assert current == [0]


@pytest.fixture
def cupy():
    if reason := host_cupy.available():
        pytest.skip(reason)
    return pytest.importorskip("cupy")


@pytest.fixture
def host(cupy):
    with host_cupy.installed() as module:
        yield module
