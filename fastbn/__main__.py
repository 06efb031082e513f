"""Check this installation and measure its speed: ``fastbn``, or ``python -m fastbn``."""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol, TypeVar

import fastbn
from fastbn import bench, check, environment, extras, warmup
from fastbn.threads import get_num_threads

DESCRIPTION = """\
Without a command: say what is installed, check every backend, dtype and layout against float64 formulas, and measure
the speed of ResNet-50's batch norms on this machine. Under a minute on two cores, two or three when kernels are
compiled first.
"""
COMMANDS = {
    "info": "versions, backends, processor, threads, and where compiled kernels are kept",
    "check": "accuracy against exact and float64 results, each figure with the bound that it must keep",
    "bench": "time and memory bandwidth, beside a copy, NumPy and PyTorch",
    "warmup": "compile the kernels into the cache on disk, ahead of their first use",
}
DETAILS = {
    "check": "Exit status 1 if a figure misses its bound. NumPy's and PyTorch's figures on the same data stand beside.",
    "bench": "The contenders run in turn, on as many threads, on data that no cache holds; figures are medians.",
    "warmup": "Minutes when nothing is compiled yet; kernels that are on disk already, or came with the installation, "
    "are loaded. With --cuda those for CuPy arrays, into CuPy's cache: that takes no GPU, and a process on one finds "
    "them if it has the same CuPy, in the same place, and the same NVRTC.",
}


def run() -> int:
    """The command: `main`, but quiet where whoever reads its output has gone, as ``| head`` does."""
    try:
        status = main()
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what the interpreter flushes at its end
        return 128 + 13  # as of a program that SIGPIPE ends
    return status


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; 1 if a check failed, else 0."""
    # Defaults of --json and --progress come from here: a command's own would undo what was given before it.
    defaults = argparse.Namespace(json=False, progress=sys.stderr.isatty())
    options = _parser().parse_args(argv, defaults)
    return {"info": _info, "check": _check, "bench": _bench, "warmup": _warmup, None: _all}[options.command](options)


# --- commands ---------------------------------------------------------------------------------------------------------


def _info(options: argparse.Namespace) -> int:
    found = environment.describe()
    if options.json:
        _print_json(found)
    else:
        _print_environment(found)
    return 0


def _check(options: argparse.Namespace) -> int:
    rows = _checked(options, tuple(check.TITLES), options.quick, () if options.quick else environment.float_dtypes())
    if options.json:
        _print_json({"environment": environment.describe(), **_as_dict(rows)})
    return int(any(not row.ok for row in rows))


def _bench(options: argparse.Namespace) -> int:
    shapes = options.shape or [(bench.BATCH, *shape) for shape in (bench.QUICK if options.quick else bench.RESNET50)]
    results = _measured(options, shapes, options.dtype, options.layout or check.LAYOUTS, options.quick)
    if options.json:
        _print_json({"environment": environment.describe(), "bench": [result.as_dict() for result in results]})
    return 0


def _warmup(options: argparse.Namespace) -> int:
    if options.cuda:
        return _warmup_cuda(options)
    start = time.perf_counter()
    work = warmup.jobs(options.dtype or [*environment.float_dtypes(), *warmup.INTEGERS])
    for _ in _in_turn(work, options.progress):
        pass
    counts, seconds, folder = warmup.counts(), time.perf_counter() - start, environment.kernel_cache()
    if options.json:
        _print_json({**counts._asdict(), "calls": len(work), "seconds": seconds, "kernel_cache": folder})
    else:
        _print_left_out()
        print(f"{counts.compiled} kernels compiled, {counts.loaded} loaded, in {seconds:.0f} s")
        print(f"kept in {folder}" if folder else "not kept: no folder can be written; set NUMBA_CACHE_DIR to one")
    return 0


def _warmup_cuda(options: argparse.Namespace) -> int:
    from fastbn.cuda import cubins
    from fastbn.cuda.warmup import DENSE, kernels

    start, before, total = time.perf_counter(), cubins.count(), 0
    shapes = options.shape or [*((bench.BATCH, *shape) for shape in bench.RESNET50), *DENSE]
    dtypes = options.dtype or [dtype for dtype in environment.float_dtypes() if dtype != "float64"]
    for device in options.cuda:
        wanted = kernels(device, dtypes, shapes)
        try:
            with cubins.compiling(wanted, device.architecture, get_num_threads()) as work:
                for _ in _in_turn(work, options.progress):
                    total += 1
        except (RuntimeError, ValueError) as error:  # without a compiler, or one for this architecture
            print(error, file=sys.stderr)
            return 1
    compiled, seconds, folder = cubins.count() - before, time.perf_counter() - start, cubins.folder()
    if options.json:
        counts = warmup.Counts(total - compiled, compiled)._asdict()
        _print_json({**counts, "seconds": seconds, "kernel_cache": folder and str(folder)})
    else:
        _print_left_out()
        print(f"{compiled} kernels compiled, {total - compiled} there already, in {seconds:.0f} s")
        print(f"kept in {folder}" if folder else "not kept: CUPY_CACHE_IN_MEMORY is 1")
    return 0


def _all(options: argparse.Namespace) -> int:
    found = environment.describe()
    if not options.json:
        _print_environment(found)
    rows = _checked(options, ("oracle",), True, ("float32",))
    shapes = [(bench.BATCH, *shape) for shape in bench.RESNET50]
    results = _measured(options, shapes, "float32", check.LAYOUTS, False)
    if options.json:
        measured = [result.as_dict() for result in results]
        _print_json({"environment": found, **_as_dict(rows), "bench": measured})
    return int(any(not row.ok for row in rows))


def _checked(
    options: argparse.Namespace, groups: Sequence[str], quick: bool, parallel: Iterable[str]
) -> list[check.Row]:
    """Run checks on every backend that is ready, printing as they come."""
    parallel = tuple(parallel)
    work = [
        job for kind in environment.ready_backends() for job in check.jobs(kind, groups, quick=quick, parallel=parallel)
    ]
    if not options.json:
        _print_left_out()
    rows: list[check.Row] = []
    for found in _in_turn(work, options.progress):
        if not options.json:
            _print_rows(found, with_title=not rows or rows[-1].group != found[0].group)
        rows += found
    if not options.json:
        failed = sum(not row.ok for row in rows)
        print(f"\n{len(rows)} figures, {failed or 'none'} beyond its bound")
    return rows


def _measured(
    options: argparse.Namespace, shapes: Sequence[tuple[int, ...]], dtype: str, layouts: Sequence[str], quick: bool
) -> list[bench.Result]:
    """Measure every layout and shape, printing as they come."""
    machine = environment.describe()
    rounds = 1 if quick else bench.ROUNDS
    work = [bench.Job(shape, dtype, layout, rounds) for layout in layouts for shape in shapes]
    if not options.json:
        _print_bench_title(dtype, machine)
    results: list[bench.Result] = []
    for measured in _in_turn(work, options.progress):
        if not options.json:
            for result in measured:
                print(_bench_line(result), flush=True)
        results += measured
    if not options.json:
        _print_bench_summary(results)
    return results


# --- progress ---------------------------------------------------------------------------------------------------------

Outcome = TypeVar("Outcome", covariant=True)


class Named(Protocol[Outcome]):
    """A named piece of work."""

    @property
    def name(self) -> str: ...

    def run(self) -> Outcome: ...


def _in_turn(work: Sequence[Named[Outcome]], progress: bool) -> Iterator[Outcome]:
    """Do the pieces of work, with a bar on stderr while one runs."""
    for done, piece in enumerate(work):
        if progress:
            bar = ("#" * (30 * done // len(work))).ljust(30, ".")
            sys.stderr.write(f"\r[{bar}] {done}/{len(work)} {piece.name:.40}\x1b[K")
            sys.stderr.flush()
        outcome = piece.run()
        if progress:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()
        yield outcome


# --- printing ---------------------------------------------------------------------------------------------------------


def _print_environment(found: dict[str, Any]) -> None:
    print(", ".join(f"{name} {version}" for name, version in found["versions"].items()))
    print("backends  " + "; ".join(f"{kind}: {state}" for kind, state in found["backends"].items()))
    print(f"cpu       {found['cpu']}, last cache {found['cache_bytes'] / 2**20:.0f} MiB")
    print(f"threads   {found['threads']}, layer {found['threading_layer']}")
    print(f"kernels   {found['shipped_kernels']}")
    print(f"cache     {found['kernel_cache'] or 'none on disk: no folder can be written'}")


def _print_left_out() -> None:
    for what in environment.left_out():
        print(f"left out  {what}")


def _print_rows(rows: Sequence[check.Row], with_title: bool) -> None:
    if with_title:
        print(f"\n{check.TITLES[rows[0].group]}")
        print(f"  {'':<58}{'measured':>10}{'bound':>13}")
    for row in rows:
        bound = f"{'>=' if row.at_least else '<='} {row.bound:.3g}"
        beside = "".join(f"   {library} {_figure(row, value)}" for library, value in row.beside.items())
        print(f"  {row.name:<58}{_figure(row, row.measured):>10}{bound:>13}  {'ok' if row.ok else 'FAILED':<6}{beside}")
    sys.stdout.flush()


def _figure(row: check.Row, value: float) -> str:
    """Digits with one place, errors with two figures."""
    return f"{value:.1f}" if row.at_least else f"{value:.2g}"


def _print_bench_title(dtype: str, machine: dict[str, Any]) -> None:
    torch = environment.optional("torch")
    peer = f"PyTorch {torch.__version__}" if torch else "PyTorch, which is not installed"
    print(
        f"""
Batch norm of {dtype}, {machine["threads"]} threads; medians, contenders in turn, data from memory
  ms, GB/s   with out= given; counted are 2S bytes forward and inference, 3S backward, S those of x
  of copy    share of the GB/s of a parallel copy with streaming stores, of the same buffers
  plain ms   the call without out=, which allocates its result
  numpy      how many times faster the plain call is than the obvious NumPy formula
  torch      how many times faster the plain call is than the same call of {peer}"""
    )
    if (machine["load"] or 0) > machine["cpus"] / 2:
        print(
            f"  NOTE: {machine['cpus']} processors have a load of {machine['load']:.1f}; other work blurs these figures"
        )
    columns = f"{'ms':>9}{'GB/s':>7}{'of copy':>9}{'plain ms':>10}{'numpy':>8}{'torch':>8}"
    print(f"\n  {'layout':<7}{'shape':<20}{'pass':<10}{columns}")


def _bench_line(result: bench.Result) -> str:
    plain, out = (1e3 * (result.seconds[name] or math.nan) for name in ("fastbn", "fastbn_out"))
    share = result.gb_per_s / result.copy_gb_per_s
    shape = "x".join(map(str, result.shape))
    return (
        f"  {result.layout:<7}{shape:<20}{result.what:<10}{out:9.3f}{result.gb_per_s:7.1f}{share:9.0%}{plain:10.3f}"
        f"{_times(result.speedup('numpy')):>8}{_times(result.speedup('torch')):>8}"
    )


def _times(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.1f}x"


def _print_bench_summary(results: Sequence[bench.Result]) -> None:
    """Geometric means over the shapes."""

    def mean(select: Callable[[bench.Result], float | None], group: Sequence[bench.Result]) -> float | None:
        values = [value for value in map(select, group) if value is not None]
        return math.exp(sum(map(math.log, values)) / len(values)) if values else None

    print()
    for layout, what in dict.fromkeys((result.layout, result.what) for result in results):
        group = [result for result in results if (result.layout, result.what) == (layout, what)]
        share = mean(lambda r: r.gb_per_s / r.copy_gb_per_s, group) or math.nan
        speed = mean(lambda r: r.gb_per_s, group)
        numpy, torch = (
            _times(mean(lambda r: r.speedup("numpy"), group)),
            _times(mean(lambda r: r.speedup("torch"), group)),
        )
        print(f"  {layout:<7}{'geometric mean':<20}{what:<10}{'':9}{speed:7.1f}{share:9.0%}{'':10}{numpy:>8}{torch:>8}")
    print(f"  copy: {mean(lambda r: r.copy_gb_per_s, results):.1f} GB/s")


def _as_dict(rows: Sequence[check.Row]) -> dict[str, Any]:
    return {"ok": all(row.ok for row in rows), "rows": [row.as_dict() for row in rows]}


def _print_json(data: Any) -> None:
    print(json.dumps(_finite(data), indent=2, allow_nan=False))


def _finite(data: Any) -> Any:
    """The same data with null for NaN and infinities, which JSON does not have."""
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


# --- arguments --------------------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False, argument_default=argparse.SUPPRESS)
    common.add_argument("--json", action="store_true", help="print one JSON document and nothing else")
    common.add_argument("--progress", action="store_true", help="a progress bar on stderr even if that is no terminal")
    as_module = os.path.basename(sys.argv[0]) == "__main__.py"
    name = "python -m fastbn" if as_module else "fastbn"
    parser = argparse.ArgumentParser(name, description=DESCRIPTION, parents=[common])
    parser.add_argument("--version", action="version", version=f"fastbn {fastbn.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    made = {
        name: commands.add_parser(
            name, help=summary, parents=[common], description=f"{summary.capitalize()}. {DETAILS.get(name, '')}"
        )
        for name, summary in COMMANDS.items()
    }
    made["check"].add_argument("--quick", action="store_true", help="smaller arrays, and serial kernels alone")
    made["bench"].add_argument("--quick", action="store_true", help="three of the shapes, and fewer repetitions")
    made["bench"].add_argument(
        "--shape", type=_shape, action="append", metavar="N,C,H,W",
        help="measure this shape instead of ResNet-50's at batch 32; may be repeated",
    )  # fmt: skip
    made["bench"].add_argument("--dtype", type=_dtype, default="float32", help="of the data (float32)")
    made["bench"].add_argument(
        "--layout", choices=check.LAYOUTS, type=str.upper, action="append", help="one of the two layouts only"
    )
    made["warmup"].add_argument(
        "--dtype", type=_dtype, action="append", help="compile for this dtype only; may be repeated"
    )
    cuda = made["warmup"].add_argument_group("of CUDA kernels")
    cuda.add_argument(
        "--cuda", type=_gpu, nargs="+", metavar="GPU",
        help="compile for sm_90, or sm_90:114 with so many multiprocessors, or here, the GPU of this machine; all but "
        "float64 unless --dtype says otherwise",
    )  # fmt: skip
    cuda.add_argument(
        "--shape", type=_shape, action="append", metavar="N,C,H,W",
        help="of arrays, in both layouts, instead of ResNet-50's at batch 32; may be repeated",
    )  # fmt: skip
    return parser


def _gpu(text: str) -> Any:
    """A `fastbn.cuda.launch.Device` that need not be here."""
    if importlib.util.find_spec("cupy") is None:
        raise argparse.ArgumentTypeError(f"CUDA kernels need CuPy: {extras.install('cuda12')} (or cuda13)")
    from fastbn.cuda import launch, warmup

    try:
        if text == "here":
            return launch.device(0)._replace(number=launch.ABSENT)
        found = re.fullmatch(r"sm_(\d+)(?::([1-9]\d*))?", text)
        if found is None:
            raise ValueError(f"expected a compute capability such as sm_90, or here, got {text!r}")
        return warmup.device_of(int(found[1]), int(found[2] or 0))
    except (RuntimeError, ValueError) as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _dtype(text: str) -> str:
    found = environment.float_dtypes()
    if text == "bfloat16" and text not in found:
        raise argparse.ArgumentTypeError(f"bfloat16 needs ml_dtypes: {extras.install('bfloat16')}")
    if text not in found:
        raise argparse.ArgumentTypeError(f"expected one of {', '.join(found)}, got {text!r}")
    return text


def _shape(text: str) -> tuple[int, ...]:
    try:
        shape = tuple(int(size) for size in text.split(","))
    except ValueError:
        shape = ()
    if len(shape) < 2 or min(shape) < 1:
        raise argparse.ArgumentTypeError(f"expected positive sizes such as 32,64,56,56, got {text!r}")
    return shape


if __name__ == "__main__":
    sys.exit(run())
