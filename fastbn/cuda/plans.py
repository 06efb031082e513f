"""The choice of kernels: from shapes, strides and a device to launches. Nothing here touches memory.

A plan is made once for all calls of the same shapes, strides, alignment, dtype and options. One launch does everything
where a tile of channels can stay on the chip between the reduction and what follows from it: in one block, in a
cluster of blocks, or in several of a cooperative launch. Elsewhere a first pass leaves partials, which a second merges.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from fastbn.cuda import launch
from fastbn.cuda.launch import Device, Launch

Shape = tuple[int, ...]
Strides = tuple[int, ...]  # in elements


@dataclass(frozen=True)
class Tuning:
    """Numbers that decide speed, never results beyond their rounding."""

    threads: int = 256
    """Of a block, where there is work for so many."""
    items_per_thread: int = 8
    """Vectors of one array that a thread holds in registers; half as many where it holds two arrays."""
    along_channels: int = 128
    """Bytes of neighbouring channels that a tile is wide: whole cache lines, and no more scratch than needed."""
    cluster: int = 1
    """Blocks of the largest cluster."""
    shared_share: float = 0.45
    """Of the shared memory a block may have, for what it keeps: two blocks run beside each other."""
    waves: int = 2
    """Blocks for each multiprocessor before splitting a tile stops paying."""
    passes: int = 8
    """Blocks for each multiprocessor in passes that keep nothing."""
    backward_blocks: int = 2
    """Blocks for each multiprocessor, at least, in the backward pass of one launch, channels-last."""


# By compute capability; a device takes the last that is not above its own. H100 and later have clusters; the sizes of
# registers are the same on all, hence the one choice of threads and vectors; only for 10.0, where two blocks' 128 are a
# few too little for backward passes, does the compiler spill.
TUNING = {
    70: Tuning(),
    80: Tuning(),
    90: Tuning(cluster=8),
    100: Tuning(cluster=8, backward_blocks=1),
    120: Tuning(cluster=8, shared_share=0.9),
}

NOTHING: Mapping[str, int] = {}
WIDE_FROM = 1 << 31
"""Vectors of a channel from which kernels count them in 64 bits."""

STRATEGIES = ("block", "cluster", "cooperative", "two passes")


def tuning_of(architecture: int) -> Tuning:
    """The tuning of a compute capability."""
    return TUNING[max(known for known in TUNING if known <= max(architecture, min(TUNING)))]


class Operand(NamedTuple):
    """What matters of an array: strides in elements, and bytes by which its address is off a multiple of 16."""

    strides: Strides
    off: int


Operands = tuple[tuple[str, Operand], ...]


class Problem(NamedTuple):
    """One call, but for addresses and values."""

    device: Device
    shape: Shape
    dtype: int
    itemsize: int
    operands: Operands
    """Arrays that are read or written by vectors, by their names in `launch.ARRAYS`, x or dy first."""
    weight: int
    """0 none, 1 bool, 2 float64."""
    weight_strides: Strides
    types: tuple[tuple[str, int], ...]
    """The dtypes of per-channel numbers, by their names in `launch.PARAMETERS`."""
    relu: bool
    residual: bool
    options: tuple[tuple[str, int], ...] = ()
    """Fields of the kernels' argument."""
    eps: float = 0.0

    @property
    def pointers(self) -> set[str]:
        """Names of the arrays and numbers that calls have."""
        return {name for name, _ in self.operands + self.types} | ({"weight"} if self.weight else set())

    @property
    def kept(self) -> int:
        """Kept indices, each with statistics of its own."""
        return self.shape[0] * self.shape[2]


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


class Work(NamedTuple):
    """A call on a device: what the choices of threads, blocks and macros depend on."""

    problem: Problem
    tuning: Tuning
    geometry: Geometry


def _work(problem: Problem, resident: bool = False) -> Work:
    tuning = tuning_of(problem.device.architecture)
    return Work(problem, tuning, _geometry(problem, tuning, resident))


def _geometry(problem: Problem, tuning: Tuning, resident: bool) -> Geometry:
    batch, outer, channel, inner = problem.shape
    strides = problem.operands[0][1].strides
    along = channel > 1 and (inner == 1 or abs(strides[2]) < abs(strides[3]))
    most = 16 // problem.itemsize
    if problem.weight or (resident and along):
        most = min(most, 4)  # what a thread needs for eight channels leaves registers for one block a multiprocessor
    vector = _vector(problem, 2 if along else 3, most)
    lanes = 1
    if along:
        lanes = min(_power(channel / vector), max(1, tuning.along_channels // (vector * problem.itemsize)), 32)
    depth = 1 if along else vector
    width = lanes * (vector if along else 1)
    row_vectors = max(1, inner // depth)
    tiles_per_batch = -(-channel // width)
    return Geometry(along, vector, lanes, outer * inner // depth, row_vectors, tiles_per_batch, batch * tiles_per_batch)


def _division(vectors: int, by: int) -> tuple[int, int]:
    """Multiplier and shift for which ``(v * multiplier >> 32) >> shift`` is ``v // by``, for all v < 2^31.

    Granlund & Montgomery, "Division by invariant integers using multiplication", PLDI 1994.
    """
    if by == 1 or vectors >= WIDE_FROM:
        return 0, 0
    bits = (by - 1).bit_length()
    return (1 << (31 + bits)) // by + 1, bits - 1


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
        "share": -(-geometry.vectors // splits),
        "eps": problem.eps,
    }
    weight = (("weight", Operand(problem.weight_strides, 0)),) if problem.weight else ()
    for name, operand in problem.operands + weight:
        everything |= {f"{name}_strides_{axis}": s for axis, s in zip(launch.AXES, operand.strides, strict=True)}
    everything |= {f"{name}_type": dtype for name, dtype in problem.types}
    shared += scratch_bytes(work, kernel, threads)
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


MERGING_MOMENTS = ("statistics", "finish_moments", "forward", "normalize")


def doubles_of_partial(problem: Problem) -> int:
    """Float64 numbers of a `Partial` of moments.cuh: float64 data have units."""
    return 5 if problem.itemsize == 8 else 4


def scratch_bytes(work: Work, kernel: str, threads: int) -> int:
    """Shared memory in which a block merges: MERGE_BYTES and SUM_BYTES of the kernels."""
    problem, _, geometry = work
    width, warps = geometry.lanes * (geometry.vector if geometry.along_channels else 1), threads // 32
    if kernel in MERGING_MOMENTS:
        return -(-8 * doubles_of_partial(problem) * width * (warps + 1) // 16) * 16
    return 16 * width * warps


def _threads(geometry: Geometry, vectors: int, most: int) -> int:
    """As many threads as there are vectors for them, whole warps."""
    return min(most, max(32, _power(vectors * geometry.lanes)))


def _items_per_thread(work: Work, arrays: int) -> int:
    """Vectors of each array that a thread holds in registers."""
    problem, tuning, geometry = work
    items = max(1, tuning.items_per_thread // arrays)
    if geometry.along_channels and geometry.vector * problem.itemsize >= 16:
        items = max(1, items // 2)  # each channel of a thread takes registers of its own
    return min(items, 2) if problem.weight else items


# --- one launch -------------------------------------------------------------------------------------------------------


def _resident(work: Work, kernel: str, arrays: int, partial: int, forced: str | None) -> Plan | None:
    """The plan that keeps `arrays` arrays of a tile on the chip; None where they do not fit."""
    problem, tuning, geometry = work
    device, vectors, lanes = problem.device, max(1, geometry.vectors), geometry.lanes
    items = _items_per_thread(work, arrays)
    vector_bytes = geometry.vector * problem.itemsize
    budget = int(device.shared * tuning.shared_share)

    def fitted(share: int) -> tuple[int, int] | None:
        """Threads and bytes kept for a share of a tile's vectors in each block."""
        threads = _threads(geometry, share, tuning.threads)
        chunks = -(-share // (threads // lanes * items)) - 1  # the last stays in registers
        kept = chunks * items * threads * vector_bytes * arrays
        fits = kept + scratch_bytes(work, kernel, threads) <= budget or kept == 0
        return (threads, kept) if fits else None

    def single(splits: int, strategy: str) -> Plan | None:
        if (fit := fitted(-(-vectors // splits))) is None:
            return None
        threads, kept = fit
        grid = geometry.tiles * splits
        step = _launch(work, kernel, grid, threads, items, splits=splits, shared=kept, cluster=splits)
        slots = problem.kept * splits * partial if splits > 1 else 0
        return Plan((step,), slots, 0, strategy)

    if forced in (None, "block"):
        enough = geometry.tiles >= tuning.waves * device.processors or vectors <= tuning.threads // lanes
        if forced or enough or tuning.cluster == 1:
            plan = single(1, "block")
            few = geometry.tiles * 2 < device.processors and vectors > 4 * tuning.threads // lanes
            if plan and (forced or enough or not few):
                return plan
    if forced in (None, "cluster"):
        splits = 2
        while splits <= tuning.cluster:
            last = splits * 2 > tuning.cluster
            plan = single(splits, "cluster")
            enough = geometry.tiles * splits >= tuning.waves * device.processors
            small = -(-vectors // splits) <= tuning.threads // lanes
            if plan and (enough or small or last or forced):
                return plan
            splits *= 2
    if forced in (None, "cooperative"):
        return _cooperative(work, kernel, items, partial, fitted)
    return None


def _cooperative(
    work: Work, kernel: str, items: int, partial: int, fitted: Callable[[int], tuple[int, int] | None]
) -> Plan | None:
    """Groups of blocks, all on the device at once, that take tile after tile."""
    problem, _, geometry = work
    device, vectors = problem.device, max(1, geometry.vectors)
    splits = 1
    while fitted(-(-vectors // splits)) is None:
        splits *= 2
        if splits > 32 * device.processors:
            return None
    fit = fitted(-(-vectors // splits))
    assert fit is not None  # for the type checker: the loop ended
    threads, kept = fit
    macros = _macros(work, kernel, threads, items)
    shared = kept + scratch_bytes(work, kernel, threads)
    blocks = device.processors * launch.blocks_per_processor(device.number, kernel, macros, threads, shared)
    if splits > blocks:
        return None
    groups = min(geometry.tiles, blocks // splits)
    splits = min(blocks // groups, max(splits, -(-vectors // (threads // geometry.lanes * items))))
    step = _launch(work, kernel, groups * splits, threads, items, splits=splits, shared=kept, cooperative=True)
    slots = problem.kept * splits * partial
    return Plan((step,), slots, 4 * groups, "cooperative")


# --- passes that keep nothing -----------------------------------------------------------------------------------------


def _pass(work: Work, kernel: str, arrays: int, fields: Mapping[str, int] = NOTHING) -> tuple[Launch, int]:
    """A launch, and its blocks for each tile: the device is full, and a block has enough to do."""
    problem, tuning, geometry = work
    threads, items = _threads(geometry, geometry.vectors, tuning.threads), _items_per_thread(work, arrays)
    wanted = -(-tuning.passes * problem.device.processors // max(1, geometry.tiles))
    splits = max(1, min(wanted, geometry.vectors // (2 * threads // geometry.lanes * items)))
    step = _launch(work, kernel, geometry.tiles * splits, threads, items, splits=splits, fields=fields)
    return step, splits


def _reduction(work: Work, kernel: str, arrays: int, finish: str, partial: int) -> Plan:
    """A pass that reduces, and the merge of its partials."""
    problem, tuning, geometry = work
    first, splits = _pass(work, kernel, arrays)
    if splits == 1:
        return Plan((first,), 0, 0, "one pass")
    threads = _threads(geometry, splits, tuning.threads)
    second = _launch(work, finish, geometry.tiles, threads, 1, splits=splits, fields={"summed": splits})
    return Plan((first, second), problem.kept * splits * partial, 0, "one pass")


def _two_passes(work: Work, kernels: tuple[str, str], arrays: int, partial: int) -> Plan:
    """A pass that reduces; the next merges its partials and goes backwards, through what the cache still holds."""
    first, splits = _pass(work, kernels[0], arrays)
    second, _ = _pass(work, kernels[1], arrays, {"summed": splits, "backwards": 1})
    return Plan((first, second), work.problem.kept * splits * partial, 0, "two passes")


# --- the functions ----------------------------------------------------------------------------------------------------

FORCED: dict[str, str | None] = {"strategy": None}  # for tests and tuning: one of STRATEGIES


@lru_cache(maxsize=4096)
def moments(problem: Problem) -> Plan:
    """Count, mean, M2 and rstd: one pass, and the merge of its partials where it was split."""
    return _reduction(_work(problem), "statistics", 1, "finish_moments", doubles_of_partial(problem))


@lru_cache(maxsize=4096)
def grad_sums(problem: Problem) -> Plan:
    """Likewise dgamma and dbeta."""
    return _reduction(_work(problem), "grad_sums", 2, "finish_sums", 2)


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
    return _either(problem, "forward", 1, ("statistics", "normalize"), doubles_of_partial(problem))


@lru_cache(maxsize=4096)
def backward(problem: Problem) -> Plan:
    """Sums and the gradient of x, in one launch or two."""
    return _either(problem, "backward", 2, ("grad_sums", "grad_input"), 2)


RUNNING_THREADS = 128


@lru_cache(maxsize=4096)
def update_running(device: Device, kept: int, types: tuple[int, ...], skip_nonfinite: bool) -> Launch:
    """Running statistics after one more batch; types are those of `launch.MOMENTS`."""
    compiled = launch.function(device.number, "update_running", (("THREADS", RUNNING_THREADS),))
    fields = {f"{name}_type": dtype for name, dtype in zip(launch.MOMENTS, types, strict=True)}
    fields |= {"channels": kept, "skip_nonfinite": int(skip_nonfinite)}
    grid = -(-kept // RUNNING_THREADS)
    return Launch(compiled, grid, RUNNING_THREADS, 0, False, launch.RUNNING, fields)


def _either(problem: Problem, kernel: str, arrays: int, passes: tuple[str, str], partial: int) -> Plan:
    forced = FORCED["strategy"]
    if forced != "two passes":
        plan = _resident(_work(problem, resident=True), kernel, arrays, partial, forced)
        if plan is not None:
            return plan
    return _two_passes(_work(problem), passes, arrays, partial)
