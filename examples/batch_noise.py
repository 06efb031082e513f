"""The noise of batches as a regulariser: the gap between training and test accuracy, by the size of batches.

With batch norm a training example is "seen in conjunction with other examples in the mini-batch", its output is not a
function of the example alone, and the paper found "this effect to be advantageous to the generalization of the network"
(Ioffe & Szegedy, section 3.4). If so, batch norm's gap depends on how many samples share their statistics. Small
batches have noisy gradients as well, so there are three networks, of two layers of 100 relu units, on few digits, so
that they learn their 192 samples by heart:

- plain: batches of 4 to 192 samples; gradients alone are noisy
- batch norm: batches of 4 to 192 samples; gradients and statistics are
- groups: all 192 samples in each step, whose statistics are those of groups of 4 to 192, other ones each time
  ("ghost batches", Hoffer et al. 2017); statistics alone are noisy

All take as many steps. The noise is measured: the standard deviation of a sample's logits over other samples beside
it, beside the logits' own. The gap is compared seed by seed, each with other training samples, with that of the same
network where all 192 are in one batch.

It shows, and groups say that statistics do it, not gradients. It is a matter of size: at 4 samples batch norm's noise
is half of the logits and does harm, and with all 192 in a batch the gap is that of the plain network.

Run ``python examples/batch_noise.py`` (a minute or two; ``--quick``: seconds).

Sources: Ioffe & Szegedy, "Batch Normalization: Accelerating Deep Network Training by Reducing Internal Covariate
Shift", ICML 2015, section 3.4. Hoffer, Hubara & Soudry, "Train longer, generalize better", NeurIPS 2017.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from exact import ExactBatchNorm
from gallery import BLUE, GREEN, ORANGE, Array, digits, one_thread, options, panels, progress, save, table
from network import SGD, Dense, Layer, Network, ReLU

import fastbn

UNITS, SAMPLES, RATE = 100, 192, 0.1
SIZES = (4, 8, 16, 32, 64, 192)  # divide the samples
PLAIN, NORMALIZED, GROUPS = "plain", "batch norm", "groups"
COLOURS = {PLAIN: ORANGE, NORMALIZED: BLUE, GROUPS: GREEN}


class GroupBatchNorm(ExactBatchNorm):
    """In training each so many consecutive samples have their own statistics, as if they were a batch."""

    def __init__(self, channels: int, group: int) -> None:
        super().__init__(channels, eps=1e-5)
        self.group = group

    def forward(self, x: Array, training: bool) -> Array:
        if not training:
            return super().forward(x, training)
        groups = x.reshape(-1, self.group, x.shape[1])
        y, self.saved = fastbn.batch_norm(groups, self.gamma, self.beta, channel_axis=(0, 2))
        whole = fastbn.moments(x, channel_axis=-1)
        fastbn.update_running(self.mean, self.var, whole, out=(self.mean, self.var))
        return y.reshape(x.shape)

    def backward(self, dy: Array) -> Array:
        dx, dgamma, dbeta, _ = fastbn.batch_norm_backward(dy.reshape(self.saved.x.shape), self.saved)
        self.gradients = {"gamma": dgamma.sum(axis=0), "beta": dbeta.sum(axis=0)}
        return dx.reshape(dy.shape)


class Run(NamedTuple):
    training: float  # accuracies, in %
    test: float
    noise: float


Runs = dict[str, dict[int, list[Run]]]  # by network and size: a run per seed


def build(name: str, size: int, rng: np.random.Generator) -> Network:
    """Every batch is a group where there are batches."""
    layers: list[Layer] = []
    for inputs, units in pairwise((64, UNITS, UNITS)):
        layers.append(Dense(inputs, units, (2 / inputs) ** 0.5, rng, bias=name == PLAIN))
        layers += [ReLU()] if name == PLAIN else [GroupBatchNorm(units, size), ReLU()]
    return Network([*layers, Dense(UNITS, 10, UNITS**-0.5, rng)])


def noise(network: Network, x: Array, rng: np.random.Generator) -> float:
    """Standard deviation of a sample's logits in training over 20 divisions into groups, beside that of all logits."""
    logits = []
    for _ in range(20):
        order = rng.permutation(len(x))
        logits.append(network.forward(x[order], training=True)[np.argsort(order)])
    return float(np.mean(np.std(logits, axis=0)) / np.std(logits))


def train(name: str, size: int, steps: int, seed: int, x: Array, labels: Array) -> Run:
    """The same samples and initial weights for every network and size; the samples left over are the test's."""
    of_samples, of_weights, of_batches = np.random.default_rng(seed).spawn(3)
    chosen = np.isin(np.arange(len(x)), of_samples.choice(len(x), SAMPLES, replace=False))
    training, test = (x[chosen], labels[chosen]), (x[~chosen], labels[~chosen])
    network = build(name, size, of_weights)
    optimizer, count = SGD(network, RATE), 1 if name == GROUPS else SAMPLES // size
    for step in range(steps):
        if step % count == 0:
            parts = of_batches.permutation(SAMPLES).reshape(count, -1)
        part = parts[step % count]
        network.loss(training[0][part], training[1][part])
        optimizer.step()
    accuracies = (100 * network.accuracy(*samples) for samples in (training, test))
    return Run(*accuracies, noise(network, training[0], of_batches))


def gaps(runs: Sequence[Run]) -> Array:
    return np.array([run.training - run.test for run in runs])


def paired(by_size: dict[int, list[Run]], size: int) -> tuple[float, float]:
    """The gap less that of the largest size, over seeds: mean and standard error."""
    difference = gaps(by_size[size]) - gaps(by_size[max(by_size)])
    return float(difference.mean()), float(difference.std() / max(len(difference) - 1, 1) ** 0.5)


def report(runs: Runs) -> None:
    rows = []
    for name, by_size in runs.items():
        for size, found in by_size.items():
            training, test, noises = np.mean(found, axis=0)
            mean, error = paired(by_size, size)
            of_seeds = f"{gaps(found).mean():.2f} ({gaps(found).min():.1f}-{gaps(found).max():.1f})"
            rows.append(
                (name, size, f"{training:.1f}", f"{test:.2f}", of_seeds, f"{mean:+.2f}", f"{error:.2f}", noises)
            )
    table(("", "size", "training %", "test %", "gap (range)", "less that of 192", "error", "noise"), rows)


def draw(runs: Runs, output: str) -> None:
    titles = "accuracy", "gap between training and test", "noise of a sample's logits"
    figure, axes = panels("abc", titles, (12, 4.2))
    for i, (name, by_size) in enumerate(runs.items()):
        sizes = np.array(list(by_size)) * (1 + 0.06 * (i - 1))  # side by side
        training, test, noises = np.mean(list(by_size.values()), axis=1).T
        means, errors = np.transpose([paired(by_size, size) for size in by_size])
        style = {"color": COLOURS[name], "ms": 4, "lw": 1.3}
        axes["a"].plot(sizes, test, "o-", **style, label=f"{name}, test")
        axes["a"].plot(sizes, training, ":", **style, label=f"{name}, training")
        axes["b"].errorbar(sizes, means, errors, fmt="o-", **style, label=name)
        if name != PLAIN:
            axes["c"].plot(sizes, 100 * noises, "o-", **style, label=name)
    values = "accuracy (%), mean of the seeds", "points more than with 192", "% of the logits' deviation"
    for letter, value in zip("abc", values, strict=True):
        axes[letter].set(xscale="log", xlabel="samples in a batch or group", ylabel=value)
        axes[letter].set_xticks(SIZES, map(str, SIZES))
        axes[letter].minorticks_off()
        axes[letter].legend(frameon=False, fontsize="small")
    save(figure, output)


def main(argv: Sequence[str] | None = None) -> Runs:
    args = options(__doc__, "batch_noise.png").parse_args(argv)
    steps, count, sizes = (150, 2, (4, 32, 192)) if args.quick else (1000, 10, SIZES)
    images, test_images, labels, test_labels = digits()
    x, all_labels = np.concatenate([images, test_images]), np.concatenate([labels, test_labels])
    runs: Runs = {name: {} for name in COLOURS}
    with one_thread():
        for name, by_size in runs.items():
            for size in sizes:
                progress(f"{name}, {size}")
                seeds = range(args.seed, args.seed + count)
                by_size[size] = [train(name, size, steps, seed, x, all_labels) for seed in seeds]
    report(runs)
    draw(runs, args.output)
    return runs


if __name__ == "__main__":
    main()
