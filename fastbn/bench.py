"""How fast batch norm runs on this machine, beside a copy, the obvious NumPy formula and PyTorch.

The contenders of a case run in turn in one process and on as many threads, so that whatever else the machine does
meets all of them; figures are medians. Every call meets other buffers than the one before, together more than twice
the last cache, so that all data come from memory.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

import fastbn
from fastbn.caches import last_cache
from fastbn.cpu.program import Program
from fastbn.cpu.sizes import CHUNK as BLOCK
from fastbn.cpu.team import threads_for
from fastbn.environment import float_dtypes, torch_with_our_threads

EPS = 1e-5
OPERATIONS = {"forward": 2, "backward": 3, "inference": 2, "moments": 1, "fused": 3}
"""Counted bytes, in units of those of x: what must be read and written if nothing is read twice. ``fused`` is inference
with residual and relu."""
PASSES = ("forward", "backward", "inference")

RESNET50 = (
    (64, 112, 112), (64, 56, 56), (256, 56, 56), (128, 28, 28), (512, 28, 28),
    (256, 14, 14), (1024, 14, 14), (512, 7, 7), (2048, 7, 7),
)  # fmt: skip
"""Channels, height and width of the batch norms in ResNet-50 (He et al. 2015, table 1)."""
BATCH = 32
QUICK = ((256, 56, 56), (256, 14, 14), (2048, 7, 7))

ROUNDS = 2  # of bursts; three lengthen a first run, with every kernel to compile, past two minutes
BURST = 3  # calls of one contender, at least, before the next has its turn
BURST_SECONDS, MOST_CALLS = 0.001, 100  # small calls are repeated until the burst has taken so long
NUMPY_SECONDS = 0.15  # after which NumPy's formula, a hundred times slower than a copy and as steady, is not repeated
PAUSE = 0.02  # seconds between Numba's and PyTorch's calls: OpenMP's threads spin on for 10 ms, on the other's cores
BUFFERS = 256  # at most; arrays below a quarter of a megabyte are not driven out of every cache

Array = np.ndarray[Any, Any]
Call = Callable[[int], object]


class Result(NamedTuple):
    """Median seconds of one case; None for a contender that is not there."""

    shape: tuple[int, ...]
    dtype: str
    layout: str
    what: str
    counted_bytes: int
    copied_bytes: int
    seconds: dict[str, float | None]
    """fastbn: the plain call; fastbn_out: with ``out=`` given; copy; numpy; torch."""

    @property
    def nbytes(self) -> int:
        """Bytes of x."""
        return self.counted_bytes // OPERATIONS[self.what]

    @property
    def ours(self) -> float:
        """Seconds of the call with ``out=``, or of the plain one where there is nothing to write."""
        return _given(self.seconds["fastbn"] if self.what == "moments" else self.seconds["fastbn_out"])

    @property
    def gb_per_s(self) -> float:
        return self.counted_bytes / self.ours / 1e9

    @property
    def copy_gb_per_s(self) -> float:
        return self.copied_bytes / _given(self.seconds["copy"]) / 1e9

    def speedup(self, peer: str) -> float | None:
        """How many times faster the plain call is than the peer's."""
        theirs = self.seconds[peer]
        return None if theirs is None else theirs / _given(self.seconds["fastbn"])

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return self._asdict() | {
            "gb_per_s": self.gb_per_s,
            "copy_gb_per_s": self.copy_gb_per_s,
            "share_of_copy": self.gb_per_s / self.copy_gb_per_s,
            "times_numpy": self.speedup("numpy"),
            "times_torch": self.speedup("torch"),
        }


class Job(NamedTuple):
    """One shape and layout, for a progress bar to count."""

    shape: tuple[int, ...]
    dtype: str
    layout: str
    rounds: int = ROUNDS
    passes: tuple[str, ...] = PASSES

    @property
    def name(self) -> str:
        return f"{self.layout} {'x'.join(map(str, self.shape))}"

    def run(self) -> list[Result]:
        return measure(self.shape, self.dtype, self.layout, self.rounds, self.passes)


def _given(seconds: float | None) -> float:
    return math.nan if seconds is None else seconds


def measure(
    shape: tuple[int, ...], dtype: str, layout: str, rounds: int = ROUNDS, passes: tuple[str, ...] = PASSES
) -> list[Result]:
    """Passes on arrays of one shape ``(N, C, ...)``, which lie in memory as the layout says."""
    data = Buffers(shape, dtype, layout)
    torch = torch_with_our_threads()
    results = []
    for what in passes:
        calls = data.ours(what) | {"copy": data.copy}
        if dtype in ("float32", "float64"):  # NumPy's float16 takes seconds, and it has no arithmetic for bfloat16
            calls["numpy"] = data.numpys(what)
        if torch is not None:
            calls["torch"] = data.torchs(torch, what)
        medians = _in_turn(calls, rounds)
        seconds = {name: medians.get(name) for name in ("fastbn", "fastbn_out", "copy", "numpy", "torch")}
        nbytes = data.x[0].nbytes
        results.append(Result(shape, dtype, layout, what, OPERATIONS[what] * nbytes, 2 * data.raw_x[0].nbytes, seconds))
    return results


def _in_turn(calls: dict[str, Call], rounds: int) -> dict[str, float]:
    """Median seconds of each call, made in turn, each with the number of the buffers to use."""
    turn = 0
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            if name == "numpy" and sum(times[name]) > NUMPY_SECONDS:
                continue
            if "torch" in calls and name in ("torch", "fastbn"):
                time.sleep(PAUSE)
            if name != "numpy":
                call(turn)  # compiles or loads kernels, and wakes the threads
                turn += 1
            burst = time.perf_counter()
            for done in range(MOST_CALLS):
                start = time.perf_counter()
                if done >= BURST and start - burst > BURST_SECONDS:
                    break
                call(turn)
                times[name].append(time.perf_counter() - start)
                turn += 1
                if name == "numpy" and sum(times[name]) > NUMPY_SECONDS:
                    break
    return {name: float(np.median(measured)) for name, measured in times.items()}


class Buffers:
    """Buffers of one case, taken in turn, and the contenders' calls on them."""

    def __init__(self, shape: tuple[int, ...], dtype: str, layout: str) -> None:
        self.layout = layout
        channels_last = layout == "NHWC"
        self.channel_axis = -1 if channels_last else 1
        shape = (shape[0], *shape[2:], shape[1]) if channels_last else shape
        self.axes = tuple(axis for axis in range(len(shape)) if axis != self.channel_axis % len(shape))
        self.channels = shape[self.channel_axis]
        itemtype = float_dtypes()[dtype]
        nbytes = math.prod(shape) * itemtype.itemsize
        count = min(BUFFERS, max(2, -(-max(2 * last_cache(), 64 << 20) // nbytes)))

        self.raw_x, self.raw_out = ([_aligned(nbytes) for _ in range(count)] for _ in range(2))
        self.x, self.dy, self.out = (
            [raw.view(np.uint8)[:nbytes].view(itemtype).reshape(shape) for raw in raws]
            for raws in (self.raw_x, [_aligned(nbytes) for _ in range(count)], self.raw_out)
        )
        for number, array in enumerate(self.x + self.dy):
            fill(array, number)
        blocks = self.raw_x[0].size // BLOCK
        self._copy = Program(threads_for(self.raw_x[0].size), self.raw_x[0].size, {"x": "f4*", "out": "f4*"})
        self._copy.launch("copying.stream_blocks", blocks, x=self._copy.array("x"), out=self._copy.array("out"))
        parameter: Any = np.float64 if dtype == "float64" else np.float32
        self.gamma, self.beta = np.random.default_rng(0).random((2, self.channels)).astype(parameter) + parameter(0.5)
        self.mean, self.var = self.beta, self.gamma
        self.dtype = dtype

    def copy(self, i: int) -> None:
        i %= len(self.x)
        self._copy(self.raw_x[i], self.raw_out[i])

    def ours(self, what: str) -> dict[str, Call]:
        """The plain call, which allocates its result, and the one that writes to ``out``."""
        x, dy, out, n, axis = self.x, self.dy, self.out, len(self.x), self.channel_axis
        if what == "forward":

            def call(i: int, out: Any = None) -> object:
                return fastbn.batch_norm(x[i % n], self.gamma, self.beta, channel_axis=axis, out=out)

        elif what == "backward":
            saved = [fastbn.batch_norm(a, self.gamma, self.beta, channel_axis=axis, out=out[0])[1] for a in x]

            def call(i: int, out: Any = None) -> object:
                return fastbn.batch_norm_backward(dy[i % n], saved[i % n], out=out)

        elif what == "moments":
            return {"fastbn": lambda i: fastbn.moments(x[i % n], channel_axis=axis)}
        else:
            given = (self.mean, self.var, self.gamma, self.beta)
            fused = what == "fused"

            def call(i: int, out: Any = None) -> object:
                options: Any = {"residual": dy[i % n], "activation": "relu"} if fused else {}
                return fastbn.batch_norm_inference(x[i % n], *given, channel_axis=axis, out=out, **options)

        return {"fastbn": call, "fastbn_out": lambda i: call(i, out[i % n])}

    def saved(self, what: str) -> list[tuple[Array, Array]]:
        """What the peers' backward passes take from the forward pass: mean and rstd of each buffer."""
        if what != "backward":
            return []
        moments = (fastbn.moments(x, channel_axis=self.channel_axis) for x in self.x)
        return [(m.mean.astype(self.mean.dtype), m.rstd(EPS).astype(self.mean.dtype)) for m in moments]

    def numpys(self, what: str) -> Call:
        """The obvious formula, with the per-channel numbers that the pass is given."""
        axes, n = self.axes, len(self.x)
        spread = tuple(-1 if axis == self.channel_axis % self.x[0].ndim else 1 for axis in range(self.x[0].ndim))
        gamma, beta, mean, var = (a.reshape(spread) for a in (self.gamma, self.beta, self.mean, self.var))
        size = self.x[0].size // self.channels
        saved = [[a.reshape(spread) for a in pair] for pair in self.saved(what)]

        def forward(i: int) -> object:
            x = self.x[i % n]
            mean, var = x.mean(axes, keepdims=True), x.var(axes, keepdims=True)
            return (x - mean) / np.sqrt(var + np.float32(EPS)) * gamma + beta

        def backward(i: int) -> object:
            x, dy = self.x[i % n], self.dy[i % n]
            mean, rstd = saved[i % n]
            xhat = (x - mean) * rstd
            dgamma, dbeta = (dy * xhat).sum(axes, keepdims=True), dy.sum(axes, keepdims=True)
            return gamma * rstd * (dy - (dbeta + xhat * dgamma) / size), dgamma, dbeta

        def inference(i: int) -> object:
            return (self.x[i % n] - mean) / np.sqrt(var + np.float32(EPS)) * gamma + beta

        def moments(i: int) -> object:
            return self.x[i % n].mean(axes), self.x[i % n].var(axes)

        def fused(i: int) -> object:
            return np.maximum(inference(i) + self.dy[i % n], 0)

        calls = {"forward": forward, "backward": backward, "inference": inference, "moments": moments, "fused": fused}
        return calls[what]

    def torchs(self, torch: Any, what: str) -> Call:
        """PyTorch's own calls on the same memory; channels-last arrays as its channels-last tensors."""

        def tensor(a: Array) -> Any:
            t = torch.from_numpy(a.view(np.uint16)).view(torch.bfloat16) if self.dtype == "bfloat16" else None
            t = torch.from_numpy(a) if t is None else t
            return t.movedim(-1, 1) if self.layout == "NHWC" else t

        x, dy, n = [tensor(a) for a in self.x], [tensor(a) for a in self.dy], len(self.x)
        gamma, beta, mean, var = (torch.from_numpy(a) for a in (self.gamma, self.beta, self.mean, self.var))
        batch_norm = torch.nn.functional.batch_norm
        if what == "forward":
            return lambda i: batch_norm(x[i % n], None, None, gamma, beta, True, 0.1, EPS)
        if what == "inference":
            return lambda i: batch_norm(x[i % n], mean, var, gamma, beta, False, 0.1, EPS)
        if what == "fused":
            return lambda i: torch.relu(batch_norm(x[i % n], mean, var, gamma, beta, False, 0.1, EPS) + dy[i % n])
        if what == "moments":
            reduced = [axis for axis in range(x[0].ndim) if axis != 1]
            return lambda i: torch.var_mean(x[i % n], reduced, correction=0)
        saved = [[torch.from_numpy(a) for a in pair] for pair in self.saved(what)]
        backward = torch.ops.aten.native_batch_norm_backward
        return lambda i: backward(
            dy[i % n], x[i % n], gamma, None, None, *saved[i % n], True, EPS, [True, True, True]
        )  # fmt: skip


def fill(array: Array, number: int) -> None:
    """Write the normal numbers about 0.5 of the array of this number; each array's are others."""
    array.reshape(-1)[...] = np.resize(np.roll(_normal(), -7919 * number), array.size)


@lru_cache
def _normal() -> Array:
    """Repeated throughout an array: an odd number of them, so that channels differ."""
    return np.random.default_rng(0).standard_normal(1_000_003, np.float32) + np.float32(0.5)


def _aligned(nbytes: int) -> Array:
    """Whole blocks of float32 that hold so many bytes, from the start of a cache line."""
    elements = -(-nbytes // (4 * BLOCK)) * BLOCK
    buffer = np.empty(elements + 16, np.float32)
    buffer[...] = 0.0  # unlike np.zeros, whose pages the first contender to write would pay for
    start = -buffer.ctypes.data % 64 // 4
    return buffer[start : start + elements]
