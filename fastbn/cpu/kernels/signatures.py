"""What a signature has of arrays (`fastbn.call`), and whether they share memory; where to look says `cpu.objects`."""

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from fastbn.cpu.kernels.calls import invoke, reserve
from fastbn.cpu.kernels.compiler import inline, plain
from fastbn.cpu.kernels.team import load, store
from fastbn.cpu.objects import (
    ALIGNED,
    DATA_AT,
    DIMENSIONS_AT,
    DTYPE_AT,
    FLAGS_AT,
    NUMBER_AT,
    SCALAR_AT,
    SHAPE_AT,
    STRIDES_AT,
    TYPE_AT,
    WRITABLE,
)
from fastbn.cpu.program_words import ARRAY_TYPE, FALSE_AT, INCREASE, NEW_BYTES, NONE_AT, TRUE_AT

I64 = ir.IntType(64)
MOST_WORDS = 256  # words
LARGEST_ELEMENT = 16  # bytes of an element, of which only the address is asked for
OF_EACH = 3  # words of an array beside sizes and strides


@intrinsic
def new_bytes(typing, function, start, count):
    """Call the interpreter's function for so many bytes."""

    def codegen(context, builder, signature, values):
        pointer = builder.inttoptr(values[0], ir.FunctionType(I64, [I64, I64]).as_pointer())
        return builder.call(pointer, values[1:])

    return types.int64(types.int64, types.int64, types.int64), codegen


@inline
def describe_array(a, at, end):
    """Its dtype, dimensions, alignment, whether it may be written; sizes and strides. Where that ends; 0: no room."""
    dtype, dimensions = load(a + DTYPE_AT), load(a + DIMENSIONS_AT) & 0xFFFFFFFF
    if at + 8 * OF_EACH + 16 * dimensions > end:
        return 0
    store(at, load(dtype + SCALAR_AT))
    store(at + 8, load(dtype + NUMBER_AT))
    store(at + 16, dimensions << 32 | load(a + FLAGS_AT) & (ALIGNED | WRITABLE))
    at += 8 * OF_EACH
    shape, strides = load(a + SHAPE_AT), load(a + STRIDES_AT)
    for axis in range(dimensions):
        store(at + 16 * axis, load(shape + 8 * axis))
        store(at + 16 * axis + 8, load(strides + 8 * axis))
    return at + 16 * dimensions


@plain
def describe(me, args, count):
    """``PyObject *describe(PyObject *self, PyObject *const *args, Py_ssize_t nargs)``: bytes, or None."""
    words, start = load(me + DATA_AT), reserve(MOST_WORDS)
    array_type, none, at = load(words + ARRAY_TYPE), load(words + NONE_AT), start
    for i in range(count):
        a = load(args + 8 * i)
        if a == none and at < start + 8 * MOST_WORDS:
            store(at, 0)
            at += 8
        elif load(a + TYPE_AT) == array_type:
            at = describe_array(a, at, start + 8 * MOST_WORDS)
        else:
            at = 0
        if at == 0:
            invoke(load(words + INCREASE), none)
            return none
    return new_bytes(load(words + NEW_BYTES), start, at - start)


@inline
def extent(a):
    """The addresses of an array's first byte in memory, and of one behind its last."""
    low = high = load(a + DATA_AT)
    shape, strides = load(a + SHAPE_AT), load(a + STRIDES_AT)
    for axis in range(load(a + DIMENSIONS_AT) & 0xFFFFFFFF):
        reach = (load(shape + 8 * axis) - 1) * load(strides + 8 * axis)
        low, high = low + min(reach, 0), high + max(reach, 0)
    return low, high + LARGEST_ELEMENT


@plain
def disjoint(me, args, count):
    """``PyObject *disjoint(PyObject *self, PyObject *const *args, Py_ssize_t nargs)``: True or False."""
    words = load(me + DATA_AT)
    array_type, none, out = load(words + ARRAY_TYPE), load(words + NONE_AT), load(args)
    result = load(words + TRUE_AT)
    if load(out + TYPE_AT) != array_type:
        result = load(words + FALSE_AT)
    else:
        low, high = extent(out)
        for i in range(1, count):
            a = load(args + 8 * i)
            if a == none or a == out:  # noqa: SIM109  # `in` would make a tuple
                continue
            if load(a + TYPE_AT) != array_type:
                result = load(words + FALSE_AT)
                break
            first, end = extent(a)
            if first < high and low < end:
                result = load(words + FALSE_AT)
                break
    invoke(load(words + INCREASE), result)
    return result
