"""Vectors inside Numba kernels: typed loads, stores and arithmetic on a fixed number of lanes.

Kernels written with them do exactly the additions they say, in the order they say, whatever LLVM, the processor or
the number of threads: a sum needs no fastmath flag to be fast, so no flag can reorder it or fold ``(x - hi) - lo``.

A `Vector` holds ``width`` bytes of the compute type: float64 for float64 arrays, float32 for all others. Numba has no
half types on the CPU, so those travel as integers, are decoded on load and rounded to nearest-even on store:

=========  ==========  ==========
array      seen here   computes in
=========  ==========  ==========
float16    uint16      float32
bfloat16   int16       float32
float32    float32     float32
float64    float64     float64
=========  ==========  ==========

An array is a pointer to its first element; positions are element indices and are not checked. An absent array (None)
loads as None, and None is stored, converted and tested by doing nothing: options cost no branches, in source or at run
time.
"""

import operator

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, lower_builtin, models, register_model, type_callable

from fastbn.cpu.kernels.llvm import (
    DOUBLE,
    FLOAT,
    I32,
    I64,
    SCALARS,
    as_words,
    decode,
    encode,
    lanes_below,
    masked,
    pointer_to,
    prefetch_line,
    shuffle,
    size_of,
)


class Vector(types.Type):
    """Numba type of ``lanes`` values of ``scalar``; one LLVM vector."""

    def __init__(self, scalar, lanes):
        self.scalar, self.lanes = scalar, lanes
        super().__init__(name=f"Vector({scalar} x {lanes})")

    @property
    def llvm(self):
        return ir.VectorType(SCALARS[self.scalar], self.lanes)


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager, vector):
        super().__init__(manager, vector, vector.llvm)


def _vector(array, width):
    """What a load gives: ``width`` bytes of the compute type but at least one lane, or as many lanes as a vector."""
    scalar = types.float64 if array.dtype == types.float64 else types.float32
    if isinstance(width, Vector):
        return Vector(scalar, width.lanes)
    return Vector(scalar, max(1, width.literal_value * 8 // scalar.bitwidth))


# --- arithmetic -------------------------------------------------------------------------------------------------------


def absent(result, *arguments):
    """The intrinsic of an absent array: the last argument handed on where the result is one, else nothing."""

    def codegen(context, builder, sig, args):
        return args[-1] if isinstance(result, Vector) else context.get_dummy_value()

    return result(*arguments), codegen


def _define_operator(function, instruction):
    @type_callable(function)
    def _type(context):
        return lambda a, b: a if isinstance(a, Vector) and a == b else None

    @lower_builtin(function, Vector, Vector)
    def _lower(context, builder, sig, args):
        return getattr(builder, instruction)(*args)


_define_operator(operator.add, "fadd")
_define_operator(operator.sub, "fsub")
_define_operator(operator.mul, "fmul")
_define_operator(operator.truediv, "fdiv")


@intrinsic
def fma(typing, a, b, c):
    """``a * b + c``, rounded once."""

    def codegen(context, builder, sig, args):
        name = f"llvm.fma.v{a.lanes}f{a.scalar.bitwidth}"
        kind = ir.FunctionType(a.llvm, [a.llvm] * 3)
        return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), args)

    return a(a, b, c), codegen


@intrinsic
def root(typing, v):
    """The square root of each lane, correctly rounded."""

    def codegen(context, builder, sig, args):
        kind = ir.FunctionType(v.llvm, [v.llvm])
        name = f"llvm.sqrt.v{v.lanes}f{v.scalar.bitwidth}"
        return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), args)

    return v(v), codegen


@intrinsic
def zero_where_not_positive(typing, test, v):
    """v, but 0 in the lanes where test <= 0. A NaN in ``test`` lets v through."""
    if test == types.none:
        return absent(v, test, v)

    def codegen(context, builder, sig, args):
        zero = ir.Constant(v.llvm, [0.0] * v.lanes)
        return builder.select(builder.fcmp_ordered("<=", args[0], zero), zero, args[1])

    return v(test, v), codegen


@intrinsic
def zero_where_stored_not_positive(typing, array, test, v):
    """The same of what ``test`` is in the dtype of ``array``, to which the smallest numbers of halves round to 0."""
    # 2^-25 and 2^-134, as bits: where a process flushes subnormal numbers, Python would write the second one as 0.
    most = {types.uint16: 0x33000000, types.int16: 0x8000}.get(array.dtype)

    def codegen(context, builder, sig, args):
        zero = bound = ir.Constant(v.llvm, [0.0] * v.lanes)
        if most is not None:
            bound = builder.bitcast(ir.Constant(ir.VectorType(I32, v.lanes), [most] * v.lanes), v.llvm)
        return builder.select(builder.fcmp_ordered("<=", args[1], bound), zero, args[2])

    return v(array, test, v), codegen


@intrinsic
def zero_where_zero(typing, test, v):
    """v, but 0 in the lanes where test == 0."""

    def codegen(context, builder, sig, args):
        zero = ir.Constant(v.llvm, [0.0] * v.lanes)
        return builder.select(builder.fcmp_ordered("==", args[0], zero), zero, args[1])

    return v(test, v), codegen


@intrinsic
def zero_where_uncounted(typing, weight, dz, v):
    """v, but 0 in the lanes where neither the weight nor dz is other than 0, whatever v is there."""
    if weight == types.none:
        return absent(v, weight, dz, v)

    def codegen(context, builder, sig, args):
        test, zero = (ir.Constant(kind.llvm, [0.0] * kind.lanes) for kind in (weight, v))
        alike = [builder.fcmp_ordered("==", args[0], test), builder.fcmp_ordered("==", args[1], zero)]
        return builder.select(builder.and_(*alike), zero, args[2])

    return v(weight, dz, v), codegen


@intrinsic
def first_lanes(typing, v, n):
    """v, but 0 in the lanes from n on."""

    def codegen(context, builder, sig, args):
        zero = ir.Constant(v.llvm, [0.0] * v.lanes)
        return builder.select(lanes_below(builder, args[1], v.lanes), args[0], zero)

    return v(v, types.intp), codegen


@intrinsic
def blended(typing, n, a, b):
    """The first n lanes of a, then those of b."""
    if a == types.none:
        return absent(types.none, types.intp, a, b)

    def codegen(context, builder, sig, args):
        return builder.select(lanes_below(builder, args[0], a.lanes), args[1], args[2])

    return a(types.intp, a, b), codegen


@intrinsic
def converted(typing, v, like):
    """``v`` in the compute type of the vector ``like``, which has as many lanes."""
    if v == types.none:
        return absent(types.none, v, like)
    to = Vector(like.scalar, v.lanes)

    def codegen(context, builder, sig, args):
        if v == to:
            return args[0]
        return (builder.fpext if to.scalar == types.float64 else builder.fptrunc)(args[0], to.llvm)

    return to(v, like), codegen


@intrinsic
def exactly_summed(typing, array, v):
    """Weights of an array as what their sums are exact in, or nearly: float32 of bools, float64 of all others."""
    to = Vector(types.float64, v.lanes) if array.dtype == types.float32 else v

    def codegen(context, builder, sig, args):
        return args[1] if v == to else builder.fpext(args[1], to.llvm)

    return to(array, v), codegen


@intrinsic(prefer_literal=True)
def narrowed(typing, array, v, width):
    """The first lanes of v: as many as ``width`` bytes of the array's compute type."""
    short = _vector(array, width)

    def codegen(context, builder, sig, args):
        return shuffle(builder, args[1], range(short.lanes))

    return short(array, v, width), codegen


@intrinsic
def any_greater(typing, a, b):
    """Whether some lane of a is greater than that of b."""

    def codegen(context, builder, sig, args):
        lanes = builder.fcmp_ordered(">", *args)
        bits = builder.bitcast(lanes, ir.IntType(a.lanes))
        return builder.icmp_unsigned("!=", bits, ir.Constant(bits.type, 0))

    return types.boolean(a, b), codegen


@intrinsic
def any_nan(typing, v):
    """Whether some lane of v is not a number."""

    def codegen(context, builder, sig, args):
        bits = builder.bitcast(builder.fcmp_unordered("uno", args[0], args[0]), ir.IntType(v.lanes))
        return builder.icmp_unsigned("!=", bits, ir.Constant(bits.type, 0))

    return types.boolean(v), codegen


@intrinsic
def total(typing, v):
    """The sum of the lanes in float64, halves added to halves."""

    def codegen(context, builder, sig, args):
        value, lanes = args[0], v.lanes
        if v.scalar == types.float32:
            value = builder.fpext(value, ir.VectorType(DOUBLE, lanes))
        while lanes > 1:
            lanes //= 2
            low = shuffle(builder, value, range(lanes))
            value = builder.fadd(low, shuffle(builder, value, range(lanes, 2 * lanes)))
        return builder.extract_element(value, I32(0))

    return types.float64(v), codegen


# --- memory -----------------------------------------------------------------------------------------------------------


@intrinsic(prefer_literal=True)
def lanes(typing, array, width):
    """How many values of ``array`` a vector of ``width`` bytes holds; a constant."""
    count = _vector(array, width).lanes
    return types.intp(array, width), lambda context, builder, sig, args: ir.Constant(I64, count)


@intrinsic(prefer_literal=True)
def splat(typing, array, value, width):
    """``value`` in every lane, in the compute type of ``array``."""
    if value == types.none:
        return absent(types.none, array, value, width)
    v = _vector(array, width)

    def codegen(context, builder, sig, args):
        value = context.cast(builder, args[1], sig.args[1], v.scalar)
        single = builder.insert_element(ir.Constant(v.llvm, ir.Undefined), value, I32(0))
        return shuffle(builder, single, [0] * v.lanes)

    return v(array, value, width), codegen


@intrinsic(prefer_literal=True)
def load(typing, array, at, width):
    """The values from ``at`` on."""
    if array == types.none:
        return absent(types.none, array, types.intp, width)
    v = _vector(array, width)

    def codegen(context, builder, sig, args):
        pointer = pointer_to(builder, array, args[0], args[1], v.lanes)
        return decode(builder, builder.load(pointer, align=size_of(array)), array.dtype, v)

    return v(array, types.intp, width), codegen


@intrinsic(prefer_literal=True)
def load_first(typing, array, at, n, width):
    """The ``n`` values from ``at`` on and 0 in the other lanes, whose memory is not touched."""
    if array == types.none:
        return absent(types.none, array, types.intp, types.intp, width)
    v = _vector(array, width)

    def codegen(context, builder, sig, args):
        pointer = pointer_to(builder, array, args[0], args[1], v.lanes)
        stored = pointer.type.pointee
        mask = lanes_below(builder, args[2], v.lanes)
        kind = ir.FunctionType(stored, [pointer.type, I32, mask.type, stored])
        function = masked(builder, "load", kind, stored)
        value = builder.call(function, [pointer, I32(size_of(array)), mask, ir.Constant(stored, None)])
        return decode(builder, value, array.dtype, v)

    return v(array, types.intp, types.intp, width), codegen


@intrinsic
def store(typing, array, at, v):
    """Write the lanes from ``at`` on."""
    if array == types.none:
        return absent(types.none, array, types.intp, v)

    def codegen(context, builder, sig, args):
        pointer = pointer_to(builder, array, args[0], args[1], v.lanes)
        builder.store(encode(builder, args[2], array.dtype, v), pointer, align=size_of(array))
        return context.get_dummy_value()

    return types.none(array, types.intp, v), codegen


@intrinsic
def store_first(typing, array, at, n, v):
    """Write the first ``n`` lanes from ``at`` on; the memory behind them is not touched."""
    if array == types.none:
        return absent(types.none, array, types.intp, types.intp, v)

    def codegen(context, builder, sig, args):
        pointer = pointer_to(builder, array, args[0], args[1], v.lanes)
        value = encode(builder, args[3], array.dtype, v)
        mask = lanes_below(builder, args[2], v.lanes)
        kind = ir.FunctionType(ir.VoidType(), [value.type, pointer.type, I32, mask.type])
        builder.call(masked(builder, "store", kind, value.type), [value, pointer, I32(size_of(array)), mask])
        return context.get_dummy_value()

    return types.none(array, types.intp, types.intp, v), codegen


@intrinsic
def store_nontemporal(typing, array, at, v):
    """Write the lanes past the caches; ``at`` must lie on a multiple of the vector's stored bytes, at most 16.

    NumPy's large arrays start 16 bytes into a line. Four stores of 16 bytes go out as one line, as fast as one of 64.
    float16 is divided so here, before it is rounded: where LLVM 20 shares the rounding with an ordinary store it
    forgets the hint, and a line written both ways takes five times as long. (bfloat16 so divided would lose it.)
    With AVX512-FP16 it has no such store of halves: they are shown to it as whole words.
    """

    def codegen(context, builder, sig, args):
        size = size_of(array)
        part = Vector(v.scalar, 16 // size if array.dtype == types.uint16 and v.lanes * size > 16 else v.lanes)
        for first in range(0, v.lanes, part.lanes):
            at = builder.add(args[1], ir.Constant(args[1].type, first))
            pointer = pointer_to(builder, array, args[0], at, part.lanes)
            value = args[2] if part.lanes == v.lanes else shuffle(builder, args[2], range(first, first + part.lanes))
            encoded = encode(builder, value, array.dtype, part)
            if array.dtype == types.uint16 and part.lanes == 8 and builder.module.triple.startswith("x86_64"):
                encoded = as_words(builder, encoded)
                pointer = builder.bitcast(pointer, encoded.type.as_pointer())
            written = builder.store(encoded, pointer, align=min(16, size * part.lanes))
            written.set_metadata("nontemporal", builder.module.add_metadata([I32(1)]))
        return context.get_dummy_value()

    return types.none(array, types.intp, v), codegen


@intrinsic
def prefetch(typing, array, at):
    """Ask for the line of an element ahead of its use; it need not exist."""
    if array == types.none:
        return absent(types.none, array, types.intp)

    def codegen(context, builder, sig, args):
        prefetch_line(builder, pointer_to(builder, array, *args, 1))
        return context.get_dummy_value()

    return types.none(array, types.intp), codegen


@intrinsic
def rounded(typing, array, number):
    """A float64 number, rounded to the compute type of ``array``."""

    def codegen(context, builder, sig, args):
        if array.dtype == types.float64:
            return args[1]
        return builder.fpext(builder.fptrunc(args[1], FLOAT), DOUBLE)

    return types.float64(array, types.float64), codegen


@intrinsic
def unit_of(typing, array, number):
    """The power of two below a number (or a vector of them) that is far from 1, or 1; positive in ``array``'s type.

    Far are 30 binary orders: squares then still have a third of float32's range on either side.
    """
    count = number.lanes if isinstance(number, Vector) else 1
    most = 1000 if array.dtype == types.float64 else 120

    def codegen(context, builder, sig, args):
        kind, integers = ir.VectorType(DOUBLE, count), ir.VectorType(I64, count)

        def constant(value):
            return ir.Constant(kind, [value] * count)

        v = args[1]
        if count == 1:
            v = builder.insert_element(ir.Constant(kind, ir.Undefined), v, I32(0))
        exponent = ir.Constant(integers, [0x7FF0000000000000] * count)
        power = builder.bitcast(builder.and_(builder.bitcast(v, integers), exponent), kind)
        for compare, bound in (("<", 2.0**-most), (">", 2.0**most)):
            power = builder.select(builder.fcmp_ordered(compare, power, constant(bound)), constant(bound), power)
        below = builder.fcmp_ordered("<", v, constant(2.0**-30))
        above = builder.fcmp_ordered(">", v, constant(2.0**30))
        ordinary = builder.and_(
            builder.fcmp_ordered(">", v, constant(0.0)), builder.fcmp_ordered("<", v, constant(float("inf")))
        )
        unit = builder.select(builder.and_(ordinary, builder.or_(below, above)), power, constant(1.0))
        return unit if count > 1 else builder.extract_element(unit, I32(0))

    return number(array, number), codegen
