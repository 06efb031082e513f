"""The choice of kernels: from shapes, strides and a device to launches. Nothing here touches memory.

A plan is made once for all calls of the same shapes, strides, alignment, dtype and options. One launch does everything
where a tile of channels can stay on the chip between the reduction and what follows from it: in one block, in a
cluster of blocks, or in several of a cooperative launch. Elsewhere a first pass leaves partials, which a small launch
merges for the second.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from functools import lru_cache
from typing import NamedTuple

from fastbn.cuda import launch
from fastbn.cuda.launch import Device, Launch
from fastbn.cuda.problems import FLOAT32, Operand, Problem, Tuning, tuning_of

NOTHING: Mapping[str, int] = {}
WIDE_FROM = 1 << 31
"""Vectors of a channel from which kernels count them in 64 bits."""

STRATEGIES = ("block", "cluster", "cooperative", "two passes")


class Plan(NamedTuple):
    """Launches in order, and the float64 numbers of scratch that they need behind the results."""

    launches: tuple[Launch, ...]
    partials: int
    counters: int
    """Bytes, zeroed before the first launch."""
    strategy: str

    def bound(self, present: Collection[str]) -> Callable[..., None]:
        """``run(*addresses)`` launches on the current stream, as `Launch.bound` does; counters come last."""
        first, *others = (step.bound(present) for step in self.launches)
        counters = self.counters
        if not others and not counters:
            return first

        def run(*addresses: int) -> None:
            if counters:
                launch.clear(addresses[-1], counters)
            first(*addresses)
            for step in others:
                step(*addresses)

        return run


# --- what all kernels share -------------------------------------------------------------------------------------------


def _vector(problem: Problem, axis: int, most: int) -> int:
    """Elements of a load along an axis: a power of two to which sizes, strides and addresses of all arrays agree."""
    vector = most
    while vector > 1:
        nbytes = vector * problem.itemsize
        if problem.shape[axis] % vector == 0 and all(
            operand.off % nbytes == 0
            and operand.strides[axis] == 1
            and all(
                s % vector == 0 or n == 1
                for i, (s, n) in enumerate(zip(operand.strides, problem.shape, strict=True))
                if i != axis
            )
            for _, operand in problem.operands
        ):
            break
        vector //= 2
    return vector


def _power(number: float) -> int:
    """The least power of two that is not below."""
    return 1 << max(0, math.ceil(number) - 1).bit_length()


class Geometry(NamedTuple):
    """How threads lie on the array."""

    along_channels: bool
    vector: int
    lanes: int
    vectors: int
    """Of one channel."""
    row_vectors: int
    tiles_per_batch: int
    tiles: int

    @property
    def width(self) -> int:
        """Channels of a tile."""
        return self.lanes * (self.vector if self.along_channels else 1)


class Work(NamedTuple):
    """A call on a device: what the choices of threads, blocks and macros depend on."""

    problem: Problem
    tuning: Tuning
    geometry: Geometry


class Kept(NamedTuple):
    """What blocks keep on the chip."""

    kernel: str
    arrays: int


def _work(problem: Problem, kept: Kept | None = None) -> Work:
    tuning = tuning_of(problem.device.architecture)
    return Work(problem, tuning, _geometry(problem, tuning, kept))


def _geometry(problem: Problem, tuning: Tuning, kept: Kept | None) -> Geometry:
    batch, outer, channel, inner = problem.shape
    strides = problem.operands[0][1].strides
    along = channel > 1 and (inner == 1 or abs(strides[2]) < abs(strides[3]))
    most = 16 // problem.itemsize
    if problem.weight or (kept and along):
        most = min(most, 4)  # what a thread needs for eight channels leaves registers for one block a multiprocessor
    vector = _vector(problem, 2 if along else 3, most)
    lanes = _lanes(problem, tuning, vector, kept) if along else 1
    depth = 1 if along else vector
    width = lanes * (vector if along else 1)
    row_vectors = max(1, inner // depth)
    tiles_per_batch = -(-channel // width)
    return Geometry(along, vector, lanes, outer * inner // depth, row_vectors, tiles_per_batch, batch * tiles_per_batch)


SECTOR, LINE = 32, 128  # bytes of a request to memory, and of a line of the cache


def _lanes(problem: Problem, tuning: Tuning, vector: int, kept: Kept | None) -> int:
    """Threads side by side along the channels: tiles are narrower where a device lacks blocks, or a block room."""
    batch, outer, channel, inner = problem.shape
    of_channel = outer * inner * problem.itemsize
    splits = max(1, of_channel // tuning.split_bytes)
    nbytes = tuning.along_channels
    while True:
        lanes = min(_power(channel / vector), max(1, nbytes // (vector * problem.itemsize)), 32)
        blocks = batch * -(-channel // (lanes * vector)) * splits
        room = _room(problem, tuning, vector, lanes, kept) if kept else of_channel
        if nbytes <= SECTOR or (blocks >= problem.device.processors and room >= min(of_channel, tuning.split_bytes)):
            return lanes
        nbytes //= 2


def _room(problem: Problem, tuning: Tuning, vector: int, lanes: int, kept: Kept) -> int:
    """Bytes of each channel that a block can keep."""
    registers = tuning.threads // lanes * _items_per_thread(problem, tuning, True, vector, kept.arrays)
    shared = int(problem.device.shared * tuning.shared_share)
    shared -= scratch_bytes(problem, kept.kernel, lanes * vector, tuning.threads)
    return registers * problem.itemsize + max(0, shared) // (lanes * vector * kept.arrays)


def _most_splits(work: Work) -> int:
    """Blocks of a tile, at most, whose partials are little beside what they read."""
    problem, tuning, geometry = work
    depth = 1 if geometry.along_channels else geometry.vector
    return max(1, geometry.vectors * depth * problem.itemsize // tuning.split_bytes)


def _division(vectors: int, by: int) -> tuple[int, int]:
    """Multiplier and shift for which ``(v * multiplier >> 32) >> shift`` is ``v // by``, for all v < 2^31.

    Granlund & Montgomery, "Division by invariant integers using multiplication", PLDI 1994.
    """
    if by == 1 or vectors >= WIDE_FROM:
        return 0, 0
    bits = (by - 1).bit_length()
    return (1 << (31 + bits)) // by + 1, bits - 1


def _share(geometry: Geometry, splits: int) -> int:
    """Vectors of a channel in each split: where they lie side by side, whole lines of the cache but for the last."""
    share, line = max(1, -(-geometry.vectors // splits)), 1 if geometry.along_channels else LINE // 16
    return -(-share // line) * line


def _launch(
    work: Work, kernel: str, grid: int, threads: int, items: int, *, splits: int,
    shared: int = 0, cluster: int = 1, cooperative: bool = False, fields: Mapping[str, int] = NOTHING,
) -> Launch:  # fmt: skip
    problem, _, geometry = work
    macros = _macros(work, kernel, threads, items, cluster)
    magic, shift = _division(geometry.vectors, geometry.row_vectors)
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
        "share": _share(geometry, splits),
        "eps": problem.eps,
    }
    weight = (("weight", Operand(problem.weight_strides, 0)),) if problem.weight else ()
    for name, operand in problem.operands + weight:
        everything |= {f"{name}_strides_{axis}": s for axis, s in zip(launch.AXES, operand.strides, strict=True)}
    everything |= {f"{name}_type": dtype for name, dtype in problem.types}
    shared += scratch_bytes(problem, kernel, geometry.width, threads)
    compiled = launch.function(problem.device.number, kernel, macros)
    return Launch(compiled, grid, threads, shared, cooperative, launch.TILES, everything)


def _macros(work: Work, kernel: str, threads: int, items: int, cluster: int = 1) -> launch.Macros:
    problem, tuning, geometry = work
    blocks = tuning.backward_blocks if kernel == "backward" and geometry.along_channels else 2
    options = {"WEIGHT": problem.weight, "RELU": int(problem.relu), "RESIDUAL": int(problem.residual)}
    return (
        ("DTYPE", problem.dtype),
        ("VECTOR", geometry.vector),
        ("ALONG_CHANNELS", int(geometry.along_channels)),
        ("LANES", geometry.lanes),
        ("THREADS", threads),
        ("ITEMS_PER_THREAD", items),
        ("WIDE", int(geometry.vectors >= WIDE_FROM)),
        *((name, value if name in launch.OPTIONAL[kernel] else 0) for name, value in options.items()),
        ("CLUSTER", cluster),
        ("MIN_BLOCKS", blocks),
    )


class Scratch(NamedTuple):
    """Numbers of a channel that a block has in shared memory."""

    coefficients: int
    """Of the elements' arithmetic: Affine; Xhat and Linear."""
    merged: int
    """Float64, of each warp and once more: Partial, Sums."""


SCRATCH = {
    "statistics": Scratch(0, 4),
    "finish_moments": Scratch(0, 4),
    "forward": Scratch(5, 4),
    "normalize": Scratch(5, 0),
    "grad_sums": Scratch(8, 2),
    "finish_sums": Scratch(8, 2),
    "backward": Scratch(8, 2),
    "grad_input": Scratch(8, 0),
}


def doubles_of_partial(problem: Problem) -> int:
    """Float64 numbers of a `Partial` of moments.cuh: float64 data have units."""
    return 5 if problem.itemsize == 8 else 4


def scratch_bytes(problem: Problem, kernel: str, width: int, threads: int) -> int:
    """Shared memory of a block beside what it keeps: MERGE_BYTES, AFFINE_BYTES and SUM_BYTES of the kernels."""
    coefficients, merged = SCRATCH[kernel]
    merged = doubles_of_partial(problem) if merged == 4 else merged
    nbytes = width * (coefficients * max(4, problem.itemsize) + 8 * merged * (threads // 32 + 1))
    return -(-nbytes // 16) * 16


def _threads(geometry: Geometry, vectors: int, most: int) -> int:
    """As many threads as there are vectors for them, whole warps."""
    return min(most, max(32, _power(vectors * geometry.lanes)))


def _items_per_thread(problem: Problem, tuning: Tuning, along: bool, vector: int, arrays: int) -> int:
    """Vectors of each array that a thread holds in registers."""
    items = max(1, tuning.items_per_thread // arrays)
    if along and vector * problem.itemsize >= 16:
        items = max(1, items // 2)  # each channel of a thread takes registers of its own
    return min(items, 2) if problem.weight else items


def _items_of(work: Work, arrays: int) -> int:
    problem, tuning, geometry = work
    return _items_per_thread(problem, tuning, geometry.along_channels, geometry.vector, arrays)


# --- one launch -------------------------------------------------------------------------------------------------------


def _resident(work: Work, kernel: str, arrays: int, partial: int, forced: str | None) -> Plan | None:
    """The plan that keeps `arrays` arrays of a tile on the chip; None where they do not fit."""
    problem, tuning, geometry = work
    device, vectors, lanes = problem.device, max(1, geometry.vectors), geometry.lanes
    items = _items_of(work, arrays)
    vector_bytes = geometry.vector * problem.itemsize
    budget = int(device.shared * tuning.shared_share)

    def fitted(share: int) -> tuple[int, int] | None:
        """Threads and bytes kept for a share of a tile's vectors in each block."""
        threads = _threads(geometry, share, tuning.threads)
        chunks = -(-share // (threads // lanes * items)) - 1  # the last stays in registers
        kept = chunks * items * threads * vector_bytes * arrays
        fits = kept + scratch_bytes(problem, kernel, geometry.width, threads) <= budget or kept == 0
        return (threads, kept) if fits else None

    def single(splits: int, strategy: str) -> Plan | None:
        if (fit := fitted(_share(geometry, splits))) is None:
            return None
        threads, kept = fit
        if splits > 1 and splits > _at_once(work, kernel, threads, items, kept, cluster=splits):
            return None
        grid = geometry.tiles * splits
        step = _launch(work, kernel, grid, threads, items, splits=splits, shared=kept, cluster=splits)
        return Plan((step,), _slots(problem, splits, partial), 0, strategy)

    most = _most_splits(work)
    if forced in (None, "block"):
        enough = geometry.tiles >= tuning.waves * device.processors or vectors <= tuning.threads // lanes or most == 1
        if forced or enough or tuning.cluster == 1:
            plan = single(1, "block")
            few = geometry.tiles * 2 < device.processors and vectors > 4 * tuning.threads // lanes
            if plan and (forced or enough or not few):
                return plan
    if forced in (None, "cluster"):
        splits, largest = 2, None
        while splits <= tuning.cluster:
            last = splits * 2 > min(tuning.cluster, most)
            enough = geometry.tiles * splits >= tuning.waves * device.processors
            small = -(-vectors // splits) <= tuning.threads // lanes
            largest = single(splits, "cluster") or largest
            if largest and (enough or small or last or forced):
                break
            splits *= 2
        if largest:
            return largest
    if forced in (None, "cooperative"):
        return _cooperative(work, kernel, items, partial, fitted)
    return None


def _at_once(work: Work, kernel: str, threads: int, items: int, kept: int, cluster: int = 1) -> int:
    """Blocks of the compiled kernel that run on the device at once: those of a group wait for one another."""
    problem, _, geometry = work
    device, macros = problem.device, _macros(work, kernel, threads, items, cluster)
    shared = kept + scratch_bytes(problem, kernel, geometry.width, threads)
    return device.processors * launch.blocks_per_processor(device.number, kernel, macros, threads, shared)


def _cooperative(
    work: Work, kernel: str, items: int, partial: int, fitted: Callable[[int], tuple[int, int] | None]
) -> Plan | None:
    """Groups of blocks, all on the device at once, that take tile after tile."""
    problem, _, geometry = work
    device, vectors = problem.device, max(1, geometry.vectors)
    splits = 1
    while fitted(_share(geometry, splits)) is None:
        splits *= 2
        if splits > 32 * device.processors:
            return None
    fit = fitted(_share(geometry, splits))
    assert fit is not None  # for the type checker: the loop ended
    threads, kept = fit
    blocks = _at_once(work, kernel, threads, items, kept)
    if splits > blocks:
        return None
    groups = min(geometry.tiles, blocks // splits)
    useful = min(-(-vectors // (threads // geometry.lanes * items)), _most_splits(work))
    splits = min(blocks // groups, max(splits, useful))
    step = _launch(work, kernel, groups * splits, threads, items, splits=splits, shared=kept, cooperative=True)
    return Plan((step,), _slots(problem, splits, partial), 4 * groups, "cooperative")


# --- passes that keep nothing -----------------------------------------------------------------------------------------


def _pass(work: Work, kernel: str, arrays: int, fields: Mapping[str, int] = NOTHING) -> tuple[Launch, int]:
    """A launch, and its blocks for each tile: the device is full, and a block has enough to do."""
    problem, tuning, geometry = work
    threads, items = _threads(geometry, geometry.vectors, tuning.threads), _items_of(work, arrays)
    wanted = -(-tuning.passes * problem.device.processors // max(1, geometry.tiles))
    enough = geometry.vectors // (2 * threads // geometry.lanes * items)
    splits = max(1, min(wanted, enough, _most_splits(work)))
    step = _launch(work, kernel, geometry.tiles * splits, threads, items, splits=splits, fields=fields)
    return step, splits


MERGED_CHANNELS = 4
"""Of a block that merges partials: their float64 numbers fill a sector."""


def _slots(problem: Problem, splits: int, partial: int) -> int:
    """Float64 numbers of partials of each split and channel, and of moments a row for what their means leave."""
    return problem.kept * (splits * partial + (partial > 2)) if splits > 1 else 0


def _reduction(work: Work, kernel: str, arrays: int, finish: str) -> tuple[tuple[Launch, ...], int]:
    """A pass that reduces, and the merge of its partials where there are several; splits."""
    problem, tuning, _ = work
    first, splits = _pass(work, kernel, arrays)
    if splits == 1:
        return (first,), splits
    lanes = min(MERGED_CHANNELS, _power(problem.shape[2]))
    tiles_per_batch = -(-problem.shape[2] // lanes)
    geometry = Geometry(True, 1, lanes, splits, 1, tiles_per_batch, problem.shape[0] * tiles_per_batch)
    plain = problem._replace(dtype=max(problem.dtype, FLOAT32), weight=0)  # one kernel for all but float64
    threads = _threads(geometry, splits, tuning.threads)
    merge = Work(plain, tuning, geometry)
    second = _launch(merge, finish, geometry.tiles, threads, 1, splits=1, fields={"summed": splits})
    return (first, second), splits


def _one_pass(work: Work, kernel: str, arrays: int, finish: str, partial: int) -> Plan:
    launches, splits = _reduction(work, kernel, arrays, finish)
    return Plan(launches, _slots(work.problem, splits, partial), 0, "one pass")


def _two_passes(work: Work, kernels: tuple[str, str, str], arrays: int, partial: int) -> Plan:
    """A pass that reduces; the next goes backwards, through what the cache still holds."""
    reduce, finish, write = kernels
    launches, splits = _reduction(work, reduce, arrays, finish)
    last, _ = _pass(work, write, arrays, {"summed": splits, "backwards": 1})
    slots = max(_slots(work.problem, splits, partial), work.problem.kept * (partial > 2))
    return Plan((*launches, last), slots, 0, "two passes")


# --- the functions ----------------------------------------------------------------------------------------------------

FORCED: dict[str, str | None] = {"strategy": None}  # for tests and tuning: one of STRATEGIES


@lru_cache(maxsize=4096)
def moments(problem: Problem) -> Plan:
    """Count, mean, M2 and rstd: one pass, and the merge of its partials where it was split."""
    return _one_pass(_work(problem), "statistics", 1, "finish_moments", doubles_of_partial(problem))


@lru_cache(maxsize=4096)
def grad_sums(problem: Problem) -> Plan:
    """Likewise dgamma and dbeta."""
    return _one_pass(_work(problem), "grad_sums", 2, "finish_sums", 2)


@lru_cache(maxsize=4096)
def normalize(problem: Problem) -> Plan:
    """One elementwise pass with given statistics."""
    return Plan((_pass(_work(problem), "normalize", 1)[0],), 0, 0, "one pass")


@lru_cache(maxsize=4096)
def grad_input(problem: Problem) -> Plan:
    """One elementwise pass with given numbers."""
    return Plan((_pass(_work(problem), "grad_input", 2)[0],), 0, 0, "one pass")


@lru_cache(maxsize=4096)
def forward(problem: Problem) -> Plan:
    """Moments and the output, in one launch or two."""
    return _either(problem, "forward", 1, ("statistics", "finish_moments", "normalize"), doubles_of_partial(problem))


@lru_cache(maxsize=4096)
def backward(problem: Problem) -> Plan:
    """Sums and the gradient of x, in one launch or two."""
    return _either(problem, "backward", 2, ("grad_sums", "finish_sums", "grad_input"), 2)


RUNNING_THREADS = 128


@lru_cache(maxsize=4096)
def update_running(device: Device, kept: int, types: tuple[int, ...], skip_nonfinite: bool) -> Launch:
    """Running statistics after one more batch; types are those of `launch.MOMENTS`."""
    compiled = launch.function(device.number, "update_running", (("THREADS", RUNNING_THREADS),))
    fields = {f"{name}_type": dtype for name, dtype in zip(launch.MOMENTS, types, strict=True)}
    fields |= {"channels": kept, "skip_nonfinite": int(skip_nonfinite)}
    grid = -(-kept // RUNNING_THREADS)
    return Launch(compiled, grid, RUNNING_THREADS, 0, False, launch.RUNNING, fields)


def _either(problem: Problem, kernel: str, arrays: int, passes: tuple[str, str, str], partial: int) -> Plan:
    forced = FORCED["strategy"]
    if forced != "two passes":
        plan = _resident(_work(problem, Kept(kernel, arrays)), kernel, arrays, partial, forced)
        if plan is not None:
            return plan
    return _two_passes(_work(problem), passes, arrays, partial)
