"""Whitening, the costly alternative: batch norm's two simplifications train about as well, at a cost that stays linear.

The sums W u + b of a tanh network on scikit-learn's digits are normalized in each training step, by batch norm (each
feature by itself) or by whitening (all features together), both with the statistics of the mini-batch::

    batch norm    xhat = (x - E[x]) / sqrt(Var[x] + eps)               N d operations
    whitening     xhat = (x - E[x]) S^(-1/2),   S = Cov[x] + eps I     N d^2 + d^3

for N samples of d features (ZCA: of all whitenings, the nearest to x). Both then scale and shift: gamma xhat + beta.
Gradients go through the statistics. A third network takes them for constants: its gradient moves b, which has no effect
on xhat, so that b grows, and the running statistics that the test uses lag behind.

Run ``python examples/whitening.py`` (a minute; ``--quick``: seconds). The picture: training loss for mini-batches of
(a) twice and (b) ten times as many samples as features, each network at the best of four rates; (c) the length of the
first b; (d) the time of one application (they take turns: from 2 MB on, at 128 features, batch norm reads x from memory
and writes to new pages, a step in its curve).

Where it does not show: with ten times as many samples as features, whitening stands higher rates better than batch
norm, and its training loss falls faster; which is better on the test set depends on the seed. With twice as many it
trains worse: the small eigenvalues of such a covariance are mostly noise, which whitening amplifies.

Sources: LeCun, Bottou, Orr & Müller, "Efficient BackProp", Neural Networks: Tricks of the Trade, 1998, section 4.3;
Wiesler & Ney, "A convergence analysis of log-linear training", NIPS 2011; Ioffe & Szegedy, "Batch Normalization",
ICML 2015, sections 2 and 3; Huang, Yang, Lang & Deng, "Decorrelated Batch Normalization", CVPR 2018, section 3.
"""

from collections.abc import Sequence
from functools import partial
from itertools import pairwise, product
from time import process_time
from typing import NamedTuple

import numpy as np
from gallery import BLUE, GREEN, ORANGE, PURPLE, digits, medians, one_thread, options, panels, progress, save, table
from network import SGD, Array, BatchNorm, Dense, Network, Tanh, Whitening, whiten

import fastbn

SIZES = (64, 50, 50, 50, 10)
BATCHES = (100, 500)
EPS = 0.1  # whitening's; with 0.01 or 0.001 the test accuracy stays below 96 %
SAMPLES = 4096  # in (d): twice the largest number of features, so that every covariance has full rank
CONSTANTS = "whitening, constants"
LAYERS = {
    "batch norm": BatchNorm,
    "whitening": partial(Whitening, eps=EPS),
    CONSTANTS: partial(Whitening, eps=EPS, constants=True),
}
COLOURS = {"plain": ORANGE, "batch norm": BLUE, "whitening": GREEN, CONSTANTS: PURPLE}


class Run(NamedTuple):
    name: str
    batch: int
    rate: float
    ms: float  # of a step, median
    steps: Array  # evaluated, and at these the loss, the accuracy on the test set, the length of the first layer's bias
    loss: Array
    accuracy: Array
    bias: Array


class Result(NamedTuple):
    runs: list[Run]  # each at the rate of the lowest loss in the end
    features: list[int]
    ms: dict[str, Array]  # of one application
    powers: dict[str, float]  # of the features that it grows with, over the four largest numbers


def train(name: str, batch: int, rate: float, steps: int, seed: int, data: Sequence[Array]) -> Run:
    """From the same initial weights, on the same mini-batches, whatever the network."""
    images, test_images, labels, test_labels = data
    rng, layers = np.random.default_rng(seed), []
    for inputs, units in pairwise(SIZES[:-1]):
        norm = [LAYERS[name](units)] if name in LAYERS else []
        layers += [Dense(inputs, units, inputs**-0.5, rng), *norm, Tanh()]
    network = Network([*layers, Dense(*SIZES[-2:], SIZES[-2] ** -0.5, rng)])
    optimizer, losses, seconds, evaluations = SGD(network, rate), [], [], []
    for step in range(1, steps + 1):
        chosen = rng.choice(len(images), batch, replace=False)
        start = process_time()
        losses.append(network.loss(images[chosen], labels[chosen]))
        optimizer.step()
        seconds.append(process_time() - start)
        if step % 10 == 0:
            accuracy, bias = network.accuracy(test_images, test_labels), np.linalg.norm(network.layers[0].bias)
            evaluations.append((step, np.mean(losses[-10:]), accuracy, bias))
            progress(f"{name}, batches of {batch}, rate {rate:g}: step {step} of {steps}")
    return Run(name, batch, rate, 1e3 * float(np.median(seconds)), *np.array(evaluations).T)


def cost(features: int, seed: int) -> dict[str, float]:
    """Seconds of one application."""
    x = np.random.default_rng(seed).standard_normal((SAMPLES, features), dtype=np.float32)
    cov = x.T @ x / SAMPLES
    progress(f"{features} features")
    calls = {
        "batch norm": partial(fastbn.batch_norm, x),
        "whitening": partial(whiten, x, EPS),
        "its eigenvectors": partial(np.linalg.eigh, cov),
    }
    return medians(calls, 20 if features < 1024 else 3)


def report(result: Result) -> None:
    rows = []
    for run in result.runs:
        reached = next((int(step) for step in run.steps[run.accuracy >= 0.96]), "never")
        last = run.loss[-1], f"{run.accuracy[-1]:.1%}", run.bias[-1]
        rows.append((run.batch, run.name, run.rate, run.ms, reached, *last))
    table(("batch", "network", "rate", "ms a step", "steps to 96 %", "loss", "test", "first b"), rows)
    print(f"\nOne application to {SAMPLES} samples, ms on one thread, and the power of the features that it grows with")
    costs = zip(result.features, *result.ms.values(), strict=True)
    table(("features", *result.ms), [*costs, ("power", *result.powers.values())])


def draw(result: Result, output: str) -> None:
    titles = (
        *(f"batches of {batch}, 50 features a layer" for batch in BATCHES),
        f"batches of {BATCHES[0]}: a bias without effect",
        f"one application to {SAMPLES} samples",
    )
    figure, axes = panels("ab;cd", titles, (11, 7))
    for run in result.runs:
        style = {"color": COLOURS[run.name], "label": f"{run.name}, rate {run.rate:g}"}
        axes["ab"[BATCHES.index(run.batch)]].plot(run.steps, run.loss, **style)
        if run.batch == BATCHES[0] and run.name != "plain":
            axes["c"].plot(run.steps, run.bias, **style)
    for name, ms in result.ms.items():
        label = f"{name}: power {result.powers[name]:.1f}"
        axes["d"].plot(result.features, ms, "o-", color=COLOURS.get(name, "grey"), label=label)
    for letter, xlabel, ylabel in (
        ("a", "training step", "training loss"),
        ("b", "training step", "training loss"),
        ("c", "training step", "length of the first b"),
        ("d", "features", "ms, on one thread"),
    ):
        axes[letter].set(xlabel=xlabel, ylabel=ylabel, yscale="linear" if letter == "c" else "log")
        axes[letter].legend(frameon=False)
    axes["d"].set_xscale("log", base=2)
    save(figure, output)


def main(argv: Sequence[str] | None = None) -> Result:
    args = options(__doc__, "whitening.png").parse_args(argv)
    steps, rates, largest = (50, (0.5,), 8) if args.quick else (200, (0.125, 0.5, 2, 8), 11)
    data, runs = digits(), []
    with one_thread():
        for batch, name in product(BATCHES, ("plain", *LAYERS)):
            tried = [train(name, batch, rate, steps, args.seed, data) for rate in rates]
            runs.append(min(tried, key=lambda run: run.loss[-1]))
    features = [2**i for i in range(4, largest + 1)]
    costs = [cost(d, args.seed) for d in features]
    ms = {name: 1e3 * np.array([seconds[name] for seconds in costs]) for name in costs[0]}
    powers = {name: float(np.polyfit(np.log(features[-4:]), np.log(v[-4:]), 1)[0]) for name, v in ms.items()}
    result = Result(runs, features, ms, powers)
    report(result)
    draw(result, args.output)
    return result


if __name__ == "__main__":
    main()
