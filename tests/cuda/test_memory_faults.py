"""The CUDA kernels under PTX's model of memory: as they are, and with faults in what orders memory between threads."""

import itertools
import re

import pytest

from tests.conftest import missing
from tests.cuda import statistics_faults
from tests.cuda.fault import Fault
from tests.cuda.faults import FAULTS, MEMORY_FAULTS, found
from tests.cuda.memory_faults import RACE
from tests.cuda.runs import RUNS
from tests.simt import cuda
from tests.simt.programs import SANITIZED
from tests.support import some_slow

MODELS = ("checked", "stale")
NEEDED = {fault.run for fault in MEMORY_FAULTS}
BARRIERS = [name for name in statistics_faults.FAULTS if name.startswith("barrier")]
TOO_LATE = ("block: sums of the next piece",)  # reads after the next write, which no old value shows


@pytest.fixture(autouse=True)
def harness(request):
    if SANITIZED:
        pytest.skip("accesses are announced to one sanitizer alone")
    reason = cuda.available()
    if reason is not None:
        missing(request, reason)


BY_TURNS = [(name, MODELS[i % len(MODELS)]) for i, name in enumerate(sorted(NEEDED))]


@pytest.mark.parametrize(
    ("name", "model"),
    [
        pytest.param(name, model, marks=[] if (name, model) in BY_TURNS else pytest.mark.slow)
        for name, model in itertools.product(RUNS, MODELS)
    ],
)
def test_without_a_fault(name, model):
    with RUNS[name].device(model=model) as emulated:
        for schedule in range(4):
            RUNS[name](emulated, schedule)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", some_slow(statistics_faults.FAULTS, BARRIERS[:1]))
def test_statistics_without_a_fault(name, model):
    assert statistics_faults.failures_without(name, model) == []


QUICK = {(fault.kernel, fault.rule): fault for fault in MEMORY_FAULTS}
"""One of each kernel and rule."""


@pytest.mark.parametrize(
    "fault", some_slow(MEMORY_FAULTS, QUICK.values()), ids=[f"{f.run}: {f.name}" for f in MEMORY_FAULTS]
)
def test_fault_is_refused(fault):
    """And gives wrong results, or none, where threads see old values: but for rules that are stricter than PTX."""
    refused = [found(fault, "checked", [schedule]) for schedule in range(4)]
    assert all(result is not None for result in refused), f"{fault.run}: passes, or depends on the order of threads"
    assert f": {fault.rule}: block" in str(refused[0][1])
    shown = found(fault, "stale") is not None
    assert shown == (fault.rule == RACE and fault.name not in TOO_LATE)


@pytest.mark.parametrize("name", BARRIERS)
def test_fault_of_statistics_is_refused(name):
    assert ": race: block" in statistics_faults.found(name, "checked")


# --- nothing is left out ----------------------------------------------------------------------------------------------

ORDERS_MEMORY = re.compile(
    r"__syncthreads\(\)|__syncwarp\(|__threadfence\w*\(\)|atomic\w+\(|volatile \w+\*|cluster_barrier\(\);|"
    r"group_barrier\(p, |\.(?:release|acquire)"
)
LAST_OF_A_PIECE = "threadIdx.x]);\n    __syncthreads();  // the next merge of a single warp"


def removals():
    """Kernels, texts of theirs, and what stands in the place of these."""
    yield from ((fault.kernel, fault.text, fault.wrong) for fault in FAULTS + MEMORY_FAULTS)
    yield from (("strided_statistics", text, wrong) for text, wrong, *_ in statistics_faults.FAULTS.values())
    yield "forward", LAST_OF_A_PIECE, LAST_OF_A_PIECE.replace("__syncthreads();", "")


def test_all_that_orders_memory_has_a_fault():
    """Each barrier, fence, atomic and volatile access is taken away or weakened once."""
    from fastbn.cuda import launch

    files = [file for folder in (launch.KERNELS, launch.INCLUDE) for file in folder.iterdir()]
    places = 0
    for file in files:
        text = file.read_text()
        mine = [
            (text.find(part), part, wrong)
            for kernel, part, wrong in removals()
            if part in text and (kernel == file.name or f'"{file.name}"' in launch.source(kernel))
        ]
        for match in ORDERS_MEMORY.finditer(text):
            what, line = match[0], text.count("\n", 0, match.start()) + 1
            assert any(
                at <= match.start() and match.end() <= at + len(part) and wrong.count(what) < part.count(what)
                for at, part, wrong in mine
            ), f"{file.name}:{line}: {what}"
            places += 1
    assert places > 20


@pytest.mark.parametrize("run", ["forward, cooperative", "forward, cluster, columns"])
def test_a_barrier_that_orders_nothing(run):
    """Threads read the results of a piece where they themselves write those of the next."""
    fault = Fault("", "forward", LAST_OF_A_PIECE, LAST_OF_A_PIECE.replace("__syncthreads();", ""), run)
    assert found(fault, "checked", range(3)) is None
