"""What every function refuses: the exception, a message that names the argument, and nothing written by then."""

import re
import sys
import types
from itertools import product

import numpy as np
import pytest

import fastbn
from fastbn import Moments, Saved
from tests.cases.arguments import (
    ALL_ARRAYS,
    ARRAYS,
    GOOD,
    arrays_in,
    batch,
    channels,
    data,
    label,
    merge,
    read_only,
    saved,
)
from tests.cases.refusals import *  # noqa: F403
from tests.cases.refusals import BOTH, EARLY, KINDS, LOCAL, REQUIRED, TABLE, TAKEN, assert_refused

# --- the check --------------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("changes", EARLY, ids=lambda changes: next(iter(changes)))
def test_checks_come_before_allocation(changes):
    """Of 840 TB here."""
    x = np.broadcast_to(np.float32(0), (1 << 22, 3, 1 << 24))
    with pytest.raises(MemoryError):
        np.empty_like(x)
    with pytest.raises((ValueError, TypeError), match=next(iter(changes))):
        fastbn.batch_norm(x, **changes)


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
