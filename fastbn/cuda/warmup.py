"""The kernels that people meet first on a GPU, for one that need not be here.

They are what plans ask for: those of the calls of `fastbn.warmup`, on arrays of the shapes that a network has. A plan
depends on how many multiprocessors a GPU has, and with it the widths of tiles and the number of blocks that share one:
of the kernels for ResNet-50, 90 % are the same on half as many, 73 % from compute capability 9.0 on.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from fastbn.cuda import launch, plans, problems, requirements, strided
from fastbn.cuda.launch import Device, Kernel
from fastbn.cuda.memory import type_of
from fastbn.cuda.problems import Placement, Problem, Strides
from fastbn.dimensions import dimensions
from fastbn.environment import float_dtypes
from fastbn.layout import Shape, layout_of
from fastbn.operands import dense
from fastbn.warmup import LAYOUTS, OPTIONS


class Chip(NamedTuple):
    """Of a device, what plans depend on beside its architecture."""

    processors: int
    shared: int


CHIPS = {
    70: Chip(80, 96 << 10),  # V100
    75: Chip(40, 64 << 10),  # T4
    80: Chip(108, 163 << 10),  # A100
    86: Chip(84, 99 << 10),  # A40, RTX A6000
    89: Chip(128, 99 << 10),  # RTX 4090
    90: Chip(132, 227 << 10),  # H100, H200
    100: Chip(148, 227 << 10),  # B200
    120: Chip(170, 99 << 10),  # RTX 5090
}
"""The GPUs that a name such as sm_90 stands for; an architecture takes the last that is not above it."""

BATCH = 32
DENSE = ((BATCH, 512), (BATCH, 1024))
"""Samples and features of layers without images."""


def device_of(architecture: int, processors: int | None = None) -> Device:
    """The device that an architecture stands for, or one of so many multiprocessors."""
    requirements.check_architecture(architecture)
    chip = CHIPS[max(known for known in CHIPS if known <= architecture)]
    return Device(launch.ABSENT, architecture, processors or chip.processors, chip.shared)


def kernels(device: Device, dtypes: Sequence[str], shapes: Sequence[Shape]) -> list[Kernel]:
    """What calls ask for on arrays of these shapes, with channels on the second axis and on the last one."""
    found: dict[Kernel, None] = {}
    for dtype, shape, layout in itertools.product(dtypes, shapes, LAYOUTS):
        if layout == "NCHW" or len(shape) > 2:
            for plan in _plans(device, dtype, shape, layout):
                found |= dict.fromkeys(step.compiled for step in plan.launches)
    found[plans.update_running(device, 1, (type_of(np.dtype(float)),) * 5, False).compiled] = None
    return list(found)


def _plans(device: Device, dtype: str, shape: Shape, layout: str) -> Iterator[plans.Plan | strided.Plan]:
    """Of the calls that `fastbn.warmup` makes of one array, and of what they are made of."""
    n, channels, *image = shape
    shape, axis = ((n, channels, *image), 1) if layout == "NCHW" else ((n, *image, channels), len(shape) - 1)
    x = dense(shape, float_dtypes()[dtype])
    collapsed = layout_of(shape, x.strides, frozenset((axis,))).collapsed
    strides = tuple(s // x.dtype.itemsize for s in dense(collapsed, x.dtype).strides)
    for options in OPTIONS.values():
        relu, residual = "relu" in options, "residual" in options
        weight = 2 if "where" in options or "weights" in options else 0  # float64, one for all channels

        def problem(*arrays: str, relu: int = relu, residual: bool = residual, weight: int = weight) -> Problem:
            operand = Placement(tuple(s if size > 1 else 0 for s, size in zip(strides, collapsed, strict=True)), 0)
            of_weight: Strides = (0, collapsed[3], 0, 1) if weight else ()
            operands = tuple((name, operand) for name in arrays)
            return Problem(
                device, collapsed, type_of(x.dtype), x.dtype.itemsize, operands, weight, of_weight, (), relu, residual
            )

        beside = ("residual",) * residual
        yield plans.forward(problem("x", "y", *beside))
        yield plans.backward(problem("x", "dy", *("y",) * relu, "dx", *("dresidual",) * residual))
        if relu and not residual:  # the one before is of frozen statistics
            yield plans.backward(problem("x", "dy", "dx", relu=problems.OF_X))
        if not weight:
            yield plans.normalize(problem("x", "y", *beside))
        if not (relu or residual):  # with statistics of several processes
            yield plans.moments(problem("x"))
            yield plans.grad_sums(problem("x", "dy"))
            yield plans.grad_input(problem("x", "dy", "dx"))
    yield from _statistics(device, dtype, shape, axis)


def _statistics(device: Device, dtype: str, shape: Shape, axis: int) -> Iterator[strided.Plan]:
    """mean, var, and both, of channels and of all; with a mask, and without NaNs."""
    itemsize = float_dtypes()[dtype].itemsize
    steps = tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
    for kept, (sums, squares), (masked, skip_nan) in itertools.product(
        (frozenset((axis,)), frozenset[int]()), ((True, False), (False, True), (True, True)),
        ((False, False), (True, False), (False, True)),
    ):  # fmt: skip
        results = tuple(int(axis in kept) for axis in range(len(shape)))
        d, _ = dimensions(shape, steps, steps if masked else (0,) * len(shape), results, kept)
        number = strided.DTYPES.index(dtype)
        data = strided.Data(
            tuple(d), number, itemsize, off=0, masked=masked, skip_nan=skip_nan,
            in_float64=number == strided.FLOAT64, sums=sums, squares=squares,
        )  # fmt: skip
        if found := strided.plan(device, data, 0, (None, None, None)):
            yield found
