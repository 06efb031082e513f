"""What the compiled kernels execute: instructions for 16 bytes, fences between blocks."""

import re

import pytest

from tests import cuda_compile, cuda_instructions, cuda_variants
from tests.support import one_in, some_slow

pytestmark = pytest.mark.skipif(cuda_compile.available() is not None, reason=str(cuda_compile.available()))

MOST = {
    ("forward", "float32", "rows"): 53, ("forward", "float16", "rows"): 86,
    ("backward", "float32", "rows"): 58, ("backward", "float16", "rows"): 125,
    ("normalize", "float32", "rows"): 19, ("normalize", "float16", "rows"): 40,
    ("statistics", "float32", "rows"): 35, ("statistics", "float16", "rows"): 46,
    ("forward", "float32", "columns"): 36, ("forward", "float16", "columns"): 91,
    ("backward", "float32", "columns"): 51, ("backward", "float16", "columns"): 136,
    ("normalize", "float32", "columns"): 15, ("normalize", "float16", "columns"): 37,
    ("statistics", "float32", "columns"): 22, ("statistics", "float16", "columns"): 50,
    ("forward", "float32", "runs"): 52, ("forward", "float16", "runs"): 90,
    ("backward", "float32", "runs"): 54, ("backward", "float16", "runs"): 138,
    ("normalize", "float32", "runs"): 15, ("normalize", "float16", "runs"): 36,
}  # fmt: skip
"""For 16 bytes, sm_90, NVRTC 13.0; runs are of rows of 49 elements."""
WAYS = {
    "rows": {"ALONG_CHANNELS": False, "RUN": False},
    "columns": {"ALONG_CHANNELS": True, "RUN": False},
    "runs": {"ALONG_CHANNELS": False, "RUN": True},
}
CACHE = 32 << 10
"""Bytes of instructions, less than any multiprocessor's cache of them has; an instruction has 16."""


def variant_of(kernel, dtype, **macros):
    return next(
        v
        for v in cuda_instructions.full(90)
        if (v.kernel, cuda_variants.DTYPES[v["DTYPE"]]) == (kernel, dtype)
        and all((v[name] > 0) == wanted for name, wanted in macros.items())
    )


WORDS = ("forward", "backward", "normalize", "statistics"), ("float32", "float16"), ("rows", "columns", "runs")
CASES = [  # by default a quarter, with each word
    pytest.param(*case, marks=pytest.mark.slow if sum(map(tuple.index, WORDS, case)) % 4 else ()) for case in MOST
]


@pytest.mark.parametrize(("kernel", "dtype", "way"), CASES)
def test_instructions(kernel, dtype, way):
    variant = variant_of(kernel, dtype, **WAYS[way])
    count = cuda_instructions.for_16_bytes(variant, 90)
    assert MOST[kernel, dtype, way] * 0.6 < count <= MOST[kernel, dtype, way]


def complaints(variant, change=cuda_instructions.without_flush, architecture=90):
    """Of loops over vectors."""
    loops = cuda_instructions.loops_over_vectors(variant, cuda_compile.disassembly(variant, architecture, change))
    found = [] if len(loops) == (2 if all(variant.transfers) and variant.kernel != "normalize" else 1) else ["loops"]
    for loop in loops:
        found += [name for name in ("LDC", "BSSY", "LDL", "STL") if loop.has(name)]
        found += ["size"] if 16 * len(loop.instructions) > CACHE else []
    return found


@one_in(4, kernel=["forward", "backward", "normalize"], way=["rows", "columns"])
def test_loops_have_nothing_but_their_work(kernel, way):
    """No constants loaded again, no divergent branches, nothing in local memory; they fit the cache of instructions."""
    for dtype in ("float16", "float32"):
        assert complaints(variant_of(kernel, dtype, **WAYS[way])) == []


def test_conditions_on_each_vector_are_found():
    variant = variant_of("normalize", "float16", **WAYS["rows"])
    partial = ("take(v, ITEMS_PER_THREAD);", "take(v, tile.within(v));")
    assert complaints(variant, lambda text: text.replace(*partial)) != []


def test_numbers_of_other_blocks_are_loaded_strongly():
    """Past the first-level cache: each of a partial's four, and three that normalisation takes."""
    code = cuda_compile.disassembly(variant_of("forward", "float32", **WAYS["rows"]), 90)
    assert len(re.findall(r"\bLDG\.E\.64\.STRONG", code)) >= 7
    plain = lambda text: text.replace("*reinterpret_cast<const volatile double*>(at)", "*at")  # noqa: E731
    weak = cuda_compile.disassembly(variant_of("forward", "float32", **WAYS["rows"]), 90, plain)
    assert not re.findall(r"\bLDG\.E\.64\.STRONG", weak)


FENCE = "__threadfence();"


@one_in(2, kernel=["forward", "backward"], architecture=[80, 90])
def test_blocks_that_wait_are_fenced(kernel, architecture):
    variant = variant_of(kernel, "float32", RUN=False, ALONG_CHANNELS=False)
    assert cuda_instructions.unordered(cuda_compile.disassembly(variant, architecture)) == []


CHANGES = {
    "no fence before it arrives": lambda text: text.replace(FENCE, "", 1),
    "no fence after it has waited": lambda text: "".join(text.rsplit(FENCE, 1)),
    "no atomic operation": lambda text: text.replace("atomicAdd(counter, 1u);", "*counter += 1;"),
}


@pytest.mark.parametrize("complaint", some_slow(CHANGES, ["no fence after it has waited"]))
def test_missing_fences_are_found(complaint):
    change = CHANGES[complaint]
    variant = variant_of("forward", "float32", RUN=False, ALONG_CHANNELS=False)
    assert complaint in cuda_instructions.unordered(cuda_compile.disassembly(variant, 90, change))
