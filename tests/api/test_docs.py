"""The blocks of code in ``docs/*.md`` print what they say, where what they import is installed."""

import doctest
import re

import pytest

from tests.pages import DOCS, blocks

IMPORTED = re.compile(r"^(?:>>> )?(?:import|from) ([\w.]+)", re.MULTILINE)
VERSION = re.compile(r"PyTorch is (\d+\.\d+)\.")  # how a page says of which version its lines are


def is_pytorchs(code):
    return bool(re.search(r"\btorch\b", code))


def sections():
    """Of each section its blocks of NumPy's and of PyTorch's, after those that stand before the first section.

    Of a page whose sections have none, those before them.
    """
    found = []
    for page in sorted(DOCS.glob("*.md")):
        start, *rest = re.split(r"^## ", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
        version = VERSION.search(start)
        common = [code for code in blocks(start) if not is_pytorchs(code)]
        if common and not any(map(blocks, rest)):
            found.append(pytest.param(common, None, id=page.stem))
        for section in rest:
            heading = section.partition("\n")[0]
            numpys = [code for code in blocks(section) if not is_pytorchs(code)]
            pytorchs = [code for code in blocks(section) if is_pytorchs(code)]
            if numpys:
                found.append(pytest.param([*common, *numpys], None, id=f"{page.stem}: {heading}"))
            if pytorchs:
                given = blocks(start), version and version[1]
                found.append(pytest.param([*given[0], *pytorchs], given[1], id=f"{page.stem}: {heading}, PyTorch"))
    return found


def run(code, names):
    if ">>> " not in code:
        exec(compile(code, "block", "exec"), names)
        return
    test = doctest.DocTestParser().get_doctest(code, names, "block", None, 0)
    assert test.examples
    test.globs = names  # not a copy: functions see what later blocks change
    report = []
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    runner.run(test, out=report.append, clear_globs=False)
    assert not report, "".join(report)


@pytest.mark.parametrize(("codes", "version"), sections())
def test_blocks(codes, version):
    for module in IMPORTED.findall("".join(codes)):
        pytest.importorskip(module)
    if any(map(is_pytorchs, codes)):
        torch = pytest.importorskip("torch")
        if version is not None and not torch.__version__.startswith(f"{version}."):
            pytest.skip(f"the page is on PyTorch {version}, installed is {torch.__version__}")
    names = {}
    for code in codes:
        run(code, names)


def test_wrong_output_is_seen():
    with pytest.raises(AssertionError, match="Got:"):
        run(">>> 1 + 1\n3\n", {})


def test_blocks_without_prompts_are_executed():
    names = {}
    run("def double(x):\n    return 2 * x\n", names)
    run(">>> double(2)\n4\n", names)
    with pytest.raises(ZeroDivisionError):
        run("1 / 0\n", names)
