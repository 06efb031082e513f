"""What the tests share: dtypes, layouts, options and the arrays made from them."""

import itertools
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np
import pytest

# --- what is run by default, and what is slow -------------------------------------------------------------------------


def some_slow(values, quick):
    """All values of a parameter; those that are not quick are slow."""
    return [value if value in quick else pytest.param(value, marks=pytest.mark.slow) for value in values]


def one_in(most, **tables):
    """All combinations of parameters' values, of which the default run has one in so many, and the rest is slow.

    Those in which the values' places add up to a multiple of `most`: each value, and each pair of values of two tables
    where a third one has as many as `most`.
    """
    cases = []
    for chosen in itertools.product(*(enumerate(table) for table in tables.values())):
        marks = [pytest.mark.slow] if sum(place for place, _ in chosen) % most else []
        values = [value for _, value in chosen]
        cases.append(pytest.param(*values, marks=marks, id="-".join(map(str, values))))
    return pytest.mark.parametrize(tuple(tables), cases)


# --- dtypes and layouts -----------------------------------------------------------------------------------------------

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
    "NHWC collapsed": Layout((7, 9, 11, 3), -1),
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
    "affine relu": Options(affine=True, relu=True, parameter_dtype="float32"),
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


# --- of statistics: any dtype of real numbers, seen in any way --------------------------------------------------------

NUMBERS = [
    *DTYPES, *("int8", "int16", "int32", "int64"), *("uint8", "uint16", "uint32", "uint64"), "bool",
]  # fmt: skip


def maker(dtype, seed=0):
    """``make(shape)`` gives random numbers in C order: floats around 3, integers of all the range."""
    dtype, rng = np.dtype(DTYPES.get(dtype, dtype)), np.random.default_rng(seed)

    def make(shape):
        if dtype.kind == "b":
            return np.asarray(rng.random(shape) < 0.5)
        if dtype.kind in "iu":
            info = np.iinfo(dtype)
            return np.asarray(rng.integers(info.min, info.max, shape, dtype, endpoint=True))
        return np.asarray(rng.standard_normal(shape) * 2 + 3).astype(dtype)

    return make


def unaligned_copy(x):
    return placed(x, unaligned)


def big_endian(x):
    """But bfloat16, of which NumPy knows no other order."""
    return x if x.dtype.kind == "V" else x.astype(x.dtype.newbyteorder(">"))


VIEWS = {  # of what a maker makes
    "0-d": lambda make: make(()),
    "1-d": lambda make: make((53,)),
    "1-d from the second": lambda make: make((54,))[1:],
    "1-d every third": lambda make: make((155,))[1::3],
    "1-d backwards": lambda make: make((53,))[::-1],
    "1-d of stride 0": lambda make: np.broadcast_to(make((1,)), (53,)),
    "2-d": lambda make: make((7, 45)),
    "2-d tall": lambda make: make((61, 3)),
    "2-d Fortran": lambda make: np.asfortranarray(make((7, 45))),
    "2-d every second row": lambda make: make((14, 37))[1::2],
    "2-d every third column": lambda make: make((7, 110))[:, 2::3],
    "2-d columns": lambda make: make((9, 40))[:, 5:-2],
    "2-d one column": lambda make: make((90, 5))[:, 2:3],
    "2-d rows backwards": lambda make: make((9, 21))[::-2],
    "2-d overlapping windows": lambda make: np.lib.stride_tricks.sliding_window_view(make((40,)), 9),
    "2-d of one row": lambda make: np.broadcast_to(make((1, 21)), (8, 21)),
    "2-d of one column": lambda make: np.broadcast_to(make((8, 1)), (8, 21)),
    "3-d": lambda make: make((4, 5, 19)),
    "3-d transposed": lambda make: make((19, 4, 5)).transpose(1, 2, 0),
    "3-d channels reversed": lambda make: make((6, 7, 3))[:, :, ::-1],
    "3-d of size 1": lambda make: make((1, 37, 1)),
    "4-d": lambda make: make((2, 3, 5, 7)),
    "4-d Fortran": lambda make: np.asfortranarray(make((2, 3, 5, 7))),
    "4-d transposed": lambda make: make((5, 2, 7, 3)).transpose(1, 3, 0, 2),
    "4-d positions": lambda make: make((2, 3, 7, 12))[:, :, 1:-1, 2:-3],
    "4-d positions transposed": lambda make: make((2, 3, 7, 12)).transpose(0, 2, 3, 1)[:, 1:-1, 2:-3],
    "4-d channels": lambda make: make((2, 9, 5, 7))[:, 2:5],
    "4-d steps": lambda make: make((4, 6, 10, 14))[::2, 1::2, ::2, 1::2],
    "4-d backwards": lambda make: make((2, 3, 5, 7))[::-1, :, ::-1, ::-1],
    "4-d of size 1": lambda make: make((1, 6, 1, 9)),
    "4-d of stride 0": lambda make: np.broadcast_to(make((2, 1, 5, 1)), (2, 3, 5, 7)),
    "4-d windows": lambda make: np.lib.stride_tricks.sliding_window_view(make((7, 9)), (3, 4)),
    "4-d unaligned": lambda make: unaligned_copy(make((2, 3, 5, 7))),
    "4-d big-endian": lambda make: big_endian(make((2, 3, 5, 7))),
    "5-d": lambda make: make((2, 3, 2, 4, 5)),
    "5-d transposed": lambda make: make((4, 2, 5, 2, 3)).transpose(3, 4, 1, 0, 2),
    "5-d inner slices": lambda make: make((2, 4, 4, 6, 7))[:, 1:, :3, 2:-1, ::2],
    "5-d stepped and transposed": lambda make: make((4, 6, 3, 5, 4)).transpose(4, 1, 0, 3, 2)[:, ::-2, 1:3, ::2],
}


def subsets_of_axes(ndim):
    """None, () and every choice of axes."""
    return [None, *(axes for n in range(ndim + 1) for axes in itertools.combinations(range(ndim), n))]
