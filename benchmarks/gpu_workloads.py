"""What `benchmarks.gpu` measures, and in which order."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from benchmarks.workloads import BATCH, RESNET50, RESNET50_V15, dtype_of

OPERATIONS = ("forward", "backward", "inference", "moments", "fused forward", "fused backward")
PRIMARY = OPERATIONS[:3]

LARGE_BATCH = 256
LARGE = (4, 128, 1024, 1024)
SOME = ((256, 56, 56), (256, 14, 14), (2048, 7, 7))  # of the layers, for the dtypes that fewer people train in
TINY = ((2, 16, 4, 4), (32, 64, 1, 1), (1, 8, 16))
TINY_BYTES = 64 << 10  # of x, to which calls are measured on the host and in graphs as well
QUICK = ((32, 256, 14, 14), (32, 2048, 7, 7), (2, 16, 4, 4))


class Job(NamedTuple):
    """The cells that share their arrays."""

    shape: tuple[int, ...]
    dtype: str
    layout: str
    operations: tuple[str, ...]

    @property
    def nbytes(self) -> int:
        """Of x."""
        return math.prod(self.shape) * dtype_of(self.dtype).itemsize


def planned(
    shapes: Sequence[tuple[int, ...]], dtypes: Sequence[str], layouts: Sequence[str], operations: Sequence[str]
) -> list[Job]:
    """The jobs of a run, the most important first; shapes given stand for all."""
    small, large = ([(batch, *layer) for layer in RESNET50] for batch in (BATCH, LARGE_BATCH))
    more = [(batch, *layer) for batch in (LARGE_BATCH, BATCH) for layer in RESNET50_V15]
    some = [(LARGE_BATCH, *layer) for layer in SOME]
    order = [
        ("float32", small), ("float32", TINY), ("float32", large), ("float16", large), ("float32", [LARGE]),
        ("bfloat16", some), ("float64", some), ("float16", small), ("float16", [LARGE]), ("bfloat16", large),
        ("float32", more), ("bfloat16", [LARGE]), ("float64", [LARGE]), ("float16", more), ("bfloat16", small),
    ]  # fmt: skip
    if shapes:
        order = [(dtype, shapes) for dtype in dtypes]
    jobs = [
        Job(shape, dtype, layout, tuple(operations))
        for dtype, group in order
        if dtype in dtypes
        for shape in group
        for layout in layouts
    ]
    return list(dict.fromkeys(jobs))
