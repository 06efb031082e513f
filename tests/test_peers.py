"""The measurement of `benchmarks/peers.py`: its limit's rule, its targets, its files."""

import json

import pytest

from fastbn import environment

peers = pytest.importorskip("benchmarks.peers", reason="installed without the benchmarks")


@pytest.mark.parametrize(
    ("shape", "layout", "what", "passes"),
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
    ],
)
def test_trips_over_memory(monkeypatch, shape, layout, what, passes):
    monkeypatch.setattr(environment, "core_cache", lambda: 512 << 10)
    assert peers.passes_at_best(shape, 4, layout, what) == passes


def test_a_run_writes_what_the_readme_shows(tmp_path, capsys):
    recorded, picture = tmp_path / "run.json", tmp_path / "run.png"
    operations = [word for what in ("forward", "backward", "inference") for word in ("--operation", what)]
    arguments = [*operations, "--shape", "32,64,14,14", "--dtype", "float32", "--rounds", "1"]
    status = peers.main([*arguments, "--json", str(recorded), "--picture", str(picture)])
    data = json.loads(recorded.read_text())
    assert len(data["cases"]) == 6
    assert status == int(not all(target["ok"] for target in data["targets"]))
    for case in data["cases"]:
        assert case["of_limit"] == pytest.approx(case["seconds"]["fastbn_out"] / case["limit"])
    assert picture.read_bytes().startswith(b"\x89PNG")
    capsys.readouterr()
    assert peers.main(["--readme", str(recorded)]) == 0
    assert "| 32x64x14x14 |" in capsys.readouterr().out
