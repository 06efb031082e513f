"""Small cases that go every way through the CUDA kernels.

The checks are those of tests/cases/checks.py, and two for what these leave out.
"""

import contextlib
import ctypes
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from fastbn import reference
from tests.cases import checks, relu
from tests.cuda import running, scales
from tests.on_cupy import OnCupy
from tests.simt import cuda, host_cupy
from tests.support import OPTIONS, Layout, make_case

# --- memory -----------------------------------------------------------------------------------------------------------

MARGIN = 8 << 10
POISON = bytes([host_cupy.POISON]) * MARGIN  # NaN in every dtype
OTHER_POISON = b"\xf5\xff" * (MARGIN // 2)  # NaN too, of other bits: results of it are not taken for untouched memory


def with_margins(array: np.ndarray) -> np.ndarray:
    """A copy with space around it, so that a fault which reads beside it reads NaN there."""
    buffer = np.frombuffer(bytearray(OTHER_POISON + array.tobytes() + OTHER_POISON), np.uint8)
    return buffer[MARGIN : MARGIN + array.nbytes].view(array.dtype).reshape(array.shape)


@contextlib.contextmanager
def guarded() -> Iterator[None]:
    """Allocations have space around them: what a fault writes there is found, and harms nothing else."""
    import cupy

    allocated = []

    def allocate(size: int) -> Any:
        if size == 0:
            return host_cupy.allocate(0)
        pointer = host_cupy.allocate(size + 2 * MARGIN)
        allocated.append((pointer.mem, size))
        return pointer + MARGIN

    before = cupy.cuda.get_allocator()
    cupy.cuda.set_allocator(allocate)
    try:
        yield
    finally:
        cupy.cuda.set_allocator(before)
    for memory, size in allocated:
        for start in (memory.ptr, memory.ptr + MARGIN + size):
            assert ctypes.string_at(start, MARGIN) == POISON, "a kernel wrote beside an array"


# --- what is run: small cases that go every way through the kernels ---------------------------------------------------


@dataclass(frozen=True)
class Run:
    """A check on one case."""

    check: Callable[[Any], object]
    layout: Layout
    options: str = "plain"
    dtype: str = "float32"
    strategy: str | None = None
    alter: Callable[[Any], None] = lambda case: None
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Of the device."""
    wide: bool = False
    """Whether vectors are counted in 64 bits."""
    any_strides: bool = False
    """Whether addresses are made as of arrays of any strides."""
    mean: float = 3.0

    def device(self, **more: Any) -> Any:
        """The device of the case, whose threads hold two vectors of an array where it says nothing else."""
        return cuda.installed(
            **self.settings | {"tuning": {"items_per_thread": 2} | self.settings.get("tuning", {})}, **more
        )

    def __call__(self, emulated: cuda.Emulated, schedule: int) -> None:
        from fastbn.cuda import geometry, plans

        case = make_case(self.layout, self.dtype, OPTIONS[self.options], mean=self.mean)
        self.alter(case)
        case.x, case.dy = with_margins(case.x), with_margins(case.dy)
        for arrays, names in ((case.keywords, ("where", "weights")), (case.epilogue, ("residual",))):
            arrays |= {name: with_margins(arrays[name]) for name in names if name in arrays}
        emulated.schedule = schedule
        with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(), guarded():
            warnings.simplefilter("ignore", RuntimeWarning)  # NumPy's, of NaN and infinities
            patch.setattr(checks, "fastbn", OnCupy())
            patch.setattr(checks, "SAME_BITS", False)
            patch.setitem(plans.FORCED, "strategy", self.strategy)
            if self.wide:
                patch.setattr(geometry, "WIDE_FROM", 0)
            if self.any_strides:
                patch.setattr(geometry, "MOST_NEAR", 0)
            self.check(case)


def check_far_from_0(case):
    """y is what it is near 0, where the oracle takes it: check_forward lets a mean be off by 1e-7 of itself."""
    far = case.x + case.dtype.type(2**14)
    case.x = far - case.dtype.type(2**14)  # exact
    y, _ = checks.fastbn.batch_norm(far, case.gamma, case.beta, **case.keywords)
    forward = reference.batch_norm(case.x, case.gamma, case.beta, **case.keywords)
    checks.assert_close("y", y, forward.y, checks.y_bound(case, forward))


def check_relu(case):
    relu.check_gradient(case, checks.fastbn)


def check_gradients_of_statistics(case):
    """dmean and dvar, which tests/cases/checks.py does not have."""
    statistics = dict(zip(("dmean", "dvar"), np.random.default_rng(5).random((2, *case.layout.channels)), strict=True))
    y, saved = checks.fastbn.batch_norm(case.x, case.gamma, case.beta, **case.keywords)
    grads = checks.fastbn.batch_norm_backward(case.dy, saved, **statistics)
    forward = reference.batch_norm(case.x, case.gamma, case.beta, **case.keywords)
    dx, *_ = reference.batch_norm_backward(case.dy, forward, y=y, **statistics)
    checks.assert_close("dx", grads.x, dx, 1e-12)


def check_scaled(exponent):
    """Statistics and gradients of the case times a power of two."""

    def check(case):
        x, dy, along = scales.put_at_scale(case, exponent)
        scales.check_training(case, x, dy, exponent, along)

    return check


def check_small_gradients(case):
    """Beside small deviations: their products leave float32's range."""
    x, _, _ = scales.put_at_scale(case, -28)
    scales.check_training(case, x, scales.scaled(case.dy, -110), -28, -110)


def check_nothing_selected(case):
    """Without a gradient there is none, although there is neither a mean nor an rstd."""
    _, saved = checks.fastbn.batch_norm(case.x, where=np.zeros(case.layout.weight_shape, bool))
    grads = checks.fastbn.batch_norm_backward(0 * case.dy, saved)
    assert not any(gradient.any() for gradient in grads[:3])


def check_running_statistics(case):
    """Of any case, since they are made of numbers of channels alone."""
    running.check_bits(checks.fastbn, "float64", "float32")
    running.check_bits(checks.fastbn, "bfloat16", "float16", "float32")
    running.check_rounding(checks.fastbn)


def check_running_statistics_of_small_numbers(case):
    """Whose squares leave float64's range as they are."""
    updated = tuple(np.zeros((2, *case.layout.channels)))
    _, saved = checks.fastbn.batch_norm(np.ldexp(case.x, -480), running=updated, rate=1)
    expected = running.expected(*np.zeros_like(updated), saved.moments, rate=1)
    running.assert_same(updated, expected)
    assert expected[1].any()


def check_masked_out(case):
    """NaN, infinities and large numbers that weigh nothing."""
    case, garbage = scales.masked_case(case.layout, case.dtype.name, "where")
    y, saved, clean = scales.forward_over(case, garbage, checks.fastbn)
    scales.check_masked(case, garbage, checks.fastbn.batch_norm_backward(case.dy, saved), clean, y)


def nan_in_the_first_channel(case):
    case.x[0, 0] = np.nan


def infinities_of_two_groups(case):
    """Of the same thread, where it has eight rows of threads beside it, and 256 rows to a group."""
    case.x[0, 1] = np.inf
    case.x[256:480:8, 1] = -np.inf


def huge_beside_nan(case):
    huge(case)
    without_weight(np.nan)(case)


def without_weight(value):
    """Elements that are not selected are `value`."""

    def alter(case):
        case.x[~np.broadcast_to(case.keywords["where"], case.x.shape)] = value

    return alter


def weights_of_each_channel(case):
    case.keywords["weights"] = (np.random.default_rng(2).random(case.x.shape) < 0.7).astype(float)


def outliers_first(case):
    """Every thread starts each of its chunks of eight vectors far from all other elements.

    Of many such numbers one whose squares, added up one by one, are rounded badly.
    """
    case.x[...] = 0
    case.x.reshape(-1, 8, 64, 4)[:, 0, :, 0] = 17811.176


def outliers_in_first_rows(case):
    """Every thread of the first blocks starts far from all other elements."""
    case.x[...] = 0
    case.x[:8] = 333.3


def symmetric(case):
    """Channels whose mean is next to nothing."""
    half = len(case.x) // 2
    case.x[half : 2 * half], case.x[2 * half :] = -case.x[:half], 0


def large_gamma(case):
    case.gamma = np.ldexp(np.linspace(1, 2, case.layout.channels[0]), 60)


def huge(case):
    case.x *= case.dtype.type(1e30)  # whose square is infinite in float32


def tiny(case):
    case.x *= case.dtype.type(1e-30)  # whose square is 0 in float32


ROWS = Layout((3, 3, 9, 60))  # a channel is three rows of 135 vectors
MANY_ROWS = Layout((2, 7, 9, 60))
ONE_ROW = Layout((1, 1, 4096))
COLUMNS = Layout((151, 20))  # tiles of four lanes with four channels each, the second of which has one lane
NARROW_COLUMNS = Layout((211, 15))  # one tile of 16 lanes, 15 of which have a channel; splits of nine rows of threads
FEW_NARROW_COLUMNS = Layout((24, 15))
WIDE_COLUMNS = Layout((40, 72))
FEW_WIDE_COLUMNS = Layout((3, 72))  # blocks have fewer threads than tiles channels
TALL_COLUMNS = Layout((301, 32))  # one tile, of which four blocks merge eight pieces
LONG_COLUMNS = Layout((1501, 16))  # threads of one warp have several groups of chunks, each of them two vectors
RUNS_OF_ROWS = Layout((11, 32, 5, 5))  # vectors of 16 bytes run from one row into the next
BATCHES = Layout((3, 50, 4), (0, 2))

HALF = {"shared": 4 << 10}  # shared memory for half of a channel
TWICE = {"shared": 32 << 10, "tuning": {"items_per_thread": 4}}  # two vectors of each array where there are two arrays
ONE_WARP = {"tuning": {"threads": 32, "along_channels": 128}}
FEW_SPLITS = {"tuning": {"threads": 32, "passes": 1, "items_per_thread": 4}}
MANY_SPLITS = {"tuning": {"threads": 32, "passes": 16}}  # more than a block that merges them has rows of threads

moments, forward, backward = checks.check_moments, checks.check_forward, checks.check_backward
frozen, parts = checks.check_frozen, checks.check_parts

RUNS = {
    "moments, rows": Run(moments, ROWS),
    "moments, rows, 64 bits": Run(moments, ROWS, wide=True),
    "moments, rows, any strides": Run(moments, ROWS, any_strides=True),
    "moments, columns, far from 0": Run(moments, COLUMNS, mean=2e4),
    "moments, columns, tiny": Run(moments, COLUMNS, alter=tiny),
    "moments, rows, float64, far from 0": Run(moments, ROWS, dtype="float64", mean=2e4),
    "moments, rows, far from 0": Run(moments, ROWS, mean=2e4),
    "moments, rows, huge": Run(moments, ROWS, alter=huge),
    "moments, rows, huge, NaN without weight": Run(moments, ROWS, "where", alter=huge_beside_nan),
    "moments, rows, outliers without weight": Run(moments, ROWS, "where", alter=without_weight(1e15)),
    "moments, outliers first": Run(
        moments, ONE_ROW, alter=outliers_first, settings={"tuning": {"items_per_thread": 8}}
    ),
    "moments, columns": Run(moments, COLUMNS),
    "moments, columns, weights": Run(moments, COLUMNS, "weights relu", settings={"tuning": {"items_per_thread": 4}}),
    "moments, columns, weights of each channel": Run(moments, COLUMNS, alter=weights_of_each_channel),
    "moments, columns, NaN": Run(moments, COLUMNS, alter=nan_in_the_first_channel),
    "moments, long columns of halves, outliers first": Run(
        moments,
        LONG_COLUMNS,
        dtype="float16",
        settings={"tuning": {"threads": 32, "passes": 1, "items_per_thread": 8}},
        alter=outliers_in_first_rows,
    ),
    "moments, long columns, infinities": Run(
        moments, LONG_COLUMNS, settings=FEW_SPLITS, alter=infinities_of_two_groups
    ),
    "moments, narrow columns": Run(moments, NARROW_COLUMNS),
    "moments, long columns": Run(moments, LONG_COLUMNS, settings=FEW_SPLITS),
    "moments, many splits": Run(moments, NARROW_COLUMNS, settings=MANY_SPLITS),
    "moments, wide columns": Run(moments, WIDE_COLUMNS, dtype="float16", settings={"tuning": {"along_channels": 128}}),
    "moments, runs": Run(moments, RUNS_OF_ROWS, dtype="float16", settings={"tuning": {"threads": 128}}),
    "moments, runs of float32": Run(moments, RUNS_OF_ROWS, settings={"tuning": {"threads": 128}}),
    "moments, batches": Run(moments, BATCHES),
    "forward, block, rows": Run(forward, ROWS, strategy="block", settings=TWICE),
    "forward, block, rows, all": Run(forward, ROWS, "affine residual relu", strategy="block", settings=TWICE),
    "forward, block, rows, far from 0": Run(check_far_from_0, ROWS, strategy="block", settings=TWICE, mean=0.0),
    "forward, block, rows, float64, far from 0": Run(
        check_far_from_0, ROWS, dtype="float64", strategy="block", settings=TWICE, mean=0.0
    ),
    "forward, block, columns, NaN": Run(
        forward, COLUMNS, "affine residual relu", strategy="block", settings=TWICE, alter=nan_in_the_first_channel
    ),
    "forward, block, runs": Run(forward, RUNS_OF_ROWS, "affine residual relu", strategy="block", settings=TWICE),
    "forward, cluster": Run(forward, ROWS, strategy="cluster"),
    "forward, cluster, columns": Run(forward, TALL_COLUMNS, strategy="cluster", settings=ONE_WARP),
    "forward, cooperative": Run(forward, COLUMNS, strategy="cooperative"),
    "forward, cooperative, blocks take several tiles": Run(forward, MANY_ROWS, strategy="cooperative"),
    "forward, cooperative, groups take several tiles": Run(forward, MANY_ROWS, strategy="cooperative", settings=HALF),
    "forward, cooperative, wide columns": Run(
        forward, WIDE_COLUMNS, dtype="float16", strategy="cooperative", settings={"tuning": {"along_channels": 128}}
    ),
    "forward, two passes": Run(forward, COLUMNS, strategy="two passes"),
    "forward, two passes, one split": Run(
        forward, MANY_ROWS, strategy="two passes", settings={"tuning": {"passes": 1}}
    ),
    "running statistics, block, float64, small": Run(
        check_running_statistics_of_small_numbers, ROWS, dtype="float64", strategy="block", settings=TWICE
    ),
    "forward, two passes, float64, far from 0": Run(
        check_far_from_0, COLUMNS, dtype="float64", strategy="two passes", mean=0.0
    ),
    "backward, block, rows": Run(backward, ROWS, strategy="block", settings=TWICE),
    "backward, block, rows, far from 0": Run(backward, ROWS, strategy="block", settings=TWICE, mean=2e4),
    "backward, block, rows, all": Run(backward, ROWS, "affine residual relu", strategy="block", settings=TWICE),
    "backward, block, rows, float64, statistics": Run(
        check_gradients_of_statistics, ROWS, dtype="float64", strategy="block", settings=TWICE
    ),
    "backward, block, columns, NaN": Run(
        backward, COLUMNS, "affine residual relu", strategy="block", settings=TWICE, alter=nan_in_the_first_channel
    ),
    "backward, block, columns, weights": Run(
        backward, COLUMNS, "where weights residual", strategy="block", settings=TWICE, alter=without_weight(1e30)
    ),
    "backward, cluster": Run(backward, ROWS, strategy="cluster"),
    "backward, cooperative": Run(backward, COLUMNS, strategy="cooperative"),
    "backward, cooperative, narrow columns": Run(backward, NARROW_COLUMNS, strategy="cooperative"),
    "backward, cooperative, few narrow columns": Run(backward, FEW_NARROW_COLUMNS, strategy="cooperative"),
    "backward, cooperative, tall columns": Run(
        backward, TALL_COLUMNS, strategy="cooperative", settings={"shared": 32 << 10, "tuning": {"along_channels": 128}}
    ),
    "backward, cooperative, blocks take several tiles": Run(backward, MANY_ROWS, strategy="cooperative"),
    "backward, cooperative, runs": Run(backward, RUNS_OF_ROWS, "affine residual relu", strategy="cooperative"),
    "backward, two passes": Run(backward, COLUMNS, strategy="two passes"),
    "relu, block, rows": Run(check_relu, ROWS, "weights relu", strategy="block", settings=TWICE),
    "relu, block, columns, tiny": Run(
        check_relu, COLUMNS, "weights relu", "float16", strategy="block", settings=TWICE, alter=relu.tiny
    ),
    "relu, block, rows, beside the mean": Run(
        check_relu, ROWS, "weights relu", "float64", strategy="block", settings=TWICE, alter=relu.beside_the_mean
    ),
    "relu, cooperative, runs": Run(check_relu, RUNS_OF_ROWS, "affine relu", strategy="cooperative"),
    "relu, two passes": Run(check_relu, COLUMNS, "affine relu", "bfloat16", strategy="two passes", alter=relu.near_0),
    "training, block, rows, small": Run(check_scaled(-110), ROWS, strategy="block", settings=TWICE),
    "training, block, runs, small": Run(check_scaled(-110), RUNS_OF_ROWS, strategy="block", settings=TWICE),
    "training, block, rows, small deviations": Run(check_small_gradients, ROWS, strategy="block", settings=TWICE),
    "training, block, rows, large": Run(check_scaled(123), ROWS, strategy="block", settings=TWICE),
    "training, block, columns, large, affine": Run(
        check_scaled(123), COLUMNS, "affine residual relu", strategy="block", settings=TWICE, alter=symmetric
    ),
    "training, block, rows, small, large gamma": Run(
        check_scaled(-110), ROWS, strategy="block", settings=TWICE, alter=large_gamma
    ),
    "training, cooperative, float64, small": Run(check_scaled(-900), COLUMNS, dtype="float64", strategy="cooperative"),
    "mixed scales, rows": Run(lambda case: scales.check_mixed("float64", "rows"), ROWS, strategy="block"),
    "mixed scales, columns": Run(
        lambda case: scales.check_mixed("float64", "columns"),
        COLUMNS,
        strategy="two passes",
        settings={"tuning": {"along_channels": 128, "passes": 64}},
    ),
    "training, block, masked out": Run(check_masked_out, COLUMNS, strategy="block", settings=TWICE),
    "training, block, any channel": Run(
        lambda case: scales.check_whatever_a_channel_holds(case, "where"),
        COLUMNS,
        strategy="block",
        settings=TWICE,
    ),
    "training, block, nothing selected": Run(check_nothing_selected, ROWS, strategy="block", settings=TWICE),
    "training, two passes, masked out": Run(check_masked_out, ROWS, strategy="two passes"),
    "inference, more channels than threads": Run(
        frozen, FEW_WIDE_COLUMNS, dtype="float16", settings={"tuning": {"along_channels": 128}}
    ),
    "frozen": Run(frozen, NARROW_COLUMNS),
    "frozen, rows": Run(frozen, ROWS),
    "frozen, runs": Run(frozen, RUNS_OF_ROWS),
    "frozen, NaN": Run(frozen, NARROW_COLUMNS, alter=nan_in_the_first_channel),
    "frozen, float16 parameters": Run(frozen, NARROW_COLUMNS, "where"),
    "running statistics": Run(check_running_statistics, COLUMNS),
    "parts, rows": Run(parts, ROWS),
    "parts, long columns": Run(parts, LONG_COLUMNS, settings=FEW_SPLITS),
    "parts, many splits": Run(parts, NARROW_COLUMNS, settings=MANY_SPLITS),
    "parts, columns": Run(parts, COLUMNS, "where", settings=TWICE),
}
