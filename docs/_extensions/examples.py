"""Directives for the pages of the gallery. Nothing is imported or run: all programs together take minutes.

``{example} digits``: what ``examples/digits.py`` says of itself, then its code. ``{gallery}``, a name a line: the
pictures that the programs saved, each a link to its page.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.util.docutils import SphinxDirective

EXAMPLES = Path(__file__).parents[2] / "examples"


class Example(SphinxDirective):
    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        path = EXAMPLES / f"{self.arguments[0]}.py"
        text = path.read_text(encoding="utf-8")
        module = ast.parse(text)
        says = ast.get_docstring(module)
        if says is None:
            raise self.error(f"{path.name} has no docstring")
        self.env.note_dependency(str(path))
        found = nodes.container()
        self.state.nested_parse(StringList(as_markdown(says).splitlines(), str(path)), 0, found)
        code = "\n".join(text.splitlines()[module.body[0].end_lineno :]).strip("\n")
        return [*found.children, nodes.literal_block(code, code, language="python")]


class Gallery(SphinxDirective):
    has_content = True

    def run(self) -> list[nodes.Node]:
        grid = nodes.container(classes=["gallery"])
        for name in self.content:
            picture = f"[![What {name}.py draws](../../examples/{name}.png)]({name}.md)"
            card = nodes.container(classes=["card"])
            self.state.nested_parse(StringList([picture, "", f"[]({name}.md)"], "gallery"), 0, card)
            grid += card
        return [grid]


def as_markdown(text: str) -> str:
    """These docstrings are plain enough: formulas are indented, and names stand between backticks, in Markdown too."""
    return re.sub(r"::$", ":", text, flags=re.MULTILINE)


def setup(app: Any) -> dict[str, bool]:
    app.add_directive("example", Example)
    app.add_directive("gallery", Gallery)
    return {"parallel_read_safe": True}
