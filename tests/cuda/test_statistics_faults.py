"""Faults put into the kernels of statistics, one at a time: exact arithmetic must find each, and pass without it."""

import pytest

from tests.conftest import missing
from tests.cuda import statistics_faults
from tests.simt import cuda
from tests.support import some_slow


@pytest.mark.parametrize("name", some_slow(statistics_faults.FAULTS, [*statistics_faults.FAULTS][::10]))
def test_faults_are_found(request, name):
    if (reason := cuda.available()) is not None:
        missing(request, reason)
    assert statistics_faults.failures_without(name) == []
    failure = statistics_faults.found(name)
    assert failure is not None
    assert "does not compile" not in failure
