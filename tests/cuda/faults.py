"""Faults put into the CUDA kernels, one at a time, each with the run that must find it.

`python -m tests.cuda.faults` prints which check found what, of faults with all words that are given: where threads see
at once what others write; where accesses are held against PTX's model of memory; where threads see old values. With
`--markdown` it is a table.
"""

import functools
import sys
from collections.abc import Callable, Iterable
from typing import NamedTuple

from tests.cuda import forward_faults, gradient_faults, memory_faults, running_faults, statistics_faults
from tests.cuda.fault import Fault
from tests.cuda.runs import RUNS
from tests.simt import cuda, simt

MOST_SCHEDULES = range(200)  # until one shows a fault: some need a rare order
SCHEDULES = {None: MOST_SCHEDULES, "checked": range(6), "stale": range(6)}
"""By the model of memory, held against which faults in what orders it are found in any order."""

FAULTS = [*forward_faults.FAULTS, *running_faults.FAULTS, *gradient_faults.FAULTS]
MEMORY_FAULTS = memory_faults.FAULTS


def changed(fault: Fault, kernel: str, text: str) -> str:
    if kernel != fault.kernel:
        return text
    if text.count(fault.text) != 1:
        raise LookupError(f"{fault.name}: {text.count(fault.text)} times in {kernel}: {fault.text!r}")
    return text.replace(fault.text, fault.wrong)


def found(
    fault: Fault, model: str | None = None, schedules: Iterable[int] | None = None
) -> tuple[int, Exception] | None:
    """The first schedule that shows it, and how."""
    run = RUNS[fault.run]
    with run.device(change=functools.partial(changed, fault), model=model) as emulated:
        for schedule in SCHEDULES[model] if schedules is None else schedules:
            try:
                run(emulated, schedule)
            except (AssertionError, simt.SimtError) as error:  # a text that does not compile is another error
                return schedule, error
    return None


# --- the table --------------------------------------------------------------------------------------------------------


class Row(NamedTuple):
    kernel: str
    name: str
    found: Callable[[str | None], str | None]
    """How, where memory is by this model."""


def first_line(error: object) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def found_by_run(fault: Fault, model: str | None) -> str | None:
    result = found(fault, model)
    return result and f"schedule {result[0]}: {first_line(result[1])}"


def rows() -> list[Row]:
    return [
        *(Row(f.kernel, f.name, functools.partial(found_by_run, f)) for f in FAULTS + MEMORY_FAULTS),
        *(
            Row("statistics of arrays", name, functools.partial(statistics_faults.found, name))
            for name in statistics_faults.FAULTS
        ),
    ]


def main() -> None:
    if reason := cuda.available():
        raise SystemExit(reason)
    markdown = "--markdown" in sys.argv[1:]
    words = [word for word in sys.argv[1:] if word != "--markdown"]
    length, counts = 60 if markdown else 110, dict.fromkeys(SCHEDULES, 0)
    chosen = [row for row in rows() if all(word in f"{row.kernel} {row.name}" for word in words)]
    if markdown:
        print("| kernel | fault | at once | checked | stale |\n|---|---|---|---|---|")
    for row in chosen:
        how = {model: row.found(model) for model in SCHEDULES}
        for model, message in how.items():
            counts[model] += message is not None
        shown = (first_line(message)[:length].replace("|", "/") if message else "-" for message in how.values())
        if markdown:
            print(f"| {row.kernel} | {row.name} | {' | '.join(shown)} |", flush=True)
        else:
            print(f"{row.kernel} | {row.name}", *shown, sep="\n    ", flush=True)
        if not any(how.values()):
            print("    NOT FOUND")
    by_model = ", ".join(f"{model or 'at once'} {count}" for model, count in counts.items())
    print(f"\n{len(chosen)} faults. Found: {by_model}")


if __name__ == "__main__":
    main()
