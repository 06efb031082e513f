"""Batch normalization speeds up training: Figure 1 of Ioffe & Szegedy, on scikit-learn's handwritten digits.

A network of three hidden layers, 100 sigmoid units each, and a softmax is trained by plain stochastic gradient descent,
once as it is and once with batch normalization before every sigmoid, at 1, 10 and 30 times a base learning rate::

    plain         z = g(W u + b)
    batch norm    z = g(BN(W u)),   BN(x) = gamma (x - E[x]) / sqrt(Var[x] + eps) + beta

E and Var are the mini-batch's while training, running averages where the test accuracy is followed, and the
population's (Algorithm 2) at the end, where they are also folded into W and b.

Run ``python examples/digits.py`` (a minute or two; ``--quick``: seconds). It prints a table and saves a picture: test
accuracy over the steps, and the 15th, 50th and 85th percentiles of the input of one sigmoid of the last hidden layer.

How much is gained depends on the initial weights: ``--std 0.1``, about 1 / sqrt(units), leaves the plain network on a
long plateau; with ``--std 0.5`` it has none, and at the base rate reaches 96 % as soon as with batch normalization.

Source: Ioffe & Szegedy, "Batch Normalization: Accelerating Deep Network Training by Reducing Internal Covariate Shift",
ICML 2015, section 4.1 and Algorithms 1 and 2. The paper's digits are MNIST.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from threadpoolctl import threadpool_limits

import fastbn

SIZES = (64, 100, 100, 100, 10)
BATCH = 60  # as in the paper
BASE_RATE = 0.3  # the plain network trains steadily at it, faster at ten times it, and at thirty only with luck
FACTORS = (1, 10, 30)
PLAIN, NORMALIZED = "plain", "batch norm"


@dataclass
class Layer:
    """Weight (inputs, units) and bias (units,); with `gamma` the sums are batch-normalized and `bias` is its beta.

    A bias before batch normalization would vanish in the subtraction of the mean, beta takes its place (section 3.2).
    """

    weight: np.ndarray
    bias: np.ndarray
    gamma: np.ndarray | None = None
    mean: np.ndarray | None = None
    var: np.ndarray | None = None


class Run(NamedTuple):
    """One training: evaluations on the test set, and the layers it ended with."""

    network: str
    factor: int
    steps: np.ndarray
    accuracy: np.ndarray  # at these steps
    percentiles: np.ndarray  # (3, evaluations): of the input of one sigmoid of the last hidden layer
    layers: list[Layer]

    def steps_to(self, accuracy: float) -> int | None:
        """The first evaluated step of at least this accuracy."""
        return next(map(int, self.steps[self.accuracy >= accuracy]), None)


# --- the network ------------------------------------------------------------------------------------------------------


def initial_layers(network: str, std: float, rng: np.random.Generator) -> list[Layer]:
    """Small Gaussian weights, zero biases; gamma 1 where there is batch normalization."""
    layers = [
        Layer(rng.normal(0, std, shape).astype(np.float32), np.zeros(shape[1], np.float32)) for shape in pairwise(SIZES)
    ]
    if network == NORMALIZED:
        for layer in layers[:-1]:
            layer.gamma, layer.mean, layer.var = (np.full_like(layer.bias, value) for value in (1, 0, 1))
    return layers


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 0.5 * np.tanh(0.5 * x) + 0.5  # 1 / (1 + exp(-x)) would overflow


def train_step(
    layers: list[Layer], images: np.ndarray, labels: np.ndarray, rate: float,
    batch: int | None = None, gather: Callable | None = None, summed: Callable = lambda array: array,
) -> None:  # fmt: skip
    """One step down the gradient of the mean cross-entropy, in place; the running statistics follow the batch.

    Of several processes each gives its part of the batch, `batch` images in all; `gather` exchanges statistics, and
    `summed` adds gradients over all of them.
    """
    z, saved = [images], []
    for layer in layers[:-1]:
        x = z[-1] @ layer.weight
        if layer.gamma is None:
            x += layer.bias
        else:
            x, for_backward = fastbn.batch_norm(x, layer.gamma, layer.bias, channel_axis=1, gather=gather)
            layer.mean, layer.var = fastbn.update_running(layer.mean, layer.var, for_backward.moments)
            saved.append(for_backward)
        z.append(sigmoid(x))

    logits = z[-1] @ layers[-1].weight + layers[-1].bias
    softmax = np.exp(logits - logits.max(axis=1, keepdims=True))
    softmax /= softmax.sum(axis=1, keepdims=True)
    dx = (softmax - np.eye(10, dtype=np.float32)[labels]) / np.float32(batch or len(labels))
    for layer, inputs in zip(reversed(layers), reversed(z), strict=True):
        if layer.gamma is None:
            dbias = dx.sum(axis=0)
        else:
            dx, dgamma, dbias, _ = fastbn.batch_norm_backward(dx, saved.pop(), gather=gather)
            layer.gamma -= rate * summed(dgamma)
        dz = dx @ layer.weight.T
        layer.weight -= rate * summed(inputs.T @ dx)
        layer.bias -= rate * summed(dbias)
        dx = dz * inputs * (1 - inputs)  # through the sigmoid that gave the inputs; unused below the first layer


def infer(layers: list[Layer], images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Logits, and the input of the last hidden layer's sigmoids, from the statistics that the layers hold."""
    z = images
    for layer in layers[:-1]:
        x = z @ layer.weight
        if layer.gamma is None:
            x += layer.bias
        else:
            x = fastbn.batch_norm_inference(x, layer.mean, layer.var, layer.gamma, layer.bias, channel_axis=1)
        z = sigmoid(x)
    return z @ layers[-1].weight + layers[-1].bias, x


def accuracy_of(logits: np.ndarray, labels: np.ndarray) -> float:
    return float(np.mean(logits.argmax(axis=1) == labels))


# --- inference, Algorithm 2 -------------------------------------------------------------------------------------------


def set_population_statistics(layers: list[Layer], images: np.ndarray) -> None:
    """Mean and variance over the training set, from its mini-batches as the network in training sees them."""
    batches = [images[start : start + BATCH] for start in range(0, len(images) - BATCH + 1, BATCH)]
    for layer in layers[:-1]:
        sums = [z @ layer.weight for z in batches]
        layer.mean, layer.var = fastbn.population(fastbn.moments(x, channel_axis=1) for x in sums)
        batches = [sigmoid(fastbn.batch_norm(x, layer.gamma, layer.bias, channel_axis=1)[0]) for x in sums]


def folded(layers: list[Layer]) -> list[Layer]:
    """The plain network that gives the same answers: batch normalization within the weights and biases."""
    hidden = (
        fastbn.fold(layer.weight, None, layer.mean, layer.var, layer.gamma, layer.bias, axis=1) for layer in layers[:-1]
    )
    return [*(Layer(weight, bias) for weight, bias in hidden), layers[-1]]


def change_by_folding(layers: list[Layer], images: np.ndarray) -> float:
    """The largest difference of a logit between the network and the folded one, over the largest logit."""
    logits, _ = infer(layers, images)
    change = np.abs(infer(folded(layers), images)[0] - logits).max() / np.abs(logits).max()
    assert change < 1e-5, change  # float32 rounding through four layers
    return float(change)


# --- the experiment ---------------------------------------------------------------------------------------------------


def load() -> list[np.ndarray]:
    """Training images, test images (float32, 0 to 1), training labels, test labels: always the same quarter tests."""
    images, labels = load_digits(return_X_y=True)
    images = (images / 16).astype(np.float32)
    return train_test_split(images, labels, test_size=0.25, stratify=labels, random_state=0)


def train(network: str, factor: int, steps: int, std: float, seed: int, data: list[np.ndarray]) -> Run:
    """Train from the same initial weights, on the same mini-batches, whatever the network and the rate."""
    images, test_images, labels, test_labels = data
    rng = np.random.default_rng(seed)
    layers = initial_layers(network, std, rng)
    evaluations = []
    for step in range(1, steps + 1):
        batch = rng.choice(len(images), BATCH, replace=False)
        train_step(layers, images[batch], labels[batch], factor * BASE_RATE)
        if step % 25 == 0:
            logits, x = infer(layers, test_images)
            evaluations.append((step, accuracy_of(logits, test_labels), *np.percentile(x[:, 0], (15, 50, 85))))
            print(f"\r{network} x{factor}: step {step} of {steps}   ", end="", file=sys.stderr, flush=True)
    if network == NORMALIZED:
        set_population_statistics(layers, images)
    at, accuracy, *percentiles = np.array(evaluations).T
    return Run(network, factor, at, accuracy, np.array(percentiles), layers)


def report(runs: list[Run], data: list[np.ndarray]) -> None:
    """Print the table, what was reached, and how much folding changes."""
    _, images, _, labels = data
    plain = {run.factor: run.accuracy.max() for run in runs if run.network == PLAIN}
    target = max(plain.values())
    row = "{:<14}{:>6}{:>9}{:>9}{:>10}{:>18}{:>18}{:>9}{:>11}".format
    print(row("network", "rate", "best", "at step", "to 96 %", "to plain's best", "at this rate", "final", "folding"))
    for run in runs:
        best, final = run.accuracy.max(), accuracy_of(infer(run.layers, images)[0], labels)
        steps = [run.steps_to(level) or "never" for level in (best, 0.96, target, plain[run.factor])]
        change = f"{change_by_folding(run.layers, images):.1e}" if run.network == NORMALIZED else ""
        name, rate = f"{run.network} x{run.factor}", f"{run.factor * BASE_RATE:g}"
        print(row(name, rate, f"{best:.1%}", *steps, f"{final:.1%}", change))
    print(f"""
best: on {len(labels)} test images, every 25 steps of {BATCH} training images; batch norm with running statistics
to ...: the first step of at least 96 %, of the best of all plain networks, of the best of the plain one at this rate
final: after the last step, with population statistics; folding: the largest change of a logit, over the largest logit
""")
    taken, fastest = (
        min(run.steps_to(target) or np.inf for run in runs if run.network == name) for name in (PLAIN, NORMALIZED)
    )
    print(
        f"Plain's best, {target:.1%}: {taken} steps plain, {fastest} with batch norm, {taken / fastest:.1f} times fewer"
    )


def draw(runs: list[Run], output: str) -> None:
    """Figure 1: (a) accuracy of all runs, (b, c) percentiles without and with batch norm at ten times the base rate."""
    shades = {PLAIN: ("#f9bf85", "#e0701a", "#8a3d05"), NORMALIZED: ("#8fc1ee", "#2b78c2", "#0b3d75")}
    figure = Figure(figsize=(11, 5), dpi=130, layout="constrained")
    axes = figure.subplot_mosaic("aab;aac")
    for run in runs:
        name, shade = f"{run.network} x{run.factor}", shades[run.network][FACTORS.index(run.factor)]
        axes["a"].plot(run.steps, run.accuracy, color=shade, lw=1.3, label=name)
        if run.factor == 10:
            low, median, high = run.percentiles
            letter = "b" if run.network == PLAIN else "c"
            axes[letter].fill_between(run.steps, low, high, color=shade, alpha=0.3, lw=0)
            axes[letter].plot(run.steps, median, color=shade, lw=1.3)
            axes[letter].set_title(f"({letter}) {name}: 15, 50, 85 %", loc="left")
            axes[letter].set_ylabel("input of a sigmoid")
    axes["c"].sharey(axes["b"])
    axes["c"].autoscale(axis="y")
    axes["a"].set_title("(a) digits recognised", loc="left")
    axes["a"].set(yscale="logit", ylim=(0.06, 0.995), ylabel="test accuracy")
    axes["a"].set_yticks(ticks := (0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.98, 0.99), [f"{tick:.0%}" for tick in ticks])
    axes["a"].minorticks_off()
    for axis in axes.values():
        axis.set(xscale="log", xlabel="training step")
        axis.grid(color="0.9")
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower left", ncols=6, frameon=False)
    figure.savefig(output)


def main(argv: Sequence[str] | None = None) -> list[Run]:
    parser = argparse.ArgumentParser(description="Figure 1 of Ioffe & Szegedy on handwritten digits")
    parser.add_argument("--quick", action="store_true", help="200 steps, in which the plain network learns nothing")
    parser.add_argument("--steps", type=int, help="of each of the six trainings, at least 25; 10000")
    parser.add_argument("--std", type=float, default=0.1, help="of the initial weights; %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of initial weights and mini-batches; %(default)s")
    parser.add_argument("--output", default="digits.png", help="the picture; %(default)s")
    args = parser.parse_args(argv)
    steps = max(25, args.steps or (200 if args.quick else 10_000))
    data = load()
    with threadpool_limits(1, user_api="blas"):  # products this small lose on threads: 8 ms against 16 us, measured
        runs = [train(n, f, steps, args.std, args.seed, data) for n in (PLAIN, NORMALIZED) for f in FACTORS]
    print(file=sys.stderr)
    report(runs, data)
    draw(runs, args.output)
    return runs


if __name__ == "__main__":
    main()
