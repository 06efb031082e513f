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

_I16, _I32, _I64 = ir.IntType(16), ir.IntType(32), ir.IntType(64)
_HALF, _FLOAT, _DOUBLE = ir.HalfType(), ir.FloatType(), ir.DoubleType()
_SCALARS = {types.float32: _FLOAT, types.float64: _DOUBLE}
_STORED = {types.uint16: _I16, types.int16: _I16, types.uint8: ir.IntType(8)} | _SCALARS


class Vector(types.Type):
    """Numba type of ``lanes`` values of ``scalar``; one LLVM vector."""

    def __init__(self, scalar, lanes):
        self.scalar, self.lanes = scalar, lanes
        super().__init__(name=f"Vector({scalar} x {lanes})")

    @property
    def llvm(self):
        return ir.VectorType(_SCALARS[self.scalar], self.lanes)


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


def _absent(result, *arguments):
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
        return _absent(v, test, v)

    def codegen(context, builder, sig, args):
        zero = ir.Constant(v.llvm, [0.0] * v.lanes)
        return builder.select(builder.fcmp_ordered("<=", args[0], zero), zero, args[1])

    return v(test, v), codegen


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
        return _absent(v, weight, dz, v)

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
        return builder.select(_lanes_below(builder, args[1], v.lanes), args[0], zero)

    return v(v, types.intp), codegen


@intrinsic
def blended(typing, n, a, b):
    """The first n lanes of a, then those of b."""

    def codegen(context, builder, sig, args):
        return builder.select(_lanes_below(builder, args[0], a.lanes), args[1], args[2])

    return a(types.intp, a, b), codegen


@intrinsic
def converted(typing, v, like):
    """``v`` in the compute type of the vector ``like``, which has as many lanes."""
    if v == types.none:
        return _absent(types.none, v, like)
    to = Vector(like.scalar, v.lanes)

    def codegen(context, builder, sig, args):
        if v == to:
            return args[0]
        return (builder.fpext if to.scalar == types.float64 else builder.fptrunc)(args[0], to.llvm)

    return to(v, like), codegen


@intrinsic(prefer_literal=True)
def narrowed(typing, array, v, width):
    """The first lanes of v: as many as ``width`` bytes of the array's compute type."""
    short = _vector(array, width)

    def codegen(context, builder, sig, args):
        return _shuffle(builder, args[1], range(short.lanes))

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
            value = builder.fpext(value, ir.VectorType(_DOUBLE, lanes))
        while lanes > 1:
            lanes //= 2
            low = _shuffle(builder, value, range(lanes))
            value = builder.fadd(low, _shuffle(builder, value, range(lanes, 2 * lanes)))
        return builder.extract_element(value, _I32(0))

    return types.float64(v), codegen


# --- memory -----------------------------------------------------------------------------------------------------------


@intrinsic(prefer_literal=True)
def lanes(typing, array, width):
    """How many values of ``array`` a vector of ``width`` bytes holds; a constant."""
    count = _vector(array, width).lanes
    return types.intp(array, width), lambda context, builder, sig, args: ir.Constant(_I64, count)


@intrinsic(prefer_literal=True)
def splat(typing, array, value, width):
    """``value`` in every lane, in the compute type of ``array``."""
    if value == types.none:
        return _absent(types.none, array, value, width)
    v = _vector(array, width)

    def codegen(context, builder, sig, args):
        value = context.cast(builder, args[1], sig.args[1], v.scalar)
        single = builder.insert_element(ir.Constant(v.llvm, ir.Undefined), value, _I32(0))
        return _shuffle(builder, single, [0] * v.lanes)

    return v(array, value, width), codegen


@intrinsic(prefer_literal=True)
def load(typing, array, at, width):
    """The values from ``at`` on."""
    if array == types.none:
        return _absent(types.none, array, types.intp, width)
    v = _vector(array, width)

    def codegen(context, builder, sig, args):
        pointer = _pointer(builder, array, args[0], args[1], v.lanes)
        return _decode(builder, builder.load(pointer, align=_size(array)), array.dtype, v)

    return v(array, types.intp, width), codegen


@intrinsic(prefer_literal=True)
def load_first(typing, array, at, n, width):
    """The ``n`` values from ``at`` on and 0 in the other lanes, whose memory is not touched."""
    if array == types.none:
        return _absent(types.none, array, types.intp, types.intp, width)
    v = _vector(array, width)

    def codegen(context, builder, sig, args):
        pointer = _pointer(builder, array, args[0], args[1], v.lanes)
        stored = pointer.type.pointee
        mask = _lanes_below(builder, args[2], v.lanes)
        kind = ir.FunctionType(stored, [pointer.type, _I32, mask.type, stored])
        function = _masked(builder, "load", kind, stored)
        value = builder.call(function, [pointer, _I32(_size(array)), mask, ir.Constant(stored, None)])
        return _decode(builder, value, array.dtype, v)

    return v(array, types.intp, types.intp, width), codegen


@intrinsic
def store(typing, array, at, v):
    """Write the lanes from ``at`` on."""
    if array == types.none:
        return _absent(types.none, array, types.intp, v)

    def codegen(context, builder, sig, args):
        pointer = _pointer(builder, array, args[0], args[1], v.lanes)
        builder.store(_encode(builder, args[2], array.dtype, v), pointer, align=_size(array))
        return context.get_dummy_value()

    return types.none(array, types.intp, v), codegen


@intrinsic
def store_first(typing, array, at, n, v):
    """Write the first ``n`` lanes from ``at`` on; the memory behind them is not touched."""
    if array == types.none:
        return _absent(types.none, array, types.intp, types.intp, v)

    def codegen(context, builder, sig, args):
        pointer = _pointer(builder, array, args[0], args[1], v.lanes)
        value = _encode(builder, args[3], array.dtype, v)
        mask = _lanes_below(builder, args[2], v.lanes)
        kind = ir.FunctionType(ir.VoidType(), [value.type, pointer.type, _I32, mask.type])
        builder.call(_masked(builder, "store", kind, value.type), [value, pointer, _I32(_size(array)), mask])
        return context.get_dummy_value()

    return types.none(array, types.intp, types.intp, v), codegen


@intrinsic
def stream(typing, array, at, v):
    """Write the lanes past the caches; ``at`` must lie on a multiple of the vector's stored bytes, at most 16.

    NumPy's large arrays start 16 bytes into a line. Four stores of 16 bytes go out as one line, as fast as one of 64.
    float16 is divided so here, before it is rounded: where LLVM 20 shares the rounding with an ordinary store it
    forgets the hint, and a line written both ways takes five times as long. (bfloat16 so divided would lose it.)
    With AVX512-FP16 it has no such store of halves: they are shown to it as whole words.
    """

    def codegen(context, builder, sig, args):
        size = _size(array)
        part = Vector(v.scalar, 16 // size if array.dtype == types.uint16 and v.lanes * size > 16 else v.lanes)
        for first in range(0, v.lanes, part.lanes):
            at = builder.add(args[1], ir.Constant(args[1].type, first))
            pointer = _pointer(builder, array, args[0], at, part.lanes)
            value = args[2] if part.lanes == v.lanes else _shuffle(builder, args[2], range(first, first + part.lanes))
            encoded = _encode(builder, value, array.dtype, part)
            if array.dtype == types.uint16 and part.lanes == 8 and builder.module.triple.startswith("x86_64"):
                encoded = _as_words(builder, encoded)
                pointer = builder.bitcast(pointer, encoded.type.as_pointer())
            written = builder.store(encoded, pointer, align=min(16, size * part.lanes))
            written.set_metadata("nontemporal", builder.module.add_metadata([_I32(1)]))
        return context.get_dummy_value()

    return types.none(array, types.intp, v), codegen


@intrinsic
def prefetch(typing, array, at):
    """Ask for the line of an element, to the second-level cache, ahead of its use; it need not exist."""
    if array == types.none:
        return _absent(types.none, array, types.intp)

    def codegen(context, builder, sig, args):
        pointer = builder.bitcast(_pointer(builder, array, args[0], args[1], 1), ir.IntType(8).as_pointer())
        kind = ir.FunctionType(ir.VoidType(), [pointer.type, _I32, _I32, _I32])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        builder.call(function, [pointer, _I32(0), _I32(2), _I32(1)])
        return context.get_dummy_value()

    return types.none(array, types.intp), codegen


@intrinsic
def value(typing, array, at):
    """One value as float64."""
    if array == types.none:
        return _absent(types.none, array, types.intp)
    v = Vector(types.float64 if array.dtype == types.float64 else types.float32, 1)

    def codegen(context, builder, sig, args):
        pointer = _pointer(builder, array, args[0], args[1], 1)
        single = _decode(builder, builder.load(pointer, align=_size(array)), array.dtype, v)
        single = builder.extract_element(single, _I32(0))
        return single if v.scalar == types.float64 else builder.fpext(single, _DOUBLE)

    return types.float64(array, types.intp), codegen


@intrinsic
def rounded(typing, array, number):
    """A float64 number, rounded to the compute type of ``array``."""

    def codegen(context, builder, sig, args):
        if array.dtype == types.float64:
            return args[1]
        return builder.fpext(builder.fptrunc(args[1], _FLOAT), _DOUBLE)

    return types.float64(array, types.float64), codegen


@intrinsic
def unit_of(typing, array, number):
    """The power of two below a number (or a vector of them) that is far from 1, or 1; positive in ``array``'s type.

    Far are 30 binary orders: squares then still have a third of float32's range on either side.
    """
    count = number.lanes if isinstance(number, Vector) else 1
    most = 1000 if array.dtype == types.float64 else 120

    def codegen(context, builder, sig, args):
        kind, integers = ir.VectorType(_DOUBLE, count), ir.VectorType(_I64, count)

        def constant(value):
            return ir.Constant(kind, [value] * count)

        v = args[1]
        if count == 1:
            v = builder.insert_element(ir.Constant(kind, ir.Undefined), v, _I32(0))
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
        return unit if count > 1 else builder.extract_element(unit, _I32(0))

    return number(array, number), codegen


@intrinsic
def address(typing, array, at):
    """The address of an element in bytes."""

    def codegen(context, builder, sig, args):
        return builder.ptrtoint(_pointer(builder, array, args[0], args[1], 1), _I64)

    return types.intp(array, types.intp), codegen


# --- LLVM, shared by the above ----------------------------------------------------------------------------------------


def _size(array):
    return array.dtype.bitwidth // 8


def _pointer(builder, array, value, at, lanes):
    vector = ir.VectorType(_STORED[array.dtype], lanes)
    return builder.bitcast(builder.gep(value, [at]), vector.as_pointer())


def _shuffle(builder, value, lanes):
    undefined = ir.Constant(value.type, ir.Undefined)
    lanes = list(lanes)
    return builder.shuffle_vector(value, undefined, ir.Constant(ir.VectorType(_I32, len(lanes)), lanes))


def _as_words(builder, v):
    """16 bytes as two words in a register, of whose making LLVM knows nothing."""
    words = builder.bitcast(v, ir.VectorType(_I64, 2))
    return builder.asm(ir.FunctionType(words.type, [words.type]), "", "=x,0", [words], side_effect=False)


def _lanes_below(builder, n, lanes):
    kind = ir.VectorType(_I32, lanes)
    single = builder.insert_element(ir.Constant(kind, ir.Undefined), builder.trunc(n, _I32), _I32(0))
    return builder.icmp_signed("<", ir.Constant(kind, list(range(lanes))), _shuffle(builder, single, [0] * lanes))


def _masked(builder, what, kind, stored):
    element = stored.element
    letter = "i" if isinstance(element, ir.IntType) else "f"
    bits = element.width if letter == "i" else {_FLOAT: 32, _DOUBLE: 64}[element]
    name = f"llvm.masked.{what}.v{stored.count}{letter}{bits}.p0"
    return cgutils.get_or_insert_function(builder.module, kind, name)


def _decode(builder, stored, dtype, v):
    if dtype == types.uint16:
        return builder.fpext(builder.bitcast(stored, ir.VectorType(_HALF, v.lanes)), v.llvm)
    if dtype == types.int16:
        bits = builder.zext(stored, ir.VectorType(_I32, v.lanes))
        return builder.bitcast(builder.shl(bits, ir.Constant(bits.type, [16] * v.lanes)), v.llvm)
    if dtype == types.uint8:
        return builder.uitofp(stored, v.llvm)
    return stored


def _encode(builder, value, dtype, v):
    if dtype == types.uint16:
        return builder.bitcast(builder.fptrunc(value, ir.VectorType(_HALF, v.lanes)), ir.VectorType(_I16, v.lanes))
    if dtype == types.int16:
        kind = ir.VectorType(_I32, v.lanes)

        def constant(number):
            return ir.Constant(kind, [number] * v.lanes)

        bits = builder.bitcast(value, kind)
        # The rounding carry would turn a NaN with a full payload into a zero: such payloads end a little earlier, of
        # either sign. (Arithmetic makes quiet NaNs, so that none becomes infinite.)
        for below in ("smin", "umin"):
            most = constant(0x7FFF7FFF if below == "smin" else 0xFFFF7FFF)
            compare = builder.icmp_signed if below == "smin" else builder.icmp_unsigned
            bits = builder.select(compare("<", bits, most), bits, most)
        odd = builder.and_(builder.lshr(bits, constant(16)), constant(1))
        bits = builder.add(bits, builder.add(odd, constant(0x7FFF)))
        return builder.trunc(builder.lshr(bits, constant(16)), ir.VectorType(_I16, v.lanes))
    return value
