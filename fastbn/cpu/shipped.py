"""Kernels that come with an installation: for each level of processors one archive of object code, made by
`fastbn.precompile`.

An archive is a header with the fingerprint of the sources that it was made from, an index in JSON, and the objects one
after the other. To open it takes 0.4 ms, to read an object 0.03 ms, as from a file of its own; compressed in a wheel it
is a third smaller than the objects in files of their own are.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import struct
from pathlib import Path

FOLDER = Path(__file__).with_name("archives")
_MAGIC = b"fastbn 1"
_HEADER = struct.Struct(f"<{len(_MAGIC)}s 32s I")  # and the fingerprint, and the size of the index

# What LLVM calls levels of x86-64, the highest first, and what each has beyond the next.
_V3 = frozenset(("avx", "avx2", "bmi", "bmi2", "f16c", "fma", "lzcnt", "movbe", "popcnt", "sse4.2"))
_V4 = _V3 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
LEVELS = {"x86-64-v4": _V4, "x86-64-v3": _V3}
BASE = "generic"  # on other processors, whose levels differ less


def levels_here() -> list[str]:
    """Those that kernels can be made for on this kind of machine."""
    return list(LEVELS) if _is_x86() else [BASE]


def level_of(name: str, features: str) -> str | None:
    """The highest level of this processor, which has this name and these features (``+avx2,-avx512f``), if any."""
    if not _is_x86():
        return BASE
    if name in LEVELS:  # by NUMBA_CPU_NAME
        return name
    have = {feature[1:] for feature in features.split(",") if feature.startswith("+")}
    return next((level for level, needs in LEVELS.items() if needs <= have), None)


def _is_x86() -> bool:
    return platform.machine().lower() in ("x86_64", "amd64")


class Archive:
    """Object code by symbol, of one level of processors.

    The file is opened for each, not mapped: whatever becomes of it meanwhile, what is read is whole or refused.
    """

    def __init__(self, path: Path, fingerprint: str) -> None:
        self.path, self._start = path, 0
        self._index: dict[str, tuple[int, int, str]] = {}
        try:
            with path.open("rb") as file:
                magic, found, size = _HEADER.unpack(file.read(_HEADER.size))
                if (magic, found) == (_MAGIC, _digest(fingerprint)):
                    self._index = json.loads(file.read(size))
                    self._start = _HEADER.size + size
        except (OSError, ValueError, struct.error):  # none, or a damaged one
            pass

    def __len__(self) -> int:
        return len(self._index)

    def read(self, symbol: str) -> bytes | None:
        """The code of a kernel; None if it is not there, or damaged."""
        if symbol not in self._index:
            return None
        start, size, wanted = self._index[symbol]
        try:
            with self.path.open("rb") as file:
                file.seek(self._start + start)
                content = file.read(size)
        except OSError:
            return None
        return content if _digest(symbol, content).hex() == wanted else None


def write(path: Path, fingerprint: str, objects: dict[str, bytes]) -> None:
    """Make an archive, whole or not at all."""
    index, start = {}, 0
    for symbol, content in sorted(objects.items()):
        index[symbol] = start, len(content), _digest(symbol, content).hex()
        start += len(content)
    head = json.dumps(index).encode()
    temporary = path.with_suffix(".part")
    with temporary.open("wb") as file:
        file.write(_HEADER.pack(_MAGIC, _digest(fingerprint), len(head)) + head)
        file.writelines(objects[symbol] for symbol in index)
    os.replace(temporary, path)


def _digest(name: str, content: bytes = b"") -> bytes:
    return hashlib.sha256(name.encode() + b"\0" + content).digest()
