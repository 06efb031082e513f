"""The package's structure: ``python -m tests.structure`` lists which file imports which, floor by floor, and circles.

A file stands a floor above the highest of those that it imports, wherever in it the import is, and by `import_module`
too: of a name that is made when it runs, all files that it may be. Nothing is imported: the sources are read.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

Graph = dict[str, set[str]]

PACKAGE = Path(__file__).parent.parent / "fastbn"


def graph_of(package: Path) -> Graph:
    """The files of a package, by their dotted names, and those of its files that each imports."""
    files = {_name(path, package): path for path in sorted(package.rglob("*.py"))}
    return {name: _imports(path, set(files)) - {name} for name, path in files.items()}


def _name(path: Path, package: Path) -> str:
    parts = path.relative_to(package.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imports(path: Path, known: set[str]) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [n if n in known else node.module for n in names]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] == "import_module":
            names = _named(node.args[0], known)
        found |= {n for n in names if n in known}
    return found


def _named(name: ast.expr, known: set[str]) -> list[str]:
    """Files that a text stands for, or one that only begins with a text."""
    if isinstance(name, ast.Constant):
        return [str(name.value)]
    first = name.values[0] if isinstance(name, ast.JoinedStr) else None
    if not isinstance(first, ast.Constant):
        return []
    return [file for file in known if file.startswith(first.value)]


def circles(graph: Graph) -> list[list[str]]:
    """Groups of files each of which is reached from each other one (Tarjan 1972)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found = []

    def visit(file: str) -> None:
        index[file] = low[file] = len(index)
        stack.append(file)
        for other in sorted(graph[file]):
            if other not in index:
                visit(other)
            if other in stack:
                low[file] = min(low[file], low[other])
        if low[file] == index[file]:
            group = [stack.pop()]
            while group[-1] != file:
                group.append(stack.pop())
            if len(group) > 1:
                found.append(sorted(group))

    for file in sorted(graph):
        if file not in index:
            visit(file)
    return found


def floors(graph: Graph) -> dict[str, int]:
    """Of a graph without circles."""
    found: dict[str, int] = {}

    def floor(file: str) -> int:
        if file not in found:
            found[file] = 1 + max((floor(other) for other in graph[file]), default=-1)
        return found[file]

    for file in graph:
        floor(file)
    return found


def main() -> int:
    """Print the floors from the top, and what each file imports."""
    graph = graph_of(Path(sys.argv[1]) if len(sys.argv) > 1 else PACKAGE)
    found = circles(graph)
    print(f"{len(graph)} files, {sum(map(len, graph.values()))} arrows, {len(found)} circles {found or ''}")
    if not found:
        by_file = floors(graph)
        for level in sorted(set(by_file.values()), reverse=True):
            print(f"\nfloor {level}")
            for file in sorted(file for file, at in by_file.items() if at == level):
                imported = ", ".join(other.removeprefix("fastbn.") for other in sorted(graph[file]))
                print(f"  {file.removeprefix('fastbn.'):28} {imported}")
    return len(found)


if __name__ == "__main__":
    sys.exit(main())
