"""The package has floors: no file imports one that imports it, however far around. Tests import no test modules.

The backends have the functions of the contract, each.
"""

import ast
import inspect
import re
import textwrap
from collections import Counter
from pathlib import Path

import pytest

from fastbn import cpu
from fastbn.backend import Backend
from tests import structure
from tests.wrong_backends import PREPARING

TESTS = Path(__file__).parent.parent


def test_no_circles():
    assert structure.circles(structure.graph_of(structure.PACKAGE)) == []


BACK = ["import pack.top", "importlib.import_module('pack.top')", "import_module(f'pack.t{name}')"]
CIRCLE = [["pack.inner.low", "pack.top"]]


@pytest.mark.parametrize(("back", "expected"), [("", []), *((back, CIRCLE) for back in BACK)])
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


def test_kernels_stand_on_the_ground():
    """They are imported when they are compiled: by files that stand above all that they import."""
    words = "program_words", "team_words"
    ground = {f"fastbn.cpu.{name}" for name in ("machines", "objects", "records", "sizes", "statistics_sizes", *words)}
    ground |= {"fastbn.operands", "fastbn.numba_parts.compiling"}
    for file, imported in structure.graph_of(structure.PACKAGE).items():
        if file.startswith("fastbn.cpu.kernels."):
            assert {o for o in imported if not o.startswith("fastbn.cpu.kernels.")} <= ground, file


PUBLIC = ("functional", "primitives", "reductions", "nan_reductions", "layer")
LIMITS = {
    "backends know no public type": (("cpu", "cuda"), ("saved", "merging", "call", "backend", *PREPARING, *PUBLIC)),
    "the ground imports nothing above": (
        ("layout", "arrays", "formulas", "operands"),
        ("backend", "cpu", "cuda", "call", "ways"),
    ),
    "adapters are above the functions": (
        ("cpu", "cuda", "backend", *PREPARING, *PUBLIC),
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


@pytest.mark.parametrize("name", ["cpu", "cuda"])
def test_backends_define_the_same_functions(name):
    """Those of the contract: the names, the arguments and their order; two names are no functions."""
    backend = cpu if name == "cpu" else pytest.importorskip("fastbn.cuda", reason="CuPy cannot be imported")
    names = {one for one in vars(Backend) if not one.startswith("_")}
    assert names == set(backend.__all__)
    for function in names - {"xp", "LEAST_PIECE"}:
        _self, *wanted = inspect.signature(getattr(Backend, function)).parameters
        assert list(inspect.signature(getattr(backend, function)).parameters) == wanted, function


def test_the_drawing():
    """Each file of docs/architecture.md's drawing imports only what stands in a lower row; all are there."""
    drawn = (TESTS.parent / "docs" / "architecture.md").read_text().split("```")[1]
    rows = {}
    for row, line in enumerate(drawn.strip().splitlines()):
        for name in re.findall(r"\w+/(?:\w+\.py)?|\w+\.py", line):
            rows["fastbn." + name.removesuffix(".py").rstrip("/").replace("/", ".")] = row
    rows["fastbn"] = rows.pop("fastbn.__init__")

    def drawn_as(file):
        return file if file in rows else ".".join(file.split(".")[:2])

    graph = structure.graph_of(structure.PACKAGE)
    assert {drawn_as(file) for file in graph} == set(rows)
    arrows = {(drawn_as(file), drawn_as(other)) for file, imported in graph.items() for other in imported}
    assert {(one, other) for one, other in arrows if one != other and rows[one] >= rows[other]} == set()


# --- the tests --------------------------------------------------------------------------------------------------------


def imported_test_modules(folder):
    """Pairs of a file and a test module that it imports."""
    graph = structure.graph_of(folder)
    return {(f, o) for f, imported in graph.items() for o in imported if o.rpartition(".")[2].startswith("test_")}


def test_no_test_module_is_imported():
    """What tests share is in modules of other names: `cases`, `support`, `cuda.harness`."""
    assert imported_test_modules(TESTS) == set()


@pytest.mark.parametrize(
    "line", ["from pack.api import test_a", "from pack.api.test_a import x", "import pack.api.test_a"]
)
def test_an_imported_test_module_is_found(tmp_path, line):
    api = tmp_path / "pack" / "api"
    api.mkdir(parents=True)
    (api / "test_a.py").write_text("x = 1\n")
    (api / "test_b.py").write_text(f"def late():\n    {line}\n")
    assert imported_test_modules(tmp_path / "pack") == {("pack.api.test_b", "pack.api.test_a")}


def test_shared_tests_run_once_on_numpy_arrays():
    """One module of tests/api takes all tests of each module of tests/cases."""
    shared = {
        f"tests.cases.{path.stem}": 1
        for path in (TESTS / "cases").glob("*.py")
        if any(isinstance(node, ast.FunctionDef) and node.name.startswith("test_") for node in _body(path))
    }
    taken = Counter(
        node.module
        for path in (TESTS / "api").glob("test_*.py")
        for node in _body(path)
        if isinstance(node, ast.ImportFrom) and node.names[0].name == "*"
    )
    assert len(shared) > 5
    assert taken == shared


def _body(path):
    return ast.parse(path.read_text()).body


def test_slow_tests_are_there():
    """Each line of slow.txt names a file and a function; shared ones are in tests/cases."""
    shared = "".join(path.read_text() for path in (TESTS / "cases").glob("*.py"))
    for line in (TESTS / "slow.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            file, *_, function = line.partition("[")[0].split("::")
            assert f"def {function}(" in (TESTS.parent / file).read_text() + shared, line
