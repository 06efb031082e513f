"""Conversions of float16, for x86 processors without instructions for them: all but those of before 2012, and some
virtual ones. LLVM calls these functions there, by their names in compilers' libraries. They work on bits as whole
numbers and give what the instructions do: rounding to nearest-even, subnormal numbers and NaNs included.
"""

from __future__ import annotations

from typing import Any

import llvmlite.binding as llvm

_CODE = """
define float @extend(half %given) {
  %bits = bitcast half %given to i16
  %word = zext i16 %bits to i32
  %sign = and i32 %word, 32768
  %size = and i32 %word, 32767
  %moved = shl i32 %size, 13
  %normal = add i32 %moved, 939524096           ; the difference of biases, 127 - 15
  %infinite = or i32 %moved, 2139095040
  %is_nan = icmp ugt i32 %size, 31744
  %quiet = select i1 %is_nan, i32 4194304, i32 0
  %special = or i32 %infinite, %quiet
  %count = uitofp i32 %size to float
  %tiny = fmul float %count, 0x3E70000000000000 ; 2^-24, of subnormal numbers
  %tiny_bits = bitcast float %tiny to i32
  %is_special = icmp uge i32 %size, 31744
  %is_tiny = icmp ult i32 %size, 1024
  %finite = select i1 %is_tiny, i32 %tiny_bits, i32 %normal
  %unsigned = select i1 %is_special, i32 %special, i32 %finite
  %high = shl i32 %sign, 16
  %result = or i32 %unsigned, %high
  %number = bitcast i32 %result to float
  ret float %number
}

define half @truncate(float %given) {
  %word = bitcast float %given to i32
  %sign = and i32 %word, -2147483648
  %size = and i32 %word, 2147483647
  %is_nan = icmp ugt i32 %size, 2139095040
  %payload = lshr i32 %size, 13
  %low = and i32 %payload, 1023
  %nan = or i32 %low, 32256
  %special = select i1 %is_nan, i32 %nan, i32 31744
  %positive = bitcast i32 %size to float
  %aligned = fadd float %positive, 5.0e-01      ; whose last bit is worth 2^-24: the addition rounds
  %aligned_bits = bitcast float %aligned to i32
  %tiny = sub i32 %aligned_bits, 1056964608
  %kept = lshr i32 %size, 13
  %odd = and i32 %kept, 1
  %less = add i32 %size, 3355447295             ; the difference of biases, and half of what is cut off less one
  %rounded = add i32 %less, %odd
  %normal = lshr i32 %rounded, 13
  %is_special = icmp uge i32 %size, 1199570944  ; 65536
  %is_tiny = icmp ult i32 %size, 947912704      ; 2^-14
  %finite = select i1 %is_tiny, i32 %tiny, i32 %normal
  %unsigned = select i1 %is_special, i32 %special, i32 %finite
  %high = lshr i32 %sign, 16
  %result = or i32 %unsigned, %high
  %bits = trunc i32 %result to i16
  %number = bitcast i16 %bits to half
  ret half %number
}
"""


def provide(engine: Any) -> None:
    """Let the code that an engine loads find them."""
    module = llvm.parse_assembly(_CODE)
    module.verify()
    engine.add_module(module)
    engine.finalize_object()
    llvm.add_symbol("__extendhfsf2", engine.get_function_address("extend"))
    llvm.add_symbol("__truncsfhf2", engine.get_function_address("truncate"))
