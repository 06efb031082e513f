"""Values that nobody has set, followed until something depends on them.

Threads without a channel read what shared memory happens to hold, and do nothing with it: no fault. A branch, an
address, a stored or shuffled value that depends on such a read is one. In global memory floats of the bits that new
memory is filled with are such values.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.ptx.memory import Access, Array
from tests.ptx.text import Address, Instruction
from tests.ptx.values import registers, taken, written


class Undefined:
    """Of each register and thread, whether the value depends on memory that nobody has written."""

    def __init__(self, machine: Any) -> None:
        self.machine = machine
        self.held: dict[str, Array] = {}
        self.loaded: dict[int, Array] = {}
        """By lines of the block of instructions that runs: which of its threads have loaded such values."""

    def __bool__(self) -> bool:
        return bool(self.held or self.loaded)

    def follow(self, block: Any, idx: Any) -> None:
        """What the instructions that just ran have made of such values."""
        code = block.program.entry.code[block.start : block.end]
        everyone = slice(None) if idx is None else idx
        here = {r: where for r in self.held.keys() & block.reads if (where := self.held[r][everyone]).any()}
        if here or self.loaded:
            for i in code:
                self._step(i, here, idx)
        for register in block.writes.keys() & ({*self.held} | {*here}) & block.program.slots.keys():
            found = here.get(register)
            if register in self.held or (found is not None and found.any()):
                where = self.held.setdefault(register, np.zeros(self.machine.lanes, bool))
                where[everyone] = False if found is None else found
                if not where.any():
                    del self.held[register]
        self.loaded = {}

    def _step(self, i: Instruction, here: dict[str, Array], idx: Any) -> None:
        sources = [here[register] for register in taken(i) if register in here]
        depends = np.logical_or.reduce(sources) if sources else None
        if depends is not None and depends.any():
            addresses = [operand for operand in i.operands if isinstance(operand, Address)]
            used = any(register in here for address in addresses for register in registers(address))
            if used or i.opcode in ("st", "atom", "bra", "shfl", "vote"):
                Access(i.name, i.line, lambda at: self.machine.name(idx, at)).fail(
                    depends, "depends on memory that nobody has written"
                )
        if i.line in self.loaded and i.opcode == "ld":
            depends = self.loaded[i.line]
        for register in written(i):
            if depends is not None and depends.any():
                here[register] = depends
            else:
                here.pop(register, None)
