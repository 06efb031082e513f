"""The command that measures calls on small CuPy arrays runs, and says when a goal is missed."""

import pytest

from benchmarks import small_cupy
from tests.conftest import missing
from tests.simt import cuda


@pytest.fixture(autouse=True)
def few_rounds(request, monkeypatch):
    if reason := cuda.available():
        missing(request, reason)
    monkeypatch.setattr(small_cupy, "ROUNDS", 1)
    monkeypatch.setattr(small_cupy, "BURST", 2)


@pytest.mark.parametrize(("add", "status"), [(1e-9, 0), (1e9, 1)])
def test_the_table(monkeypatch, capsys, add, status):
    """On a machine on which every goal is far away, and on one of which a call may take nothing."""
    monkeypatch.setattr(small_cupy, "ADD", add)
    if status:
        found = small_cupy.rows
        monkeypatch.setattr(small_cupy, "rows", lambda: {n: row._replace(us=0) for n, row in found().items()})
    assert small_cupy.main() == status
    _, _, _, _, *lines = capsys.readouterr().out.splitlines()
    cells = {name: rest for _, name, *rest, _ in (map(str.strip, line.split("|")) for line in lines)}
    assert {name: int(count) for name, (_, count, _) in cells.items()} == {
        "batch_norm": 2, "batch_norm, out": 1, "batch_norm, running": 2, "batch_norm_backward": 2,
        "batch_norm_backward, out": 1,
        "batch_norm_inference": 1, "update_running": 2, "update_running, out": 0, "moments": 1, "normalize": 1,
        "grad_sums": 1,
    }  # fmt: skip
    assert all(("MISSED" in wanted) == bool(status) for _, _, wanted in cells.values())
    assert all(float(us) > 0 for us, _, _ in cells.values())
