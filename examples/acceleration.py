"""Batch norm alone, and with the changes to training that it allows: section 4.2.1 of Ioffe & Szegedy as an ablation.

"Simply adding Batch Normalization to a network does not take full advantage of our method." The paper changes
Inception's training in several ways at once, of which five can be asked here, on the digits:

- rate: five times higher, 1.5
- no dropout: instead of 20 % after each hidden layer
- less decay: the L2 loss of weights divided by 5
- sooner: the rate falls 6 times faster
- shuffled: samples meet others in each epoch, not always those of the first

A network of three layers of 50 relu units is trained without batch norm, with it, with each of the changes by itself,
with all, and with all but each. Two measures: where training ends, as the mean test accuracy over the last quarter of
the steps, and how soon a network is first as good as the one without batch norm ends, from the same seed. (The paper's
Figure 3 counts steps to Inception's best accuracy; a best one is luck by half a point here.) Eight seeds, the same ones
for all.

All together learn three times as fast as batch norm alone and end alike. Most of that is the rate's: by itself it is
faster but ends worse, and without it the other changes are worth less.

Run ``python examples/acceleration.py`` (a minute or two; ``--quick``: seconds).

Source: Ioffe & Szegedy, "Batch Normalization: Accelerating Deep Network Training by Reducing Internal Covariate Shift",
ICML 2015, sections 4.2.1 and 4.2.2. The paper's network is Inception on ImageNet; local response normalisation and
photometric distortions, its two other changes, have no counterpart here.
"""

from collections.abc import Iterator, Sequence
from itertools import islice, pairwise
from typing import Any, NamedTuple

import numpy as np
from exact import ExactBatchNorm
from gallery import BLUE, GREEN, GREY, ORANGE, PURPLE, Array, digits, one_thread, options, panels, progress, save, table
from network import Dense, Dropout, Layer, Network, ReLU

SIZES = (64, 50, 50, 50, 10)
BATCH, EVERY = 60, 10


class Setting(NamedTuple):
    """The defaults suit the network without batch norm: at rates of 0.1, 0.3 and 1 it ends at 97.1, 97.5 and 90 %."""

    norm: bool = True
    rate: float = 0.3
    dropout: float = 0.2
    l2: float = 1e-3
    halvings: float = 1.0  # of the rate, until the end
    shuffled: bool = False


CHANGES: dict[str, dict[str, Any]] = {
    "rate": {"rate": 1.5},
    "no dropout": {"dropout": 0.0},
    "less decay": {"l2": 2e-4},
    "sooner": {"halvings": 6.0},
    "shuffled": {"shuffled": True},
}
ALL = {name: value for change in CHANGES.values() for name, value in change.items()}
DEFAULTS = {name: {key: getattr(Setting(), key) for key in change} for name, change in CHANGES.items()}
PLAIN, NORMALIZED, EVERYTHING = "plain", "batch norm", "all"
SETTINGS = {
    PLAIN: Setting(norm=False),
    NORMALIZED: Setting(),
    **{name: Setting(**change) for name, change in CHANGES.items()},
    EVERYTHING: Setting(**ALL),
    **{f"all but {name}": Setting(**(ALL | DEFAULTS[name])) for name in CHANGES},
}


class Run(NamedTuple):
    steps: Array
    accuracy: Array  # on the test set, at these steps

    def late(self) -> float:
        return float(self.accuracy[len(self.steps) * 3 // 4 :].mean())

    def steps_to(self, accuracy: float) -> float:
        return float(min(self.steps[self.accuracy >= accuracy], default=np.inf))


def build(setting: Setting, rng: np.random.Generator, of_dropout: np.random.Generator) -> Network:
    layers: list[Layer] = []
    for inputs, units in pairwise(SIZES[:-1]):
        layers += [Dense(inputs, units, (2 / inputs) ** 0.5, rng, bias=not setting.norm)]
        layers += [ExactBatchNorm(units, eps=1e-5), ReLU()] if setting.norm else [ReLU()]
        layers += [Dropout(setting.dropout, of_dropout)] if setting.dropout else []
    return Network([*layers, Dense(*SIZES[-2:], SIZES[-2] ** -0.5, rng)])


def batches(count: int, shuffled: bool, rng: np.random.Generator) -> Iterator[Array]:
    """Without end; those of the first epoch again and again, in another order, or of a new permutation each time."""
    order = rng.permutation(count)[: count - count % BATCH].reshape(-1, BATCH)
    while True:
        yield from rng.permutation(order)
        if shuffled:
            order = rng.permutation(count)[: order.size].reshape(-1, BATCH)


def train(setting: Setting, steps: int, seed: int, data: Any) -> Run:
    images, test_images, labels, test_labels = data
    of_weights, of_dropout, of_batches = np.random.default_rng(seed).spawn(3)
    network, found = build(setting, of_weights, of_dropout), []
    for step, batch in enumerate(islice(batches(len(images), setting.shuffled, of_batches), steps), start=1):
        network.loss(images[batch], labels[batch])
        rate = setting.rate * 0.5 ** (setting.halvings * step / steps)
        for layer in network.layers:
            for name in layer.names:
                w, g = getattr(layer, name), layer.gradients[name]
                w -= rate * (g + setting.l2 * w if name == "weight" else g)
        if step % EVERY == 0:
            found.append((step, network.accuracy(test_images, test_labels)))
    return Run(*np.reshape(found, (-1, 2)).T)


def figures(runs: dict[str, list[Run]]) -> dict[str, Array]:
    """Of each seed: steps to plain's late accuracy, the best accuracy, and the late one, in %."""
    found = {}
    for name, of_seeds in runs.items():
        pairs = zip(of_seeds, runs[PLAIN], strict=True)
        found[name] = np.array([(r.steps_to(p.late()), 100 * r.accuracy.max(), 100 * r.late()) for r, p in pairs])
    return found


def report(found: dict[str, Array]) -> None:
    rows = []
    for name, values in found.items():
        steps, best, late = values.T
        spread = f"{late.min():.1f}-{late.max():.1f}"
        reached = f"{np.mean(np.isfinite(steps)):.0%}"
        rows.append((name, f"{np.median(steps):.0f}", reached, f"{best.mean():.2f}", f"{late.mean():.2f}", spread))
    table(("", "steps to plain's late, median", "reach it", "best, mean %", "late, mean %", "range"), rows)
    changes = {name: values[:, 2] - found[NORMALIZED][:, 2] for name, values in found.items() if name in CHANGES}
    print("late accuracy less that of batch norm alone, of the same seed: mean and standard error, in points")
    print("  ".join(f"{k} {v.mean():+.2f} ({v.std() / max(len(v) - 1, 1) ** 0.5:.2f})" for k, v in changes.items()))


def colour(name: str) -> str:
    return {PLAIN: ORANGE, NORMALIZED: BLUE, EVERYTHING: PURPLE}.get(name, GREEN if name in CHANGES else GREY)


def draw(runs: dict[str, list[Run]], found: dict[str, Array], output: str) -> None:
    figure, axes = panels("abc", ("training", "speed", "where it ends"), (12.5, 4.6))
    for name in (PLAIN, NORMALIZED, EVERYTHING):
        accuracy = np.mean([run.accuracy for run in runs[name]], axis=0)
        axes["a"].plot(runs[name][0].steps, 100 * (1 - accuracy), color=colour(name), lw=1.3, label=name)
    rows = np.arange(len(found))[::-1]
    for letter, column in (("b", 0), ("c", 2)):
        for row, (name, values) in zip(rows, found.items(), strict=True):
            reached = values[np.isfinite(values[:, column]), column]
            axes[letter].plot(reached, np.full(len(reached), row), "|", color=colour(name), alpha=0.6)
            if len(reached) > len(values) / 2:
                middle = np.median(values[:, column]) if letter == "b" else values[:, column].mean()
                axes[letter].plot(middle, row, "o", ms=5, color=colour(name))
        axes[letter].set_yticks(rows, found if letter == "b" else [])
    axes["a"].set(xscale="log", yscale="log", xlabel="step", ylabel="test error (%), mean of the seeds")
    axes["b"].set(xscale="log", xlabel="steps to plain's late accuracy; median")
    axes["c"].set(xlabel="test accuracy (%) of the last quarter; mean")
    axes["a"].set_yticks(ticks := (2, 5, 10, 20, 50), map(str, ticks))
    axes["a"].minorticks_off()
    axes["a"].legend(frameon=False)
    save(figure, output)


def main(argv: Sequence[str] | None = None) -> dict[str, list[Run]]:
    args = options(__doc__, "acceleration.png").parse_args(argv)
    steps, count = (100, 1) if args.quick else (2000, 8)
    data, runs = digits(), {}
    with one_thread():
        for name, setting in SETTINGS.items():
            progress(name)
            runs[name] = [train(setting, steps, seed, data) for seed in range(args.seed, args.seed + count)]
    report(found := figures(runs))
    draw(runs, found, args.output)
    return runs


if __name__ == "__main__":
    main()
