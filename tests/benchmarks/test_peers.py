"""The measurement of `benchmarks/peers.py`: its targets, its files."""

import json

import pytest

peers = pytest.importorskip("benchmarks.peers", reason="installed without the benchmarks")


def test_a_run_writes_what_the_documentation_shows(tmp_path, capsys):
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
    assert peers.main(["--markdown", str(recorded)]) == 0
    assert "| 32x64x14x14 |" in capsys.readouterr().out
