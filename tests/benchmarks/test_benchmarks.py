"""asv's suite at toy size, the gate, and what all benchmarks share."""

import inspect
import itertools
import json
import math
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from fastbn import bench, environment, threads

kernels = pytest.importorskip("benchmarks.kernels", reason="installed without the benchmarks")
import fastbn  # noqa: E402
from benchmarks import busy, calls, frameworks, gate, host, relu, small, statistics_cases, views, workloads  # noqa: E402
from tests import interpreters  # noqa: E402

TOY = (2, 4, 3, 5)
PREFIXES = ("time_", "track_", "peakmem_", "timeraw_")


def functions(cls):
    return [name for name in dir(cls) if name.startswith(PREFIXES)]


CLASSES = [
    cls
    for module in (kernels, calls)
    for name, cls in vars(module).items()
    if inspect.isclass(cls) and not name.startswith("_") and functions(cls)
]


def combinations(cls):
    params = getattr(cls, "params", ())
    params = [p if isinstance(p, tuple) else (p,) for p in params]
    return itertools.product(*params)


# --- asv's suite ------------------------------------------------------------------------------------------------------


@pytest.fixture
def toy(monkeypatch):
    """Workloads, caches and times so small that all is run at once."""
    for name, shape in {kernels.LARGE: TOY, kernels.MIDDLE: TOY, calls.SMALL: TOY[:3]}.items():
        monkeypatch.setitem(workloads.SHAPES, name, shape)
    for name, value in {"SECONDS": 0, "PAIRS": 2, "BURST_SECONDS": 1e-5, "PAUSE": 0.01}.items():
        monkeypatch.setattr(kernels, name, value)
    monkeypatch.setattr(calls, "BURST", 2)
    monkeypatch.setattr(calls, "TURNS_SECONDS", 0)
    monkeypatch.setattr(calls, "case_named", lambda name: statistics_cases.case_named(name).shrunk(2000))
    for name, view in views.VIEWS.items():
        monkeypatch.setitem(views.VIEWS, name, view._replace(shape=(1, *(min(n, 24) for n in view.shape[1:]))))
    monkeypatch.setattr(host, "cache", lambda *_: 1000)
    monkeypatch.setattr(calls, "FIRST", "{shape}, {axis}\nprint(0.25, 0.5)")
    yield
    kernels.case.cache_clear()


def value_of(result):
    return float(np.median(result["samples"])) if isinstance(result, dict) else result


@pytest.mark.parametrize(("cls", "name"), [(cls, name) for cls in CLASSES for name in functions(cls)])
def test_the_suite_runs(toy, cls, name):
    cached = [cls().setup_cache()] if hasattr(cls, "setup_cache") else []
    ran = 0
    for params in combinations(cls):
        case = cls()
        if "cupy" in params or (cls is kernels.BesidePyTorch and not environment.optional("torch")):
            with pytest.raises(NotImplementedError):
                case.setup(*params)
            continue
        if hasattr(case, "setup"):
            case.setup(*params)
        result = getattr(case, name)(*cached, *params)
        ran += 1
        if name.startswith("track_"):
            assert 0 <= value_of(result) < math.inf
            assert getattr(cls, name).unit
        elif name == "timeraw_import":
            assert result == "import fastbn"
        else:
            assert result is None
    assert ran or cls is kernels.BesidePyTorch


def test_every_operation_is_in_the_suite():
    assert {cls.operation for cls in CLASSES if issubclass(cls, kernels._Operation)} == set(workloads.TRIPS)


def test_benchmarks_have_versions():
    """Without one asv takes the text of the class, and forgets the history when a comment changes."""
    assert all(cls.version == "1" for cls in CLASSES)


def test_a_case_is_made_once_a_process(toy):
    """asv sets up before each sample."""
    case = kernels.Forward()
    for _ in range(2):
        case.setup("numpy", kernels.LARGE, "NCHW", "float32")
    assert kernels.case.cache_info().misses == 1


def test_ratios(toy, monkeypatch):
    """Of one call's time to another's, whichever has its turn first."""
    case = kernels.case("moments", "numpy", TOY, "NCHW", "float32")
    monkeypatch.setattr(kernels, "PAIRS", 4)
    ratios = case.ratios(lambda _: time.sleep(0.02), lambda _: time.sleep(0.005))
    assert len(ratios) == 4
    assert np.median(ratios) == pytest.approx(4, rel=0.4)
    assert min(ratios) > 1, "never the other way round"


def test_the_limit_is_the_copy_of_what_must_move(toy, monkeypatch):
    """A kernel as slow as a copy of x moves three trips' bytes in two thirds of the time that a machine needs."""
    case = kernels.case("fused", "numpy", TOY, "NCHW", "float32")
    monkeypatch.setattr(case, "ratios", lambda ours, theirs: [1.0] if theirs == case.data.copy else None)
    assert case.times_limit() == [pytest.approx(2 / 3)]


@pytest.mark.slow
def test_first_calls_compile_and_then_load():
    first = calls.FirstCall().setup_cache()
    for layout in workloads.LAYOUTS:
        compiling, cached = first[layout]
        assert compiling["forward"] > cached["forward"] > 0


def test_asv_accepts_the_suite():
    pytest.importorskip("asv")
    command = [sys.executable, "-m", "asv", "check", "--environment", "existing:same"]
    assert "No problems found." in interpreters.run(command, cwd=gate.ROOT)


# --- the gate ---------------------------------------------------------------------------------------------------------

TABLE = """\
[100.00%] ··· kernels.Forward.track_times_limit                              ok

| Change   | Before [7604a13c] <main>   | After [0123abcd] <slower>   |   Ratio | Benchmark (Parameter) |
|----------|----------------------------|-----------------------------|---------|-----------------------|
| +        | 1.02±0.05                  | 1.35±0.04                   |    1.32 | {} |
| !        | 0.0001                     | failed                      |     n/a | {} |
| -        | 1.9±0.05                   | 1.1±0.04                    |    0.58 | kernels.Backward.time_call('numpy') |
"""
SLOWER = "kernels.Forward.track_times_limit('numpy', 'resnet50_56x56x256', 'NCHW', 'float32')"
FAILS = "calls.Memory.track_beside_results('forward', 'NCHW')"


def answers(monkeypatch, *found):
    """Have asv answer so, and note what it was asked."""
    asked, left = [], list(found)

    def compare(base, head, bench, factor, rounds):
        asked.append((base, head, list(bench), factor, rounds))
        return left.pop(0)

    monkeypatch.setattr(gate, "compare", compare)
    return asked


def test_the_gate_names_what_is_slower_each_time(monkeypatch, capsys):
    slower = (1, TABLE.format(SLOWER, FAILS))
    asked = answers(monkeypatch, slower, slower, slower)
    assert gate.main(["main", "change"]) == 1
    printed = capsys.readouterr().out
    assert "change is slower than main" in printed
    assert SLOWER in printed
    assert FAILS in printed
    assert "Backward" not in printed
    assert [rounds for *_, rounds in asked] == list(gate.ROUNDS)
    assert asked[0][2] == list(gate.CHOSEN)
    for pattern, name in zip(asked[1][2], (FAILS, SLOWER), strict=True):
        assert gate.re.search(pattern, name)


def test_what_is_slower_once_is_not_slower(monkeypatch, capsys):
    asked = answers(monkeypatch, (1, TABLE.format(SLOWER, FAILS)), (0, "no change"))
    assert gate.main(["main", "HEAD", "--factor", "1.3", "--bench", "kernels"]) == 0
    assert asked[0][2:] == (["kernels"], 1.3, gate.ROUNDS[0])
    assert len(asked) == 2
    assert "HEAD is not slower than main" in capsys.readouterr().out


@pytest.mark.parametrize(
    "found", [(2, ""), (1, "Unknown commit"), (1, TABLE.replace("| +", "| -").replace("| !", "| -"))]
)
def test_a_comparison_that_fails_is_no_pass(monkeypatch, capsys, found):
    answers(monkeypatch, found)
    assert gate.main(["main"]) == 2
    assert f"asv ended with status {found[0]}" in capsys.readouterr().err


@pytest.mark.parametrize(("index", "count"), [(0, 28), (1, 3), (2, 8), (3, 16)])
def test_what_the_gate_compares(index, count):
    names = [
        f"{cls.__module__.removeprefix('benchmarks.')}.{cls.__name__}.{name}({', '.join(map(repr, params))})"
        for cls in CLASSES
        for name in functions(cls)
        for params in combinations(cls)
    ]
    assert sum(gate.re.search(gate.CHOSEN[index], name) is not None for name in names) == count


def test_asvs_settings(tmp_path):
    settings = gate.settings_of(gate.ROOT / "asv.conf.json", tmp_path)
    assert settings["results_dir"] == str(tmp_path)
    assert settings["benchmark_dir"] == str(gate.ROOT / "benchmarks")
    json.dumps(settings)


# --- beside the adapters ----------------------------------------------------------------------------------------------


def test_the_costs_of_adapters(monkeypatch, capsys):
    monkeypatch.setattr(frameworks, "SHAPES", {"small": (2, 3, 4, 4), "large": (4, 3, 4, 4)})
    monkeypatch.setattr(frameworks, "ROUNDS", 1)
    monkeypatch.setattr(frameworks, "BURST_SECONDS", 0.0)
    assert frameworks.main() == 0
    header, _, *rows = capsys.readouterr().out.splitlines()
    assert header == "| call, us | 2x3x4x4 | 4x3x4x4 |"
    assert len(rows) == 2 + 4 * bool(environment.optional("torch")) + 3 * bool(environment.optional("jax"))


# --- small calls ------------------------------------------------------------------------------------------------------


def test_small_calls(monkeypatch, capsys):
    """Every function has a row, and what is missed is the status."""
    monkeypatch.setattr(small, "ROUNDS", 1)
    monkeypatch.setattr(small, "BURST", 2)
    assert tuple(small.rows()) == small.NAMES
    monkeypatch.setattr(small, "ADD", 1e-9)  # a machine on which every limit is far away
    monkeypatch.setattr(small, "torchs", lambda *_: dict.fromkeys(("forward", "backward", "inference"), ()))
    rows = small.rows()
    easy = {name: row._replace(share=None) for name, row in rows.items()}
    monkeypatch.setattr(small, "rows", lambda: easy)
    assert small.main() == 0
    assert "MISSED" not in capsys.readouterr().out
    hard = easy | {"mean": rows["mean"]._replace(share=1e-9)}
    monkeypatch.setattr(small, "rows", lambda: hard)
    assert small.main() == 1
    printed = capsys.readouterr().out.splitlines()
    assert [line.split(" |")[0] for line in printed if "MISSED" in line] == ["| mean"]
    functions = {name.partition(",")[0].partition(".")[0] for name in small.NAMES}
    assert functions == set(fastbn.__all__) - {"Moments", "Gradients", "threads", "__version__"}


# --- on a busy machine ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", workloads.LAYOUTS)
def test_threads_on_a_busy_machine(monkeypatch, capsys, layout):
    """Every operation in every condition; copies and callers where they belong."""
    monkeypatch.setattr(busy, "SIZES", {"small": TOY, "limit": (4, 4, 3, 5), "large": (8, 4, 3, 5)})
    monkeypatch.setattr(busy, "LARGE", 4 * 4 * 4 * 3 * 5)
    monkeypatch.setattr(busy, "PAIRS", 2)
    monkeypatch.setattr(busy, "ROUNDS", 1)
    monkeypatch.setattr(busy, "core_cache", lambda: 1000)
    monkeypatch.setattr(busy, "TURNED", 4000)
    assert busy.main(["--seconds", "0", "--layout", layout]) == 0
    table, _, summary = capsys.readouterr().out.partition("\nThe worst:\n")
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in table.splitlines()[2:]]
    conditions = [name for name, found in busy.CONDITIONS.items() if not found.torch or environment.optional("torch")]
    expected = [
        [condition, operation, size]
        for condition in conditions
        for size in busy.SIZES
        for operation in ("copy", *busy.OPERATIONS, busy.AT_ONCE)
        if not (operation == "copy" and size == "small")
        and not (operation == busy.AT_ONCE and (size == "large" or "ops" in condition))
    ]
    assert [row[:3] for row in cells] == expected
    assert all(float(figure) > 0 for row in cells for figure in row[3:7])
    assert all(float(ratio) >= 0 for row in cells for ratio in row[7:9])  # 0.00 beside one stalled call
    assert all(bool(row[9]) == (row[1] in busy.OPERATIONS and row[2] != "small") for row in cells)
    assert [line.partition(":")[0] for line in summary.splitlines()] == conditions


def test_some_conditions_and_sizes(monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(busy, "rows", lambda *given: asked.append(given) or [])
    assert busy.main(["--only", "nice-15", "idle", "--sizes", "8 kB", "--seconds", "2"]) == 0
    assert asked == [(busy.CONDITIONS[name], ["8 kB"], "NCHW", 2.0) for name in ("idle", "nice-15")]
    assert capsys.readouterr().out.endswith("The worst:\nidle: \nnice-15: \n")


def test_threads_that_lose_are_found():
    """The default's calls, though on either turn, are those that are slow; and on one thread is one thread."""
    asked = []

    def call(seconds):
        return lambda _: asked.append((seconds, threads.get_num_threads())) or time.sleep(seconds)

    row = busy.Row("forward", "8 kB", *busy.compared(call(1e-3), call(5e-3), lambda: None, 0.1))
    assert 2 < row.ratio(50) < 8
    assert set(asked) == {(1e-3, 1), (5e-3, threads.get_num_threads())}
    copy = busy.Row("copy", "8 kB", [2.0, 2.0], [1.0, 1.0])
    assert busy.share(row, copy) == pytest.approx(0.5 / row.ratio(50))
    fast = busy.Row("var", "8 kB", [2.0, 2.0], [1.0, 1.0])
    words = busy.worst("idle", [copy, fast, row, busy.Row(busy.AT_ONCE, "3 MB", [1.0], [0.5])])
    ratio, of = f"{row.ratio(50):.2f}", "(forward, 8 kB)"
    assert words.startswith(f"idle: median {ratio} {of}; 95th percentile {row.ratio(95):.2f} {of}; ")
    assert words.endswith(f"callers 0.50 ({busy.AT_ONCE}, 3 MB); of a copy's speed-up {busy.share(row, copy):.2f} {of}")


def test_callers_at_once():
    """Eight that sleep are eight times as fast as one."""
    one, default = busy.called_at_once(lambda _: time.sleep(0.01), 0.5)
    assert 3 < np.median(one) / np.median(default) < 16


def test_the_copy_in_parts():
    data = workloads.Data(host.Host(), (2, 4, 3, 5), "float32", "NCHW", 2)
    with threads.num_threads(3), ThreadPoolExecutor(3) as pool:
        for call in busy.copies(data, pool):
            for out in data.out:
                out[...] = 0
            call(3)
            np.testing.assert_array_equal(data.out[1], data.x[1])
            assert not data.out[0].any()


@pytest.mark.skipif(not hasattr(os, "getpriority"), reason="no priorities on this system")
def test_busy_processes_end():
    processes = []

    def interrupted(nice):
        with busy.busy(nice) as process:
            processes.append(process)
            here, there = (os.getpriority(os.PRIO_PROCESS, pid) for pid in (0, process.pid))
            assert there == min(here + nice, 19)
            assert process.poll() is None
            raise KeyboardInterrupt

    for nice in (0, 5):
        with pytest.raises(KeyboardInterrupt):
            interrupted(nice)
    assert all(process.returncode is not None for process in processes)


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_busy_processes_end_with_a_parent_that_is_killed():
    program = """
        import os
        from benchmarks.busy import busy
        with busy(0) as process:
            print(process.pid, flush=True)
            os.kill(os.getpid(), 9)
    """
    process = interpreters.run(interpreters.python(program), cwd=gate.ROOT, returns=-9).strip()
    state, end = Path("/proc", process, "stat"), time.monotonic() + 20
    while state.exists() and state.read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < end, "still busy"
        time.sleep(0.01)


# --- what all share ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "layout", "what", "trips"),
    [
        ((32, 512, 28, 28), "NCHW", "forward", 2),  # a channel's slab is 100 kB
        ((32, 512, 28, 28), "NCHW", "backward", 3),  # of x and dy 200 kB
        ((32, 256, 56, 56), "NCHW", "forward", 3),  # 401 kB: more than 75 % of 512 kB
        ((32, 256, 56, 56), "NCHW", "backward", 5),
        ((32, 512, 28, 28), "NHWC", "forward", 3),  # half of the array a thread
        ((1, 8, 16), "NHWC", "backward", 3),
        ((32, 256, 56, 56), "NHWC", "inference", 2),
        ((32, 256, 56, 56), "NCHW", "fused", 3),
        ((32, 256, 56, 56), "NCHW", "moments", 1),
        ((32, 512, 28, 28), "NCHW", "fused backward", 5),  # of x, dy and y 301 kB
        ((32, 256, 56, 56), "NCHW", "fused backward", 8),
    ],
)
def test_trips_over_memory(shape, layout, what, trips):
    assert workloads.trips_at_best(shape, 4, layout, what, 512 << 10, 2) == trips


def test_the_packages_own_measurement_has_the_same_workloads():
    """`python -m fastbn bench` runs where there is no benchmarks folder."""
    assert (bench.BATCH, bench.RESNET50, bench.EPS) == (workloads.BATCH, workloads.RESNET50, workloads.EPS)
    assert bench.OPERATIONS.items() <= {what: trips.once for what, trips in workloads.TRIPS.items()}.items()


@pytest.mark.parametrize("dtype", list(environment.float_dtypes()))
def test_the_packages_own_measurement_has_the_same_inputs(monkeypatch, dtype):
    for number in (0, 3, 200):
        ours, theirs = (np.empty((3, 500_000), workloads.dtype_of(dtype)) for _ in range(2))
        workloads.fill(ours, number)
        bench.fill(theirs, number)
        np.testing.assert_array_equal(ours, theirs)
        assert ours.astype(np.float32).mean() == pytest.approx(0.5, abs=0.01)
        assert ours.astype(np.float32).std() == pytest.approx(1, abs=0.01)


def test_names_of_workloads():
    assert workloads.SHAPES["resnet50_56x56x256"] == (32, 256, 56, 56)
    assert len(workloads.SHAPES) == 15


@pytest.mark.parametrize("operation", list(workloads.TRIPS))
@pytest.mark.parametrize("layout", workloads.LAYOUTS)
def test_contenders_compute_the_same(operation, layout):
    """Written to `out`, allocated, and PyTorch's."""
    pytest.importorskip("torch")
    data = workloads.Data(host.Host(), (4, 8, 6, 5), "float32", layout, 2)

    def arrays(result):
        found = result if isinstance(result, tuple) else (result,)
        return [np.asarray(a) for a in found[: 3 if "backward" in operation else 1]]

    if operation == "moments":
        moments, (var, mean) = data.ours(operation)(1), data.torchs(operation)(1)
        np.testing.assert_allclose(moments.mean, mean, rtol=1e-5)
        np.testing.assert_allclose(moments.var(), var, rtol=1e-5)
        return
    new, given, theirs = (f(1) for f in (data.ours(operation), data.ours(operation, out=True), data.torchs(operation)))
    for a, b, c in zip(arrays(new), arrays(given), arrays(theirs), strict=True):
        np.testing.assert_array_equal(a, b)
        c = np.moveaxis(c, 1, -1) if layout == "NHWC" and c.ndim > 1 else c
        np.testing.assert_allclose(a, c, rtol=1e-4, atol=1e-5)
    first = arrays(given)[0]
    assert np.shares_memory(first, data.out[1])


@pytest.mark.parametrize("offset", [0, 3, 16, 63])
@pytest.mark.parametrize("nbytes", [64, 100, 4096, 100_001])
def test_the_hosts_copy(offset, nbytes):
    """Whole, and nothing beside."""
    x = np.random.default_rng(0).integers(0, 255, nbytes, np.uint8)
    buffer = np.full(nbytes + 256, 7, np.uint8)
    start = 64 + offset
    host.Host().copy(x, buffer[start : start + nbytes])
    np.testing.assert_array_equal(buffer[start : start + nbytes], x)
    np.testing.assert_array_equal(np.delete(buffer, np.s_[start : start + nbytes]), 7)


def test_steps(monkeypatch, capsys):
    """Every model's step, before and after, in every mode but the compiled ones; and single layers."""
    pytest.importorskip("torch")
    from benchmarks import steps

    monkeypatch.setattr(steps, "ROUNDS", 1)
    monkeypatch.setattr(steps, "SECONDS", 0.0)
    monkeypatch.setattr(steps, "SIZES", ((4, 8, 1),))
    small = {
        name: (make, shape, (2,)) for name, (make, shape, _) in steps.MODELS.items() if "8 ch" in name or "256" in name
    }
    monkeypatch.setattr(steps, "MODELS", small)
    modes = ["training", "training, channels-last", "evaluation"]
    assert steps.main(["--models", *small, "--modes", *modes]) == 0
    assert steps.main(["--models", *small, "--modes", "training", "--always"]) == 0
    assert steps.main(["--layers"]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.endswith("x |")]
    assert len(rows) == len(small) * (len(modes) + 1) + 4
    assert all(float(row.split("|")[-2].strip(" x")) > 0 for row in rows)


def test_relu_has_a_table(toy, capsys, monkeypatch):
    few = [relu.Images((4, 3, 5, 6), axis, dtype) for axis in (1, -1) for dtype in ("float32", "float16")]
    monkeypatch.setattr(relu, "cases", lambda: few)
    monkeypatch.setattr(sys, "argv", ["relu", "--rounds", "1"])
    relu.main()
    rows = capsys.readouterr().out.splitlines()
    assert len(rows) == 2 + len(few)
    assert all(float(row.split("|")[2]) > 0 for row in rows[2:])


def test_views_have_a_table(toy, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["views", "--rounds", "1"])
    views.main()
    rows = capsys.readouterr().out.splitlines()
    assert len(rows) == 2 + len(views.VIEWS)
    assert len({row.count("|") for row in rows}) == 1
