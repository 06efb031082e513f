"""The digits network trained by several processes: ``mpirun -n 4 python examples/mpi_training.py``.

Each rank has its own part of every mini-batch, of 60 images: 30, 20, 10 and none at all. Batch norm's statistics are
those of the whole batch, exchanged by `fastbn.distributed.mpi_gather`; gradients are added over the ranks. So all
ranks do what one process would with the whole batch, and end with its weights but for the rounding of sums that are
added in another order. Rank 0 trains alone as well, and prints how far apart the two are.

Source: synchronised batch norm, as in Peng et al. (2018), "MegDet: a large mini-batch object detector", section 3.3.
"""

import argparse
import hashlib
from collections.abc import Iterable, Sequence
from itertools import islice

import numpy as np
from digits import BASE_RATE, BATCH, NORMALIZED, batches, build
from gallery import Array, digits, one_blas_thread
from mpi4py import MPI
from network import SGD, BatchNorm, Layer, Network

from fastbn.distributed import mpi_gather


class ParallelNetwork(Network):
    """The same on every rank; each sees its part of a batch."""

    def __init__(self, layers: Iterable[Layer], communicator: MPI.Comm) -> None:
        super().__init__(layers)
        self.communicator = communicator

    def gradients(self) -> list[Array]:
        """The sums over the ranks: those of the whole batch."""
        return [self.communicator.allreduce(gradient) for gradient in super().gradients()]


def shares(ranks: int) -> list[int]:
    """Images of each rank in a batch: fewer and fewer, the last of several ranks has none."""
    weights = np.arange(ranks - 1, -1, -1) if ranks > 1 else np.ones(1)
    sizes = np.floor(BATCH * weights / weights.sum()).astype(int)
    sizes[0] += BATCH - sizes.sum()
    return [int(size) for size in sizes]


def train(communicator: MPI.Comm | None, steps: int) -> Network:
    """The network after so many steps; without a communicator in one process, on whole batches."""
    images, _, labels, _ = digits()
    of_weights, of_batches = np.random.default_rng(0).spawn(2)  # the same on every rank
    gather = None if communicator is None else mpi_gather(communicator)
    network, mine = build(NORMALIZED, 0.1, of_weights, gather=gather), slice(BATCH)
    if communicator is not None:
        network, sizes = ParallelNetwork(network.layers, communicator), shares(communicator.size)
        mine = slice(sum(sizes[: communicator.rank]), sum(sizes[: communicator.rank + 1]))
    optimizer = SGD(network, BASE_RATE)
    for batch in islice(batches(len(images), of_batches), steps):
        network.loss(images[batch[mine]], labels[batch[mine]], BATCH)
        optimizer.step()
    return network


def vector(network: Network) -> Array:
    """All weights and statistics."""
    statistics = [a for layer in network.layers if isinstance(layer, BatchNorm) for a in (layer.mean, layer.var)]
    return np.concatenate([a.ravel() for a in (*network.parameters(), *statistics)])


def main(argv: Sequence[str] | None = None) -> None:
    """Train on all ranks, then on one, and compare."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--quick", action="store_true", help="50 steps")
    options = parser.parse_args(argv)
    steps = 50 if options.quick else options.steps
    communicator = MPI.COMM_WORLD
    with one_blas_thread():
        network = train(communicator, steps)
        digests = communicator.gather(hashlib.sha256(vector(network)).hexdigest())
        if communicator.rank > 0:
            return
        alone = train(None, steps)
    _, images, _, labels = digits()
    difference = np.abs(vector(network) - vector(alone)).max() / np.abs(vector(alone)).max()
    accuracies = network.accuracy(images, labels), alone.accuracy(images, labels)
    print(f"{communicator.size} ranks with {shares(communicator.size)} of {BATCH} images, {steps} steps")
    print(f"ranks with the same bits: {digests.count(digests[0])}")
    print(f"largest difference from one process, over the largest weight: {difference:.1e}")
    print("test accuracy: {:.1%}, one process {:.1%}".format(*accuracies))


if __name__ == "__main__":
    main()
