"""The checks of tests/api/test_matrix.py on CuPy arrays: on a GPU, or executed on the CPU with real plans."""

import itertools

import pytest

from tests.cases import checks, outputs
from tests.cuda.harness import ON_A_DEVICE
from tests.on_cupy import OnGpu
from tests.support import DTYPES, LAYOUTS, OPTIONS, make_case

pytestmark = pytest.mark.usefixtures("on_cupy")


@pytest.fixture
def on_cupy(cuda_arrays, monkeypatch):
    monkeypatch.setattr(checks, "fastbn", cuda_arrays)
    monkeypatch.setattr(checks, "SAME_BITS", False)


def by_case(*options, others=True):
    """Every layout with float32 and, for some, one other dtype, all in turn; the rest is slow: compilation."""
    cases = []
    for i, layout in enumerate(ON_A_DEVICE):
        other = [dtype for dtype in DTYPES if dtype != "float32"][i % 3]
        chosen = [("float32", options[i % len(options)])]
        if others:
            chosen.append((other, options[(i // 3) % len(options)]))
        for dtype, name in itertools.product(DTYPES, options):
            marks = [] if (dtype, name) in chosen else [pytest.mark.slow]
            cases.append(pytest.param(layout, dtype, name, marks=marks))
    return pytest.mark.parametrize(("layout", "dtype", "options"), cases)


@by_case(*checks.TRAINING, others=False)
def test_moments(layout, dtype, options):
    checks.check_moments(make_case(LAYOUTS[layout], dtype, OPTIONS[options]))


@by_case(*checks.TRAINING)
def test_training(layout, dtype, options):
    checks.check_backward(make_case(LAYOUTS[layout], dtype, OPTIONS[options]))


@by_case("affine residual relu", "plain")
def test_frozen(layout, dtype, options):
    checks.check_frozen(make_case(LAYOUTS[layout], dtype, OPTIONS[options]))


@by_case("plain", "where", others=False)
def test_parts(layout, dtype, options):
    checks.check_parts(make_case(LAYOUTS[layout], dtype, OPTIONS[options]))


@by_case("plain", "where", others=False)
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
