"""The measurement of `benchmarks/statistics.py`: its cases, its limits, its files; and the sweep's cliffs."""

import itertools
import json
import math
import types
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import fastbn

statistics = pytest.importorskip("benchmarks.statistics", reason="installed without the benchmarks")
from benchmarks import statistics_cases, statistics_sweep, turns  # noqa: E402
from benchmarks.statistics_cases import CASES, GROUPS, Arrays, Case  # noqa: E402

CACHE = 1000  # bytes: large cases have many buffers, and shrunk ones one
SMALL = [case.shrunk(3000) for case in CASES]
CALLS = [(case, function) for case in SMALL for function in case.functions]


def name_of(value):
    return value.name if isinstance(value, Case) else None


# --- cases ------------------------------------------------------------------------------------------------------------


def test_names_are_each_of_one_case():
    names = [(case.group, case.name, function) for case in CASES for function in case.functions]
    assert len(set(names)) == len(names)
    assert {statistics_cases.case_named(name).name for name in statistics_cases.TRACKED} == set(
        statistics_cases.TRACKED
    )


def test_cases_are_of_their_groups():
    for case in CASES:
        count = math.prod(case.shape)
        nbytes = count * np.dtype(case.dtype).itemsize
        assert case.group != "small" or count <= 3000
        assert case.group != "middle" or 10_000 <= count <= 1_000_000
        assert case.group != "large" or nbytes >= statistics_cases.LARGE
        assert (case.group == "integers") == (np.dtype(case.dtype).kind in "biu") or case.group == "slices"
        assert bool(case.accumulate) == (case.group == "dtype")
        assert bool(case.view) == (case.group == "slices")
        assert bool(case.mask) == (case.group in ("where", "average"))
        assert all(name.startswith("nan") for name in case.functions) == (case.group == "nan")
    floats = {(case.dtype, len(case.shape)) for case in CASES if case.group in ("small", "middle", "large")}
    assert {dimensions for _, dimensions in floats} == {1, 2, 3, 4, 5}
    assert {dtype for dtype, _ in floats} == {"float16", "float32", "float64"}


@pytest.mark.parametrize(("case", "function"), CALLS, ids=name_of)
def test_every_call_gives_numpys_result_in_float64(case, function):
    """All contenders: those that compute something else would be measured for nothing."""
    if not hasattr(fastbn, function):
        pytest.skip(f"fastbn has no {function}")
    arrays = Arrays(case, CACHE)
    contenders = arrays.contenders(function)
    assert next(iter(contenders)) == "fastbn"
    x = arrays.x[0].astype(np.float64)
    options = {} if case.axis is None else {"axis": case.axis}
    beside = dict(options)
    if case.mask:
        beside["weights" if case.group == "average" else "where"] = arrays.beside
    wanted = getattr(np, function, statistics_cases._mean_var)(x, **beside)
    for name in {"fastbn", "bottleneck", "numbagg"} & contenders.keys():
        compare(contenders[name][0](), wanted, x, case, 1 if name == "fastbn" else 100)
    if "plain" in contenders:
        plain = arrays.plain[0].astype(np.float64)
        wanted = getattr(np, function.removeprefix("nan"), statistics_cases._mean_var)(plain, **options)
        compare(contenders["plain"][0](), wanted, plain, case, 1)


def compare(result, wanted, x, case, factor):
    """To the result's last place, and what summing in float32 costs at x's scale; peers' plain sums, 100 times that."""
    largest = max(1.0, float(np.nanmax(np.abs(x))))
    wide = (case.accumulate or case.dtype) == "float64" or case.group == "integers"
    eps = float(np.finfo(np.float64 if wide else np.float32).eps)
    for got, value in zip(np.atleast_1d(result), np.atleast_1d(wanted), strict=True):
        assert np.shape(got) == np.shape(value)
        last = float(np.finfo(np.asarray(got).dtype).eps)
        np.testing.assert_allclose(got, value, rtol=last, atol=4 * factor * eps * largest**2)


@pytest.mark.parametrize("dtype", sorted({case.dtype for case in CASES}))
def test_numbers(dtype):
    """Not zeros, not the same in two arrays, and NaN where they are asked for."""
    a, b = (statistics_cases.numbers(dtype, (3, 500_000), number) for number in (0, 1))
    assert a.dtype == dtype
    assert np.count_nonzero(a) > 0.25 * a.size
    assert np.mean(a != b) > 0.3
    assert np.std(a[:1, :1000].astype(np.float64)) > 0.1
    if np.dtype(dtype).kind == "f":
        holes = statistics_cases.numbers(dtype, (3, 500_000), 0, 0.05)
        assert np.isnan(holes).mean() == pytest.approx(0.05, rel=0.1)
        np.testing.assert_array_equal(holes[~np.isnan(holes)], a[~np.isnan(holes)])


def test_large_cases_have_more_than_the_caches_hold(monkeypatch):
    monkeypatch.setattr(statistics_cases, "LARGE", 1 << 10)
    large = Case("large", "float32", (16, 16), 0)
    assert len(Arrays(large, 4096).x) == 16
    small = Case("small", "float32", (4, 16), 0)
    assert len(Arrays(small, 4096).x) == 1


def test_bytes_that_lie_together():
    x = np.zeros((4, 6, 1, 8), np.float32)
    views = {x.nbytes: x, 32: x[:, ::2], 24: x[..., 1:-1], 4: x[..., ::2], 6 * 32: x[::2, ::-1]}
    for expected, view in views.items():
        assert statistics_cases.run_bytes(view) == expected
        assert statistics_cases.run_bytes(view.T) == expected


def test_what_a_slice_costs_is_limited_where_rows_are_long():
    limited = {
        case.name: Arrays(case.shrunk(300_000), CACHE).is_measured_by_plain
        for case in CASES
        if case.group in ("where", "slices")
    }
    assert limited["float32 (8000, 3100)[::2] axis 1"]
    assert not limited["float32 (4000, 6200)[:, ::2] axis 1"]
    assert not limited["float32 (64, 224, 224, 3)[..., :2] axes (0, 1, 2)"]
    assert limited["float32 (4000, 3100) axis 1, where (4000, 3100)"]
    assert not limited["float32 (4000, 3100) axis 0, where (4000, 1)"]


# --- turns ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch):
    """Time that passes where a call says so."""
    now = [0.0]
    monkeypatch.setattr(turns, "time", types.SimpleNamespace(perf_counter=lambda: now[0]))
    return now


def test_contenders_take_turns_on_other_buffers(monkeypatch, clock):
    monkeypatch.setattr(turns, "BURST_SECONDS", 0.0)
    seen = []

    def calls(name, seconds):
        def call(i):
            seen.append((name, i))
            clock[0] += seconds

        return [lambda i=i: call(i) for i in range(2)]

    times = turns.in_turn({"fastbn": calls("fastbn", 0.125), "numpy": calls("numpy", 0.5)}, 4, 0.0)
    np.testing.assert_allclose([times["fastbn"], times["numpy"]], [[0.125] * 4, [0.5] * 4])
    timed = seen[4:]  # behind the calls that warm up
    assert [name for name, _ in timed] == ["fastbn", "numpy", "numpy", "fastbn"] * 2
    assert all(a != b for (_, a), (_, b) in itertools.pairwise(timed))


@pytest.mark.parametrize(("rounds", "seconds", "each", "expected"), [(5, 0, 0.5, 5), (5, 3, 0.5, 6), (5, 3, 2, 3)])
def test_rounds_and_seconds(clock, rounds, seconds, each, expected):
    """At least; but slow calls are not waited for."""

    def call():
        clock[0] += each

    assert len(turns.in_turn({"fastbn": [call]}, rounds, seconds)["fastbn"]) == expected


def test_short_calls_come_in_bursts(monkeypatch, clock):
    monkeypatch.setattr(turns, "BURST_SECONDS", 0.25)
    calls = []

    def call():
        calls.append(0)
        clock[0] += 2.0**-10

    times = turns.in_turn({"fastbn": [call]}, 1, 0.0)
    assert len(calls) == 2 + 256
    assert times["fastbn"] == [2.0**-10]


def test_memory_beside_a_result():
    made = turns.memory_beside_result(lambda: (np.ones(1_000_000), np.ones(100_000).sum()))
    assert made == pytest.approx(800_000, rel=0.02)
    assert turns.memory_beside_result(lambda: np.ones(1_000_000)) < 8000


def test_the_reader_reads_every_byte():
    buffers = [np.arange(1000 * (i + 1), dtype=np.float32) for i in range(2)]
    with ThreadPoolExecutor(2) as pool:
        reader = turns.Reader(buffers, pool)
        reader()
    assert 0.9 * sum(b.nbytes for b in buffers) < reader.nbytes <= sum(b.nbytes for b in buffers)
    part = reader.parts[1][0]
    assert turns._sum_far_rows(part) == pytest.approx(part.sum(dtype=np.float64), rel=1e-5)


# --- limits -----------------------------------------------------------------------------------------------------------


def row(group, function, shape=(20_000_000,), by_plain=False, **figures):
    case = Case(group, "float32", shape, None)
    return statistics.Row(case, function, 4 * math.prod(shape), {"fastbn": 1.0, "numpy": 1.0}, figures, by_plain)


def verdict(rows, group, kind, figure):
    found = [v for v in statistics.verdicts(rows) if v.bound[:3] == (group, kind, figure)]
    return found[0] if found else None


def test_limits_of_the_mean_and_of_each():
    rows = [row("small", "mean", numpy=1.0), row("small", "mean", (7,), numpy=4.0), row("small", "var", numpy=9.0)]
    good = verdict(rows, "small", "mean", "numpy")
    assert (good.ok, good.geometric, good.worst, good.below) == (True, pytest.approx(2.0), 1.0, [])
    rows.append(row("small", "mean", (8,), numpy=0.5))  # one that loses, though the mean is good
    bad = verdict(rows, "small", "mean", "numpy")
    assert not bad.ok
    assert bad.geometric > bad.bound.geometric
    assert bad.below == rows[-1:]
    slow = [row("middle", "var", numpy=2.0), row("middle", "std", (9,), numpy=2.5)]  # none below 1.5, but the mean
    assert not verdict(slow, "middle", "var", "numpy").ok
    assert verdict(slow, "middle", "var", "numpy").below == []
    assert verdict([row("integers", "var", numpy=3.0)], "integers", "var", "numpy").below  # nothing is asked of each


def test_kinds_of_functions():
    for function, kind in {"mean": "mean", "var": "var", "std": "var", "mean_var": "var"}.items():
        rows = [row("large", function, numpy=10.0)]
        assert verdict(rows, "large", kind, "numpy").ok
        assert verdict(rows, "large", {"mean": "var", "var": "mean"}[kind], "numpy") is None
    assert verdict([row("nan", "nanstd", bottleneck=2.0)], "nan", "any", "bottleneck").ok is False


def test_limits_of_some_rows_alone():
    assert not verdict([row("slices", "mean", by_plain=True, plain=0.7)], "slices", "any", "plain").ok
    assert verdict([row("slices", "mean", plain=0.7)], "slices", "any", "plain") is None
    assert verdict([row("where", "mean", by_plain=True, plain=0.7)], "where", "any", "plain").ok
    assert not verdict([row("large", "mean", reading=0.8)], "large", "any", "reading").ok
    assert verdict([row("dtype", "mean", reading=0.1)], "large", "any", "reading") is None
    assert not verdict([row("dtype", "mean", memory=0.03)], "any", "any", "memory").ok
    assert verdict([row("dtype", "mean", memory=0.01)], "any", "any", "memory").ok
    assert verdict([row("dtype", "mean", (1000,), memory=0.5)], "any", "any", "memory") is None


def test_what_misses_by_little_is_measured_again():
    """Only what misses each time counts; what is far away, and memory, is not waited for."""
    rows = [
        row("large", "mean", (n,), numpy=figure)
        for n, figure in ((20_000_001, 0.9), (20_000_002, 0.9), (20_000_003, 0.3))
    ]
    rows += [row("large", "mean", (20_000_004,), numpy=2.0, memory=0.03)]
    answers = {rows[0].key: [0.8, 0.97], rows[1].key: [0.94, 0.7]}
    found, count = statistics.settled(rows, lambda old: old._replace(figures={"numpy": answers[old.key].pop(0)}))
    assert [r.figures["numpy"] for r in found] == [0.97, 0.94, 0.3, 2.0]
    assert count == 2
    assert not any(answers.values())


def test_the_better_of_two_measurements():
    a, b = row("large", "mean", numpy=1.0, memory=0.1), row("large", "mean", numpy=2.0, memory=0.2)
    b = b._replace(seconds={"fastbn": 0.5, "numpy": 3.0})
    assert a.or_better(b) == a._replace(seconds={"fastbn": 0.5, "numpy": 1.0}, figures={"numpy": 2.0, "memory": 0.1})
    failed = a._replace(error="TypeError: no", figures={})
    assert a.or_better(failed) == a
    assert failed.or_better(a) == failed


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def quick(monkeypatch):
    """All cases shrunk, timed once."""
    monkeypatch.setattr(statistics, "CASES", SMALL)
    monkeypatch.setattr(statistics, "ROUNDS", 1)
    monkeypatch.setattr(statistics, "SECONDS", 0.0)
    monkeypatch.setattr(statistics, "AGAIN", 1)
    monkeypatch.setattr(turns, "BURST_SECONDS", 0.0)


@pytest.fixture
def timed(quick, monkeypatch):
    """Figures without measuring: fastbn's speed is what `speeds` says of a row, 100 else."""
    speeds = {}

    def measured(case, *_):
        for function in case.functions:
            if hasattr(fastbn, function):
                speed = speeds.get((case.name, function), 100.0)
                if isinstance(speed, str):
                    yield statistics.Row(case, function, 100, error=speed)
                else:
                    yield statistics.Row(case, function, 100, {"fastbn": 1e-5, "numpy": 1e-3}, {"numpy": speed})

    monkeypatch.setattr(statistics, "measured", measured)
    return speeds


def test_a_miss_is_the_status(timed, capsys):
    assert statistics.main([]) == 0
    assert "MISSED" not in capsys.readouterr().out
    case = next(case for case in SMALL if case.group == "middle")
    timed[case.name, "mean"] = 0.5
    assert statistics.main([]) == 1
    lines = capsys.readouterr().out.splitlines()
    (missed,) = (i for i, line in enumerate(lines) if line.endswith("MISSED"))
    assert lines[missed].split()[:2] == ["middle", "mean"]
    assert lines[missed + 1] == f"    0.5  mean {case.name}"
    assert statistics.main(["--group", "small", "--group", "large"]) == 0
    timed[case.name, "mean"] = "TypeError: no"
    assert statistics.main([]) == 1
    assert f"FAILED mean {case.name}: TypeError: no" in capsys.readouterr().out


def test_functions_that_fastbn_has_not(timed, monkeypatch, capsys):
    monkeypatch.setattr(statistics, "fastbn", types.SimpleNamespace(mean=fastbn.mean, __version__="0"))
    assert statistics.main(["--short"]) == 0
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("not measured")]
    names = {name for case in statistics.chosen([], True) for name in case.functions} - {"mean"}
    assert notes == [f"not measured, since fastbn has no {', '.join(sorted(names))}"]


def test_a_short_run_has_some_of_every_group():
    short = statistics.chosen([], True)
    assert {case.group for case in short} == set(GROUPS)
    assert len(short) < 0.45 * len(CASES)
    assert statistics.chosen([], False) == list(CASES)


def test_a_run(quick, monkeypatch, tmp_path, capsys):
    """Every group's first rows as they are measured, their file and their tables."""
    monkeypatch.setattr(statistics, "LARGE", 1000)
    monkeypatch.setattr(statistics, "WATCHED", 1000)
    monkeypatch.setattr(statistics, "SHORT_STEP", 10)
    monkeypatch.setattr(statistics, "SHORT_ROUNDS", 1)
    monkeypatch.setattr(statistics, "SHORT_SECONDS", 0.0)
    written = tmp_path / "run.json"
    status = statistics.main(["--short", "--markdown", "--json", str(written)])
    printed, data = capsys.readouterr().out, json.loads(written.read_text())
    assert status == int(not all(bound["ok"] for bound in data["bounds"]) or any(r["error"] for r in data["rows"]))
    assert data["environment"]["versions"]["numpy"] == np.__version__
    assert not any(row["error"] for row in data["rows"])
    cases = statistics.chosen([], True)
    assert [(r["case"], r["function"]) for r in data["rows"]] == [
        (case.name, function) for case in cases for function in case.functions if hasattr(fastbn, function)
    ]
    for found in data["rows"]:
        assert found["figures"]["numpy"] > 0
        assert ("reading" in found["figures"]) == ("memory" in found["figures"]) == (found["nbytes"] >= 1000)
    for case in cases:
        assert (f"| `{case.name}` |" in printed) == any(hasattr(fastbn, name) for name in case.functions)
    assert "reading speed: " in printed


def test_what_a_call_raises_is_a_row(quick, monkeypatch):
    def fail(*_, **__):
        raise TypeError("not of these")

    monkeypatch.setattr(statistics, "fastbn", types.SimpleNamespace(mean=fail))
    monkeypatch.setattr(statistics_cases, "fastbn", types.SimpleNamespace(mean=fail))
    (found,) = statistics.measured(SMALL[0], CACHE, 1, 0.0, None)
    assert found.error == "TypeError: not of these"


# --- the sweep --------------------------------------------------------------------------------------------------------


def curve(*values, sweep="size", at=(1000, 2000, 4000), theirs=1.0):
    of = statistics_sweep.Curve(sweep, "mean", "inner", "float32")
    return [statistics_sweep.Point(of, n, value, theirs) for n, value in zip(at, values, strict=True)]


def test_cliffs():
    assert statistics_sweep.cliffs(curve(1.0, 0.5, 0.25)) == []  # a fixed cost over more bytes
    assert statistics_sweep.cliffs(curve(0.25, 0.3, 0.4)) == []
    (rise,) = statistics_sweep.cliffs(curve(0.25, 0.25, 0.5))
    assert (rise.before.at, rise.after.at, rise.ours, rise.theirs) == (2000, 4000, 2.0, 1.0)
    (fall,) = statistics_sweep.cliffs(curve(1.0, 0.25, 0.2))  # twice the bytes in half the time
    assert (fall.before.at, fall.ours) == (1000, pytest.approx(2.0))
    (row,) = statistics_sweep.cliffs(curve(0.5, 0.2, 0.2, sweep="row length", at=(31, 32, 33)))
    assert "mean inner float32, row length 31 to 32: 0.5 to 0.2 ns/byte, 2.4 times (1.0 NumPy's)" in str(row)
    both = curve(1.0, 1.0, 1.0) + curve(9.0, 9.0, 9.0, sweep="row length")
    assert statistics_sweep.cliffs(both) == []  # curves are not neighbours


def test_what_looks_like_a_cliff_is_measured_again(monkeypatch):
    """A point that another process has met, and one that is slow."""
    asked = []

    def measured(curve, at, most, rounds):
        asked.append((at, rounds))
        return statistics_sweep.Point(curve, at, 1.0 if at == 2000 else 5.0, 9.0)

    monkeypatch.setattr(statistics_sweep, "measured", measured)
    found = curve(1.0, 3.0, 1.0, 1.0, 4.0, at=(1000, 2000, 4000, 8000, 16_000))
    again = statistics_sweep.confirmed(found, 16_000)
    assert [point.ours for point in again] == [1.0, 1.0, 1.0, 1.0, 4.0]
    assert all(point.theirs == 1.0 for point in again)
    first, second = statistics_sweep.AGAIN
    assert sorted(asked) == sorted(
        [(at, first) for at in (1000, 2000, 8000, 16_000)] + [(at, second) for at in (8000, 16_000)]
    )


def test_a_sweep(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(turns, "BURST_SECONDS", 0.0)
    monkeypatch.setattr(statistics_sweep, "ROUNDS", 1)
    monkeypatch.setattr(statistics_sweep, "SECONDS", 0.0)
    monkeypatch.setattr(statistics_sweep, "SIZE", 40_000)
    monkeypatch.setattr(statistics_sweep, "LENGTHS", (1, 2, 3, 10, 30, 100))
    picture, written = tmp_path / "sweep.png", tmp_path / "sweep.json"
    assert (
        statistics.main(["--sweep", "--short", "--most", "9e3", "--picture", str(picture), "--json", str(written)]) == 0
    )
    points = json.loads(written.read_text())["points"]
    assert len(points) == 3 * 2 * 2 * (2 + 2)  # dtypes, functions, reductions, sizes and lengths
    arrays = [
        statistics_sweep.array(statistics_sweep.Curve("size", "mean", kind, "float64"), 8000, 9000)
        for kind in statistics_sweep.REDUCTIONS
    ]
    assert [x.shape for x in arrays] == [(1000,), (15, 64)]
    assert {p["at"] for p in points if p["sweep"] == "size"} == {1000, 8000}
    assert all(p["ours"] > 0 and p["theirs"] > 0 for p in points)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "cliffs: " in capsys.readouterr().out
    with pytest.raises(SystemExit):
        statistics.main(["--picture", str(picture)])
