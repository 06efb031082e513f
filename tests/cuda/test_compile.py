"""Every CUDA kernel compiles well for every architecture: no spills, whole vectors, registers for its blocks."""

import itertools

import pytest

from tests import cuda_compile, cuda_variants
from tests.cuda_statistics_variants import of_statistics
from tests.cuda_variants import CHIPS, Variant

pytestmark = pytest.mark.skipif(cuda_compile.available() is not None, reason=str(cuda_compile.available()))

KERNELS = (
    "statistics", "finish_moments", "forward", "normalize", "grad_sums", "finish_sums", "backward", "grad_input",
    "update_running",
)  # fmt: skip
OF_STATISTICS = ("strided_statistics", "finish_strided")
OF_ARRAYS = [kernel for kernel in KERNELS if not kernel.startswith("finish") and kernel != "update_running"]
BY_DEFAULT = (80, 90)
WIDEST = (80, 90, 100)  # one of each generation of ptxas's choices


def check(architecture, kernel, variants):
    """Gates hold for those of a kernel."""
    if not cuda_compile.compiles_for(architecture):
        pytest.skip(f"this NVRTC does not compile for sm_{architecture}")
    found = []
    for variant in variants:
        if variant.kernel == kernel:
            complaints = cuda_compile.complaints(variant, cuda_compile.compiled(variant, architecture))
            found += [f"{variant}: {complaint}" for complaint in complaints]
    assert not found, f"for sm_{architecture}:\n" + "\n".join(found)


def each(architectures, kernels=KERNELS, *marks):
    pairs = itertools.product(architectures, kernels)
    cases = [pytest.param(n, kernel, marks=marks, id=f"sm_{n}-{kernel}") for n, kernel in pairs]
    return pytest.mark.parametrize(("architecture", "kernel"), cases)


@each(BY_DEFAULT)
def test_some_pairs_of_choices(architecture, kernel):
    """A part of them for either architecture, those of clusters where there are clusters; all of them are slow."""
    some = {n: [] for n in BY_DEFAULT}
    for i, variant in enumerate(sorted(cuda_variants.pairwise(90))):
        if i % 80 < 2:
            some[90 if variant["CLUSTER"] > 1 or i % 80 == 0 else 80].append(variant)
    check(architecture, kernel, some[architecture])


@each(CHIPS, KERNELS, pytest.mark.slow)
def test_every_pair_of_choices(architecture, kernel):
    check(architecture, kernel, cuda_variants.pairwise(architecture))


@each(BY_DEFAULT, OF_STATISTICS)
def test_some_statistics_of_arrays_as_they_lie(architecture, kernel):
    every = of_statistics(architecture)
    check(architecture, kernel, every[BY_DEFAULT.index(architecture) :: 72])


@each(CHIPS, OF_STATISTICS, pytest.mark.slow)
def test_statistics_of_arrays_as_they_lie(architecture, kernel):
    check(architecture, kernel, of_statistics(architecture))


@pytest.mark.parametrize("architecture", BY_DEFAULT, ids="sm_{}".format)
def test_all_that_statistics_are_divided_into_is_chosen_from(architecture):
    variants = [v for v in of_statistics(architecture) if v.kernel == "strided_statistics"]
    for name, values in {
        "DTYPE": {*range(13)},
        "VECTOR": {1, 2, 4, 8, 16},
        "ITEMS_PER_THREAD": {4, 8},
        "REDUCED": {1, 2, 3, 4},
    }.items():
        assert {v[name] for v in variants} == values
    for name in ("ALONG_KEPT", "IN_FLOAT64", "SUMS", "SQUARES", "MASK", "SKIP_NAN"):
        assert {v[name] for v in variants} == {0, 1}


@each(WIDEST, OF_ARRAYS, pytest.mark.slow)
def test_widest_kernels_with_each_option(architecture, kernel):
    check(architecture, kernel, cuda_variants.hot(architecture))


@pytest.mark.parametrize("architecture", BY_DEFAULT, ids="sm_{}".format)
def test_all_that_is_planned_is_chosen_from(architecture):
    from fastbn.cuda import launch, problems

    texts = {file.name.removesuffix(".cu") for file in launch.KERNELS.iterdir()}
    assert {*KERNELS, *OF_STATISTICS} == texts
    assert set(KERNELS) == {v.kernel for v in cuda_variants.pairwise(architecture)}
    assert {v.kernel for v in cuda_variants.hot(architecture)} == set(OF_ARRAYS)
    every = cuda_variants.planned(architecture)
    every, pairs = ([v for v in some if not v.of_numbers] for some in (every, cuda_variants.pairwise(architecture)))
    for name, values in {
        "DTYPE": {0, 1, 2, 3},
        "VECTOR": {1, 2, 4, 8},
        "ALONG_CHANNELS": {0, 1},
        "LANES": {1, 2, 4, 8, 16, 32} | {v["LANES"] for v in every if v["RUN"]},
        "RUN": {0, *cuda_variants.ROWS},
        "THREADS": {32, 64, 128, 256},
        "WIDE": {0, 1},
        "WEIGHT": {0, 1, 2, 3},
        "RELU": {0, 1, 2},
        "RESIDUAL": {0, 1},
        "CLUSTER": {1, 2, 4, 8} if problems.tuning_of(architecture).cluster > 1 else {1},
    }.items():
        assert {v[name] for v in every} == {v[name] for v in pairs} == values


def test_options_are_cupys():
    assert cuda_compile.options_of_cupy(90).count("-arch=sm_90") == 1


def test_the_argument_has_one_size():
    from fastbn.cuda import launch

    known = {"finish_sums": launch.TILES, "update_running": launch.RUNNING, "finish_strided": launch.STATISTICS}
    for kernel, params in known.items():
        assert cuda_compile.sizeof_params_is(kernel, params.nbytes)
        assert not cuda_compile.sizeof_params_is(kernel, params.nbytes - 8)


# --- the gates can fail -----------------------------------------------------------------------------------------------

MACROS = {
    "DTYPE": 2,
    "VECTOR": 4,
    "ALONG_CHANNELS": 0,
    "RUN": 0,
    "LANES": 1,
    "THREADS": 256,
    "ITEMS_PER_THREAD": 2,
    "WIDE": 0,
}
OPTIONS = {"WEIGHT": 0, "RELU": 0, "RESIDUAL": 0, "CLUSTER": 1, "MIN_BLOCKS": 1}
COPY = """
extern "C" __global__ void __launch_bounds__(THREADS) normalize(const uint4* x, uint4* y) {
    const int at = blockIdx.x * THREADS + threadIdx.x;
    for (int k = 0; k < ITEMS_PER_THREAD; ++k) {
        const uint4 v = x[at + k * 4096];
        y[at + k * 4096] = make_uint4(v.x + 1, v.y, v.z, v.w);
    }
}
"""


def rejected(text, architecture=90, kernel="normalize", **macros):
    variant = Variant(kernel, tuple((MACROS | OPTIONS | macros).items()))
    return "; ".join(cuda_compile.complaints(variant, cuda_compile.compiled(variant, architecture, text)))


def test_good_code_passes():
    assert rejected(COPY) == ""


def test_local_memory_is_rejected():
    indexed = "unsigned l[64]; for (int i = 0; i < 64; ++i) l[i + x[i].x & 63] = i;\nconst int at"
    text = COPY.replace("const int at", indexed).replace("v.x + 1", "l[v.x & 63]")
    assert "256 bytes of local memory" in rejected(text)


def test_narrow_loads_are_rejected():
    narrow = "const unsigned* f = (const unsigned*)x + 4 * at + k; const uint4 v = make_uint4(f[0], f[1], f[2], f[3])"
    assert "0 loads of 128 bits, not 2" in rejected(COPY.replace("const uint4 v = x[at + k * 4096]", narrow))


def test_narrow_stores_are_rejected():
    text = COPY.replace(
        "y[at + k * 4096] = make_uint4(", "unsigned* t = (unsigned*)y + 5 * at + k; t[0] = v.x; t[1] = ("
    )
    found = rejected(text)
    assert "0 stores of 128 bits, not 2" in found
    assert "narrower than 64 bits" in found


def test_the_wrong_block_is_rejected():
    assert "not made for blocks" in rejected(COPY.replace("(THREADS) normalize", "(128) normalize"))
    assert "not made for blocks" in rejected(COPY, CLUSTER=4)


def test_spills_are_rejected():
    from fastbn.cuda import launch

    assert "bytes of spills" in rejected(launch.source("forward"), kernel="forward", ITEMS_PER_THREAD=8, MIN_BLOCKS=6)


def test_subroutines_are_rejected():
    text = COPY.replace("v.x + 1", "v.x + (unsigned)(1.0 / (double)v.y)")
    assert "floating-point subroutines" in rejected(text)
