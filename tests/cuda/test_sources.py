"""Kernels and the headers that they include: one text for a compiler that sees no other files."""

import re

import pytest

from tests import cuda_compile
from tests.conftest import missing
from tests.simt import simt

launch = pytest.importorskip("fastbn.cuda.launch", reason="CuPy cannot be imported")
KERNELS = [file.name.removesuffix(".cu") for file in launch.KERNELS.iterdir()]
HEADERS = [file.name for file in launch.INCLUDE.iterdir()]


def parts(text):
    """Files whose lines are in a text, as often as they begin."""
    return re.findall(r'^#line 1 "(.*)"$', text, re.MULTILINE)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("hardware", [True, False])
def test_each_header_once(kernel, hardware):
    text = launch.source(kernel, hardware=hardware)
    found = parts(text)
    assert found[0] == f"{kernel}.cu"
    assert sorted(found) == sorted(set(found))
    assert "#include" not in text
    assert ("device.cuh" in found) == hardware


def test_every_header_is_included_and_guarded():
    assert {name for kernel in KERNELS for name in parts(launch.source(kernel))} - {f"{k}.cu" for k in KERNELS} == {
        *HEADERS
    }
    for name in HEADERS:
        assert launch.INCLUDE.joinpath(name).read_text().count("\n#pragma once\n") == 1


MACROS = {
    "DTYPE": 2, "VECTOR": 4, "ALONG_CHANNELS": 0, "RUN": 0, "LANES": 1, "THREADS": 64, "ITEMS_PER_THREAD": 2, "WIDE": 0,
}  # fmt: skip
OPTIONS = {"WEIGHT": 0, "RELU": 0, "RESIDUAL": 0, "CLUSTER": 1, "MIN_BLOCKS": 1}
OPTIONS |= {"ALONG_KEPT": 0, "REDUCED": 2, "IN_FLOAT64": 0, "SUMS": 1, "SQUARES": 1, "MASK": 1, "SKIP_NAN": 1}


@pytest.mark.parametrize("header", HEADERS)
def test_headers_include_what_they_need(tmp_path, monkeypatch, request, header):
    """Alone in a text, each compiles."""
    if reason := cuda_compile.available():
        missing(request, reason)
    (tmp_path / "alone.cu").write_text(f'#include "{header}"\nextern "C" __global__ void alone() {{}}\n')
    monkeypatch.setattr(launch, "KERNELS", tmp_path)
    defined = tuple(f"-D{name}={value}" for name, value in (MACROS | OPTIONS).items())
    options = (*launch.COMPILER_OPTIONS, *defined, *cuda_compile.for_ptx(cuda_compile.options_of_cupy(80)))
    cuda_compile._compile(launch.source.__wrapped__("alone"), options, "ptx")


@pytest.mark.parametrize("where", ["wrong.cu", "broken.cuh"])
def test_messages_name_the_file_and_line(tmp_path, monkeypatch, request, where):
    """Of the harness as of NVRTC, behind headers and within them."""
    if reason := simt.available():
        missing(request, reason)
    for name in ("wrong.cu", "broken.cuh"):
        (tmp_path / name).write_text(f"\n\n{'nonsense' * (name == where)};\n")
    text = (tmp_path / "wrong.cu").read_text()
    (tmp_path / "wrong.cu").write_text(f'#include "broken.cuh"\n{text}')
    monkeypatch.setattr(launch, "KERNELS", tmp_path)
    monkeypatch.setattr(launch, "INCLUDE", tmp_path)
    line = 4 if where == "wrong.cu" else 3
    text = launch.source.__wrapped__("wrong", hardware=False)
    with pytest.raises(simt.CompileError, match=rf"{re.escape(where)}:{line}:\d+: error: .*nonsense"):
        simt.compile_kernel(text, "wrong", {})
    if cuda_compile.available() is None:
        from cupy.cuda import compiler

        with pytest.raises(compiler.CompileException, match=rf"{re.escape(where)}\({line}\): error"):
            cuda_compile._compile(text, ("-arch=compute_80",), "ptx")
