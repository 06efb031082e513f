"""Normalising outside the gradient step makes a bias grow without limit: the argument of Ioffe & Szegedy, section 2.

A layer adds a learned bias to its input u and subtracts the mean: xhat = u + b - E[u + b]. A gradient step that takes
E[u + b] for a constant sees dL/db = sum dL/dxhat and moves b, but::

    u + (b + db) - E[u + (b + db)] = u + b - E[u + b]

so neither output nor loss has changed, the next step is the same, and b grows by the same amount at every step. Scaling
by the deviation does not change this. Through the statistics the gradient is 0: dL/db = sum (dL/dxhat - mean) = 0.

First experiment, only b learns, exactly as above, on one batch in float64: the program checks that the loss stays and
that b grows linearly. In float32 outputs hold until u is lost in the rounding of u + b.

Second experiment, everything learns: two hidden layers of relu units on the digits, no gamma or beta, as in section 2.
"inside" sends the gradient through the statistics; "outside" takes the batch's statistics for constants; "outside, old"
also computes them only every ten steps, as a normalisation between gradient steps would; "outside, beta" has gamma and
beta, whose gradient is that of b but for a factor, so that b comes to rest when beta does.

Where it does not show: with everything learning the bias grows outside, but ever more slowly, since the loss and with
it the gradient fall; the network learns, though less. It "blows up" at high rates, where statistics are old.

Run ``python examples/bias_growth.py`` (a minute; ``--quick``: seconds).

Source: Ioffe & Szegedy, "Batch Normalization: Accelerating Deep Network Training by Reducing Internal Covariate Shift",
ICML 2015, section 2.
"""

from collections.abc import Sequence
from itertools import pairwise, product
from statistics import median
from typing import Any, NamedTuple

import numpy as np
from exact import ExactBatchNorm, in_float64
from gallery import BLUE, GREEN, ORANGE, PURPLE, Array, digits, one_thread, options, panels, progress, save, table
from network import SGD, Dense, Layer, Network, ReLU, softmax_loss

import fastbn

SIZES = (64, 30, 30, 10)
BATCH = 60
CENTRED, SCALED = "centred", "centred, scaled"
INSIDE, OUTSIDE, OLD, BETA = "inside", "outside", "outside, old", "outside, beta"
COLOURS = {INSIDE: BLUE, OUTSIDE: ORANGE, OLD: PURPLE, BETA: GREEN}
AGE = 10  # steps between old statistics
RATES = (0.1, 1.0, 3.0)


class Normalization(ExactBatchNorm):
    """Subtracts the mean, and divides by the deviation if it scales; the gradient goes as its kind says."""

    def __init__(self, units: int, kind: str, scales: bool) -> None:
        super().__init__(units, eps=1e-5 if scales else 0)
        self.kind, self.scales, self.passes = kind, scales, 0
        self.names = ("gamma", "beta") if kind == BETA else ()

    def forward(self, x: Array, training: bool) -> Array:
        if not training or (self.kind == INSIDE and self.scales):
            return super().forward(x, training)
        if self.kind != OLD or self.passes % AGE == 0:
            self.mean, var = fastbn.mean_var(x, axis=0)
            self.var = var if self.scales else np.ones_like(var)
        self.passes += 1
        given = x, self.mean, self.var, self.gamma
        self.saved = fastbn.Saved.frozen(*given, channel_axis=-1, eps=self.eps)
        return fastbn.batch_norm_inference(*given, self.beta, channel_axis=-1, eps=self.eps)

    def backward(self, dy: Array) -> Array:
        dx = super().backward(dy)
        return dx - fastbn.mean(dx, axis=0) if self.kind == INSIDE and not self.scales else dx


class Alone(NamedTuple):
    """Only b learns."""

    norms: Array  # |b| after each step
    losses: Array


class Run(NamedTuple):
    steps: Array
    bias: Array  # the largest |b| of the first layer
    loss: Array  # mean since the last of the steps


class Result(NamedTuple):
    alone: dict[tuple[str, str], Alone]  # by normalisation and kind
    rounded: list[tuple[float, float]]  # float32: |b| and the outputs' relative change
    runs: dict[tuple[str, str, float], list[Run]]  # by normalisation, kind and rate: a run per seed


def build(kind: str, scales: bool, seed: int) -> Network:
    rng, layers = np.random.default_rng(seed), []
    for inputs, units in pairwise(SIZES[:-1]):
        dense: list[Layer] = [Dense(inputs, units, (2 / inputs) ** 0.5, rng)]  # with a bias, which is what it is about
        layers += [*dense, Normalization(units, kind, scales), ReLU()]
    return in_float64([*layers, Dense(*SIZES[-2:], SIZES[-2] ** -0.5, rng)])


def only_bias(kind: str, scales: bool, steps: int, seed: int, x: Array, labels: Array) -> Alone:
    """Gradient descent on the first layer's b, at a rate of 1, all else as it begins."""
    network = build(kind, scales, seed)
    b, norms, losses = network.layers[0].bias, [], []
    for _ in range(steps):
        losses.append(network.loss(x, labels))
        b -= network.layers[0].gradients["bias"]
        norms.append(np.linalg.norm(b))
    return Alone(np.array(norms), np.array(losses))


def check(kind: str, found: Alone) -> None:
    steps = np.arange(1, len(found.norms) + 1)
    if np.ptp(found.losses) > 1e-9 * found.losses[0]:
        raise ArithmeticError(f"{kind}: the loss has changed by {np.ptp(found.losses):.2g}")
    error = np.abs(found.norms / steps - found.norms[0]).max()
    if error > 1e-9 or (found.norms[-1] < 1e-9) != (kind == INSIDE):
        raise ArithmeticError(f"{kind}: b does not grow as it should, by {error:.2g} a step")


def in_float32(seed: int, x: Array, labels: Array) -> list[tuple[float, float]]:
    """How outputs change, beside the largest, after so many steps that b has these lengths."""
    network = build(OUTSIDE, True, seed)
    exact = network.forward(x, training=True)
    network.backward(softmax_loss(exact, labels)[1])
    away = network.layers[0].gradients["bias"]
    for layer in network.layers:
        for name, value in vars(layer).items():
            if isinstance(value, np.ndarray):
                setattr(layer, name, value.astype(np.float32))
    found = []
    for length in 10.0 ** np.arange(10):
        network.layers[0].bias[:] = -length * away / np.linalg.norm(away)
        change = np.abs(network.forward(x.astype(np.float32), training=True) - exact).max()
        found.append((length, change / np.abs(exact).max()))
    return found


def train(kind: str, scales: bool, rate: float, steps: int, seed: int, data: Any) -> Run:
    progress(f"{kind}, {'scaled' if scales else 'centred'}: rate {rate:g}, seed {seed}")
    images, _, labels, _ = data
    network, rng = build(kind, scales, seed), np.random.default_rng(seed)
    optimizer, losses, found = SGD(network, rate), [], []
    for step in range(1, steps + 1):
        batch = rng.choice(len(images), BATCH, replace=False)
        losses.append(network.loss(images[batch], labels[batch]))
        optimizer.step()
        if step % (steps // 50) == 0:
            found.append((step, np.abs(network.layers[0].bias).max(), np.mean(losses)))
            losses = []
        if not np.isfinite(losses or [0]).all():
            break
    return Run(*np.array(found).reshape(-1, 3).T)


def report(r: Result, steps: int) -> None:
    rows: list[Sequence[object]] = []
    for (norm, kind), found in r.alone.items():
        change = f"{np.ptp(found.losses):.1g}"
        rows.append((norm, kind, len(found.norms), found.norms[0], found.norms[-1], found.losses[0], change))
    table(("only b learns", "statistics", "steps", "|b| after 1", "in the end", "loss", "changes by"), rows)
    print("\nin float32, with b as long as this:")
    table(("|b|", *(f"{b:.0e}" for b, _ in r.rounded)), [("outputs change", *(f"{c:.0e}" for _, c in r.rounded))])
    rows = []
    for (norm, kind, rate), runs in r.runs.items():
        ended = [run for run in runs if len(run.steps) and run.steps[-1] == steps and np.isfinite(run.loss[-1])]
        middle = [median(run.bias[-1] for run in ended), median(run.loss[-1] for run in ended)] if ended else ["-", "-"]
        rows.append((norm, kind, f"{rate:g}", f"{len(runs) - len(ended)} of {len(runs)}", *middle))
    print()
    table(("everything learns", "statistics", "rate", "overflow", "largest |b|, median", "loss"), rows)


def draw(r: Result, output: str) -> None:
    titles = "only b learns; outside", "all learn, scaled; inside: 1e-16", "all learn, scaled"
    figure, axes = panels("abc", titles, (12, 4.6))
    for (norm, kind), found in r.alone.items():
        if kind == OUTSIDE:
            style = {"color": COLOURS[kind], "ls": "-" if norm == CENTRED else "--"}
            axes["a"].plot(np.arange(1, len(found.norms) + 1), found.norms, **style, label=f"|b|, {norm}")
            axes["a"].plot(
                np.arange(1, len(found.norms) + 1), found.losses, **style, lw=1, alpha=0.5, label=f"loss, {norm}"
            )
    for kind, rate in product((INSIDE, OUTSIDE, BETA, OLD), RATES[:2]):
        run = r.runs[SCALED, kind, rate][0]
        style = {"color": COLOURS[kind], "ls": "-" if rate == 1 else ":", "lw": 1.3, "label": f"{kind}, rate {rate:g}"}
        axes["c"].plot(run.steps, run.loss, **style)
        if kind != INSIDE:
            axes["b"].plot(run.steps, run.bias, **style | {"label": None})
    axes["a"].set(xscale="log", yscale="log", xlabel="step", ylabel="|b|, loss")
    axes["b"].set(xscale="log", yscale="log", xlabel="step", ylabel="largest |b| of the first layer")
    axes["c"].set(xscale="log", yscale="log", xlabel="step", ylabel="training loss")
    axes["a"].legend(frameon=False, fontsize="small")
    figure.legend(*axes["c"].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    save(figure, output)


def main(argv: Sequence[str] | None = None) -> Result:
    args = options(__doc__, "bias_growth.png").parse_args(argv)
    alone_steps, steps, count = (200, 100, 1) if args.quick else (10_000, 2000, 3)
    images, test_images, labels, test_labels = digits()
    data = images.astype(float), test_images.astype(float), labels, test_labels
    x, its_labels = data[0][:BATCH], labels[:BATCH]
    with one_thread(), np.errstate(over="ignore", invalid="ignore"):
        alone = {}
        for norm, kind in product((CENTRED, SCALED), (INSIDE, OUTSIDE)):
            alone[norm, kind] = only_bias(kind, norm == SCALED, alone_steps, args.seed, x, its_labels)
            check(kind, alone[norm, kind])
        rounded = in_float32(args.seed, x, its_labels)
        runs = {
            (norm, kind, rate): [
                train(kind, norm == SCALED, rate, steps, seed, data) for seed in range(args.seed, args.seed + count)
            ]
            for norm, kind, rate in product((CENTRED, SCALED), COLOURS, RATES)
        }
    report(result := Result(alone, rounded, runs), steps)
    draw(result, args.output)
    return result


if __name__ == "__main__":
    main()
