"""What the choice of kernels depends on: a call without its addresses and values, a device, numbers that tune."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from fastbn.cuda.launch import Device

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
    """Bytes of neighbouring channels that a tile is wide: whole cache lines, and no more scratch than needed; down to a
    sector of 32 where blocks would not suffice for the device."""
    cluster: int = 1
    """Blocks of the largest cluster."""
    shared_share: float = 0.45
    """Of the shared memory a block may have, for what it keeps: two blocks run beside each other."""
    waves: int = 2
    """Blocks for each multiprocessor before splitting a tile stops paying."""
    passes: int = 8
    """Blocks for each multiprocessor in passes that keep nothing."""
    split_bytes: int = 1024
    """Of each channel that a block reads, at least, where several share a tile: for each channel and block partials and
    numbers are 96 bytes, 5 % of what a forward pass moves then."""
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
    120: Tuning(cluster=8),
}

BFLOAT16, FLOAT32, FLOAT64 = 1, 2, 3  # of `Problem.dtype`
OF_Y, OF_X = 1, 2  # of `Problem.relu` in gradients: by y, or y being computed again of x


def tuning_of(architecture: int) -> Tuning:
    """The tuning of a compute capability."""
    return TUNING[max(known for known in TUNING if known <= max(architecture, min(TUNING)))]


class Placement(NamedTuple):
    """What matters of an array: strides in elements, and bytes by which its address is off a multiple of 16."""

    strides: Strides
    off: int


Placements = tuple[tuple[str, Placement], ...]


class Problem(NamedTuple):
    """One call, but for addresses and values."""

    device: Device
    shape: Shape
    dtype: int
    itemsize: int
    operands: Placements
    """Arrays that are read or written by vectors, by their names in `launch.ARRAYS`, x or dy first."""
    weight: int
    """0 none, 1 bool, 2 float64, 3 float32."""
    weight_strides: Strides
    types: tuple[tuple[str, int], ...]
    """The dtypes of per-channel numbers, by their names in `launch.PARAMETERS` and `RUNNING_STATISTICS`."""
    relu: int
    """0 for none; in forward passes 1, in gradients `OF_Y` or `OF_X`."""
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
