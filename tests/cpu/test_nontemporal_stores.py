"""Stores past the caches, as LLVM was asked for them, are there in the machine code: it may forget the hint."""

import platform

import pytest

from tests import interpreters

PROGRAM = """
    import re, sys
    import ml_dtypes
    import numpy as np
    import fastbn
    from fastbn.cpu import memory
    from fastbn.cpu.kernels import compiler
    optimized, compiled = compiler._optimized, []

    def kept(module, symbol, machine):
        module = optimized(module, symbol, machine)
        compiled.append((symbol, str(module), machine.emit_assembly(module)))
        return module

    compiler._optimized = kept
    memory.CACHE_SHARE = 0  # all outputs are written so
    dtype = np.dtype(getattr(ml_dtypes, sys.argv[1]) if sys.argv[1] == "bfloat16" else sys.argv[1])
    for shape, axis in ((32, 64, 14, 14), 1), ((32, 14, 14, 64), -1):
        x = np.random.default_rng(0).standard_normal(shape).astype(dtype)
        for options in ({}, {"activation": "relu", "residual": x}):
            y, saved = fastbn.batch_norm(x, channel_axis=axis, **options)
            fastbn.batch_norm_backward(x, saved)
            fastbn.batch_norm_inference(x, saved.mean, saved.moments.var(), channel_axis=axis, **options)
    size = {"half": 2, "i16": 2, "float": 4, "double": 8, "i64": 8}
    asked = re.compile(r"store <(\\d+) x (\\w+)>[^\\n]*!nontemporal")
    for symbol, text, assembly in compiled:
        found = asked.findall(text)
        stores = sum(int(lanes) * size[kind] // 16 for lanes, kind in found)  # of 16 bytes, as aligned
        print(symbol, stores, len(re.findall(r"\\bv?movnt\\w+", assembly)))
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="instructions are named as on x86-64")
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_every_one_is_there(dtype, tmp_path):
    command = interpreters.python(PROGRAM, dtype)
    printed = interpreters.run(command, timeout=600, NUMBA_CACHE_DIR=tmp_path)  # code from a cache has no text
    kernels = [line.split() for line in printed.splitlines()]
    assert sum(int(asked) > 0 for _, asked, _ in kernels) >= 4
    assert [(name, asked) for name, asked, there in kernels if asked != there] == []
