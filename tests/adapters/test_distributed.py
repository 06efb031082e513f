"""`fastbn.distributed`: real processes over MPI, and what hooks are given where they are wrong."""

import shutil
import sys
import types
from pathlib import Path

import numpy as np
import pytest

import fastbn
from fastbn.distributed import mpi_gather, nccl_gather, torch_gather
from tests import interpreters
from tests.adapters.ranks import SIZES, data, results

ROOT = Path(__file__).parents[2]
DTYPES = ("float32", "float64", "float16")

PROGRAM = """
import sys
import numpy as np
from mpi4py import MPI
import fastbn
from fastbn.distributed import mpi_gather
from tests.adapters.ranks import SIZES, data, results

rank, gather = MPI.COMM_WORLD.rank, mpi_gather(MPI.COMM_WORLD)
for dtype in sys.argv[2:]:
    mine = slice(sum(SIZES[:rank]), sum(SIZES[: rank + 1]))
    x, dy, gamma, beta = data(dtype)
    np.savez(f"{sys.argv[1]}/{dtype}-{rank}", *results(x[mine], dy[mine], gamma, beta, gather))
"""


@pytest.fixture(scope="module")
def mpirun():
    """The command for so many ranks on this machine's cores."""
    pytest.importorskip("mpi4py", reason="needs mpi4py and an MPI: pip install mpi4py mpich")
    program = Path(sys.executable).with_name("mpirun")
    found = str(program) if program.exists() else shutil.which("mpirun")
    if found is None:
        pytest.skip("no mpirun: pip install mpich, or Debian's openmpi-bin")

    def run(ranks, *arguments):
        environment = {
            "OMPI_ALLOW_RUN_AS_ROOT": 1, "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": 1, "NUMBA_NUM_THREADS": 1,
            "PYTHONPATH": ROOT, "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
        }  # fmt: skip
        return interpreters.run([found, "-n", ranks, sys.executable, *arguments], cwd=ROOT, **environment)

    return run


def test_ranks_of_mpi_are_one_process(mpirun, tmp_path):
    """Uneven parts, one of them empty. Statistics have the bits of the parts merged in order, on every rank."""
    mpirun(len(SIZES), "-c", PROGRAM, str(tmp_path), *DTYPES)
    for dtype in DTYPES:
        x, dy, gamma, beta = data(dtype)
        ranks = []
        for rank in range(len(SIZES)):
            with np.load(tmp_path / f"{dtype}-{rank}.npz") as file:
                ranks.append([file[f"arr_{i}"] for i in range(len(file.files))])
        parts = np.split(x, np.cumsum(SIZES)[:-1])
        merged = fastbn.merge(*(fastbn.moments(part) for part in parts))
        whole = results(x, dy, gamma, beta, None)
        for rank in ranks:
            np.testing.assert_array_equal(rank[4], merged.mean)
            np.testing.assert_array_equal(rank[5], merged.m2)
            for values, expected in zip(rank[6:], ranks[0][6:], strict=True):
                np.testing.assert_array_equal(values, expected)
        joined = [np.concatenate([r[i] for r in ranks]) for i in (0, 1)] + [sum(r[i] for r in ranks) for i in (2, 3)]
        precision, single = np.finfo(dtype).eps, np.finfo(np.result_type(dtype, np.float32)).eps
        for values, expected in zip([*joined, *ranks[0][4:]], whole, strict=True):
            # dx is a difference of numbers as large as dy, of which the rounding of either sum moves the last bits.
            array = values.ndim > 1
            rounded = (
                precision * np.abs(dy).max().astype(np.float64) if array else single * np.abs(dy).sum((0, 2, 3)).max()
            )
            assert np.abs(values.astype(np.float64) - expected.astype(np.float64)).max() <= 2 * rounded


def test_training_over_mpi(mpirun):
    pytest.importorskip("sklearn")
    printed = mpirun(4, "examples/mpi_training.py", "--quick")
    assert "4 ranks with [30, 20, 10, 0] of 60 images" in printed
    assert "ranks with the same bits: 4" in printed
    difference = float(printed.split("largest weight: ")[1].split()[0])
    assert difference < 1e-5


# --- hooks ------------------------------------------------------------------------------------------------------------


def test_an_mpi_communicator():
    asked = []

    def exchange(vector, rows):
        asked.append(vector)
        rows[...] = [vector, 2 * vector]

    communicator = types.SimpleNamespace(Get_size=lambda: 2, Allgather=exchange)
    rows = mpi_gather(communicator)(np.arange(3.0))
    np.testing.assert_array_equal(rows, [[0, 1, 2], [0, 2, 4]])
    assert len(asked) == 1


@pytest.mark.parametrize("make", [mpi_gather, lambda c: nccl_gather(c, 2)])
def test_other_communicators(make):
    with pytest.raises(TypeError, match="communicator: expected a"):
        make(3)


def test_no_process_group():
    pytest.importorskip("torch")
    with pytest.raises(RuntimeError, match="torch_gather: expected a process group"):
        torch_gather()


def test_no_torch(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ImportError, match=r"torch_gather needs PyTorch: pip install \"torch>=2.6\""):
        torch_gather()
