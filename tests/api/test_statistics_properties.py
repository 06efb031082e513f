"""What must hold of statistics of any data, shape, slicing, axes and options: by hypothesis."""

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import fastbn
from tests import exact as oracle
from tests.statistics import FUNCTIONS, PLAIN, check, report, results_of
from tests.support import NUMBERS, maker, some_slow

COMPILED = ("float32",)
"""Whose kernels other tests compile, with masks and without; of all dtypes a few calls compile as many kernels."""

few = settings(deadline=None, max_examples=25, derandomize=True, suppress_health_check=list(HealthCheck))
many = settings(deadline=None, max_examples=1500, derandomize=True, suppress_health_check=list(HealthCheck))
by_function = pytest.mark.parametrize("function", FUNCTIONS)


@st.composite
def pieces(draw, size):
    """A slice of an axis that leaves something, of any step."""
    step = draw(st.sampled_from([1, 1, 1, 2, 3, -1, -2]))
    first, last = sorted((draw(st.integers(0, size - 1)), draw(st.integers(0, size - 1))))
    if step < 0:
        return slice(last, first - 1 if first else None, step)
    return slice(first, last + 1, step)


@st.composite
def arrays(draw, dtypes=tuple(NUMBERS), most=400):
    """Of 0 to 5 dimensions, sliced, permuted, broadcast, unaligned, of the other byte order."""
    dtype, shape, size = draw(st.sampled_from(dtypes)), [], 1
    for _ in range(draw(st.integers(0, 5))):
        shape.append(draw(st.integers(1, max(1, min(most // size, 40)))))
        size *= shape[-1]
    x = maker(dtype, draw(st.integers(0, 99)))(tuple(shape))
    if draw(st.booleans()):
        x = x[tuple(draw(pieces(n)) for n in x.shape)]
    if draw(st.booleans()):
        x = x.transpose(draw(st.permutations(range(x.ndim))))
    ways = ["as it lies", "as it lies", "broadcast", "unaligned", "other order", "Fortran", "field"]
    way = draw(st.sampled_from(ways))
    if way == "broadcast" and x.ndim:
        axis = draw(st.integers(0, x.ndim - 1))
        x = np.broadcast_to(x[(slice(None),) * axis + (slice(0, 1),)], x.shape)
    elif way == "unaligned":
        x = np.frombuffer(b" " + x.tobytes(), x.dtype, x.size, 1).reshape(x.shape)
    elif way == "other order" and dtype != "bfloat16":
        x = x.astype(x.dtype.newbyteorder())
    elif way == "Fortran":
        x = np.asfortranarray(x)
    elif way == "field":
        records = np.zeros(x.shape, [("before", np.int8), ("x", x.dtype), ("behind", np.int16)])
        records["x"] = x
        x = records["x"]
    return x


@st.composite
def calls(draw, dtypes=tuple(NUMBERS)):
    x = draw(arrays(dtypes))
    axes = draw(st.lists(st.integers(0, x.ndim - 1), unique=True)) if x.ndim else []
    signs = draw(st.integers(0, 31))
    axis = tuple(a - x.ndim if signs >> a & 1 else a for a in axes)
    axis = draw(st.sampled_from([None, axis, axis[0] if len(axis) == 1 else axis]))
    options = {"axis": axis}
    where = draw(st.sampled_from([None, None, "full", "broadcast", "first", "turned"]))
    if where is not None:
        rng = np.random.default_rng(draw(st.integers(0, 99)))
        shape = {
            "broadcast": [n if draw(st.booleans()) else 1 for n in x.shape],
            "first": x.shape[x.ndim // 2 :],
        }.get(where, x.shape)
        options["where"] = np.asarray(rng.random(shape) < draw(st.sampled_from([0.3, 0.9])))
        if where == "turned" and x.ndim:
            options["where"] = np.array(options["where"], order="F")[(slice(None, None, -1),) * x.ndim]
    if draw(st.booleans()) and x.dtype.kind not in "iub":
        x = x.copy() if x.flags.writeable else np.array(x)
        bad = draw(st.sampled_from([np.nan, np.inf, -np.inf]))
        x[np.random.default_rng(draw(st.integers(0, 99))).random(x.shape) < 0.1] = bad
    return x, options


def judged(function, call, keepdims, ddof, dtype):
    """A call of random options: exactly right, and x as it was."""
    x, options = call
    where, skip = options.get("where", True), function.startswith("nan")
    exact = oracle.exact(x, options["axis"], where, skip)
    assume((exact.count > ddof).all())
    if x.dtype.kind in "iu" and x.dtype.itemsize == 8 and function not in ("mean", "nanmean"):
        assume((exact.var() > 1e-4 * exact.mean**2).all())  # 64 bits become float64, and lose what is much smaller
    if function not in ("moments", "mean_var"):
        options = options | ({"dtype": dtype} if dtype else {})
    if function != "moments":
        options = options | {"keepdims": keepdims}
    if function not in ("moments", "mean", "nanmean"):
        options = options | {"ddof": ddof}
    failures = []
    with np.errstate(over="ignore"):
        check(failures, f"{x.dtype} {x.shape} {x.strides}", function, x, exact, **options)
    report(failures)


OPTIONS = (
    st.booleans(), st.sampled_from([0, 0, 1, 0.5]), st.sampled_from([None, None, "float64", "float32"]),
)  # fmt: skip


@pytest.mark.parametrize("function", some_slow(FUNCTIONS, PLAIN))
@given(calls(COMPILED), *OPTIONS)
@few
def test_any_call(function, call, keepdims, ddof, dtype):
    judged(function, call, keepdims, ddof, dtype)


@pytest.mark.slow
@by_function
@given(calls(), *OPTIONS)
@many
def test_many_calls(function, call, keepdims, ddof, dtype):
    judged(function, call, keepdims, ddof, dtype)


@given(arrays(dtypes=("float64",)), st.permutations(range(5)))
@few
def test_the_order_of_axes_does_not_matter(x, order):
    """Nor does what they are called."""
    order = [a for a in order if a < x.ndim]
    for function in ("mean", "var", "nanmean", "nanvar"):
        call = getattr(fastbn, function)
        expected = call(x, axis=tuple(range(0, x.ndim, 2)))
        turned = call(x.transpose(order), axis=tuple(order.index(a) for a in range(0, x.ndim, 2)))
        kept = [a for a in order if a % 2]
        np.testing.assert_allclose(turned, np.transpose(expected, [(a - 1) // 2 for a in kept]), rtol=1e-12, atol=1e-12)


@given(arrays(dtypes=COMPILED), st.integers(0, 99))
@few
def test_functions_agree(x, seed):
    """`std` is the root of `var`; `mean_var` and `moments` are `mean` and `var`; a mask of NaN is the nan form."""
    rtol = 1e-12 if x.dtype.itemsize == 8 or x.dtype.kind in "iub" else 1e-6
    mean, var = fastbn.mean(x), fastbn.var(x)
    np.testing.assert_allclose(fastbn.std(x), np.sqrt(var), rtol=rtol)
    np.testing.assert_allclose(fastbn.mean_var(x), (mean, var), rtol=rtol, atol=rtol)
    found = results_of("moments", x)
    np.testing.assert_allclose(found["m2"] / found["count"], var, rtol=rtol, atol=1e-30)
    if x.dtype.kind == "f":
        holes = np.array(np.random.default_rng(seed).random(x.shape) < 0.2)
        if not holes.all():
            spoilt = np.where(holes, np.nan, x).astype(x.dtype)
            for name in ("mean", "var", "std"):
                masked = getattr(fastbn, name)(x, where=~holes)
                np.testing.assert_allclose(getattr(fastbn, "nan" + name)(spoilt), masked, rtol=rtol, atol=1e-30)
