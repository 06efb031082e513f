"""Changes of compiled text, one instruction at a time, which runs must notice.

    python -m tests.ptx.mutations --arch 90 "forward, cooperative"

puts each into what a run of `tests.cuda.runs` executes, and prints those that nothing noticed.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from tests.cuda.runs import RUNS, Run
from tests.ptx import cuda
from tests.ptx.text import PtxError

Rewrite = Callable[[str], str]


def _dropped(_: str) -> str:
    return ""


def _negated(line: str) -> str:
    return line.replace("@!%", "@%") if "@!%" in line else line.replace("@%", "@!%")


def _moved(line: str) -> str:
    """An access beside the right place, by its own width."""
    width = re.search(r"\.(?:v(\d)\.)?[busf](\d+)\s", line)
    assert width is not None
    step = int(width[1] or 1) * int(width[2]) // 8

    def further(found: re.Match[str]) -> str:
        return f"[{found[1]}+{int(found[2] or 0) + step}]"

    return re.sub(r"\[([%\w$]+)(?:\+(-?\d+))?\]", further, line)


OTHER = {"lt": "le", "le": "lt", "gt": "ge", "ge": "gt", "eq": "ne", "ne": "eq", "ltu": "leu", "leu": "ltu",
         "gtu": "geu", "geu": "gtu", "neu": "equ", "nan": "num", "num": "nan"}  # fmt: skip

KINDS: dict[str, tuple[str, Rewrite]] = {
    "barrier dropped": (r"\tbar\.sync", _dropped),
    "fence dropped": (r"\tmembar", _dropped),
    "barrier of the cluster dropped": (r"\tbarrier\.cluster", _dropped),
    "branch turned": (r"\t@!?%p\d+ bra", _negated),
    "comparison changed": (
        r"\tsetp\.",
        lambda line: re.sub(r"setp\.(\w+)", lambda m: f"setp.{OTHER[m[1]]}", line),
    ),
    "load beside": (r"\tld\.(volatile\.)?(global|shared|param)", _moved),
    "store beside": (r"\tst\.(global|shared)", _moved),
    "store dropped": (r"\tst\.(global|shared)", _dropped),
    "sum as difference": (r"\tadd\.(ftz\.f32|f64|s32|s64)", lambda line: line.replace("\tadd.", "\tsub.")),
    "narrowed towards 0": (r"\tcvt\.rn\.(f16|bf16)\.f32", lambda line: line.replace(".rn.", ".rz.")),
    "subnormal numbers kept": (r"\t\w+\.[\w.]*\bftz\.f32", lambda line: line.replace(".ftz", "")),
    "shuffle from another lane": (r"\tshfl\.sync\.bfly", lambda line: line.replace(".bfly.", ".idx.")),
}


class Mutation(NamedTuple):
    kind: str
    kernel: str
    line: int
    text: str
    """Of the instruction as it was."""
    source: str
    """PTX with the change in it."""
    whole: str
    """PTX without."""

    def change(self, _kernel: str, ptx: str) -> str:
        """What a driver does to each kernel's text."""
        return self.source if ptx == self.whole else ptx


def settings_of(run: Run) -> dict[str, Any]:
    """Of the device for a run."""
    return {**run.settings, "tuning": {"items_per_thread": 2} | run.settings.get("tuning", {})}


SCHEDULES = (0, 1)  # all blocks together; one after the other, as far as each can go


def noticed(run: Run, architecture: int, change: Callable[[str, str], str] | None = None) -> str | None:
    """What is wrong with a run in one of the orders; None where nothing is."""
    with cuda.installed(architecture, **settings_of(run), change=change) as driver:
        for schedule in SCHEDULES:
            try:
                run(driver, schedule)
            except (AssertionError, PtxError) as error:
                return str(error).strip() or type(error).__name__
    return None


def mutations(run: Run, architecture: int, kinds: Any = KINDS) -> Iterator[Mutation]:
    """All of these kinds in what a run executes."""
    texts: dict[str, str] = {}

    def keep(kernel: str, ptx: str) -> str:
        texts[ptx] = kernel
        return ptx

    with cuda.installed(architecture, **settings_of(run), change=keep) as driver:
        run(driver, 0)
        ran = {f.program.text: f.program.lines_that_ran() for f in driver.functions.values()}
    for ptx, kernel in texts.items():
        lines = ptx.split("\n")
        for kind in kinds:
            pattern, rewrite = KINDS[kind]
            for number in sorted(ran[ptx]):
                line = lines[number - 1]
                if re.match(pattern, line) and (new := rewrite(line)) != line:
                    changed = "\n".join([*lines[: number - 1], new, *lines[number:]])
                    yield Mutation(kind, kernel, number, line.strip(), changed, ptx)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.ptx.mutations", description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, choices=cuda.ARCHITECTURES, default=90)
    parser.add_argument("--kind", action="append", choices=KINDS)
    parser.add_argument("--every", type=int, default=1, help="only each so-manieth")
    parser.add_argument("run", choices=RUNS, nargs="+")
    options = parser.parse_args(arguments)
    for name in options.run:
        for kind in options.kind or KINDS:
            every = list(mutations(RUNS[name], options.arch, [kind]))[:: options.every]
            missed = [m for m in every if noticed(RUNS[name], options.arch, m.change) is None]
            print(f"{name} | {kind} | {len(every) - len(missed)} of {len(every)} noticed", flush=True)
            for mutation in missed:
                print(f"    {mutation.kernel} {mutation.line}: {mutation.text}", flush=True)


if __name__ == "__main__":
    main()
