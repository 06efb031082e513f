"""What docstrings of this package mean by a name between single backticks, and which members are worth a line."""

from __future__ import annotations

import inspect
import itertools
import re
import sys
from typing import Any

NAME = re.compile(r"(?<![`:\w])`([^`<>]+)`(?!`)")


def with_links(_app: Any, _what: str, name: str, documented: Any, _options: Any, lines: list[str]) -> None:
    """Names of public functions become links, all others code; parameters are no links, whatever they are called."""
    parameters = _parameters(documented)
    module = sys.modules.get(getattr(documented, "__module__", None) or name)

    def linked(match: re.Match[str]) -> str:
        text = match[1]
        target = None if text in parameters else _target(text, module)
        return f"``{text}``" if target is None else f":py:obj:`{text} <{target}>`"

    paragraphs = (list(group) for _, group in itertools.groupby(range(len(lines)), lambda i: lines[i].strip() != ""))
    for paragraph in paragraphs:
        if not any(lines[i].lstrip().startswith((">>>", "====")) for i in paragraph):  # a table's columns have widths
            for i in paragraph:
                lines[i] = NAME.sub(linked, lines[i])


def _parameters(documented: Any) -> set[str]:
    try:
        return set(inspect.signature(documented).parameters)
    except (TypeError, ValueError):
        return set()


def _target(text: str, module: Any) -> str | None:
    """The full name of a documented object, of the package whose text this is or of fastbn itself."""
    name = text.removesuffix("()")
    if name in MODULES and name in sys.modules:
        return name
    for start in (_package_of(module), "fastbn", *MODULES):
        owner, rest = sys.modules.get(start), name.removeprefix(f"{start}.")
        is_near = not start.startswith("fastbn.") or start == _package_of(module)  # others are named in full
        if (is_near or rest != name) and rest.split(".")[0] in getattr(owner, "__all__", ()) and _has(owner, rest):
            return f"{start}.{rest}"
    return None


MODULES = tuple(f"fastbn.{name}" for name in ("threads", "torch", "jax", "dask", "distributed"))


def _has(owner: Any, path: str) -> bool:
    for name in path.split("."):
        if not hasattr(owner, name):
            return False
        owner = getattr(owner, name)
    return True


def _package_of(module: Any) -> str:
    """fastbn.torch, for what is in fastbn.torch.modules."""
    start = ".".join(getattr(module, "__name__", "fastbn").split(".")[:2])
    return start if start in MODULES else "fastbn"


def skipped(_app: Any, _what: str, _name: str, member: Any, _skip: bool, _options: Any) -> bool | None:
    """Fields of named tuples, which Python documents as aliases for numbers: the class says what they are."""
    return True if type(member).__name__ == "_tuplegetter" else None


def setup(app: Any) -> dict[str, bool]:
    app.connect("autodoc-process-docstring", with_links, priority=400)  # before napoleon reads the sections
    app.connect("autodoc-skip-member", skipped)
    return {"parallel_read_safe": True}
