"""The processor's sticky underflow flag: whether any of many operations lost what was too small for its type.

IEEE 754 (section 7) has every operation that loses digits to underflow raise a flag that stays up. Kernels lower it,
sum squares at full speed, and look at it once a segment: so a sum of squares of 1e-46 is never taken for that of a
constant, and no element is tested (Demmel & Li, "Faster numerical algorithms via exception handling", IEEE
Transactions on Computers 43, 1994). Where a processor's flag is not known it counts as up, which is right and slower.
"""

from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

binding.initialize_native_asmparser()  # which Numba, that has no assembly of its own, leaves out

_I32, _I64 = ir.IntType(32), ir.IntType(64)
_MXCSR_UNDERFLOW, _FPSR_UNDERFLOW = 1 << 4, 1 << 3


def _processor(builder):
    return builder.module.triple.partition("-")[0]


def _assembly(builder, result, text, constraints, *operands):
    """Inline assembly that memory accesses do not move across."""
    kind = ir.FunctionType(result, [operand.type for operand in operands])
    return builder.asm(kind, text, constraints, operands, side_effect=True)


@intrinsic
def lower_underflow_flag(typing):
    """Before the operations that `underflowed` is asked about."""

    def codegen(context, builder, sig, args):
        processor = _processor(builder)
        if processor == "x86_64":
            word = cgutils.alloca_once(builder, _I32)
            _assembly(builder, ir.VoidType(), "stmxcsr ($0)", "r,~{memory}", word)
            status = builder.and_(builder.load(word), _I32(~_MXCSR_UNDERFLOW))
            builder.store(status, word)
            _assembly(builder, ir.VoidType(), "ldmxcsr ($0)", "r,~{memory}", word)
        elif processor == "aarch64":
            status = _assembly(builder, _I64, "mrs $0, fpsr", "=r,~{memory}")
            status = builder.and_(status, _I64(~_FPSR_UNDERFLOW))
            _assembly(builder, ir.VoidType(), "msr fpsr, $0", "r,~{memory}", status)
        return context.get_dummy_value()

    return types.none(), codegen


@intrinsic
def underflowed(typing, number):
    """Whether an operation has raised the flag since; ``number``, the last one's result, is waited for."""

    def codegen(context, builder, sig, args):
        processor = _processor(builder)
        if processor == "x86_64":
            word = cgutils.alloca_once(builder, _I32)
            _assembly(builder, ir.VoidType(), "stmxcsr ($0)", "r,x,~{memory}", word, args[0])
            status, flag = builder.load(word), _I32(_MXCSR_UNDERFLOW)
        elif processor == "aarch64":
            status, flag = _assembly(builder, _I64, "mrs $0, fpsr", "=r,w,~{memory}", args[0]), _I64(_FPSR_UNDERFLOW)
        else:
            return ir.Constant(ir.IntType(1), 1)
        return builder.icmp_unsigned("!=", builder.and_(status, flag), ir.Constant(status.type, 0))

    return types.boolean(types.float64), codegen
