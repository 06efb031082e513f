"""Operands as Python: how registers, constants and parts of registers are read as a type, and how results are kept."""

from __future__ import annotations

import re
import struct

from tests.ptx.text import Address, Entry, Instruction, Operand

PARAMETERS, SHARED = 1 << 20, 1 << 24
"""Where these spaces begin, so that addresses of one are out of bounds in another."""

BYTES = {"8": 1, "16": 2, "32": 4, "64": 8}
SPECIAL = ("tid", "ntid", "ctaid", "nctaid")


def size_of(kind: str) -> int:
    """Bytes of a type such as s32."""
    return BYTES[kind.lstrip("busf")]


def numpy_of(kind: str) -> str:
    """NumPy's type of a PTX type, as generated code names it: I4 of s32."""
    return "BOOL" if kind == "pred" else {"b": "U", "u": "U", "s": "I", "f": "F"}[kind[0]] + str(size_of(kind))


class Values:
    """The registers and names of a kernel, and which registers never hold subnormal float32 numbers."""

    def __init__(self, entry: Entry) -> None:
        self.entry = entry
        self.constants: dict[str, int] = {}
        """Registers of integers that are set once, to a constant."""
        self.flushed: set[str] = set()
        self.pool: dict[str, str] = {}
        """Names of constants in generated code, by what makes them."""
        self.names = {name: PARAMETERS + v.offset for name, v in entry.parameters.items()}
        static = entry.static_shared
        self.names |= {n: SHARED + (static if v.size is None else v.offset) for n, v in entry.shared.items()}
        writes: dict[str, list[Instruction]] = {}
        for instruction in entry.code:
            for register in written(instruction):
                writes.setdefault(register, []).append(instruction)
        for register, by in writes.items():
            if len(by) == 1 and re.fullmatch(r"mov\.[us]\d+", by[0].name) and re.fullmatch(r"-?\d+", str(by[0][4][1])):
                self.constants[register] = int(str(by[0].operands[1]))
        self._find_flushed(writes)

    def _find_flushed(self, writes: dict[str, list[Instruction]]) -> None:
        """Greatest set of float32 registers that only flushing instructions, or copies of such, write."""
        self.flushed = {r for r in writes if self.entry.type_of(r) == "f32"}
        changing = True
        while changing:
            bad = {r for r in self.flushed if not all(map(self._flushes, writes[r]))}
            changing = bool(bad)
            self.flushed -= bad

    def _flushes(self, instruction: Instruction) -> bool:
        name = instruction.name
        if re.fullmatch(r"(add|sub|mul|fma|neg|abs|rcp|cvt)\..*\bftz\.f32(\.f64)?", name) or name == "cvt.f32.f16":
            return True
        if re.fullmatch(r"cvt\.rn\.f32\.[us]\d+", name):
            return True
        sources = {"mov.f32": 1, "selp.f32": 2}.get(name, 0)
        return sources > 0 and all(map(self.is_flushed, instruction.operands[1 : 1 + sources]))

    def is_flushed(self, operand: Operand) -> bool:
        """Whether a float32 operand is no subnormal number."""
        if str(operand).startswith("0f"):
            bits = int(str(operand)[2:], 16)
            return bits & 0x7F800000 != 0 or bits & 0x7FFFFFFF == 0
        return operand in self.flushed

    # --- reading ------------------------------------------------------------------------------------------------------

    def read(self, instruction: Instruction, operand: Operand, kind: str, wide: bool = False) -> str:
        """Python for the value as this type; `wide` where a part of a larger register may be read."""
        if not isinstance(operand, str):
            raise instruction.unknown(f"{operand} is not known here")
        if operand.startswith("%"):
            if special := re.fullmatch(r"%(\w+)\.([xyz])", operand):
                if special[1] not in SPECIAL or kind != "u32":
                    raise instruction.unknown(f"{operand} is not known here")
                return f"X.special('{special[1]}', '{special[2]}', idx)"
            return self._register(instruction, operand, kind, wide)
        return self.constant(instruction, operand, kind)

    def _register(self, instruction: Instruction, operand: str, kind: str, wide: bool) -> str:
        have, name = self.entry.type_of(operand), operand[1:]
        if have is None:
            raise instruction.unknown(f"{operand} is not declared")
        if "pred" in (have, kind):
            if have != kind:
                raise instruction.unknown(f"{operand} is .{have}, not .{kind}")
            return name
        if size_of(have) == size_of(kind):
            return name if numpy_of(have) == numpy_of(kind) else f"{name}.view({numpy_of(kind)})"
        if not wide or size_of(have) < size_of(kind) or "f" in (have[0], kind[0]):
            raise instruction.unknown(f"{operand} is .{have}, not .{kind}")
        part = f"{name}.astype(U{size_of(kind)})"
        return f"{part}.view({numpy_of(kind)})" if kind[0] == "s" else part

    def constant(self, instruction: Instruction, operand: str, kind: str) -> str:
        """The name of a NumPy scalar."""
        return self.pool.setdefault(self._scalar(instruction, operand, kind), f"C{len(self.pool)}")

    def _scalar(self, instruction: Instruction, operand: str, kind: str) -> str:
        if operand in self.names:
            if size_of(kind) != 8 or kind[0] == "f":
                raise instruction.unknown(f"{operand} is an address")
            return f"U8({self.names[operand]})"
        if kind == "pred":
            return f"BOOL({int(operand) != 0})"
        if match := re.fullmatch(r"0([fd])([0-9A-Fa-f]+)", operand):
            if kind[0] != "f" or (match[1], len(match[2])) != {4: ("f", 8), 8: ("d", 16)}[size_of(kind)]:
                raise instruction.unknown(f"{operand} is not .{kind}")
            form = ">f" if match[1] == "f" else ">d"
            (value,) = struct.unpack(form, bytes.fromhex(match[2]))
            return f"{numpy_of(kind)}(float('{value!r}'))"
        if not re.fullmatch(r"-?\d+", operand) or kind[0] == "f":
            raise instruction.unknown(f"{operand} is not known here")
        bits = 8 * size_of(kind)
        value = int(operand) & ((1 << bits) - 1)
        return f"{numpy_of(kind)}({value - (1 << bits) if kind[0] == 's' and value >> (bits - 1) else value})"

    def float32(self, instruction: Instruction, operand: Operand, flush: bool) -> str:
        """A float32 operand, without subnormal numbers if they are to be flushed."""
        value = self.read(instruction, operand, "f32")
        return f"ftz({value})" if flush and not self.is_flushed(operand) else value

    def known(self, operand: Operand) -> int | None:
        """The value of an integer constant or of a register that holds one."""
        if operand in self.constants:
            return self.constants[str(operand)]
        return int(operand) if isinstance(operand, str) and re.fullmatch(r"-?\d+", operand) else None

    # --- results ------------------------------------------------------------------------------------------------------

    def keep(self, instruction: Instruction, operand: Operand, kind: str, value: str, wide: bool = False) -> str:
        """Python that keeps a result of this type in a register, which may be wider then."""
        if not isinstance(operand, str) or not operand.startswith("%"):
            raise instruction.unknown(f"{operand} is no register")
        have = self.entry.type_of(operand)
        if have is None or ("pred" in (have, kind) and have != kind):
            raise instruction.unknown(f"{operand} is .{have}, not .{kind}")
        if have == "pred" or numpy_of(have) == numpy_of(kind):
            return f"{operand[1:]} = {value}"
        if size_of(have) < size_of(kind):
            raise instruction.unknown(f"{operand} is .{have}, not .{kind}")
        if size_of(have) == size_of(kind):
            return f"{operand[1:]} = ({value}).view({numpy_of(have)})"
        if not wide or "f" in (have[0], kind[0]):
            raise instruction.unknown(f"{operand} is .{have}, not .{kind}")
        if kind[0] == "s":
            return f"{operand[1:]} = ({value}).astype(I{size_of(have)}).view({numpy_of(have)})"
        return f"{operand[1:]} = ({value}).astype({numpy_of(have)})"


def registers(operand: Operand) -> list[str]:
    """Those that an operand names."""
    if isinstance(operand, Address):
        operand = operand.base
    elif isinstance(operand, tuple):
        return [name for name in operand if name[0] == "%"]
    return [name for name in operand.split("|") if name[0] == "%" and "." not in name]


WITHOUT_RESULT = ("st", "bra", "bar", "barrier", "membar", "nanosleep", "ret", "trap")


def written(instruction: Instruction) -> list[str]:
    """Registers that an instruction sets: its first operand, but of those that set none."""
    if instruction.opcode in WITHOUT_RESULT or not instruction.operands:
        return []
    return registers(instruction.operands[0])


def taken(instruction: Instruction) -> list[str]:
    """Registers that an instruction reads."""
    skipped = 0 if instruction.opcode in WITHOUT_RESULT else 1
    found = [register for operand in instruction.operands[skipped:] for register in registers(operand)]
    if instruction.predicate:
        found.append(instruction.predicate.lstrip("!"))
    return found
