"""Batch normalization trains faster, and bears high rates and careless initial weights: Ioffe & Szegedy, on digits.

A network of three hidden layers, 100 sigmoid units each, and a softmax is trained by stochastic gradient descent, once
as it is and once with batch normalization before every sigmoid::

    plain         z = g(W u + b)
    batch norm    z = g(BN(W u)),   BN(x) = gamma (x - E[x]) / sqrt(Var[x] + eps) + beta

E and Var are the mini-batch's while training, running averages where the test accuracy is followed, and the
population's (Algorithm 2) at the end, where they are also folded into W and b. Three experiments:

- section 4.1, Figure 1: test accuracy and the percentiles of one sigmoid's input, here at 1, 10 and 30 times a base
  rate (section 4.2.2 has 5 and 30 times, of Inception). Batch norm is several times faster and bears all rates; on a
  problem this easy the higher ones do not speed it up.
- section 3.3: BN(a W u) = BN(W u), so the scale a of the initial weights matters little. Large ones do slow training:
  the gradient of a W shrinks as 1 / a, the relative step as 1 / a^2. At the scale that suits the plain network best,
  0.3, batch norm is still faster, but at ten times the base rate it ends no better.
- section 4.2.1: batch norm does without dropout, which slows it and adds no more than seeds differ by; the plain
  network gains nothing from it either. That samples had better meet others in each epoch does not show: with fixed
  mini-batches accuracy changes by less than seeds differ.

Run ``python examples/digits.py`` (a minute or two; ``--quick``: seconds). It prints three tables and saves a picture.

Source: Ioffe & Szegedy, "Batch Normalization: Accelerating Deep Network Training by Reducing Internal Covariate Shift",
ICML 2015. The paper's digits are MNIST; its section 4.2.1 is about Inception on ImageNet.
"""

from collections.abc import Iterable, Iterator, Sequence
from copy import copy
from itertools import islice, pairwise, product
from statistics import fmean, median
from typing import Any, NamedTuple

import numpy as np
from gallery import BLUE, ORANGE, SHADES, Array, digits, one_thread, options, panels, progress, save, spreads, table
from network import SGD, BatchNorm, Dense, Dropout, Layer, Network, Sigmoid

import fastbn

SIZES = (64, 100, 100, 100, 10)
BATCH = 60  # as in the paper
BASE_RATE = 0.3  # the plain network trains steadily at it, faster at ten times it, and at thirty only with luck
PLAIN, NORMALIZED = "plain", "batch norm"
COLOURS = dict(zip(product((PLAIN, NORMALIZED), (1, 10, 30)), SHADES[ORANGE] + SHADES[BLUE], strict=True))
SCALES = {f"{std:g}": {"std": std} for std in (0.01, 0.1, 0.3, 1, 3, 10)}
VARIANTS: dict[str, dict[str, Any]] = {  # at the scale that suits the plain network best
    "no dropout": {"std": 0.3},
    "dropout 20 %": {"std": 0.3, "dropout": 0.2},
    "dropout 50 %": {"std": 0.3, "dropout": 0.5},
    "fixed batches": {"std": 0.3, "fresh": False},
}


class Run(NamedTuple):
    """One training: evaluations on the test set, and the network it ended with."""

    steps: Array
    accuracy: Array  # at these steps
    percentiles: Array  # (3, evaluations): of the input of one sigmoid of the last hidden layer
    network: Network

    def steps_to(self, accuracy: float) -> float:
        """The first evaluated step of at least this accuracy; infinite where there is none."""
        return float(min(self.steps[self.accuracy >= accuracy], default=np.inf))

    def late(self) -> float:
        """Accuracy over the last quarter, less noisy than one evaluation."""
        return float(self.accuracy[len(self.steps) * 3 // 4 :].mean())


Key = tuple[str, int]  # a network and the factor of its rate
Sweep = dict[Key, dict[str, list[Run]]]  # by what is varied: a run per seed


class Results(NamedTuple):
    rates: dict[Key, Run]
    scales: Sweep
    variants: Sweep


def build(name: str, std: float, rng: np.random.Generator, dropout: float = 0, gather: Any = None) -> Network:
    """Gaussian weights; no bias before batch norm, whose mean would take it away (section 3.2)."""
    layers: list[Layer] = []
    for inputs, units in pairwise(SIZES[:-1]):
        layers += [Dense(inputs, units, std, rng, bias=name == PLAIN)]
        layers += [BatchNorm(units, gather=gather)] if name == NORMALIZED else []
        layers += [Sigmoid(), Dropout(dropout, rng)] if dropout else [Sigmoid()]
    return Network([*layers, Dense(*SIZES[-2:], std, rng)])


def batches(count: int, rng: np.random.Generator, fresh: bool = True) -> Iterator[Array]:
    """Mini-batches without end, of a fresh permutation in each epoch, or always those of the first."""
    order = rng.permutation(count)
    while True:
        yield from order[: count - count % BATCH].reshape(-1, BATCH)
        order = rng.permutation(count) if fresh else order


def train(
    name: str, factor: int, steps: int, seed: int, data: Any, std: float = 0.1, dropout: float = 0, fresh: bool = True
) -> Run:
    """From the same initial weights, on the same mini-batches, whatever the network and the rate."""
    progress(f"{name} x{factor}, scale {std:g}, dropout {dropout:g}, seed {seed}")
    images, test_images, labels, test_labels = data
    of_weights, of_batches = np.random.default_rng(seed).spawn(2)
    network = build(name, std, of_weights, dropout)
    optimizer, evaluations = SGD(network, factor * BASE_RATE), []
    last = -3 if dropout else -2  # layer of sigmoids
    below, above = Network(network.layers[:last]), Network(network.layers[last:])
    for step, batch in enumerate(islice(batches(len(images), of_batches, fresh), steps), start=1):
        network.loss(images[batch], labels[batch])
        optimizer.step()
        if step % 25 == 0:
            x = below.forward(test_images)
            evaluations.append((step, above.accuracy(x, test_labels), *np.percentile(x[:, 0], (15, 50, 85))))
    at, accuracy, *percentiles = np.array(evaluations).T
    return Run(at, accuracy, np.array(percentiles), network)


def sweep(keys: Iterable[Key], varied: dict[str, Any], steps: int, seeds: Iterable[int], data: Any) -> Sweep:
    """Each of the options of `train` for each network, from several seeds."""
    return {
        key: {label: [train(*key, steps, seed, data, **chosen) for seed in seeds] for label, chosen in varied.items()}
        for key in keys
    }


def use_population_statistics(network: Network, images: Array) -> None:
    """Algorithm 2: mean and variance over the training set, from mini-batches as the network in training sees them."""
    inputs = [images[start : start + BATCH] for start in range(0, len(images) - BATCH + 1, BATCH)]
    for layer in network.layers:
        outputs = [layer.forward(x, training=True) for x in inputs]
        if isinstance(layer, BatchNorm):
            layer.mean, layer.var = fastbn.population(fastbn.moments(x, channel_axis=-1) for x in inputs)
        inputs = outputs


def folded(network: Network) -> Network:
    """The plain network that gives the same answers: batch normalization within the weights and biases."""
    layers: list[Any] = []
    for layer in network.layers:
        if isinstance(layer, BatchNorm):
            dense = copy(layers[-1])
            dense.weight, dense.bias = layer.fold_into(dense.weight, axis=-1)
            dense.names = ("weight", "bias")
            layers[-1] = dense
        else:
            layers.append(layer)
    return Network(layers)


def report_rates(rates: dict[Key, Run], images: Array, labels: Array) -> None:
    target = max(run.accuracy.max() for (name, _), run in rates.items() if name == PLAIN)
    rows = []
    for (name, factor), run in rates.items():
        logits, same = run.network.forward(images), folded(run.network).forward(images)
        change = np.abs(same - logits).max() / np.abs(logits).max()
        best, final = f"{run.accuracy.max():.1%}", f"{run.network.accuracy(images, labels):.1%}"
        steps = (f"{run.steps_to(level):.0f}" for level in (0.96, target))
        rows.append((f"{name} x{factor}", factor * BASE_RATE, best, final, *steps, f"{change:.0e}"))
    table(("network", "rate", "best", "final", "to 96 %", "to plain's best", "folding"), rows)
    taken = [min(run.steps_to(target) for key, run in rates.items() if key[0] == name) for name in (PLAIN, NORMALIZED)]
    print(f"""best: test accuracy every 25 steps, by running statistics; to ...: first step of so much (inf: never)
final: after the last step, by population statistics; folding: the largest change of a logit, over the largest logit
plain's best, {target:.1%}: {taken[0] / taken[1]:.1f} times fewer steps with batch norm
""")


def report(title: str, runs: Sweep) -> None:
    def cell(of_seeds: Sequence[Run]) -> str:
        late, steps = [100 * run.late() for run in of_seeds], median(run.steps_to(0.95) for run in of_seeds)
        return f"{fmean(late):.1f} % ({min(late):.1f}-{max(late):.1f}) {steps:4.0f}"

    columns = list(runs.values())
    rows = [(label, *(cell(column[label]) for column in columns)) for label in columns[0]]
    table((title, *(f"{name} x{factor}" for name, factor in runs)), rows)
    print("test accuracy over the last quarter of steps: mean and range of seeds; steps to 95 %: median\n")


def draw(results: Results, output: str) -> None:
    """Figure 1: (a) accuracy, (b, c) percentiles at ten times the base rate; (d, e) the other experiments."""
    titles = "learning rates", "plain x10", "batch norm x10", "initial weights", "dropout, fixed batches: x10, 0.3"
    figure, axes = panels("aaaabb;aaaacc;dddeee", titles, (11, 7.5))
    for key, (steps, accuracy, (low, middle, high), _) in results.rates.items():
        axes["a"].plot(steps, accuracy, color=COLOURS[key], lw=1.2, label=f"{key[0]} x{key[1]}")
        if key[1] == 10:
            axis = axes["b" if key[0] == PLAIN else "c"]
            axis.fill_between(steps, low, high, color=COLOURS[key], alpha=0.3, lw=0)
            axis.plot(steps, middle, color=COLOURS[key], lw=1.2)
            axis.set(xscale="log", xlabel="training step", ylabel="a sigmoid's input:\n15, 50, 85 %")
    axes["c"].sharey(axes["b"])
    axes["c"].autoscale(axis="y")
    axes["a"].set(xscale="log", xlabel="training step", yscale="logit", ylim=(0.06, 0.995), ylabel="test accuracy")
    axes["a"].set_yticks(ticks := (0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.98, 0.99), [f"{tick:.0%}" for tick in ticks])
    axes["a"].minorticks_off()
    axes["a"].legend(loc="lower left", bbox_to_anchor=(0, 0.07), frameon=False)
    for letter, runs, marker in (("d", results.scales, "o-"), ("e", results.variants, "o")):
        for i, (key, by_label) in enumerate(runs.items()):
            late = 100 * np.array([[run.late() for run in of_seeds] for of_seeds in by_label.values()])
            x = np.arange(len(late)) + 0.08 * (i - len(runs) / 2 + 0.5)  # side by side
            spreads(axes[letter], x, late, marker, color=COLOURS[key], lw=1.2)
        axes[letter].set_xticks(range(len(late)), by_label)
        axes[letter].set_ylabel("test accuracy (%)")
    axes["d"].set_xlabel("standard deviation of the initial weights")
    save(figure, output)


def main(argv: Sequence[str] | None = None) -> Results:
    args = options(__doc__, "digits.png").parse_args(argv)
    steps, count = (200, 1) if args.quick else (5000, 3)
    data, seeds, keys = digits(), range(args.seed, args.seed + count), list(COLOURS)
    with one_thread():
        rates = {key: train(*key, steps, args.seed, data) for key in keys}
        for run in rates.values():
            use_population_statistics(run.network, data[0])
        varied = {label: SCALES[label] for label in ("0.01", "10")} if args.quick else SCALES
        scales = sweep([key for key in keys if key[1] < 30], varied, min(steps, 1000), seeds, data)
        variants = sweep([key for key in keys if key[1] == 10], VARIANTS, min(steps, 2000), seeds, data)
        report_rates(rates, data[1], data[3])
    report("weights", scales)
    report("weights 0.3", variants)
    draw(results := Results(rates, scales, variants), args.output)
    return results


if __name__ == "__main__":
    main()
