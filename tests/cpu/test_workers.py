"""What would go wrong unseen: tests shared among workers so that both compile the same kernels."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

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
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    command = [sys.executable, "-m", "pytest", "-q", "-n", "2", "-c", os.devnull, "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, "--rootdir", str(tmp_path), str(tmp_path)],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    ran = [path.name.split() for path in tmp_path.iterdir() if path.name.startswith("test_") and not path.suffix]
    assert len(ran) == 6
    assert {worker for *_, worker in ran} == {"gw0", "gw1"}
