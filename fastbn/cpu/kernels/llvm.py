"""Vectors as LLVM's instructions: what `simd` and `doubles` build their loads, stores and masks from."""

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import models, register_model

I16, I32, I64 = ir.IntType(16), ir.IntType(32), ir.IntType(64)
HALF, FLOAT, DOUBLE = ir.HalfType(), ir.FloatType(), ir.DoubleType()
SCALARS = {types.float32: FLOAT, types.float64: DOUBLE}


class Integer(types.Type):
    """An element of an integer or bool array. (Numba's own of 16 bits are halves here.)"""

    def __init__(self, letter, size):
        self.letter, self.bitwidth = letter, 8 * size
        super().__init__(name=f"Integer({letter}{size})")


@register_model(Integer)
class _IntegerModel(models.PrimitiveModel):
    def __init__(self, manager, integer):
        super().__init__(manager, integer, ir.IntType(integer.bitwidth))


# As plans name them: s for signed, n for not, b for bool.
INTEGER_ARRAYS = {f"{letter}{size}*": Integer(letter, size) for letter in "sn" for size in (1, 2, 4, 8)}
INTEGER_ARRAYS["b1*"] = Integer("b", 1)
STORED = {types.uint16: I16, types.int16: I16, types.uint8: ir.IntType(8)} | SCALARS
STORED |= {integer: ir.IntType(integer.bitwidth) for integer in INTEGER_ARRAYS.values()}


def size_of(array):
    return array.dtype.bitwidth // 8


def pointer_to(builder, array, value, at, lanes):
    vector = ir.VectorType(STORED[array.dtype], lanes)
    return builder.bitcast(builder.gep(value, [at]), vector.as_pointer())


def shuffle(builder, value, lanes):
    undefined = ir.Constant(value.type, ir.Undefined)
    lanes = list(lanes)
    return builder.shuffle_vector(value, undefined, ir.Constant(ir.VectorType(I32, len(lanes)), lanes))


def as_words(builder, v):
    """16 bytes as two words in a register, of whose making LLVM knows nothing."""
    words = builder.bitcast(v, ir.VectorType(I64, 2))
    return builder.asm(ir.FunctionType(words.type, [words.type]), "", "=x,0", [words], side_effect=False)


def prefetch_line(builder, pointer, after=0):
    """Ask for the line so many bytes from a pointer on, to the second-level cache; it need not exist."""
    place = builder.gep(builder.bitcast(pointer, ir.IntType(8).as_pointer()), [I64(after)])
    kind = ir.FunctionType(ir.VoidType(), [place.type, I32, I32, I32])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    builder.call(function, [place, I32(0), I32(2), I32(1)])


def lanes_below(builder, n, lanes):
    kind = ir.VectorType(I32, lanes)
    single = builder.insert_element(ir.Constant(kind, ir.Undefined), builder.trunc(n, I32), I32(0))
    return builder.icmp_signed("<", ir.Constant(kind, list(range(lanes))), shuffle(builder, single, [0] * lanes))


def masked(builder, what, kind, stored):
    element = stored.element
    letter = "i" if isinstance(element, ir.IntType) else "f"
    bits = element.width if letter == "i" else {FLOAT: 32, DOUBLE: 64}[element]
    name = f"llvm.masked.{what}.v{stored.count}{letter}{bits}.p0"
    return cgutils.get_or_insert_function(builder.module, kind, name)


def decode(builder, stored, dtype, v):
    if dtype == types.uint16:
        return builder.fpext(builder.bitcast(stored, ir.VectorType(HALF, v.lanes)), v.llvm)
    if dtype == types.int16:
        bits = builder.zext(stored, ir.VectorType(I32, v.lanes))
        return builder.bitcast(builder.shl(bits, ir.Constant(bits.type, [16] * v.lanes)), v.llvm)
    if dtype == types.uint8:  # a mask, whose bytes may be other numbers than 0 and 1
        return builder.uitofp(builder.icmp_unsigned("!=", stored, ir.Constant(stored.type, None)), v.llvm)
    return stored


def encode(builder, value, dtype, v):
    if dtype == types.uint16:
        return builder.bitcast(builder.fptrunc(value, ir.VectorType(HALF, v.lanes)), ir.VectorType(I16, v.lanes))
    if dtype == types.int16:
        kind = ir.VectorType(I32, v.lanes)

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
        return builder.trunc(builder.lshr(bits, constant(16)), ir.VectorType(I16, v.lanes))
    return value
