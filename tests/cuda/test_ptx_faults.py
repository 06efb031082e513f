"""Faults put into the kernels' text: compiled, each must be noticed too, by the run that `tests.cuda.faults` names.

A few by default, all as slow tests: each is a compilation.
"""

import functools

import pytest

from tests.conftest import missing
from tests.cuda.faults import FAULTS, changed
from tests.cuda.runs import RUNS
from tests.ptx import cuda, mutations
from tests.ptx.text import PtxError

BY_DEFAULT = 48  # each so-manieth
ORDERS = range(4)


def cases():
    for i, fault in enumerate(FAULTS):
        architecture = 90 if RUNS[fault.run].strategy == "cluster" or i % 2 else 80
        marks = [] if i % BY_DEFAULT == 0 else [pytest.mark.slow]
        yield pytest.param(architecture, fault, marks=marks, id=f"sm_{architecture}-{fault.kernel}: {fault.name}")


@pytest.mark.parametrize(("architecture", "fault"), list(cases()))
def test_fault_is_found(request, architecture, fault):
    if (reason := cuda.available()) is not None:
        missing(request, reason)
    run = RUNS[fault.run]
    change = functools.partial(changed, fault)
    with cuda.installed(architecture, **mutations.settings_of(run), change_source=change) as driver:
        for schedule in ORDERS:
            try:
                run(driver, schedule)
            except (AssertionError, PtxError):
                return
    pytest.fail(f"{fault.run}: passes")
