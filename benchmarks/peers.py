"""fastbn beside PyTorch, plain NumPy and the machine's own limit: ``python -m benchmarks.peers``.

The contenders of a case run in turn in one process, on as many threads, on buffers that no cache holds; figures are
medians. The limit of a case is the time in which the machine moves its counted bytes, at the speed of a parallel copy
with streaming stores of the same buffers in the same run.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import fastbn
from benchmarks.host import core_cache, get_num_threads
from benchmarks.workloads import DTYPES, LAYOUTS, SHAPES, trips_at_best
from fastbn import bench, environment
from fastbn.__main__ import _in_turn as in_turn

WORKLOADS = tuple(SHAPES.values())
LARGE = 12_000_000  # bytes of x from which the limit is asked for


class Case(NamedTuple):
    """One measured row and its limit."""

    result: bench.Result
    passes: int
    """Bytes that must move, in units of those of x."""

    @property
    def limit(self) -> float:
        """Seconds."""
        r = self.result
        return self.passes * r.nbytes / (1e9 * r.copy_gb_per_s)

    @property
    def of_limit(self) -> float:
        """How many times the limit fastbn takes, with ``out=``."""
        return self.result.ours / self.limit

    @property
    def times_torch(self) -> float | None:
        return self.result.speedup("torch")

    def is_large(self) -> bool:
        return self.result.nbytes >= LARGE

    def as_dict(self) -> dict[str, Any]:
        return self.result.as_dict() | {"limit_passes": self.passes, "limit": self.limit, "of_limit": self.of_limit}


def run(options: argparse.Namespace) -> list[Case]:
    """Measure every case, printing as they come."""
    work = [
        bench.Job(shape, dtype, layout, options.rounds, tuple(options.operation))
        for layout in options.layout
        for shape in options.shape
        for dtype in options.dtype
    ]
    _print_title()
    cache = core_cache()
    cases: list[Case] = []
    for results in in_turn(work, options.progress):
        for result in results:
            itemsize = environment.float_dtypes()[result.dtype].itemsize
            trips = trips_at_best(result.shape, itemsize, result.layout, result.what, cache, get_num_threads())
            cases.append(Case(result, trips))
            print(_line(cases[-1]), flush=True)
    return cases


# --- beside NumPy's statistics, and memory ----------------------------------------------------------------------------


def statistics_beside_numpy(rounds: int) -> dict[str, float]:
    """How many times faster mean and var are than NumPy's, on 100 MB of float32."""
    found = {}
    for layout, axes in (("NCHW", (0, 2, 3)), ("NHWC", (0, 1, 2))):
        arrays = bench.Buffers((32, 64, 112, 112), "float32", layout).x
        for name in ("mean", "var"):
            ours, theirs = getattr(fastbn, name), getattr(np, name)
            times: dict[Any, list[float]] = {ours: [], theirs: []}
            ours(arrays[0], axes)
            for turn in range(2 * rounds):
                for function in (ours, theirs):
                    start = time.perf_counter()
                    function(arrays[turn % len(arrays)], axes)
                    times[function].append(time.perf_counter() - start)
            found[f"{name} {layout}"] = float(np.median(times[theirs]) / np.median(times[ours]))
    return found


def memory_beside_results(shapes: Sequence[tuple[int, ...]]) -> dict[str, float]:
    """The most memory a call takes beyond x, `out` and the statistics it returns, as a share of x; tensors >= 12 MB."""
    found = {}
    for layout, shape, dtype in itertools.product(LAYOUTS, shapes, ("float32", "float16")):
        if math.prod(shape) * np.dtype(dtype).itemsize >= LARGE:
            x = np.ones(shape if layout == "NCHW" else (shape[0], *shape[2:], shape[1]), dtype)
            for what, peak in _peaks(x, 1 if layout == "NCHW" else -1).items():
                found[f"{what} {layout} {dtype} {'x'.join(map(str, shape))}"] = peak / x.nbytes
    return found


def _peaks(x: np.ndarray[Any, Any], axis: int) -> dict[str, int]:
    """Bytes that each operation allocates beside its results."""
    channels = x.shape[axis]
    out, given = np.empty_like(x), np.ones(channels)
    _, saved = fastbn.batch_norm(x, given, given, channel_axis=axis)
    calls: dict[str, tuple[int, Callable[[], object]]] = {
        "forward": (6, lambda: fastbn.batch_norm(x, given, given, channel_axis=axis, out=out)),
        "backward": (2, lambda: fastbn.batch_norm_backward(x, saved, out=out)),
        "inference": (0, lambda: fastbn.batch_norm_inference(x, given, given, channel_axis=axis, out=out)),
        "moments": (4, lambda: fastbn.moments(x, channel_axis=axis)),
    }
    peaks = {}
    for what, (results, call) in calls.items():
        call()
        tracemalloc.start()
        result = call()
        peaks[what] = tracemalloc.get_traced_memory()[1] - results * 8 * channels
        tracemalloc.stop()
        del result
    return peaks


# --- what is asked of the kernels -------------------------------------------------------------------------------------


class Target(NamedTuple):
    """A figure over some cases and its bound."""

    name: str
    figure: float
    bound: float
    at_least: bool

    @property
    def ok(self) -> bool:
        return self.figure >= self.bound if self.at_least else self.figure <= self.bound


def targets(cases: Sequence[Case], beside_numpy: dict[str, float], memory: dict[str, float]) -> list[Target]:
    """Every figure that the cases measured allow."""
    found: list[Target] = []

    def ask(name: str, values: Iterable[float | None], bound: float, at_least: bool, of: Any = None) -> None:
        known = [v for v in values if v is not None]
        if known:
            found.append(Target(name, (of or geometric_mean)(known), bound, at_least))

    single = [c for c in cases if c.result.dtype == "float32"]

    def chosen(what: str, layout: str | None = None, low: float = 0, high: float = math.inf) -> list[Case]:
        return [
            c for c in single
            if c.result.what == what and layout in (None, c.result.layout) and low <= c.result.nbytes < high
        ]  # fmt: skip

    for what, bound in (("inference", 1.10), ("fused", 1.10)):
        for layout in LAYOUTS:
            ask(f"{what} {layout}, of the limit", (c.of_limit for c in chosen(what, layout, LARGE)), bound, False)
    for what, bound in (("forward", 1.25), ("backward", 1.30)):
        for layout in LAYOUTS:
            ask(f"{what} {layout}, of the limit", (c.of_limit for c in chosen(what, layout, LARGE)), bound, False)
    for what in ("forward", "backward", "inference", "fused"):
        ask(f"{what}, of the limit, worst", (c.of_limit for c in chosen(what, None, LARGE)), 1.6, False, max)
    for what, bound in (("forward", 4.0), ("backward", 2.5)):
        ask(f"{what} NCHW from 1 MB, times PyTorch", (c.times_torch for c in chosen(what, "NCHW", 1e6)), bound, True)
    for what, above, below in (("forward", 2.0, 1.2), ("backward", 1.7, 1.05)):
        large, small = chosen(what, "NHWC", 32e6), chosen(what, "NHWC", 0, 32e6)
        ask(f"{what} NHWC above 32 MB, times PyTorch", (c.times_torch for c in large), above, True)
        ask(f"{what} NHWC below 32 MB, times PyTorch", (c.times_torch for c in small), below, True)
    large, small = chosen("inference", None, 32e6), chosen("inference", None, 0, 32e6)
    ask("inference above 32 MB, times PyTorch", (c.times_torch for c in large), 1.5, True)
    ask("inference below 32 MB, times PyTorch", (c.times_torch for c in small), 0.98, True)
    ask("fused, times PyTorch's three operations", (c.times_torch for c in chosen("fused", None, LARGE)), 3.0, True)
    limits = {"forward": 1.25, "backward": 1.30, "inference": 1.10, "fused": 1.10}
    slow = [c.times_torch for c in single if c.result.what in limits and c.of_limit > limits[c.result.what]]
    ask("any case not within its limit, times PyTorch, worst", slow, 0.95, True, min)
    ask_dtypes(cases, ask)
    for what, bound in (("inference", 5.0), ("forward", 8.0)):
        small_calls = [c.result for c in chosen(what) if c.result.shape == (1, 8, 16)]
        ask(f"(1, 8, 16) {what}, us", [1e6 * (r.seconds["fastbn"] or math.nan) for r in small_calls], bound, False, min)
        ask(f"(1, 8, 16) {what}, times PyTorch", [r.speedup("torch") for r in small_calls], 1.0, True, min)
    for name, bound in (("mean NCHW", 2.5), ("mean NHWC", 6.0), ("var NCHW", 12.0), ("var NHWC", 20.0)):
        ask(f"{name} of 100 MB, times NumPy", [beside_numpy.get(name)], bound, True)
    ask("memory beside results, share of x, worst", memory.values(), 0.01, False, max)
    return found


def ask_dtypes(cases: Sequence[Case], ask: Callable[..., None]) -> None:
    """Halves and doubles beside float32, where one rule counts the bytes of both."""
    by_key = {(c.result.shape, c.result.layout, c.result.what, c.result.dtype): c for c in cases}
    for dtype, bound in (("float16", 1.6), ("bfloat16", 1.6), ("float64", 2.2)):
        pairs = [
            (case, by_key[(*key[:3], "float32")])
            for key, case in by_key.items()
            if key[3] == dtype and key[2] != "moments" and (*key[:3], "float32") in by_key
        ]
        pairs = [(a, b) for a, b in pairs if a.is_large() and b.is_large() and a.passes == b.passes]
        if dtype == "float64":
            ask("float64, times float32's time", (a.result.ours / b.result.ours for a, b in pairs), bound, False)
        else:
            ask(f"{dtype}, times float32's speed", (b.result.ours / a.result.ours for a, b in pairs), bound, True)
            theirs = [
                a.result.seconds["torch"] / a.result.ours if a.result.seconds["torch"] else None for a, _ in pairs
            ]
            ask(f"{dtype} with out=, times PyTorch", theirs, 1.5, True)


def geometric_mean(values: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


# --- printing ---------------------------------------------------------------------------------------------------------


def _print_title() -> None:
    torch = environment.torch_with_our_threads()
    print(
        f"""{environment.cpu_model()}, {get_num_threads()} threads, {core_cache() >> 10} kB of cache a core
  limit      the rule (2S, 3S, 5S: trips of x's bytes over memory) and how many times that time fastbn takes with out=
  ms, GB/s   with out=; counted are 2S forward and inference, 3S backward and fused (inference + residual + relu), 1S moments
  plain      ms of the call that allocates its result; PyTorch {torch.__version__ if torch else "(not installed)"} and NumPy beside it: how many times faster it is
"""  # noqa: E501
    )
    print(f"{'dtype':<9}{'layout':<6}{'shape':<17}{'operation':<10}{'ms':>9}{'GB/s':>7}{'limit':>10}", end="")
    print(f"{'plain':>9}{'torch':>7}{'numpy':>7}")


def _line(case: Case) -> str:
    r = case.result
    torch, numpy = ("-" if (s := r.speedup(peer)) is None else f"{s:.2f}" for peer in ("torch", "numpy"))
    return (
        f"{r.dtype:<9}{r.layout:<6}{'x'.join(map(str, r.shape)):<17}{r.what:<10}{1e3 * r.ours:9.4f}{r.gb_per_s:7.1f}"
        f"{case.passes:>4}S {case.of_limit:5.2f}{1e3 * (r.seconds['fastbn'] or math.nan):9.4f}{torch:>7}{numpy:>7}"
    )


def print_targets(found: Sequence[Target]) -> None:
    print(f"\n{'geometric means, float32 unless said':<56}{'measured':>9}{'bound':>9}")
    for target in found:
        sign, verdict = ">=" if target.at_least else "<=", "ok" if target.ok else "MISSED"
        print(f"{target.name:<56}{target.figure:9.3g}{sign:>5}{target.bound:5.3g}  {verdict}")


def markdown(recorded: dict[str, Any]) -> str:
    """The tables of docs/performance.md of a recorded run: float32 speeds, and every figure beside its bound."""
    shown = [(what, layout) for layout in LAYOUTS for what in ("forward", "backward", "inference")]
    cells: dict[tuple[int, ...], dict[tuple[str, str], str]] = {}
    for case in recorded["cases"]:
        if case["dtype"] == "float32":
            key = (case["what"], case["layout"])
            times = "-" if case["times_torch"] is None else f"{case['times_torch']:.1f}x"
            text = f"{case['gb_per_s']:.0f}, {case['of_limit']:.2f}, {times}"
            cells.setdefault(tuple(case["shape"]), {})[key] = text
    titles = [what if layout == "NCHW" else f"{what}, NHWC" for what, layout in shown]
    lines = ["| N x C x H x W | " + " | ".join(titles) + " |", "|---" * (len(titles) + 1) + "|"]
    for shape, row in cells.items():
        if math.prod(shape) * 4 >= 1_000_000:
            lines.append(f"| {'x'.join(map(str, shape))} | " + " | ".join(row[key] for key in shown) + " |")
    lines += ["", "| figure (geometric means, float32 unless said) | measured | asked | |", "|---|---|---|---|"]
    for t in recorded["targets"]:
        asked = f"{'>=' if t['at_least'] else '<='} {t['bound']:g}"
        lines.append(f"| {t['name']} | {t['figure']:.3g} | {asked} | {'' if t['ok'] else 'missed'} |")
    return "\n".join(lines)


def draw(cases: Sequence[Case], path: Path) -> None:
    """Time per byte against size: a panel an operation and layout, a line a contender."""
    from matplotlib.figure import Figure

    single = [c for c in cases if c.result.dtype == cases[0].result.dtype]
    operations = list(dict.fromkeys(c.result.what for c in single))
    layouts = list(dict.fromkeys(c.result.layout for c in single))
    figure = Figure(figsize=(3.2 * len(operations), 3.0 * len(layouts)), layout="constrained")
    panels = figure.subplots(len(layouts), len(operations), squeeze=False, sharex=True, sharey=True)
    lines: dict[str, tuple[str, Callable[[Case], float | None]]] = {
        "NumPy": ("tab:gray", lambda c: c.result.seconds["numpy"]),
        "PyTorch": ("tab:red", lambda c: c.result.seconds["torch"]),
        "fastbn": ("tab:blue", lambda c: c.result.seconds["fastbn"]),
        "fastbn, out=": ("tab:cyan", lambda c: c.result.seconds["fastbn_out"]),
        "limit": ("black", lambda c: c.limit),
    }
    for i, layout in enumerate(layouts):
        for j, what in enumerate(operations):
            panel = panels[i, j]
            group = sorted((c for c in single if (c.result.layout, c.result.what) == (layout, what)), key=_size)
            for name, (color, seconds) in lines.items():
                points = [(c.result.nbytes, 1e9 * s / c.result.counted_bytes) for c in group if (s := seconds(c))]
                style = "--" if name == "limit" else "-"
                panel.plot(*zip(*points, strict=True), style, color=color, marker=".", label=name) if points else None
            panel.set(xscale="log", yscale="log", title=f"{what} {layout}")
            panel.grid(alpha=0.3)
    figure.supxlabel("bytes of x")
    figure.supylabel("ns per counted byte")
    panels[0, 0].legend(fontsize="small")
    figure.savefig(path, dpi=110)


def _size(case: Case) -> int:
    return case.result.nbytes


# --- command line -----------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, and write what is asked for; 1 if a target is missed."""
    parser = argparse.ArgumentParser("python -m benchmarks.peers", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dtype", action="append", choices=DTYPES)
    parser.add_argument("--layout", action="append", choices=LAYOUTS)
    parser.add_argument("--operation", action="append", choices=list(bench.OPERATIONS))
    parser.add_argument("--shape", action="append", type=lambda text: tuple(map(int, text.split(","))))
    parser.add_argument("--rounds", type=int, default=3, help="of turns of every contender (3)")
    parser.add_argument("--json", type=Path, help="write every figure to this file")
    parser.add_argument("--picture", type=Path, help="draw time per byte against size into this file")
    parser.add_argument("--progress", action="store_true", default=sys.stderr.isatty(), help="a bar on stderr")
    parser.add_argument("--markdown", type=Path, help="print the tables of docs/performance.md of a recorded run")
    options = parser.parse_args(argv)
    if options.markdown:
        print(markdown(json.loads(options.markdown.read_text(encoding="utf-8"))))
        return 0
    options.dtype = options.dtype or [d for d in DTYPES if d in environment.float_dtypes()]
    options.layout = options.layout or list(LAYOUTS)
    options.operation = options.operation or list(bench.OPERATIONS)
    options.shape = options.shape or list(WORKLOADS)
    whole = options.shape == list(WORKLOADS) and "float32" in options.dtype
    beside_numpy = statistics_beside_numpy(options.rounds) if whole else {}
    memory = memory_beside_results(options.shape) if whole else {}
    cases = run(options)
    found = targets(cases, beside_numpy, memory)
    print_targets(found)
    if options.json:
        torch = environment.optional("torch")
        machine = environment.describe()
        del machine["kernel_cache"]  # a place on this machine alone
        machine["versions"]["torch"] = torch.__version__ if torch else None
        machine["date"] = time.strftime("%Y-%m-%d")
        described = {"environment": machine, "cases": [case.as_dict() for case in cases]}
        described |= {"times_numpy": beside_numpy, "memory_share": memory}
        described["targets"] = [target._asdict() | {"ok": target.ok} for target in found]
        options.json.write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")
    if options.picture:
        draw(cases, options.picture)
    return int(not all(target.ok for target in found))


if __name__ == "__main__":
    sys.exit(main())
