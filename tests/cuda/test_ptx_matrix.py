"""The matrix by what NVRTC compiles, for compute capability 8.0 and 9.0: a part of it, and all as slow tests."""

import itertools

import numpy as np
import pytest

import fastbn
from tests import cuda_variants
from tests.cases import checks
from tests.conftest import missing
from tests.cuda import running
from tests.cuda.harness import ON_A_DEVICE
from tests.cuda.runs import RUNS
from tests.on_cupy import OnCupy
from tests.ptx import cuda, forms, handwritten, mutations
from tests.simt import host_cupy
from tests.support import DTYPES, LAYOUTS, OPTIONS, Layout, make_case

pytest.importorskip("cupy")

from fastbn.cuda import plans

slow = pytest.mark.slow


@pytest.fixture(scope="module")
def cuda_device(request):
    """In the place of kernels that g++ compiles: all that asks for a device runs PTX of this compute capability."""
    reason = cuda.available()
    if reason is not None:
        missing(request, reason)
    with cuda.installed(request.param) as driver:
        yield driver


@pytest.fixture
def on_cupy(cuda_device, monkeypatch):
    monkeypatch.setattr(checks, "fastbn", OnCupy())
    monkeypatch.setattr(checks, "SAME_BITS", False)


by_architecture = pytest.mark.parametrize("cuda_device", cuda.ARCHITECTURES, ids="sm_{}".format, indirect=True)


def part(options, *chosen):
    """Every compute capability, layout, dtype and choice of options; all but the chosen ones are slow."""
    cases = []
    for case in itertools.product(cuda.ARCHITECTURES, ON_A_DEVICE, DTYPES, options):
        name = "sm_{}-{}-{}-{}".format(*case)
        cases.append(pytest.param(*case, marks=[] if case in chosen else [slow], id=name))
    return pytest.mark.parametrize(("cuda_device", "layout", "dtype", "options"), cases, indirect=["cuda_device"])


# Contiguous along the row, along channels, across rows.
CHOSEN = FIRST, LAST, SHORT = "NCHW", "NHWC", "NCHW short rows"


@pytest.mark.usefixtures("on_cupy")
class TestMatrix:
    @part(
        checks.TRAINING,
        (80, FIRST, "float32", "affine residual relu"),
        (90, LAST, "float32", "plain"),
        (80, LAST, "float16", "weights relu"),
        (90, SHORT, "float16", "affine residual relu"),
        (80, SHORT, "bfloat16", "plain"),
        (90, FIRST, "bfloat16", "where"),
        (80, LAST, "float64", "where weights residual"),
        (90, FIRST, "float64", "plain"),
    )
    def test_training(self, layout, dtype, options):
        checks.check_backward(make_case(LAYOUTS[layout], dtype, OPTIONS[options]))

    @part(
        ("affine residual relu", "plain"),
        (80, LAST, "bfloat16", "affine residual relu"),
        (90, SHORT, "float32", "plain"),
    )
    def test_frozen(self, layout, dtype, options):
        checks.check_frozen(make_case(LAYOUTS[layout], dtype, OPTIONS[options]))

    @part(("plain", "where"), (80, SHORT, "bfloat16", "plain"), (90, LAST, "float32", "where"))
    def test_parts(self, layout, dtype, options):
        checks.check_parts(make_case(LAYOUTS[layout], dtype, OPTIONS[options]))

    @part(("plain", "where"), (80, FIRST, "float64", "plain"), (90, LAST, "float16", "where"))
    def test_moments(self, layout, dtype, options):
        checks.check_moments(make_case(LAYOUTS[layout], dtype, OPTIONS[options]))

    @part(("plain", "where"), (80, LAST, "float32", "where"), (90, FIRST, "float16", "plain"))
    def test_statistics(self, layout, dtype, options):
        checks.check_statistics(make_case(LAYOUTS[layout], dtype, OPTIONS[options]))

    @by_architecture
    def test_running_statistics(self, cuda_device):
        running.check_bits(OnCupy(), "float64", "float32")
        running.check_bits(OnCupy(), "bfloat16", "float16", "float32")
        running.check_rounding(OnCupy())


# --- ways through the kernels -----------------------------------------------------------------------------------------

EACH_WAY = {
    "forward, cluster": 90,
    "backward, cooperative": 80,
    "backward, two passes": 90,
    "frozen, runs": 80,
    "relu, block, rows": 90,
    "relu, two passes": 80,
}


def by_run():
    cases = []
    for architecture, name in itertools.product(cuda.ARCHITECTURES, RUNS):
        if RUNS[name].strategy == "cluster" and architecture < 90:
            continue
        marks = [] if EACH_WAY.get(name) == architecture else [slow]
        cases.append(pytest.param(architecture, name, marks=marks, id=f"sm_{architecture}-{name}"))
    return pytest.mark.parametrize(("architecture", "name"), cases)


@by_run()
def test_each_way(request, architecture, name):
    """All that plans choose between, with blocks together, one by one, from the last, and in an order at random."""
    if (reason := cuda.available()) is not None:
        missing(request, reason)
    run = RUNS[name]
    with cuda.installed(architecture, **mutations.settings_of(run)) as driver:
        for schedule in range(4):
            run(driver, schedule)


@pytest.mark.parametrize("layout", ["NHWC", *(pytest.param(name, marks=slow) for name in CHOSEN if name != "NHWC")])
@pytest.mark.parametrize("architecture", [80, pytest.param(90, marks=slow)], ids="sm_{}".format)
def test_the_plans_of_a_whole_device(request, monkeypatch, architecture, layout):
    """With fastbn's own tuning, which no other test here has, and all of the device's shared memory."""
    if (reason := cuda.available()) is not None:
        missing(request, reason)
    monkeypatch.setattr(checks, "fastbn", OnCupy())
    monkeypatch.setattr(checks, "SAME_BITS", False)
    shared = {80: 163 << 10, 90: 227 << 10}[architecture]
    with cuda.installed(architecture, {80: 108, 90: 132}[architecture], shared, {}, 32) as driver:
        checks.check_backward(make_case(LAYOUTS[layout], "float32", OPTIONS["affine residual relu"]))
        assert {step.kernel for step in driver.launches} == {"forward", "backward"}


SMALL = {"finish_sums": 80, "strided_statistics": 80, "update_running": 90}


@pytest.mark.parametrize(("architecture", "kernel"), [(n, kernel) for kernel, n in SMALL.items()])
def test_every_instruction_of_some_variants_is_known(request, architecture, kernel):
    """Of those that run and those that need other data."""
    if (reason := cuda.available()) is not None:
        missing(request, reason)
    variant = next(v for v in cuda_variants.chosen(architecture, full=False) if v.kernel == kernel)
    names, unknown = forms.count(forms.text_of(variant, architecture))
    assert names["ld.param.u64"] > 1
    assert unknown == []


@slow
@pytest.mark.parametrize("architecture", cuda.ARCHITECTURES, ids="sm_{}".format)
def test_every_instruction_is_known(request, capsys, architecture):
    """Of all that is compiled for a compute capability: the command prints it."""
    if (reason := cuda.available()) is not None:
        missing(request, reason)
    assert forms.main(["--arch", str(architecture), "--full"]) == 0
    assert "strided_statistics" in capsys.readouterr().out


def test_what_is_not_known_is_counted():
    text = handwritten.text("add.s32 %r1, %r1, %r1; sin.approx.f32 %f1, %f1;")
    names, unknown = forms.count(text)
    assert names["add.s32"] == names["sin.approx.f32"] == 1
    assert [message.partition(": ")[2] for message in unknown] == [
        "sin.approx.f32 %f1, %f1: this instruction is not known"
    ]


@pytest.mark.usefixtures("on_cupy")
class TestBits:
    @pytest.mark.parametrize(
        ("cuda_device", "strategy"), [(80, "cooperative"), (90, "two passes")], indirect=["cuda_device"]
    )
    def test_are_the_same_whichever_block_comes_first(self, cuda_device, monkeypatch, strategy):
        monkeypatch.setitem(plans.FORCED, "strategy", strategy)
        case, found = make_case(Layout((151, 20)), "float32"), []
        try:
            for schedule in range(3):
                cuda_device.schedule = schedule
                y, saved = OnCupy().batch_norm(case.x, **case.keywords)
                found.append((y.tobytes(), OnCupy().batch_norm_backward(case.dy, saved).x.tobytes()))
        finally:
            cuda_device.schedule = 0
        assert max(step.grid for step in cuda_device.launches) > 1
        assert len(set(found)) == 1

    @by_architecture
    def test_subnormal_numbers_are_zeros(self, cuda_device):
        """As docs/gpu.md says of float32, whose kernels CuPy compiles so."""
        x = np.float32([[1e-40, -1e-39, 1.5]]).repeat(4, 0)
        ones = np.ones(3)
        y = OnCupy().batch_norm_inference(x, np.zeros(3), ones, eps=0.0, channel_axis=1)
        assert y[0].tolist() == [0, 0, 1.5]

    @by_architecture
    @pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
    def test_halves_are_rounded_to_nearest(self, dtype):
        assert rounded_to_nearest(dtype)


def rounded_to_nearest(dtype):
    """Whether results are the halves nearest to the formula's, but where float32 cannot decide."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((50, 8)).astype(DTYPES[dtype])
    gamma = rng.uniform(0.5, 2, 8)
    y = OnCupy().batch_norm_inference(x, np.zeros(8), np.ones(8), gamma, eps=0.0, channel_axis=1)
    exact = x.astype(float) * gamma
    step = np.spacing(np.abs(y)) if dtype == "float16" else np.abs(y.astype(float)) * 2.0**-7
    return bool((np.abs(y.astype(float) - exact) <= 0.501 * step.astype(float)).all())


def test_these_checks_notice_what_they_are_for(request):
    """Instructions that keep subnormal numbers, and conversions that cut off."""
    if (reason := cuda.available()) is not None:
        missing(request, reason)
    x = np.float32([[1e-40, -1e-39, 1.5]]).repeat(4, 0)
    with cuda.installed(90, change=lambda _, ptx: ptx.replace(".ftz.f32", ".f32").replace(".ftz.f64.f32", ".f64.f32")):
        y = OnCupy().batch_norm_inference(x, np.zeros(3), np.ones(3), eps=0.0, channel_axis=1)
        assert y[0, 0] != 0
    for dtype, name in (("float16", "f16"), ("bfloat16", "bf16")):
        with cuda.installed(90, change=lambda _, ptx, n=name: ptx.replace(f"cvt.rn.{n}.f32", f"cvt.rz.{n}.f32")):
            assert not rounded_to_nearest(dtype)


def test_on_cupy_arrays_as_users_have_them(request):
    """The public functions, without the way of the other tests to CuPy arrays and back."""
    if (reason := cuda.available()) is not None:
        missing(request, reason)
    x = np.random.default_rng(0).standard_normal((6, 5, 7)).astype(np.float32)
    with cuda.installed(80) as driver:
        mean, var = fastbn.mean_var(host_cupy.to_cupy(x), axis=(0, 2))
        nan = host_cupy.to_numpy(fastbn.nanmean(host_cupy.to_cupy(np.where(x > 1, np.nan, x)), axis=(0, 2)))
        weighted = host_cupy.to_numpy(fastbn.average(host_cupy.to_cupy(x), (0, 2), host_cupy.to_cupy(np.abs(x))))
        mean, var = map(host_cupy.to_numpy, (mean, var))
        assert {step.kernel for step in driver.launches} == {"strided_statistics", "statistics"}
    np.testing.assert_allclose(mean, x.mean((0, 2), dtype=float), atol=1e-6)
    np.testing.assert_allclose(var, x.var((0, 2), dtype=float), rtol=1e-5)
    np.testing.assert_allclose(weighted, np.average(x.astype(float), (0, 2), np.abs(x)), atol=1e-6)
    np.testing.assert_allclose(nan, np.nanmean(np.where(x > 1, np.nan, x.astype(float)), (0, 2)), atol=1e-6)
