"""The blocks of code in the documentation print what they say, where what they import is installed.

Those on CuPy arrays run on the CPU, by `tests.simt`.
"""

import doctest
import re

import pytest

from tests.pages import DOCS, all_blocks, blocks, written

IMPORTED = re.compile(r"^(?:>>> )?(?:import|from) ([\w.]+)", re.MULTILINE)
VERSION = re.compile(r"PyTorch is (\d+\.\d+)\.")  # how a page says of which version its lines are


def is_pytorchs(code):
    return bool(re.search(r"\btorch\b", code))


def sections():
    """Of each section its blocks of NumPy's and of PyTorch's, after those that stand before the first section.

    Of a page whose sections have none, those before them.
    """
    found = []
    for page in written():
        name = page.relative_to(DOCS).with_suffix("").as_posix()
        start, *rest = re.split(r"^## ", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
        version = VERSION.search(start)
        given = blocks(start)
        common = [code for code in given if not is_pytorchs(code)]
        later = [code for section in rest for code in blocks(section)]
        if given and not later:
            found.append(pytest.param(given, None, id=name))
        elif common and all(map(is_pytorchs, later)):
            found.append(pytest.param(common, None, id=name))
        for section in rest:
            heading = section.partition("\n")[0]
            numpys = [code for code in blocks(section) if not is_pytorchs(code)]
            pytorchs = [code for code in blocks(section) if is_pytorchs(code)]
            if numpys:
                found.append(pytest.param([*common, *numpys], None, id=f"{name}: {heading}"))
            if pytorchs:
                wanted = version and version[1]
                found.append(pytest.param([*given, *pytorchs], wanted, id=f"{name}: {heading}, PyTorch"))
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
def test_blocks(codes, version, request):
    imported = IMPORTED.findall("".join(codes))
    if "cupy" in imported:
        request.getfixturevalue("cuda_device")
    for module in imported:
        pytest.importorskip(module)
    if any(map(is_pytorchs, codes)):
        torch = pytest.importorskip("torch")
        if version is not None and not torch.__version__.startswith(f"{version}."):
            pytest.skip(f"the page is on PyTorch {version}, installed is {torch.__version__}")
    names = {}
    for code in codes:
        run(code, names)


def test_what_is_not_run_is_python_and_says_why():
    skipped = [block for page in written() for block in all_blocks(page.read_text(encoding="utf-8")) if block.not_run]
    assert len(skipped) <= 2
    for block in skipped:
        assert len(block.not_run.split()) > 5
        compile(block.code, "block", "exec")


def test_every_kind_of_array_has_a_page_whose_code_is_run():
    names = {parameters.id for parameters in sections()}
    assert {f"start/{kind}" for kind in ("numpy", "cupy", "pytorch", "jax", "dask", "mpi")} <= names


def test_wrong_output_is_seen():
    with pytest.raises(AssertionError, match="Got:"):
        run(">>> 1 + 1\n3\n", {})


def test_blocks_without_prompts_are_executed():
    names = {}
    run("def double(x):\n    return 2 * x\n", names)
    run(">>> double(2)\n4\n", names)
    with pytest.raises(ZeroDivisionError):
        run("1 / 0\n", names)
