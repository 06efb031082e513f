"""Instructions that kernels take for 16 bytes, and the order of what blocks tell each other, from the disassembly.

    python -m tests.cuda_instructions --arch 90

Loops that load or store whole vectors count as they stand, all vectors of a chunk and every predicated instruction,
without what only data at the ends of their type's range need, or frozen statistics, or a thread's first chunk; what
comes once in a group of chunks by its share.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

from tests.cuda_compile import disassembly
from tests.cuda_variants import CHIPS, Variant, planned

RARE = (
    (" && !constant(chunk, weights, start))\n            add_carefully(chunk.again(), start);", ") origin = start;"),
    ("if (!constant()) flush_carefully(again);", ""),
    ("    if (v == tile.start() && count > 0)\n", "    if (false)\n"),
    ("shift = origin;", "shift = static_cast<real>(threadIdx.x);"),
    ("p.frozen", "false"),
)
FLUSHES = (
    ("    if (count == ITEMS_PER_THREAD && last_of_group) flush(", "    if (false) flush("),
    ("    if ((v - tile.first) / CHUNK % CHUNKS_OF_GROUP == CHUNKS_OF_GROUP - 1)\n", "    if (false)\n"),
)
"""Once in so many chunks as CHUNKS_OF_GROUP says."""


def without_rare(text: str) -> str:
    """A kernel's text with the common path alone."""
    for rare, common in RARE:
        text = text.replace(rare, common)
    return text


def without_flush(text: str) -> str:
    """Likewise, and of groups only the last is added to what all come to."""
    text = without_rare(text)
    for flush, never in FLUSHES:
        text = text.replace(flush, never)
    return text


def chunks_of_group(variant: Variant) -> int:
    """As CHUNKS_OF_GROUP of accumulator.cuh and gradients.cuh says."""
    group = 32 if variant.kernel in ("statistics", "forward") else 16
    return max(1, group // (variant["ITEMS_PER_THREAD"] * (1 if variant["ALONG_CHANNELS"] else variant["VECTOR"])))


class Loop(NamedTuple):
    """Instructions from a label to the branch back there."""

    instructions: tuple[str, ...]

    def accesses(self, name: str, bits: int) -> int:
        """How often it loads (LDG) or stores (STG) so many bits."""
        width = rf"\.{bits}\b" if bits > 32 else r"\.U16\b" if bits == 16 else r"(?!.*\.(U16|64|128)\b)"
        own = [text.partition(" desc")[0] for text in self.instructions if "LDG" not in text or "STRONG" not in text]
        return sum(bool(re.search(rf"\b{name}\b.*?{width}", text)) for text in own)

    def has(self, name: str) -> bool:
        """Whether an instruction of this name is in it."""
        return any(re.search(rf"\b{name}\b", text) for text in self.instructions)


def listing(code: str) -> tuple[list[str], dict[str, int]]:
    """Instructions in order, and the places of labels."""
    instructions: list[str] = []
    labels: dict[str, int] = {}
    for line in code.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(instructions)
        elif found := re.match(r"\s*/\*[0-9a-f]+\*/\s+(.*?);", line):
            instructions.append(found[1])
    return instructions, labels


def innermost_loops(code: str) -> Iterator[Loop]:
    """Loops without another one in them."""
    instructions, labels = listing(code)
    spans = []
    for end, text in enumerate(instructions):
        target = re.search(r"\bBRA\b.*?`\((\.L_x_\d+)\)", text)
        if target and labels[target[1]] <= end:
            spans.append((labels[target[1]], end))
    for start, end in spans:
        if not any((start, end) != other and start <= other[0] and other[1] <= end for other in spans):
            yield Loop(tuple(t for t in instructions[start : end + 1] if not re.search(r"\bNOP\b", t)))


def loops_over_vectors(variant: Variant, code: str) -> list[Loop]:
    """Those that load, and those that store, all vectors of a chunk."""
    bits, (loads, stores) = variant.vector_bits, variant.transfers
    return [
        loop
        for loop in innermost_loops(code)
        if loop.accesses("LDG", bits) == max(loads, 1) or loop.accesses("STG", bits) == max(stores, 1)
    ]


def for_16_bytes(variant: Variant, architecture: int) -> float:
    """Instructions of a thread for 16 bytes of x: in the loop that reads, and in the one that writes."""

    def of(change: Callable[[str], str]) -> int:
        return sum(len(x.instructions) for x in loops_over_vectors(variant, disassembly(variant, architecture, change)))

    chunks = chunks_of_group(variant)
    total = of(without_rare) / chunks + (of(without_flush) * (1 - 1 / chunks) if chunks > 1 else 0)
    return total / variant["ITEMS_PER_THREAD"] * (128 / variant.vector_bits)


def unordered(code: str) -> list[str]:
    """Atomic operations of barriers between blocks without a fence before or behind, nearer than another barrier."""
    instructions, _ = listing(code)
    kinds = ((re.search(r"\b(ATOMG|RED|MEMBAR|BAR)\.", text) or " ")[0] for text in instructions)
    marks = [kind.rstrip(".").replace("RED", "ATOMG") for kind in kinds if kind != " "]
    found = [] if "ATOMG" in marks else ["no atomic operation"]
    for at, kind in enumerate(marks):
        if kind == "ATOMG" and marks[at - 1 : at] != ["MEMBAR"]:
            found.append("no fence before it arrives")
        if kind == "ATOMG" and marks[at + 1 : at + 2] != ["MEMBAR"]:
            found.append("no fence after it has waited")
    return found


def full(architecture: int) -> Iterator[Variant]:
    """Of each kernel, dtype and way through memory what large arrays get, without options."""
    seen = set()
    for variant in planned(architecture):
        plain = not any(variant[name] for name in ("WEIGHT", "RELU", "RESIDUAL", "WIDE")) and variant["CLUSTER"] == 1
        key = (variant.kernel, variant["DTYPE"], variant["ALONG_CHANNELS"], variant["RUN"] > 0)
        wide = not variant["RUN"] or variant["RUN"] == 49
        if (
            plain
            and wide
            and variant["STEPS"]
            and any(variant.transfers)
            and variant["THREADS"] == 256
            and key not in seen
        ):
            seen.add(key)
            yield variant


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.cuda_instructions", description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, choices=CHIPS, default=90)
    architecture = parser.parse_args(arguments).arch
    for variant in full(architecture):
        print(f"{for_16_bytes(variant, architecture):7.0f}  {variant}", flush=True)


if __name__ == "__main__":
    main()
