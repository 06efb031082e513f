"""What every function refuses: the exception, a message that names the argument, and nothing written by then."""

import re
import sys
import types
from itertools import product

import ml_dtypes
import numpy as np
import pytest
from numpy.exceptions import AxisError

import fastbn
from fastbn import Moments, Saved

SHAPE, CHANNELS, WEIGHTS = (4, 3, 5), (3,), (4, 1, 5)


def data(shape=SHAPE, dtype=np.float32, seed=0):
    return (np.random.default_rng(seed).random(shape) + 0.5).astype(dtype)


def channels(seed=0):
    return data(CHANNELS, np.float32, seed)


def batch(shape=CHANNELS):
    return Moments(np.full(shape, 20.0), np.full(shape, 1.5), np.full(shape, 7.0))


def saved(**changes):
    """As a forward pass with weights leaves it."""
    count, mean, m2 = batch()
    fields = {
        "x": data(), "y": None, "gamma": channels(1), "weight": data(WEIGHTS, np.float64), "moments": batch(),
        "mean": mean, "rstd": 1 / np.sqrt(m2 / count), "count": count, "channel_axis": 1, "activation": None,
        "has_residual": False, "gathered": False,
    }  # fmt: skip
    return Saved(**fields | changes)


def read_only(a):
    a.flags.writeable = False
    return a


def merge(moments):
    return fastbn.merge(*moments)


# Arguments that each function accepts; a case changes one or two.
GOOD = {
    fastbn.batch_norm: lambda: {
        "x": data(), "gamma": channels(1), "beta": channels(2), "where": data(WEIGHTS, bool),
        "weights": data(WEIGHTS), "residual": data(seed=3), "out": data(seed=4),
    },
    fastbn.batch_norm_backward: lambda: {
        "dy": data(seed=5), "saved": saved(), "dmean": channels(1), "dvar": channels(2), "out": data(seed=4),
    },
    fastbn.batch_norm_inference: lambda: {
        "x": data(), "mean": channels(), "var": channels(1), "gamma": channels(2), "beta": channels(3),
        "residual": data(seed=3), "out": data(seed=4),
    },
    fastbn.normalize: lambda: {
        "x": data(), "mean": channels(), "rstd": channels(1), "gamma": channels(2), "beta": channels(3),
        "residual": data(seed=3), "out": data(seed=4),
    },
    fastbn.grad_sums: lambda: {"dy": data(seed=5), "x": data(), "mean": channels(), "rstd": channels(1)},
    fastbn.grad_input: lambda: {
        "dy": data(seed=5), "x": data(), "mean": channels(), "rstd": channels(1), "gamma": channels(2),
        "dgamma": channels(3), "dbeta": channels(4), "count": channels(5), "where": data(WEIGHTS, bool),
        "weights": data(WEIGHTS), "out": data(seed=4),
    },
    fastbn.fold: lambda: {
        "kernel": data((3, 2, 2)), "kernel_bias": channels(), "mean": channels(1), "var": channels(2),
        "gamma": channels(3), "beta": channels(4),
    },
    Saved.frozen: lambda: {
        "x": data(), "mean": channels(), "var": channels(1), "gamma": channels(2), "y": data(seed=3),
    },
    fastbn.moments: lambda: {"x": data(), "where": data(WEIGHTS, bool), "weights": data(WEIGHTS)},
    fastbn.mean: lambda: {"x": data(), "axis": 1, "where": data(SHAPE, bool), "out": data((4, 5), seed=4)},
    fastbn.var: lambda: {
        "x": data(), "axis": 1, "where": data(SHAPE, bool), "mean": data((4, 1, 5), seed=3),
        "out": data((4, 5), seed=4),
    },
    fastbn.update_running: lambda: {
        "mean": channels(), "var": channels(1), "moments": batch(), "out": (channels(2), channels(3)),
    },
    merge: lambda: {"moments": (batch(), batch(), batch())},
    fastbn.population: lambda: {"moments_of_batches": [batch(), batch()]},
}  # fmt: skip

ARRAYS = {
    function: [name for name, value in good().items() if isinstance(value, np.ndarray)]
    for function, good in GOOD.items()
}
ALL_ARRAYS = [(function, name) for function, names in ARRAYS.items() for name in names]
STATISTICS = (fastbn.moments, fastbn.mean, fastbn.var)


def taking(*names, but=()):
    """Functions and those of the named arguments that they take."""
    return [(function, name) for function, name in ALL_ARRAYS if name in names and function not in but]


def label(value):
    if callable(value):
        return value.__name__
    return value if isinstance(value, str) else None


# --- the check --------------------------------------------------------------------------------------------------------


def arrays_in(value):
    if isinstance(value, np.ndarray):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from arrays_in(item)


def assert_refused(function, arguments, error, message):
    """The call raises just this, and every array it was given holds what it held."""
    before = [(array, array.tobytes()) for array in arrays_in(list(arguments.values()))]
    with pytest.raises(error) as caught:
        function(**arguments)
    assert re.search(message, str(caught.value)), f"expected {message!r}, got {str(caught.value)!r}"
    assert all(array.tobytes() == content for array, content in before), "written before the error"


@pytest.mark.parametrize("function", GOOD, ids=label)
def test_the_arguments_that_cases_change_are_good(function):
    """So that a case fails for what it changes; and `out` is written then, so that 'nothing written' says something."""
    arguments = GOOD[function]()
    outputs = list(arrays_in(arguments.get("out")))
    before = [a.copy() for a in outputs]
    function(**arguments)
    for a, content in zip(outputs, before, strict=True):
        assert (a != content).all()


def test_the_check_can_fail():
    def careless(out, message="out: expected this, got that", error=ValueError, write=False):
        if write:
            out[0] += 1
        raise error(message)

    good = {"out": data()}
    assert_refused(careless, good, ValueError, "^out: expected")
    for wrong in ({"write": True}, {"message": "oops"}):
        with pytest.raises(AssertionError):
            assert_refused(careless, good | wrong, ValueError, "^out: expected")
    with pytest.raises(KeyError):
        assert_refused(careless, good | {"error": KeyError}, ValueError, "^out: expected")
    with pytest.raises(pytest.fail.Exception):
        assert_refused(lambda out: out, good, ValueError, "")


# --- kinds of array ---------------------------------------------------------------------------------------------------


def foreign(module, name):
    """A class as another library has it: not an ndarray, but NumPy could convert it."""

    class Foreign:
        shape, ndim, dtype = SHAPE, len(SHAPE), np.dtype(np.float32)

        def __array__(self, dtype=None, copy=None):
            return data()

        def __dlpack__(self, **_):
            return data().__dlpack__()

    Foreign.__module__, Foreign.__name__ = module, name
    return Foreign()


class Sparse:
    """SciPy's and CuPy's: with none of NumPy's protocols, so that NumPy makes one object of it."""

    shape, ndim, dtype = SHAPE, len(SHAPE), np.dtype(np.float32)

    def toarray(self):
        return data()


Sparse.__module__, Sparse.__name__ = "scipy.sparse._csr", "csr_array"


class Own(np.ndarray):
    pass


KINDS = {  # kind: an array, what the message calls it, what it says to pass instead
    "list": (data().tolist(), "list", r"numpy\.asarray\(a\)"),
    "scalar": (np.float32(1), "numpy.float32", r"numpy\.asarray\(a\)"),
    "torch": (foreign("torch", "Tensor"), "torch.Tensor", r"t\.detach\(\)\.numpy\(\).*cupy\.from_dlpack\(t\)"),
    "jax": (foreign("jaxlib._jax", "ArrayImpl"), "jaxlib._jax.ArrayImpl", r"fastbn\.jax.*numpy\.asarray\(a\)"),
    "dask": (foreign("dask.array.core", "Array"), "dask.array.core.Array", r"fastbn\.dask.*a\.compute\(\)"),
    "sparse": (Sparse(), "scipy.sparse._csr.csr_array", r"\.toarray\(\)"),
    "pandas": (foreign("pandas.core.frame", "DataFrame"), "pandas.core.frame.DataFrame", r"\.to_numpy\(\)"),
    "unheard of": (foreign("somewhere", "Array"), "somewhere.Array", "convert it"),
    "masked": (np.ma.array(data(), mask=data() > 1), "numpy.ma.MaskedArray", r"a\.data and where=~numpy\.ma\.getmask"),
    "matrix": (data((4, 3)).view(np.matrix), "numpy.matrix", r"numpy\.asarray\(a\)"),
    "subclass": (data().view(Own), f"{__name__}.Own", r"numpy\.asarray\(a\)"),
}  # fmt: skip
TAKEN = {  # numbers and lists that functions take all the same
    (function, name, kind)
    for (function, name), kind in product(ALL_ARRAYS, ("list", "scalar"))
    if (function in STATISTICS and name != "out") or (name, kind) == ("count", "scalar")
}


@pytest.mark.parametrize(
    ("function", "name", "kind"),
    [(*taker, kind) for taker, kind in product(ALL_ARRAYS, KINDS) if (*taker, kind) not in TAKEN],
    ids=label,
)
def test_kind(function, name, kind):
    array, called, instead = KINDS[kind]
    message = rf"^{name}: expected a numpy\.ndarray or a cupy\.ndarray, got {re.escape(called)}; .*{instead}"
    assert_refused(function, GOOD[function]() | {name: array}, TypeError, message)


def test_sparse_arrays_are_named():
    sparse = pytest.importorskip("scipy.sparse")
    for make in (sparse.csr_array, sparse.csc_matrix, sparse.coo_array, sparse.dok_array, sparse.lil_matrix):
        for function in (fastbn.mean, fastbn.std, fastbn.mean_var, fastbn.moments, fastbn.batch_norm):
            with pytest.raises(TypeError, match=rf"^x: expected .* got scipy.*{make.__name__}; pass \.toarray\(\)"):
                function(make(np.eye(3)))


OPTIONAL = {"gamma", "beta", "where", "weights", "residual", "out", "kernel_bias", "dmean", "dvar", "y"}
REQUIRED = [
    (function, name)
    for function, name in ALL_ARRAYS
    if name not in OPTIONAL and (function, name) != (fastbn.var, "mean")
]


@pytest.mark.parametrize(("function", "name"), REQUIRED, ids=label)
def test_none_for_a_required_array(function, name):
    assert_refused(function, GOOD[function]() | {name: None}, TypeError, f"^{name}: expected .* got .*(None|object)")


@pytest.fixture
def cupy_array(monkeypatch):
    """Makes arrays of a module that passes for CuPy."""

    class ndarray:
        def __init__(self, shape, dtype=np.float32):
            self.shape, self.dtype, self.ndim = shape, np.dtype(dtype), len(shape)
            self.size = int(np.prod(shape))
            self.strides, self.itemsize = np.empty(shape, dtype).strides, self.dtype.itemsize
            self.data = types.SimpleNamespace(device_id=0, ptr=0)

        def __array__(self, dtype=None, copy=None):
            raise TypeError("Implicit conversion to a NumPy array is not allowed.")

    ndarray.__module__ = "cupy"
    module = types.ModuleType("cupy")
    module.ndarray = ndarray
    module.cuda = types.SimpleNamespace(runtime=types.SimpleNamespace(getDevice=lambda: 0))
    monkeypatch.setitem(sys.modules, "cupy", module)
    return lambda like: ndarray(like.shape, like.dtype)


BOTH = "(?s)(?=.*numpy)(?=.*cupy)"


@pytest.mark.parametrize(("function", "name"), ALL_ARRAYS, ids=label)
def test_mixed_kinds(function, name, cupy_array):
    """The message names an argument and both kinds."""
    arguments = GOOD[function]()
    others = "|".join(ARRAYS[function]) + "|moments|saved.x"
    message = rf"{BOTH}^({others}): expected "
    assert_refused(function, arguments | {name: cupy_array(arguments[name])}, TypeError, message)


@pytest.mark.parametrize("i", [0, 1])
def test_mixed_kinds_in_a_pair_of_outputs(i, cupy_array):
    arguments = GOOD[fastbn.update_running]()
    pair = list(arguments["out"])
    pair[i] = cupy_array(pair[i])
    message = rf"{BOTH}^out\[{i}\]: expected"
    assert_refused(fastbn.update_running, arguments | {"out": tuple(pair)}, TypeError, message)


@pytest.mark.parametrize("fields", [Moments._fields, ("mean",), ("m2",)], ids="-".join)
@pytest.mark.parametrize("function", [fastbn.update_running, merge, fastbn.population], ids=label)
def test_mixed_kinds_in_moments(function, fields, cupy_array):
    """Of whole Moments beside others, and within one."""
    mixed = batch()._replace(**{field: cupy_array(getattr(batch(), field)) for field in fields})
    changes, name = {
        fastbn.update_running: ({"moments": mixed}, "(moments|mean)"),
        merge: ({"moments": (batch(), mixed)}, r"moments\[1\]"),
        fastbn.population: ({"moments_of_batches": (batch(), mixed)}, r"moments_of_batches\[1\]"),
    }[function]
    assert_refused(function, GOOD[function]() | changes, TypeError, rf"{BOTH}^{name}.*: expected")


# --- everything else is a table: function, what is changed, the exception, the message --------------------------------

INTEGERS, COMPLEX, OBJECTS = np.dtype(np.int64), np.dtype(np.complex64), np.dtype(object)
PARAMETERS = taking("gamma", "beta", "mean", "var", "rstd", "dgamma", "dbeta", "dmean", "dvar", "count", "kernel_bias",
                    but=(*STATISTICS, fastbn.update_running))  # fmt: skip
BATCH_NORMS = (fastbn.batch_norm, fastbn.batch_norm_inference, fastbn.normalize)
SAME_AS_X = taking("dy", "residual", "out", "y", but=STATISTICS)
WEIGHTED = (fastbn.batch_norm, fastbn.grad_input, fastbn.moments)
WITH_CHANNEL_AXIS = (*BATCH_NORMS, fastbn.grad_sums, fastbn.grad_input, fastbn.moments, Saved.frozen)
WITH_EPS = (fastbn.batch_norm, fastbn.batch_norm_inference, fastbn.fold, Saved.frozen)


def dtypes():
    floats = "float16, bfloat16, float32, float64"
    for (function, name), dtype in product(
        taking("x", "kernel", but=STATISTICS), (INTEGERS, COMPLEX, OBJECTS, np.dtype(bool), np.dtype(np.longdouble))
    ):
        value = np.ones(SHAPE, dtype)
        yield function, {name: value}, TypeError, f"^{name}: expected one of {floats}, got dtype {dtype}"
    float8 = np.ones(SHAPE, ml_dtypes.float8_e4m3fn)
    yield fastbn.batch_norm, {"x": float8}, TypeError, f"^x: expected one of {floats}, got dtype float8_e4m3fn"
    for function, dtype in product(STATISTICS, (COMPLEX, OBJECTS)):
        yield function, {"x": np.ones(SHAPE, dtype)}, TypeError, f"^x: expected real numbers, got dtype {dtype}"
    for (function, name), dtype in product(PARAMETERS, (INTEGERS, COMPLEX, OBJECTS)):
        yield function, {name: np.ones(CHANNELS, dtype)}, TypeError, f"^{name}: expected a float dtype, got {dtype}"
    for name, dtype in product(("mean", "var"), (INTEGERS, COMPLEX, OBJECTS)):
        bad = {name: np.ones(CHANNELS, dtype)}
        yield fastbn.update_running, bad, TypeError, f"^{name}: expected a float dtype, got {dtype}"
    for (function, name), dtype in product(SAME_AS_X, (np.float64, np.float16, ml_dtypes.bfloat16, np.int32, complex)):
        message = rf"^{name}: expected x's shape \(4, 3, 5\) and dtype float32, got .*dtype {np.dtype(dtype).name}"
        yield function, {name: np.ones(SHAPE, dtype)}, ValueError, message
    for function, dtype in product((*WEIGHTED, fastbn.mean, fastbn.var), (np.int64, np.float32, np.uint8)):
        where = np.ones(WEIGHTS, dtype)
        yield function, {"where": where}, TypeError, f"^where: expected dtype bool, got {where.dtype}"
    for function, dtype in product(WEIGHTED, (COMPLEX, OBJECTS)):
        yield function, {"weights": np.ones(WEIGHTS, dtype)}, TypeError, f"^weights: expected a real dtype, got {dtype}"
    for function, dtype in product((fastbn.mean, fastbn.var), (np.int32, bool)):
        out = np.ones((4, 5), dtype)
        yield function, {"out": out}, TypeError, f"^out: expected a dtype .*float32.* got {out.dtype}"


def shapes():
    for (function, name), shape in product(PARAMETERS, ((2,), (4,), (0,), (3, 1), (1, 3), (1, 3, 1))):
        message = rf"^{name}: expected a shape that broadcasts to \(3,\), got {re.escape(str(shape))}"
        yield function, {name: np.ones(shape, np.float32)}, ValueError, message
    for (function, name), shape in product(
        SAME_AS_X, ((4, 3), (4, 3, 4), (3, 4, 5), (1, 4, 3, 5), (4, 3, 1), (0, 3, 5))
    ):
        message = rf"^{name}: expected x's shape \(4, 3, 5\) and dtype float32, got shape {re.escape(str(shape))}"
        yield function, {name: np.ones(shape, np.float32)}, ValueError, message
    shared, own = r"\(4, 1, 5\) \(size 1 on the channel axes; only moments .*\)", r"\(4, 3, 5\)"
    for function, name, shape in product(
        WEIGHTED, ("where", "weights"), (SHAPE, (3, 1), (2, 1, 5), (1, 4, 1, 5), (0, 1, 5), (4, 2, 5))
    ):
        each = function is fastbn.moments  # channel its own weights
        if each and shape in (SHAPE, (3, 1)):
            continue
        value = np.ones(shape, bool if name == "where" else np.float32)
        message = (
            rf"^{name}: expected a shape that broadcasts to {own if each else shared}, got {re.escape(str(shape))}"
        )
        yield function, {name: value}, ValueError, message
    for function, shape in product((fastbn.mean, fastbn.var), ((4,), (5, 4), (4, 1, 5), (1, 5), ())):
        message = rf"^out: expected shape \(4, 5\), got {re.escape(str(shape))}"
        yield function, {"out": np.ones(shape, np.float32)}, ValueError, message
    for name, shape in product(("mean", "var"), ((2,), (1,), (), (3, 1))):
        message = rf"^{name}: expected the shape of moments.count, \(3,\), got {re.escape(str(shape))}"
        yield fastbn.update_running, {name: np.ones(shape, np.float32)}, ValueError, message


def outputs():
    for function, name in taking("out"):
        out = read_only(data((4, 5) if function in STATISTICS else SHAPE))
        yield function, {name: out}, ValueError, "^out: expected a writable array, got a read-only one"
    good, wrong = channels(2), np.ones(4, np.float32)
    for i in (0, 1):
        for bad, message in (
            (wrong, r"expected .*shape .*\(3,\).* got .*\(4,\)"),
            (good.astype(np.float64), "expected .*dtype float32.* got .*dtype float64"),
            (read_only(good.copy()), "expected a writable array, got a read-only one"),
        ):
            pair = (bad, channels(3)) if i == 0 else (channels(3), bad)
            yield fastbn.update_running, {"out": pair}, ValueError, rf"^out\[{i}\]: {message}"
        for bad, called in (
            ([1.0, 2.0, 3.0], "list"),
            (foreign("torch", "Tensor"), "torch.Tensor"),
            (None, "NoneType"),
        ):
            pair = (bad, channels(3)) if i == 0 else (channels(3), bad)
            message = rf"^out\[{i}\]: expected a numpy\.ndarray .* got {called}"
            yield fastbn.update_running, {"out": pair}, TypeError, message
    for bad in (good, (good,), (good, good, good), 1):
        yield fastbn.update_running, {"out": bad}, TypeError, "^out: expected a pair of arrays, got "


def axes():
    for function in WITH_CHANNEL_AXIS:
        for axis in (3, -4, 100, (0, 3), (-4, 1)):
            yield function, {"channel_axis": axis}, AxisError, "channel_axis: axis .* is out of bounds .* dimension 3"
        for axis in ((1, 1), (1, -2), (0, 1, 0)):
            yield function, {"channel_axis": axis}, ValueError, "repeated axis in `channel_axis`"
        for axis in (1.0, "1", None, (0.5,)):
            yield function, {"channel_axis": axis}, TypeError, "^channel_axis: expected an int or a tuple of ints, got "
        for few in (np.array(1, np.float32), np.ones(3, np.float32)):
            yield function, {"x": few, "channel_axis": 1}, AxisError, "channel_axis: axis 1 is out of bounds"
    for axis in (3, -4):
        yield fastbn.fold, {"axis": axis}, AxisError, "^axis: axis .* is out of bounds .* dimension 3"
    for axis in ((0, 1), 0.0, None):
        yield fastbn.fold, {"axis": axis}, TypeError, "^axis: expected an int.* got "
    for function in (fastbn.mean, fastbn.var):
        for axis in (3, -4, (0, 3)):
            yield function, {"axis": axis}, AxisError, "axis .* is out of bounds .* dimension 3"
        for axis in ((1, 1), (1, -2)):
            yield function, {"axis": axis}, ValueError, "repeated axis"


def values():
    for function in WITH_EPS:
        for eps in (-1e-5, -1, np.nan, np.inf, -np.inf):
            yield function, {"eps": eps}, ValueError, f"^eps: expected a finite number >= 0, got {eps}"
        for eps in ("1e-5", None, 1j, np.ones(3)):
            yield function, {"eps": eps}, TypeError, "^eps: expected a real number, got "
    for function, bad in product(WEIGHTED, (-1, -1e-30, np.nan, np.inf, -np.inf)):
        weights = np.ones(WEIGHTS, np.float32)
        weights[2, 0, 3] = bad
        yield function, {"weights": weights}, ValueError, "^weights: expected finite values >= 0, got "
    for shape in (WEIGHTS, SHAPE):
        bad = {"weights": np.full(shape, -1)}
        yield fastbn.moments, bad, ValueError, "^weights: expected finite values >= 0, got "
    for function in (*BATCH_NORMS, Saved.frozen):
        for activation in ("gelu", "ReLU", "", True, np.maximum):
            message = f"^activation: expected None or 'relu', got {re.escape(repr(activation))}"
            yield function, {"activation": activation}, ValueError, message
    for rate in (-0.1, 1.1, -np.inf, np.inf, np.nan):
        yield fastbn.update_running, {"rate": rate}, ValueError, rf"^rate: expected a number in \[0, 1\], got {rate}"
    for rate in ("0.1", None, 0.5j, np.full(3, 0.1)):
        yield (
            fastbn.update_running,
            {"rate": rate},
            (TypeError, ValueError),
            r"^rate: expected a real number, got ",
        )
    both = {"ddof": 1, "correction": 1}
    yield fastbn.var, both, ValueError, "^correction: expected ddof or correction, got both"


def moments():
    a = np.ones(3)
    wrong = [  # not Moments; fields of several shapes; fields that are no arrays; fields of wrong dtypes
        (None, TypeError, "expected a fastbn.Moments, got NoneType"),
        (a, TypeError, "expected a fastbn.Moments, got ndarray"),
        ([a, a, a], TypeError, "expected a fastbn.Moments, got list"),
        ((a, a), TypeError, "expected a fastbn.Moments, got tuple"),
        (Moments(a, a, np.ones(4)), ValueError, r"expected the shape of .*count, \(3,\), got \(4,\)"),
        (Moments(a, np.ones((3, 1)), a), ValueError, r"expected the shape of .*count, \(3,\), got \(3, 1\)"),
    ]
    wrong_fields = [
        (Moments([1, 1, 1], a, a), "count: expected a numpy.ndarray .* got list"),
        (Moments(a, np.ma.ones(3), a), "mean: expected a numpy.ndarray .* got numpy.ma.MaskedArray"),
        (Moments(1.0, 1.0, 1.0), "count: expected a numpy.ndarray .* got float"),
        (Moments(a, a.astype(complex), a), "mean: expected a float dtype, got complex128"),
        (Moments(a, a, a.astype(object)), "m2: expected a float dtype, got object"),
    ]
    for bad, error, message in wrong:
        yield fastbn.update_running, {"moments": bad}, error, rf"^moments[.\w]*: {message}"
        for i, several in ((0, (bad, batch())), (1, (batch(), bad))):
            yield merge, {"moments": several}, error, rf"^moments\[{i}\][.\w]*: {message}"
            yield (
                fastbn.population,
                {"moments_of_batches": several},
                error,
                rf"^moments_of_batches\[{i}\][.\w]*: {message}",
            )
    for bad, message in wrong_fields:
        yield fastbn.update_running, {"moments": bad}, TypeError, rf"^moments\.{message}"
        yield merge, {"moments": (batch(), bad)}, TypeError, rf"^moments\[1\]\.{message}"
        bad_batches = {"moments_of_batches": (batch(), bad)}
        yield fastbn.population, bad_batches, TypeError, rf"^moments_of_batches\[1\]\.{message}"
    yield (
        fastbn.update_running,
        {"moments": batch((4,))},
        ValueError,
        r"^mean: expected the shape of moments.count, \(4,\), got \(3,\)",
    )
    yield merge, {"moments": ()}, ValueError, "^moments: expected at least one Moments, got none"
    yield (
        merge,
        {"moments": (batch(), batch((4,)))},
        ValueError,
        r"^moments\[1\].count: expected the shape of moments\[0\].count, \(3,\), got \(4,\)",
    )
    none, two = {"moments_of_batches": []}, {"moments_of_batches": [batch(), batch((4,))]}
    yield fastbn.population, none, ValueError, "^moments_of_batches: expected at least one Moments, got none"
    yield (
        fastbn.population,
        two,
        ValueError,
        r"^moments_of_batches\[1\].count: expected the shape of .*\(3,\), got \(4,\)",
    )
    for bad in (None, 3):
        yield fastbn.population, {"moments_of_batches": bad}, TypeError, "^moments_of_batches: expected .* got "
    yield (
        fastbn.population,
        {"moments_of_batches": batch()},
        TypeError,
        r"^moments_of_batches\[0\]: expected a fastbn.Moments",
    )


def backward():
    function, x = fastbn.batch_norm_backward, data()
    for bad in (None, x, tuple(saved()), (x, saved()), {"x": x}):
        yield function, {"saved": bad}, TypeError, f"^saved: expected a fastbn.Saved, got {type(bad).__name__}"
    message = "^saved: expected the input x, but out overwrote it"
    yield function, {"saved": saved(x=None)}, ValueError, message
    frozen = Saved.frozen(x, channels(), channels())
    for name in ("dmean", "dvar"):
        changes = {"saved": frozen, "dmean": None, "dvar": None} | {name: channels()}
        yield function, changes, ValueError, f"{name}.*: expected None with frozen statistics"
    relu = {"activation": "relu", "y": None}
    yield Saved.frozen, relu, ValueError, "^y: expected the output .* got None"
    message = "^gather: expected what the forward pass had.* without one, got a hook"
    yield function, {"gather": one_rank}, ValueError, message
    yield function, {"saved": frozen, "dmean": None, "dvar": None, "gather": one_rank}, ValueError, message
    message = "^gather: expected what the forward pass had.* with one, got None"
    yield function, {"saved": saved(gathered=True)}, ValueError, message
    yield function, {"saved": saved(x=foreign("torch", "Tensor"))}, TypeError, r"^saved\.x: expected a numpy\.ndarray"


def one_rank(vector):
    return vector[None]


WRONG_HOOKS = {  # what a hook makes of a vector of k numbers, and what the message says of it
    "nothing": (lambda vector: None, TypeError, "gather.* expected .* got .*None"),
    "a list": (lambda vector: [vector.tolist()], TypeError, "gather.* expected .* got .*list"),
    "a list of arrays": (lambda vector: [vector], TypeError, "gather.* expected .* got .*list"),
    "torch": (lambda vector: foreign("torch", "Tensor"), TypeError, r"gather.* expected .* got .*torch\.Tensor"),
    "masked": (lambda vector: np.ma.array(vector[None]), TypeError, "gather.* expected .* got .*MaskedArray"),
    "a number": (lambda vector: 1.0, TypeError, "gather.* expected .* got .*float"),
    "complex": (lambda vector: vector[None] + 0j, TypeError, "gather.* expected .* got .*complex128"),
    "objects": (lambda vector: vector[None].astype(object), TypeError, "gather.* expected .* got .*object"),
    "one dimension": (lambda vector: vector, ValueError, r"^gather: expected .*\(ranks, {k}\), got \({k},\)"),
    "transposed": (lambda vector: vector[:, None], ValueError, r"^gather: expected .*\(ranks, {k}\), got \({k}, 1\)"),
    "short": (lambda vector: vector[None, 1:], ValueError, r"^gather: expected .*\(ranks, {k}\), got \(1, "),
    "long": (lambda vector: np.ones((2, vector.size + 1)), ValueError, r"^gather: .*\(ranks, {k}\), got \(2, "),
    "three dimensions": (lambda vector: vector[None, None], ValueError, r"^gather: .*\(ranks, {k}\), got \(1, 1, "),
    "no ranks": (lambda vector: np.ones((0, vector.size)), ValueError, r"^gather: .*\(ranks, {k}\), got \(0, "),
}  # fmt: skip


def hooks():
    gathered = {"saved": saved(gathered=True)}
    for hook, error, message in WRONG_HOOKS.values():
        yield fastbn.batch_norm, {"gather": hook}, error, message.replace("{k}", "9")
        yield fastbn.batch_norm_backward, gathered | {"gather": hook}, error, message.replace("{k}", "6")
    for bad in (3, "gather", one_rank(data())):
        yield fastbn.batch_norm, {"gather": bad}, TypeError, "^gather: expected a callable.* got "
        yield fastbn.batch_norm_backward, gathered | {"gather": bad}, TypeError, "^gather: expected a callable.* got "


TABLE = {
    f"{part.__name__}-{i}-{case[0].__name__}-{'-'.join(case[1])}": case
    for part in (dtypes, shapes, outputs, axes, values, moments, backward, hooks)
    for i, case in enumerate(part())
}


@pytest.mark.parametrize(("function", "changes", "error", "message"), TABLE.values(), ids=TABLE)
def test_refused(function, changes, error, message):
    assert_refused(function, GOOD[function]() | changes, error, message)


@pytest.mark.parametrize("function", ["batch_norm", "batch_norm_inference", "normalize"])
def test_out_without_a_place_for_each_element(function):
    out = np.lib.stride_tricks.as_strided(np.zeros((1, 3, 5)), (4, 3, 5), (0, 40, 8))
    given = {} if function == "batch_norm" else {"mean": np.zeros(3), "var": np.ones(3)}
    if function == "normalize":
        given["rstd"] = given.pop("var")
    with pytest.raises(ValueError, match=r"^out: expected a place for each element, got strides \(0, 40, 8\)"):
        getattr(fastbn, function)(np.ones((4, 3, 5)), **given, out=out)
    assert not out.any()


LOCAL = {
    name: case
    for name, case in TABLE.items()
    if case[0] in (fastbn.batch_norm, fastbn.batch_norm_backward) and not {"gather", "saved"} & set(case[1])
}


@pytest.mark.parametrize(("function", "changes", "error", "message"), LOCAL.values(), ids=LOCAL)
def test_checks_come_before_gather(function, changes, error, message):
    """A rank that failed after the others had entered the collective would leave them waiting."""
    calls = []

    def gather(vector):
        calls.append(vector)
        return vector[None]

    arguments = GOOD[function]() | {"gather": gather} | changes
    if function is fastbn.batch_norm_backward:
        arguments["saved"] = saved(gathered=True)
    assert_refused(function, arguments, error, message)
    assert not calls


# --- single cases -----------------------------------------------------------------------------------------------------


EARLY = [
    {"eps": -1},
    {"gamma": np.ones(2)},
    {"where": np.ones((1, 1, 1))},
    {"weights": np.full((1, 1, 1), -1.0)},
    {"channel_axis": 3},
    {"activation": "gelu"},
]


@pytest.mark.parametrize("changes", EARLY, ids=lambda changes: next(iter(changes)))
def test_checks_come_before_allocation(changes):
    """Of 840 TB here."""
    x = np.broadcast_to(np.float32(0), (1 << 22, 3, 1 << 24))
    with pytest.raises(MemoryError):
        np.empty_like(x)
    with pytest.raises((ValueError, TypeError), match=next(iter(changes))):
        fastbn.batch_norm(x, **changes)


def test_a_hook_that_raises():
    def interrupted(vector):
        raise KeyboardInterrupt("rank 1 is gone")

    assert_refused(fastbn.batch_norm, GOOD[fastbn.batch_norm]() | {"gather": interrupted}, KeyboardInterrupt, "rank 1")
    changes = {"gather": interrupted, "saved": saved(gathered=True)}
    good = GOOD[fastbn.batch_norm_backward]()
    assert_refused(fastbn.batch_norm_backward, good | changes, KeyboardInterrupt, "rank 1")


@pytest.mark.parametrize("shift", [0, 1, 3])
def test_backward_after_out_overwrote_x(shift):
    """Wholly or in part."""
    buffer = data((7, 3, 5))
    x, out = buffer[:4], buffer[shift : shift + 4]
    _, overwritten = fastbn.batch_norm(x, out=out)
    arguments = {"dy": data(), "saved": overwritten, "out": data(seed=4)}
    assert_refused(
        fastbn.batch_norm_backward, arguments, ValueError, "^saved: expected the input x, but out overwrote it"
    )


def test_backward_after_out_beside_x():
    buffer = data((8, 3, 5))
    _, apart = fastbn.batch_norm(buffer[:4], out=buffer[4:])
    assert apart.x is not None
    assert fastbn.batch_norm_backward(data(), apart).x.shape == SHAPE


def test_forward_and_backward_disagree_about_gather():
    _, alone = fastbn.batch_norm(data())
    _, together = fastbn.batch_norm(data(), gather=one_rank)
    for forward, hook in ((alone, one_rank), (together, None)):
        arguments = {"dy": data(), "saved": forward, "gather": hook, "out": data(seed=4)}
        assert_refused(fastbn.batch_norm_backward, arguments, ValueError, "^gather: expected what the forward pass had")


def test_wrong_number_of_saved_arrays():
    arrays, static = saved().arrays()
    for wrong in (arrays[:-1], (*arrays, arrays[0]), ()):
        arguments = {"arrays": wrong, "static": static}
        message = f"^arrays: expected {len(arrays)} arrays, got {len(wrong)}"
        assert_refused(Saved.from_arrays, arguments, ValueError, message)


def test_running_statistics_survive_an_error_in_place():
    """`out` may be the running arrays themselves."""
    mean, var = channels(), channels(1)
    for changes in ({"rate": 2}, {"moments": batch((4,))}, {"moments": None}, {"out": (mean, read_only(var.copy()))}):
        arguments = {"mean": mean, "var": var, "moments": batch(), "out": (mean, var)} | changes
        assert_refused(fastbn.update_running, arguments, (TypeError, ValueError), "expected .* got ")


def test_numpy_channel_axis():
    """Numbers that come out of arrays are taken where Python's are."""
    y, forward = fastbn.batch_norm(data(), channel_axis=np.int64(1))
    np.testing.assert_array_equal(y, fastbn.batch_norm(data())[0])
    assert fastbn.batch_norm_backward(data(), forward).gamma.shape == CHANNELS


def test_numpy_eps():
    np.testing.assert_array_equal(
        fastbn.batch_norm(data(), eps=np.float32(0.5))[0], fastbn.batch_norm(data(), eps=0.5)[0]
    )


def test_numpy_rate():
    mean, var = channels(), channels(1)
    expected = fastbn.update_running(mean, var, batch(), rate=0.5)
    np.testing.assert_array_equal(fastbn.update_running(mean, var, batch(), rate=np.float32(0.5)), expected)


def test_numpy_count():
    arguments = GOOD[fastbn.grad_input]() | {"out": None}
    expected = fastbn.grad_input(**arguments | {"count": 20})
    for count in (np.int64(20), np.float32(20), np.array(20.0)):
        np.testing.assert_array_equal(fastbn.grad_input(**arguments | {"count": count}), expected)
