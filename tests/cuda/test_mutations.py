"""Faults put into the CUDA kernels, one at a time: a check must find each, and pass without it.

The checks are those of tests/api/test_matrix.py, and two for what these leave out.

`python -m tests.cuda.test_mutations` prints which check found what.
"""

import contextlib
import ctypes
import functools
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pytest

from fastbn import reference
from tests.api import test_matrix
from tests.conftest import missing
from tests.cuda import test_running, test_scales
from tests.on_cupy import OnCupy
from tests.simt import cuda, host_cupy, simt
from tests.support import OPTIONS, Layout, make_case

SCHEDULES = range(6)  # of the kernels as they are
MOST_SCHEDULES = range(200)  # until one shows a fault: some need a rare order


@pytest.fixture(autouse=True)
def harness(request):
    reason = cuda.available()
    if reason is not None:
        missing(request, reason)


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
            return host_cupy._allocate(0)
        pointer = host_cupy._allocate(size + 2 * MARGIN)
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
    mean: float = 3.0

    def device(self, **more: Any) -> Any:
        """The device of the case, whose threads hold two vectors of an array where it says nothing else."""
        return cuda.installed(
            **self.settings | {"tuning": {"items_per_thread": 2} | self.settings.get("tuning", {})}, **more
        )

    def __call__(self, emulated: cuda.Emulated, schedule: int) -> None:
        from fastbn.cuda import plans

        case = make_case(self.layout, self.dtype, OPTIONS[self.options], mean=self.mean)
        self.alter(case)
        case.x, case.dy = with_margins(case.x), with_margins(case.dy)
        for arrays, names in ((case.keywords, ("where", "weights")), (case.epilogue, ("residual",))):
            arrays |= {name: with_margins(arrays[name]) for name in names if name in arrays}
        emulated.schedule = schedule
        with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(), guarded():
            warnings.simplefilter("ignore", RuntimeWarning)  # NumPy's, of NaN and infinities
            patch.setattr(test_matrix, "fastbn", OnCupy())
            patch.setattr(test_matrix, "SAME_BITS", False)
            patch.setitem(plans.FORCED, "strategy", self.strategy)
            if self.wide:
                patch.setattr(plans, "WIDE_FROM", 0)
            self.check(case)


def check_far_from_0(case):
    """y is what it is near 0, where the oracle takes it: check_forward lets a mean be off by 1e-7 of itself."""
    far = case.x + case.dtype.type(2**14)
    case.x = far - case.dtype.type(2**14)  # exact
    y, _ = test_matrix.fastbn.batch_norm(far, case.gamma, case.beta, **case.keywords)
    forward = reference.batch_norm(case.x, case.gamma, case.beta, **case.keywords)
    test_matrix.assert_close("y", y, forward.y, test_matrix.y_bound(case, forward))


def check_gradients_of_statistics(case):
    """dmean and dvar, which the checks of tests/api/test_matrix.py do not have."""
    statistics = dict(zip(("dmean", "dvar"), np.random.default_rng(5).random((2, *case.layout.channels)), strict=True))
    y, saved = test_matrix.fastbn.batch_norm(case.x, case.gamma, case.beta, **case.keywords)
    grads = test_matrix.fastbn.batch_norm_backward(case.dy, saved, **statistics)
    forward = reference.batch_norm(case.x, case.gamma, case.beta, **case.keywords)
    dx, *_ = reference.batch_norm_backward(case.dy, forward, y=y, **statistics)
    test_matrix.assert_close("dx", grads.x, dx, 1e-12)


def check_scaled(exponent):
    """Statistics and gradients of the case times a power of two."""

    def check(case):
        x, dy, along = test_scales.put_at_scale(case, exponent)
        test_scales.check_training(case, x, dy, exponent, along)

    return check


def check_running_statistics(case):
    """Of any case, since they are made of numbers of channels alone."""
    test_running.check_bits(test_matrix.fastbn, "float64", "float32")
    test_running.check_bits(test_matrix.fastbn, "bfloat16", "float16", "float32")
    test_running.check_rounding(test_matrix.fastbn)


def check_masked_out(case):
    """NaN, infinities and large numbers that weigh nothing."""
    case, garbage = test_scales.masked_case(case.layout, case.dtype.name, "where")
    y, saved, clean = test_scales.forward_over(case, garbage, test_matrix.fastbn)
    test_scales.check_masked(case, garbage, test_matrix.fastbn.batch_norm_backward(case.dy, saved), clean, y)


def nan_in_the_first_channel(case):
    case.x[0, 0] = np.nan


def infinities(case):
    """Of both signs in one channel, for the same thread; of one in another."""
    case.x[[0, 16], 1] = np.inf, -np.inf
    case.x[3, 2] = np.inf


def without_weight(value):
    """Elements that are not selected are `value`."""

    def alter(case):
        case.x[~np.broadcast_to(case.keywords["where"], case.x.shape)] = value

    return alter


def mask_of_each_channel(case):
    case.keywords["where"] = np.random.default_rng(2).random(case.x.shape) < 0.7


def outliers_first(case):
    """Every thread starts each of its chunks of eight vectors far from all other elements.

    Of many such numbers one whose squares, added up one by one, are rounded badly.
    """
    case.x[...] = 0
    case.x.reshape(-1, 8, 64, 4)[:, 0, :, 0] = 17811.176


def symmetric(case):
    """Channels whose mean is next to nothing."""
    half = len(case.x) // 2
    case.x[half : 2 * half], case.x[2 * half :] = -case.x[:half], 0


def large_gamma(case):
    case.gamma = np.ldexp(np.linspace(1, 2, case.layout.channels[0]), 60)


def huge(case):
    case.x *= case.dtype.type(1e30)  # whose square is infinite in float32


ROWS = Layout((3, 3, 9, 60))  # a channel is three rows of 135 vectors
MANY_ROWS = Layout((2, 7, 9, 60))
ONE_ROW = Layout((1, 1, 4096))
COLUMNS = Layout((151, 20))  # tiles of four lanes with four channels each, the second of which has one lane
NARROW_COLUMNS = Layout((211, 15))  # one tile of 16 lanes, 15 of which have a channel; splits of nine rows of threads
FEW_NARROW_COLUMNS = Layout((24, 15))
WIDE_COLUMNS = Layout((40, 72))
BATCHES = Layout((3, 50, 4), (0, 2))

HALF = {"shared": 4 << 10}  # shared memory for half of a channel
TWICE = {"shared": 32 << 10, "tuning": {"items_per_thread": 4}}  # two vectors of each array where there are two arrays

moments, forward, backward = test_matrix.check_moments, test_matrix.check_forward, test_matrix.check_backward
frozen, parts = test_matrix.check_frozen, test_matrix.check_parts

RUNS = {
    "moments, rows": Run(moments, ROWS),
    "moments, rows, 64 bits": Run(moments, ROWS, wide=True),
    "moments, rows, float64, far from 0": Run(moments, ROWS, dtype="float64", mean=2e4),
    "moments, rows, far from 0": Run(moments, ROWS, mean=2e4),
    "moments, rows, huge": Run(moments, ROWS, alter=huge),
    "moments, rows, NaN without weight": Run(moments, ROWS, "where", alter=without_weight(np.nan)),
    "moments, rows, outliers without weight": Run(moments, ROWS, "where", alter=without_weight(1e15)),
    "moments, outliers first": Run(
        moments, ONE_ROW, alter=outliers_first, settings={"tuning": {"items_per_thread": 8}}
    ),
    "moments, columns": Run(moments, COLUMNS),
    "moments, columns, weights": Run(moments, COLUMNS, "weights relu", settings={"tuning": {"items_per_thread": 4}}),
    "statistics, columns, a mask of each channel": Run(
        test_matrix.check_statistics, COLUMNS, alter=mask_of_each_channel
    ),
    "moments, columns, NaN": Run(moments, COLUMNS, alter=nan_in_the_first_channel),
    "moments, columns, infinities": Run(moments, COLUMNS, alter=infinities),
    "moments, narrow columns": Run(moments, NARROW_COLUMNS),
    "moments, wide columns": Run(moments, WIDE_COLUMNS, dtype="float16", settings={"tuning": {"along_channels": 128}}),
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
    "forward, cluster": Run(forward, ROWS, strategy="cluster"),
    "forward, cooperative": Run(forward, COLUMNS, strategy="cooperative"),
    "forward, cooperative, blocks take several tiles": Run(forward, MANY_ROWS, strategy="cooperative"),
    "forward, cooperative, groups take several tiles": Run(forward, MANY_ROWS, strategy="cooperative", settings=HALF),
    "forward, two passes": Run(forward, COLUMNS, strategy="two passes"),
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
    "backward, cooperative": Run(backward, COLUMNS, strategy="cooperative"),
    "backward, cooperative, narrow columns": Run(backward, NARROW_COLUMNS, strategy="cooperative"),
    "backward, cooperative, few narrow columns": Run(backward, FEW_NARROW_COLUMNS, strategy="cooperative"),
    "backward, cooperative, blocks take several tiles": Run(backward, MANY_ROWS, strategy="cooperative"),
    "backward, two passes": Run(backward, COLUMNS, strategy="two passes"),
    "training, block, rows, small": Run(check_scaled(-110), ROWS, strategy="block", settings=TWICE),
    "training, block, rows, large": Run(check_scaled(123), ROWS, strategy="block", settings=TWICE),
    "training, block, columns, large, affine": Run(
        check_scaled(123), COLUMNS, "affine residual relu", strategy="block", settings=TWICE, alter=symmetric
    ),
    "training, block, rows, small, large gamma": Run(
        check_scaled(-110), ROWS, strategy="block", settings=TWICE, alter=large_gamma
    ),
    "training, cooperative, float64, small": Run(check_scaled(-900), COLUMNS, dtype="float64", strategy="cooperative"),
    "mixed scales, rows": Run(lambda case: test_scales.check_mixed("float64", "rows"), ROWS, strategy="block"),
    "mixed scales, columns": Run(
        lambda case: test_scales.check_mixed("float64", "columns"),
        COLUMNS,
        strategy="two passes",
        settings={"tuning": {"along_channels": 128, "passes": 64}},
    ),
    "training, block, masked out": Run(check_masked_out, COLUMNS, strategy="block", settings=TWICE),
    "training, block, any channel": Run(
        lambda case: test_scales.check_whatever_a_channel_holds(case, "where"),
        COLUMNS,
        strategy="block",
        settings=TWICE,
    ),
    "training, two passes, masked out": Run(check_masked_out, ROWS, strategy="two passes"),
    "frozen": Run(frozen, NARROW_COLUMNS),
    "frozen, NaN": Run(frozen, NARROW_COLUMNS, alter=nan_in_the_first_channel),
    "frozen, float16 parameters": Run(frozen, NARROW_COLUMNS, "where"),
    "running statistics": Run(check_running_statistics, COLUMNS),
    "parts, rows": Run(parts, ROWS),
    "parts, columns": Run(parts, COLUMNS, "where", settings=TWICE),
}

# --- the faults -------------------------------------------------------------------------------------------------------


class Fault(NamedTuple):
    name: str
    kernel: str
    """In whose text it is."""
    text: str
    """Of the kernel, where it is found once."""
    wrong: str
    run: str
    """What finds it, under one of the schedules."""


FAULTS = [
    # tile.cuh
    Fault(
        "one vector behind the last", "statistics",
        "(last - v + (ROWS - 1)) / ROWS", "(last - v + ROWS) / ROWS", "moments, narrow columns",
    ),
    Fault(
        "one vector behind the last is written", "normalize",
        "(last - v + (ROWS - 1)) / ROWS", "(last - v + ROWS) / ROWS", "frozen",
    ),
    Fault(
        "incomplete rows of threads left out", "statistics",
        "(last - v + (ROWS - 1)) / ROWS", "(last - v) / ROWS", "moments, rows",
    ),
    Fault(
        "channels behind the last", "statistics",
        "active = channel < p.channels;", "active = true;", "moments, columns",
    ),
    Fault(
        "parts of channels behind the last", "grad_sums",
        "i64 split, const Sums (&sums)[CHANNELS]) {\n    if (threadIdx.x / LANES != 0 || !tile.active) return;",
        "i64 split, const Sums (&sums)[CHANNELS]) {\n    if (threadIdx.x / LANES != 0) return;",
        "parts, columns",
    ),
    Fault(
        "last vector of a split left out", "statistics",
        "end < p.vectors ? end : p.vectors", "end < p.vectors ? end - 1 : p.vectors", "moments, columns",
    ),
    Fault(
        "last split too long", "statistics",
        "end < p.vectors ? end : p.vectors", "end", "moments, columns",
    ),
    Fault(
        "backwards from one block too many", "normalize",
        "gridDim.x - 1 - blockIdx.x", "gridDim.x - blockIdx.x", "forward, two passes",
    ),
    Fault(
        "division by the vectors of a row", "statistics",
        ">> p.row_shift", ">> (p.row_shift + 1)", "moments, rows",
    ),
    Fault(
        "position in a row, in vectors", "statistics",
        "static_cast<unsigned>(p.row_vectors)) * DEPTH", "static_cast<unsigned>(p.row_vectors))", "moments, rows",
    ),
    Fault(
        "position in a row, in vectors, 64 bits", "statistics",
        "(v - outer * p.row_vectors) * DEPTH", "(v - outer * p.row_vectors)", "moments, rows, 64 bits",
    ),
    Fault(
        "stride of batches", "statistics",
        "batch * strides[0] + channel * strides[2]", "channel * strides[2]", "moments, batches",
    ),
    Fault(
        "numbers of batches", "statistics",
        "batch * p.channels + channel + j", "channel + j", "moments, batches",
    ),
    Fault(
        "weights along a vector of rows", "statistics",
        "j * p.weight_strides[3]", "0", "moments, rows, outliers without weight",
    ),
    Fault(
        "weights along a vector of channels", "statistics",
        "j * p.weight_strides[2]", "0", "statistics, columns, a mask of each channel",
    ),
    Fault(
        "vectors stored beyond the count", "forward",
        "store(items, p.y, p.y_strides, p, tile, v, count);",
        "store(items, p.y, p.y_strides, p, tile, v, ITEMS_PER_THREAD);",
        "forward, block, rows",
    ),
    Fault(
        "float16 parameters read as bfloat16", "normalize",
        "type == FLOAT16 ? half_to_float(bits)", "type == BFLOAT16 ? half_to_float(bits)", "frozen, float16 parameters",
    ),
    # tile.cuh: warps and groups of blocks
    Fault(
        "half of a warp shuffles", "statistics",
        "__shfl_xor_sync(0xffffffffu", "__shfl_xor_sync(0xffffu", "moments, rows",
    ),
    Fault(
        "butterfly from the first lane", "grad_sums",
        "int bit = from; bit < to;", "int bit = 1; bit < to;", "parts, columns",
    ),
    Fault(
        "butterfly without the last step", "grad_sums",
        "int bit = from; bit < to;", "int bit = from; bit < to / 2;", "parts, rows",
    ),
    Fault(
        "clusters do not wait", "forward",
        "    cluster_barrier();\n", "\n", "forward, cluster",
    ),
    Fault(
        "barrier of a group: round not counted", "forward",
        "group_barrier(p, ++round)", "group_barrier(p, round)", "forward, cooperative",
    ),
    Fault(
        "barrier of a group: the first round's number", "forward",
        "round * static_cast<unsigned>(p.splits)", "static_cast<unsigned>(p.splits)",
        "forward, cooperative, groups take several tiles",
    ),
    Fault(
        "barrier of a group: one counter for all", "forward",
        "p.counters + blockIdx.x / static_cast<unsigned>(p.splits)", "p.counters", "forward, cooperative",
    ),
    Fault(
        "barrier of a group: arrives before its threads", "backward",
        "#else\n    __syncthreads();\n    if (threadIdx.x == 0) {", "#else\n    if (threadIdx.x == 0) {",
        "backward, cooperative, few narrow columns",
    ),
    Fault(
        "barrier of a group: one thread waits", "forward",
        "        __threadfence();\n    }\n    __syncthreads();", "        __threadfence();\n    }",
        "forward, cooperative",
    ),
    # accumulator.cuh
    Fault(
        "distances from 0", "statistics",
        "first = chunk.at(0, 0);", "first = 0;", "moments, rows, float64, far from 0",
    ),
    Fault(
        "E[x^2] - E[x]^2", "statistics",
        "middle = sum_of_distances(chunk, weights, first) * inverse;", "middle = -first;", "moments, rows, far from 0",
    ),
    Fault(
        "one pass over a chunk", "statistics",
        "middle = sum_of_distances(chunk, weights, first) * inverse;", "middle = 0;", "moments, outliers first",
    ),
    Fault(
        "mean of a chunk not corrected", "statistics",
        "(static_cast<double>(middle) + correction)", "static_cast<double>(middle)", "moments, outliers first",
    ),
    Fault(
        "each chunk has its own origin", "statistics",
        "start = origin == origin ? origin : first;", "start = first;", "moments, rows",
    ),
    Fault(
        "chunks of a thread: no delta^2", "statistics",
        "(errors.squares - errors.sum * correction) + moved * distance",
        "(errors.squares - errors.sum * correction)",
        "moments, rows",
    ),
    Fault(
        "elements of weight 0 not left out", "statistics",
        "return w[k][j] > 0;", "return true;", "moments, rows, NaN without weight",
    ),
    Fault(
        "distances from an element of weight 0", "statistics",
        "if (!some && exact > 0) {", "if (!some) {", "moments, rows, outliers without weight",
    ),
    Fault(
        "weights not multiplied", "statistics",
        "return w[k][j] * value;", "return value;", "moments, columns, weights",
    ),
    Fault(
        "weights behind the last", "statistics",
        "k < count ? weight_of(p, tile, v + k * ROWS, from + j) : 0.0", "weight_of(p, tile, v + k * ROWS, from + j)",
        "moments, columns, weights",
    ),
    Fault(
        "last infinity alone", "statistics",
        "away = odd ? away + infinite : infinite;", "away = infinite;", "moments, columns, infinities",
    ),
    Fault(
        "squares that overflow", "statistics",
        "is_finite(more) && unit == 1)", "unit == 1)", "moments, rows, huge",
    ),
    Fault(
        "squares that underflow", "forward",
        "more >= least && is_finite", "is_finite", "training, block, rows, small",
    ),
    Fault(
        "units of a thread: none for small distances", "forward",
        "if (squares == 0) unit = SMALL_UNIT;", "", "training, cooperative, float64, small",
    ),
    Fault(
        "units of a thread: squares keep the one before", "forward",
        "squares *= LARGE_UNIT;\n            squares *= LARGE_UNIT;", "squares *= LARGE_UNIT;", "mixed scales, rows",
    ),
    # moments.cuh
    Fault(
        "units of parts: not written", "forward",
        "to[4] = partials[ch].unit;", "to[4] = 1;", "training, cooperative, float64, small",
    ),
    Fault(
        "units of parts: always the last", "forward",
        "if (!found && is_finite(squares)) {", "if (is_finite(squares)) {", "training, cooperative, float64, small",
    ),
    Fault(
        "units of parts: M2 taken as it is", "normalize",
        "a.m2_in(unit) + b.m2_in(unit)", "a.m2 + b.m2", "mixed scales, columns",
    ),
    Fault(
        "units of parts: rstd without", "forward",
        "partial.unit * partial.unit) * partial.unit;", "partial.unit * partial.unit);",
        "training, cooperative, float64, small",
    ),
    Fault(
        "merge: share of the other part", "finish_moments",
        "share = b.n * reciprocal(n)", "share = a.n * reciprocal(n)", "moments, narrow columns",
    ),
    Fault(
        "merge: no delta^2", "finish_moments",
        "(a.m2 + b.m2) + delta * delta * (a.n * share)", "(a.m2 + b.m2)", "moments, narrow columns",
    ),
    Fault(
        "merge: shifts ignored", "finish_moments",
        "(b.origin - a.origin) + (b.shift - a.shift)", "(b.origin - a.origin)", "moments, narrow columns",
    ),
    Fault(
        "lanes: no delta^2", "statistics",
        "added_across(a.m2 + moved * distance, from, to)", "added_across(a.m2, from, to)", "moments, rows",
    ),
    Fault(
        "lanes: shifts ignored", "statistics",
        "(a.origin - origin) + a.shift", "(a.origin - origin)", "moments, rows",
    ),
    Fault(
        "lanes: origin of another channel", "statistics",
        "a.n > 0) & group;", "a.n > 0);", "moments, columns, NaN",
    ),
    Fault(
        "lanes: group of the first channel", "statistics",
        "return pattern << (threadIdx.x % LANES);", "return pattern;", "moments, columns, NaN",
    ),
    Fault(
        "lanes: group of the warp's first merge", "statistics",
        "(1u << WARPS % 32) - 1) << (lane - member)", "(1u << WARPS % 32) - 1)", "moments, columns, NaN",
    ),
    Fault(
        "lanes: infinities as numbers", "statistics",
        "if (careful) {", "if (false) {", "moments, columns, NaN",
    ),
    Fault(
        "block: parts read before they are written", "statistics",
        "= partials[ch];\n    __syncthreads();\n    if (WIDTH == 1)", "= partials[ch];\n    if (WIDTH == 1)",
        "moments, rows",
    ),
    Fault(
        "block: parts written before the last are read", "forward",
        "    __syncthreads();  // the scratch may still be read from the merge before\n", "",
        "forward, cooperative, blocks take several tiles",
    ),
    Fault(
        "block: results read before they are written", "statistics",
        "results[q] = whole;\n    }\n    __syncthreads();", "results[q] = whole;\n    }", "moments, columns",
    ),
    Fault(
        "block: no more channels than merges at once", "statistics",
        "base += THREADS / WARPS)", "base += WIDTH)", "moments, wide columns",
    ),
    Fault(
        "block: results of no channel", "statistics",
        "if (member == 0 && q < WIDTH) results", "if (member == 0) results", "moments, columns",
    ),
    Fault(
        "slots of parts overlap", "statistics",
        "(sizeof(Partial) / sizeof(double))", "(sizeof(Partial) / sizeof(double) - 1)", "moments, columns",
    ),
    Fault(
        "parts of one row of threads alone", "finish_moments",
        "split < splits; split += ROWS)", "split < splits; split += splits)", "moments, narrow columns",
    ),
    # centre.cuh
    Fault(
        "no units of large distances", "forward",
        "abs(exponent) <= ORDINARY_RSTD", "exponent <= ORDINARY_RSTD", "training, block, columns, large, affine",
    ),
    Fault(
        "no units of small distances", "forward",
        "abs(exponent) <= ORDINARY_RSTD", "exponent >= -ORDINARY_RSTD", "training, block, rows, small, large gamma",
    ),
    # affine.cuh
    Fault(
        "low part of a given mean", "normalize",
        "low = is_finite(left) ? static_cast<real>(left) : 0;", "low = 0;", "frozen",
    ),
    Fault(
        "low part of the batch's mean", "forward",
        "low = is_finite(left) ? static_cast<real>(left) : 0;", "low = 0;", "forward, block, rows, far from 0",
    ),
    Fault(
        "low part of the batch's mean, float64", "forward",
        "- static_cast<double>(high)) + rest * factor", "- static_cast<double>(high))",
        "forward, block, rows, float64, far from 0",
    ),
    Fault(
        "residual after relu", "forward",
        "z += element(added[k], j);\n#endif\n                if (RELU) z = z <= 0 ? 0 : z;",
        "if (RELU) z = z <= 0 ? 0 : z;\n                z += element(added[k], j);\n#endif\n",
        "forward, block, rows, all",
    ),
    Fault(
        "relu of NaN", "forward",
        "z = z <= 0 ? 0 : z;", "z = z > 0 ? z : 0;", "forward, block, columns, NaN",
    ),
    Fault(
        "numbers of the vector's first channel", "normalize",
        "affine[ALONG_CHANNELS ? j : 0]", "affine[0]", "forward, two passes",
    ),
    Fault(
        "eps", "normalize",
        "reciprocal_sqrt(spread + p.eps)", "reciprocal_sqrt(spread)", "frozen",
    ),
    # forward.cu
    Fault(
        "blocks do not wait", "forward",
        "            group_barrier(p, ++round);\n", "", "forward, cooperative",
    ),
    Fault(
        "blocks wait before they have written", "forward",
        "            write_partials(p, tile, split, partials);\n            group_barrier(p, ++round);\n",
        "            group_barrier(p, ++round);\n            write_partials(p, tile, split, partials);\n",
        "forward, cooperative",
    ),
    Fault(
        "x kept: another vector read", "forward",
        "items[k] = kept[(chunk * ITEMS_PER_THREAD + k) * THREADS]",
        "items[k] = kept[(chunk * ITEMS_PER_THREAD + ITEMS_PER_THREAD - 1 - k) * THREADS]",
        "forward, block, rows",
    ),
    Fault(
        "x kept where parts are merged", "forward",
        "dynamic_shared() + MERGE_BYTES)", "dynamic_shared())", "forward, block, rows",
    ),
    Fault(
        "x kept: as many vectors as of the last chunk", "forward",
        "            count = ITEMS_PER_THREAD;\n", "", "forward, block, rows",
    ),
    Fault(
        "tiles left out", "forward",
        "at < p.tiles; at += gridDim.x / splits)", "at < p.tiles; at += gridDim.x)",
        "forward, cooperative, groups take several tiles",
    ),
    # gradients.cuh
    Fault(
        "low part of the mean", "backward",
        "low = is_finite(left) ? static_cast<real>(left) : 0;", "low = 0;", "backward, block, rows, far from 0",
    ),
    Fault(
        "dx: low part of the mean", "backward",
        "fma(x, unit, -high) - low;", "fma(x, unit, -high);", "backward, block, rows, far from 0",
    ),
    Fault(
        "dgamma without rstd", "grad_sums",
        "(xhat.centre.distance(element(x[k], j)) * xhat.rstd)", "xhat.centre.distance(element(x[k], j))",
        "parts, rows",
    ),
    Fault(
        "relu passes gradients at 0", "backward",
        "element(y, j) <= 0", "element(y, j) < 0", "backward, block, rows, all",
    ),
    Fault(
        "relu of NaN passes none", "backward",
        "if (element(y, j) <= 0)", "if (!(element(y, j) > 0))", "backward, block, columns, NaN",
    ),
    Fault(
        "dz not written", "backward",
        "    store(dz, p.dresidual, p.dresidual_strides, p, tile, v, count);\n", "", "backward, block, rows, all",
    ),
    Fault(
        "lanes: sums of all channels", "grad_sums",
        "added_across(sums[ch].dbeta, LANES, 32)", "added_across(sums[ch].dbeta, 1, 32)", "parts, columns",
    ),
    Fault(
        "block: sums read before they are written", "grad_sums",
        "= sums[ch];\n    __syncthreads();\n", "= sums[ch];\n", "parts, rows",
    ),
    Fault(
        "block: sums written before the last are read", "backward",
        "    __syncthreads();  // the scratch may still be read from the sum before\n", "",
        "backward, cooperative, blocks take several tiles",
    ),
    Fault(
        "one slot for the sums of all splits", "grad_sums",
        "(tile.kept(p, ch) * p.splits + split) * 2;\n        to[0]", "tile.kept(p, ch) * p.splits * 2;\n        to[0]",
        "parts, columns",
    ),
    Fault(
        "sums of one row of threads alone", "backward",
        "split < splits; split += ROWS)", "split < splits; split += splits)", "backward, cooperative, narrow columns",
    ),
    Fault(
        "dx: dgamma scaled by rstd once", "grad_input",
        "scale * (rstd * per_distance) * sums[ch].dgamma", "scale * per_distance * sums[ch].dgamma",
        "backward, two passes",
    ),
    Fault(
        "dx: no dmean", "backward",
        "scale * sums[ch].dbeta - dmean * per_unit", "scale * sums[ch].dbeta",
        "backward, block, rows, float64, statistics",
    ),
    Fault(
        "dx: half of dvar", "backward",
        "- 2.0 * dvar", "- dvar", "backward, block, rows, float64, statistics",
    ),
    Fault(
        "dx: frozen statistics move", "backward",
        "                if (!p.frozen) {", "                {", "frozen, NaN",
    ),
    Fault(
        "dx: weights not multiplied", "backward",
        "w > 0 ? w * share : 0", "w > 0 ? share : 0", "backward, block, columns, weights",
    ),
    Fault(
        "dx: infinite share of weight 0", "backward",
        "w > 0 ? w * share : 0", "w * share", "backward, block, columns, weights",
    ),
    Fault(
        "dx: left in its unit", "backward",
        "                g *= linear[ch].unit;\n", "", "training, block, rows, large",
    ),
    Fault(
        "dx: scale becomes subnormal beside large sums", "backward",
        "min(least - LEAST_EXPONENT, 0)", "min(most - LEAST_EXPONENT, 0)", "training, block, columns, large, affine",
    ),
    Fault(
        "dx of what weighs nothing", "backward",
        "encoded(skipped(p, tile, v + k * ROWS, j, z) ? 0 : g)", "encoded(g)", "training, block, any channel",
    ),
    Fault(
        "sums with what weighs nothing", "grad_sums",
        "skipped(p, tile, v + k * ROWS, j, g) ? 0 : term", "term", "training, two passes, masked out",
    ),
    Fault(
        "sums without the gradients of what weighs nothing", "backward",
        "WEIGHT && dz == 0 && ", "WEIGHT && ", "training, block, masked out",
    ),
    # backward.cu
    Fault(
        "sums: blocks do not wait", "backward",
        "            group_barrier(p, ++round);\n", "", "backward, cooperative",
    ),
    Fault(
        "dz kept: x read", "backward",
        "fetch(dz, kept, 2 * chunk + 1);", "fetch(dz, kept, 2 * chunk);",
        "backward, block, rows",
    ),
    # update_running.cu
    Fault(
        "running: one channel behind the last", "update_running",
        "at >= p.channels", "at > p.channels", "running statistics",
    ),
    Fault(
        "running: one block alone", "update_running",
        "static_cast<i64>(blockIdx.x) * THREADS + threadIdx.x", "threadIdx.x", "running statistics",
    ),
    Fault(
        "running: as many samples as the correction", "update_running",
        "count > p.correction", "count >= p.correction", "running statistics",
    ),
    Fault(
        "running: what rate 0 leaves alone", "update_running",
        " && p.rate != 0", "", "running statistics",
    ),
    Fault(
        "running: what rate 1 leaves of infinite statistics", "update_running",
        "rate == 1 ? batch : ", "", "running statistics",
    ),
    Fault(
        "running: infinite variances not skipped", "update_running",
        " && is_finite(batch_var)", "", "running statistics",
    ),
    Fault(
        "running: products rounded together", "update_running",
        "__dadd_rn(__dmul_rn(1 - rate, old), __dmul_rn(rate, batch))", "fma(1 - rate, old, rate * batch)",
        "running statistics",
    ),
    Fault(
        "running: bits of what stays", "update_running",
        "new_var = bits_at(p.var, p.var_type, at)", "new_var = bits_of(var, p.var_type)", "running statistics",
    ),
    Fault(
        "running: halves rounded twice", "update_running",
        "odd = rounded_to_odd(value)", "odd = static_cast<float>(value)", "running statistics",
    ),
]  # fmt: skip


def changed(fault: Fault, kernel: str, text: str) -> str:
    if kernel != fault.kernel:
        return text
    if text.count(fault.text) != 1:
        raise LookupError(f"{fault.name}: {text.count(fault.text)} times in {kernel}: {fault.text!r}")
    return text.replace(fault.text, fault.wrong)


def found(fault: Fault) -> tuple[int, Exception] | None:
    """The first schedule that shows it, and how."""
    run = RUNS[fault.run]
    with run.device(change=functools.partial(changed, fault)) as emulated:
        for schedule in MOST_SCHEDULES:
            try:
                run(emulated, schedule)
            except (AssertionError, simt.SimtError) as error:  # a text that does not compile is another error
                return schedule, error
    return None


def assert_right(run: Run, schedules: Iterable[int]) -> None:
    with run.device() as emulated:
        for schedule in schedules:
            run(emulated, schedule)


@pytest.mark.parametrize("name", RUNS)
def test_without_a_fault(name):
    assert_right(RUNS[name], SCHEDULES)


@pytest.mark.parametrize("fault", FAULTS, ids=[f"{f.kernel}: {f.name}" for f in FAULTS])
def test_fault_is_found(fault):
    result = found(fault)
    assert result is not None, f"{fault.run}: passes"
    assert_right(RUNS[fault.run], result[:1])


def test_every_run_finds_something():
    assert {fault.run for fault in FAULTS} == RUNS.keys()


def main() -> None:
    if reason := cuda.available():
        raise SystemExit(reason)
    for fault in FAULTS:
        result = found(fault)
        if result is None:
            how = "NOT FOUND"
        else:
            how = f"{fault.run} | schedule {result[0]} | {str(result[1]).strip().splitlines()[0][:100]}"
        print(f"{fault.kernel} | {fault.name} | {how}", flush=True)


if __name__ == "__main__":
    main()
