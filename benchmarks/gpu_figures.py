"""The figures of `benchmarks.gpu`: cells, goals, and how both are shown."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from benchmarks.gpu_tests import OUTCOMES
from benchmarks.gpu_workloads import OPERATIONS, PRIMARY, TINY_BYTES, Job
from benchmarks.peers import geometric_mean
from benchmarks.workloads import DTYPES, LAYOUTS, TRIPS

NO_TIME = "no time left"


class Timing(NamedTuple):
    """Seconds of a call over the rounds."""

    median: float
    low: float
    high: float
    calls: int
    """Each round."""


def timing(rounds: Sequence[float], calls: int) -> Timing:
    return Timing(float(np.median(rounds)), min(rounds), max(rounds), calls)


@dataclass
class Cell:
    """One workload, and what was measured of it."""

    shape: tuple[int, ...]
    dtype: str
    layout: str
    nbytes: int
    """Of x."""
    what: str
    kind: str
    """device, host or graph."""
    state: str = "not measured"
    """ok, error or skipped."""
    message: str = ""
    times: dict[str, Timing] = field(default_factory=dict)
    """By contender: fastbn, copy, torch native, torch cudnn."""
    first_call: float | None = None
    """Seconds; with the compilation of kernels that were not compiled yet."""
    difference: float | None = None
    """From PyTorch's result: the largest, as a share of the largest number."""
    notes: dict[str, str] = field(default_factory=dict)
    """What other contenders raised."""

    @property
    def name(self) -> str:
        what = self.what if self.kind == "device" else f"{self.what}, {self.kind}"
        return f"{self.dtype} {self.layout} {'x'.join(map(str, self.shape))} {what}"

    @property
    def seconds(self) -> float | None:
        return self.times["fastbn"].median if "fastbn" in self.times else None

    @property
    def torch(self) -> float | None:
        """Seconds of the faster of PyTorch's ways."""
        return min((t.median for name, t in self.times.items() if name.startswith("torch")), default=None)

    @property
    def times_torch(self) -> float | None:
        """How many times faster fastbn is."""
        return None if self.torch is None or self.seconds is None else self.torch / self.seconds

    def of_copy(self, again: bool = False) -> float | None:
        """The share of the copy's speed at which the counted bytes move; with what two passes read again, or not."""
        if self.seconds is None or "copy" not in self.times:
            return None
        return TRIPS[self.what][again] / 2 * self.times["copy"].median / self.seconds

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        plain = {name: getattr(self, name) for name in self.__dataclass_fields__}
        plain["times"] = {
            name: {key: _short(value) for key, value in t._asdict().items()} for name, t in self.times.items()
        }
        plain |= {"of_copy": self.of_copy(), "of_copy_two_passes": self.of_copy(True), "times_torch": self.times_torch}
        return {key: _short(value) for key, value in plain.items()}

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> Cell:
        known = {name: plain[name] for name in cls.__dataclass_fields__}
        known["shape"] = tuple(known["shape"])
        known["times"] = {name: Timing(**t) for name, t in known["times"].items()}
        return cls(**known)


def cells_of(job: Job) -> list[Cell]:
    """The operations of a job; of small calls also as the host and graphs see them."""
    new = partial(Cell, job.shape, job.dtype, job.layout, job.nbytes)
    cells = [new(what, "device") for what in job.operations]
    if job.nbytes <= TINY_BYTES and job.layout == LAYOUTS[0]:
        cells += [new(what, kind) for kind in ("host", "graph") for what in job.operations if what in PRIMARY]
    return cells


def _short(value: Any) -> Any:
    """Numbers with the digits that they have, and as JSON has them."""
    if not isinstance(value, float):
        return value
    return float(f"{value:.4g}") if math.isfinite(value) else None


# --- what is asked of the kernels -------------------------------------------------------------------------------------

GOAL_DEVICE = "H200"
LARGE_BYTES, SOME_BYTES = 64e6, 1e6  # of x, from which shares of the copy's speed and times PyTorch are asked for


class Goal(NamedTuple):
    """A figure of several workloads, and its bound."""

    name: str
    bound: float
    mean: float | None
    """The geometric mean; None where nothing was measured."""
    worst: float | None
    worst_name: str
    workloads: int
    judged: str
    """each: every workload must keep the bound; mean: the mean must."""

    @property
    def verdict(self) -> str:
        if self.mean is None or self.worst is None:
            return "not measured"
        if (self.worst if self.judged == "each" else self.mean) >= self.bound:
            return "met"
        return "met on average, not by each" if self.mean >= self.bound else "missed"

    def as_dict(self) -> dict[str, Any]:
        return self._asdict() | {"verdict": self.verdict}


def goals(cells: Iterable[Cell]) -> list[Goal]:
    """What is asked on an H200, of float32 and of the other dtypes."""
    measured = [c for c in cells if c.state == "ok" and c.kind == "device"]
    found = []
    for label, dtypes in (("float32", ("float32",)), ("other dtypes", tuple(d for d in DTYPES if d != "float32"))):
        group = [c for c in measured if c.dtype in dtypes]

        def ask(
            name: str, bound: float, judged: str, figure: Callable[[Cell], float | None], of: Sequence[Cell],
            label: str = label,
        ) -> None:  # fmt: skip
            known = [(value, c.name) for c in of if (value := figure(c)) is not None]
            worst, worst_name = min(known, default=(None, ""))
            mean = geometric_mean([value for value, _ in known]) if known else None
            found.append(Goal(f"{name}, {label}", bound, mean, worst, worst_name, len(known), judged))

        large = [c for c in group if c.nbytes >= LARGE_BYTES]
        some = [c for c in group if c.nbytes >= SOME_BYTES]
        for what, layout, bound in (
            ("inference", "NCHW", 0.92), ("inference", "NHWC", 0.92), ("forward", "NCHW", 0.82),
            ("backward", "NCHW", 0.80), ("forward", "NHWC", 0.88), ("backward", "NHWC", 0.88),
        ):  # fmt: skip
            again = layout == "NHWC"
            name = f"{what} {layout} from 64 MB, {TRIPS[what][again]}S at the copy's speed"
            chosen = [c for c in large if (c.what, c.layout) == (what, layout)]
            ask(name, bound, "each", partial(Cell.of_copy, again=again), chosen)
        for what, bound in (("forward", 1.3), ("backward", 1.3), ("inference", 0.95)):
            chosen = [c for c in some if c.what == what]
            ask(f"{what} from 1 MB, times PyTorch", bound, "mean", _times_torch, chosen)
        others = [c for c in group if c.what != "inference"]
        ask("no workload slower than PyTorch", 1.0, "each", _times_torch, others)
        ask("no inference slower than PyTorch", 0.95, "each", _times_torch, [c for c in group if c.what == "inference"])
    return found


def _times_torch(cell: Cell) -> float | None:
    return cell.times_torch


# --- printing ---------------------------------------------------------------------------------------------------------


def title() -> str:
    counted = ", ".join(f"{TRIPS[what].once}S {what}" for what in OPERATIONS)
    return f"""\
us       median of a call, and half of what its rounds lie apart
GB/s     {counted}: S are the bytes of x
copy     the share of the copy's GB/s; (with what two passes read again counted)
torch    how many times faster than PyTorch's native kernels, and than cuDNN's where it takes them
"""


def line(cell: Cell) -> str:
    """A cell in the table that a run prints."""
    name = (
        f"{cell.dtype:<9}{cell.layout:<5}{'x'.join(map(str, cell.shape)):<16} {cell.what:<15}"
        f"{'' if cell.kind == 'device' else cell.kind:<6}"
    )
    if cell.seconds is None:
        return f"{name}{cell.state.upper()} {cell.message}"
    ours = cell.times["fastbn"]
    text = f"{name}{1e6 * ours.median:9.2f} us +-{50 * (ours.high - ours.low) / ours.median:3.0f}%"
    share, again = cell.of_copy(), cell.of_copy(True)
    if share is not None and again is not None:
        text += f" {TRIPS[cell.what][0] * cell.nbytes / ours.median / 1e9:6.0f} GB/s  copy {share:4.2f} ({again:4.2f})"
    for name, theirs in cell.times.items():
        text += f"  {name} {theirs.median / ours.median:5.2f}x" if name.startswith("torch") else ""
    for name, message in cell.notes.items():
        text += f"  {name}: {message}"
    return text if cell.state == "ok" else f"{text}  {cell.state.upper()} {cell.message}"


def print_summary(record: dict[str, Any], cells: Sequence[Cell], found: Sequence[Goal]) -> None:
    device = record["environment"]["device"]
    print(f"\nGoals, set for an {GOAL_DEVICE}{'' if GOAL_DEVICE in device else f'; this is another device, {device}'}")
    print(f"{'':<66}{'bound':>6}{'mean':>7}{'worst':>7}")
    for goal in found:
        mean, worst = ("-" if v is None else f"{v:.2f}" for v in (goal.mean, goal.worst))
        text = f"{goal.name:<66}{goal.bound:>6.2f}{mean:>7}{worst:>7}  {goal.verdict.upper()}"
        print(f"{text} ({goal.workloads} workloads; worst {goal.worst_name})" if goal.workloads else text)
    if tests := record["tests"]:
        counts = ", ".join(f"{tests[name]} {name}" for name in OUTCOMES)
        print(f"\ntests: {tests['state']} ({counts})")
        if tests["output"]:
            print(tests["output"])
    for state in ("error", "skipped"):
        chosen = [c for c in cells if c.state == state and c.message != NO_TIME]
        print(*(f"{state}: {c.name}: {c.message}" for c in chosen), sep="\n", end="\n" if chosen else "")
    if late := [c for c in cells if c.message == NO_TIME]:
        groups = dict.fromkeys(f"{c.dtype} {c.layout} {'x'.join(map(str, c.shape))}" for c in late)
        print(f"not measured, for lack of time: {len(late)} cells of {', '.join(groups)}")


def markdown(record: dict[str, Any]) -> str:
    """Tables of a recorded run: microseconds, share of the copy's speed, times PyTorch; the goals; small calls."""
    cells = [Cell.from_dict(plain) for plain in record["cells"]]
    lines: list[str] = []

    def table(titles: Sequence[str], rows: dict[str, list[str]]) -> None:
        if rows:
            lines.extend(["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"])
            lines.extend("| " + " | ".join([name, *row]) + " |" for name, row in rows.items())
            lines.append("")

    for dtype in DTYPES:
        for operations in (PRIMARY, [what for what in OPERATIONS if what not in PRIMARY]):
            chosen = {
                (c.shape, c.what, c.layout): c
                for c in cells
                if (c.dtype, c.kind, c.state) == (dtype, "device", "ok") and c.what in operations
            }
            shown = [(what, layout) for layout in LAYOUTS for what in operations]
            rows = {
                "x".join(map(str, shape)): [_entry(chosen.get((shape, *key))) for key in shown]
                for shape in dict.fromkeys(shape for shape, _, _ in chosen)
            }
            table([dtype, *(what if layout == "NCHW" else f"{what}, {layout}" for what, layout in shown)], rows)
    small = {(c.shape, c.kind, c.what): c for c in cells if c.kind != "device" and c.state == "ok"}
    shown = [(kind, what) for kind in ("host", "graph") for what in PRIMARY]
    rows = {
        "x".join(map(str, shape)): [_entry(small.get((shape, *key))) for key in shown]
        for shape in dict.fromkeys(shape for shape, _, _ in small)
    }
    table(["us a call, times PyTorch", *(f"{what}, {kind}" for kind, what in shown)], rows)
    asked = {}
    for plain in record["goals"]:
        figures = ["-" if plain[name] is None else f"{plain[name]:.2f}" for name in ("mean", "worst")]
        asked[plain["name"]] = [f"{plain['bound']:.2f}", *figures, plain["verdict"]]
    table(["goal", "asked", "mean", "worst", ""], asked)
    return "\n".join(lines)


def _entry(cell: Cell | None) -> str:
    if cell is None or cell.seconds is None:
        return "-"
    share, times = cell.of_copy(), cell.times_torch
    parts = [f"{1e6 * cell.seconds:.3g}"]
    parts += [] if share is None else [f"{share:.2f}"]
    return ", ".join([*parts, "-" if times is None else f"{times:.2f}x"])
