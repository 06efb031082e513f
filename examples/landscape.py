"""Batch norm smooths the landscape of the loss, and is not alone in it: section 3 of Santurkar et al.

A small VGG (`vgg`) learns the digits. Along the gradient g of the batch's loss L at the parameters w, as far as four
steps of training go (s = 0.05 to 0.4 at a rate of 0.1), there are::

    range of the loss         max L(w - s g) - min L(w - s g)
    change of the gradient    max || g(w) - g(w - s g) ||
    effective smoothness      max || g(w) - g(w - s g) || / || s g ||

The claim: all three are smaller with batch norm, and with other normalisations too, which subtract a channel's mean and
divide by the average lp norm over the batch and all positions (`LpNorm`), that of x as in the paper, or of z = x - mean
("centred"; the l2 norm is then batch norm itself)::

    y = gamma (x - mean(x)) / (n + eps) + beta,    n = mean(|x|^p)^(1/p) for p = 1 and 2, max |x| for p = infinity

A normalised network soon has a smaller loss, and a smaller loss has smaller gradients. So the table also compares where
losses are alike, 0.1 to 1. There the claim holds too, but for p = infinity, whose smoothness is the plain network's.

Run ``python examples/landscape.py`` (a minute; ``--quick``: seconds).

Source: Santurkar, Tsipras, Ilyas & Madry, "How Does Batch Normalization Help Optimization?", NeurIPS 2018, section 3.
The paper's VGG learns CIFAR-10.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import NamedTuple

import numpy as np
from gallery import BLUE, GREEN, GREY, ORANGE, PURPLE, Array, digits, one_thread, options, panels, progress, save, table
from network import SGD, BatchNorm, Layer, Network, vgg

RATE = 0.1  # the plain network learns at 0.03 to 0.3, 92 to 97 %, and not at 1
LENGTHS = np.linspace(0.05, 0.4, 8)
EVERY = 10  # steps from one measurement to the next


class LpNorm(Layer):
    """See above; inference takes running averages of mean and norm, as batch norm does."""

    names = ("gamma", "beta")

    def __init__(self, channels: int, p: float, centred: bool = False) -> None:
        self.gamma, self.mean, self.beta, self.norm = (np.full(channels, v, np.float32) for v in (1, 0, 0, 1))
        self.p, self.centred, self.eps = p, centred, np.float32(1e-5)

    def forward(self, x: Array, training: bool) -> Array:
        mean, norm = self.mean, self.norm
        if training:
            axes = tuple(range(x.ndim - 1))
            mean = x.mean(axis=axes)
            measured = x - mean if self.centred else x
            away = abs(measured)
            if self.p == np.inf:
                norm = away.max(axis=axes)
                slope = away == norm
                self.slope = slope / slope.sum(axis=axes)
            else:
                norm = (away**self.p).mean(axis=axes) ** (1 / self.p)
                self.slope = (away / np.maximum(norm, 1e-30)) ** (self.p - 1) / (x.size / x.shape[-1])
            self.slope = (self.slope * np.sign(measured)).astype(x.dtype)  # of the norm, for each value
            self.mean += 0.1 * (mean - self.mean)
            self.norm += 0.1 * (norm - self.norm)
        self.divisor = norm + self.eps
        self.xhat = (x - mean) / self.divisor
        return self.gamma * self.xhat + self.beta

    def backward(self, dy: Array) -> Array:
        axes = tuple(range(dy.ndim - 1))
        self.gradients = {"gamma": (dy * self.xhat).sum(axis=axes), "beta": dy.sum(axis=axes)}
        dz = dy * (self.gamma / self.divisor)
        by_norm = self.slope * (dz * self.xhat).sum(axis=axes)
        if self.centred:
            return dz - by_norm - (dz - by_norm).mean(axis=axes)
        return dz - dz.mean(axis=axes) - by_norm


NETWORKS: dict[str, tuple[str, Callable[[int], list[Layer]]]] = {
    "plain": (ORANGE, lambda channels: []),
    "batch norm": (BLUE, lambda channels: [BatchNorm(channels)]),
    "l1": (GREEN, lambda channels: [LpNorm(channels, 1)]),
    "l2": (GREY, lambda channels: [LpNorm(channels, 2)]),
    "l infinity": (PURPLE, lambda channels: [LpNorm(channels, np.inf)]),
    "l1 centred": (GREEN, lambda channels: [LpNorm(channels, 1, True)]),
    "l2 centred": (GREY, lambda channels: [LpNorm(channels, 2, True)]),
    "l infinity centred": (PURPLE, lambda channels: [LpNorm(channels, np.inf, True)]),
}


class Run(NamedTuple):
    """A training, at the measured steps."""

    steps: Array
    accuracy: Array
    loss: Array  # of the batch, before the step
    losses: Array  # (steps, lengths), as are those below
    changes: Array
    smoothness: Array


def size(arrays: Sequence[Array]) -> float:
    """The l2 norm of all of them as one vector."""
    return float(np.sqrt(sum(np.sum(array.astype(float) ** 2) for array in arrays)))


def look_ahead(network: Network, x: Array, labels: Array) -> tuple[float, Array, Array, Array]:
    """The loss; for each of the lengths the loss there, the gradient's change, and that over the distance."""
    network = deepcopy(network)
    loss, g = network.loss(x, labels), network.gradients()
    start = [w.copy() for w in network.parameters()]
    losses, changes = [], []
    for s in LENGTHS:
        for w, w0, slope in zip(network.parameters(), start, g, strict=True):
            w[:] = w0 - s * slope
        losses.append(network.loss(x, labels))
        changes.append(size([a - b for a, b in zip(g, network.gradients(), strict=True)]))
    return loss, np.array(losses), np.array(changes), np.array(changes) / (LENGTHS * size(g))


def train(name: str, steps: int, seed: int) -> Run:
    """The same initial weights and mini-batches whatever the name."""
    images, test_images, labels, test_labels = digits(images=True)
    rng = np.random.default_rng(seed)
    network = vgg(NETWORKS[name][1], rng)
    optimizer, found = SGD(network, RATE), []
    for step in range(1, steps + 1):
        batch = rng.choice(len(images), 64, replace=False)
        if step == 1 or step % EVERY == 0:
            accuracy = network.accuracy(test_images, test_labels)
            found.append((step, accuracy, *look_ahead(network, images[batch], labels[batch])))
            progress(f"{name}: step {step} of {steps}, {accuracy:.1%}")
        network.loss(images[batch], labels[batch])
        optimizer.step()
    return Run(*map(np.array, zip(*found, strict=True)))


def figures(run: Run, low: float, high: float) -> list[float]:
    """Range of the loss, change of the gradient, smoothness: medians over steps with a loss between; how many."""
    there = (low < run.loss) & (run.loss < high)
    values = np.array([np.ptp(run.losses, axis=1), run.changes.max(axis=1), run.smoothness.max(axis=1)])[:, there]
    return [*(np.median(values, axis=1) if there.any() else 3 * [np.nan]), there.sum()]


def draw(runs: dict[str, Run], output: str) -> None:
    figure, axes = panels("abc", ("loss", "change of the gradient", "effective smoothness"), (11, 4.2))
    for name, run in runs.items():
        colour = NETWORKS[name][0]
        if name in ("plain", "batch norm"):
            for letter, values in (("a", run.losses), ("b", run.changes)):
                low, high = values.min(axis=1), values.max(axis=1)
                axes[letter].fill_between(run.steps, low, high, color=colour, alpha=0.5, lw=0)
        style = {"color": colour, "ls": ":" if name.endswith("centred") else "-", "lw": 1.3}
        axes["c"].plot(run.steps, run.smoothness.max(axis=1), **style, label=name)
    for axis in axes.values():
        axis.set(xlabel="step", ylabel="min to max along the gradient", yscale="log")
    axes["c"].set(ylabel="max along the gradient", yscale="linear", ylim=0)
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    save(figure, output)


def main(argv: Sequence[str] | None = None) -> dict[str, Run]:
    args = options(__doc__, "landscape.png").parse_args(argv)
    with one_thread():  # arrays this small gain nothing from a second one
        runs = {name: train(name, 50 if args.quick else 400, args.seed) for name in NETWORKS}
    rows = [
        [name, f"{run.accuracy.max():.1%}", *figures(run, 0, np.inf), *figures(run, 0.1, 1)]
        for name, run in runs.items()
    ]
    columns = ("loss range", "gradient", "smoothness", "steps")
    print("Along the gradient: medians over all measured steps, and over those with a loss of 0.1 to 1")
    table(["", "best accuracy", *columns, *columns], rows)
    draw(runs, args.output)
    return runs


if __name__ == "__main__":
    main()
