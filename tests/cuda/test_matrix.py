"""The checks of tests/api/test_matrix.py on CuPy arrays: on a GPU, or executed on the CPU with real plans."""

import itertools

import pytest

from tests.cases import checks, outputs, relu
from tests.cuda.harness import ON_A_DEVICE
from tests.on_cupy import OnGpu
from tests.support import DTYPES, LAYOUTS, OPTIONS, Options, make_case, some_slow

pytestmark = pytest.mark.usefixtures("on_cupy")


@pytest.fixture
def on_cupy(cuda_arrays, monkeypatch):
    monkeypatch.setattr(checks, "fastbn", cuda_arrays)
    monkeypatch.setattr(checks, "SAME_BITS", False)


def by_case(*options, first=0, step=2):
    """Layouts from the first on, with float32 and in turn with another dtype, and options in turn. The rest is slow."""
    cases, others = [], itertools.cycle(dtype for dtype in DTYPES if dtype != "float32")
    for i, layout in enumerate(ON_A_DEVICE):
        chosen = [("float32" if step == 1 or i % 3 else next(others), options[i // step % len(options)])]
        if (i - first) % step:
            chosen = []
        elif step == 1 and i % 5 == 0:
            chosen.append((next(others), options[i % 3]))
        for dtype, name in itertools.product(DTYPES, options):
            marks = [] if (dtype, name) in chosen else [pytest.mark.slow]
            cases.append(pytest.param(layout, dtype, name, marks=marks))
    return pytest.mark.parametrize(("layout", "dtype", "options"), cases)


@by_case(*checks.TRAINING)
def test_moments(layout, dtype, options):
    checks.check_moments(make_case(LAYOUTS[layout], dtype, OPTIONS[options]))


@by_case(*checks.TRAINING, step=1)
def test_training(layout, dtype, options):
    checks.check_backward(make_case(LAYOUTS[layout], dtype, OPTIONS[options]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", some_slow(ON_A_DEVICE, ON_A_DEVICE[::4]))
def test_relu(cuda_arrays, monkeypatch, layout, dtype):
    """Its gradient by x, which is that by y to the bit."""
    monkeypatch.setattr(relu, "fastbn", cuda_arrays)
    for small, weights in ((False, False), (True, False), (False, True)):
        options = Options(affine=True, relu=True, weights=weights, parameter_dtype="float32")
        relu.check_gradient(relu.make_relu_case(LAYOUTS[layout], dtype, options, small=small))


@by_case("affine residual relu", "plain", first=1)
def test_frozen(layout, dtype, options):
    checks.check_frozen(make_case(LAYOUTS[layout], dtype, OPTIONS[options]))


@by_case("plain", "where")
def test_parts(layout, dtype, options):
    checks.check_parts(make_case(LAYOUTS[layout], dtype, OPTIONS[options]))


@by_case("plain", "where", first=1)
def test_statistics(layout, dtype, options):
    checks.check_statistics(make_case(LAYOUTS[layout], dtype, OPTIONS[options]))


def test_the_way_to_a_gpu_and_back(cuda_device, monkeypatch):
    """What tests on a GPU do with arrays, done here."""
    for module in (checks, outputs):
        monkeypatch.setattr(module, "fastbn", OnGpu())
    for layout in ("NCHW", "NHWC as NCHW", "channel slice", "reversed rows", "instance NHWC"):
        checks.check_backward(make_case(LAYOUTS[layout], "float32", OPTIONS["affine residual relu"]))
    outputs.test_out("NCHW", "spatial slice")
    outputs.test_out_is_an_input("NHWC")
    outputs.test_out_partly_overlaps(3, True)
