"""Faults put into the CUDA kernels, one at a time, each with the run that must find it.

`python -m tests.cuda.faults` prints which check found what, of faults with all words that are given.
"""

import functools
import sys

from tests.cuda import forward_faults, gradient_faults
from tests.cuda.fault import Fault
from tests.cuda.runs import RUNS
from tests.simt import cuda, simt

MOST_SCHEDULES = range(200)  # until one shows a fault: some need a rare order

FAULTS = [*forward_faults.FAULTS, *gradient_faults.FAULTS]


def changed(fault: Fault, kernel: str, text: str) -> str:
    if kernel != fault.kernel:
        return text
    if text.count(fault.text) != 1:
        raise LookupError(f"{fault.name}: {text.count(fault.text)} times in {kernel}: {fault.text!r}")
    return text.replace(fault.text, fault.wrong)


def found(fault: Fault) -> tuple[int, Exception] | None:
    """The first schedule that shows it, and how."""
    run = RUNS[fault.run]
    with run.device(change=functools.partial(changed, fault)) as emulated:
        for schedule in MOST_SCHEDULES:
            try:
                run(emulated, schedule)
            except (AssertionError, simt.SimtError) as error:  # a text that does not compile is another error
                return schedule, error
    return None


def main() -> None:
    if reason := cuda.available():
        raise SystemExit(reason)
    for fault in FAULTS:
        if not all(word in f"{fault.kernel} {fault.name}" for word in sys.argv[1:]):
            continue
        how = "NOT FOUND"
        if result := found(fault):
            first = next(iter(str(result[1]).strip().splitlines()), type(result[1]).__name__)
            how = f"{fault.run} | schedule {result[0]} | {first[:100]}"
        print(f"{fault.kernel} | {fault.name} | {how}", flush=True)


if __name__ == "__main__":
    main()
