"""Statistics beside NumPy's on everyday calls: ``python -m benchmarks.statistics``.

Contenders of a call (`benchmarks.statistics_cases`) take turns in one process, in bursts where they are short. Times
are medians, ratios medians over turns: what else happens on the machine meets both. Large arrays come in buffers that
no cache holds, and the machine's reading speed, on as many threads, is measured in turn with them. What misses a limit
by little is measured again, and only what misses each time counts: then the status is 1. ``--sweep`` looks for cliffs
between sizes and row lengths instead.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import fastbn
from benchmarks.host import Host, get_num_threads
from benchmarks.statistics_cases import CASES, GROUPS, LARGE, SPREADS, Arrays, Case
from benchmarks.statistics_sweep import CLIFF, LARGEST, cliffs, confirmed, draw, points
from benchmarks.turns import Reader, in_turn, memory_beside_result
from benchmarks.workloads import described
from fastbn import environment

ROUNDS, SECONDS = 7, 0.5  # of a row, at least
SHORT_ROUNDS, SHORT_SECONDS, SHORT_STEP = 5, 0.15, 3  # with --short, which takes every third case of a group
AGAIN, NEAR = 2, 0.6  # times that a row is measured again, from this share of what is asked of it
WATCHED = 1_000_000  # bytes of x from which memory is measured

# --- a row ------------------------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """A function on a case: seconds of the contenders, and what limits are asked of."""

    case: Case
    function: str
    nbytes: int
    seconds: dict[str, float] = {}  # noqa: RUF012
    figures: dict[str, float] = {}  # noqa: RUF012
    """Times fastbn's speed of numpy, plain, bottleneck and numbagg; of the reading speed; memory as a share of x."""
    by_plain: bool = False
    """Whether the figure `plain` has a limit."""
    error: str = ""

    @property
    def name(self) -> str:
        return f"{self.function} {self.case.name}"

    @property
    def key(self) -> tuple[Case, str]:
        return self.case, self.function

    def or_better(self, other: Row) -> Row:
        """Of two measurements what either did better."""
        if self.error or other.error:
            return self
        seconds = {name: min(value, other.seconds[name]) for name, value in self.seconds.items()}
        best = {name: min if name == "memory" else max for name in self.figures}
        figures = {name: best[name](value, other.figures[name]) for name, value in self.figures.items()}
        return self._replace(seconds=seconds, figures=figures)

    def as_dict(self) -> dict[str, Any]:
        described = {"group": self.case.group, "function": self.function, "case": self.case.name}
        return described | self._asdict() | {"case": self.case.name}


def measured(case: Case, cache: int, rounds: int, seconds: float, pool: ThreadPoolExecutor) -> Iterable[Row]:
    """A row for each function that fastbn has."""
    functions = [name for name in case.functions if hasattr(fastbn, name)]
    if not functions:
        return
    arrays = Arrays(case, cache)
    for function in functions:
        row = Row(case, function, arrays.nbytes, by_plain=arrays.is_measured_by_plain)
        contenders = arrays.contenders(function)
        try:
            contenders["fastbn"][0]()
        except Exception as error:
            yield row._replace(error=described(error))
            continue
        reader = Reader(arrays.buffers, pool) if arrays.nbytes >= LARGE else None
        if reader is not None:
            contenders["reading"] = [reader]
        times = in_turn(contenders, rounds, seconds)
        if reader is not None:
            times["reading"] *= arrays.nbytes / reader.nbytes
        ours = times["fastbn"]
        figures = {name: float(np.median(theirs / ours)) for name, theirs in times.items() if name != "fastbn"}
        if arrays.nbytes >= WATCHED:
            figures["memory"] = memory_beside_result(contenders["fastbn"][0]) / arrays.nbytes
        yield row._replace(seconds={name: float(np.median(t)) for name, t in times.items()}, figures=figures)


# --- what is asked of them --------------------------------------------------------------------------------------------


class Bound(NamedTuple):
    """On a figure of a group's rows: of their geometric mean, and of each."""

    group: str
    kind: str
    """`mean`, `var` (with std and mean_var), or `any`."""
    figure: str
    geometric: float | None
    each: float | None
    at_most: bool = False

    def holds(self, value: float, bound: float) -> bool:
        return value <= bound if self.at_most else value >= bound

    def is_near(self, row: Row) -> bool:
        """Whether another process may have made this row miss; memory is the same each time."""
        return self.each is not None and not self.at_most and row.figures[self.figure] >= NEAR * self.each

    def has(self, row: Row) -> bool:
        kind = "var" if row.function.removeprefix("nan") in SPREADS else "mean"
        return (
            self.group in (row.case.group, "any")
            and self.kind in (kind, "any")
            and self.figure in row.figures
            and (self.figure != "plain" or row.by_plain)
            and (self.figure != "memory" or row.nbytes >= LARGE)
        )


BOUNDS = (
    Bound("small", "mean", "numpy", 0.9, 0.6),
    Bound("small", "var", "numpy", 1.5, 1.0),
    Bound("middle", "mean", "numpy", 1.1, 0.9),
    Bound("middle", "var", "numpy", 3.0, 1.5),
    Bound("large", "mean", "numpy", 1.5, 0.95),
    Bound("large", "var", "numpy", 6.0, 3.0),
    Bound("large", "any", "reading", None, 0.85),
    Bound("integers", "mean", "numpy", 2.0, 1.0),
    Bound("integers", "var", "numpy", 4.0, None),
    Bound("dtype", "mean", "numpy", 1.3, 0.95),
    Bound("dtype", "var", "numpy", 5.0, 3.0),
    Bound("where", "mean", "numpy", 1.3, 0.95),
    Bound("where", "var", "numpy", 5.0, 3.0),
    Bound("where", "any", "plain", None, 0.6),
    Bound("slices", "mean", "numpy", 1.3, 0.95),
    Bound("slices", "var", "numpy", 5.0, 3.0),
    Bound("slices", "any", "plain", None, 0.8),
    Bound("nan", "any", "plain", 0.9, None),
    Bound("nan", "any", "numpy", 5.0, None),
    Bound("nan", "any", "bottleneck", 3.0, None),
    Bound("nan", "any", "numbagg", 3.0, None),
    Bound("any", "any", "memory", None, 0.02, at_most=True),
)


class Verdict(NamedTuple):
    """A bound beside the rows that it is asked of."""

    bound: Bound
    geometric: float | None
    worst: float
    below: list[Row]
    """Rows that miss what is asked of each; of the geometric mean, if that is missed and nothing is asked of each."""
    ok: bool

    def as_dict(self) -> dict[str, Any]:
        found = self.bound._asdict() | {"measured": self.geometric, "worst": self.worst, "ok": self.ok}
        return found | {"below": [row.name for row in self.below]}


def verdicts(rows: Sequence[Row]) -> list[Verdict]:
    """Of every bound that some row has a figure for."""
    found = []
    for bound in BOUNDS:
        group = [row for row in rows if bound.has(row)]
        if not group:
            continue
        values = [row.figures[bound.figure] for row in group]
        geometric = None if bound.geometric is None else geometric_mean(values)
        missed = geometric is not None and not bound.holds(geometric, bound.geometric)  # type: ignore[arg-type]
        asked = bound.each if bound.each is not None else bound.geometric if missed else None
        below = [] if asked is None else [row for row in group if not bound.holds(row.figures[bound.figure], asked)]
        worst = (max if bound.at_most else min)(values)
        found.append(Verdict(bound, geometric, worst, below, not missed and not (bound.each is not None and below)))
    return found


def settled(rows: list[Row], measure: Callable[[Row], Row]) -> tuple[list[Row], int]:
    """With rows measured again that miss by little what is asked of each; and how many those were."""
    seen: set[tuple[Case, str]] = set()
    for _ in range(AGAIN):
        near = {row.key for verdict in verdicts(rows) for row in verdict.below if verdict.bound.is_near(row)}
        rows = [row.or_better(measure(row)) if row.key in near else row for row in rows]
        seen |= near
    return rows, len(seen)


def geometric_mean(values: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


# --- printing ---------------------------------------------------------------------------------------------------------

COLUMNS = ("numpy", "reading", "memory", "plain", "bottleneck", "numbagg")


def line(row: Row) -> str:
    """A row as it comes: microseconds, GB/s, and its figures."""
    text = f"{row.function:<9}{row.case.name:<66}"
    if row.error:
        return f"{text} FAILED: {row.error}"
    ours, theirs = (1e6 * row.seconds[name] for name in ("fastbn", "numpy"))
    text += f"{_us(ours):>9}{_us(theirs):>9}{row.figures['numpy']:7.2f}{row.nbytes / ours / 1e3:7.1f}"
    return text + "".join(f"{_figure(row, name):>11}" for name in COLUMNS[1:])


def title() -> str:
    text = f"{'':<75}{'us':>9}{'NumPy':>9}{'x':>7}{'GB/s':>7}"
    return text + "".join(f"{name:>11}" for name in COLUMNS[1:])


def _us(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 1000 else f"{value:.0f}"


def _figure(row: Row, name: str) -> str:
    return f"{row.figures[name]:.3f}" if name == "memory" and name in row.figures else (
        f"{row.figures[name]:.2f}" if name in row.figures else ""
    )  # fmt: skip


def summary(found: Sequence[Verdict], rows: Sequence[Row]) -> list[str]:
    """A line a bound, and below it the rows that miss it."""
    lines = [f"{'group':<10}{'function':<9}{'beside':<12}{'geometric mean':>18}{'worst':>17}"]
    for verdict in found:
        bound, sign = verdict.bound, "<=" if verdict.bound.at_most else ">="
        mean = "" if verdict.geometric is None else f"{verdict.geometric:8.2f} {sign} {bound.geometric:g}"
        each = f"{verdict.worst:8.3g}" + ("" if bound.each is None else f" {sign} {bound.each:g}")
        result = "ok" if verdict.ok else "MISSED"
        lines.append(f"{bound.group:<10}{bound.kind:<9}{bound.figure:<12}{mean:<18}{each:<17}{result}")
        lines += [f"    {row.figures[bound.figure]:.3g}  {row.name}" for row in sorted_by(bound, verdict.below)]
    lines += [f"FAILED {row.name}: {row.error}" for row in rows if row.error]
    return lines


def sorted_by(bound: Bound, rows: Iterable[Row]) -> list[Row]:
    return sorted(rows, key=lambda row: row.figures[bound.figure], reverse=bound.at_most)


def markdown(rows: Sequence[Row], found: Sequence[Verdict]) -> str:
    """A table of the limits, and one of each group: a line a case, its functions' figures beside each other."""
    lines = ["| group | function | beside | geometric mean | wanted | worst | wanted | |", "|---" * 8 + "|"]
    for v in found:
        cells = ["" if n is None else f"{n:.3g}" for n in (v.geometric, v.bound.geometric, v.worst, v.bound.each)]
        lines.append(f"| {' | '.join([*v.bound[:3], *cells])} | {'' if v.ok else 'missed'} |")
    for group in dict.fromkeys(row.case.group for row in rows):
        chosen = [row for row in rows if row.case.group == group and not row.error]
        columns = [name for name in COLUMNS if any(name in row.figures for row in chosen)]
        titles = {"numpy": "x NumPy", "reading": "of reading", "memory": "memory", "plain": "of plain"}
        heads = [f"{group}", "", "us", *(titles.get(name, f"x {name}") for name in columns)]
        lines += ["", f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
        for case in dict.fromkeys(row.case for row in chosen):
            same = [row for row in chosen if row.case == case]
            cells = [
                f"`{case.name}`",
                ", ".join(row.function for row in same),
                " / ".join(_us(1e6 * row.seconds["fastbn"]) for row in same),
                *(" / ".join(_figure(row, name) for row in same).strip(" /") for name in columns),
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


# --- command line -----------------------------------------------------------------------------------------------------


def chosen(groups: Sequence[str], short: bool) -> list[Case]:
    """Cases of these groups, or of all; with `short` every third of each."""
    found = []
    for group in groups or GROUPS:
        found += [case for case in CASES if case.group == group][:: SHORT_STEP if short else 1]
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, and write what is asked for; 1 if a limit is missed."""
    parser = argparse.ArgumentParser("python -m benchmarks.statistics", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--group", action="append", choices=GROUPS, default=[], help="only these, again for more")
    parser.add_argument("--short", action="store_true", help="a third of the cases, for a minute")
    parser.add_argument("--json", type=Path, help="write every figure to this file")
    parser.add_argument("--markdown", action="store_true", help="print the tables of docs/statistics.md")
    parser.add_argument("--sweep", action="store_true", help="sizes and row lengths instead: are there cliffs?")
    parser.add_argument("--most", type=float, default=LARGEST, help="bytes of the sweep's largest array (256e6)")
    parser.add_argument("--picture", type=Path, help="draw the sweep into this file")
    options = parser.parse_args(argv)
    if options.sweep:
        return sweep(options)
    if options.picture:
        parser.error("--picture: expected with --sweep")
    rounds, seconds = (SHORT_ROUNDS, SHORT_SECONDS) if options.short else (ROUNDS, SECONDS)
    cases, rows, cache = chosen(options.group, options.short), [], Host().cache_bytes
    absent = sorted({name for case in cases for name in case.functions if not hasattr(fastbn, name)})
    print(head(), flush=True)
    if not options.markdown:
        print(title())
    quiet = np.errstate(over="ignore", invalid="ignore")  # NumPy's own sums of float16 overflow
    with quiet, ThreadPoolExecutor(max(1, get_num_threads() - 1)) as pool:
        for case in cases:
            for row in measured(case, cache, rounds, seconds, pool):
                rows.append(row)
                if not options.markdown:
                    print(line(row), flush=True)

        def again(row: Row) -> Row:
            (fresh,) = measured(row.case._replace(functions=(row.function,)), cache, 2 * rounds, 2 * seconds, pool)
            return fresh

        rows, count = settled(rows, again)
    found = verdicts(rows)
    speeds = [row.nbytes / row.seconds["reading"] / 1e9 for row in rows if "reading" in row.seconds]
    notes = [f"measured again, since they missed by little: {count}"] if count else []
    if absent:
        notes.append(f"not measured, since fastbn has no {', '.join(absent)}")
    if speeds:
        notes.insert(0, f"reading speed: {np.median(speeds):.1f} GB/s, median of {len(speeds)}; best {max(speeds):.1f}")
    print(f"\n{'; '.join(notes)}\n")
    print(markdown(rows, found) if options.markdown else "\n".join(summary(found, rows)))
    if options.json:
        written = {"environment": machine(), "notes": notes, "rows": [row.as_dict() for row in rows]}
        written |= {"bounds": [verdict.as_dict() for verdict in found]}
        options.json.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
    return int(not all(verdict.ok for verdict in found) or any(row.error for row in rows))


def sweep(options: argparse.Namespace) -> int:
    """Measure the curves, print their cliffs, draw them."""
    print(head(), flush=True)
    found = []
    for point in points(int(options.most), options.short):
        found.append(point)
        if len(found) % 4 == 0:  # mean and var, inner and outer
            shown = "  ".join(
                f"{p.curve.function} {p.curve.reduction} {p.ours:.3g} ({p.theirs:.3g})" for p in found[-4:]
            )
            print(f"{point.curve.dtype:<8}{point.curve.sweep} {point.at:<10} ns/byte (NumPy's): {shown}", flush=True)
    found = confirmed(found, int(options.most))
    print(f"\ncliffs: neighbours that differ by more than {CLIFF} times beyond what longer arrays and rows explain")
    print("\n".join(map(str, cliffs(found))) or "none")
    if options.json:
        written = {"environment": machine(), "points": [point.as_dict() for point in found]}
        options.json.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
    if options.picture:
        draw(found, options.picture)
    return 0


def machine() -> dict[str, Any]:
    """Where this runs, and what else does."""
    found = environment.describe()
    del found["kernel_cache"]  # a place on this machine alone
    peers = {name: getattr(environment.optional(name), "__version__", None) for name in ("bottleneck", "numbagg")}
    found["versions"] |= peers
    return found | {"date": time.strftime("%Y-%m-%d"), "load": os.getloadavg() if hasattr(os, "getloadavg") else None}


def head() -> str:
    found = machine()
    names = ("numpy", "numba", "bottleneck", "numbagg")
    versions = ", ".join(f"{name} {found['versions'].get(name) or '(not installed)'}" for name in names)
    load = "" if found["load"] is None else f"; {found['load'][0]:.1f} processes running"
    return f"{environment.cpu_model()}, {get_num_threads()} threads; {versions}{load}"


if __name__ == "__main__":
    sys.exit(main())
