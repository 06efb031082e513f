"""python -m fastbn: every command runs, its JSON is JSON, and a wrong kernel makes it fail."""

import json
import os
import sys

import numpy as np
import pytest

import fastbn
from fastbn import bench, check, cpu, environment, warmup
from fastbn.__main__ import COMMANDS, main
from tests import interpreters
from tests.wrong_backends import broken, use, written

SHAPE = "4,64,14,14"


@pytest.fixture(autouse=True)
def few_buffers(monkeypatch):
    """Measurements that nobody reads need not come from memory."""
    monkeypatch.setattr(bench, "BUFFERS", 4)


@pytest.fixture(autouse=True)
def two_dtypes(monkeypatch):
    """Every dtype's kernels are compiled elsewhere; here that would double the time of a first run."""
    monkeypatch.setattr(check, "float_dtypes", lambda: {name: np.dtype(name) for name in ("float16", "float32")})


@pytest.fixture
def all_dtypes(monkeypatch, two_dtypes):
    monkeypatch.setattr(check, "float_dtypes", environment.float_dtypes)


def run(capsys, *argv):
    status = main(argv)
    return status, capsys.readouterr().out


def run_json(capsys, *argv):
    status, out = run(capsys, *argv, "--json")
    return status, json.loads(out)


def test_info(capsys):
    status, found = run_json(capsys, "info")
    assert status == 0
    assert set(found["versions"]) == {"fastbn", "python", "numpy", "numba", "llvmlite"}
    assert found["backends"]["numpy"] == "ready"
    assert found["dtypes"] == ["float16", "float32", "float64", "bfloat16"]
    assert found["threads"] >= 1
    assert found["cpu"]
    status, out = run(capsys, "info")
    assert status == 0
    assert found["cpu"] in out
    assert str(found["kernel_cache"]) in out


def test_cupy_is_imported_only_if_installed(capsys, monkeypatch):
    monkeypatch.setattr(environment.importlib.util, "find_spec", lambda name: None if name == "cupy" else object())
    assert environment.backend_state("cupy") == "not installed"
    monkeypatch.setattr(environment.importlib.util, "find_spec", lambda name: object())

    def no_driver(kind):
        raise RuntimeError("no NVIDIA driver")

    monkeypatch.setattr(environment.backend, "backend_of", no_driver)
    assert environment.backend_state("cupy") == "installed, but not usable: no NVIDIA driver"


def test_module_runs():
    """As a user starts it; and importing fastbn loads none of it."""
    code = "import fastbn, sys; print([m for m in sys.modules if m.startswith(('fastbn.', 'numba'))])"
    loaded = interpreters.run(interpreters.python(code))
    for module in ("__main__", "check", "bench", "environment", "warmup"):
        assert f"fastbn.{module}'" not in loaded
    assert "numpy: ready" in interpreters.run([sys.executable, "-m", "fastbn", "info"], quiet=True)


@pytest.mark.parametrize("command", [None, *COMMANDS])
def test_help(capsys, command):
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"] if command else ["--help"])
    assert stopped.value.code == 0
    out = capsys.readouterr().out
    for text in ["--json", *([] if command else COMMANDS)]:
        assert text in out


@pytest.mark.parametrize(
    "argv", [["nothing"], ["bench", "--shape", "3"], ["bench", "--shape", "3,0"], ["bench", "--dtype", "int8"]]
)
def test_wrong_arguments(capsys, argv):
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    assert stopped.value.code == 2
    assert "usage" in capsys.readouterr().err


# --- check ------------------------------------------------------------------------------------------------------------


def test_check(capsys):
    status, found = run_json(capsys, "check", "--quick")
    assert status == 0
    assert found["ok"] is True
    rows = found["rows"]
    assert {row["group"] for row in rows} == set(check.TITLES)
    assert all(row["ok"] for row in rows)
    names = [row["name"] for row in rows if row["group"] == "oracle"]
    for dtype in check.float_dtypes():
        for layout in check.LAYOUTS:
            for what in bench.PASSES:
                assert any(n.startswith(f"{dtype} {layout} ") and n.endswith(f": {what}") for n in names)


@pytest.mark.slow
def test_check_of_every_dtype(capsys, all_dtypes):
    test_check(capsys)


def test_options_before_the_command_count(capsys):
    assert main(["--json", "--progress", "check", "--quick"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["ok"]
    assert "NumAcc1" in printed.err


@pytest.mark.slow
def test_fused_options_are_checked():
    fused = [job for job in check.jobs("numpy", ["oracle"]) if job.run.args[-1]]
    assert len(fused) == len(check.LAYOUTS)
    assert all(row.ok for job in fused for row in job.run())


@pytest.mark.slow  # compilation
def test_parallel_kernels_are_checked():
    serial, parallel = (len(check.jobs("numpy", ["oracle"], quick=True, parallel=p)) for p in ((), ("float32",)))
    assert parallel == serial + len(check.LAYOUTS)
    last = check.jobs("numpy", ["oracle"], quick=True, parallel=("float32",))[-1]
    assert np.prod(last.run.args[-2]) > cpu.team.PARALLEL_FROM
    assert all(row.ok for row in last.run())


def test_digits_of_known_values():
    exact = check.exact_moments(np.array([10000001.0, 10000003.0, 10000002.0]))
    assert (exact.n, exact.mean, exact.m2, exact.std) == (3, 10000002, 2, 1)
    assert check.digits(1.001, exact.std) == pytest.approx(3)
    assert check.digits(1.0, exact.std) == check.MOST_DIGITS
    assert check.digits(float("nan"), exact.std) == 0


def test_nan_is_never_ok():
    for at_least in (True, False):
        assert not check.Row("nist", "", float("nan"), 1.0, at_least, {}).ok


def scaled(index, by):
    return lambda args, result: tuple(a * (by if i == index else 1) for i, a in enumerate(result))


def nudged(position):
    """The last element of an output is off by a thousandth of itself and a bit: more than a rounding of bfloat16."""

    def change(args, result):
        last = args[position].reshape(-1)[-1:]
        last += np.abs(last) / 64 + np.asarray(0.01, last.dtype)
        return result

    return change


FAULTS = [
    ("nist", "statistic", written(3, 1 + 1e-12)),
    ("nist", "statistic", written(4, 1 + 1e-10)),
    ("offset", "statistic", written(3, 1 + 1e-6)),
    ("offset", "statistic", written(4, 1 + 5e-6)),
    ("statistics", "statistic", written(4, 1 + 1e-10)),
    ("large mean", "moments", scaled(1, 1 + 1e-6)),
    ("large mean", "moments", scaled(2, 1 + 5e-6)),
    ("constant", "forward", nudged(5)),
    ("oracle", "forward", nudged(5)),
    ("oracle", "normalize", nudged(2)),
    ("oracle", "backward", nudged(11)),
    ("oracle", "backward", scaled(0, 1 + 1e-3)),
    ("oracle", "backward", scaled(1, 1 + 1e-3)),
]


@pytest.mark.parametrize(
    ("group", "function", "change"),
    [
        pytest.param(*fault, id="-".join(fault[:2]), marks=[pytest.mark.slow] if fault[0] == "oracle" else [])
        for fault in FAULTS
    ],
)
def test_every_group_rejects_a_wrong_backend(monkeypatch, group, function, change):
    use(monkeypatch, broken(function, change))
    rows = [row for job in check.jobs("numpy", [group], quick=True) for row in job.run()]
    assert any(not row.ok for row in rows)


def test_failure_gives_status_1(monkeypatch, capsys):
    monkeypatch.setattr(check, "TITLES", {"offset": check.TITLES["offset"]})
    assert run(capsys, "check", "--quick")[0] == 0
    use(monkeypatch, broken("statistic", written(3, 1 + 1e-6)))
    status, out = run(capsys, "check", "--quick")
    assert status == 1
    assert "FAILED" in out
    status, found = run_json(capsys, "check", "--quick")
    assert status == 1
    assert found["ok"] is False


def test_says_what_is_left_out(monkeypatch, capsys, all_dtypes):
    monkeypatch.setattr(environment, "optional", lambda name: None)
    monkeypatch.setattr(check, "TITLES", {"constant": check.TITLES["constant"]})
    environment.float_dtypes.cache_clear()
    try:
        status, out = run(capsys, "check", "--quick")
    finally:
        environment.float_dtypes.cache_clear()
    assert status == 0
    assert "left out  bfloat16: ml_dtypes is not installed" in out
    assert "bfloat16 NCHW" not in out


# --- bench, warmup and the main job -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_bench(capsys, dtype):
    status, found = run_json(capsys, "bench", "--quick", "--shape", SHAPE, "--dtype", dtype)
    assert status == 0
    results = found["bench"]
    assert [(r["layout"], r["what"]) for r in results] == [(y, what) for y in check.LAYOUTS for what in bench.PASSES]
    for result in results:
        assert result["shape"] == [4, 64, 14, 14]
        assert result["counted_bytes"] == bench.OPERATIONS[result["what"]] * 4 * 64 * 14 * 14 * np.dtype(dtype).itemsize
        assert result["gb_per_s"] > 0
        assert result["share_of_copy"] > 0
        assert (result["times_numpy"] is None) == (dtype == "bfloat16")


@pytest.mark.parametrize("layout", check.LAYOUTS)
def test_contenders_compute_the_same(layout):
    """Else a faster one would prove nothing."""
    torch = pytest.importorskip("torch")
    data = bench.Buffers((3, 24, 5, 6), "float32", layout)
    data.copy(1)
    np.testing.assert_array_equal(data.out[1], data.x[1])
    for what in bench.OPERATIONS:
        ours = data.ours(what)
        if what == "moments":
            m = ours["fastbn"](1)
            for mean, var in (data.numpys(what)(1), data.torchs(torch, what)(1)[::-1]):
                np.testing.assert_allclose(mean, m.mean, rtol=1e-4, atol=1e-5)
                np.testing.assert_allclose(var, m.var(), rtol=1e-4)
            continue
        calls = {"out": ours["fastbn_out"], "numpy": data.numpys(what), "torch": data.torchs(torch, what)}
        expected = first(ours["fastbn"](1))
        for name, call in calls.items():
            result = first(call(1))
            if name == "torch":
                result = (result if layout == "NCHW" else result.movedim(1, -1)).numpy()
            np.testing.assert_allclose(result, expected, rtol=1e-4, atol=1e-5, err_msg=f"{what} {name}")


def first(result):
    """y or dx of what a pass returns."""
    return result[0] if isinstance(result, tuple) else result


def test_main_job(monkeypatch, capsys):
    monkeypatch.setattr(bench, "RESNET50", ((64, 14, 14),))
    monkeypatch.setattr(bench, "BATCH", 4)
    status, out = run(capsys)
    assert status == 0
    for text in ("numba", "float16 NHWC", "figures, none beyond its bound", "NCHW   4x64x14x14", "geometric mean"):
        assert text in out
    status, found = run_json(capsys)
    assert status == 0
    assert {"environment", "ok", "rows", "bench"} == set(found)


@pytest.mark.slow
def test_warmup(monkeypatch, capsys):
    """Afterwards the same calls compile nothing."""
    monkeypatch.setattr(warmup, "OPTIONS", {"plain": ()})
    status, found = run_json(capsys, "warmup", "--dtype", "float32")
    assert status == 0
    assert found["compiled"] + found["loaded"] > 0
    assert found["calls"] == len(warmup.jobs(["float32"]))
    again = run_json(capsys, "warmup", "--dtype", "float32")[1]
    assert (again["compiled"], again["loaded"]) == (found["compiled"], found["loaded"])
    assert "kernels compiled" in run(capsys, "warmup", "--dtype", "float32")[1]


# --- the command itself -----------------------------------------------------------------------------------------------


def test_version():
    for command in ["-m", "fastbn"], ["-c", "from fastbn.__main__ import run; run()"]:
        assert interpreters.run([sys.executable, *command, "--version"]) == f"fastbn {fastbn.__version__}\n"


@pytest.mark.parametrize(("argument", "name"), [("bin/fastbn", "fastbn"), ("fastbn/__main__.py", "python -m fastbn")])
def test_it_has_the_name_that_it_was_called_by(argument, name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [argument])
    with pytest.raises(SystemExit):
        main(["--help"])
    assert capsys.readouterr().out.startswith(f"usage: {name} [")


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGPIPE")
def test_quiet_where_nobody_reads_on():
    """As under ``| head``: no traceback, and the status that a program has which the signal ends."""
    reads, writes = os.pipe()
    os.close(reads)
    process = interpreters.begin([sys.executable, "-m", "fastbn", "info"], stdout=writes)
    os.close(writes)
    assert interpreters.end(process, returns=141) == [(None, "")]


def test_bfloat16_without_ml_dtypes(monkeypatch, capsys):
    """It says what to install."""
    monkeypatch.setattr(environment, "float_dtypes", lambda: {"float32": np.dtype("float32")})
    for command in "warmup", "bench":
        with pytest.raises(SystemExit):
            main([command, "--dtype", "bfloat16"])
        assert 'bfloat16 needs ml_dtypes: pip install "ml_dtypes>=0.5"' in capsys.readouterr().err
