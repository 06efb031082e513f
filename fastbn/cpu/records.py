"""Records of which plans and compiled kernels know the fields: integers that say where things lie, and rows of tables.

Some parameters that kernels have in common are one record, too.

A table has one row for each field, in this order. In kernels the fields of a table are pointers to its rows, and the
same record also holds one channel's numbers, or vectors of several channels' (`Affine`, `Linear`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

# --- integers ---------------------------------------------------------------------------------------------------------


class Shape(NamedTuple):
    """Of an array as kernels see it; batch and channel are kept, outer and inner reduced."""

    batch: int
    outer: int
    channel: int
    inner: int

    @property
    def kept(self) -> int:
        """Kept indices, each with statistics of its own."""
        return self.batch * self.channel


class Slabs(NamedTuple):
    """The same where each channel has ``far * near`` slabs of outer and inner, and all but the channel is reduced."""

    far: int
    near: int
    outer: int
    channel: int
    inner: int

    @property
    def kept(self) -> int:
        return self.channel


class Strides(NamedTuple):
    """In elements; values along the inner axis are neighbours."""

    batch: int
    outer: int
    channel: int
    twice: int
    """From a row to the next but one: two steps along outer, or one where rows come from two halves in turn."""


class SlabStrides(NamedTuple):
    """Of `Slabs`, in elements; values along the inner axis are neighbours, or channels where that is 1."""

    far: int
    near: int
    outer: int
    channel: int


class Chunks(NamedTuple):
    """The largest chunk of `inner_reduction`."""

    rows: int
    columns: int


class Tiles(NamedTuple):
    """A division of `outer_reduction`'s rows: how many are taken as one, cells of a tile, rows of a task."""

    coalesced: int
    width: int
    height: int


class Walk(NamedTuple):
    """A division of `inner_reduction`'s elementwise passes, which go through rows in the order of memory."""

    run: int
    """Values side by side in all arrays that are written."""
    gapped: int
    """1 where rows of a run lie apart, behind each other, in arrays that are read."""
    pitch: int
    """Between rows of a thread's table."""
    values: int
    """So many after another belong to ``kept`` kept indices."""
    kept: int
    batch: int
    """Steps of the kept index along batch (which are the channels), outer and channel."""
    outer: int
    channel: int


class Geometry(NamedTuple):
    """How `fastbn.cpu.statistics` divides the work: rows of a kept index, or of neighbouring ones."""

    kept_dimensions: int
    row_dimensions: int
    rows: int
    """Of a kept index, or of several."""
    parts: int
    """Of these rows."""
    rows_of_a_part: int
    step: int
    """Between neighbours in a row of x."""
    # Of rows that are reduced:
    columns: int = 0
    pieces: int = 1
    """Of one row; each is a part."""
    piece: int = 0
    """Values of a piece."""
    # Of rows of kept indices:
    channels: int = 0
    """In a row."""
    size: int = 1
    """Neighbouring values of each."""
    coalesced: int = 1
    """Rows behind each other that are taken as one."""
    tail: int = 0
    """Values of the last coalesced row, if these are fewer."""
    tile: int = 0
    """Channels of a task."""
    pitch: int = 0
    """Numbers from a row of a thread's table to the next row."""
    own: int = 0
    """Numbers from a thread's table to the next thread's."""
    kept_step: int = 1
    """Between results of neighbours."""
    mask_step: int = 0
    """Between bytes, or weights, of a mask of neighbours."""
    # Of arrays:
    itemsize: int = 0
    mask: int = 0
    """`statistics_sizes.OF_VALUES`, `OF_ROWS`, or 0 of none."""
    moved: int = 0
    """What is added to values, one of `statistics_sizes.MOVED`, or 0."""
    ahead: int = 0
    """From a value of a row to the one that is prefetched with it."""
    turn: int = 0
    """The column of a row from which on prefetched values are in a row further on."""
    skip: int = 0
    """What comes to ``ahead`` from the column ``turn`` on."""


class Formats(NamedTuple):
    """What results of statistics are."""

    form: int
    """One of `statistics.FORMS`."""
    skip_nan: int
    of_count: int
    """Dtypes: indices into `program_words.VECTOR_KINDS`."""
    of_mean: int
    of_spread: int


_RECORDS = Shape, Slabs, Strides, SlabStrides, Chunks, Tiles, Walk, Geometry, Formats
INTEGER_RECORDS = {record.__name__: record for record in _RECORDS}


# --- arrays in kernels ------------------------------------------------------------------------------------------------


class Array(NamedTuple):
    """A pointer to the first value, and `Strides`."""

    values: Any
    batch: Any
    outer: Any
    channel: Any
    twice: Any


class SlabArray(NamedTuple):
    """The same, and `SlabStrides`."""

    values: Any
    far: Any
    near: Any
    outer: Any
    channel: Any


# What kinds of arrays end in, by their strides.
MARKS = {Strides: "[]", SlabStrides: "[,]"}
ARRAYS = {"[]": Array, "[,]": SlabArray}


class Rows(NamedTuple):
    """A pointer to the first value of rows, and the steps to the next and the next but one; None if they are absent."""

    values: Any
    step: Any
    twice: Any


# --- parameters that kernels of statistics have in common, as one -----------------------------------------------------


class Options(NamedTuple):
    """Each is True or None, for which code is left out."""

    squares: Any
    """Squares are summed, too."""
    compensated: Any
    """Sums keep what rounding takes from them: those of this dtype lose digits in float64."""
    masked: Any
    """The mask has a byte, or a weight, of each value, and not of each row."""
    weighted: Any
    """The mask is of weights."""
    skip_nan: Any


class Results(NamedTuple):
    """Addresses of arrays, 0 for one that is not wanted."""

    count: Any
    mean: Any
    spread: Any
    ddof: Any
    status: Any
    """An array itself."""
    formats: Any
    """`Formats`."""


GROUPS = {group.__name__: group for group in (Options, Results)}


# --- tables, in float64: a number of each kept index in each row ------------------------------------------------------


class MomentRows(NamedTuple):
    """Statistics; with gamma and beta, the last four are the `Parameters` of a forward pass."""

    count: Any
    m2: Any
    mean: Any
    rstd: Any
    gamma: Any
    beta: Any


class Parameters(NamedTuple):
    """Of ``y``; the spread is the variance, or rstd."""

    mean: Any
    spread: Any
    gamma: Any
    beta: Any


class GradientParameters(NamedTuple):
    """Of ``dx``; rows at the end that nobody reads are not there."""

    mean: Any
    rstd: Any
    gamma: Any
    count: Any
    beta: Any
    """Where y is computed again."""
    dmean: Any
    dvar: Any


class Sums(NamedTuple):
    """Sums of ``dz * xhat``, and of ``dz``."""

    dgamma: Any
    dbeta: Any


class SegmentSums(NamedTuple):
    """Of a segment: sums of dz, and of ``dz * (x - hi) * unit``, hi the rounded mean."""

    dz: Any
    distance: Any


class Distances(NamedTuple):
    """Of ``unit * (scale * dz - weight * (offset + slope * (x - mean)))``."""

    mean: Any
    scale: Any
    offset: Any
    slope: Any
    unit: Any


class Scale(NamedTuple):
    """What y is multiplied with."""

    rstd: Any
    gamma: Any


class Running(NamedTuple):
    """Running statistics, and those of a batch."""

    mean: Any
    var: Any
    count: Any
    batch_mean: Any
    m2: Any


class Part(NamedTuple):
    """Statistics to be merged; of a segment, the mean is relative to its channel's origin."""

    count: Any
    mean: Any
    m2: Any


class Union(NamedTuple):
    """Of some parts: the mean is hi + lo; what rounding left of M2 so far."""

    n: Any
    hi: Any
    lo: Any
    m2: Any
    left: Any


# --- tables of one thread, in the type that kernels compute in: a number of each channel or column in each row --------


class Affine(NamedTuple):
    """Of ``y = (x - hi) * scale + bias``; hi is the mean, rounded."""

    hi: Any
    scale: Any
    bias: Any


class Linear(NamedTuple):
    """Of ``dx = unit * (scale * dz - weight * (offset + slope * (x - hi)))``."""

    scale: Any
    hi: Any
    slope: Any
    offset: Any
    unit: Any


class ColumnMoments(NamedTuple):
    """Of a chunk's columns: ``sum(x - shift)`` and ``sum((x - shift)^2)``."""

    shift: Any
    s1: Any
    s2: Any


class ColumnSums(NamedTuple):
    """Of a chunk's columns: ``sum(dz)`` and ``sum(dz * (x - hi) * unit)``."""

    hi: Any
    unit: Any
    s1: Any
    s2: Any
