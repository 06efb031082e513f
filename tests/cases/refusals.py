"""What every function refuses: a table of what is wrong, the exception and its message."""

import re
from itertools import product

import ml_dtypes
import numpy as np
import pytest
from numpy.exceptions import AxisError

import fastbn
from fastbn import Moments, Saved
from tests.cases.arguments import (
    ALL_ARRAYS,
    CHANNELS,
    GOOD,
    SHAPE,
    STATISTICS,
    WEIGHTS,
    Own,
    arrays_in,
    batch,
    channels,
    data,
    merge,
    read_only,
    saved,
    taking,
)

# --- the check --------------------------------------------------------------------------------------------------------


def assert_refused(function, arguments, error, message):
    """The call raises just this, and every array it was given holds what it held."""
    before = [(array, array.tobytes()) for array in arrays_in(list(arguments.values()))]
    with pytest.raises(error) as caught:
        function(**arguments)
    assert re.search(message, str(caught.value)), f"expected {message!r}, got {str(caught.value)!r}"
    assert all(array.tobytes() == content for array, content in before), "written before the error"


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


class OnGpu:
    """As Numba has it: of no array protocol of the host."""

    shape, dtype, __cuda_array_interface__ = SHAPE, np.dtype(np.float32), {"version": 3}


OnGpu.__module__, OnGpu.__name__ = "numba.cuda", "DeviceNDArray"

KINDS = {  # kind: an array, what the message calls it, what it says to pass instead
    "list": (data().tolist(), "list", r"numpy\.asarray\(a\)"),
    "scalar": (np.float32(1), "numpy.float32", r"numpy\.asarray\(a\)"),
    "torch": (foreign("torch", "Tensor"), "torch.Tensor", r"t\.detach\(\)\.numpy\(\).*cupy\.from_dlpack\(t\)"),
    "jax": (foreign("jaxlib._jax", "ArrayImpl"), "jaxlib._jax.ArrayImpl", r"fastbn\.jax.*numpy\.asarray\(a\)"),
    "dask": (foreign("dask.array.core", "Array"), "dask.array.core.Array", r"fastbn\.dask.*a\.compute\(\)"),
    "sparse": (Sparse(), "scipy.sparse._csr.csr_array", r"\.toarray\(\)"),
    "pandas": (foreign("pandas.core.frame", "DataFrame"), "pandas.core.frame.DataFrame", r"\.to_numpy\(\)"),
    "unheard of": (foreign("somewhere", "Array"), "somewhere.Array", "convert it"),
    "numba.cuda": (OnGpu(), "numba.cuda.DeviceNDArray", r"cupy\.from_dlpack\(a\) or cupy\.asarray\(a\)"),
    "masked": (np.ma.array(data(), mask=data() > 1), "numpy.ma.MaskedArray", r"a\.data and where=~numpy\.ma\.getmask"),
    "matrix": (data((4, 3)).view(np.matrix), "numpy.matrix", r"numpy\.asarray\(a\)"),
    "subclass": (data().view(Own), f"{Own.__module__}.Own", r"numpy\.asarray\(a\)"),
}  # fmt: skip
TAKEN = {  # numbers and lists that functions take all the same
    (function, name, kind)
    for (function, name), kind in product(ALL_ARRAYS, ("list", "scalar"))
    if (function in STATISTICS and name != "out") or (name, kind) == ("count", "scalar")
}

OPTIONAL = {"gamma", "beta", "where", "weights", "residual", "out", "kernel_bias", "dmean", "dvar", "y"}
REQUIRED = [
    (function, name)
    for function, name in ALL_ARRAYS
    if name not in OPTIONAL and (function, name) != (fastbn.var, "mean")
]

BOTH = "(?s)(?=.*numpy)(?=.*cupy)"

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
    for function, name, shape in product(
        WEIGHTED, ("where", "weights"), ((2, 1, 5), (1, 4, 1, 5), (0, 1, 5), (4, 2, 5), (5, 3))
    ):
        value = np.ones(shape, bool if name == "where" else np.float32)
        message = rf"^{name}: expected a shape that broadcasts to \(4, 3, 5\), got {re.escape(str(shape))}"
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

LOCAL = {
    name: case
    for name, case in TABLE.items()
    if case[0] in (fastbn.batch_norm, fastbn.batch_norm_backward) and not {"gather", "saved"} & set(case[1])
}

# --- single cases -----------------------------------------------------------------------------------------------------

EARLY = [
    {"eps": -1},
    {"gamma": np.ones(2)},
    {"where": np.ones((1, 1, 1))},
    {"weights": np.full((1, 1, 1), -1.0)},
    {"channel_axis": 3},
    {"activation": "gelu"},
]


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
