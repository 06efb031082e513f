"""Mean and variance of arrays as they lie: any strides, any real dtype, masks, NaNs left out; results in their dtype.

For each kept index, over the values x that count (all, or those of a mask, or those that are not NaN), weights w or 1:

    n = sum(w);  mean = sum(w * x) / n;  m2 = sum(w * (x - mean)^2);  var = m2 / (n - ddof)

Everything is summed in float64, and an array's kept indices in parts of its reduced ones, by shape alone:

- Sums: float32, halves and integers of up to 32 bits are exact in float64; of float64 and integers of 64 bits four
  values are added, and what their sum loses is summed as well (Knuth's two-sum). So are sums of parts in any case.
- Squares: of x - shift, with the mean of eight values as shift: A = sum(x - shift), B = sum((x - shift)^2),
  m2 = B - A^2/n (Chan, Golub & LeVeque 1983, eq. 1.7 with a shift). That loses as many bits as the mean's distance from
  the shift is large beside the deviation; where these are too many, the part is summed again around its mean. Parts
  are merged by Chan's update (eq. 2.1).

`statistics_inner` goes along rows whose values are reduced, `statistics_outer` along rows of kept indices, and
`statistics_few` where these have few values; `statistics_results` makes results of parts. Here is what they share. A
mask has a byte, or a weight, of each value, of each row, or of each of several short rows that are taken as one, such
as the pixels of an image. Integers of up to 16 bits that lie side by side are added up by `integers`, all exactly; then
the shift is a whole number. Values that lie apart are fetched: converted, some hundred at a time, by a kernel of its
own for each dtype, so that the others need not know it. `fastbn.cpu.statistics` divides the work and says how the
dimensions lie. A part's numbers are (n, shift, A, B), of sums (n, _, sum, rest).

Bytes moved, S = the bytes of x and of its mask: S, and once more those of parts that are summed again; 2S where mean
and variance of 8-byte dtypes are both wanted, of which each has a pass of its own.
"""

from typing import Any, NamedTuple

import numpy as np

from fastbn.cpu.kernels.calls import reserve
from fastbn.cpu.kernels.compiler import inline, kernel, offsets_of_arguments
from fastbn.cpu.kernels.doubles import (
    LANES,
    choose,
    counted,
    everywhere,
    first_there,
    in_float64,
    in_type_of,
    only_if,
    put_values,
    row_sums,
    some_values,
    unless,
    value_at,
    values,
    values_to_test,
    which_count,
)
from fastbn.cpu.kernels.pointers import address
from fastbn.cpu.kernels.shuffles import values_apart
from fastbn.cpu.kernels.simd import fma, load
from fastbn.cpu.kernels.team import enter
from fastbn.cpu.kernels.team import store as put_word
from fastbn.cpu.kernels.vectors import two_sum
from fastbn.cpu.statistics_sizes import DIMENSION, OF_ROWS

SIZE, STEP, MASK, RESULT = range(DIMENSION)  # words
PEEKS = 8  # values of a part, of whose mean the first shift is made
# How much larger A^2/n may be than m2: four lose two bits of 53, sixteen four, which narrower data can spare. Sums of
# weights are rounded, to 1e-14 of equal ones, so that A/n should be small beside the deviation.
FAR, FAR_OF_FLOATS, FAR_OF_WEIGHTS = 4.0, 16.0, 2.0**-8
LOOKS = 3  # at a part, each around the mean that the one before has found


class Values(NamedTuple):
    """Where values are, in x or raw; the other is None."""

    x: Any
    """Values of any dtype, side by side, or in `few` a step apart."""
    raw: Any
    """Values in the place of x, as bytes: those that lie apart, and small integers side by side."""
    fetch: Any
    """The address of the function that reads raw values: it converts them, or adds up small integers."""
    where: Any
    """The mask."""
    geometry: Any
    dimensions: Any


class RowRange(NamedTuple):
    """Rows of a kept index, or a piece of one."""

    at: Any
    """Where row 0 is in the array."""
    w_at: Any
    """Where row 0 is in the mask."""
    first: Any
    last: Any
    columns: Any


# --- places -----------------------------------------------------------------------------------------------------------


@inline
def place(index, dimensions, first, count):
    """Where an index into ``count`` dimensions is, the first one so many words on: in x, the mask, the results."""
    x, w, o = 0, 0, 0
    for k in range(first + DIMENSION * (count - 1), first - 1, -DIMENSION):
        i, outer = index, 0
        if k > first:  # a division takes as long as fifty values
            outer = index // dimensions[k + SIZE]
            i = index - outer * dimensions[k + SIZE]
        x += i * dimensions[k + STEP]
        w += i * dimensions[k + MASK]
        o += i * dimensions[k + RESULT]
        index = outer
    return x, w, o


@inline
def kept_place(index, geometry, dimensions):
    """The same of a kept index."""
    return place(index, dimensions, 0, geometry.kept_dimensions)


@inline
def row_at(r, source):
    """Where row r is in x and in the mask."""
    geometry = source.geometry
    x, w, _ = place(r, source.dimensions, DIMENSION * geometry.kept_dimensions, geometry.row_dimensions)
    return x, w


@inline
def rows_from(r, last, source):
    """Rows a step apart from row r on: where the first one is in x and in the mask, the steps, how many, how many of
    their dimension are left.
    """
    geometry, dimensions = source.geometry, source.dimensions
    if geometry.row_dimensions == 0:
        return 0, 0, 0, 0, 1, 1
    x, w = row_at(r, source)
    innermost = DIMENSION * (geometry.kept_dimensions + geometry.row_dimensions - 1)
    size = dimensions[innermost + SIZE]
    left = size - (r % size if geometry.row_dimensions > 1 else r)
    return x, w, dimensions[innermost + STEP], dimensions[innermost + MASK], min(left, last - r), left


# --- sums -------------------------------------------------------------------------------------------------------------


class Eight(NamedTuple):
    """Values, those that do not count replaced by the shift; which do; and what they weigh. None: all; 1."""

    v: Any
    mask: Any
    w: Any


@inline
def add(a, b, e, shift, squares, compensated):
    """Eight values to the sums a, b."""
    if squares is not None:
        d = e.v - shift
        wd = times(e.w, d)
        return a + wd, fma(wd, d, b)
    if compensated is not None:
        s, lost = two_sum(a, times(e.w, e.v))
        return s, b + lost
    return a + times(e.w, e.v), b


@inline
def add_four(a, b, e, shift, squares, compensated):
    """Four times eight values to the same sums."""
    if compensated is not None and squares is None:  # and so without weights
        s, lost = two_sum(a, (e[0].v + e[1].v) + (e[2].v + e[3].v))
        return s, b + lost
    a, b = add(a, b, e[0], shift, squares, compensated)
    a, b = add(a, b, e[1], shift, squares, compensated)
    a, b = add(a, b, e[2], shift, squares, compensated)
    return add(a, b, e[3], shift, squares, compensated)


@inline
def together(a, b, more_a, more_b, squares, compensated):
    """Sums of vectors."""
    if squares is None and compensated is not None:
        s, lost = two_sum(a, more_a)
        return s, lost + (b + more_b)
    return a + more_a, b + more_b


@inline
def totals(table, sums, rests, squares, compensated):
    """Over the lanes of eight sums each, and of what these lost, or of squares."""
    if squares is None and compensated is not None:
        a, b = values(table, sums, LANES), values(table, rests, LANES)
        for k in range(1, LANES):
            a, lost = two_sum(a, values(table, sums + k, LANES))
            b = b + (lost + values(table, rests + k, LANES))
        return a, b
    return row_sums(table, sums), row_sums(table, rests)


@inline
def times(w, v):
    if w is None:
        return v
    return w * v


@inline
def far(compensated, weighted):
    if compensated is None:
        return FAR_OF_FLOATS
    return FAR if weighted is None else FAR_OF_WEIGHTS


@inline
def is_far(n, a, b, o):
    """Whether the shift is too far from the mean."""
    between = a * a / n
    m2 = b - between
    return between > far(o.compensated, o.weighted) * m2 and between < np.inf


@inline
def short(number, compensated):
    """As float32 has it, so that floats' and integers' distances from it are exact."""
    if compensated is None:
        return np.float64(np.float32(number))
    return number


# --- masks ------------------------------------------------------------------------------------------------------------


@inline
def eight(x, source, at, step, w_at, w_step, row_weight, q, some, o):
    """Eight values, or the first ``some``, and those of a mask; either side by side if its step is None."""
    where = only_if(o.masked, source.where)
    v = values_to_test(x, at, step, some, o.skip_nan)
    mask = which_count(where, w_at, w_step, v, some, o.skip_nan)
    w = first_there(some_values(only_if(o.weighted, where), w_at, w_step, some), only_if(o.weighted, row_weight))
    return counting(v, mask, w, q)


@inline
def eight_of_a_column(v, q, o):
    """The same of values that are there, without a mask."""
    return counting(v, which_count(None, 0, None, v, None, o.skip_nan), None, q)


@inline
def counting(v, mask, w, q):
    return Eight(in_float64(choose(mask, v, in_type_of(v, q))), mask, w)


@inline
def masked_by(source, where):
    return Values(source.x, source.raw, source.fetch, where, source.geometry, source.dimensions)


@inline
def one_by_one(o):
    """True where values count one by one, else None."""
    return first_there(o.masked, o.skip_nan)


@inline
def weight_by_row(o):
    """True where there is a weight of each row, else None."""
    return unless(o.masked, o.weighted)


@inline
def tallied(n, e, o):
    """What these weigh added to n, if values count one by one."""
    return tally(n, only_if(one_by_one(o), e.mask), e.w)


@inline
def all_tallied(n, e, o):
    """The same of four times eight."""
    if o.masked is None and o.weighted is None:
        m0, m1 = only_if(o.skip_nan, e[0].mask), only_if(o.skip_nan, e[1].mask)
        m2, m3 = only_if(o.skip_nan, e[2].mask), only_if(o.skip_nan, e[3].mask)
        return counted(n, m0, m1, m2, m3)
    return tallied(tallied(tallied(tallied(n, e[0], o), e[1], o), e[2], o), e[3], o)


@inline
def tally(n, mask, w):
    if w is not None:
        return n + choose(mask, w, everywhere(0.0))
    if mask is not None:
        return n + choose(mask, everywhere(1.0), everywhere(0.0))
    return n


@inline
def row_counts(where, at, geometry):
    """Whether a mask of rows has this one."""
    return geometry.mask != OF_ROWS or value_at(where, at) != 0.0


@inline
def weight_of_row(where, at, weighted):
    """1 of masks that are no weights of rows."""
    if weighted is None:
        return 1.0
    return value_at(where, at)


# --- arrays of a thread -----------------------------------------------------------------------------------------------


@inline
def field(workspace, at, used):
    """Eight numbers of a field; zeros where it is not used."""
    if used is not None:
        return load(workspace, at, 64)
    return everywhere(0.0)


@inline
def fetched(source, at, n, workspace, into):
    """Copy n values of any dtype to a place in ``workspace`` as float64."""
    params = reserve(FETCH)
    put_word(params + FETCH.x, address(source.raw, at * source.geometry.itemsize))
    put_word(params + FETCH.step, source.geometry.step)
    put_word(params + FETCH.out, address(workspace, into))
    enter(source.fetch, params, 0, 0, n)


# --- any dtype, any step ----------------------------------------------------------------------------------------------


@inline
def copied_apart(x, first, last, step, out):
    """Copy all but some of the last ones, which are a known number apart: how far it has come."""
    i = first
    while i + LANES < last:  # what is read ends before the value behind these
        put_values(out, i, values_apart(x, i * step, step), None)
        i += LANES
    return i


@kernel
def fetch(thread, first, last, x, step, out):
    """Copy values from the first to the last, a step apart, as float64."""
    i = first
    if step == 1:
        while i + LANES <= last:
            put_values(out, i, some_values(x, i, None, None), None)
            i += LANES
    elif step == 2:
        i = copied_apart(x, first, last, 2, out)
    elif step == 3:
        i = copied_apart(x, first, last, 3, out)
    elif step == 4:
        i = copied_apart(x, first, last, 4, out)
    while i + LANES <= last:
        put_values(out, i, some_values(x, i * step, step, None), None)
        i += LANES
    if i < last:
        put_values(out, i, some_values(x, i * step, step, last - i), last - i)


FETCH = offsets_of_arguments(fetch)
