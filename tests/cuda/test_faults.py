"""Faults put into the CUDA kernels, one at a time: a check must find each, and pass without it."""

from collections.abc import Iterable

import pytest

from tests.conftest import missing
from tests.cuda.faults import FAULTS, MEMORY_FAULTS, found
from tests.cuda.runs import RUNS, Run
from tests.simt import cuda

SCHEDULES = range(6)  # of the kernels as they are


@pytest.fixture(autouse=True)
def harness(request):
    reason = cuda.available()
    if reason is not None:
        missing(request, reason)


def assert_right(run: Run, schedules: Iterable[int]) -> None:
    with run.device() as emulated:
        for schedule in schedules:
            run(emulated, schedule)


@pytest.mark.parametrize("name", RUNS)
def test_without_a_fault(name):
    assert_right(RUNS[name], SCHEDULES)


@pytest.mark.parametrize("fault", FAULTS, ids=[f"{f.kernel}: {f.name}" for f in FAULTS])
def test_fault_is_found(fault):
    result = found(fault)
    assert result is not None, f"{fault.run}: passes"
    assert_right(RUNS[fault.run], result[:1])


def test_every_run_finds_something():
    assert {fault.run for fault in FAULTS + MEMORY_FAULTS} == RUNS.keys()
