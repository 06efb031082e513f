"""What the tests share: dtypes, layouts, options and the arrays made from them."""

from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np

DTYPES = {
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
    "float32": np.float32,
    "float64": np.float64,
}


def placed(values, strides_of):
    """The same values in an array laid out as `strides_of` lays out an uninitialised one of this shape and dtype."""
    array = strides_of(values.shape, values.dtype)
    array[...] = values
    assert array.shape == values.shape
    return array


def c_order(shape, dtype):
    return np.empty(shape, dtype)


def fortran(shape, dtype):
    return np.empty(shape, dtype, order="F")


def channels_last(shape, dtype):
    """NHWC memory seen through an NCHW transpose."""
    return np.moveaxis(np.empty((shape[0], *shape[2:], shape[1]), dtype), -1, 1)


def channel_slice(shape, dtype):
    return np.empty((shape[0], shape[1] + 5, *shape[2:]), dtype)[:, 2 : 2 + shape[1]]


def channel_steps(shape, dtype):
    return np.empty((shape[0], 2 * shape[1], *shape[2:]), dtype)[:, ::2]


def batch_slice(shape, dtype):
    return np.empty((3 * shape[0], *shape[1:]), dtype)[shape[0] :: 2][: shape[0]]


def spatial_slice(shape, dtype):
    return np.empty((*shape[:2], *(n + 3 for n in shape[2:])), dtype)[..., 1:-2, 2:-1]


def spatial_steps(shape, dtype):
    return np.empty((*shape[:-1], 2 * shape[-1]), dtype)[..., ::2]


def last_channel_slice(shape, dtype):
    return np.empty((*shape[:-1], shape[-1] + 7), dtype)[..., 3 : 3 + shape[-1]]


def reversed_axes(*axes):
    def strides_of(shape, dtype):
        return np.flip(np.empty(shape, dtype), axes)

    return strides_of


def unaligned(shape, dtype):
    buffer = np.empty(int(np.prod(shape)) * dtype.itemsize + 1, np.uint8)
    return buffer[1:].view(dtype).reshape(shape)


def swapped_bytes(shape, dtype):
    return np.empty(shape, dtype.newbyteorder(">"))


@dataclass(frozen=True)
class Layout:
    shape: tuple[int, ...]
    channel_axis: Any = 1
    strides_of: Any = c_order
    repeated: tuple[int, ...] = ()  # axes broadcast with stride 0
    writable: bool = True  # whether an output can be laid out so

    def place(self, values):
        if self.repeated:
            first = values[tuple(slice(0, 1) if axis in self.repeated else slice(None) for axis in range(values.ndim))]
            return np.broadcast_to(first.copy(), values.shape)
        return placed(values, self.strides_of)

    @property
    def kept(self):
        axes = self.channel_axis if isinstance(self.channel_axis, tuple) else (self.channel_axis,)
        return sorted(axis % len(self.shape) for axis in axes)

    @property
    def channels(self):
        return tuple(self.shape[axis] for axis in self.kept)

    @property
    def weight_shape(self):
        return tuple(1 if axis in self.kept else n for axis, n in enumerate(self.shape))


LAYOUTS = {
    "NC": Layout((37, 19)),
    "NCL": Layout((6, 5, 33)),
    "NCHW": Layout((4, 6, 7, 11)),
    "NCDHW": Layout((3, 4, 3, 5, 7)),
    "NCHW long rows": Layout((2, 3, 37, 61)),
    "NHWC": Layout((4, 7, 5, 21), -1),
    "NHWC 3 channels": Layout((3, 11, 13, 3), 3),
    "NHWC many rows": Layout((5, 16, 17, 18), -1),
    "NHWC wide": Layout((3, 2, 3, 1045), -1),
    "NHWC folded": Layout((7, 9, 11, 3), -1),
    "NCHW short rows": Layout((18, 40, 7, 5)),
    "NCHW rows of whole lines": Layout((9, 50, 6, 8)),
    "NHWC as NCHW": Layout((4, 21, 5, 7), 1, channels_last),
    "Fortran NCHW": Layout((6, 5, 7, 4), 1, fortran),
    "Fortran NHWC": Layout((6, 5, 7, 4), -1, fortran),
    "channel slice": Layout((4, 6, 5, 7), 1, channel_slice),
    "channel steps": Layout((4, 6, 5, 7), 1, channel_steps),
    "channel slice NHWC": Layout((4, 5, 7, 18), -1, last_channel_slice),
    "batch slice": Layout((4, 6, 5, 7), 1, batch_slice),
    "spatial slice": Layout((4, 6, 5, 7), 1, spatial_slice),
    "spatial steps": Layout((4, 6, 5, 7), 1, spatial_steps),
    "reversed batch": Layout((4, 6, 5, 7), 1, reversed_axes(0)),
    "reversed channels": Layout((4, 6, 5, 7), 1, reversed_axes(1)),
    "reversed rows": Layout((4, 6, 5, 7), 1, reversed_axes(2, 3)),
    "reversed all NHWC": Layout((4, 5, 7, 6), -1, reversed_axes(0, 1, 2, 3)),
    "repeated batch": Layout((4, 6, 5, 7), repeated=(0,), writable=False),
    "repeated channels": Layout((4, 6, 5, 7), repeated=(1,), writable=False),
    "repeated positions": Layout((4, 6, 5, 7), repeated=(2, 3), writable=False),
    "instance NCHW": Layout((3, 4, 5, 7), (0, 1)),
    "instance NHWC": Layout((3, 5, 7, 4), (0, 3)),
    "instance Fortran": Layout((3, 4, 5, 7), (0, 1), fortran),
    "ghost": Layout((2, 3, 4, 5, 7), (0, 2)),
    "alternating": Layout((4, 3, 5, 6), (1, 3)),
    "alternating more": Layout((2, 3, 4, 3, 2), (0, 2, 4)),
    "negative tuple": Layout((3, 4, 5, 7), (-4, -3)),
    "C = 1": Layout((5, 1, 7, 3)),
    "C = 1 NHWC": Layout((5, 7, 3, 1), -1),
    "one sample": Layout((1, 5, 7, 3)),
    "one long row": Layout((1, 3, 4096)),
    "one position": Layout((64, 12, 1)),
    "one value": Layout((1, 7)),
    "primes": Layout((7, 13, 11, 5)),
    "everything kept": Layout((3, 4), (0, 1)),
    "one axis": Layout((23,), 0),
    "unaligned": Layout((4, 6, 5, 7), 1, unaligned),
    "swapped bytes": Layout((4, 6, 5, 7), 1, swapped_bytes),
}


@dataclass(frozen=True)
class Options:
    affine: bool = False
    where: bool = False
    weights: bool = False
    residual: bool = False
    relu: bool = False
    parameter_dtype: str = "float64"


OPTIONS = {
    "plain": Options(),
    "affine residual relu": Options(affine=True, residual=True, relu=True, parameter_dtype="float32"),
    "where": Options(where=True, affine=True, parameter_dtype="float16"),
    "weights relu": Options(weights=True, relu=True, affine=True),
    "where weights residual": Options(where=True, weights=True, residual=True),
}


@dataclass
class Case:
    """Arrays for one call of every function, in one layout."""

    layout: Layout
    dtype: Any
    x: Any
    dy: Any
    gamma: Any = None
    beta: Any = None
    keywords: dict = field(default_factory=dict)  # channel_axis, where, weights
    epilogue: dict = field(default_factory=dict)  # residual, activation


def make_case(layout, dtype, options=OPTIONS["plain"], seed=0, mean=3.0):
    rng = np.random.default_rng(seed)
    dtype = np.dtype(DTYPES[dtype])

    def values(loc=0.0):
        return layout.place((rng.standard_normal(layout.shape) * 2 + loc).astype(dtype))

    case = Case(layout, dtype, x=values(mean), dy=values(), keywords={"channel_axis": layout.channel_axis})
    if options.affine:
        parameter_dtype = DTYPES[options.parameter_dtype]
        case.gamma = rng.standard_normal(layout.channels).astype(parameter_dtype)
        case.beta = rng.standard_normal(layout.channels).astype(parameter_dtype)
    if options.where:
        case.keywords["where"] = rng.random(layout.weight_shape) < 0.7
        case.keywords["where"].flat[0] = True
    if options.weights:
        case.keywords["weights"] = rng.integers(0, 5, layout.weight_shape) * 0.3 + 0.1
    if options.residual:
        case.epilogue["residual"] = values()
    if options.relu:
        case.epilogue["activation"] = "relu"
    return case
