"""PTX text: its directives, registers and instructions. What is not known here is refused, by its line."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import NamedTuple


class PtxError(Exception):
    """What PTX text, a launch or a thread must not be or do."""


class Unknown(PtxError):  # noqa: N818 - the text is no error, it is not known here
    """Text whose meaning is not known here."""


class Address(NamedTuple):
    """``[base + offset]``; base is a register, or the name of a variable."""

    base: str
    offset: int


Operand = str | Address | tuple[str, ...]


class Instruction(NamedTuple):
    line: int
    text: str
    predicate: str | None
    """Register, with ``!`` before it where it is negated."""
    name: str
    """The opcode with all that follows its dots."""
    operands: tuple[Operand, ...]

    @property
    def opcode(self) -> str:
        return self.name.partition(".")[0]

    def unknown(self, why: str = "") -> Unknown:
        return Unknown(f"line {self.line}: {self.text}: {why or 'this instruction is not known'}")


class Variable(NamedTuple):
    """In shared memory; those without a size are at the start of what a launch gives."""

    offset: int
    size: int | None
    align: int


@dataclass
class Entry:
    """A kernel and what is around it."""

    name: str
    target: int
    """The architecture: 90 of sm_90."""
    parameters: dict[str, Variable]
    max_threads: tuple[int, ...] | None = None
    min_blocks: int = 1
    cluster: int | None = None
    registers: dict[str, str] = field(default_factory=dict)
    """Types by prefixes: f64 by fd."""
    shared: dict[str, Variable] = field(default_factory=dict)
    code: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    """Places in the code."""

    @property
    def parameter_bytes(self) -> int:
        return max((v.offset + (v.size or 0) for v in self.parameters.values()), default=0)

    @property
    def static_shared(self) -> int:
        return max((v.offset + (v.size or 0) for v in self.shared.values()), default=0)

    def type_of(self, register: str) -> str | None:
        """Of a register's declaration."""
        found = re.fullmatch(r"%([a-z]+)\d+", register)
        return self.registers.get(found[1]) if found else None


SIZES = {"8": 1, "16": 2, "32": 4, "64": 8}
IGNORED = (
    r'\.pragma "(nounroll|used_bytes_mask \d+)"',  # of loops that are not unrolled; of what is read of a vector
    r"\.(global|const)( \.align \d+)? \.[a-z]\d+ [\w$]+( = [\w.]+)?",  # of constants, which code has in it
)
SHARED = r"(?:\.extern )?\.shared(?: \.align (\d+))? \.[busf](\d+) ([\w$]+)(?:\[(\d*)\])?"


def parsed(text: str) -> Entry:
    """The only kernel of a text."""
    lines = text.split("\n")
    header = re.search(r"\.visible \.entry ([\w$]+)\s*\(([^)]*)\)([^{]*)\{", text)
    if header is None or text.count(".entry") != 1 or ".func" in text:
        raise Unknown("expected a text with one .entry and no .func")
    target = re.search(r"^\.target sm_(\d+)\s*$", text, re.MULTILINE)
    if target is None or not re.search(r"^\.address_size 64\s*$", text, re.MULTILINE):
        raise Unknown("expected .target sm_ and .address_size 64")
    entry = Entry(header[1], int(target[1]), _parameters(header[2]))
    _performance(entry, header[3])
    for number, statement in _statements(text[: header.start()], 1):
        if not re.match(r"\.(version|target|address_size)\b", statement):
            _declaration(entry, number, statement)
    first = text.count("\n", 0, header.end()) + 1
    body = text[header.end() :]
    end = body.rfind("}")
    if end < 0:
        raise Unknown(f"line {len(lines)}: the kernel does not end")
    for number, statement in _statements(body[:end], first):
        if label := re.fullmatch(r"(\$?[A-Za-z_][\w$]*):", statement):
            entry.labels[label[1]] = len(entry.code)
        elif statement.startswith("."):
            _declaration(entry, number, statement)
        else:
            entry.code.append(_instruction(number, statement))
    return entry


def _statements(text: str, line: int) -> list[tuple[int, str]]:
    """With their lines; labels end with their colon, header lines have no end of their own."""
    found = []
    for number, whole in enumerate(text.split("\n"), line):
        code = whole.split("//")[0].strip()
        for part in re.findall(r"\$?[A-Za-z_][\w$]*:(?!:)|[^;]+", code):
            if part.strip():
                found.append((number, " ".join(part.split())))
    return found


def _parameters(text: str) -> dict[str, Variable]:
    found: dict[str, Variable] = {}
    at = 0
    for part in filter(None, (" ".join(part.split()) for part in text.split(","))):
        match = re.fullmatch(r"\.param(?: \.align (\d+))? \.[busf](\d+) ([\w$]+)(?:\[(\d+)\])?", part)
        if match is None:
            raise Unknown(f"parameter {part!r}")
        align, item = int(match[1] or SIZES[match[2]]), SIZES[match[2]]
        at = -(-at // align) * align
        found[match[3]] = Variable(at, item * int(match[4] or 1), align)
        at += item * int(match[4] or 1)
    return found


def _performance(entry: Entry, text: str) -> None:
    for line in filter(None, (line.strip() for line in text.split("\n"))):
        if match := re.fullmatch(r"\.maxntid (\d+), (\d+), (\d+)", line):
            entry.max_threads = tuple(map(int, match.groups()))
        elif match := re.fullmatch(r"\.minnctapersm (\d+)", line):
            entry.min_blocks = int(match[1])
        elif match := re.fullmatch(r"\.reqnctapercluster (\d+), 1, 1", line):
            entry.cluster = int(match[1])
        elif line != ".explicitcluster":
            raise Unknown(f"directive {line!r}")


def _declaration(entry: Entry, number: int, text: str) -> None:
    if match := re.fullmatch(r"\.reg \.(pred|[bf]\d+) %([a-z]+)<\d+>", text):
        entry.registers[match[2]] = match[1]
    elif match := re.fullmatch(SHARED, text):
        align, item = int(match[1] or SIZES[match[2]]), SIZES[match[2]]
        if match[4] == "":
            entry.shared[match[3]] = Variable(0, None, align)
        else:
            at = -(-entry.static_shared // align) * align
            entry.shared[match[3]] = Variable(at, item * int(match[4] or 1), align)
    elif not any(re.fullmatch(known, text) for known in IGNORED):
        raise Unknown(f"line {number}: {text}: this directive is not known")


def _instruction(line: int, text: str) -> Instruction:
    match = re.fullmatch(r"(?:@(!?%[a-z]+\d+) )?([a-z][\w.:]*)(?: (.*))?", text)
    if match is None:
        raise Unknown(f"line {line}: {text}: this is not known")
    return Instruction(line, text, match[1], match[2], tuple(map(_operand, _split(match[3] or ""))))


def _split(text: str) -> list[str]:
    """At commas, but those within braces."""
    return [part.strip() for part in re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s][^,]*", text)]


def _operand(text: str) -> Operand:
    if text.startswith("{"):
        return tuple(part.strip() for part in text[1:-1].split(","))
    if text.startswith("["):
        base, _, offset = text[1:-1].replace(" ", "").partition("+")
        return Address(base, int(offset or 0))
    return text
