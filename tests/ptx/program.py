"""A kernel as blocks of instructions, each a Python function over the threads that are there together.

A block ends where threads may part (branches) or wait (barriers, `nanosleep`). Its function takes the registers, the
machine and the threads' numbers, None being all; registers that no other block reads are local variables of it. The
function is made when the block first runs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np

from tests.ptx import floats
from tests.ptx.instructions import EMIT
from tests.ptx.text import Address, Entry, Instruction, parsed
from tests.ptx.values import Values, numpy_of, taken, written

ENDS = {
    "ret": "exit", "trap": "trap", "bar.sync": "barrier", "nanosleep.u32": "sleep",
    "barrier.cluster.wait.acquire": "cluster", "bra": "branch", "bra.uni": "branch",
}  # fmt: skip
"""Instructions behind which threads part or wait."""

MEMORY = [f"{kind}{bits}" for kind in "busf" for bits in (8, 16, 32, 64) if kind != "f" or bits > 16]
"""Types of loads and stores."""

TYPES = {
    "pred": np.bool_, "b16": np.uint16, "b32": np.uint32, "b64": np.uint64, "f32": np.float32, "f64": np.float64,
}  # fmt: skip


class Block:
    """Instructions from `start` to before `end`, the last of which says what follows."""

    def __init__(self, program: Program, start: int, end: int) -> None:
        code = program.entry.code
        self.program, self.start, self.end = program, start, end
        last = code[end - 1]
        self.kind = ENDS.get(last.name, "next")
        self.last = last
        self.line = code[start].line
        self.collective = any(i.opcode in ("shfl", "vote") for i in code[start:end])
        self.negated = bool(last.predicate) and str(last.predicate).startswith("!")
        self.conditional = last.predicate is not None
        self.reads: dict[str, None] = {}
        self.writes: dict[str, None] = {}
        """Registers that come from other blocks, and those that are set, in order."""
        self.runs = 0
        """How often it was executed, by any threads."""
        self.target = -1
        """Of a branch: the number of a block."""
        self._run: Callable[..., Any] | None = None

    def run(self, held: list[Any], machine: Any, idx: Any) -> Any:
        """Execute it for the threads `idx`; gives the predicate of a conditional branch."""
        if self._run is None:
            self._run = self.program.compile(self)
        return self._run(held, machine, idx)


class Program:
    """A kernel's text, divided into blocks."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.entry: Entry = parsed(text)
        self.values = Values(self.entry)
        code, labels = self.entry.code, self.entry.labels
        if not code or code[-1].name not in ("ret", "trap", "bra", "bra.uni"):
            raise code[-1].unknown("the kernel does not end here")
        for instruction in code:
            if instruction.predicate and instruction.opcode != "bra":
                raise instruction.unknown("only branches have predicates")
            if instruction.opcode == "bra" and instruction.operands[0] not in labels:
                raise instruction.unknown("there is no such label")
        starts = {0, *labels.values()} | {at + 1 for at, i in enumerate(code) if i.name in ENDS}
        places = sorted(at for at in starts if at < len(code))
        self.blocks = [Block(self, a, b) for a, b in zip(places, [*places[1:], len(code)], strict=True)]
        number = {block.start: k for k, block in enumerate(self.blocks)}
        for block in self.blocks:
            if block.kind == "branch":
                block.target = number[labels[str(block.last.operands[0])]]
        self.slots: dict[str, int] = {}
        """Places of registers that go from block to block."""
        for block in self.blocks:
            for i in code[block.start : block.end]:
                block.reads.update(dict.fromkeys(r for r in taken(i) if r not in block.writes))
                block.writes.update(dict.fromkeys(written(i)))
            for register in block.reads:
                self.slots.setdefault(register, len(self.slots))
        self.slot_types = [TYPES[self._type(register)] for register in self.slots]
        self._environment = environment()

    def _type(self, register: str) -> str:
        kind = self.entry.type_of(register)
        if kind not in TYPES:
            raise self.entry.code[0].unknown(f"register {register} is not declared, or .{kind}")
        return kind

    def lines_that_ran(self) -> set[int]:
        """Of instructions that any thread has executed."""
        ran = [block for block in self.blocks if block.runs]
        return {i.line for block in ran for i in self.entry.code[block.start : block.end]}

    # --- making functions ---------------------------------------------------------------------------------------------

    def compile(self, block: Block) -> Callable[..., Any]:
        """The function of a block."""
        source = self.source(block)
        for made, name in self.values.pool.items():
            if name not in self._environment:
                self._environment[name] = eval(made, self._environment)
        space: dict[str, Any] = {}
        exec(compile(source, f"{self.entry.name}.ptx:{block.line}", "exec"), self._environment, space)
        function: Callable[..., Any] = space["block"]
        return function

    def source(self, block: Block) -> str:
        """Python of a block's function."""
        lines = [line for i in self.entry.code[block.start : block.end] for line in self._emitted(i)]
        out = [r for r in block.writes if r in self.slots]
        head = ["def block(R, X, idx):", "    n = X.lanes if idx is None else idx.size"]
        if block.reads:
            whole = [f"{r[1:]} = R[{self.slots[r]}]" for r in block.reads]
            head += ["    if idx is None:", *(f"        {line}" for line in whole)]
            head += ["    else:", *(f"        {line}[idx]" for line in whole)]
        tail = []
        if out:
            tail += ["    if idx is None:", *(f"        R[{self.slots[r]}] = {r[1:]}" for r in out)]
            tail += ["    else:", *(f"        put(R, {self.slots[r]}, idx, {r[1:]})" for r in out)]
        if block.conditional:
            tail.append(f"    return {str(block.last.predicate).lstrip('!')[1:]}")
        return "\n".join([*head, *(f"    {line}" for line in lines), *tail])

    def _emitted(self, i: Instruction) -> list[str]:
        name, _, rest = i.name.partition(".")
        if i.name in ENDS:
            return self._ends(i)
        if name in EMIT:
            if not rest:
                raise i.unknown()
            return EMIT[name](self.values, i, rest.split("."))
        if name in ("ld", "st"):
            return self._access(i, rest.split("."))
        if i.name == "atom.global.add.u32":
            address, offset = self._address(i, i.operands[1])
            value = f"X.atomic_add({address}, {offset}, {self.values.read(i, i.operands[2], 'u32')}, idx, {i.line})"
            return [self.values.keep(i, i.operands[0], "u32", value)]
        if i.name == "membar.gl" and not i.operands:
            return ["X.fence(idx)"]
        if i.name == "barrier.cluster.arrive.release" and not i.operands:
            return [f"X.arrive(idx, {i.line})"]
        if name in ("shfl", "vote"):
            return self._collective(i)
        raise i.unknown()

    def _ends(self, i: Instruction) -> list[str]:
        operands = {"bar.sync": ("0",), "bra": None, "bra.uni": None, "nanosleep.u32": None}.get(i.name, ())
        if operands is not None and i.operands != operands:
            raise i.unknown()
        return [f"X.trap(idx, {i.line})"] if i.name == "trap" else []

    def _address(self, i: Instruction, operand: Any) -> tuple[str, int]:
        """Python for the base of an address, of one number for each thread, and its offset."""
        if not isinstance(operand, Address):
            raise i.unknown(f"{operand} is no address")
        if operand.base.startswith("%"):
            return self.values.read(i, operand.base, "u64"), operand.offset
        return f"full(n, {self.values.constant(i, operand.base, 'u64')})", operand.offset

    def _access(self, i: Instruction, parts: list[str]) -> list[str]:
        """Loads and stores: ``ld.volatile.global.v2.f64`` and the like."""
        volatile = parts[0] == "volatile" and bool(parts.pop(0))
        space = parts.pop(0) if parts else ""
        constant = parts[:1] == ["nc"] and bool(parts.pop(0))
        if parts[:1] == ["wb"] and i.opcode == "st":  # what a store does anyway
            parts.pop(0)
        count = int(parts.pop(0)[1:]) if parts[:1] in (["v2"], ["v4"]) else 1
        stores = i.opcode == "st"
        spaces = ("global", "shared") if stores else ("global", "shared", "param")
        special = constant + volatile
        if len(parts) != 1 or parts[0] not in MEMORY or len(i.operands) != 2 or space not in spaces:
            raise i.unknown()
        if special > 1 or (special and (stores or space != "global")):
            raise i.unknown()
        kind = parts[0]
        address, offset = self._address(i, i.operands[0 if stores else 1])
        given = i.operands[1 if stores else 0]
        vector = given if isinstance(given, tuple) and not isinstance(given, Address) else (given,)
        if len(vector) != count:
            raise i.unknown()
        where = f"{address}, {offset}, {numpy_of(kind)}_"
        if stores:
            values = ", ".join(self.values.read(i, part, kind, wide=True) for part in vector)
            return [f"X.store_{space}({where}, ({values},), idx, {i.line})"]
        how = f", '{'volatile' if volatile else 'constant' if constant else ''}'" if space == "global" else ""
        names = [f"loaded{k}" for k in range(count)]
        lines = [f"{', '.join(names)}, = X.load_{space}({where}, {count}, idx, {i.line}{how})"]
        return lines + [self.values.keep(i, r, kind, name, wide=True) for r, name in zip(vector, names, strict=True)]

    def _collective(self, i: Instruction) -> list[str]:
        if i.name == "vote.sync.ballot.b32" and len(i.operands) == 3:
            mask = self._mask(i, i.operands[2])
            value = f"X.ballot({self.values.read(i, i.operands[1], 'pred')}, {mask}, idx, {i.line})"
            return [self.values.keep(i, i.operands[0], "b32", value)]
        how = {"shfl.sync.bfly.b32": "bfly", "shfl.sync.idx.b32": "idx"}.get(i.name)
        if how is None or len(i.operands) != 5:
            raise i.unknown()
        lane = self.values.known(i.operands[2])
        lanes = self.values.read(i, i.operands[2], "u32") if lane is None else str(lane & 31)
        clamp = self.values.known(i.operands[3])
        if clamp != 31:
            raise i.unknown("shuffles within parts of a warp are not known here")
        a, mask = self.values.read(i, i.operands[1], "b32"), self._mask(i, i.operands[4])
        result, *found = str(i.operands[0]).split("|")
        lines = [self.values.keep(i, result, "b32", f"X.shuffle({how!r}, {a}, {lanes}, {mask}, idx, {i.line})")]
        return [*lines, self.values.keep(i, found[0], "pred", "full(n, True)")] if found else lines

    def _mask(self, i: Instruction, operand: Any) -> str:
        """The lanes that take part, as a number where it is known, else one for each thread."""
        known = self.values.known(operand)
        return self.values.read(i, operand, "b32") if known is None else str(known & 0xFFFFFFFF)


# --- what generated code calls ----------------------------------------------------------------------------------------


def environment() -> dict[str, Any]:
    """The names in generated code."""
    names = (
        "fma32 fma64 add32 add64 mul32 mul64 ftz narrowed smallest largest to_half from_half to_bfloat16 integers "
        "reciprocal32 reciprocal64 reciprocal_sqrt64"
    )
    found = {name: getattr(floats, name) for name in names.split()}
    found |= {f"{k}{n}": np.dtype(f"{c}{n}").type for k, c in zip("UI", "ui", strict=True) for n in (1, 2, 4, 8)}
    found |= {"F4": np.float32, "F8": np.float64, "BOOL": np.bool_}
    found |= {f"{name}_": np.dtype(kind) for name, kind in found.items() if isinstance(kind, type)}
    numpy = {"where": np.where, "zeros": np.zeros, "isnan": np.isnan, "minimum": np.minimum, "maximum": np.maximum}
    helpers = {
        "full": lambda n, value: np.full(n, value),
        "put": _put, "shifted": _shifted, "leading_zeros": _leading_zeros, "reversed_bits": _reversed_bits,
    }  # fmt: skip
    return found | numpy | helpers


def _put(held: list[Any], slot: int, idx: Any, value: Any) -> None:
    """Set a register for some threads; its array may be another register's, too."""
    array = held[slot].copy()
    array[idx] = value
    held[slot] = array


def _shifted(a: Any, by: Any, left: bool) -> Any:
    bits = 8 * a.itemsize
    amount = np.minimum(by, bits - 1).astype(a.dtype)
    moved = a << amount if left else a >> amount
    if a.dtype.kind == "i":
        return moved  # the sign, from the width on
    return np.where(by >= bits, a.dtype.type(0), moved)


def _leading_zeros(a: Any) -> Any:
    """The distance of the highest bit from the top; all ones where there is none."""
    _, exponent = np.frexp(a.astype(np.float64))
    return np.where(a == 0, np.uint32(0xFFFFFFFF), (32 - exponent).astype(np.uint32))


def _reversed_bits(a: Any) -> Any:
    for shift, mask in ((1, 0x55555555), (2, 0x33333333), (4, 0x0F0F0F0F), (8, 0x00FF00FF), (16, 0x0000FFFF)):
        mask, by = np.uint32(mask), np.uint32(shift)
        a = ((a >> by) & mask) | ((a & mask) << by)
    return a


@lru_cache(maxsize=256)
def program(text: str) -> Program:
    """Of a text, made once."""
    return Program(text)
