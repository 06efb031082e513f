"""An array's axes for kernels that walk any strides: in order of memory, and as few as can be."""

from __future__ import annotations

import math
from typing import NamedTuple

from fastbn.layout import Shape


class Dimension(NamedTuple):
    """An axis, or several that lie as one; steps in elements."""

    size: int
    step: int
    mask: int
    result: int
    kept: bool


def dimensions(
    shape: Shape, steps: Shape, masks: Shape, results: Shape, kept: frozenset[int]
) -> tuple[list[Dimension], list[int]]:
    """From the outermost in memory to the innermost, with positive steps; and where the first element is then."""
    found, starts = [], [0, 0, 0]
    for axis, size in enumerate(shape):
        three = steps[axis], masks[axis], results[axis]
        if size == 1:
            continue
        if three[0] < 0:
            for i in range(3):
                starts[i] += (size - 1) * three[i]
            three = -three[0], -three[1], -three[2]
        found.append(Dimension(size, *three, axis in kept))
    found.sort(key=lambda d: -d.step if d.step else -math.inf)
    merged: list[Dimension] = []
    for d in found:
        if merged and merged[-1].kept == d.kept:
            above = merged[-1]
            if all(getattr(above, s) == getattr(d, s) * d.size for s in ("step", "mask", "result")):
                merged[-1] = d._replace(size=above.size * d.size)
                continue
        merged.append(d)
    return merged, starts
