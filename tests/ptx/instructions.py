"""Each instruction of arithmetic and of registers as a line of Python on NumPy arrays, one number for each thread.

A function has the name of an opcode, and takes the rest of the instruction's name in parts. What it does not know it
refuses: modifiers have a meaning, and a kernel that needs another one is not what was tested.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from tests.ptx.text import Instruction
from tests.ptx.values import Values, numpy_of, size_of

Emit = Callable[[Values, Instruction, list[str]], list[str]]

INTEGERS = ("u16", "s16", "u32", "s32", "u64", "s64")
BITS = ("b16", "b32", "b64")
ROUNDINGS = ("rn", "rz", "rm", "rp")


def unsigned(kind: str) -> str:
    return "u" + kind[1:]


def _float_parts(i: Instruction, parts: list[str]) -> tuple[str, bool, str]:
    """Rounding, ftz and type of an instruction on floats."""
    rounding = parts.pop(0) if parts[0] in ROUNDINGS else "rn"
    flush = parts[0] == "ftz" and bool(parts.pop(0))
    if parts not in (["f32"], ["f64"]) or (flush and parts == ["f64"]):
        raise i.unknown()
    return rounding, flush, parts[0]


def _floats(v: Values, i: Instruction, kind: str, flush: bool) -> list[str]:
    if kind == "f32":
        return [v.float32(i, operand, flush) for operand in i.operands[1:]]
    return [v.read(i, operand, kind) for operand in i.operands[1:]]


def _float_result(v: Values, i: Instruction, kind: str, flush: bool, value: str) -> list[str]:
    return [v.keep(i, i.operands[0], kind, f"ftz({value})" if flush else value)]


def _expect(i: Instruction, operands: int, *conditions: bool) -> None:
    if len(i.operands) != operands or not all(conditions):
        raise i.unknown()


# --- sums and products ------------------------------------------------------------------------------------------------


def _arithmetic(sign: str, of_floats: str) -> Emit:
    def emit(v: Values, i: Instruction, parts: list[str]) -> list[str]:
        if len(parts) == 1 and parts[0] in INTEGERS and sign in "+-":
            _expect(i, 3)
            a, b = (v.read(i, operand, unsigned(parts[0])) for operand in i.operands[1:])
            return [v.keep(i, i.operands[0], unsigned(parts[0]), f"{a} {sign} {b}")]
        _expect(i, 3)
        rounding, flush, kind = _float_parts(i, parts)
        a, b = _floats(v, i, kind, flush)
        if rounding == "rn":
            return _float_result(v, i, kind, flush, f"{a} {sign} {b}")
        if sign == "-":
            b = f"-({b})"
        return _float_result(v, i, kind, flush, f"{of_floats}{kind[1:]}({a}, {b}, '{rounding}')")

    return emit


def mul(v: Values, i: Instruction, parts: list[str]) -> list[str]:
    if parts[0] not in ("lo", "hi", "wide"):
        return _arithmetic("*", "mul")(v, i, parts)
    _expect(i, 3, len(parts) == 2, parts[-1] in INTEGERS)
    how, kind = parts
    if how == "lo":
        a, b = (v.read(i, operand, unsigned(kind)) for operand in i.operands[1:])
        return [v.keep(i, i.operands[0], unsigned(kind), f"{a} * {b}")]
    _expect(i, 3, size_of(kind) < 8)
    wide = f"{kind[0]}{16 * size_of(kind)}"
    a, b = (v.read(i, operand, kind) for operand in i.operands[1:])
    product = f"{a}.astype({numpy_of(wide)}) * {b}.astype({numpy_of(wide)})"
    if how == "wide":
        return [v.keep(i, i.operands[0], wide, product)]
    high = f"(({product}) >> {numpy_of(wide)}({8 * size_of(kind)})).astype({numpy_of(kind)})"
    return [v.keep(i, i.operands[0], kind, high)]


def mad(v: Values, i: Instruction, parts: list[str]) -> list[str]:
    _expect(i, 4, len(parts) == 2, parts[0] == "lo", parts[-1] in INTEGERS)
    a, b, c = (v.read(i, operand, unsigned(parts[1])) for operand in i.operands[1:])
    return [v.keep(i, i.operands[0], unsigned(parts[1]), f"{a} * {b} + {c}")]


def fma(v: Values, i: Instruction, parts: list[str]) -> list[str]:
    _expect(i, 4, parts[0] in ROUNDINGS)
    rounding, flush, kind = _float_parts(i, parts)
    a, b, c = _floats(v, i, kind, flush)
    more = "" if rounding == "rn" else f", '{rounding}'"
    return _float_result(v, i, kind, flush, f"fma{kind[1:]}({a}, {b}, {c}{more})")


def _division(function: str) -> Emit:
    def emit(v: Values, i: Instruction, parts: list[str]) -> list[str]:
        if function == "divided" and parts == ["rn", "f64"]:
            _expect(i, 3)
            a, b = _floats(v, i, "f64", False)
            return [v.keep(i, i.operands[0], "f64", f"{a} / {b}")]
        _expect(i, 3, len(parts) == 1, parts[0] in INTEGERS)
        a, b = (v.read(i, operand, parts[0]) for operand in i.operands[1:])
        return [v.keep(i, i.operands[0], parts[0], f"X.{function}({a}, {b}, idx, {i.line})")]

    return emit


def _dot(count: int) -> Emit:
    """Sums of so many products: of a's parts by b's bytes, the lower or the upper ones where b has more."""

    def emit(v: Values, i: Instruction, parts: list[str]) -> list[str]:
        first = 2 if count == 2 and parts[0] == "hi" else 0
        kinds = parts if count == 4 else parts[1:]
        _expect(i, 4, len(kinds) == 2, {*kinds} <= {"s32", "u32"}, count == 4 or parts[0] in ("lo", "hi"))
        a, b, c = (v.read(i, operand, "u32") for operand in i.operands[1:])
        bits = 32 // count
        terms = []
        for k in range(count):
            x = f"({a} >> U4({k * bits})).astype({kinds[0][0].upper().replace('S', 'I')}{bits // 8}).astype(I4)"
            y = f"({b} >> U4({(first + k) * 8})).astype({kinds[1][0].upper().replace('S', 'I')}1).astype(I4)"
            terms.append(f"{x} * {y}")
        return [v.keep(i, i.operands[0], "s32", f"{c}.view(I4) + {' + '.join(terms)}")]

    return emit


# --- one number -------------------------------------------------------------------------------------------------------


def _sign(form: str) -> Emit:
    def emit(v: Values, i: Instruction, parts: list[str]) -> list[str]:
        _expect(i, 2)
        if len(parts) == 1 and parts[0] in ("s16", "s32", "s64"):
            return [v.keep(i, i.operands[0], parts[0], form.format(v.read(i, i.operands[1], parts[0])))]
        rounding, flush, kind = _float_parts(i, parts)
        _expect(i, 2, rounding == "rn")
        (a,) = _floats(v, i, kind, flush)
        return [v.keep(i, i.operands[0], kind, form.format(a))]

    return emit


def rcp(v: Values, i: Instruction, parts: list[str]) -> list[str]:
    _expect(i, 2, parts in (["approx", "ftz", "f32"], ["approx", "f32"], ["approx", "ftz", "f64"]))
    if parts[-1] == "f64":
        return [v.keep(i, i.operands[0], "f64", f"reciprocal64({v.read(i, i.operands[1], 'f64')})")]
    value = f"reciprocal32({v.read(i, i.operands[1], 'f32')}, {'ftz' in parts})"
    return [v.keep(i, i.operands[0], "f32", value)]


def rsqrt(v: Values, i: Instruction, parts: list[str]) -> list[str]:
    _expect(i, 2, parts == ["approx", "ftz", "f64"])
    return [v.keep(i, i.operands[0], "f64", f"reciprocal_sqrt64({v.read(i, i.operands[1], 'f64')})")]


def _extreme(of_floats: str, of_integers: str) -> Emit:
    def emit(v: Values, i: Instruction, parts: list[str]) -> list[str]:
        flush, kind = parts == ["ftz", "f32"], parts[-1]
        _expect(i, 3, flush or len(parts) == 1, kind in (*INTEGERS, "f32", "f64"))
        if kind[0] == "f":
            a, b = _floats(v, i, kind, flush)
            return [v.keep(i, i.operands[0], kind, f"{of_floats}({a}, {b})")]
        a, b = (v.read(i, operand, kind) for operand in i.operands[1:])
        return [v.keep(i, i.operands[0], kind, f"{of_integers}({a}, {b})")]

    return emit


# --- bits -------------------------------------------------------------------------------------------------------------


def _logic(sign: str) -> Emit:
    def emit(v: Values, i: Instruction, parts: list[str]) -> list[str]:
        _expect(i, 3, len(parts) == 1, parts[0] in (*BITS, "pred"))
        a, b = (v.read(i, operand, parts[0]) for operand in i.operands[1:])
        return [v.keep(i, i.operands[0], parts[0], f"{a} {sign} {b}")]

    return emit


def invert(v: Values, i: Instruction, parts: list[str]) -> list[str]:
    _expect(i, 2, len(parts) == 1, parts[0] in (*BITS, "pred"))
    return [v.keep(i, i.operands[0], parts[0], f"~{v.read(i, i.operands[1], parts[0])}")]


def _shift(sign: str) -> Emit:
    def emit(v: Values, i: Instruction, parts: list[str]) -> list[str]:
        _expect(i, 3, len(parts) == 1, parts[0] in (BITS if sign == "<<" else INTEGERS))
        kind = parts[0]
        a, bits, numpy = v.read(i, i.operands[1], kind), 8 * size_of(kind), numpy_of(kind)
        if (by := v.known(i.operands[2])) is not None:
            amount = min(by & 0xFFFFFFFF, bits)
            if amount < bits:
                value = f"{a} {sign} {numpy}({amount})"
            else:
                value = f"{a} >> {numpy}({bits - 1})" if kind[0] == "s" else f"zeros(n, {numpy})"
            return [v.keep(i, i.operands[0], kind, value)]
        b = v.read(i, i.operands[2], "u32")
        return [v.keep(i, i.operands[0], kind, f"shifted({a}, {b}, {sign == '<<'})")]

    return emit


def bfind(v: Values, i: Instruction, parts: list[str]) -> list[str]:
    _expect(i, 2, parts == ["shiftamt", "u32"])
    return [v.keep(i, i.operands[0], "u32", f"leading_zeros({v.read(i, i.operands[1], 'u32')})")]


def brev(v: Values, i: Instruction, parts: list[str]) -> list[str]:
    _expect(i, 2, parts == ["b32"])
    return [v.keep(i, i.operands[0], "b32", f"reversed_bits({v.read(i, i.operands[1], 'b32')})")]


def bfi(v: Values, i: Instruction, parts: list[str]) -> list[str]:
    _expect(i, 5, parts == ["b32"])
    start, length = (v.known(operand) for operand in i.operands[3:])
    if start is None or length is None or not (0 <= start < 32 and 0 < length <= 32 - start):
        raise i.unknown("bits are inserted at constant places alone")
    a, b = (v.read(i, operand, "b32") for operand in i.operands[1:3])
    mask = ((1 << length) - 1) << start
    return [
        v.keep(i, i.operands[0], "b32", f"({b} & U4({mask ^ 0xFFFFFFFF})) | (({a} << U4({start})) & U4({mask}))"),
    ]


def prmt(v: Values, i: Instruction, parts: list[str]) -> list[str]:
    """Bytes of two registers, each chosen by four bits, the highest of which fills the byte with its sign."""
    _expect(i, 4, parts == ["b32"])
    select = v.known(i.operands[3])
    if select is None:
        raise i.unknown("bytes are permuted by constants alone")
    a, b = (v.read(i, operand, "b32") for operand in i.operands[1:3])
    terms = []
    for k in range(4):
        nibble = select >> 4 * k & 15
        byte = f"({(a, b)[nibble >> 2 & 1]} >> U4({nibble % 4 * 8}) & U4(255))"
        byte = f"(({byte} >> U4(7)) * U4(255))" if nibble & 8 else byte
        terms.append(f"({byte} << U4({8 * k}))")
    return [v.keep(i, i.operands[0], "b32", " | ".join(terms))]


# --- choices ----------------------------------------------------------------------------------------------------------

ORDERED = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
UNORDERED = {"equ": "!=", "neu": "==", "ltu": ">=", "leu": ">", "gtu": "<=", "geu": "<"}  # not, with NaN true


def setp(v: Values, i: Instruction, parts: list[str]) -> list[str]:
    _expect(i, 3, len(parts) >= 2)
    compare, kind = parts[0], parts[-1]
    if kind in ("f32", "f64"):
        flush = parts[1:-1] == ["ftz"]
        _expect(i, 3, flush or parts[1:-1] == [], not flush or kind == "f32")
        a, b = _floats(v, i, kind, flush)
        if compare == "ne":  # ordered
            value = f"({a} < {b}) | ({a} > {b})"
        elif compare in ORDERED:
            value = f"{a} {ORDERED[compare]} {b}"
        elif compare in UNORDERED:
            value = f"~({a} {UNORDERED[compare]} {b})"
            if compare in ("equ", "neu"):
                value = f"~(({a} < {b}) | ({a} > {b}))" if compare == "equ" else f"{a} != {b}"
        elif compare in ("num", "nan"):
            value = f"isnan({a}) | isnan({b})"
            value = f"~({value})" if compare == "num" else value
        else:
            raise i.unknown()
        return [v.keep(i, i.operands[0], "pred", value)]
    _expect(i, 3, len(parts) == 2, kind in (*INTEGERS, *BITS), compare in ORDERED)
    _expect(i, 3, kind[0] != "b" or compare in ("eq", "ne"))
    a, b = (v.read(i, operand, kind) for operand in i.operands[1:])
    return [v.keep(i, i.operands[0], "pred", f"{a} {ORDERED[compare]} {b}")]


def selp(v: Values, i: Instruction, parts: list[str]) -> list[str]:
    _expect(i, 4, len(parts) == 1, parts[0] in (*INTEGERS, *BITS, "f32", "f64"))
    a, b = (v.read(i, operand, parts[0]) for operand in i.operands[1:3])
    return [v.keep(i, i.operands[0], parts[0], f"where({v.read(i, i.operands[3], 'pred')}, {a}, {b})")]


def mov(v: Values, i: Instruction, parts: list[str]) -> list[str]:
    _expect(i, 2, len(parts) == 1, parts[0] in (*INTEGERS, *BITS, "f32", "f64", "pred"))
    kind, (to, source) = parts[0], i.operands
    if isinstance(to, tuple):
        _expect(i, 2, kind in ("b32", "b64"), len(to) == 2)
        part = f"b{4 * size_of(kind)}"
        whole = v.read(i, source, kind)
        halves = (f"({whole})", f"({whole} >> {numpy_of(kind)}({4 * size_of(kind)}))")
        return [v.keep(i, r, part, f"{h}.astype({numpy_of(part)})") for r, h in zip(to, halves, strict=True)]
    if isinstance(source, tuple):
        _expect(i, 2, kind in ("b32", "b64"), len(source) == 2)
        low, high = (v.read(i, r, f"b{4 * size_of(kind)}") for r in source)
        numpy = numpy_of(kind)
        whole = f"{low}.astype({numpy}) | ({high}.astype({numpy}) << {numpy}({4 * size_of(kind)}))"
        return [v.keep(i, to, kind, whole)]
    value = v.read(i, source, kind)
    if not str(source).startswith("%"):
        value = f"full(n, {value})"
    return [v.keep(i, to, kind, value)]


# --- conversions ------------------------------------------------------------------------------------------------------


def cvt(v: Values, i: Instruction, parts: list[str]) -> list[str]:
    _expect(i, 2, len(parts) >= 2)
    *how, to, source = parts
    whole = [kind for kind in (to, source) if re.fullmatch(r"[us](8|16|32|64)", kind)]
    operand, result = i.operands[1], i.operands[0]
    if len(whole) == 2:
        _expect(i, 2, how == [])
        value = v.read(i, operand, source, wide=True)
        extended = numpy_of(f"{source[0]}{to[1:]}")
        return [v.keep(i, result, to, f"{value}.astype({extended}).view({numpy_of(to)})", wide=True)]
    if (to, source) == ("f32", "f16"):
        _expect(i, 2, how == [])
        return [v.keep(i, result, "f32", f"from_half({v.read(i, operand, 'b16')})")]
    if (to, source) == ("f64", "f32"):
        _expect(i, 2, how in ([], ["ftz"]))
        return [v.keep(i, result, "f64", f"{v.float32(i, operand, how == ['ftz'])}.astype(F8)")]
    if (to, source) == ("f32", "f64"):
        _expect(i, 2, how[:1] != [] and how[0] in ROUNDINGS, how[1:] in ([], ["ftz"]))
        value = f"narrowed({v.read(i, operand, 'f64')}, '{how[0]}')"
        return _float_result(v, i, "f32", "ftz" in how, value)
    if source == "f32" and to in ("f16", "bf16"):
        _expect(i, 2, how in (["rn"], ["rz"]))
        function = "to_half" if to == "f16" else "to_bfloat16"
        return [v.keep(i, result, "b16", f"{function}({v.float32(i, operand, False)}, '{how[0]}')")]
    if to in ("f32", "f64") and whole == [source]:
        _expect(i, 2, how == ["rn"])
        return [v.keep(i, result, to, f"{v.read(i, operand, source)}.astype({numpy_of(to)})")]
    if source in ("f32", "f64") and whole == [to]:
        _expect(i, 2, len(how) == 1, how[0] in ("rzi", "rni", "rmi", "rpi"))
        return [v.keep(i, result, to, f"integers({v.read(i, operand, source)}, {numpy_of(to)}, '{how[0]}')")]
    raise i.unknown()


def cvta(v: Values, i: Instruction, parts: list[str]) -> list[str]:
    _expect(i, 2, parts == ["to", "global", "u64"])
    return [v.keep(i, i.operands[0], "u64", v.read(i, i.operands[1], "u64"))]


EMIT: dict[str, Emit] = {
    "add": _arithmetic("+", "add"), "sub": _arithmetic("-", "add"), "mul": mul, "mad": mad, "fma": fma,
    "div": _division("divided"), "rem": _division("remainder"), "rcp": rcp, "rsqrt": rsqrt,
    "dp4a": _dot(4), "dp2a": _dot(2),
    "abs": _sign("abs({})"), "neg": _sign("-({})"),
    "min": _extreme("smallest", "minimum"), "max": _extreme("largest", "maximum"),
    "and": _logic("&"), "or": _logic("|"), "xor": _logic("^"), "not": invert,
    "shl": _shift("<<"), "shr": _shift(">>"), "bfind": bfind, "brev": brev, "bfi": bfi, "prmt": prmt,
    "setp": setp, "selp": selp, "mov": mov, "cvt": cvt, "cvta": cvta,
}  # fmt: skip
