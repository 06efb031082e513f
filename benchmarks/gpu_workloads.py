"""What `benchmarks.gpu` measures: shapes, the order of their importance, arrays, and the contenders' calls on them."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

import fastbn
from benchmarks.gpu_device import Call, Machine
from fastbn import bench, environment

EPS = bench.EPS

# --- workloads --------------------------------------------------------------------------------------------------------

BYTES = {
    "forward": (bench.OPERATIONS["forward"], 3),
    "backward": (bench.OPERATIONS["backward"], 5),
    "inference": (bench.OPERATIONS["inference"], 2),
    "moments": (bench.OPERATIONS["moments"], 1),
    "fused forward": (3, 4),  # with residual and relu
    "fused backward": (5, 8),
}
"""Trips of x's bytes over memory: where all is read once, and where what follows from a reduction reads it again."""
PRIMARY = ("forward", "backward", "inference")

SMALL_BATCH, LARGE_BATCH = bench.BATCH, 256
RESNET50_V15 = ((128, 56, 56), (256, 28, 28), (512, 14, 14))
"""What the form that is trained today adds: its strides are in the 3 x 3 convolutions, after these."""
LARGE = (4, 128, 1024, 1024)
TINY = ((2, 16, 4, 4), (32, 64, 1, 1), (1, 8, 16))
TINY_BYTES = 64 << 10  # of x, to which calls are measured on the host and in graphs as well
QUICK = ((32, 256, 14, 14), (32, 2048, 7, 7), (2, 16, 4, 4))


class Job(NamedTuple):
    """The cells that share their arrays."""

    shape: tuple[int, ...]
    dtype: str
    layout: str
    operations: tuple[str, ...]

    @property
    def nbytes(self) -> int:
        """Of x."""
        return math.prod(self.shape) * environment.float_dtypes()[self.dtype].itemsize


def planned(
    shapes: Sequence[tuple[int, ...]], dtypes: Sequence[str], layouts: Sequence[str], operations: Sequence[str]
) -> list[Job]:
    """The jobs of a run, the most important first; shapes given stand for all."""
    small, large = ([(batch, *layer) for layer in bench.RESNET50] for batch in (SMALL_BATCH, LARGE_BATCH))
    more = [(batch, *layer) for batch in (LARGE_BATCH, SMALL_BATCH) for layer in RESNET50_V15]
    some = [(LARGE_BATCH, *layer) for layer in bench.QUICK]
    order = [
        ("float32", small), ("float32", TINY), ("float32", large), ("float16", large), ("float32", [LARGE]),
        ("bfloat16", some), ("float64", some), ("float16", small), ("float16", [LARGE]), ("bfloat16", large),
        ("float32", more), ("bfloat16", [LARGE]), ("float64", [LARGE]), ("float16", more), ("bfloat16", small),
    ]  # fmt: skip
    if shapes:
        order = [(dtype, shapes) for dtype in dtypes]
    jobs = [
        Job(shape, dtype, layout, tuple(operations))
        for dtype, group in order
        if dtype in dtypes
        for shape in group
        for layout in layouts
    ]
    return list(dict.fromkeys(jobs))


# --- arrays and calls -------------------------------------------------------------------------------------------------

CACHES = 4  # times the second-level cache, that the buffers of an array exceed together
MOST_BUFFERS = 256
TILE = 1_000_003  # normal numbers, repeated throughout an array: odd, so that channels differ


class Data:
    """Buffers of one job, taken in turn, and the contenders' calls on them."""

    def __init__(self, machine: Machine, job: Job, count: int | None = None) -> None:
        xp, self.machine, self.dtype = machine.xp, machine, job.dtype
        channels_last = job.layout == "NHWC"
        self.axis = -1 if channels_last else 1
        shape = (job.shape[0], *job.shape[2:], job.shape[1]) if channels_last else job.shape
        itemtype = environment.float_dtypes()[job.dtype]
        self.count = count or min(MOST_BUFFERS, -(-CACHES * machine.cache_bytes // job.nbytes))
        arrays, temporaries = 9 * self.count, 5
        if (needed := (arrays + temporaries) * job.nbytes) > (free := machine.free_bytes()):
            raise TooLargeError(f"needs {needed / 1e9:.0f} GB, {free / 1e9:.0f} GB are free")

        rng = np.random.default_rng(0)
        normal = (rng.standard_normal(min(TILE, math.prod(shape)), np.float32) + np.float32(0.5)).astype(itemtype)
        words = np.dtype(f"u{itemtype.itemsize}")  # which every version of CuPy copies
        tile = xp.asarray(np.concatenate([normal, normal]).view(words))

        def filled(seed: int) -> Any:
            array = xp.empty(shape, itemtype)
            flat, start = array.view(words).reshape(-1), seed * 7919 % normal.size
            part = tile[start : start + normal.size]
            whole = flat.size // part.size * part.size
            flat[:whole].reshape(-1, part.size)[...] = part
            flat[whole:] = part[: flat.size - whole]
            return array

        self.x = [filled(2 * i) for i in range(self.count)]
        self.dy = [filled(2 * i + 1) for i in range(self.count)]
        parameter = np.float64 if job.dtype == "float64" else np.float32
        numbers = rng.random((4, job.shape[1])).astype(parameter) + parameter(0.5)
        self.gamma, self.beta, self.mean, self.var = (xp.asarray(row) for row in numbers)

    def contenders(self, what: str, notes: dict[str, str]) -> dict[str, Call]:
        """Calls by name, fastbn's first; all allocate what they return. What PyTorch's raise is noted."""
        saved = self._saved(what)
        calls, peer = {"fastbn": self._ours(what, saved), "copy": self._copy}, None
        with noted(notes, "torch"):
            peer = None if self.machine.torch is None else _Torch(self, saved)
        for name, cudnn in (("torch native", False), ("torch cudnn", True)) if peer else ():
            with noted(notes, name):
                if not cudnn or peer.has_cudnn(what):
                    calls[name] = peer.call(what, cudnn)
        return calls

    def ours(self, what: str) -> Call:
        return self._ours(what, self._saved(what))

    def _saved(self, what: str) -> list[fastbn.Saved]:
        """What a backward pass takes, y among it where it needs that."""
        if "backward" not in what:
            return []
        forward = self._fused_forward if what == "fused backward" else self._forward
        return [forward(i)[1] for i in range(self.count)]

    def _forward(self, i: int) -> tuple[Any, fastbn.Saved]:
        return fastbn.batch_norm(self.x[i % self.count], self.gamma, self.beta, channel_axis=self.axis)

    def _fused_forward(self, i: int) -> tuple[Any, fastbn.Saved]:
        x, residual = self.x[i % self.count], self.dy[i % self.count]
        return fastbn.batch_norm(
            x, self.gamma, self.beta, channel_axis=self.axis, residual=residual, activation="relu"
        )  # fmt: skip

    def _ours(self, what: str, saved: list[fastbn.Saved]) -> Call:
        x, dy, n = self.x, self.dy, self.count
        given = (self.mean, self.var, self.gamma, self.beta)
        calls: dict[str, Call] = {
            "forward": self._forward,
            "backward": lambda i: fastbn.batch_norm_backward(dy[i % n], saved[i % n]),
            "inference": lambda i: fastbn.batch_norm_inference(x[i % n], *given, channel_axis=self.axis),
            "moments": lambda i: fastbn.moments(x[i % n], channel_axis=self.axis),
            "fused forward": self._fused_forward,
            "fused backward": lambda i: fastbn.batch_norm_backward(dy[i % n], saved[i % n]),
        }
        return calls[what]

    def _copy(self, i: int) -> Any:
        x = self.x[i % self.count]
        out = self.machine.xp.empty_like(x)
        out.data.copy_from_device_async(x.data, x.nbytes)
        return out


class _Torch:
    """PyTorch's calls on the arrays of `Data`, channels-last ones as its channels-last tensors."""

    def __init__(self, data: Data, saved: list[fastbn.Saved]) -> None:
        machine = data.machine
        self.torch, self.use_cudnn, self.count = machine.torch, machine.use_cudnn, data.count

        def tensor(array: Any) -> Any:
            found = machine.tensor(array)
            return found.movedim(-1, 1) if data.axis == -1 else found

        self.x, self.dy = [tensor(a) for a in data.x], [tensor(a) for a in data.dy]
        self.y = [tensor(kept.y) for kept in saved if kept.y is not None]
        self.gamma, self.beta, self.mean, self.var = (
            machine.tensor(a) for a in (data.gamma, data.beta, data.mean, data.var)
        )

    def has_cudnn(self, what: str) -> bool:
        """Whether PyTorch takes cuDNN's kernels where it may; it does not for every dtype and shape."""
        self.use_cudnn(True)
        return what != "moments" and bool(self._implementation(self.x[0], what != "inference", True)[4] == 1)

    def _implementation(self, x: Any, training: bool, cudnn: bool) -> Any:
        """y, mean, rstd, cuDNN's reserve, and which kernels were taken: what `batch_norm` calls."""
        statistics = (None, None) if training else (self.mean, self.var)
        function = self.torch.ops.aten._batch_norm_impl_index
        return function(x, self.gamma, self.beta, *statistics, training, 0.1, EPS, cudnn)

    def call(self, what: str, cudnn: bool) -> Call:
        x, dy, y, n = self.x, self.dy, self.y, self.count
        batch_norm, var_mean, ops = self.torch.nn.functional.batch_norm, self.torch.var_mean, self.torch.ops.aten
        reduced = [axis for axis in range(x[0].ndim) if axis != 1]

        def forward(i: int) -> Any:
            return batch_norm(x[i % n], None, None, self.gamma, self.beta, True, 0.1, EPS)

        def inference(i: int) -> Any:
            return batch_norm(x[i % n], self.mean, self.var, self.gamma, self.beta, False, 0.1, EPS)

        def fused_forward(i: int) -> Any:
            return forward(i).add_(dy[i % n]).relu_()

        def moments(i: int) -> Any:
            return var_mean(x[i % n], reduced, correction=0)

        if "backward" not in what:
            calls = {"forward": forward, "inference": inference, "moments": moments, "fused forward": fused_forward}
            return calls[what]
        self.use_cudnn(cudnn)
        saved = [self._implementation(a, True, cudnn)[1:] for a in x]

        def backward(i: int, dz: Any = None) -> Any:
            mean, rstd, reserve, chosen = saved[i % n]
            return ops._batch_norm_impl_index_backward(
                chosen, x[i % n], dy[i % n] if dz is None else dz, self.gamma, None, None, mean, rstd,
                True, EPS, [True, True, True], reserve,
            )  # fmt: skip

        def fused_backward(i: int) -> Any:
            dz = ops.threshold_backward(dy[i % n], y[i % n], 0)  # also the gradient of the residual
            return (*backward(i, dz), dz)

        return backward if what == "backward" else fused_backward


class TooLargeError(Exception):
    """Arrays that the device has no room for."""


def described(error: BaseException) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


@contextlib.contextmanager
def noted(notes: dict[str, str], name: str) -> Iterator[None]:
    """What is raised goes into notes, and no further."""
    try:
        yield
    except Exception as error:
        notes[name] = described(error)
