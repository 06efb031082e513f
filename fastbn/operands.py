"""What kernels see: operands, which say how arrays lie, and the dtypes of vectors of parameters."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from fastbn.layout import Shape


class Operand(NamedTuple):
    """An array as kernels see it, but for its numbers: collapsed, from its first element on."""

    shape: Shape
    """Sizes of batch, outer, channel and inner; or, in slabs, of far, near, outer, channel and inner (`layout`)."""
    strides: Shape
    """In bytes."""
    dtype: Any
    """In the machine's byte order."""
    fresh: bool = False
    """Allocated for this call."""
    device: int = 0
    offset: int = 0
    """Of its first element on a device, from a multiple of 16 bytes."""
    of: int = 0
    """Elements of the array that it is a part of, if it is one."""

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def kept(self) -> int:
        """Kept indices, each with statistics of its own."""
        return self.shape[3] if len(self.shape) == 5 else self.shape[0] * self.shape[2]


class AffineTypes(NamedTuple):
    """Dtypes of the vectors of parameters that normalizing takes; None for one that is absent: gamma 1, beta 0."""

    mean: Any
    spread: Any
    gamma: Any
    beta: Any


class GradientTypes(NamedTuple):
    """Dtypes of the vectors of parameters that gradients take; None for one that is absent, and so 0, but gamma 1."""

    mean: Any
    rstd: Any
    gamma: Any = None
    count: Any = None
    beta: Any = None
    """Of y, where that is computed again."""
    dmean: Any = None
    dvar: Any = None


class RunningTypes(NamedTuple):
    """Dtypes of the vectors of running statistics, of a batch's, and of new running ones."""

    mean: Any
    var: Any
    count: Any
    batch_mean: Any
    m2: Any
    new_mean: Any
    new_var: Any

    @classmethod
    def in_place(cls, running: tuple[Any, Any], of_batch: Any) -> RunningTypes:
        """Of running statistics that become those after a batch, whose numbers have one dtype."""
        return cls(*running, of_batch, of_batch, of_batch, *running)


class Mask(NamedTuple):
    """Bools or weights beside an array: strides in bytes for each axis of that, 0 where they do not vary."""

    strides: Shape
    dtype: Any


CAREFUL, NO_DEGREES, EMPTY, STATUS = range(4)
"""Places in the status of `fastbn.backend.Backend.statistic`, and how many there are."""


class Statistic(NamedTuple):
    """What `fastbn.backend.Backend.statistic` computes; dtypes of the results, None for one that is not wanted."""

    spread_is: str
    """"var", "std" or "m2"."""
    skip_nan: bool
    count: Any
    mean: Any
    spread: Any


def dense(shape: Shape, dtype: Any, device: int = 0) -> Operand:
    """A contiguous array of its own."""
    strides = tuple(dtype.itemsize * math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
    return Operand(shape, strides, dtype, True, device)
