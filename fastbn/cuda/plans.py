"""The choice of kernels: from shapes, strides and a device to launches. Nothing here touches memory.

A plan is made once for all calls of the same shapes, strides, alignment, dtype and options. One launch does everything
where a tile of channels can stay on the chip between the reduction and what follows from it: in one block, in a
cluster of blocks, or in several of a cooperative launch. Elsewhere a first pass leaves partials, which a small launch
merges for the second.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

from fastbn.cuda import launch
from fastbn.cuda.geometry import (
    SCRATCH,
    Geometry,
    Kept,
    Work,
    deeper,
    doubles_of,
    items_of,
    most_splits,
    power,
    scratch_bytes,
    share_of,
    steps_of,
    threads_of,
    work_of,
)
from fastbn.cuda.launch import Device, Launch
from fastbn.cuda.problems import FLOAT32, FLOAT64, OF_X, Placement, Problem, Tuning

NOTHING: Mapping[str, int] = {}
STRATEGIES = ("block", "cluster", "cooperative", "two passes")


class Plan(NamedTuple):
    """Launches in order, and the float64 numbers of scratch that they need behind the results."""

    launches: tuple[Launch, ...]
    partials: int
    counters: int
    """Bytes, zeroed before the first launch."""
    strategy: str

    def bound(self, present: Sequence[str]) -> Callable[..., None]:
        """``run(*addresses, *scalars)`` launches on the current stream, as `Launch.bound` does."""
        first, *others = (step.bound(present) for step in self.launches)
        counters = self.counters
        if not others and not counters:
            return first

        cleared = [*present].index("counters") if counters else 0

        def run(*given: float) -> None:
            if counters:
                launch.clear(int(given[cleared]), counters)
            first(*given)
            for step in others:
                step(*given)

        return run


# --- one launch of any kernel -----------------------------------------------------------------------------------------


def _division(by: int) -> tuple[int, int]:
    """Multiplier and shift for which ``(v * multiplier >> 32) >> shift`` is ``v // by``, for all v < 2^31.

    Granlund & Montgomery, "Division by invariant integers using multiplication", PLDI 1994.
    """
    if by == 1:
        return 0, 0
    bits = (by - 1).bit_length()
    return (1 << (31 + bits)) // by + 1, bits - 1


def _launch(
    work: Work, kernel: str, grid: int, threads: int, items: int, *, splits: int,
    shared: int = 0, cluster: int = 1, cooperative: bool = False, fields: Mapping[str, int] = NOTHING,
) -> Launch:  # fmt: skip
    problem, _, geometry = work
    macros = _macros(work, kernel, threads, items, cluster)
    magic, shift = (0, 0) if geometry.wide else _division(geometry.row_vectors)
    everything: dict[str, float] = {
        **dict(problem.options),
        **fields,
        "batches": problem.shape[0],
        "channels": problem.shape[2],
        "vectors": geometry.vectors,
        "row_vectors": geometry.row_vectors,
        "row_magic": magic,
        "row_shift": shift,
        "tiles_per_batch": geometry.tiles_per_batch,
        "tiles": geometry.tiles,
        "splits": splits,
        "share": share_of(geometry, splits),
        "eps": problem.eps,
    }
    weight = (("weight", Placement(problem.weight_strides, 0)),) if problem.weight else ()
    for name, operand in problem.operands + weight:
        everything |= {f"{name}_strides_{axis}": s for axis, s in zip(launch.AXES, operand.strides, strict=True)}
    everything |= {f"{name}_type": dtype for name, dtype in problem.types}
    shared += scratch_bytes(problem, kernel, geometry.width, geometry.scratch(threads))
    compiled = launch.function(problem.device.number, kernel, macros)
    return Launch(compiled, grid, threads, shared, cooperative, launch.TILES, everything)


def min_blocks(kernel: str, along_channels: bool, dtype: int, options: Mapping[str, int], tuning: Tuning) -> int:
    """Blocks of a multiprocessor at least: with one instead of two, a thread has twice the registers."""
    if kernel != "backward" or not along_channels:
        return 2
    # Where float64's y is computed again beside weights, 128 registers are one too few.
    heavy = dtype == FLOAT64 and options["RELU"] == OF_X and options["WEIGHT"] > 0
    return 1 if heavy else tuning.backward_blocks


def _macros(work: Work, kernel: str, threads: int, items: int, cluster: int = 1) -> launch.Macros:
    problem, tuning, geometry = work
    options = {"WEIGHT": problem.weight, "RELU": int(problem.relu), "RESIDUAL": int(problem.residual)}
    blocks = min_blocks(kernel, geometry.along_channels, problem.dtype, options, tuning)
    return (
        ("DTYPE", problem.dtype),
        ("VECTOR", geometry.vector),
        ("ALONG_CHANNELS", int(geometry.along_channels)),
        ("RUN", geometry.run),
        ("LANES", geometry.lanes),
        ("THREADS", threads),
        ("ITEMS_PER_THREAD", items),
        ("WIDE", int(geometry.wide)),
        ("STEPS", 0 if geometry.wide else steps_of(problem, geometry)),
        *((name, value if name in launch.OPTIONAL[kernel] else 0) for name, value in options.items()),
        ("CLUSTER", cluster),
        ("MIN_BLOCKS", blocks),
    )


# --- all in one launch ------------------------------------------------------------------------------------------------


def _resident(work: Work, kernel: str, arrays: int, forced: str | None) -> Plan | None:
    """The plan that keeps `arrays` arrays of a tile on the chip; None where they do not fit."""
    problem, tuning, geometry = work
    device, vectors, lanes = problem.device, max(1, geometry.vectors), geometry.lanes
    items = items_of(work, arrays)
    vector_bytes = geometry.vector * problem.itemsize
    budget = int(device.shared * tuning.shared_share)

    def fitted(share: int) -> tuple[int, int] | None:
        """Threads and bytes kept for a share of a tile's vectors in each block."""
        threads = threads_of(geometry, share, tuning.threads)
        chunks = -(-share // (threads // lanes * items)) - 1  # the last stays in registers
        kept = chunks * items * threads * vector_bytes * arrays
        fits = kept + scratch_bytes(problem, kernel, geometry.width, geometry.scratch(threads)) <= budget or kept == 0
        return (threads, kept) if fits else None

    def single(splits: int, strategy: str) -> Plan | None:
        if (fit := fitted(share_of(geometry, splits))) is None:
            return None
        threads, kept = fit
        if splits > 1 and splits > _at_once(work, kernel, threads, items, kept, cluster=splits):
            return None
        grid = geometry.tiles * splits
        step = _launch(work, kernel, grid, threads, items, splits=splits, shared=kept, cluster=splits)
        return Plan((step,), _slots(problem, kernel, splits), 0, strategy)

    most = most_splits(work)
    if forced in (None, "block"):
        enough = geometry.tiles >= tuning.waves * device.processors or vectors <= tuning.threads // lanes or most == 1
        if forced or enough or tuning.cluster == 1:
            plan = single(1, "block")
            few = geometry.tiles * 2 < device.processors and vectors > 4 * tuning.threads // lanes
            if plan and (forced or enough or not few):
                return plan
    if forced in (None, "cluster"):
        splits, sizes = 2, list[int]()
        while splits <= tuning.cluster:
            sizes.insert(0, splits)
            last = splits * 2 > min(tuning.cluster, most)
            enough = geometry.tiles * splits >= tuning.waves * device.processors
            small = -(-vectors // splits) <= tuning.threads // lanes
            if enough or small or last or forced:
                # Largest first, as each has a kernel of its own, compiled to ask how many blocks there is room for.
                for plan in (single(size, "cluster") for size in sizes):
                    if plan:
                        return plan
                sizes.clear()
            splits *= 2
    if forced in (None, "cooperative"):
        return _cooperative(work, kernel, items, fitted)
    return None


def _at_once(work: Work, kernel: str, threads: int, items: int, kept: int, cluster: int = 1) -> int:
    """Blocks of the compiled kernel that run on the device at once: those of a group wait for one another."""
    problem, _, geometry = work
    device, macros = problem.device, _macros(work, kernel, threads, items, cluster)
    shared = kept + scratch_bytes(problem, kernel, geometry.width, geometry.scratch(threads))
    return device.processors * launch.blocks_per_processor(device.number, kernel, macros, threads, shared)


def _cooperative(work: Work, kernel: str, items: int, fitted: Callable[[int], tuple[int, int] | None]) -> Plan | None:
    """Groups of blocks, all on the device at once, that take tile after tile."""
    problem, _, geometry = work
    device, vectors = problem.device, max(1, geometry.vectors)
    splits = 1
    while fitted(share_of(geometry, splits)) is None:
        splits *= 2
        if splits > 32 * device.processors:
            return None
    fit = fitted(share_of(geometry, splits))
    assert fit is not None  # for the type checker: the loop ended
    threads, kept = fit
    blocks = _at_once(work, kernel, threads, items, kept)
    if splits > blocks:
        return None
    groups = min(geometry.tiles, blocks // splits)
    useful = min(-(-vectors // (threads // geometry.lanes * items)), most_splits(work))
    splits = min(blocks // groups, max(splits, useful))
    step = _launch(work, kernel, groups * splits, threads, items, splits=splits, shared=kept, cooperative=True)
    return Plan((step,), _slots(problem, kernel, splits), 4 * groups, "cooperative")


# --- passes that keep nothing -----------------------------------------------------------------------------------------


def _pass(work: Work, kernel: str, arrays: int, fields: Mapping[str, int] = NOTHING) -> tuple[Launch, int]:
    """A launch, and its blocks for each tile: the device is full, and a block has enough to do."""
    items, deep = items_of(work, arrays), deeper(work, kernel, arrays)
    if deep is not None and _fills(*deep):
        work, items = deep
    geometry = work.geometry
    splits = max(1, min(_wanted(work), _useful(work, items), most_splits(work)))
    step = _launch(work, kernel, geometry.tiles * splits, _threads(work), items, splits=splits, fields=fields)
    return step, splits


def _threads(work: Work) -> int:
    return threads_of(work.geometry, work.geometry.vectors, work.tuning.threads)


def _wanted(work: Work) -> int:
    """Blocks for each tile that fill the device."""
    return -(-work.tuning.passes * work.problem.device.processors // max(1, work.geometry.tiles))


def _useful(work: Work, items: int) -> int:
    """Blocks for each tile that have two chunks each."""
    return work.geometry.vectors // (2 * _threads(work) // work.geometry.lanes * items)


def _fills(work: Work, items: int) -> bool:
    return _useful(work, items) >= _wanted(work)


MERGED_CHANNELS = 4
"""Of a block that merges partials: their float64 numbers fill a sector."""


def _slots(problem: Problem, kernel: str, splits: int) -> int:
    """Float64 numbers of partials of each split and channel, and of moments a row for what their means leave."""
    if splits <= 1:
        return 0
    return problem.kept * splits * doubles_of(problem, SCRATCH[kernel].merged) + _rests(problem, kernel)


def _rests(problem: Problem, kernel: str) -> int:
    """What rounding leaves of means, one of each channel."""
    return problem.kept if SCRATCH[kernel].merged == "moments" else 0


def _reduction(work: Work, kernel: str, arrays: int, finish: str) -> tuple[tuple[Launch, ...], int]:
    """A pass that reduces, and the merge of its partials where there are several; splits."""
    problem, tuning, _ = work
    first, splits = _pass(work, kernel, arrays)
    if splits == 1:
        return (first,), splits
    lanes = min(MERGED_CHANNELS, power(problem.shape[2]))
    tiles_per_batch = -(-problem.shape[2] // lanes)
    geometry = Geometry(True, 1, lanes, splits, 1, tiles_per_batch, problem.shape[0] * tiles_per_batch)
    plain = problem._replace(dtype=max(problem.dtype, FLOAT32), weight=0)  # one kernel for all but float64
    threads = threads_of(geometry, splits, tuning.threads)
    merge = Work(plain, tuning, geometry)
    second = _launch(merge, finish, geometry.tiles, threads, 1, splits=1, fields={"summed": splits})
    return (first, second), splits


def _one_pass(work: Work, kernel: str, arrays: int, finish: str) -> Plan:
    launches, splits = _reduction(work, kernel, arrays, finish)
    return Plan(launches, _slots(work.problem, kernel, splits), 0, "one pass")


def _two_passes(work: Work, kernels: tuple[str, str, str], arrays: int) -> Plan:
    """A pass that reduces; the next goes backwards, through what the cache still holds."""
    reduce, finish, write = kernels
    launches, splits = _reduction(work, reduce, arrays, finish)
    last, _ = _pass(work, write, arrays, {"summed": splits, "backwards": 1})
    slots = max(_slots(work.problem, reduce, splits), _rests(work.problem, reduce))
    return Plan((*launches, last), slots, 0, "two passes")


# --- the functions ----------------------------------------------------------------------------------------------------

FORCED: dict[str, str | None] = {"strategy": None}  # for tests and tuning: one of STRATEGIES


@lru_cache(maxsize=4096)
def moments(problem: Problem) -> Plan:
    """Count, mean, M2 and rstd: one pass, and the merge of its partials where it was split."""
    return _one_pass(work_of(problem), "statistics", 1, "finish_moments")


@lru_cache(maxsize=4096)
def grad_sums(problem: Problem) -> Plan:
    """Likewise dgamma and dbeta."""
    return _one_pass(work_of(problem), "grad_sums", 2, "finish_sums")


@lru_cache(maxsize=4096)
def normalize(problem: Problem) -> Plan:
    """One elementwise pass with given statistics."""
    return Plan((_pass(work_of(problem), "normalize", 1)[0],), 0, 0, "one pass")


@lru_cache(maxsize=4096)
def grad_input(problem: Problem) -> Plan:
    """One elementwise pass with given numbers."""
    return Plan((_pass(work_of(problem), "grad_input", 2)[0],), 0, 0, "one pass")


@lru_cache(maxsize=4096)
def forward(problem: Problem) -> Plan:
    """Moments and the output, in one launch or two."""
    return _either(problem, "forward", 1, ("statistics", "finish_moments", "normalize"))


@lru_cache(maxsize=4096)
def backward(problem: Problem) -> Plan:
    """Sums and the gradient of x, in one launch or two."""
    return _either(problem, "backward", 2, ("grad_sums", "finish_sums", "grad_input"))


RUNNING_THREADS = 128


@lru_cache(maxsize=4096)
def update_running(device: Device, kept: int, types: tuple[int, ...], skip_nonfinite: bool) -> Launch:
    """Running statistics after one more batch; types are those of `launch.MOMENTS`."""
    compiled = launch.function(device.number, "update_running", (("THREADS", RUNNING_THREADS),))
    fields = {f"{name}_type": dtype for name, dtype in zip(launch.MOMENTS, types, strict=True)}
    fields |= {"channels": kept, "skip_nonfinite": int(skip_nonfinite)}
    grid = -(-kept // RUNNING_THREADS)
    return Launch(compiled, grid, RUNNING_THREADS, 0, False, launch.RUNNING, fields)


def _either(problem: Problem, kernel: str, arrays: int, passes: tuple[str, str, str]) -> Plan:
    forced = FORCED["strategy"]
    if forced != "two passes":
        plan = _resident(work_of(problem, Kept(kernel, arrays)), kernel, arrays, forced)
        if plan is not None:
            return plan
    return _two_passes(work_of(problem), passes, arrays)
