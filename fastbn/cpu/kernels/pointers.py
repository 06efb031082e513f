"""Arrays, which are pointers to values, and tables of numbers: what kernels do with them beside vectors (`simd`)."""

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from fastbn.cpu.kernels.llvm import DOUBLE, I32, I64, decode, pointer_to, size_of
from fastbn.cpu.kernels.simd import Vector, absent


@intrinsic
def advance(typing, array, count):
    """The same array from an element on."""
    if array == types.none:
        return absent(types.none, array, types.intp)

    def codegen(context, builder, sig, args):
        return builder.gep(args[0], [args[1]])

    return array(array, types.intp), codegen


@intrinsic
def address(typing, array, at):
    """The address of an element in bytes."""

    def codegen(context, builder, sig, args):
        return builder.ptrtoint(pointer_to(builder, array, args[0], args[1], 1), I64)

    return types.intp(array, types.intp), codegen


@intrinsic
def value(typing, array, at):
    """One value as float64."""
    if array == types.none:
        return absent(types.none, array, types.intp)
    v = Vector(types.float64 if array.dtype == types.float64 else types.float32, 1)

    def codegen(context, builder, sig, args):
        pointer = pointer_to(builder, array, args[0], args[1], 1)
        single = decode(builder, builder.load(pointer, align=size_of(array)), array.dtype, v)
        single = builder.extract_element(single, I32(0))
        return single if v.scalar == types.float64 else builder.fpext(single, DOUBLE)

    return types.float64(array, types.intp), codegen


@intrinsic
def present(typing, record):
    """An array with strides, or rows; None if they are absent."""
    if record[0] == types.none:
        return absent(types.none, record)
    return record(record), lambda context, builder, sig, args: args[0]


@intrinsic
def table_rows(typing, record, table, pitch):
    """A table as a record of `records`: its fields are pointers to rows that are a pitch apart."""
    rows = types.NamedUniTuple(table, len(record.instance_class._fields), record.instance_class)

    def codegen(context, builder, sig, args):
        starts = (builder.mul(args[2], ir.Constant(I64, row)) for row in range(len(rows)))
        return context.make_tuple(builder, rows, [builder.gep(args[1], [start]) for start in starts])

    return rows(record, table, types.intp), codegen
