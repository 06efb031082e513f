"""Sums of integers of 8 or 16 bits, and of their squares: exact, in integers, 64 bytes of values at once.

In plain words, for values x of a row, or for each column of some rows::

    sums += x
    squares += x * x

The other kernels of statistics call these functions where such values lie side by side: as float64, eight at once,
they take two to six times as long. 64 bytes are read as lanes of twice a value's bits, so that a lane has a *lower*
value and an *upper* one; a shift or two take one of them out, and then it has room to be squared. uint8 and uint16 are
moved by half of their range (`MOVED`), or there would be no room to add two squares up before they are taken apart.
"""

from functools import reduce
from typing import Any, NamedTuple

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, models, register_model

from fastbn.cpu.kernels.compiler import inline, kernel, offsets, offsets_of_arguments
from fastbn.cpu.kernels.doubles import DOUBLE_LANES, LANES, everywhere, lane, some_values
from fastbn.cpu.kernels.llvm import I32, I64, lanes_below, pointer_to, size_of
from fastbn.cpu.kernels.pointers import table_rows
from fastbn.cpu.kernels.simd import fma, load, prefetch
from fastbn.cpu.kernels.simd import store as put
from fastbn.cpu.statistics_sizes import BYTES, MOVED

LANE_ROUNDS = 32  # of eight values a lane, the most whose sum a lane of 16 bits holds: 32 * 8 * -128 = -2^15
LONG_ROUNDS = 96  # rounds of a row from which its quarters are read side by side: 24 kB
MOST_ROWS = 256  # of a value a lane: 256 * -128 = -2^15; squares of bytes would have room for 262 000
SUMS, SQUARES = 2 * BYTES // 8, 4 * BYTES // 8  # words of a table for 64 bytes of columns


class RowSums(NamedTuple):
    """Words that `row` adds to."""

    sum: Any
    squares: Any


class Holds(NamedTuple):
    """Words between calls of `columns`: rows in its table, and columns of this."""

    rows: Any
    columns: Any


class Integers(types.Type):
    """64 bytes in lanes of so many bits, each two values, or a sum."""

    def __init__(self, bits, signed):
        self.bits, self.signed, self.lanes = bits, signed, 8 * BYTES // bits
        super().__init__(name=f"Integers({'s' if signed else 'n'}{bits})")

    @property
    def llvm(self):
        return ir.VectorType(ir.IntType(self.bits), self.lanes)

    def all(self, number):
        return ir.Constant(self.llvm, [number] * self.lanes)

    @property
    def twice(self):
        """The same in lanes of twice the bits."""
        return _KINDS[2 * self.bits, self.signed]


@register_model(Integers)
class _IntegersModel(models.PrimitiveModel):
    def __init__(self, manager, kind):
        super().__init__(manager, kind, kind.llvm)


_KINDS = {(bits, signed): Integers(bits, signed) for bits in (16, 32, 64) for signed in (False, True)}


def kind_name(array):
    """As plans name it."""
    return f"{array.dtype.letter}{size_of(array)}*"


def _pairs(array):
    """What 64 bytes of the array's values are."""
    return _KINDS[2 * array.dtype.bitwidth, True]


def _lower(builder, v, kind):
    half = kind.all(kind.bits // 2)
    if kind.signed:
        return builder.ashr(builder.shl(v, half), half)
    return builder.and_(v, kind.all((1 << kind.bits // 2) - 1))


def _upper(builder, v, kind):
    return (builder.ashr if kind.signed else builder.lshr)(v, kind.all(kind.bits // 2))


# --- 64 bytes ---------------------------------------------------------------------------------------------------------


@intrinsic
def pairs(typing, array, at):
    """The 64 bytes of values from ``at`` on."""
    kind = _pairs(array)
    count = 8 * BYTES // array.dtype.bitwidth

    def codegen(context, builder, sig, args):
        pointer = pointer_to(builder, array, args[0], args[1], count)
        v = builder.load(pointer, align=size_of(array))
        if array.dtype.letter == "b":
            v = builder.zext(builder.icmp_unsigned("!=", v, ir.Constant(v.type, None)), v.type)
        elif kind_name(array) in MOVED:
            v = builder.xor(v, ir.Constant(v.type, [1 << array.dtype.bitwidth - 1] * count))
        return builder.bitcast(v, kind.llvm)

    return kind(array, types.intp), codegen


@intrinsic
def lower(typing, v):
    """The lower value of each lane."""
    return v(v), lambda context, builder, sig, args: _lower(builder, args[0], v)


@intrinsic
def upper(typing, v):
    """The upper value of each lane."""
    return v(v), lambda context, builder, sig, args: _upper(builder, args[0], v)


@intrinsic
def plus(typing, a, b):
    return a(a, b), lambda context, builder, sig, args: builder.add(*args)


@intrinsic
def wider(typing, v):
    """Pairs of lanes as one of twice the bits."""
    return v.twice(v), lambda context, builder, sig, args: builder.bitcast(args[0], v.twice.llvm)


def _squares(builder, v, kind):
    """The squares of the lower and of the upper values."""
    halves = (part(builder, v, kind) for part in (_lower, _upper))
    return [builder.mul(half, half) for half in halves]


@intrinsic
def squares_of(typing, v):
    """Sums of two squares each, which have room in a lane, as numbers without a sign."""
    result = _KINDS[v.bits, False]
    return result(v), lambda context, builder, sig, args: builder.add(*_squares(builder, args[0], v))


@intrinsic
def no_values(typing, array):
    """Zeros as `pairs` of values."""
    kind = _pairs(array)
    return kind(array), lambda context, builder, sig, args: ir.Constant(kind.llvm, None)


@intrinsic
def no_squares(typing, array):
    """Zeros as sums of squares."""
    kind = _KINDS[4 * array.dtype.bitwidth, False]
    return kind(array), lambda context, builder, sig, args: ir.Constant(kind.llvm, None)


@intrinsic
def total(typing, v):
    """The sum over the lanes."""

    def codegen(context, builder, sig, args):
        wide = ir.VectorType(I64, v.lanes)
        lanes = args[0] if v.bits == 64 else (builder.sext if v.signed else builder.zext)(args[0], wide)
        name = f"llvm.vector.reduce.add.v{v.lanes}i64"
        function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(I64, [wide]), name)
        return builder.call(function, [lanes])

    return types.int64(v), codegen


# --- tables of sums ---------------------------------------------------------------------------------------------------
# Of 64 bytes of columns: two vectors of sums, in lanes of twice the bits of a value, which have the lower and the upper
# values; four of squares, in lanes of four times the bits.


def _places(builder, table, at, kind, vectors):
    starts = (builder.gep(table, [builder.add(at, I64(k * BYTES // 8))]) for k in range(vectors))
    return [builder.bitcast(start, kind.llvm.as_pointer()) for start in starts]


def _added(builder, places, more):
    for place, v in zip(places, more, strict=True):
        builder.store(builder.add(builder.load(place, align=8), v), place, align=8)


def _squares_of_rows(builder, rows, kind):
    """Four vectors of columns 0, 2, 1 and 3 of every four: sums of the squares of one row, or two."""
    squares = [_squares(builder, v, kind) for v in rows]
    wide = _KINDS[2 * kind.bits, False]
    result = []
    for of_half in zip(*squares, strict=True):
        pair = builder.bitcast(reduce(builder.add, of_half), wide.llvm)
        result += [_lower(builder, pair, wide), _upper(builder, pair, wide)]
    return result


@intrinsic
def add_rows(typing, table, at, squares, v0, v1, v2, v3):
    """64 bytes of columns of four rows, or of one, v0, to their sums, and sums of squares."""
    rows = [v for v in (v0, v1, v2, v3) if v != types.none]

    def codegen(context, builder, sig, args):
        given = args[3 : 3 + len(rows)]
        for part, place in zip((_lower, _upper), _places(builder, args[0], args[1], v0, 2), strict=True):
            _added(builder, [place], [reduce(builder.add, [part(builder, v, v0) for v in given])])
        if squares != types.none:
            more = [_squares_of_rows(builder, given[k : k + 2], v0) for k in range(0, len(given), 2)]
            at = builder.add(args[1], I64(SUMS))
            places = _places(builder, args[0], at, v0.twice, 4)
            _added(builder, places, [reduce(builder.add, of_one) for of_one in zip(*more, strict=True)])
        return context.get_dummy_value()

    return types.none(table, types.intp, squares, v0, v1, v2, v3), codegen


def _eight(builder, vectors, places):
    """Lanes of up to four vectors."""
    kind = ir.VectorType(I32, LANES)
    parts, lanes = [], vectors[0].type.count
    for first in range(0, len(vectors), 2):
        index = [lane + (vector - first) * lanes if vector // 2 * 2 == first else 0 for vector, lane in places]
        parts.append(builder.shuffle_vector(vectors[first], vectors[first + 1], ir.Constant(kind, index)))
    if len(parts) == 1:
        return parts[0]
    index = [k + vector // 2 * LANES for k, (vector, _) in enumerate(places)]
    return builder.shuffle_vector(*parts, ir.Constant(kind, index))


@intrinsic
def flush(typing, table, at, like, squares, sums, rest, column):
    """Sums of 64 bytes of columns to those in float64, from a column on."""

    def add_to(builder, target, column, vectors, kind, place_of):
        count = 8 * BYTES // (like.bits // 2)
        for first in range(0, count, LANES):
            numbers = _eight(builder, vectors, [place_of(c) for c in range(first, first + LANES)])
            numbers = (builder.sitofp if kind.signed else builder.uitofp)(numbers, DOUBLE_LANES.llvm)
            place = builder.gep(target, [builder.add(column, I64(first))])
            place = builder.bitcast(place, DOUBLE_LANES.llvm.as_pointer())
            builder.store(builder.fadd(builder.load(place, align=8), numbers), place, align=8)

    def codegen(context, builder, sig, args):
        vectors = [builder.load(place, align=8) for place in _places(builder, args[0], args[1], like, 2)]
        add_to(builder, args[4], args[6], vectors, like, lambda c: (c % 2, c // 2))
        if squares != types.none:
            kind, at = _KINDS[2 * like.bits, False], builder.add(args[1], I64(SUMS))
            vectors = [builder.load(place, align=8) for place in _places(builder, args[0], at, kind, 4)]
            add_to(builder, args[5], args[6], vectors, kind, lambda c: (c % 2 * 2 + c // 2 % 2, c // 4))
        return context.get_dummy_value()

    return types.none(table, types.intp, like, squares, sums, rest, types.intp), codegen


@intrinsic
def count_of(typing, array):
    """Values in 64 bytes."""
    count = 8 * BYTES // array.dtype.bitwidth
    return types.intp(array), lambda context, builder, sig, args: I64(count)


@intrinsic
def moved(typing, array, v, some):
    """Eight values as `pairs` has them, or the first ``some`` and zeros."""
    kind, few = kind_name(array), some != types.none

    def codegen(context, builder, sig, args):
        if kind not in MOVED:
            return args[1]
        v = builder.fadd(args[1], ir.Constant(DOUBLE_LANES.llvm, [float(MOVED[kind])] * LANES))
        zero = ir.Constant(DOUBLE_LANES.llvm, None)
        return builder.select(lanes_below(builder, args[2], LANES), v, zero) if few else v

    return v(array, v, types.intp if few else some), codegen


# --- a row ------------------------------------------------------------------------------------------------------------


@inline
def halves(v):
    """Sums of both values of a lane."""
    return plus(lower(v), upper(v))


@inline
def rest_of_row(x, at, end, squares):
    """Sums of fewer values than 64 bytes have, eight at once."""
    s, q = everywhere(0.0), everywhere(0.0)
    while at + LANES <= end:
        v = moved(x, some_values(x, at, None, None), None)
        s, q = s + v, fma(v, v, q)
        at += LANES
    if at < end:
        v = moved(x, some_values(x, at, None, end - at), end - at)
        s, q = s + v, fma(v, v, q)
    a, b = 0.0, 0.0
    for k in range(LANES):
        a += lane(s, k)
        if squares is not None:
            b += lane(q, k)
    return a, b


@kernel
def row(thread, first, last, x, squares, out, ahead, turn, skip):
    """Add to a `RowSums`: the sum of at most 2^20 values, and the sum of squares, if these are wanted.

    A long row's quarters are read side by side, and others' values prefetched, as in `statistics_inner`.
    """
    count = count_of(x)
    quarter = (last - first) // (4 * count)
    far, jump = (quarter * count, count) if quarter >= LONG_ROUNDS else (count, 4 * count)
    sums, s2 = wider(no_values(x)), no_squares(x)
    for begun in range(0, quarter, LANE_ROUNDS):
        few = no_values(x)
        for k in range(begun, min(begun + LANE_ROUNDS, quarter)):
            at = first + k * jump
            if far == count:
                later = at + ahead + (skip if at >= turn else 0)
                prefetch(x, later)
                prefetch(x, later + count)
                prefetch(x, later + 2 * count)
                prefetch(x, later + 3 * count)
            v0, v1, v2, v3 = pairs(x, at), pairs(x, at + far), pairs(x, at + 2 * far), pairs(x, at + 3 * far)
            few = plus(few, plus(plus(halves(v0), halves(v1)), plus(halves(v2), halves(v3))))
            if squares is not None:
                q0, q1 = halves(wider(squares_of(v0))), halves(wider(squares_of(v1)))
                q2, q3 = halves(wider(squares_of(v2))), halves(wider(squares_of(v3)))
                s2 = plus(s2, plus(plus(q0, q1), plus(q2, q3)))
        sums = plus(sums, halves(wider(few)))
    at = first + 4 * quarter * count
    whole = at + (last - at) // count * count
    while at < whole:
        v = pairs(x, at)
        sums = plus(sums, halves(wider(halves(v))))
        if squares is not None:
            s2 = plus(s2, halves(wider(squares_of(v))))
        at += count
    a, b = rest_of_row(x, whole, last, squares)
    results = table_rows(RowSums, out, 1)
    results.sum[0] += total(sums) + int(a)
    if squares is not None:
        results.squares[0] += total(s2) + int(b)


# --- columns ----------------------------------------------------------------------------------------------------------


@inline
def add_eight(x, first, last, at, step, some, sums, rest, squares):
    """Eight columns, or the first ``some``, as float64."""
    s, q = everywhere(0.0), everywhere(0.0)
    for r in range(first, last):
        v = moved(x, some_values(x, r * step + at, None, some), some)
        s = s + v
        if squares is not None:
            q = fma(v, v, q)
    put(sums, at, load(sums, at, 64) + s)
    if squares is not None:
        put(rest, at, load(rest, at, 64) + q)


@inline
def add_rest(x, first, last, at, end, step, sums, rest, squares):
    """Fewer columns than 64 bytes have."""
    while at + LANES <= end:
        add_eight(x, first, last, at, step, None, sums, rest, squares)
        at += LANES
    if at < end:
        add_eight(x, first, last, at, step, end - at, sums, rest, squares)


@inline
def flush_all(x, columns, squares, table, sums, rest):
    """The table's sums to those in float64; zeros remain."""
    words = SUMS if squares is None else SUMS + SQUARES
    for k in range(columns // count_of(x)):
        flush(table, k * words, no_values(x), squares, sums, rest, k * count_of(x))
        for at in range(k * words, (k + 1) * words, LANES):
            put(table, at, everywhere(0.0))


@kernel
def columns(thread, first, last, x, step, width, squares, table, sums, rest, state):
    """Add rows from the first to the last, a step apart, to the sums of their columns, in float64, and of squares.

    They go to a table of integers, four rows at once along it, with room for 1.5 words a column. It is flushed when
    it holds MOST_ROWS, or when no rows are given; ``state`` is what it `Holds`.
    """
    holds = table_rows(Holds, state, 1)
    count, held = count_of(x), holds.rows[0]
    words, r = SUMS if squares is None else SUMS + SQUARES, first
    if held == MOST_ROWS or first == last:
        flush_all(x, holds.columns[0], squares, table, sums, rest)
        held = 0
    while r < last:
        end = min(r + MOST_ROWS - held, last)
        held += end - r
        while r < end:
            rows = 4 if r + 4 <= end else 1
            for k in range(width // count):
                at = r * step + k * count
                v = pairs(x, at)
                if rows == 4:
                    for j in range(4, 8):
                        prefetch(x, at + j * step)
                    v1, v2, v3 = pairs(x, at + step), pairs(x, at + 2 * step), pairs(x, at + 3 * step)
                    add_rows(table, k * words, squares, v, v1, v2, v3)
                else:
                    add_rows(table, k * words, squares, v, None, None, None)
            r += rows
        if r < last:
            flush_all(x, holds.columns[0], squares, table, sums, rest)
            held = 0
    add_rest(x, first, last, width // count * count, width, step, sums, rest, squares)
    holds.rows[0] = held


# --- for those who call these -----------------------------------------------------------------------------------------

ROW, ROW_SUMS = offsets_of_arguments(row), offsets(RowSums)
COLUMNS, HOLDS = offsets_of_arguments(columns), offsets(Holds)
