"""What tests/api/test_bad_input.py refuses is refused on CuPy arrays: in the same words, before anything is launched.

Left out is what cannot be. CuPy has no read-only arrays and no dtypes object, longdouble and float8; values of weights
are not looked at, since to ask a device for them is to wait for it.
"""

import contextlib
import re
from collections import defaultdict

import ml_dtypes
import numpy as np
import pytest

import fastbn
from fastbn import Moments
from tests.cases import calls, refusals
from tests.cases.arguments import ALL_ARRAYS, ARRAYS, GOOD, STATISTICS, arrays_in, batch, data, label, merge, saved
from tests.cases.refusals import BOTH, EARLY, KINDS, LOCAL, REQUIRED, TABLE, TAKEN, WRONG_HOOKS, assert_refused
from tests.cuda.harness import on_device
from tests.on_cupy import OnCupy
from tests.simt import host_cupy

pytestmark = pytest.mark.usefixtures("cuda_device")

by_function = pytest.mark.parametrize("function", GOOD, ids=label)


def words(function, arguments):
    """The exception of a call, without the name of a kind."""
    try:
        function(**arguments)
    except (TypeError, ValueError, IndexError) as error:
        return type(error), re.sub("numpy|cupy", "xp", str(error))
    return None


@contextlib.contextmanager
def noted(name):
    """Failures name the case."""
    try:
        yield
    except BaseException as error:
        error.add_note(name)
        raise


@pytest.fixture
def assert_refused_alike(cuda_device):
    def check(function, changes, error, message):
        launched = len(cuda_device.launches)
        assert_refused(OnCupy(function), GOOD[function]() | changes, error, message)
        if not callable(changes.get("gather")):  # NumPy's kernels would be compiled
            numpys, cupys = (words(f, GOOD[function]() | changes) for f in (function, OnCupy(function)))
            assert cupys == numpys
        return len(cuda_device.launches) - launched

    return check


# --- the table --------------------------------------------------------------------------------------------------------


def can_be(case):
    """Whether there are such CuPy arrays, and whether what is wrong with them can be known."""
    _, changes, _, message = case
    return (
        all(a.dtype.char not in "Og" and a.dtype != ml_dtypes.float8_e4m3fn for a in arrays_in(list(changes.values())))
        and not re.search("read-only|weights: expected finite", message)
        and changes.get("gather") is not WRONG_HOOKS["objects"][0]
        and changes.get("activation") is not np.maximum  # taken for a hook by OnCupy
    )


POSSIBLE = {name: case for name, case in TABLE.items() if can_be(case)}


def grouped():
    """Cases by part of the table and function; `out` of statistics apart."""
    groups = defaultdict(list)
    for name, (function, changes, *_) in POSSIBLE.items():
        part = "out" if function in STATISTICS and "out" in changes else name.partition("-")[0]
        groups[f"{part}-{function.__name__}"].append(name)
    return [pytest.param(names, id=group) for group, names in groups.items()]


@pytest.mark.parametrize("names", grouped())
def test_refused(assert_refused_alike, names):
    for name in names:
        function, changes, error, message = TABLE[name]
        with noted(name):
            launches = assert_refused_alike(function, changes, error, message)
            # What a hook returns is seen after this rank's part is computed; `out` is not written all the same.
            assert launches == 0 or callable(changes.get("gather"))


@pytest.mark.parametrize(("function", "name"), ALL_ARRAYS, ids=label)
def test_kinds(assert_refused_alike, function, name):
    for kind, (array, called, instead) in KINDS.items():
        if (function, name, kind) in TAKEN:
            continue
        message = rf"^{name}: expected a numpy\.ndarray or a cupy\.ndarray, got {re.escape(called)}; .*{instead}"
        with noted(kind):
            assert assert_refused_alike(function, {name: array}, TypeError, message) == 0


def test_none_for_a_required_array(assert_refused_alike):
    for function, name in REQUIRED:
        assert assert_refused_alike(function, {name: None}, TypeError, f"^{name}: expected .* got .*(None|object)") == 0


def test_checks_come_before_gather(cuda_device):
    def gather(vector):
        raise AssertionError("other ranks wait")

    launched = len(cuda_device.launches)
    for name in LOCAL.keys() & POSSIBLE.keys():
        function, changes, error, message = TABLE[name]
        arguments = GOOD[function]() | {"gather": gather} | changes
        if function is fastbn.batch_norm_backward:
            arguments["saved"] = saved(gathered=True)
        assert_refused(OnCupy(function), arguments, error, message)
    assert len(cuda_device.launches) == launched


@pytest.mark.parametrize("changes", [c for c in EARLY if "weights" not in c], ids=lambda changes: next(iter(changes)))
def test_checks_come_before_allocation(changes):
    x = np.broadcast_to(np.float32(0), (1 << 22, 3, 1 << 24))
    host_cupy.allocations.clear()
    with pytest.raises((ValueError, TypeError), match=next(iter(changes))):
        OnCupy(fastbn.batch_norm)(x, **changes)
    assert not host_cupy.allocations


# --- single cases -----------------------------------------------------------------------------------------------------


@pytest.fixture
def cupy_only(monkeypatch):
    for module in (refusals, calls):
        monkeypatch.setattr(module, "fastbn", OnCupy())


@pytest.mark.usefixtures("cupy_only")
def test_single_cases(found):
    refusals.test_a_hook_that_raises()
    for shift in (0, 1, 3):
        refusals.test_backward_after_out_overwrote_x(shift)
    refusals.test_backward_after_out_beside_x()
    refusals.test_forward_and_backward_disagree_about_gather()
    refusals.test_numpy_channel_axis()
    refusals.test_numpy_eps()
    refusals.test_numpy_rate()
    refusals.test_numpy_count()
    calls.test_errors_stay_errors(found)


def test_running_statistics_survive_an_error_in_place(assert_refused_alike):
    mean, var = data((3,)), data((3,))
    for changes in ({"rate": 2}, {"moments": batch((4,))}, {"moments": None}, {"out": (mean, data((4,)))}):
        given = {"mean": mean, "var": var, "out": (mean, var)} | changes
        assert_refused_alike(fastbn.update_running, given, (TypeError, ValueError), "expected .* got ")


def test_weights_are_not_looked_at():
    """And so cannot be refused: nothing is brought to the host."""
    weights = np.full((4, 1, 5), -1.0)
    host_cupy.operations.clear()
    for function in (fastbn.batch_norm, fastbn.moments, fastbn.grad_input):
        function(**on_device(GOOD[function]() | {"weights": weights}))
    assert host_cupy.operations["get"] == 0


# --- arrays that do not belong together -------------------------------------------------------------------------------


@pytest.mark.parametrize("odd", ["cupy", "numpy"])
@by_function
def test_mixed_kinds(cuda_device, function, odd):
    """One array of the other kind, whichever it is: the message names an argument and both kinds."""
    launched = len(cuda_device.launches)
    others = "|".join(ARRAYS[function]) + "|moments|saved.x"
    for name in ARRAYS[function]:
        arguments = GOOD[function]()
        mixed = on_device(arguments)
        if odd == "cupy":
            mixed, arguments = arguments | {name: mixed[name]}, arguments
        else:
            mixed[name] = arguments[name]
        outputs = [a.copy() for a in arrays_in(arguments.get("out"))]
        with pytest.raises(TypeError, match=rf"{BOTH}^({others}): expected "):
            function(**mixed)
        for a, before in zip(arrays_in(arguments.get("out")), outputs, strict=True):
            np.testing.assert_array_equal(a, before)
    assert len(cuda_device.launches) == launched


@pytest.mark.parametrize("fields", [Moments._fields, ("mean",), ("m2",)], ids="-".join)
@pytest.mark.parametrize("odd", ["cupy", "numpy"])
def test_mixed_kinds_in_moments(odd, fields):
    ours, theirs = (batch(), on_device(batch())) if odd == "cupy" else (on_device(batch()), batch())
    mixed = ours._replace(**{field: getattr(theirs, field) for field in fields})
    running = (data((3,)), data((3,)))
    running = running if odd == "cupy" else on_device(running)
    for call, name in (
        (lambda: fastbn.update_running(*running, mixed), "(moments|mean)"),
        (lambda: fastbn.merge(ours, mixed), r"moments\[1\]"),
        (lambda: fastbn.population([ours, mixed]), r"moments_of_batches\[1\]"),
    ):
        with pytest.raises(TypeError, match=rf"{BOTH}^{name}.*: expected"):
            call()


@pytest.mark.parametrize("odd", [0, 1])
@by_function
def test_arrays_on_two_devices(cuda_device, function, odd):
    launched = len(cuda_device.launches)
    for name in ARRAYS[function]:
        arguments = GOOD[function]()
        mixed = on_device(arguments, 1 - odd) | {name: on_device(arguments[name], odd)}
        message = rf"^[\w.]+: expected an array on CUDA device {1 - odd}|on CUDA device {odd} like {name}"
        with pytest.raises(ValueError, match=message):
            function(**mixed)
    assert len(cuda_device.launches) == launched


def test_moments_on_two_devices():
    ours, theirs = on_device(batch()), on_device(batch(), 1)
    with pytest.raises(ValueError, match=r"^moments\[1\]\.count: expected an array on CUDA device 0 like moments\[0\]"):
        merge((ours, theirs))
    with pytest.raises(ValueError, match=r"^moments_of_batches\[1\]\.m2: expected an array on CUDA device 0"):
        fastbn.population([ours, ours._replace(m2=theirs.m2)])
    with pytest.raises(ValueError, match=r"^mean: expected an array on CUDA device 1"):
        fastbn.update_running(ours.mean, theirs.m2, theirs)


@pytest.mark.parametrize("wrong", ["numpy", "device"])
def test_a_hook_returns_arrays_of_another_kind(wrong):
    def gather(vector):
        host = host_cupy.to_numpy(vector)[None].copy()
        return host if wrong == "numpy" else host_cupy.to_cupy(host, 1)

    error, message = {
        "numpy": (TypeError, "^gather's result: expected a cupy.ndarray like gather's argument, got a numpy.ndarray"),
        "device": (ValueError, "^gather's result: expected an array on CUDA device 0 like gather's argument"),
    }[wrong]
    arguments = on_device(GOOD[fastbn.batch_norm]())
    before = arguments["out"].copy()
    with pytest.raises(error, match=message):
        fastbn.batch_norm(**arguments | {"gather": gather})
    assert (arguments["out"] == before).all()


def test_out_without_a_place_for_each_element(cuda_device):
    """CuPy's broadcast arrays are writable, unlike NumPy's."""
    out = np.lib.stride_tricks.as_strided(np.zeros((1, 3, 5)), (4, 3, 5), (0, 40, 8))
    with pytest.raises(ValueError, match=r"^out: expected a place for each element, got strides \(0, 40, 8\)"):
        fastbn.batch_norm(on_device(np.ones((4, 3, 5))), out=on_device(out))
    assert not out.any()


@pytest.mark.parametrize("function", [fastbn.batch_norm, fastbn.moments, fastbn.var], ids=label)
@pytest.mark.parametrize("askew", ["address", "strides"])
def test_elements_off_multiples_of_their_size(cuda_device, function, askew):
    """A GPU cannot read them."""
    raw = host_cupy.to_cupy(np.zeros(4 * 5 * 6, np.uint8))
    if askew == "address":
        x = raw[1:81].view(np.float32).reshape(4, 5)
    else:
        x = type(raw)((4, 5), np.float32, raw.data, (30, 6))
    options = {"axis": 0} if function is fastbn.var else {}
    launched = len(cuda_device.launches)
    with pytest.raises(ValueError, match=r"^x: expected elements at multiples of their 4 bytes, got address "):
        function(x, **options)
    if function is fastbn.batch_norm:
        usual = on_device(np.ones((4, 5), np.float32))
        for name in ("out", "residual"):
            with pytest.raises(ValueError, match=f"^{name}: expected elements at multiples"):
                function(usual, **{name: x})
    assert len(cuda_device.launches) == launched
