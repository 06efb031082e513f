"""The pages of the docs as tests see them: blocks of code, and what a page's recipe defines."""

import re
from pathlib import Path

DOCS = Path(__file__).parent.parent / "docs"


def blocks(text):
    return re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def recipe_of(page):
    """Names that the first block of a page defines."""
    code, *_ = blocks((DOCS / page).read_text(encoding="utf-8"))
    names = {}
    exec(compile(code, page, "exec"), names)
    return names
