"""How threads lie on arrays: widths of loads and tiles, what threads hold in registers and blocks in shared memory."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

from fastbn.cuda.problems import BFLOAT16, OF_X, Problem, Tuning, tuning_of

WIDE_FROM = 1 << 31
"""Vectors of a channel from which kernels count them in 64 bits."""


def vector_of(problem: Problem, axis: int, most: int) -> int:
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


def power(number: float) -> int:
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
    run: int = 0
    """Elements of a channel in its row, where vectors run on from one channel into the next."""

    @property
    def wide(self) -> bool:
        """Whether vectors are counted in 64 bits."""
        return self.vectors >= WIDE_FROM

    @property
    def width(self) -> int:
        """Channels of a tile."""
        if self.run:
            return self.lanes * self.vector // self.run
        return self.lanes * (self.vector if self.along_channels else 1)

    def scratch(self, threads: int) -> int:
        """Partials that a block has in shared memory: of each channel, and of each warp or thread."""
        return self.width + (2 * threads if self.run else self.width * (threads // 32))


class Work(NamedTuple):
    """A call on a device: what the choices of threads, blocks and macros depend on."""

    problem: Problem
    tuning: Tuning
    geometry: Geometry


class Kept(NamedTuple):
    """What blocks keep on the chip."""

    kernel: str
    arrays: int


def work_of(problem: Problem, kept: Kept | None = None, most: int = 16) -> Work:
    """With vectors of so many elements at most."""
    tuning = tuning_of(problem.device.architecture)
    return Work(problem, tuning, geometry_of(problem, tuning, kept, most))


def geometry_of(problem: Problem, tuning: Tuning, kept: Kept | None, most: int = 16) -> Geometry:
    batch, outer, channel, inner = problem.shape
    strides = problem.operands[0][1].strides
    along = channel > 1 and (inner == 1 or abs(strides[2]) < abs(strides[3]))
    most = min(most, 16 // problem.itemsize)
    if problem.weight or (kept and along):
        # What a thread needs for eight channels leaves registers for one block a multiprocessor; with weights, four
        # spill beside a residual.
        most = min(most, 2 if problem.weight and along else 4)
    vector = vector_of(problem, 2 if along else 3, most)
    if not along and not problem.weight and vector < most and (lanes := _lanes_of_run(problem, tuning, most)):
        tiles_per_batch = channel * inner // (lanes * most)
        return Geometry(False, most, lanes, outer, 1, tiles_per_batch, batch * tiles_per_batch, inner)
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
        lanes = min(power(channel / vector), max(1, nbytes // (vector * problem.itemsize)), 32)
        blocks = batch * -(-channel // (lanes * vector)) * splits
        room = _room(problem, tuning, vector, lanes, kept) if kept else of_channel
        if nbytes <= SECTOR or (blocks >= problem.device.processors and room >= min(of_channel, tuning.split_bytes)):
            return lanes
        nbytes //= 2


def _room(problem: Problem, tuning: Tuning, vector: int, lanes: int, kept: Kept) -> int:
    """Bytes of each channel that a block can keep."""
    registers = tuning.threads // lanes * _items_per_thread(problem, tuning, True, vector, kept.arrays)
    shared = int(problem.device.shared * tuning.shared_share)
    shared -= scratch_bytes(problem, kept.kernel, lanes * vector, lanes * vector * (1 + tuning.threads // 32))
    return registers * problem.itemsize + max(0, shared) // (lanes * vector * kept.arrays)


def _lanes_of_run(problem: Problem, tuning: Tuning, vector: int) -> int:
    """Vectors of rows of channels without gaps between them: whole ones of four lines where there are; 0 if none are.

    One channel's row of 7 x 7 halves allows loads of 2 bytes, and touches 4 sectors for 98 bytes; eight rows are 49
    vectors of 16 bytes.
    """
    batch, outer, channel, inner = problem.shape
    if inner < vector or any(
        operand.off or operand.strides[3] != 1 or operand.strides[2] != inner
        or any(s % vector and n > 1 for s, n in zip(operand.strides[:2], (batch, outer), strict=True))
        for _, operand in problem.operands
    ):  # fmt: skip
        return 0
    channels = vector // math.gcd(vector, inner)
    most = tuning.threads * vector // inner
    while channels * inner * problem.itemsize < 4 * LINE and channel % (2 * channels) == 0 and 2 * channels <= most:
        channels *= 2
    lanes = channels * inner // vector
    partials = 2 * tuning.threads * 8 * doubles_of(problem, "moments")  # two channels of each thread
    fits = lanes <= tuning.threads and partials <= problem.device.shared // 2
    return lanes if channel % channels == 0 and fits else 0


def most_splits(work: Work) -> int:
    """Blocks of a tile, at most, whose partials are little beside what they read."""
    problem, tuning, _ = work
    _, outer, _, inner = problem.shape
    return max(1, outer * inner * problem.itemsize // tuning.split_bytes)


def share_of(geometry: Geometry, splits: int) -> int:
    """Vectors of a channel in each split: where they lie side by side, whole lines of the cache but for the last."""
    share = max(1, -(-geometry.vectors // splits))
    line = 1 if geometry.along_channels or geometry.run else LINE // 16
    return -(-share // line) * line


MOST_NEAR = 1 << 31
"""Vectors in whose number a channel's last one has to lie behind its first, for kernels to count them in 32 bits."""


def steps_of(problem: Problem, geometry: Geometry) -> int:
    """STEPS of tile.cuh, of all arrays: 1 where vectors lie at equal distances, 2 in rows without gaps, 0 elsewhere."""
    outer, inner, rows = problem.shape[1], problem.shape[3], geometry.row_vectors
    for _, operand in problem.operands:
        _, step, _, along = operand.strides
        if outer > 1 and (step % geometry.vector or not 0 <= step // geometry.vector * outer < MOST_NEAR):
            return 0
        if rows > 1 and (geometry.along_channels or along != 1 or (outer > 1 and step < inner)):
            return 0
    return 1 if rows == 1 else 2


# --- registers and shared memory --------------------------------------------------------------------------------------


def threads_of(geometry: Geometry, vectors: int, most: int) -> int:
    """As many threads as there are vectors for them, whole warps."""
    return min(most, max(32, power(vectors * geometry.lanes)))


def _items_per_thread(problem: Problem, tuning: Tuning, along: bool, vector: int, arrays: int) -> int:
    """Vectors of each array that a thread holds in registers."""
    items = max(1, tuning.items_per_thread // arrays)
    if along and vector > 4:
        items = max(1, items // 2)  # each channel of a thread takes registers of its own
    return min(items, 2) if problem.weight else items


def items_of(work: Work, arrays: int) -> int:
    problem, tuning, geometry = work
    items = _items_per_thread(problem, tuning, geometry.along_channels, geometry.vector, arrays)
    converted = problem.dtype == BFLOAT16 and problem.device.architecture < 80  # by other instructions
    beside = geometry.run and (problem.residual or converted or problem.itemsize == 8)
    return max(1, items // 2) if beside else items  # beside two channels, eight spill


def deeper(work: Work, kernel: str, arrays: int) -> tuple[Work, int] | None:
    """Halves channels-last with twice the loads in flight, 64 kB a multiprocessor, and vectors that a thread then has.

    None where two blocks a multiprocessor have no registers for it, or load a residual meanwhile. Sums of gradients
    have too few for eight channels of a thread: four take 110 of 128.
    """
    problem = work.problem
    if problem.itemsize > 2 or problem.weight or problem.residual or not work.geometry.along_channels:
        return None
    if kernel == "grad_sums":
        work = work_of(problem, most=4)
    if work.geometry.wide or steps_of(problem, work.geometry) != 1:
        return None
    return work, 2 * items_of(work, arrays)


Merged = Literal["moments", "sums"]
"""What kernels merge parts of: `Partial` of moments.cuh, `Sums` of gradients.cuh."""


class Scratch(NamedTuple):
    """Numbers of a channel that a block has in shared memory."""

    coefficients: int
    """Of the elements' arithmetic: Affine; Xhat and Linear."""
    merged: Merged | None
    """So many of `Geometry.scratch`."""


SCRATCH = {
    "statistics": Scratch(0, "moments"),
    "finish_moments": Scratch(0, "moments"),
    "forward": Scratch(5, "moments"),
    "normalize": Scratch(5, None),
    "grad_sums": Scratch(8, "sums"),
    "finish_sums": Scratch(8, "sums"),
    "backward": Scratch(8, "sums"),
    "grad_input": Scratch(8, None),
}


def doubles_of(problem: Problem, merged: Merged | None) -> int:
    """Float64 numbers of a part: float64 data have units among their moments."""
    if merged == "moments":
        return 5 if problem.itemsize == 8 else 4
    return 2 if merged == "sums" else 0


def scratch_bytes(problem: Problem, kernel: str, width: int, partials: int) -> int:
    """Shared memory of a block beside what it keeps: MERGE_BYTES, AFFINE_BYTES and SUM_BYTES of the kernels."""
    coefficients, merged = SCRATCH[kernel]
    if problem.relu == OF_X:  # scale and bias of y
        coefficients += 2
    nbytes = width * coefficients * max(4, problem.itemsize) + 8 * doubles_of(problem, merged) * partials
    return -(-nbytes // 16) * 16
