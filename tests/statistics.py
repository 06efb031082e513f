"""How calls of statistics are judged: values against exact arithmetic, dtypes, shapes and types against NumPy's."""

import warnings

import numpy as np

import fastbn
from tests import exact as oracle

PLAIN = ["mean", "var", "std", "mean_var", "moments"]
NAN = ["nanmean", "nanvar", "nanstd"]
FUNCTIONS = [*PLAIN, *NAN]


def results_of(function, x, axis=None, **options):
    """The results of a call, by what they are; `moments` keeps what the others reduce."""
    if function == "moments":
        reduced = range(x.ndim) if axis is None else axis if isinstance(axis, tuple) else (axis,)
        kept = tuple(a for a in range(x.ndim) if a not in {r % x.ndim for r in reduced})
        return fastbn.moments(x, channel_axis=kept, **options)._asdict()
    found = getattr(fastbn, function)(x, axis=axis, **options)
    return {"mean": found[0], "var": found[1]} if function == "mean_var" else {function.removeprefix("nan"): found}


def bounds(function, x, exact, wide):
    """Of means and of variances: what they are relative to, and a factor."""
    if x.dtype.kind in "iub" and x.dtype.itemsize <= 4 and function in ("mean", "nanmean"):
        return np.abs(exact.mean), 2.0**-53, oracle.SPREAD["float64"]  # the sum is exact: what is left is the division
    name = "float64" if wide or x.dtype.itemsize == 8 or x.dtype.kind in "iub" else "float32"
    of_mean = 1e-7 if name == "float32" and function in ("moments", "mean_var") else oracle.MEAN[name]
    return exact.magnitude, of_mean, oracle.SPREAD[name]


def rounded_integers(name, exact, magnitude, ddof):
    """What variances may be off because integers beyond 2^53 are rounded to float64, whose distances then are off."""
    off, std = 2.0**-52 * magnitude, np.nan_to_num(exact.std(ddof), posinf=0)
    return {"std": off, "var": 2 * off * std, "m2": 2 * off * std * exact.count}[name]


def expectation(name, exact, ddof):
    if name in ("var", "std"):
        values = getattr(exact, name)(ddof)
        return values, np.nan_to_num(values, posinf=0)
    values = getattr(exact, name)
    return values, np.zeros(values.shape) if name == "count" else np.nan_to_num(values)


def problems(function, x, exact, axis=None, dtype=None, ddof=0, keepdims=False, **options):
    """What is wrong with a call's results, in words."""
    given = {"dtype": dtype} if dtype is not None else {}
    given |= {"keepdims": keepdims} if keepdims else {}
    given |= {"correction" if function == "mean_var" else "ddof": ddof} if ddof else {}
    results = results_of(function, x, axis, **given, **options)
    magnitude, of_mean, of_var = bounds(function, x, exact, dtype is not None and np.dtype(dtype).itemsize == 8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        numpys = np.mean(x, axis=axis, dtype=dtype, keepdims=keepdims)
    if function == "moments":
        numpys = np.asarray(numpys, float)
    for name, actual in results.items():
        wrong = [
            f"{name}: {what(actual)}, of numpy {what(numpys)}"
            for what in (type, lambda a: a.dtype, np.shape)
            if what(actual) != what(numpys)
        ]
        yield from wrong
        if wrong:
            continue
        expected, scale = expectation(name, exact, ddof)
        scale, relative = (magnitude, of_mean) if name == "mean" else (scale, of_var)
        if x.dtype.kind in "iu" and x.dtype.itemsize == 8 and name in ("var", "std", "m2"):
            scale = scale + rounded_integers(name, exact, magnitude, ddof) / relative
        actual = np.reshape(actual, exact.count.shape)
        beyond = oracle.excess(actual, expected, scale, relative)
        if (beyond > 0).any():
            worst = np.unravel_index(np.argmax(beyond), beyond.shape)
            yield f"{name}{list(map(int, worst))}: {actual[worst]!r}, exactly {expected[worst]!r}"


def check(failures, label, function, x, exact, **options):
    """Add what is wrong to `failures`."""
    before = x.tobytes()
    failures += [f"{label}, {options}: {problem}" for problem in problems(function, x, exact, **options)]
    if x.tobytes() != before:
        failures.append(f"{label}, {options}: x was written")


def report(failures):
    assert not failures, f"{len(failures)} failures\n" + "\n".join(failures[:12])
