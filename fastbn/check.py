"""The accuracy that this installation delivers, measured against exact and float64 results.

Six groups of figures, each with the bound that it must keep. The reference is exact rational arithmetic on the stored
doubles for NIST's data, and the float64 formulas of `fastbn.reference` for all else; both see the values as stored, so
that no rounding of the data counts as an error.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterable
from decimal import Context, Decimal
from fractions import Fraction
from functools import partial
from typing import Any, NamedTuple

import numpy as np

import fastbn
from fastbn import reference
from fastbn.cpu.team import PARALLEL_FROM
from fastbn.environment import float_dtypes, torch_with_our_threads
from fastbn.threads import get_num_threads

LAYOUTS = ("NCHW", "NHWC")
MOST_DIGITS = 15.9  # of a double; no distance below that is told apart

TITLES = {
    "nist": "NIST StRD, univariate, accuracy of mean and standard deviation: correct digits",
    "offset": "float32, 100 + U(0, 1): relative error of the worst channel",
    "large mean": "Normal data, mean many times the deviation: relative error of moments, worst channel",
    "statistics": "Columns of 100 + U(0, 1), as other dtypes and views have them: relative error of the worst",
    "constant": "Constant channels: results that are not exactly beta",
    "oracle": "Against the float64 oracle: worst error, in units of the tolerance",
}


class Row(NamedTuple):
    """One figure and its bound."""

    group: str
    name: str
    measured: float
    bound: float
    at_least: bool
    beside: dict[str, float]
    """What other libraries deliver on the same data."""

    @property
    def ok(self) -> bool:
        """Whether the figure keeps its bound; NaN never does."""
        return self.measured >= self.bound if self.at_least else self.measured <= self.bound

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return self._asdict() | {"ok": self.ok}


class Job(NamedTuple):
    """A named piece of work, for a progress bar to count."""

    name: str
    run: Callable[[], list[Row]]


def jobs(
    kind: str, groups: Iterable[str] = tuple(TITLES), *, quick: bool = False, parallel: Iterable[str] = ()
) -> list[Job]:
    """The checks of the given groups on arrays of one kind.

    Quick takes smaller arrays and leaves out the fused options; parallel names the dtypes whose parallel kernels are
    held against the oracle, beside every dtype's serial ones.
    """
    xp = importlib.import_module(kind)
    work: dict[str, list[Job]] = {
        "nist": [Job(name, partial(nist, xp, name)) for name in NIST],
        "offset": [Job(f"offset {layout}", partial(offset, xp, layout, 64 if quick else 512)) for layout in LAYOUTS],
        "large mean": [
            Job(f"mean/std {ratio:g} {name}", partial(large_mean, xp, name, ratio, 24 if quick else 200))
            for name, ratio in LARGE_MEANS
            if name in float_dtypes()
        ],
        "statistics": [Job(f"statistics of {name}", partial(statistics, xp, name)) for name in STATISTICS],
        "constant": [Job(f"constant {name}", partial(constant, xp, name)) for name in float_dtypes()],
        "oracle": _oracle_jobs(xp, quick, parallel),
    }
    jobs = [job for group in groups for job in work[group]]
    return jobs if xp is np else [Job(f"{kind} {job.name}", partial(_named, kind, job)) for job in jobs]


def _named(kind: str, job: Job) -> list[Row]:
    """The rows of a job on arrays that are not NumPy's, whose names say so."""
    return [row._replace(name=f"{kind} {row.name}") for row in job.run()]


# --- moments ----------------------------------------------------------------------------------------------------------


def _alternating(first: float, low: float, high: float) -> np.ndarray[Any, Any]:
    return np.array([first] + [low, high] * 500)


NIST = {
    "NumAcc1": np.array([10000001.0, 10000003.0, 10000002.0]),
    "NumAcc2": _alternating(1.2, 1.1, 1.3),
    "NumAcc3": _alternating(1000000.2, 1000000.1, 1000000.3),
    "NumAcc4": _alternating(10000000.2, 10000000.1, 10000000.3),
}


class Exact(NamedTuple):
    """Moments as rational numbers."""

    n: int
    mean: Fraction
    m2: Fraction

    @property
    def std(self) -> Decimal:
        """Of a sample, to 60 digits."""
        return _decimal(self.m2 / (self.n - 1)).sqrt(_SIXTY)


_SIXTY = Context(prec=60)


def _decimal(value: Fraction) -> Decimal:
    return _SIXTY.divide(Decimal(value.numerator), Decimal(value.denominator))


def exact_moments(x: np.ndarray[Any, Any]) -> Exact:
    """Moments of the stored doubles."""
    values = [Fraction(value) for value in x.tolist()]
    mean = sum(values, Fraction()) / len(values)
    return Exact(len(values), mean, sum(((value - mean) ** 2 for value in values), Fraction()))


def best_merge(parts: list[np.ndarray[Any, Any]]) -> Exact:
    """What is left of the moments of all parts once each part's are rounded to doubles."""
    rounded = [(n, Fraction(float(mean)), Fraction(float(m2))) for n, mean, m2 in map(exact_moments, parts)]
    count = sum(n for n, _, _ in rounded)
    mean = sum((n * part for n, part, _ in rounded), Fraction()) / count
    return Exact(count, mean, sum((m2 + n * (part - mean) ** 2 for n, part, m2 in rounded), Fraction()))


def digits(value: float, exact: Decimal) -> float:
    """Log relative error: the number of correct decimal digits."""
    if not math.isfinite(value):
        return 0.0
    error = abs(_SIXTY.divide(_SIXTY.subtract(Decimal(value), exact), exact))
    return min(MOST_DIGITS, -float(error.log10())) if error else MOST_DIGITS


def nist(xp: Any, name: str) -> list[Row]:
    """Mean and standard deviation in one piece, and merged from seven."""
    x = NIST[name]
    on_device = xp.asarray(x)
    exact = exact_moments(x)
    mean, std = _decimal(exact.mean), exact.std
    parts = [part for part in np.array_split(x, 7) if part.size]
    merged = fastbn.merge(*(fastbn.moments(xp.asarray(part.reshape(-1, 1))) for part in parts))
    # The rounding of the parts' means alone leaves 10.5 digits of NumAcc4's deviation, however they are merged.
    best = digits(float(best_merge(parts).std), std)

    def row(what: str, value: Any, exact: Decimal, bound: float, **beside: float) -> Row:
        return Row("nist", f"{name} {what}", digits(float(value), exact), bound, True, beside)

    return [
        row("mean", fastbn.mean(on_device), mean, 13, numpy=digits(float(np.mean(x)), mean)),
        row("std", fastbn.std(on_device, ddof=1), std, 13, numpy=digits(float(np.std(x, ddof=1)), std)),
        row("mean, 7 parts merged", merged.mean[0], mean, 11),
        row("std, 7 parts merged", merged.std(correction=1)[0], std, min(11, best - 0.05), **{"exact merge": best}),
    ]


def offset(xp: Any, layout: str, side: int) -> list[Row]:
    """Where float32 sums of raw values go wrong: four channels of 100 + U(0, 1)."""
    values = (100 + np.random.default_rng(0).random((4, 4, side, side))).astype(np.float32)
    x, axes = _placed(np, values, layout), (0, 2, 3)
    expected = reference.moments(values)
    expected_var = expected.m2 / expected.count
    ours = [_on_host(a) for a in fastbn.mean_var(_placed(xp, values, layout), axes)]
    others = {"numpy": (np.mean(x, axes), np.var(x, axes))}
    torch = torch_with_our_threads()
    if torch is not None:
        _, mean, rstd = torch.native_batch_norm(torch.from_numpy(x), None, None, None, None, True, 0.0, 0.0)
        others["torch"] = mean.numpy(), 1 / rstd.numpy().astype(float) ** 2
    name = f"{layout} {'x'.join(map(str, x.shape))}"
    return [
        Row("offset", f"{name} mean", _relative(ours[0], expected.mean), 1e-7, False,
            {library: _relative(pair[0], expected.mean) for library, pair in others.items()}),
        Row("offset", f"{name} var", _relative(ours[1], expected_var), 1e-6, False,
            {library: _relative(pair[1], expected_var) for library, pair in others.items()}),
    ]  # fmt: skip


# Halves hold no larger ratios: their spacing at the mean must stay below the deviation.
LARGE_MEANS = (("float32", 1e3), ("float32", 5e4), ("float16", 1e3), ("bfloat16", 1e2))


def large_mean(xp: Any, name: str, ratio: float, side: int) -> list[Row]:
    """Moments before they are rounded to the dtype of the data."""
    rng = np.random.default_rng(1)
    signs = np.array([1, -1, 1, -1, 1]).reshape(5, 1, 1)
    values = (rng.standard_normal((8, 5, side, side)) + ratio * signs).astype(float_dtypes()[name])
    expected = reference.moments(values)
    expected_var = expected.m2 / expected.count
    rows = []
    for layout in LAYOUTS:
        x, ours = _placed(np, values, layout), fastbn.moments(_placed(xp, values, layout))
        numpys = np.mean(x, (0, 2, 3), np.float32), np.var(x, (0, 2, 3), np.float32)
        title = f"{name} {layout} mean/std {ratio:g}"
        beside = {"numpy": _relative(numpys[0], expected.mean)}
        rows.append(
            Row("large mean", f"{title}: mean", _relative(_on_host(ours.mean), expected.mean), 1e-7, False, beside)
        )
        beside = {"numpy": _relative(numpys[1], expected_var)}
        rows.append(
            Row("large mean", f"{title}: var", _relative(_on_host(ours.var()), expected_var), 1e-6, False, beside)
        )
    return rows


STATISTICS = (
    "uint8",
    "int64",
    "float16",
    "float32 with NaN",
    "float32 with a mask",
    "float32 slice",
    "float32 weighted",
)


def statistics(xp: Any, name: str) -> list[Row]:
    """Of integers, views, masks, weights and NaN; beside NumPy's in the dtype that it takes by itself."""
    rng = np.random.default_rng(4)
    whole, counted = rng.integers(0, 100, (5000, 40)), rng.random((5000, 40)) < 0.8
    dtype, _, case = name.partition(" ")
    x = (100 + (whole if dtype in ("uint8", "int64") else whole / 100)).astype(dtype)
    weights = (counted if case in ("with NaN", "with a mask") else np.ones(x.shape)).astype(float)
    if case == "weighted":
        weights = rng.random(x.shape)
        both = fastbn.mean_var(xp.asarray(x), 0, weights=xp.asarray(weights))
        return [Row("statistics", f"{name}: var", _relative(_on_host(both[1]), _var(x, weights)), 1e-6, False, {})]
    options: dict[str, Any] = {"where": counted} if case == "with a mask" else {}
    given = np.where(counted, x, np.nan) if case == "with NaN" else x
    view = (slice(7, None, 3), slice(None, None, -2)) if case == "slice" else ()
    ours, numpys = (fastbn.nanvar, np.nanvar) if case == "with NaN" else (fastbn.var, np.var)
    found = ours(xp.asarray(given)[view], 0, np.float64, **{key: xp.asarray(value) for key, value in options.items()})
    expected = _var(x[view], weights[view])
    with np.errstate(over="ignore"):  # of float16
        beside = {"numpy": _relative(numpys(given[view], 0, **options), expected)}
    return [Row("statistics", f"{name}: var", _relative(_on_host(found), expected), 1e-13, False, beside)]


def _var(x: np.ndarray[Any, Any], weights: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Of each column, by sums that are rounded once."""
    columns = []
    for values, w in zip(x.T.astype(float), weights.T, strict=True):
        count = math.fsum(w)
        mean = math.fsum(w * values) / count
        columns.append(math.fsum(w * (values - mean) ** 2) / count)
    return np.array(columns)


# --- batch norm -------------------------------------------------------------------------------------------------------


def constant(xp: Any, name: str) -> list[Row]:
    """With eps > 0 a constant channel gives beta itself, whatever its value and gamma."""
    dtype = float_dtypes()[name]
    values = np.array([0.0, 1 / 3, -100.1, 3.0e4, 1e-3, 7.0]).reshape(6, 1, 1)
    gamma, beta = np.random.default_rng(2).standard_normal((2, 6))
    beta = beta.astype(dtype)
    x = np.broadcast_to(values.astype(dtype), (3, 6, 7, 9))
    rows = []
    for layout in LAYOUTS:
        y, _ = fastbn.batch_norm(_placed(xp, x, layout), xp.asarray(gamma), xp.asarray(beta))
        wrong = np.count_nonzero(_on_host(y) != beta.reshape(6, 1, 1))
        rows.append(Row("constant", f"{name} {layout}", float(wrong), 0, False, {}))
    return rows


# Half a unit in the last place of the result, and of the type computed in.
ROUNDING = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-24, "float64": 2.0**-53}
COMPUTE = {"float16": 2.0**-24, "bfloat16": 2.0**-24, "float32": 2.0**-24, "float64": 2.0**-53}
SUBNORMAL = {"float16": 2.0**-25, "bfloat16": 2.0**-134, "float32": 2.0**-150, "float64": 0.0}
ROUNDINGS = 20  # of intermediate values as large as the terms that are added up to a result


def _oracle_jobs(xp: Any, quick: bool, parallel: Iterable[str]) -> list[Job]:
    """Every dtype and layout; small arrays run the serial kernels, larger ones the parallel kernels."""
    channels = 4 * get_num_threads() + 3  # whole channels for every thread, and no multiple of a vector
    small, large = (3, channels, 5, 7), (1 + PARALLEL_FROM // (channels * 29 * 37), channels, 29, 37)
    cases = [(name, small, False) for name in float_dtypes()] + [(name, large, False) for name in parallel]
    if not quick:
        cases.append(("float32", small, True))
    return [
        Job(f"oracle {name} {layout}", partial(oracle, xp, name, layout, shape, fused))
        for name, shape, fused in cases
        for layout in LAYOUTS
    ]


def oracle(xp: Any, name: str, layout: str, shape: tuple[int, ...], fused: bool) -> list[Row]:
    """Forward, backward and inference; fused: with a mask, a residual and relu."""
    rng = np.random.default_rng(3)
    dtype = float_dtypes()[name]
    x, dy, residual = (rng.standard_normal((3, *shape)) * 2 + 0.5).astype(dtype)
    gamma, beta = rng.standard_normal((2, shape[1]))
    where = rng.random((shape[0], 1, *shape[2:])) < 0.7
    masked: dict[str, Any] = {"where": where} if fused else {}
    epilogue: dict[str, Any] = {"residual": residual, "activation": "relu"} if fused else {}

    x_, dy_, gamma_, beta_ = _placed(xp, x, layout), _placed(xp, dy, layout), xp.asarray(gamma), xp.asarray(beta)
    masked_ = {key: xp.asarray(value) for key, value in masked.items()}
    epilogue_ = epilogue | ({"residual": _placed(xp, residual, layout)} if fused else {})
    y, saved = fastbn.batch_norm(x_, gamma_, beta_, **masked_, **epilogue_)
    grads = fastbn.batch_norm_backward(dy_, saved)
    y = np.ascontiguousarray(_on_host(y))  # NumPy adds along other orders with larger errors

    forward = reference.batch_norm(x, gamma, beta, **masked, **epilogue)
    dx, dgamma, dbeta, dz = reference.batch_norm_backward(dy, forward, y=y)
    statistics = forward.statistics
    assert statistics is not None
    inferred = fastbn.batch_norm_inference(
        x_, xp.asarray(forward.mean), xp.asarray(statistics.m2 / statistics.count), gamma_, beta_, **epilogue_
    )

    # Sizes of the terms whose roundings add up to those of a result; the statistics' own error is one of them.
    def spread(parameter: Any) -> Any:
        return np.reshape(parameter, (-1, 1, 1))

    scale = spread(np.abs(gamma) * forward.rstd)
    xhat = np.abs(x.astype(float) - spread(forward.mean)) * spread(forward.rstd)
    off_centre = 1 + np.abs(forward.mean) * forward.rstd
    y_terms = np.abs(spread(gamma)) * (xhat + spread(off_centre)) + np.abs(spread(beta)) + np.abs(forward.y)
    if fused:
        y_terms = y_terms + np.abs(residual.astype(float))
    sums = (np.abs(dz) * (xhat + 0.1)).sum(axis=(0, 2, 3)), np.abs(dz).sum(axis=(0, 2, 3))
    shares = [spread(s / statistics.count) for s in sums]
    dx_terms = scale * (np.abs(dz) + shares[1] + (1 + xhat) * shares[0])

    def worst(actual: Any, expected: Any, terms: Any, rounding: float = ROUNDING[name]) -> float:
        allowed = 1.01 * rounding * np.abs(expected) + ROUNDINGS * COMPUTE[name] * terms + SUBNORMAL[name]
        with np.errstate(invalid="ignore", divide="ignore"):
            return float(np.max(np.abs(_on_host(actual).astype(float) - expected) / allowed))

    backward = [
        worst(grads.x, dx, dx_terms),
        worst(grads.gamma, dgamma, sums[0], 0.0),
        worst(grads.beta, dbeta, sums[1], 0.0),
    ]
    if fused:
        backward.append(worst(grads.residual, dz, 0.0))
    title = f"{name} {layout} {'x'.join(map(str, shape))}{' where, residual, relu' if fused else ''}"
    figures = {
        "forward": worst(y, forward.y, y_terms),
        "backward": float(np.max(backward)),
        "inference": worst(inferred, forward.y, y_terms),
    }
    return [Row("oracle", f"{title}: {what}", value, 1.0, False, {}) for what, value in figures.items()]


# --- arrays -----------------------------------------------------------------------------------------------------------


def _placed(xp: Any, values: np.ndarray[Any, Any], layout: str) -> Any:
    """An NCHW array of the library xp that lies in memory as the layout says."""
    if layout == "NCHW":
        return xp.asarray(np.ascontiguousarray(values))
    return xp.moveaxis(xp.asarray(np.ascontiguousarray(np.moveaxis(values, 1, -1))), -1, 1)


def _on_host(a: Any) -> Any:
    return a.get() if hasattr(a, "get") else a


def _relative(actual: Any, expected: Any) -> float:
    """The largest relative error."""
    return float(np.max(np.abs(np.asarray(actual).astype(float) - expected) / np.abs(expected)))
