"""What the compiled kernels execute: instructions for 16 bytes, fences between blocks."""

import pytest

from tests import cuda_compile, cuda_instructions, cuda_variants

pytestmark = pytest.mark.skipif(cuda_compile.available() is not None, reason=str(cuda_compile.available()))

MOST = {
    ("forward", "float16"): 225, ("backward", "float16"): 365, ("normalize", "float16"): 95,
    ("forward", "float32"): 150, ("backward", "float32"): 160, ("normalize", "float32"): 70,
}  # fmt: skip
"""For rows of 49 elements; loads of single elements took 561, 790, 408, 265, 370 and 192 (sm_90, NVRTC 13.0)."""


def variant_of(kernel, dtype, **macros):
    return next(
        v
        for v in cuda_instructions.full(90)
        if (v.kernel, cuda_variants.DTYPES[v["DTYPE"]]) == (kernel, dtype)
        and all((v[name] > 0) == wanted for name, wanted in macros.items())
    )


@pytest.mark.parametrize(("kernel", "dtype"), MOST)
def test_instructions_of_odd_rows(kernel, dtype):
    variant = variant_of(kernel, dtype, RUN=True)
    count = cuda_instructions.for_16_bytes(variant, 90)
    assert MOST[kernel, dtype] * 0.6 < count <= MOST[kernel, dtype]


FENCE = "__threadfence();"


@pytest.mark.parametrize("kernel", ["forward", "backward"])
@pytest.mark.parametrize("architecture", [80, 90])
def test_blocks_that_wait_are_fenced(kernel, architecture):
    variant = variant_of(kernel, "float32", RUN=False, ALONG_CHANNELS=False)
    assert cuda_instructions.unordered(cuda_compile.disassembly(variant, architecture)) == []


CHANGES = {
    "no fence before it arrives": lambda text: text.replace(FENCE, "", 1),
    "no fence after it has waited": lambda text: "".join(text.rsplit(FENCE, 1)),
    "no atomic operation": lambda text: text.replace("atomicAdd(counter, 1u);", "*counter += 1;"),
}


@pytest.mark.parametrize(("complaint", "change"), CHANGES.items(), ids=CHANGES)
def test_missing_fences_are_found(complaint, change):
    variant = variant_of("forward", "float32", RUN=False, ALONG_CHANNELS=False)
    assert complaint in cuda_instructions.unordered(cuda_compile.disassembly(variant, 90, change))
