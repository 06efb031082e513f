"""Changes of the compiled text, one instruction at a time: what runs must notice, whatever the order of threads."""

import functools

import pytest

from tests.conftest import missing
from tests.cuda.runs import RUNS
from tests.ptx import cuda, mutations
from tests.ptx.text import parsed

slow = pytest.mark.slow


@pytest.fixture(autouse=True)
def compiled(request):
    reason = cuda.available()
    if reason is not None:
        missing(request, reason)


@functools.cache
def of_run(name, architecture, kind):
    return tuple(mutations.mutations(RUNS[name], architecture, [kind]))


def unnoticed(name, architecture, every):
    return [m for m in every if mutations.noticed(RUNS[name], architecture, m.change) is None]


def told(missed):
    return "\n".join(f"{m.kind}: {m.kernel}, line {m.line}: {m.text}" for m in missed)


# Of each kind every instruction that the run executes.
ALL = [
    (80, "backward, block, rows", "barrier dropped", []),
    (90, "moments, rows", "barrier dropped", []),
    (90, "moments, runs", "barrier dropped", [slow]),
    (90, "forward, cooperative", "fence dropped", []),
    (80, "backward, cooperative", "fence dropped", [slow]),
    (90, "forward, cluster", "barrier of the cluster dropped", []),
    (80, "moments, rows", "store beside", []),
    (90, "backward, block, rows", "store beside", [slow]),
    (90, "forward, cooperative", "store beside", [slow]),
    (90, "backward, block, rows", "store dropped", [slow]),
]  # fmt: skip


@pytest.mark.parametrize(
    ("architecture", "name", "kind"),
    [pytest.param(*case, marks=marks, id="sm_{}-{}-{}".format(*case)) for *case, marks in ALL],
)
def test_each_is_noticed(architecture, name, kind):
    every = of_run(name, architecture, kind)
    assert every
    missed = unnoticed(name, architecture, every)
    if kind == "store dropped":  # the low part of a forward pass's centres is stored with the rest, and in a constant
        unread = [m for m in missed if m.kernel == "forward" and m.text.startswith("st.shared.f32")]
        assert len(unread) <= 1, told(unread)
        missed = [m for m in missed if m not in unread]
    assert not missed, told(missed)


@slow
def test_barriers_of_cooperative_launches():
    """Where two follow each other with nothing between that another thread sees, each is enough."""
    name, architecture = "forward, cooperative", 90
    missed = unnoticed(name, architecture, every := of_run(name, architecture, "barrier dropped"))
    for m in missed:
        code = [i for i in parsed(m.whole).code if i.opcode in ("bar", "ld", "st", "atom") and ".param" not in i.name]
        at = next(k for k, i in enumerate(code) if i.line == m.line)
        assert "bar.sync" in (code[at - 1].name, code[at + 1].name), told([m])
    assert len(missed) < len(every) / 2


# Many of these change nothing: a branch to careful arithmetic that comes to the same, numbers
# of a tile that is the first one. Of those that are left most must be noticed.
MOST = {"branch turned": 0.6, "load beside": 0.6, "sum as difference": 0.5}


@pytest.mark.parametrize("kind", MOST)
@pytest.mark.parametrize("every", [pytest.param(15, id="some"), pytest.param(1, id="all", marks=slow)])
def test_most_are_noticed(kind, every):
    chosen = of_run("forward, block, rows, all", 90, kind)[::every]
    missed = unnoticed("forward, block, rows, all", 90, chosen)
    assert len(missed) <= (1 - MOST[kind]) * len(chosen), told(missed)


@slow
def test_halves_cut_off_are_noticed():
    """By the matrix's bounds: half a unit in the last place."""
    every = of_run("moments, wide columns", 90, "narrowed towards 0")
    assert every == ()  # it writes no halves
    every = of_run("frozen, float16 parameters", 90, "narrowed towards 0")
    run = "inference, more channels than threads"
    every = of_run(run, 90, "narrowed towards 0")
    assert every
    assert not unnoticed(run, 90, every[:2])


def test_a_change_is_of_one_instruction():
    (m, *_) = of_run("moments, rows", 90, "branch turned")
    before, after = m.whole.split("\n"), m.source.split("\n")
    assert [k for k, (a, b) in enumerate(zip(before, after, strict=True), 1) if a != b] == [m.line]
    assert m.change("statistics", m.whole) == m.source
    assert m.change("another", "text") == "text"


def test_without_a_change_nothing_is_noticed():
    for name in {name for _, name, _, marks in ALL if not marks} | {"forward, block, rows, all"}:
        assert mutations.noticed(RUNS[name], 90) is None
