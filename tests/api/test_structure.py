"""The package has floors: no file imports one that imports it, however far around."""

import textwrap

import pytest

from tests import structure


def test_no_circles():
    assert structure.circles(structure.graph_of(structure.PACKAGE)) == []


@pytest.mark.parametrize(("back", "expected"), [("", []), ("import pack.top", [["pack.inner.low", "pack.top"]])])
def test_a_circle_is_found(tmp_path, back, expected):
    package = tmp_path / "pack"
    (package / "inner").mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "inner" / "__init__.py").touch()
    (package / "top.py").write_text("from pack.inner import low\n")
    (package / "inner" / "low.py").write_text(
        textwrap.dedent(f"""
        def late():
            {back}
            return 1
    """)
    )
    assert structure.circles(structure.graph_of(package)) == expected


PREPARED = ("prepare", "prepare_reductions")
PUBLIC = ("functional", "primitives", "reductions")
LIMITS = {
    "backends know no public type": (("cpu", "cuda"), ("saved", "merging", "call", "backend", *PREPARED, *PUBLIC)),
    "the ground imports nothing above": (
        ("layout", "arrays", "formulas", "operands"),
        ("backend", "cpu", "cuda", "call", "ways"),
    ),
    "adapters are above the functions": (
        ("cpu", "cuda", "backend", *PREPARED, *PUBLIC),
        ("torch", "jax", "dask", "distributed"),
    ),
}


@pytest.mark.parametrize("rule", LIMITS)
def test_what_may_not_import_what(rule):
    below, above = LIMITS[rule]
    graph = structure.graph_of(structure.PACKAGE)

    def in_rooms(file, rooms):
        return any(file == f"fastbn.{room}" or file.startswith(f"fastbn.{room}.") for room in rooms)

    wrong = {(f, o) for f, imported in graph.items() if in_rooms(f, below) for o in imported if in_rooms(o, above)}
    assert not wrong
