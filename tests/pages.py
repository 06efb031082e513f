"""The pages of the documentation as tests see them: code, links, headings, and what a page's recipe defines."""

import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
MADE = (DOCS / "_build", DOCS / "api" / "generated")  # by Sphinx

CODE = re.compile(r"(?:^<!-- not run: ([^\n]+) -->\n)?^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
FENCE = re.compile(r"^(```|:::).*?^\1$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\[(?:[^\[\]]|\[[^\]]*\])*\]\(\s*([^()\s]+(?:\([^()]*\))?)\s*\)")
IMAGE = re.compile(r"!\[[^\]]*\]\(([^)\s]+)\)")


class Block(NamedTuple):
    code: str
    not_run: str
    """Why, in words; empty where it is run."""


def written():
    """All Markdown pages of the documentation that people wrote."""
    return [page for page in sorted(DOCS.rglob("*.md")) if not any(folder in page.parents for folder in MADE)]


def all_blocks(text):
    return [Block(code, reason) for reason, code in CODE.findall(text)]


def blocks(text):
    """The code of a text that is run."""
    return [block.code for block in all_blocks(text) if not block.not_run]


def links(text):
    """Where links and pictures lead, but for those in code."""
    text = re.sub(r"`[^`\n]+`", "", FENCE.sub("", text))
    return list(
        dict.fromkeys([*LINK.findall(text), *IMAGE.findall(text)])
    )  # pictures are links as well, but nested ones


def anchors(text):
    """What can be linked to: headings in small letters, with hyphens for spaces and without punctuation."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def recipe_of(page):
    """Names that the first block of a page defines."""
    code, *_ = blocks((DOCS / page).read_text(encoding="utf-8"))
    names = {}
    exec(compile(code, page, "exec"), names)
    return names
