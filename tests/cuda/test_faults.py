"""Faults put into the CUDA kernels, one at a time: a check must find each, and pass without it."""

from collections.abc import Iterable

import pytest

from tests.conftest import missing
from tests.cuda.faults import FAULTS, MEMORY_FAULTS, found
from tests.cuda.runs import RUNS, Run
from tests.simt import cuda
from tests.support import some_slow

SCHEDULES = [range(2), pytest.param(range(2, 6), marks=pytest.mark.slow)]  # of the kernels as they are


@pytest.fixture(autouse=True)
def harness(request):
    reason = cuda.available()
    if reason is not None:
        missing(request, reason)


def assert_right(run: Run, schedules: Iterable[int]) -> None:
    with run.device() as emulated:
        for schedule in schedules:
            run(emulated, schedule)


@pytest.mark.parametrize("schedules", SCHEDULES, ids=str)
@pytest.mark.parametrize("name", some_slow(RUNS, [*RUNS][::2]))
def test_without_a_fault(name, schedules):
    assert_right(RUNS[name], schedules)


OF_RUNS, OF_KERNELS = (
    [*{key(fault): fault for fault in FAULTS}.values()] for key in (lambda f: f.run, lambda f: f.kernel)
)
QUICK = [*OF_RUNS[::3], *OF_KERNELS]
"""One of every third run, and one of each kernel."""


@pytest.mark.parametrize("fault", some_slow(FAULTS, QUICK), ids=[f"{f.kernel}: {f.name}" for f in FAULTS])
def test_fault_is_found(fault):
    result = found(fault)
    assert result is not None, f"{fault.run}: passes"
    assert_right(RUNS[fault.run], result[:1])


def test_every_run_finds_something():
    assert {fault.run for fault in FAULTS + MEMORY_FAULTS} == RUNS.keys()
