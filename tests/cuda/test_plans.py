"""Plans of CUDA kernels decide speed, never results: every strategy, tuning and order of threads."""

import itertools

import numpy as np
import pytest

import fastbn
from fastbn.cuda import geometry, launch, plans, problems
from tests.cases import checks
from tests.on_cupy import OnCupy
from tests.simt import cuda, host_cupy, simt
from tests.support import LAYOUTS, OPTIONS, Layout, make_case

ROWS = Layout((3, 3, 9, 60))  # a channel has 405 vectors
ODD_ROWS = Layout((5, 3, 7, 11))  # 385, of one element
COLUMNS = Layout((91, 20))  # tiles of four lanes, of which the last has one
WITHOUT_WORK = Layout((1, 3, 1))  # one vector, less than there are blocks for it

LITTLE = {
    "threads": 32, "items_per_thread": 2, "along_channels": 64, "cluster": 4, "shared_share": 1.0, "waves": 1,
    "passes": 2, "split_bytes": 1,
}  # fmt: skip
RUNS = Layout((13, 8, 5, 5))  # vectors run from one row into the next
SHAPES = {"rows": ROWS, "columns": COLUMNS, "runs": RUNS}
SCHEDULES = (0, 1, 2, 7)

pytestmark = pytest.mark.usefixtures("on_cupy")


@pytest.fixture
def on_cupy(cuda_device, monkeypatch):
    monkeypatch.setattr(checks, "fastbn", OnCupy())
    monkeypatch.setattr(checks, "SAME_BITS", False)
    monkeypatch.setitem(problems.TUNING, cuda.ARCHITECTURE, problems.Tuning(**LITTLE))
    cuda.forget()
    yield
    monkeypatch.undo()  # before plans are made for others
    cuda.forget()


@pytest.fixture
def planned(monkeypatch):
    """Splits, and vectors to be split, of every launch that is planned."""
    found, plan = [], plans._launch

    def noted(work, *args, splits, **options):
        found.append((splits, work.geometry.vectors))
        return plan(work, *args, splits=splits, **options)

    monkeypatch.setattr(plans, "_launch", noted)
    return found


def results(case):
    """Of a training step, as bytes."""
    on_cupy = OnCupy(fastbn)
    y, saved = on_cupy.batch_norm(case.x, case.gamma, case.beta, **case.keywords, **case.epilogue)
    grads = on_cupy.batch_norm_backward(case.dy, saved)
    arrays = (y, *saved.moments, saved.rstd, *grads)
    return [a.tobytes() for a in arrays if a is not None]


def strategies(launches):
    """What the launches of a training step tell of their plans."""
    found = set()
    for step in launches:
        if step.cooperative:
            found.add("cooperative")
        elif step.macros["CLUSTER"] > 1:
            found.add("cluster")
        else:
            found.add("block" if step.kernel in ("forward", "backward") else "two passes")
    return found


# --- strategies -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("strategy", plans.STRATEGIES)
def test_bits_do_not_depend_on_the_order_of_threads(cuda_device, monkeypatch, planned, strategy, shape):
    monkeypatch.setitem(plans.FORCED, "strategy", strategy)
    case = make_case(SHAPES[shape], "float32", OPTIONS["affine residual relu"])
    cuda_device.launches.clear()
    checks.check_backward(case)
    assert strategies(cuda_device.launches) == {strategy}
    assert strategy == "block" or any(splits > 1 and vectors % splits for splits, vectors in planned)
    expected = results(case)
    for schedule in (*SCHEDULES, SCHEDULES[0]):
        monkeypatch.setattr(cuda_device, "schedule", schedule)
        assert results(case) == expected, f"schedule {schedule}"


@pytest.mark.parametrize("strategy", plans.STRATEGIES)
def test_more_blocks_than_work(cuda_device, monkeypatch, strategy):
    monkeypatch.setitem(plans.FORCED, "strategy", strategy)
    cuda_device.launches.clear()
    checks.check_backward(make_case(WITHOUT_WORK, "float32"))
    assert strategies(cuda_device.launches) == {strategy}


@pytest.mark.parametrize(
    ("layout", "options"),
    [
        (ODD_ROWS, "where weights residual"),
        pytest.param(COLUMNS, "where weights residual", marks=pytest.mark.slow),
        pytest.param(ODD_ROWS, "weights relu", marks=pytest.mark.slow),
        pytest.param(COLUMNS, "plain", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("strategy", plans.STRATEGIES)
def test_strategies_of_other_options(monkeypatch, strategy, layout, options):
    monkeypatch.setitem(plans.FORCED, "strategy", strategy)
    checks.check_backward(make_case(layout, "float32", OPTIONS[options]))


def test_sizes_choose_strategies(cuda_device, monkeypatch):
    monkeypatch.setitem(problems.TUNING, cuda.ARCHITECTURE, problems.Tuning(**LITTLE | {"cluster": 2}))
    chosen = []
    for shape in ((2, 1, 4, 8), (5, 1, 20, 20), (24, 1, 20, 20), (80, 1, 20, 20)):
        cuda_device.launches.clear()
        OnCupy(fastbn.batch_norm)(make_case(Layout(shape), "float32").x)
        chosen.append(strategies(cuda_device.launches))
    assert chosen == [{strategy} for strategy in plans.STRATEGIES]


@pytest.mark.parametrize(("blocks", "strategy"), [(0, "two passes"), (1, "cooperative"), (2, "cooperative")])
def test_groups_are_on_the_device_at_once(cuda_device, monkeypatch, blocks, strategy):
    """As many blocks as the compiled kernel has room for; where one group has none, in two passes."""
    monkeypatch.setattr(launch, "blocks_per_processor", lambda *_: blocks)
    monkeypatch.setitem(problems.TUNING, cuda.ARCHITECTURE, problems.Tuning(**LITTLE | {"waves": 9}))
    monkeypatch.setitem(plans.FORCED, "strategy", "cooperative")
    cuda_device.launches.clear()
    checks.check_backward(make_case(ROWS, "float32"))
    assert strategies(cuda_device.launches) == {strategy}
    assert all(step.grid <= 3 * blocks for step in cuda_device.launches if step.cooperative)


@pytest.mark.parametrize(("blocks", "most"), [(0, 1), (1, 2), (2, 4)])
def test_clusters_are_on_the_device_at_once(cuda_device, monkeypatch, blocks, most):
    monkeypatch.setattr(launch, "blocks_per_processor", lambda *_: blocks)
    cuda_device.launches.clear()
    OnCupy(fastbn.batch_norm)(make_case(Layout((5, 1, 20, 20)), "float32").x)
    assert max(step.macros["CLUSTER"] for step in cuda_device.launches) == most


def test_devices_have_plans_of_their_own(cuda_device, monkeypatch):
    """One call on arrays of two devices, of other sizes."""
    monkeypatch.setattr(launch, "device", lambda number: launch.Device(number, cuda.ARCHITECTURE, 2 + number, 16 << 10))
    monkeypatch.setitem(plans.FORCED, "strategy", "cooperative")
    case = make_case(ROWS, "float32")
    grids = []
    for device in (0, 1, 0, 1):
        cuda_device.launches.clear()
        fastbn.batch_norm(host_cupy.to_cupy(case.x, device))
        grids += [step.grid for step in cuda_device.launches]
    assert grids == [3, 6, 3, 6]


@pytest.mark.parametrize("kernel", ["forward", "backward", "statistics", "normalize"])
def test_grids_of_another_size_trap(cuda_device, monkeypatch, kernel):
    """As where a library leaves out blocks that a device has no room for."""
    function = launch.function

    def smaller(number, name, macros):
        compiled = function(number, name, macros)

        def run(grid, *arguments, **options):
            compiled((grid[0] - (name == kernel), 1, 1), *arguments, **options)

        return run

    monkeypatch.setattr(launch, "function", smaller)
    monkeypatch.setitem(
        plans.FORCED, "strategy", "two passes" if kernel in ("statistics", "normalize") else "cooperative"
    )
    case = make_case(COLUMNS, "float32")
    with pytest.raises(simt.SimtError, match=f"{kernel}: block \\d+, thread \\d+ trapped"):
        checks.check_backward(case)


# --- numbers that tune ------------------------------------------------------------------------------------------------


TUNINGS = {
    "narrow": {"threads": 32, "items_per_thread": 1, "cluster": 1},
    "middling": {"threads": 128, "items_per_thread": 4, "along_channels": 128, "waves": 2},
    "wide": {"threads": 256, "items_per_thread": 8, "along_channels": 32, "shared_share": 0.1, "passes": 8},
    "long": {"threads": 32, "items_per_thread": 8, "cluster": 8},
    "short": {"threads": 256, "items_per_thread": 1, "along_channels": 16},
    "as for users": {},
}
OFTEN = (("narrow", "rows"), ("middling", "columns"), ("wide", "rows"), ("middling", "runs"))


@pytest.mark.parametrize(
    ("tuning", "shape"),
    [
        pytest.param(*pair, marks=[] if pair in OFTEN else [pytest.mark.slow])
        for pair in itertools.product(TUNINGS, SHAPES)
    ],
)
def test_tunings(cuda_device, monkeypatch, tuning, shape):
    chosen = TUNINGS[tuning]
    base = LITTLE if chosen else {"cluster": 8}
    monkeypatch.setitem(problems.TUNING, cuda.ARCHITECTURE, problems.Tuning(**base | chosen))
    cuda_device.launches.clear()
    checks.check_backward(make_case(SHAPES[shape], "float32", OPTIONS["affine residual relu"]))
    items = chosen.get("items_per_thread", 8)
    halved = any(step.macros.get("RUN") for step in cuda_device.launches)  # beside a residual
    assert max(step.macros["ITEMS_PER_THREAD"] for step in cuda_device.launches) == (
        max(1, items // 2) if halved else items
    )
    assert all(step.threads <= chosen.get("threads", 256) for step in cuda_device.launches)


@pytest.mark.parametrize(("processors", "shared"), [(1, 2 << 10), (132, 227 << 10)])
def test_devices(monkeypatch, processors, shared):
    device = launch.Device(0, cuda.ARCHITECTURE, processors, shared)
    monkeypatch.setattr(launch, "device", lambda _number: device)
    checks.check_backward(make_case(ROWS, "float32", OPTIONS["affine residual relu"]))


def test_architectures_without_clusters(cuda_device, monkeypatch):
    """Before compute capability 9 groups of blocks are those of a cooperative launch."""
    device = launch.Device(0, 80, 3, 16 << 10)
    monkeypatch.setattr(launch, "device", lambda _number: device)
    small = problems.Tuning(**LITTLE | {"cluster": 1})
    monkeypatch.setitem(problems.TUNING, 80, small)
    cuda_device.launches.clear()
    checks.check_backward(make_case(Layout((20, 1, 20, 20)), "float32"))
    assert strategies(cuda_device.launches) == {"cooperative"}


# --- indices ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layout", "options", "names"),
    [
        ("NCHW", "affine residual relu", ("training", "frozen")),
        ("NHWC", "plain", ("training", "parts")),
        ("reversed rows", "plain", ("training", "moments")),
        pytest.param("NCHW long rows", "where weights residual", tuple(checks.CHECKS), marks=pytest.mark.slow),
        pytest.param("instance NHWC", "weights relu", tuple(checks.CHECKS), marks=pytest.mark.slow),
    ],
)
def test_indices_of_64_bits(cuda_device, monkeypatch, layout, options, names):
    """Those of arrays with 2^31 vectors in a channel, on small ones."""
    monkeypatch.setattr(geometry, "WIDE_FROM", 0)
    cuda_device.launches.clear()
    case = make_case(LAYOUTS[layout], "float32", OPTIONS[options])
    for name in names:
        checks.CHECKS[name](case)
    assert {step.macros.get("WIDE", 1) for step in cuda_device.launches} == {1}


WIDTHS = {
    "as wide as can be": ({}, 4),
    "half a vector on": ({"off": 8}, 2),
    "an element on": ({"off": 4}, 1),
    "every other element": ({"strides": (0, 1 << 20, 1 << 10, 2)}, 1),
    "backwards": ({"strides": (0, 1 << 20, 1 << 10, -1)}, 1),
    "broadcast": ({"strides": (0, 1 << 20, 1 << 10, 0)}, 1),
    "channels apart by odd numbers": ({"strides": (0, 1 << 20, 1023, 1)}, 1),
    "samples apart by pairs": ({"strides": (0, (1 << 20) + 2, 1 << 10, 1)}, 2),
    "one sample": ({"strides": (0, 3, 1 << 10, 1), "shape": (1, 1, 8, 64)}, 4),
    "rows of whole pairs": ({"shape": (1, 4, 8, 62)}, 2),
    "odd rows": ({"shape": (1, 4, 8, 63)}, 1),
}


@pytest.mark.parametrize(("change", "width"), WIDTHS.values(), ids=WIDTHS)
@pytest.mark.parametrize("which", [0, 1])
def test_width_of_loads(change, width, which):
    """What any of the arrays does not allow, none is read by."""
    usual = {"strides": (0, 1 << 20, 1 << 10, 1), "off": 0}
    operands = [problems.Placement(**usual)] * 2
    operands[which] = problems.Placement(**usual | {name: v for name, v in change.items() if name != "shape"})
    problem = problems.Problem(
        launch.Device(0, 90, 132, 227 << 10), change.get("shape", (1, 4, 8, 64)), 2, 4,
        tuple(zip(("x", "y"), operands, strict=True)), 0, (), (), False, False,
    )  # fmt: skip
    assert geometry.vector_of(problem, 3, 4) == width


ROWS_OF = {
    "halves of 7 x 7": ((1, 32, 512, 49), 2, 49),
    "float32 of 7 x 7": ((1, 32, 512, 49), 4, 49),
    "float64 of 7 x 7": ((1, 32, 512, 49), 8, 49),
    "halves of 14 x 14": ((1, 32, 512, 196), 2, 49),
    "short rows, of more channels": ((1, 32, 512, 9), 2, 36),
    "samples of one batch each": ((32, 1, 512, 49), 2, 49),
    "whole vectors": ((1, 32, 512, 64), 2, 0),
    "channels that end within a vector": ((1, 32, 4, 49), 2, 0),
    "rows shorter than a vector": ((1, 32, 512, 4), 2, 0),
    "rows longer than a block": ((1, 32, 512, 841), 2, 0),
}


@pytest.mark.parametrize(("shape", "itemsize", "lanes"), ROWS_OF.values(), ids=ROWS_OF)
def test_vectors_across_rows(shape, itemsize, lanes):
    """Where rows have odd lengths and no gaps between them."""
    batch, outer, channel, inner = shape
    usual = (channel * inner if batch > 1 else 0, channel * inner if outer > 1 else 0, inner, 1)

    def lanes_of(strides=usual, off=0, weight=0):
        operands = tuple((name, problems.Placement(s, o)) for name, s, o in (("x", usual, 0), ("y", strides, off)))
        problem = problems.Problem(
            launch.Device(0, 90, 132, 227 << 10), shape, 2, itemsize, operands, weight, (), (), False, False
        )
        found = geometry.geometry_of(problem, problems.Tuning(), None)
        assert (found.run, found.width) in ((0, 1), (inner, found.lanes * found.vector // inner))
        return found.lanes if found.run else 0

    assert lanes_of() == lanes
    assert lanes_of(off=itemsize) == 0
    assert lanes_of(weight=1) == 0
    assert lanes_of(tuple(s + (i == 2) for i, s in enumerate(usual))) == 0
    assert lanes_of(tuple(s + (i < 2 and s > 0) for i, s in enumerate(usual))) == 0


def test_when_indices_have_64_bits():
    for vectors, wide in (((1 << 31) - 1, 0), (1 << 31, 1)):
        lies = geometry.Geometry(False, 1, 1, vectors, 1, 1, 1)
        problem = problems.Problem(
            launch.Device(0, 90, 132, 227 << 10), (1, 1, 1, vectors), 2, 4, (), 0, (), (), False, False
        )
        macros = dict(plans._macros(geometry.Work(problem, problems.Tuning(), lies), "forward", 256, 8))
        assert macros["WIDE"] == wide


def test_large_halves_have_twice_the_loads_in_flight():
    """Where the device is full, and registers suffice."""

    def passed(kernel, arrays, dtype=0, n=1 << 22, **changes):
        strides = (0, 64, 1, 0)
        problem = problems.Problem(
            launch.Device(0, 80, 108, 163 << 10), (1, n, 64, 1), dtype, (2, 2, 4)[dtype],
            (("x", problems.Placement(strides, 0)),), 0, strides, (), False, False,
        )._replace(**changes)  # fmt: skip
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(launch, "function", lambda _, kernel, macros: (kernel, macros))
            macros = dict(plans._pass(geometry.work_of(problem), kernel, arrays)[0].compiled[1])
        return macros["VECTOR"], macros["ITEMS_PER_THREAD"]

    for dtype in (0, 1):
        for kernel, arrays, deep, plain in (
            ("statistics", 1, (8, 8), (8, 4)), ("normalize", 1, (8, 8), (8, 4)),
            ("grad_input", 2, (8, 4), (8, 2)), ("grad_sums", 2, (4, 8), (8, 2)),
        ):  # fmt: skip
            assert passed(kernel, arrays, dtype) == deep
            for changes in ({"n": 1 << 17}, {"residual": True}):
                assert passed(kernel, arrays, dtype, **changes) == plain
    assert passed("statistics", 1, weight=2) == (2, 2)
    assert passed("statistics", 1, 2) == (4, 8)


def test_division():
    """By multiplication and shift: exact for every vector that 32 bits number."""
    rng = np.random.default_rng(0)
    last = (1 << 31) - 1
    divisors = {2, 3, 5, 7, 12, 641, 1 << 16, (1 << 16) + 1, 1 << 30, (1 << 30) + 1, last - 1, last}
    for by in divisors | set(rng.integers(2, last, 200).tolist()):
        multiplier, shift = plans._division(by)
        assert 0 < multiplier < 1 << 32
        near = [k * by + d for k in (0, 1, 2, last // by - 1, last // by) for d in (-1, 0, 1)]
        for v in (*near, last, *rng.integers(0, last, 20).tolist()):
            if 0 <= v <= last:
                assert (v * multiplier >> 32) >> shift == v // by
    assert plans._division(1) == (0, 0)
