"""Tests written for NumPy arrays, on CuPy arrays: bounds, properties, outputs, prepared calls.

Left out is what CuPy arrays cannot be: read-only, unaligned, of another byte order. Bits are the same for one plan, not
for every alignment and layout of an output: on a GPU these decide how wide loads are, and so in which order sums run.
"""

import types

import numpy as np
import pytest

import fastbn
from fastbn.check import NIST
from tests.cases import calls as prepared
from tests.cases import checks, numerics, outputs, properties
from tests.cases.properties import RANKS
from tests.cuda.harness import ON_A_DEVICE, by_call, calls, slow
from tests.simt import host_cupy
from tests.support import DTYPES, LAYOUTS, OPTIONS

pytestmark = pytest.mark.usefixtures("on_cupy")


@pytest.fixture
def on_cupy(cuda_arrays, monkeypatch):
    for module in (checks, outputs, numerics, properties, prepared):
        monkeypatch.setattr(module, "fastbn", cuda_arrays)
    monkeypatch.setattr(checks, "SAME_BITS", False)


# --- bounds -----------------------------------------------------------------------------------------------------------

MEANS, SHAPES = numerics.test_statistics_at_large_means, [*numerics.SHAPES]
CONSTANT = numerics.test_a_constant_channel_gives_beta


@by_call(
    calls(numerics.test_nist, name=["NumAcc3", "NumAcc4"], view=["rows", "columns"]),
    calls(numerics.test_nist, slow, name=[*NIST], view=["rows", "columns"]),
    calls(numerics.test_nist_merged, name=["NumAcc3", "NumAcc4"], parts=[7]),
    calls(numerics.test_nist_merged, slow, name=[*NIST], parts=[2, 3, 4, 5, 10, 13, 100]),
    calls(MEANS, dtype=["float32"], ratio=[5e4], shape=SHAPES),
    calls(MEANS, dtype=["bfloat16"], ratio=[5e4], shape=["wide columns"]),
    calls(MEANS, slow, dtype=[*DTYPES], ratio=[0, 1, 100, 1e4, 5e4], shape=SHAPES),
    calls(
        numerics.test_statistics_of_data_that_drift,
        drift=["ramp", "step", "outlier first", "sorted"], shape=SHAPES,
    ),
    calls(numerics.test_the_case_that_numpy_and_torch_lose, slow, axis=[(0, 1, 2), (0, 2, 3)]),
    calls(CONSTANT, dtype=["float32"], shape=[(5, 3, 7, 11), (33, 19)], constant=[0.1]),
    calls(CONSTANT, slow, dtype=[*DTYPES], shape=[(33, 19), (3, 2, 41, 53)], constant=[0.1, -3e4, 1e-3, 1.0]),
    calls(numerics.test_normalising_at_a_large_mean),
    calls(numerics.test_more_channels_in_a_row_than_a_tile),
    calls(numerics.test_empty_batch, shape=[(0, 3), (0, 3, 5, 5), (4, 3, 0, 5), (0, 0), (4, 0, 5)]),
    calls(numerics.test_nothing_selected, shape=[(3, 4, 2)], dtype=[np.float32]),
    calls(numerics.test_nothing_selected, slow, shape=[(3, 4, 2), (5, 4)], dtype=[np.float64]),
    calls(numerics.test_one_value_per_channel),
    calls(numerics.test_merging_nothing_is_the_identity),
    calls(numerics.test_running_statistics_rules),
)  # fmt: skip
def test_numbers(call):
    call()


# --- what holds for any data ------------------------------------------------------------------------------------------

ROUND_TRIP, GATHER = properties.test_saved_round_trip, properties.test_gather
MASKED, STATISTICS = (
    properties.test_masked_nonfinite_values_are_not_seen, properties.test_gradients_of_the_statistics
)  # fmt: skip


@by_call(
    calls(properties.test_moments_of_arbitrary_numbers, slow),
    calls(properties.test_shift_and_scale, slow),
    calls(properties.test_permuting_the_batch, slow),
    calls(properties.test_permuting_the_channels_to_rounding, slow),
    calls(properties.test_split_and_merge_equals_whole, slow),
    calls(properties.test_weights_are_frequencies, slow),
    calls(properties.test_nonfinite_values_stay_in_their_channel, slow),
    calls(MASKED, shape=[(6, 4, 5), (6, 3, 1)], bad=[np.nan, np.inf]),
    calls(MASKED, slow, shape=[(6, 5, 40)], bad=[np.nan, np.inf]),
    calls(properties.test_nan_passes_through_relu, activation=["relu"]),
    calls(ROUND_TRIP, layout=["NCHW"], options=["affine residual relu", "where weights residual"]),
    calls(ROUND_TRIP, slow, layout=["NCHW", "NHWC", "instance NHWC", "NC"], options=[*OPTIONS]),
    calls(properties.test_saved_frozen_round_trip),
    calls(STATISTICS, layout=["NCHW"], options=["plain", "where weights residual"]),
    calls(
        STATISTICS, slow, layout=["NCHW", "NHWC", "instance NCHW", "NCHW long rows"],
        options=["plain", "affine residual relu", "where weights residual"],
    ),
    calls(GATHER, ranks=["one empty"], layout=["NCHW"], options=["where weights residual"]),
    calls(GATHER, ranks=["first empty"], layout=["NHWC"], options=["affine residual relu"]),
    calls(
        GATHER, slow, ranks=[*RANKS], layout=["NCHW", "NHWC"],
        options=["plain", "affine residual relu", "where weights residual"],
    ),
)  # fmt: skip
def test_properties_hold(call):
    call()


# --- outputs ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def nearly(on_cupy, monkeypatch):
    """Where tests/cases/outputs.py wants the same bits, a few roundings are well."""

    def assert_near(a, b, message=""):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5, err_msg=message)

    near = types.SimpleNamespace(**vars(np) | {"testing": types.SimpleNamespace(assert_array_equal=assert_near)})
    monkeypatch.setattr(outputs, "np", near)


WRITABLE = [name for name in ON_A_DEVICE if LAYOUTS[name].writable]


def anywhere(shape, axis, offset):
    """Which changes memory of the CPU's kernels too."""
    with pytest.MonkeyPatch.context() as patch:
        outputs.test_out_anywhere_in_memory(patch, None, shape, axis, offset)


@by_call(
    calls(outputs.test_out, layout=["NCHW"], out_layout=["same", "C", "Fortran", "spatial slice"]),
    calls(outputs.test_out, layout=["spatial slice", "alternating"], out_layout=["same", "C"]),
    calls(outputs.test_out, slow, layout=WRITABLE, out_layout=["same", "C", "Fortran", "spatial slice"]),
    calls(anywhere, shape=[(3, 50, 4, 4)], axis=[1], offset=[0, 1, 5]),
    calls(anywhere, slow, shape=[(9, 13, 7, 7), (2, 5, 33, 31)], axis=[1], offset=[0, 1, 4, 5, 15]),
    calls(anywhere, slow, shape=[(7, 9, 96), (40, 3)], axis=[-1], offset=[0, 1, 4, 15]),
)
def test_outputs(nearly, call):
    call()


@by_call(
    calls(outputs.test_out_is_an_input, layout=["NCHW", "spatial slice", "alternating", "NC"]),
    calls(outputs.test_out_is_an_input, slow, layout=["NHWC", "instance Fortran"]),
    calls(outputs.test_out_partly_overlaps, shift=[1, 3, 35, 210], forwards=[True, False]),
    calls(outputs.test_interleaved_out_is_not_an_overlap),
    calls(outputs.test_parameters_overlap_out),
    calls(outputs.test_inputs_in_other_orders, layout=["NCHW", "spatial slice"], other=["C", "F"]),
    calls(outputs.test_inputs_in_other_orders, slow, layout=["NHWC"], other=["C", "F"]),
)
def test_outputs_bit_for_bit(call):
    call()


# --- prepared calls ---------------------------------------------------------------------------------------------------

SAME = prepared.test_same_bits


@by_call(
    calls(SAME, layout=["NCHW"], options=["plain", "affine residual relu"], out=[False, True]),
    calls(SAME, layout=["NC", "NHWC as NCHW"], options=["plain"], out=[False, True]),
    calls(
        SAME, slow, layout=["NC", "NHWC", "NHWC as NCHW", "NCHW short rows"],
        options=["plain", "affine residual relu"], out=[False, True],
    ),
    calls(prepared.test_other_dtypes, dtype=["float64"]),
    calls(prepared.test_other_dtypes, slow, dtype=["float16"]),
    calls(
        prepared.test_every_call_is_prepared, layout=["instance NCHW", "spatial slice"],
        options=["where weights residual"],
    ),
    calls(prepared.test_in_place_forward_has_no_backward_however_often),
    calls(
        prepared.test_out_of_a_later_call_overlaps_an_input,
        **{"function,over": [("forward", "x"), ("backward", "x"), ("backward", "dy")]},
    ),
    calls(prepared.test_inference_without_eps),
    calls(prepared.test_a_gathered_forward_is_another_call),
    calls(
        prepared.test_every_argument_counts, function=["batch_norm", "batch_norm_inference"],
        change=["eps", "activation", "out"],
    ),
    calls(
        prepared.test_every_argument_counts, slow, function=["batch_norm", "batch_norm_inference"],
        change=[name for name in prepared.CHANGES if name not in ("eps", "activation", "out")],
    ),
)  # fmt: skip
def test_prepared_calls(found, call):
    call(found)


def test_arrays_of_a_later_call_are_looked_at(found, cuda_arrays):
    """Same key, but other alignment or overlapping arrays."""
    x = np.random.default_rng(0).standard_normal((4, 6, 8, 11)).astype(np.float32)
    mean, var = np.zeros(6), np.ones(6)
    expected = cuda_arrays.batch_norm_inference(x, mean, var)
    buffer = np.empty(x.size + 1, np.float32)
    askew = buffer[1:].reshape(x.shape)
    askew[...] = x
    np.testing.assert_allclose(cuda_arrays.batch_norm_inference(askew, mean, var), expected, rtol=1e-6)
    assert not found
    for _ in range(2):
        np.testing.assert_array_equal(cuda_arrays.batch_norm_inference(x, mean, var), expected)
    assert len(found) == 2
    cuda_arrays.batch_norm_inference(x, mean, var, out=np.empty_like(x))
    both = np.zeros((5, *x.shape[1:]), np.float32)
    both[:4] = x
    np.testing.assert_array_equal(cuda_arrays.batch_norm_inference(both[:4], mean, var, out=both[1:]), expected)
    mine = x.copy()
    assert cuda_arrays.batch_norm_inference(mine, mean, var, out=mine) is mine
    np.testing.assert_array_equal(mine, expected)
    spread = np.zeros(12)
    spread[::2] = var
    np.testing.assert_array_equal(cuda_arrays.batch_norm_inference(x, mean, spread[::2]), expected)


def test_numbers_of_a_later_saved_are_looked_at(cuda_arrays):
    """They may have become others since, of another dtype or one for all channels."""
    x, dy = np.random.default_rng(0).standard_normal((2, 7, 4)).astype(np.float32)
    _, saved = cuda_arrays.batch_norm(x)
    cuda_arrays.batch_norm_backward(dy, saved)
    for name in ("rstd", "count"):
        one = saved._replace(**{name: getattr(saved, name)[:1].copy()})
        every = saved._replace(**{name: np.repeat(getattr(one, name), 4)})
        ours, theirs = (cuda_arrays.batch_norm_backward(dy, s) for s in (one, every))
        np.testing.assert_array_equal(ours.x, theirs.x)
    halves = [saved._replace(rstd=saved.rstd.astype(DTYPES[name])) for name in ("float16", "bfloat16")]
    for half in (*halves, halves[0]):
        grads = cuda_arrays.batch_norm_backward(dy, half)
        np.testing.assert_allclose(grads.gamma / cuda_arrays.batch_norm_backward(dy, saved).gamma, 1, rtol=0.01)


@pytest.mark.parametrize("name", ["mean", "rstd", "count"])
def test_numbers_of_other_dtypes_are_taken_again(cuda_device, name):
    """In a `Saved` made by hand: integers are cast."""
    x = host_cupy.to_cupy(np.arange(24.0).reshape(4, 6))
    _, saved = fastbn.batch_norm(x)
    whole, real = (saved._replace(**{name: host_cupy.to_cupy(np.full(6, 4, dtype))}) for dtype in (int, float))
    expected = fastbn.batch_norm_backward(x, real)
    for _ in range(3):
        for a, b in zip(fastbn.batch_norm_backward(x, whole)[:3], expected[:3], strict=True):
            np.testing.assert_array_equal(host_cupy.to_numpy(a), host_cupy.to_numpy(b))


def test_y_of_another_dtype_is_refused(cuda_device):
    """Its bytes would be read as if they were x's."""
    x = host_cupy.to_cupy(np.arange(24.0).reshape(4, 6))
    y, saved = fastbn.batch_norm(x, activation="relu")
    with pytest.raises(ValueError, match=r"^saved\.y: expected saved\.x's shape"):
        fastbn.batch_norm_backward(x, saved._replace(y=y.astype(np.float32)))


def test_memory_of_programs_without_repetition_is_flat(monkeypatch):
    prepared.test_programs_without_repetition_keep_memory_flat(monkeypatch)
