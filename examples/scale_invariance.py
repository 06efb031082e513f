"""The scale of weights before batch norm does not matter, and their growth holds the learning rate in check.

Ioffe & Szegedy, section 3.3, of a layer with weights W, input u and any scale a > 0::

    BN((a W) u) = BN(W u)
    d BN((a W) u) / du = d BN(W u) / du
    d BN((a W) u) / d(a W) = 1/a  d BN(W u) / dW

This is exact for eps = 0. With eps it holds as far as eps is small beside the variance of (a W) u: the table has the
largest relative errors over the layer's batch, for each a.

So "larger weights lead to smaller gradients, and Batch Normalization will stabilize the parameter growth". Since the
loss L does not depend on the scale of a unit's weights w, its gradient is orthogonal to w. A step w - r dL/dw then
makes w longer, by Pythagoras, and turns its direction as a rate of r / |w|^2 would at a length of 1::

    |w_t|^2 = |w_0|^2 + r^2 (|dL/dw at step 0|^2 + ... + |dL/dw at step t - 1|^2)

A network with batch norm learns the digits at rates r from 0.01 to 10^4 for all weights before a batch norm (other
parameters: 0.3): once as it is, and once with every unit's w scaled back to its first length after each step, which
changes no output, only the steps to come. Beside them is the same network without batch norm. The program raises an
error if the sum of squares does not hold at every step, or if a training from a W with rate a^2 r is not the same, step
by step, as one from W with rate r.

Where it does not show: with eps = 1e-5 the output changes by half where weights are a hundredth of their usual size.
Up to a rate of 1 growth changes nothing. And it does not find the best rate: one huge step leaves weights so long that
the effective rate of 10^4 ends below that of 0.01.

Run ``python examples/scale_invariance.py`` (a quarter of a minute; ``--quick``: seconds).

Source: Ioffe & Szegedy, "Batch Normalization: Accelerating Deep Network Training by Reducing Internal Covariate Shift",
ICML 2015, section 3.3.
"""

from collections.abc import Sequence
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
from exact import ExactBatchNorm, dense_network
from gallery import BLUE, GREEN, ORANGE, Array, digits, one_thread, options, panels, progress, save, spreads, table
from network import Dense, Network

import fastbn

SIZES = (64, 100, 100, 10)
BATCH = 60
OTHERS = 0.3  # the rate of gamma, beta and the last layer
SCALES = [10.0**n for n in range(-4, 5)]
RATES = [10.0**n for n in range(-2, 5)]
FREE, HELD, PLAIN = "batch norm", "lengths held", "plain"
COLOURS = {FREE: BLUE, HELD: GREEN, PLAIN: ORANGE}


class Run(NamedTuple):
    losses: Array  # of each step's batch
    squares: Array  # (steps + 1, units): |w|^2 of the first layer
    accuracy: float  # on the test set, in the end


class Result(NamedTuple):
    errors: dict[float, Array]  # by eps: (scales, 3), the three identities' largest relative errors
    same: float  # the largest relative difference of losses between (W, r) and (a W, a^2 r)
    runs: dict[str, dict[float, list[Run]]]  # by network and rate: a run per seed


def relative(found: Array, expected: Array) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def normalized(w: Array, u: Array, dy: Array, eps: float) -> tuple[Array, Array, Array]:
    """BN(u w), and dy times its derivatives with respect to u and w."""
    y, saved = fastbn.batch_norm(u @ w, channel_axis=-1, eps=eps)
    dx = fastbn.batch_norm_backward(dy, saved).x
    return y, dx @ w.T, u.T @ dx


def identities(u: Array, eps: float, rng: np.random.Generator) -> Array:
    """The largest relative error of each of the three, for each of the scales."""
    w, dy = rng.normal(0, u.shape[1] ** -0.5, (u.shape[1], 100)), rng.standard_normal((len(u), 100))
    y, du, dw = normalized(w, u, dy, 0)
    scaled = [(a, *normalized(a * w, u, dy, eps)) for a in SCALES]
    return np.array([(relative(ay, y), relative(adu, du), relative(a * adw, dw)) for a, ay, adu, adw in scaled])


def build(name: str, seed: int) -> Network:
    return dense_network(SIZES, np.random.default_rng(seed), lambda n: [] if name == PLAIN else [ExactBatchNorm(n)])


def hidden(network: Network) -> list[Dense]:
    """The layers before a batch norm; without it those in their places."""
    return [layer for layer in network.layers if isinstance(layer, Dense)][:-1]


def train(name: str, rate: float, steps: int, seed: int, data: Any, scale: float = 1) -> Run:
    """The same initial weights, but for their scale, and the same mini-batches for every network and rate."""
    progress(f"{name}: rate {rate:g}, seed {seed}")
    images, test_images, labels, test_labels = data
    network, rng = build(name, seed), np.random.default_rng(seed + 1000)
    first = hidden(network)[0]
    for dense in hidden(network):
        dense.weight *= scale
    lengths = [np.linalg.norm(dense.weight, axis=0) for dense in hidden(network)]
    losses, squares = [], [lengths[0] ** 2]
    for step in range(steps):
        batch = rng.choice(len(images), BATCH, replace=False)
        losses.append(network.loss(images[batch], labels[batch]))
        if not np.isfinite(losses[-1]):
            break
        grown = squares[-1] + rate**2 * np.sum(first.gradients["weight"] ** 2, axis=0)
        for layer in network.layers:
            for parameter in layer.names:
                its_rate = rate if layer in hidden(network) else OTHERS
                getattr(layer, parameter)[:] -= its_rate * layer.gradients[parameter]
        squares.append(np.sum(first.weight**2, axis=0))
        if name == FREE and relative(squares[-1], grown) > 1e-9:
            raise ArithmeticError(
                f"step {step}: |w|^2 is not the sum of squares, by {relative(squares[-1], grown):.2g}"
            )
        if name == HELD:
            for dense, length in zip(hidden(network), lengths, strict=True):
                dense.weight *= length / np.linalg.norm(dense.weight, axis=0)
            squares[-1] = np.sum(first.weight**2, axis=0)
    return Run(np.array(losses), np.array(squares), network.accuracy(test_images, test_labels))


def report(r: Result) -> None:
    names = "BN", "du", "dW"
    columns = [f"{name}, eps {eps:g}" for eps in r.errors for name in names]
    table(("a", *columns), [(f"{a:g}", *np.hstack(list(r.errors.values()))[i]) for i, a in enumerate(SCALES)])
    print(f"training from 100 W at 10^4 times the rate: losses differ by {r.same:.1g} of the largest\n")
    rows = []
    for rate in r.runs[FREE]:
        cells = []
        for by_rate in r.runs.values():
            found = [100 * run.accuracy for run in by_rate[rate]]
            cells.append(f"{fmean(found):.1f} ({min(found):.1f}-{max(found):.1f})")
        squares = np.mean([run.squares.mean(axis=1)[[0, -1]] for run in r.runs[FREE][rate]], axis=0)
        rows.append((f"{rate:g}", *cells, squares[1] / squares[0], rate / squares[0], rate / squares[1]))
    table(("rate", *(f"{n}: test %" for n in r.runs), "|w|^2 grows", "r / |w|^2: first", "last"), rows)


def draw(r: Result, output: str) -> None:
    titles = "weights grow; shades as in (b)", "the effective rate falls", "after training"
    figure, axes = panels("abc", titles, (12, 4.2))
    shades = [*np.linspace(0.25, 1, len(r.runs[FREE]))]
    for shade, (rate, runs) in zip(shades, r.runs[FREE].items(), strict=True):
        growth = runs[0].squares.mean(axis=1)
        steps = np.arange(1, len(growth))
        axes["a"].plot(steps, growth[1:], color=BLUE, alpha=shade, label=f"{rate:g}")
        axes["b"].plot(steps, rate / growth[:-1], color=BLUE, alpha=shade, label=f"{rate:g}")
    for name, by_rate in r.runs.items():
        found = 100 * np.array([[run.accuracy for run in runs] for runs in by_rate.values()])
        rates = np.array(list(by_rate)) * (1 + 0.1 * (list(r.runs).index(name) - 1))  # side by side
        spreads(axes["c"], rates, found, color=COLOURS[name], label=name)
    axes["a"].set(xscale="log", yscale="log", xlabel="step", ylabel="|w|^2, mean of the units")
    axes["b"].set(xscale="log", yscale="log", xlabel="step", ylabel="rate / |w|^2")
    axes["c"].set(xscale="log", xlabel="rate of the weights before batch norm", ylabel="test accuracy (%)")
    axes["b"].legend(title="rate", frameon=False, fontsize="small", ncols=2)
    axes["c"].legend(frameon=False)
    save(figure, output)


def main(argv: Sequence[str] | None = None) -> Result:
    args = options(__doc__, "scale_invariance.png").parse_args(argv)
    steps, count = (60, 1) if args.quick else (600, 3)
    images, test_images, labels, test_labels = digits()
    data = images.astype(float), test_images.astype(float), labels, test_labels
    rates = [0.01, 1.0, 1000.0] if args.quick else RATES
    with one_thread(), np.errstate(over="ignore", invalid="ignore"):
        rng = np.random.default_rng(args.seed)
        errors = {eps: identities(data[0][:BATCH], eps, rng) for eps in (0, 1e-5)}
        one, scaled = (train(FREE, a**2 * 0.1, min(steps, 200), args.seed, data, a).losses for a in (1, 100))
        seeds = range(args.seed, args.seed + count)
        runs = {name: {rate: [train(name, rate, steps, s, data) for s in seeds] for rate in rates} for name in COLOURS}
    result = Result(errors, relative(scaled, one), runs)
    if max(errors[0].max(), result.same) > 1e-9:  # 1e-15 found
        raise ArithmeticError(f"the scale of weights matters, by {max(errors[0].max(), result.same):.2g}")
    report(result)
    draw(result, args.output)
    return result


if __name__ == "__main__":
    main()
