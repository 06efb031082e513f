"""Pages lead where they say, name what exists, and quote the figures of their tables."""

import importlib
import inspect
import json
import re

import pytest

import fastbn
from tests.pages import DOCS, ROOT, anchors, links, written

TEXTS = sorted(ROOT.glob("*.md")) + written()
README = ROOT / "README.md"

pytestmark = pytest.mark.skipif(not README.exists(), reason="installed without the README")


def read(path):
    return path.read_text(encoding="utf-8")


def name(path):
    return path.relative_to(ROOT).as_posix()


def dead(page):
    """Links of a page to files or headings that are not there; other servers are not asked."""
    found = []
    for link in links(read(page)):
        if re.match(r"https?://", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path) if path else page
        if not target.is_file() or (anchor and anchor not in anchors(read(target))):
            found.append(link)
    return found


@pytest.mark.parametrize("page", TEXTS, ids=name)
def test_links(page):
    assert dead(page) == []


def test_dead_links_are_found(tmp_path):
    page = tmp_path / "page.md"
    (tmp_path / "other.md").write_text("# One title: `x`, y\n")
    page.write_text(
        "# Here\n[a](other.md#one-title-x-y) [b](other.md#gone) ![c](no.png) [d](#here) `[e](code.md)` [f](x.md)"
    )
    assert dead(page) == ["other.md#gone", "no.png", "x.md"]


@pytest.mark.parametrize("page", TEXTS, ids=name)
def test_programs_that_are_named_exist(page):
    text = read(page)
    for module in re.findall(r"python -m ((?:benchmarks|tests)(?:\.\w+)+)", text):
        assert (ROOT / module.replace(".", "/")).with_suffix(".py").exists(), module
    for path in re.findall(r"\b((?:examples|benchmarks|tests|fastbn)/[\w/.-]+\.(?:py|cu|cuh))\b", text):
        assert path.endswith("/NAME.py") or (ROOT / path).exists(), path


# --- the README -------------------------------------------------------------------------------------------------------


def test_the_readme_is_short():
    text = read(README)
    assert text.count("\n") <= 130
    assert "missed" not in text.partition("## What changes")[0]
    assert not re.search(r"\| *missed *\|", text)


def test_gpus_are_not_mentioned_without_saying_what_has_run():
    """The first paragraph that names them says that nothing has run there, and leads to the page that says more."""
    first = next(part for part in read(README).split("\n\n") if re.search("CuPy|CUDA|GPU", part))
    assert re.search(r"\[not\s+yet run on a GPU\]\(docs/gpu\.md\)", first)


def test_the_two_commands_are_those_that_are_run():
    first, second = re.search(
        r"two commands do everything:\n\n```\n(.*?)\n(.*?)\n```", read(README), re.DOTALL
    ).groups()
    command = second.partition("#")[0].strip()
    assert command in read(ROOT / ".ci" / "run").splitlines()
    assert first.startswith("pip install . && fastbn ")


def test_the_readme_leads_to_every_page():
    known = {(README.parent / link.partition("#")[0]).resolve() for link in links(read(README))}
    included = {DOCS / "contributing.md", DOCS / "changelog.md", DOCS / "security.md", DOCS / "index.md"}
    pages = {page for page in written() if page.parent not in (DOCS / "gallery", DOCS / "api")}
    assert pages - included <= known


# --- figures ----------------------------------------------------------------------------------------------------------


def ratios_of_groups(function):
    """Geometric means beside NumPy, of each group of everyday calls but the nan forms."""
    rows = re.findall(rf"^\| (\w+) \| {function} \| numpy \| ([\d.]+) \|", read(DOCS / "statistics.md"), re.MULTILINE)
    return [float(ratio) for _, ratio in rows]


@pytest.mark.parametrize("page", [README, DOCS / "performance.md"], ids=name)
@pytest.mark.parametrize("function", ["mean", "var"])
def test_what_is_said_of_everyday_calls_is_what_the_table_has(page, function):
    quoted = re.search(
        r"`mean` (?:is )?([\d.]+) to ([\d.]+)(?: times as fast)?, `var` ([\d.]+) to ([\d.]+) times", read(page)
    )
    low, high = map(float, quoted.groups()[:2] if function == "mean" else quoted.groups()[2:])
    found = ratios_of_groups(function)
    assert len(found) >= 7
    assert low == pytest.approx(min(found), rel=0.1)
    assert high == pytest.approx(max(found), rel=0.1)


def test_the_tables_of_kernels_are_those_of_the_recorded_run():
    peers = pytest.importorskip("benchmarks.peers", reason="installed without the benchmarks")
    recorded = json.loads(read(ROOT / "benchmarks" / "results" / "peers-epyc-avx2-2-cores.json"))
    speeds, figures = peers.markdown(recorded).split("\n\n")
    page = read(DOCS / "performance.md")
    assert speeds in page
    assert figures in page
    assert "| missed |" in figures


QUOTED = {
    "forward NCHW from 1 MB, times PyTorch": "channels-first forward {} times",
    "backward NCHW from 1 MB, times PyTorch": "backward {} times as fast",
    "forward NHWC above 32 MB, times PyTorch": "channels-last above 32 MB {} and",
    "backward NHWC above 32 MB, times PyTorch": "and {} times, inference",
    "inference above 32 MB, times PyTorch": "inference {} times |",
    "inference below 32 MB, times PyTorch": "inference below 32 MB {} times",
    "any case not within its limit, times PyTorch, worst": "single cases down to {} times",
    "float16 with out=, times PyTorch": "{} times PyTorch with `out=`",
    "(1, 8, 16) forward, times PyTorch": "forward {} times, inference",
    "(1, 8, 16) inference, times PyTorch": "inference {} times PyTorch",
}


@pytest.mark.parametrize("figure", QUOTED)
def test_what_is_said_in_short_is_what_the_table_has(figure):
    page = read(DOCS / "performance.md")
    (measured,) = re.findall(rf"^\| {re.escape(figure)} \| ([\d.]+) \|", page, re.MULTILINE)
    assert QUOTED[figure].format(f"{float(measured):.2g}") in page.partition("## Kernels")[0]


def test_what_the_readme_says_of_frameworks_is_what_the_tables_have():
    text, steps, calls = read(README), read(DOCS / "pytorch_steps.md"), read(DOCS / "performance.md")
    layers = dict(
        re.findall(r"^\| \((\d+, 64, 56, 56)\) contiguous \| training \|.*\| ([\d.]+)x \|$", steps, re.MULTILINE)
    )
    small, large = (f"{float(layers[f'{n}, 64, 56, 56']):.1f} times" for n in (16, 64))
    assert f"16x64x56x56 is {small} as fast, of 64x64x56x56 {large}" in text
    times = dict(re.findall(r"^\| (fastbn.jax|XLA's own)[^|]*, NHWC \| (\d+ \| \d+) \|$", calls, re.MULTILINE))
    (ours_small, ours), (xla_small, xla) = (map(int, times[who].split(" | ")) for who in ("fastbn.jax", "XLA's own"))
    assert f"takes {ours / 1000:.1f} ms instead of XLA's {xla / 1000:.1f}" in text
    assert f"of 2x8x4x4 {ours_small} us instead of {xla_small}" in text


# --- the API and the gallery ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", ["fastbn", "threads", "torch", "jax", "dask", "distributed"])
def test_every_public_name_has_a_page(module):
    listed = set(re.findall(r"^   (\w+)$", read(DOCS / "api" / f"{module}.rst"), re.MULTILINE))
    full = "fastbn" if module == "fastbn" else f"fastbn.{module}"
    try:
        package = importlib.import_module(full)
    except ImportError as error:
        pytest.skip(str(error))
    public = getattr(package, "__all__", None) or [
        name
        for name, value in vars(package).items()
        if inspect.isfunction(value) and value.__module__ == full and name[0] != "_"
    ]
    assert listed == set(public)


def test_every_program_with_a_picture_has_a_page():
    drawn = {picture.stem for picture in (ROOT / "examples").glob("*.png")}
    pages = {page.stem for page in (DOCS / "gallery").glob("*.md")} - {"index"}
    assert pages == drawn
    cards = re.search(r"```\{gallery\}\n(.*?)```", read(DOCS / "gallery" / "index.md"), re.DOTALL)[1].split()
    assert set(cards) == drawn


def test_the_version_that_is_cited():
    assert f"\nversion: {fastbn.__version__}\n" in read(ROOT / "CITATION.cff")
