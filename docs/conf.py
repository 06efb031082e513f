"""Sphinx builds these pages: ``sphinx-build -W --keep-going -n docs docs/_build``."""

import importlib.util
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE / "_extensions")]

import fastbn  # noqa: E402  # behind the line that makes it this clone's

project = "fastbn"
author = "The fastbn developers"
copyright = author  # noqa: A001  # Sphinx reads this name
release = version = fastbn.__version__

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "myst_parser",
    "sphinx_copybutton",
    "docstrings",
    "examples",
]
exclude_patterns = ["_build", "_extensions", "_templates"]
templates_path = ["_templates"]

default_role = "code"  # single backticks in docstrings; `docstrings` makes links of those that name a public object

# --- Markdown ---------------------------------------------------------------------------------------------------------

myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

# --- the API ----------------------------------------------------------------------------------------------------------

autodoc_typehints = "none"  # nearly all of them are Any: docstrings say more
autodoc_member_order = "bysource"
absent = [name for name in ("torch", "jax", "dask") if importlib.util.find_spec(name) is None]
autosummary_generate = [f"api/{page.name}" for page in (HERE / "api").glob("*.rst") if page.stem not in absent]
napoleon_google_docstring = False
napoleon_use_param = False  # types are phrases, "array, optional", and no names of classes to link
napoleon_use_rtype = False
nitpick_ignore_regex = [
    ("py:exc", r"[A-Z]\w+"),  # Python's own exceptions; its pages lie on another server
    ("py:(class|exc)", r"(numpy|torch|collections|typing|dask)\..*|tuple|object|array"),
]

# --- HTML -------------------------------------------------------------------------------------------------------------

html_theme = "furo"
html_title = f"fastbn {release}"
html_static_path = ["_static"]
html_css_files = ["fastbn.css"]
html_copy_source = False  # nothing shows it
html_theme_options = {"top_of_page_buttons": []}


def setup(app):
    """Where a framework is missing the page of its adapter says so."""

    def said(_app, page, source):
        folder, _, name = page.rpartition("/")
        if folder == "api" and name in absent:
            title = f"fastbn.{name}"
            source[0] = f"{title}\n{'=' * len(title)}\n\nThese pages were made where {name} is not installed.\n"

    app.connect("source-read", said)
