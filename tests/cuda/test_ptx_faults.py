"""Faults put into the kernels' text: compiled, each must be noticed too, by the run that `tests.cuda.faults` names.

A few by default, all as slow tests: each is a compilation.
"""

import pytest

from tests.conftest import missing
from tests.cuda.faults import FAULTS, MEMORY_FAULTS, changed
from tests.cuda.memory_faults import CACHE
from tests.cuda.runs import RUNS
from tests.ptx import cuda, mutations
from tests.ptx.text import PtxError

BY_DEFAULT = 48  # each so-manieth
ORDERS = range(4)
EVERY = [*FAULTS, *(fault for fault in MEMORY_FAULTS if fault.rule != CACHE)]  # PTX itself allows the others


def cases():
    for i, fault in enumerate(EVERY):
        architecture = 90 if RUNS[fault.run].strategy == "cluster" or i % 2 else 80
        marks = [] if i % BY_DEFAULT == 0 else [pytest.mark.slow]
        yield pytest.param(architecture, fault, marks=marks, id=f"sm_{architecture}-{fault.kernel}: {fault.name}")


@pytest.mark.parametrize(("architecture", "fault"), list(cases()))
def test_fault_is_found(request, architecture, fault):
    if (reason := cuda.available()) is not None:
        missing(request, reason)
    run = RUNS[fault.run]

    def change(kernel, source):  # with the headers in it
        return changed(fault, fault.kernel, source) if fault.kernel in (kernel, "device.cuh") else source

    with cuda.installed(architecture, **mutations.settings_of(run), change_source=change) as driver:
        for schedule in ORDERS:
            try:
                run(driver, schedule)
            except (AssertionError, PtxError):
                return
    pytest.fail(f"{fault.run}: passes")
