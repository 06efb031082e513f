"""What would go wrong unseen: tests shared among workers so that both compile the same kernels."""

import os
import sys
from pathlib import Path

import pytest

from tests import interpreters

TESTS = """
import os, pathlib, time, pytest

@pytest.mark.parametrize("i", range(5))
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_something(dtype, i):
    time.sleep(0.01)
    name = f"{pathlib.Path(__file__).stem} {dtype} {os.environ['PYTEST_XDIST_WORKER']}"
    pathlib.Path(__file__).with_name(name).touch()
"""


def test_tests_of_a_file_and_dtype_go_to_one_worker(tmp_path):
    pytest.importorskip("xdist")
    (tmp_path / "conftest.py").write_text("from tests.conftest import pytest_xdist_make_scheduler")
    for name in ("test_one.py", "test_two.py"):
        (tmp_path / name).write_text(TESTS)
    command = [sys.executable, "-m", "pytest", "-q", "-n", "2", "-c", os.devnull, "-p", "no:cacheprovider"]
    interpreters.run(
        [*command, "--rootdir", tmp_path, tmp_path],
        without=["PYTEST_*"], cwd=tmp_path, timeout=100, PYTHONPATH=Path(__file__).parents[2],
    )  # fmt: skip
    ran = [path.name.split() for path in tmp_path.iterdir() if path.name.startswith("test_") and not path.suffix]
    assert len(ran) == 6
    assert {worker for *_, worker in ran} == {"gw0", "gw1"}
