"""The digits network trained by several processes: ``mpirun -n 4 python examples/mpi_training.py``.

Each rank has its own part of every mini-batch, of 60 images: 30, 20, 10 and none at all. Batch norm's statistics are
those of the whole batch, exchanged by `fastbn.distributed.mpi_gather`; gradients are added over the ranks. So all
ranks do what one process would with the whole batch, and end with its weights but for the rounding of sums that are
added in another order. Rank 0 trains alone as well, and prints how far apart the two are.

Source: synchronised batch norm, as in Peng et al. (2018), "MegDet: a large mini-batch object detector", section 3.3.
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Sequence

import numpy as np
from digits import BASE_RATE, BATCH, NORMALIZED, Layer, accuracy_of, infer, initial_layers, load, train_step
from mpi4py import MPI
from threadpoolctl import threadpool_limits

from fastbn.distributed import mpi_gather


def shares(ranks: int) -> list[int]:
    """Images of each rank in a batch: fewer and fewer, the last of several ranks has none."""
    weights = np.arange(ranks - 1, -1, -1) if ranks > 1 else np.ones(1)
    sizes = np.floor(BATCH * weights / weights.sum()).astype(int)
    sizes[0] += BATCH - sizes.sum()
    return [int(size) for size in sizes]


def train(communicator: MPI.Comm | None, steps: int) -> list[Layer]:
    """The layers after so many steps; without a communicator in one process, on whole batches."""
    images, _, labels, _ = load()
    rng = np.random.default_rng(0)
    layers = initial_layers(NORMALIZED, 0.1, rng)
    if communicator is not None:
        sizes, gather = shares(communicator.size), mpi_gather(communicator)
        mine = slice(sum(sizes[: communicator.rank]), sum(sizes[: communicator.rank + 1]))

        def summed(array: np.ndarray) -> np.ndarray:
            return communicator.allreduce(array)

    for _ in range(steps):
        batch = rng.choice(len(images), BATCH, replace=False)  # the same on every rank
        if communicator is None:
            train_step(layers, images[batch], labels[batch], BASE_RATE)
        else:
            part = batch[mine]
            train_step(layers, images[part], labels[part], BASE_RATE, BATCH, gather, summed)
    return layers


def vector(layers: Sequence[Layer]) -> np.ndarray:
    """All weights and statistics."""
    arrays = (a for layer in layers for a in (layer.weight, layer.bias, layer.gamma, layer.mean, layer.var))
    return np.concatenate([a.ravel() for a in arrays if a is not None])


def main(argv: Sequence[str] | None = None) -> None:
    """Train on all ranks, then on one, and compare."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--quick", action="store_true", help="50 steps")
    options = parser.parse_args(argv)
    steps = 50 if options.quick else options.steps
    communicator = MPI.COMM_WORLD
    with threadpool_limits(1):
        layers = train(communicator, steps)
        digests = communicator.gather(hashlib.sha256(vector(layers)).hexdigest())
        if communicator.rank > 0:
            return
        alone = train(None, steps)
        _, images, _, labels = load()
        difference = np.abs(vector(layers) - vector(alone)).max() / np.abs(vector(alone)).max()
        print(f"{communicator.size} ranks with {shares(communicator.size)} of {BATCH} images, {steps} steps")
        print(f"ranks with the same bits: {digests.count(digests[0])}")
        print(f"largest difference from one process, over the largest weight: {difference:.1e}")
        print(
            f"test accuracy: {accuracy_of(infer(layers, images)[0], labels):.1%}, "
            f"one process {accuracy_of(infer(alone, images)[0], labels):.1%}"
        )


if __name__ == "__main__":
    main()
