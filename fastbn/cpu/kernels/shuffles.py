"""Eight values that lie apart, from whole vectors that are shuffled: what `statistics` reads of short rows and steps.

In plain words::

    values_apart(x, at, step) = x[at : at + 8 * step : step]
    transposed(x, at, step, count) = x[[[at + row * step + k for row in range(8)] for k in range(count)]]

Rows of ten take 0.55 of the time that they take with a load for each value.
"""

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from fastbn.cpu.kernels.doubles import DOUBLE_LANES, LANES, as_lanes, lanes_to_test, widened
from fastbn.cpu.kernels.llvm import I32, I64, pointer_to, shuffle, size_of


@intrinsic(prefer_literal=True)
def values_apart(typing, array, at, step):
    """Eight values from ``at`` on, a literal step apart; read are eight steps, to the end of the last one."""
    count = LANES * step.literal_value

    def codegen(context, builder, sig, args):
        stored = builder.load(pointer_to(builder, array, args[0], args[1], count), align=size_of(array))
        return widened(builder, shuffle(builder, stored, range(0, count, step.literal_value)), array.dtype)

    return DOUBLE_LANES(array, types.intp, step), codegen


@intrinsic(prefer_literal=True)
def transposed(typing, array, at, step, count, skip_nan):
    """Of eight rows, a step apart: `count` values (2, 4 or 8) that lie side by side in each, as so many vectors of
    eight rows' values, each as `values_to_test` has them.
    """
    v, columns = lanes_to_test(array, skip_nan), count.literal_value

    def codegen(context, builder, sig, args):
        array_, at, step = args[:3]
        rows = []
        for k in range(LANES):
            place = builder.add(at, builder.mul(step, I64(k)))
            rows.append(builder.load(pointer_to(builder, array, array_, place, columns), align=size_of(array)))
        found = [as_lanes(builder, column, array.dtype, v) for column in _columns(builder, rows, columns)]
        return context.make_tuple(builder, sig.return_type, found)

    return types.UniTuple(v, columns)(array, types.intp, types.intp, count, skip_nan), codegen


def _columns(builder, rows, columns):
    """The columns of eight rows. Blocks of some of both have 16 elements, as many as a register of float32."""

    def two(one, other, lanes):
        return builder.shuffle_vector(one, other, ir.Constant(ir.VectorType(I32, len(lanes)), lanes))

    blocks, height, width = rows, 1, columns
    while height * width < 16:
        blocks = [two(a, b, list(range(2 * height * width))) for a, b in zip(blocks[::2], blocks[1::2], strict=True)]
        height *= 2
    groups = [[block] for block in blocks]  # of rows; each has blocks of neighbouring columns
    while height < LANES:  # twice as many rows, half as many columns
        half = width // 2
        index = [
            [r // height * 16 + r % height * width + side + c for r in range(2 * height) for c in range(half)]
            for side in (0, half)
        ]
        groups = [
            [two(a, b, lanes) for a, b in zip(above, below, strict=True) for lanes in index]
            for above, below in zip(groups[::2], groups[1::2], strict=True)
        ]
        height, width = 2 * height, half
    return [shuffle(builder, block, range(c, 16, 2)) for block in groups[0] for c in range(2)]
