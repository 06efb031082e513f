"""Eight values of any real dtype as float64, with strides and masks: what `statistics` adds up.

Every float of 32 bits or fewer, and every integer below 2^53, is exact in float64, and so is the sum of many of them.
A `LaneMask` says which of eight values count. An absent array loads as None, a mask that is None lets all pass.
"""

from functools import reduce

from llvmlite import ir
from numba import types
from numba.extending import intrinsic, models, register_model

from fastbn.cpu.kernels.llvm import (
    DOUBLE,
    FLOAT,
    I32,
    I64,
    Integer,
    decode,
    encode,
    lanes_below,
    masked,
    pointer_to,
    prefetch_line,
    shuffle,
    size_of,
)
from fastbn.cpu.kernels.simd import Vector

LANES = 8  # one register of 64 bytes, or two of 32
DOUBLE_LANES = Vector(types.float64, LANES)
FLOAT_LANES = Vector(types.float32, LANES)


class LaneMask(types.Type):
    def __init__(self):
        super().__init__(name="LaneMask")


MASK = LaneMask()
BITS = ir.VectorType(ir.IntType(1), LANES)


@register_model(LaneMask)
class _MaskModel(models.PrimitiveModel):
    def __init__(self, manager, mask):
        super().__init__(manager, mask, BITS)


def widened(builder, stored, dtype):
    """Eight elements as float64."""
    if isinstance(dtype, Integer):
        if dtype.letter == "b":
            stored = builder.icmp_unsigned("!=", stored, ir.Constant(stored.type, None))
        return (builder.sitofp if dtype.letter == "s" else builder.uitofp)(stored, DOUBLE_LANES.llvm)
    if dtype == types.float64:
        return stored
    return builder.fpext(decode(builder, stored, dtype, FLOAT_LANES), DOUBLE_LANES.llvm)


def _masked_load(builder, pointer, mask, size):
    stored = pointer.type.pointee
    kind = ir.FunctionType(stored, [pointer.type, I32, mask.type, stored])
    function = masked(builder, "load", kind, stored)
    return builder.call(function, [pointer, I32(size), mask, ir.Constant(stored, None)])


def _stored(builder, array, pointer, mask):
    """Eight elements, or those that a mask has and zeros."""
    if mask is None:
        return builder.load(pointer, align=size_of(array))
    return _masked_load(builder, pointer, mask, size_of(array))


def _gathered(builder, array, values, mask):
    """The elements ``at``, ``at + step``, ... that the mask has."""
    first, at, step = values
    kind = ir.VectorType(I64, LANES)
    steps = shuffle(builder, builder.insert_element(ir.Constant(kind, ir.Undefined), step, I32(0)), [0] * LANES)
    offsets = builder.mul(steps, ir.Constant(kind, list(range(LANES))))
    start = pointer_to(builder, array, first, at, 1)
    element = start.type.pointee.element
    start = builder.bitcast(start, element.as_pointer())
    result = ir.Constant(ir.VectorType(element, LANES), None)
    for k in range(LANES):
        offset = builder.extract_element(offsets, I32(k))
        if mask is None:
            single = builder.load(builder.gep(start, [offset]), align=size_of(array))
        else:  # an element that is not there is read from the place of the first one
            offset = builder.select(builder.extract_element(mask, I32(k)), offset, I64(0))
            single = builder.load(builder.gep(start, [offset]), align=size_of(array))
        result = builder.insert_element(result, single, I32(k))
    return result


@intrinsic
def values(typing, array, at, step):
    """Eight values from ``at`` on, side by side if the step is None."""
    strided = step != types.none

    def codegen(context, builder, sig, args):
        if strided:
            return widened(builder, _gathered(builder, array, args, None), array.dtype)
        pointer = pointer_to(builder, array, args[0], args[1], LANES)
        return widened(builder, builder.load(pointer, align=size_of(array)), array.dtype)

    return DOUBLE_LANES(array, types.intp, types.intp if strided else types.none), codegen


@intrinsic
def some_values(typing, array, at, step, some):
    """Eight values, or the first ``some`` without touching other memory: side by side if the step is None, and then
    other lanes are zeros; None of no array.
    """
    strided, few = step != types.none, some != types.none
    if array == types.none:
        return types.none(array, types.intp, step, some), _dummy

    def codegen(context, builder, sig, args):
        return widened(builder, _some(builder, array, args, strided, few), array.dtype)

    return DOUBLE_LANES(array, types.intp, types.intp if strided else step, types.intp if few else some), codegen


def _some(builder, array, args, strided, few):
    first = lanes_below(builder, args[3], LANES) if few else None
    if strided:
        return _gathered(builder, array, args[:3], first)
    return _stored(builder, array, pointer_to(builder, array, args[0], args[1], LANES), first)


@intrinsic
def values_to_test(typing, array, at, step, some, skip_nan):
    """`some_values`; floats of 32 bits or fewer as float32 if NaNs are to be found: half the instructions."""
    strided, few = step != types.none, some != types.none
    v = lanes_to_test(array, skip_nan)

    def codegen(context, builder, sig, args):
        return as_lanes(builder, _some(builder, array, args, strided, few), array.dtype, v)

    return v(array, types.intp, types.intp if strided else step, types.intp if few else some, skip_nan), codegen


def lanes_to_test(array, skip_nan):
    """What eight values come as if NaNs are perhaps to be found among them."""
    short = skip_nan != types.none and array.dtype in (types.float32, types.uint16, types.int16)
    return FLOAT_LANES if short else DOUBLE_LANES


def as_lanes(builder, stored, dtype, v):
    """Eight elements as either."""
    return decode(builder, stored, dtype, v) if v == FLOAT_LANES else widened(builder, stored, dtype)


@intrinsic
def in_float64(typing, v):
    def codegen(context, builder, sig, args):
        return args[0] if v == DOUBLE_LANES else builder.fpext(args[0], DOUBLE_LANES.llvm)

    return DOUBLE_LANES(v), codegen


@intrinsic
def in_type_of(typing, v, number):
    """Float64 in the type of v, which has these numbers."""

    def codegen(context, builder, sig, args):
        return args[1] if v == DOUBLE_LANES else builder.fptrunc(args[1], v.llvm)

    return v(v, number), codegen


@intrinsic
def prefetch_values(typing, array, at):
    """Ask for the lines of four times eight values, which need not exist."""
    if array == types.none:
        return types.none(array, types.intp), _dummy

    def codegen(context, builder, sig, args):
        for line in range(0, 4 * LANES * size_of(array), 64):
            prefetch_line(builder, pointer_to(builder, array, *args, 1), line)
        return context.get_dummy_value()

    return types.none(array, types.intp), codegen


@intrinsic
def value_at(typing, array, at):
    """One value; 1 of an absent array."""
    if array == types.none:
        return types.float64(array, types.intp), lambda context, builder, sig, args: DOUBLE(1.0)

    def codegen(context, builder, sig, args):
        pointer = pointer_to(builder, array, args[0], args[1], 1)
        stored = shuffle(builder, builder.load(pointer, align=size_of(array)), [0] * LANES)
        return builder.extract_element(widened(builder, stored, array.dtype), I32(0))

    return types.float64(array, types.intp), codegen


# --- options ----------------------------------------------------------------------------------------------------------
# Numba leaves out branches of a parameter that is None, but not those of one that is there: their types must agree.


def _dummy(context, builder, sig, args):
    return context.get_dummy_value()


@intrinsic
def only_if(typing, option, a):
    """None where the option is."""
    if option == types.none:
        return types.none(option, a), _dummy
    return a(option, a), lambda context, builder, sig, args: args[1]


@intrinsic
def unless(typing, option, a):
    """None where the option is not."""
    if option != types.none:
        return types.none(option, a), _dummy
    return a(option, a), lambda context, builder, sig, args: args[1]


@intrinsic
def first_there(typing, a, b):
    """Of two of which one may be None."""
    if a == types.none:
        return b(a, b), lambda context, builder, sig, args: args[1]
    return a(a, b), lambda context, builder, sig, args: args[0]


# --- masks ------------------------------------------------------------------------------------------------------------


def _not_zero(builder, stored, dtype):
    if isinstance(dtype, Integer):
        return builder.icmp_unsigned("!=", stored, ir.Constant(stored.type, None))
    return builder.fcmp_unordered("!=", widened(builder, stored, dtype), ir.Constant(DOUBLE_LANES.llvm, None))


@intrinsic
def which_count(typing, where, at, step, v, some, skip_nan):
    """Of eight values, or of the first ``some``: those whose byte, or weight, is not zero, and that are not NaN if
    these are skipped; None if all count. Bytes are side by side if the step is None.
    """
    present, strided = [where != types.none, some != types.none, skip_nan != types.none], step != types.none
    if not any(present):
        return types.none(where, types.intp, step, v, some, skip_nan), _dummy

    def codegen(context, builder, sig, args):
        masks, first = [], None
        if present[1]:
            first = lanes_below(builder, args[4], LANES)
            masks.append(first)
        if present[0]:
            stored = _some(builder, where, [*args[:3], args[4]], strided, present[1])
            masks.append(_not_zero(builder, stored, where.dtype))
        if present[2]:
            masks.append(builder.fcmp_ordered("ord", args[3], args[3]))
        return reduce(builder.and_, masks)

    step = types.intp if strided else step
    return MASK(where, types.intp, step, v, types.intp if present[1] else some, skip_nan), codegen


@intrinsic
def first_lanes(typing, n):
    """The first n of eight."""
    return MASK(types.intp), lambda context, builder, sig, args: lanes_below(builder, args[0], LANES)


@intrinsic
def last_lanes(typing, n):
    """The last n of eight."""

    def codegen(context, builder, sig, args):
        return builder.not_(lanes_below(builder, builder.sub(I64(LANES), args[0]), LANES))

    return MASK(types.intp), codegen


@intrinsic
def finite(typing, v):
    """Those that are neither infinite nor NaN."""

    def codegen(context, builder, sig, args):
        difference = builder.fsub(args[0], args[0])
        return builder.fcmp_ordered("ord", difference, difference)

    return MASK(v), codegen


@intrinsic
def both(typing, a, b):
    """The lanes that two masks have; b may be None."""
    if b == types.none:
        return a(a, b), lambda context, builder, sig, args: args[0]
    return a(a, b), lambda context, builder, sig, args: builder.and_(*args)


@intrinsic
def shortened(typing, v, compensated):
    """Rounded to float32, unless sums keep what rounding takes from them."""
    if compensated != types.none:
        return v(v, compensated), lambda context, builder, sig, args: args[0]

    def codegen(context, builder, sig, args):
        return builder.fpext(builder.fptrunc(args[0], FLOAT_LANES.llvm), DOUBLE_LANES.llvm)

    return v(v, compensated), codegen


@intrinsic
def greater(typing, a, b):
    def codegen(context, builder, sig, args):
        return builder.fcmp_ordered(">", *args)

    return MASK(a, b), codegen


@intrinsic
def counted(typing, n, one, two, three, four):
    """In each lane, n and how many of four masks have it; n without masks."""
    if one == types.none:
        return n(n, one, two, three, four), lambda context, builder, sig, args: args[0]

    def codegen(context, builder, sig, args):
        kind = ir.VectorType(I32, LANES)
        total = reduce(builder.add, (builder.sext(mask, kind) for mask in args[1:]))  # of lanes that are -1 or 0
        return builder.fsub(args[0], builder.sitofp(total, n.llvm))

    return n(n, one, two, three, four), codegen


@intrinsic
def choose(typing, mask, a, b):
    """The lanes of a that the mask has, else those of b."""
    if mask == types.none:
        return a(mask, a, b), lambda context, builder, sig, args: args[1]
    return a(mask, a, b), lambda context, builder, sig, args: builder.select(*args)


# --- lanes ------------------------------------------------------------------------------------------------------------


@intrinsic
def hidden(typing, number):
    """The number, of which LLVM knows nothing."""

    def codegen(context, builder, sig, args):
        kind = ir.FunctionType(I64, [I64])
        bits = builder.asm(kind, "", "=r,0", [builder.bitcast(args[0], I64)], side_effect=False)
        return builder.bitcast(bits, DOUBLE)

    return types.float64(types.float64), codegen


@intrinsic
def everywhere(typing, number):
    """A float64 in every lane."""

    def codegen(context, builder, sig, args):
        single = builder.insert_element(ir.Constant(DOUBLE_LANES.llvm, ir.Undefined), args[0], I32(0))
        return shuffle(builder, single, [0] * LANES)

    return DOUBLE_LANES(types.float64), codegen


@intrinsic
def lane(typing, v, k):
    def codegen(context, builder, sig, args):
        return builder.extract_element(args[0], builder.trunc(args[1], I32))

    return types.float64(v, types.intp), codegen


@intrinsic
def row_sums(typing, table, at):
    """Of eight vectors behind each other: the sum over the lanes of each."""

    def codegen(context, builder, sig, args):
        kind = ir.VectorType(I32, LANES)
        places = (builder.gep(args[0], [builder.add(args[1], I64(k * LANES))]) for k in range(LANES))
        vectors = [builder.load(builder.bitcast(p, DOUBLE_LANES.llvm.as_pointer()), align=8) for p in places]
        while len(vectors) > 1:  # lanes of pairs are halved, and put side by side
            halves = []
            for one, other in zip(vectors[::2], vectors[1::2], strict=True):
                index = [
                    [2 * i + odd for i in range(LANES // 2)] + [LANES + 2 * i + odd for i in range(LANES // 2)]
                    for odd in (0, 1)
                ]
                halves.append(builder.fadd(*(builder.shuffle_vector(one, other, ir.Constant(kind, i)) for i in index)))
            vectors = halves
        return vectors[0]

    return DOUBLE_LANES(table, types.intp), codegen


def _nothing(*arguments):
    """The intrinsic of an absent array that is written."""
    return types.none(*arguments), lambda context, builder, sig, args: context.get_dummy_value()


@intrinsic
def put_values(typing, array, at, v, n):
    """Write the first n lanes side by side, or all if it is None, in the array's dtype."""
    if array == types.none:
        return _nothing(array, types.intp, v, n)
    few = n != types.none

    def codegen(context, builder, sig, args):
        v = args[2] if array.dtype == types.float64 else builder.fptrunc(args[2], FLOAT_LANES.llvm)
        v = encode(builder, v, array.dtype, FLOAT_LANES)
        pointer = pointer_to(builder, array, args[0], args[1], LANES)
        if few:
            mask = lanes_below(builder, args[3], LANES)
            kind = ir.FunctionType(ir.VoidType(), [v.type, pointer.type, I32, mask.type])
            builder.call(masked(builder, "store", kind, v.type), [v, pointer, I32(size_of(array)), mask])
        else:
            builder.store(v, pointer, align=size_of(array))
        return context.get_dummy_value()

    return types.none(array, types.intp, v, types.intp if few else n), codegen


@intrinsic
def array_at(typing, address, like):
    """An array at an address, of the dtype of another."""
    return like(address, like), lambda context, builder, sig, args: builder.inttoptr(args[0], args[1].type)


@intrinsic
def repeat_value(typing, array, at, out, to):
    """Write a value eight times, side by side, into another array of its dtype."""

    def codegen(context, builder, sig, args):
        single = builder.load(pointer_to(builder, array, args[0], args[1], 1), align=size_of(array))
        pointer = pointer_to(builder, out, args[2], args[3], LANES)
        builder.store(shuffle(builder, single, [0] * LANES), pointer, align=size_of(array))
        return context.get_dummy_value()

    return types.none(array, types.intp, out, types.intp), codegen


@intrinsic(prefer_literal=True)
def repeat_values(typing, array, at, out, to, times):
    """Write each of eight values so often, side by side, into another array of its dtype."""

    def codegen(context, builder, sig, args):
        stored = builder.load(pointer_to(builder, array, args[0], args[1], LANES), align=size_of(array))
        pointer = pointer_to(builder, out, args[2], args[3], LANES * times.literal_value)
        each = [lane for lane in range(LANES) for _ in range(times.literal_value)]
        builder.store(shuffle(builder, stored, each), pointer, align=size_of(array))
        return context.get_dummy_value()

    return types.none(array, types.intp, out, types.intp, times), codegen


@intrinsic
def put_value(typing, array, at, number):
    """Write one value, in the array's dtype."""
    if array == types.none:
        return types.none(
            array, types.intp, types.float64
        ), lambda context, builder, sig, args: context.get_dummy_value()

    def codegen(context, builder, sig, args):
        one = Vector(types.float32, 1)
        kind = ir.VectorType(DOUBLE if array.dtype == types.float64 else FLOAT, 1)
        number = args[2] if array.dtype == types.float64 else builder.fptrunc(args[2], FLOAT)
        single = builder.insert_element(ir.Constant(kind, ir.Undefined), number, I32(0))
        pointer = pointer_to(builder, array, args[0], args[1], 1)
        builder.store(encode(builder, single, array.dtype, one), pointer, align=size_of(array))
        return context.get_dummy_value()

    return types.none(array, types.intp, types.float64), codegen
