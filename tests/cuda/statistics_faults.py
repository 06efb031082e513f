"""Faults put into the kernels of statistics, one at a time, each with the data that must find it."""

import itertools

import numpy as np
import pytest

from fastbn.cuda import strided
from tests import exact as oracle
from tests import statistics as judged
from tests.cuda import harness
from tests.on_cupy import OnCupy
from tests.simt import cuda, simt
from tests.statistics import FUNCTIONS, check, results_of
from tests.support import NUMBERS, VIEWS, maker

FAULTS = {  # what is wrong: a text of a kernel, what stands in its place, the data, their view, the axis
    "carry of a coordinate": ("strides[d]) + carry", "strides[d])", "float32", "positions", (0, 2, 3)),
    "place after a carry": ("x += p.carries_x[d];", "", "float32", "positions", (0, 2, 3)),
    "mask after a carry": (
        "where += p.carries_where[d];", "(void)0;", "masked float32", "positions", (0, 2, 3),
    ),
    "first place": ("x += here * p.steps_x[d];", "", "uint8", "4-d steps", None),
    "kept place": ("x += at * p.kept_x[d];", "x += at;", "uint8", "4-d transposed", (0, 2)),
    "places of results": ("results += at * p.kept_results[d];", "results += at;", "uint8", "4-d transposed", (0, 2)),
    "last vectors of a split": ("+ p.along - 1) / p.along", ") / p.along", "float32", "2-d", 0),
    "one vector too many": ("p.share, vectors);", "p.share, vectors + 1);", "uint8", "2-d tall", 0),
    "end of a row": ("e < head + tail;", "e < head;", "float32", "long", None),
    "head of a row": ("-address & (VECTOR - 1)", "0 & (VECTOR - 1)", "uint8", "long", None),
    "ends in every split": ("work.split != 0 || !work.active", "!work.active", "float32", "long", None),
    "signs": ("value < 0 ? 1 : 0);", "0);", "int64", "2-d", 0),
    "carry of 128 bits": ("low < bits ? 1 : 0", "0", "uint64", "long", None),
    "carry of squares": ("squares < square ? 1 : 0", "0", "uint32", "long", None),
    "what A^2/n loses": ("(lost + below) - less", "lost + below", "int32 far from 0", "long", None),
    "what sums lose": ("lost += rest;", "", "constant float32", "long", None),
    "distance of groups": ("+ count * here * here", "", "float32 in steps", "long", None),
    "n of groups": ("fma(count, far,", "fma(1.0, far,", "float32 in steps", "long", None),
    "delta of parts": ("delta * delta * (a.n * share)", "0", "float32 in steps", "long", None),
    "share of a part": ("a.low + delta * share", "a.low", "int32", "long", None),
    "odd rows of slots": ("half = (rows + 1) / 2", "half = rows / 2", "uint8", "3-d channels reversed", (0, 1)),
    "slots of another channel": ("i + half * channels", "i + half", "uint8", "2-d tall", 0),
    "overflow of a sum": ("return !is_finite(high + low);", "return false;", "huge float32", "long", None),
    "squares out of range": ("odd = odd || !in_range();", "", "tiny float32", "long", None),
    "least numbers": ("if (tiny) return true;", "", "least float32", "long", None),
    "units of a part": (
        "const double factor = other * per_unit();", "const double factor = 1;", "float64 of two scales", "2-d", 0,
    ),
    "unit of a sum": ("a.unit == 1 ? SUM_UNIT : 1", "1", "float64 that ends at its limit", "long", None),
    "NaN counted": ("!SKIP_NAN || value == value", "true", "float32 with NaN", "2-d", 0),
    "bits of a mask": (
        "(flags.each[j] != 0 ? 1u : 0u) << j", "(flags.each[j] != 0 ? 1u : 0u)", "masked uint8", "long", None,
    ),
    "barrier between slots": (
        "        rows = half;\n        __syncthreads();", "        rows = half;", "uint8", "long", None,
    ),
    "barrier of slots": ("    __syncthreads();\n    for (int rows", "    for (int rows", "uint8", "long", None),
}  # fmt: skip


def numbers_of(kind, x, rng):
    """An array changed to be of a kind."""
    first = np.arange(x.size)
    changes = {
        "steps": lambda: x + 1000 * (first // 997),
        "constant": lambda: np.full(x.shape, 0.1),
        "far": lambda: x // 65536 + np.int64(2**31 - 2**16),
        "NaN": lambda: np.where(rng.random(x.shape) < 0.2, np.nan, x),
        "tiny": lambda: np.where(np.abs(x) < 2.0**-9, 0, x) * 2.0**-115,
        "least": lambda: np.where(np.abs(x - 2.5) < 2.0**-4, 0, x - 2.5) * 2.0**-121,
        "huge": lambda: np.where(rng.random(x.shape) < 0.5, -1, 1) * (1.7e308 if x.dtype.itemsize == 8 else 3.3e38),
        "ends": lambda: np.where(first < x.size // 2, x * 1e290, np.where(rng.random(x.shape) < 0.5, -1, 1) * 1.7e308),
        "scales": lambda: x * np.where(np.arange(len(x)) == 5, 1, 1e-160)[:, None],
    }
    return next((change() for name, change in changes.items() if name in kind.split()), x)


def failures_of(kind, view, axis):
    """Of all functions."""
    rng, dtype = np.random.default_rng(7), next(name for name in NUMBERS[::-1] if name in kind.split())
    views = VIEWS | {
        "long": lambda make: make((8203,))[3:],
        "positions": lambda make: make((5, 3, 17, 24))[:, :, 1:-1, 2:-3],
    }
    x, failures = views[view](maker(dtype)), []
    x = numbers_of(kind, x, rng).astype(x.dtype, copy=False)
    where = views[view](lambda shape: rng.random(shape) < 0.6) if "masked" in kind else None
    given = {} if where is None else {"where": where}
    for function in FUNCTIONS:
        if function != "moments":
            exact = oracle.exact(x, axis, True if where is None else where, skip_nan=function.startswith("nan"))
            with np.errstate(all="ignore"):
                check(failures, kind, function, x, exact, axis=axis, **given)
    if "constant" in kind and results_of("mean", x, axis)["mean"] != x[0]:
        failures.append("the mean of equal numbers is another one")
    return failures


def run_with(change, kind, view, axis, model=None):
    """What is wrong with the results, or with the launch: in some orders of threads, with few splits and with many."""
    for schedule, batches in itertools.product((0, 1, 2), (0, strided.BATCHES_OF_SPLIT)):
        with (
            cuda.installed(processors=1, schedule=schedule, change=change, model=model),
            pytest.MonkeyPatch.context() as patch,
        ):
            patch.setattr(judged, "fastbn", harness.scalars(OnCupy()))
            patch.setattr(strided, "BYTES_OF_PART", 0)
            patch.setattr(strided, "BATCHES_OF_SPLIT", batches)
            try:
                yield from failures_of(kind, view, axis)
            except (simt.SimtError, simt.CompileError) as error:
                yield str(error)


def found(name, model=None):
    """What is wrong first, with the fault of that name."""
    text, wrong, *case = FAULTS[name]
    changed = []

    def change(kernel, whole):
        if text in whole:
            changed.append(kernel)
        return whole.replace(text, wrong)

    failure = next(run_with(change, *case, model), None)
    if not changed:
        raise LookupError(f"{name}: in no kernel: {text!r}")
    return failure


def failures_without(name, model=None):
    """What is wrong with the kernels as they are."""
    return list(run_with(lambda kernel, whole: whole, *FAULTS[name][2:], model))
