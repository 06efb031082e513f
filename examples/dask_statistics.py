"""Mean and variance of an array that is larger than memory: ``python examples/dask_statistics.py``.

20 GB of float32 images are made block by block, channels last, about a mean of 100 000 with a standard deviation of 1,
and forgotten again; what is kept of a block are three numbers a channel. Beside it dask's own variance of a twentieth
of them, and the exact one, which is that of the same numbers in float64. The progress bar is dask's.

Source: Chan, Golub and LeVeque (1979), "Updating formulae and a pairwise algorithm for computing sample variances".
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Sequence

import dask
import dask.array as da
import numpy as np
from dask.diagnostics import ProgressBar

import fastbn.dask

CHANNELS, SIDE, BLOCK = 16, 256, 32
AXES = (0, 1, 2)


def block(block_info: dict | None = None) -> np.ndarray:
    """The images of one block, seeded by its number."""
    assert block_info is not None
    number = block_info[None]["chunk-location"][0]
    shape = block_info[None]["chunk-shape"]
    return np.random.default_rng(number).standard_normal(shape, np.float32) + np.float32(100_000)


def images(count: int) -> da.Array:
    """So many, lazily."""
    blocks = (count // BLOCK * (BLOCK,), (SIDE,), (SIDE,), (CHANNELS,))
    return da.map_blocks(block, chunks=blocks, dtype=np.float32, meta=np.empty((0, 0, 0, 0), np.float32))


def error(found: np.ndarray, exact: np.ndarray) -> float:
    """The largest, relative."""
    return float(np.abs(found / exact - 1).max())


def main(argv: Sequence[str] | None = None) -> None:
    """Compute, and print times, errors and the most memory that was taken."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=20)
    parser.add_argument("--quick", action="store_true", help="an eighth of a gigabyte")
    options = parser.parse_args(argv)
    gigabytes = 0.125 if options.quick else options.gigabytes
    blocks = max(2, round(gigabytes * 1e9 / (BLOCK * CHANNELS * SIDE**2 * 4)))
    x = images(blocks * BLOCK)
    start = time.perf_counter()
    with ProgressBar(), dask.config.set(scheduler="threads"):
        mean, var = dask.compute(*fastbn.dask.mean_var(x, AXES))
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # kB on Linux
    print(
        f"{x.nbytes / 1e9:.1f} GB in {blocks} blocks: {seconds:.0f} s with making them, {peak:.2f} GB of memory at most"
    )
    print(f"mean {mean[:3]} ..., var {var[:3]} ...")

    few = images(max(2, blocks // 20) * BLOCK)
    ours, theirs, exact = dask.compute(
        fastbn.dask.var(few, AXES), da.var(few, AXES), da.var(few.astype(np.float64), AXES)
    )  # fmt: skip
    errors = f"error {error(ours, exact):.0e}, dask's own {error(theirs, exact):.0e}"
    print(f"relative to the variance of {few.nbytes / 1e9:.1f} GB in float64: {errors}")


if __name__ == "__main__":
    main()
