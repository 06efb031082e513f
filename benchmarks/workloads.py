"""What every measurement here shares: workloads and their names, counted bytes, inputs, and the contenders' calls.

It asks nothing of fastbn but its public functions, so that the same calls measure commits of long ago.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, lru_cache
from typing import Any, NamedTuple, Protocol

import numpy as np

import fastbn

Call = Callable[[int], object]
"""Of a contender, with the number of the buffers to use."""

EPS = 1e-5

# --- shapes and names -------------------------------------------------------------------------------------------------

BATCH = 32
RESNET50 = (
    (64, 112, 112), (64, 56, 56), (256, 56, 56), (128, 28, 28), (512, 28, 28),
    (256, 14, 14), (1024, 14, 14), (512, 7, 7), (2048, 7, 7),
)  # fmt: skip
"""Channels, height and width of the batch norms in ResNet-50 (He et al. 2015, table 1)."""
RESNET50_V15 = ((128, 56, 56), (256, 28, 28), (512, 14, 14))
"""What the form that is trained today adds: its strides are in the 3 x 3 convolutions, after these."""

SHAPES = {f"resnet50_{h}x{w}x{c}": (BATCH, c, h, w) for c, h, w in RESNET50} | {
    "dense_4096x512": (4096, 512),
    "dense_256x1024": (256, 1024),
    "volume_8x32x32x32x32": (8, 32, 32, 32, 32),
    "image_2x1024x1024x3": (2, 3, 1024, 1024),  # few channels
    "small_1x16x8": (1, 8, 16),
    "small_64x1x128": (64, 128, 1),
}
"""N x C x spatial shapes by names that recorded results go by: a new shape is a new name."""
LAYOUTS = ("NCHW", "NHWC")
DTYPES = ("float32", "float16", "bfloat16", "float64")

# --- counted bytes ----------------------------------------------------------------------------------------------------


class Trips(NamedTuple):
    """Of x's bytes over memory: where all is read once, and where what follows from a reduction reads it again."""

    once: int
    again: int


TRIPS = {
    "moments": Trips(1, 1),
    "forward": Trips(2, 3),
    "backward": Trips(3, 5),
    "inference": Trips(2, 2),
    "fused": Trips(3, 3),  # inference with residual and relu
    "fused forward": Trips(3, 4),
    "fused backward": Trips(5, 8),
}


def trips_at_best(shape: Sequence[int], itemsize: int, layout: str, what: str, cache: int, threads: int) -> int:
    """Trips that no kernel can save: data read twice go twice where a core cannot keep them between.

    What a core reads twice is a channel's slab of x (in backward passes of x and dy, in fused ones also of y or the
    residual); channels-last it is the core's share of all channels. It is kept where it takes at most 75 % of `cache`,
    the bytes of one core's second-level cache.
    """
    once, again = TRIPS[what]
    slab = math.prod(shape) * itemsize // (shape[1] if layout == "NCHW" else threads)
    return again if (again - once) * slab > 0.75 * cache else once


# --- inputs -----------------------------------------------------------------------------------------------------------

TILE = 1_000_003  # normal numbers, repeated throughout an array: odd, so that channels differ


def dtype_of(name: str) -> np.dtype[Any]:
    """The NumPy dtype; bfloat16 comes with ml_dtypes."""
    if name == "bfloat16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(name)


@lru_cache(maxsize=1)
def _normal(dtype: np.dtype[Any], xp: Any) -> Any:
    """Normal numbers about 0.5, twice over, as the words that every version of CuPy copies."""
    normal = (np.random.default_rng(0).standard_normal(TILE, np.float32) + np.float32(0.5)).astype(dtype)
    return xp.asarray(np.concatenate([normal, normal]).view(f"u{dtype.itemsize}"))


def fill(array: Any, number: int, xp: Any = np) -> None:
    """Write the normal numbers that the array of this number has: seeded, none of them the same as another's."""
    tile = _normal(array.dtype, xp)
    flat, start = array.view(f"u{array.itemsize}").reshape(-1), number * 7919 % TILE
    part = tile[start : start + TILE]
    whole = flat.size // TILE * TILE
    flat[:whole].reshape(-1, TILE)[...] = part
    flat[whole:] = part[: flat.size - whole]


def parameters(channels: int, dtype: str) -> np.ndarray[Any, Any]:
    """gamma, beta, mean and var in the dtype that parameters have beside `dtype`."""
    kind: Any = np.float64 if dtype == "float64" else np.float32
    return np.random.default_rng(1).random((4, channels)).astype(kind) + kind(0.5)


# --- calls ------------------------------------------------------------------------------------------------------------

CACHES = 4  # times the last cache, that the buffers of an array exceed together
MOST_BUFFERS = 256


class Machine(Protocol):
    """Where arrays lie and calls run: `benchmarks.host.Host`, `benchmarks.gpu_device.Machine`."""

    xp: Any
    cache_bytes: int
    """Of the last cache before memory."""

    @property
    def torch(self) -> Any:
        """PyTorch on this device, or None."""

    def free_bytes(self) -> float: ...

    def synchronize(self) -> None: ...

    def copy(self, x: Any, out: Any) -> None:
        """Move x's bytes to out's as fast as the machine can."""

    def tensor(self, array: Any) -> Any:
        """PyTorch's view of an array's memory."""

    def use_cudnn(self, yes: bool) -> None:
        """Whether PyTorch may take cuDNN's kernels."""


def buffers(cache: int, nbytes: int, caches: int = CACHES) -> int:
    """Arrays of so many bytes that exceed the cache so many times."""
    return min(MOST_BUFFERS, -(-caches * cache // nbytes))


class Data:
    """Buffers of one workload, taken in turn so that no cache holds them, and the contenders' calls on them."""

    def __init__(
        self, machine: Machine, shape: tuple[int, ...], dtype: str, layout: str, count: int | None = None
    ) -> None:
        xp, self.machine, self.dtype = machine.xp, machine, dtype_of(dtype)
        self.axis = -1 if layout == "NHWC" else 1
        self.shape = (shape[0], *shape[2:], shape[1]) if layout == "NHWC" else shape
        nbytes = math.prod(shape) * self.dtype.itemsize
        self.count = count or buffers(machine.cache_bytes, nbytes)
        arrays, temporaries = 9 * self.count, 5
        if (needed := (arrays + temporaries) * nbytes) > (free := machine.free_bytes()):
            raise TooLargeError(f"needs {needed / 1e9:.0f} GB, {free / 1e9:.0f} GB are free")

        self.x, self.dy = ([xp.empty(self.shape, self.dtype) for _ in range(self.count)] for _ in range(2))
        for number, array in enumerate(self.x + self.dy):
            fill(array, number, xp)
        self.gamma, self.beta, self.mean, self.var = (xp.asarray(row) for row in parameters(shape[1], dtype))

    @cached_property
    def out(self) -> list[Any]:
        """Arrays to write to, whose pages are there."""
        arrays = [self.machine.xp.empty_like(x) for x in self.x]
        for number, array in enumerate(arrays):
            fill(array, number, self.machine.xp)
        return arrays

    def contenders(self, what: str, notes: dict[str, str]) -> dict[str, Call]:
        """Calls by name, fastbn's first; all allocate what they return. What PyTorch's raise is noted."""
        saved = self._saved(what)
        calls, peer = {"fastbn": self._ours(what, saved), "copy": self._new_copy}, None
        with noted(notes, "torch"):
            peer = None if self.machine.torch is None else Torch(self, saved)
        for name, cudnn in (("torch native", False), ("torch cudnn", True)) if peer else ():
            with noted(notes, name):
                if not cudnn or peer.has_cudnn(what):
                    calls[name] = peer.call(what, cudnn)
        return calls

    def ours(self, what: str, out: bool = False) -> Call:
        """Fastbn's call; with `out` it writes to `self.out`."""
        return self._ours(what, self._saved(what), self.out if out else None)

    def torchs(self, what: str, cudnn: bool = False) -> Call:
        """PyTorch's call, which allocates what it returns."""
        return Torch(self, self._saved(what)).call(what, cudnn)

    def copy(self, i: int) -> None:
        self.machine.copy(self.x[i % self.count], self.out[i % self.count])

    def _new_copy(self, i: int) -> Any:
        x = self.x[i % self.count]
        out = self.machine.xp.empty_like(x)
        self.machine.copy(x, out)
        return out

    def _saved(self, what: str) -> list[fastbn.Saved]:
        """What a backward pass takes, y among it where it needs that."""
        if "backward" not in what:
            return []
        forward = self._ours(what.replace("backward", "forward"), [])
        return [forward(i)[1] for i in range(self.count)]  # type: ignore[index]

    def _ours(self, what: str, saved: list[fastbn.Saved], out: Sequence[Any] | None = None) -> Call:
        x, dy, n = self.x, self.dy, self.count
        to = out or [None] * n
        training: dict[str, Any] = {"gamma": self.gamma, "beta": self.beta, "channel_axis": self.axis}
        given = training | {"mean": self.mean, "var": self.var}

        def fused(i: int) -> dict[str, Any]:
            return {"residual": dy[i % n], "activation": "relu", "out": to[i % n]}

        calls: dict[str, Call] = {
            "moments": lambda i: fastbn.moments(x[i % n], channel_axis=self.axis),
            "forward": lambda i: fastbn.batch_norm(x[i % n], **training, out=to[i % n]),
            "backward": lambda i: fastbn.batch_norm_backward(dy[i % n], saved[i % n], out=to[i % n]),
            "inference": lambda i: fastbn.batch_norm_inference(x[i % n], **given, out=to[i % n]),
            "fused": lambda i: fastbn.batch_norm_inference(x[i % n], **given, **fused(i)),
            "fused forward": lambda i: fastbn.batch_norm(x[i % n], **training, **fused(i)),
        }
        calls["fused backward"] = calls["backward"]
        return calls[what]


class Torch:
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

        def fused(i: int) -> Any:
            return inference(i).add_(dy[i % n]).relu_()

        def fused_forward(i: int) -> Any:
            return forward(i).add_(dy[i % n]).relu_()

        def moments(i: int) -> Any:
            return var_mean(x[i % n], reduced, correction=0)

        if "backward" not in what:
            calls = {"moments": moments, "forward": forward, "inference": inference}
            calls |= {"fused": fused, "fused forward": fused_forward}
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
