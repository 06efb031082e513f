"""Santurkar et al.'s theorems on gradients, Hessians and initial weights, checked at every step of a training.

A unit has the outputs y = X w over a batch of m, and L(z) is the loss as a function of what it passes on. Without batch
norm it passes on y itself; with batch norm the loss is Lbn(y) = L(z) at z = gamma yhat + beta, yhat = (y - mean)/sigma.
With g = dL/dz and d = dLbn/dy, both at the same z, and H the Hessian of L in z, the inequalities are as follows; gamma
and beta are constant, sigma has no eps and is not 0, and L is twice differentiable::

    4.1   |d|^2        <=  gamma^2/sigma^2 (|g|^2 - <1, g>^2/m - <g, yhat>^2/m)
    4.2   d' Hbn d     <=  gamma^2/sigma^2 d'Hd - gamma/(m sigma^2) <g, yhat> |d|^2                  (first part)
                       <=  gamma^2/sigma^2 (g'Hg - <g, yhat> |d|^2/(m gamma)),                       (second part)
                           if H "preserves the relative norms of" g and d
    4.4   |dLbn/dw|^2  <=  max over |X| <= l of |X'd|^2
                       <=  gamma^2/sigma^2 l^2 (|g|^2 - <1, g>^2/m - <g, yhat>^2/m)
    4.5   |w0 - vbn|^2 <=  |w0 - v|^2 - (|v|^2 - <v, w0>)^2/|v|^2   where <v, w0> > 0,
          from initial weights w0 to the closest optima v without and vbn with batch norm

What is found, for three layers of tanh units that learn the digits, in float64:

- 4.1 and the first part of 4.2 are equalities for eps = 0. With P the projection off 1 and yhat, whose square is m, the
  chain rule gives d = gamma/sigma P g, which is 4.1. A step along d changes neither mean nor sigma, so its second
  derivative is gamma^2/sigma^2 d'Hd and what P's change by d/sigma takes away, which is 4.2. With eps there is a slack:
  never negative in 4.1, of both signs in 4.2. The second part fails often.
- 4.1 is also quoted with 1/sqrt(m) for its last 1/m. That subtracts more than the equality has, and fails every time.
- They say nothing of the network with the same weights and no batch norm, as the words "identical non-BN network" would
  have it: its g is taken at y. With that g 4.1 fails in 1 % of the cases, and in 86 % where initial weights are ten
  times larger, since saturated units have smaller gradients. At the usual weights gradients are larger with batch norm
  in the first steps: sigma is below 1, and the two inner products take 0.5 to 4 % of |g|^2.
- 4.4 as printed, g_j^2 - m mu^2 - l^2 <g, yhat>^2 with g_j = l^2 |g|^2, mixes quantities of different dimension. Above
  is what follows from 4.1, with dL/dz held while X varies. l is the largest singular value of X here.
- 4.5 is an equality too, Pythagoras on the line through v: multiples of an optimum are optima with batch norm. That
  needs a bias without batch norm, and gamma and beta that are learnt with it, as they are in observation 4.3 of the
  paper (gamma = sigma and beta = mean undo batch norm, so no optimum is lost). In the setting of the proofs gamma and
  beta are constant; then, and without a bias, v need not be an optimum's direction, and the inequality fails (Dannemann
  & Junike 2025). Here v fits the digits' labels linearly, by least squares on 20 principal components.

The program raises an error where an inequality fails by more than rounding.

Run ``python examples/smoothness_bounds.py`` (20 seconds; ``--quick``: five).

Sources: Santurkar, Tsipras, Ilyas & Madry, "How Does Batch Normalization Help Optimization?", NeurIPS 2018, section 4.
Dannemann & Junike, "Batch normalization does not improve initialization", arXiv:2502.17913, 2025.
"""

from collections.abc import Callable, Sequence
from copy import deepcopy
from itertools import product
from typing import Any, NamedTuple

import numpy as np
from exact import ExactBatchNorm, dense_network
from gallery import BLUE, GREEN, GREY, ORANGE, SHADES, Array, digits, one_thread, options, panels, progress, save, table
from network import SGD, Dense, Network, softmax_loss

import fastbn

SIZES = (64, 50, 50, 50, 10)
BATCH, RATE = 60, 0.3
CHANNELS = 3  # of each layer have their Hessians measured at each step
ROUNDING = 1e-12  # of the bound's largest part; 1e-14 found
DIFFERENCES = 1e-7  # of the same, in second derivatives by differences; 1e-9 found
Gradient = Callable[[Array], Array]


class Watched(ExactBatchNorm):
    """Keeps what came in, either way, and what went back."""

    def forward(self, x: Array, training: bool) -> Array:
        self.y = x
        return super().forward(x, training)

    def backward(self, dy: Array) -> Array:
        self.g, self.d = dy, super().backward(dy)
        return self.d


class Step(NamedTuple):
    """Of every unit of one layer in one step. A slack is 1 - left/right; in 4.2 (right - left)/(its parts' sizes)."""

    size: Array  # |d|^2
    scale: Array  # gamma^2/sigma^2
    gradient: Array  # |g|^2
    removed: Array  # (2, units): shares of |g|^2 that the two inner products take away
    slack: Array  # 4.1
    root: Array  # 4.1 with 1/sqrt(m): right/left - 1
    plain: Array  # |g|^2 at y: the gradient without batch norm
    plain_slack: Array  # 4.1 with that g
    second: Array  # (CHANNELS,): 4.2, first part
    relaxed: Array  # 4.2, second part
    weights: Array  # 4.4
    printed: Array  # 4.4 as printed: right/left - 1
    unsquared: Array  # the same with g_j for its square


class Lemma(NamedTuple):
    """4.5, for many w0 and each of the digits: squared distances."""

    before: Array  # |w0 - v|^2
    bound: Array
    learnt: Array  # |w0 - vbn|^2 with gamma and beta learnt
    constant: Array  # with constant gamma and beta, where <v, w0> > 0 for v without a bias
    constant_bound: Array
    gradient: float  # the largest of the loss at vbn, by fastbn


class Result(NamedTuple):
    steps: dict[tuple[float, int], list[list[Step]]]  # by eps and scale of the initial weights: each step's layers
    lemma: Lemma


def parts(g: Array, yhat: Array) -> tuple[Array, Array, Array]:
    """|g|^2, <1, g>^2/m and <g, yhat>^2/m of each unit."""
    m = len(g)
    return np.sum(g**2, axis=0), g.sum(axis=0) ** 2 / m, np.sum(g * yhat, axis=0) ** 2 / m


def quadratic_form(gradient: Gradient, at: Array, j: int, v: Array) -> float:
    """v'Hv, H the Hessian in the values of unit j: differences of gradients, extrapolated (Richardson)."""

    def difference(h: float) -> float:
        move = np.zeros_like(at)
        move[:, j] = h * v
        return float(v @ (gradient(at + move) - gradient(at - move))[:, j] / (2 * h))

    h = 2e-3 * at[:, j].std() / np.abs(v).max()
    return (4 * difference(h / 2) - difference(h)) / 3


def along_gradients(norm: Watched, g_at: Gradient, units: Array) -> tuple[Array, Array]:
    """Slacks of theorem 4.2's two parts for some of the units; `g_at` is dL/dz for any z."""

    def d_at(y: Array) -> Array:
        own = deepcopy(norm)
        return own.backward(g_at(own.forward(y, training=True)))

    yhat = (norm.y - norm.saved.mean) * norm.saved.rstd
    z, slacks = norm.gamma * yhat + norm.beta, []
    for j in units:
        g, d, scale = norm.g[:, j], norm.d[:, j], (norm.gamma[j] * norm.saved.rstd[j]) ** 2
        left = quadratic_form(d_at, norm.y, j, d)
        along_d, along_g = (scale * quadratic_form(g_at, z, j, v) for v in (d, g))
        away = scale / (norm.gamma[j] * len(g)) * (g @ yhat[:, j]) * (d @ d)
        slacks.append([(along - away - left) / (abs(along) + abs(away)) for along in (along_d, along_g)])
    first, second = np.array(slacks).T
    if norm.eps == 0 and first.min() < -DIFFERENCES:
        raise ArithmeticError(f"theorem 4.2 fails, by {-first.min():.2g}")
    return first, second


def measure(network: Network, index: int, x: Array, labels: Array, rng: np.random.Generator) -> Step:
    """After a pass there and back: of the batch norm at this place, whose input is X W for the X given."""
    norm, above = network.layers[index], Network(deepcopy(network.layers[index + 1 :]))

    def g_at(z: Array) -> Array:
        return above.backward(softmax_loss(above.forward(z, training=True), labels)[1])

    yhat, scale = (norm.y - norm.saved.mean) * norm.saved.rstd, (norm.gamma * norm.saved.rstd) ** 2
    size, (square, by_mean, by_yhat) = np.sum(norm.d**2, axis=0), parts(norm.g, yhat)
    bound, by_root = (scale * (square - by_mean - factor * by_yhat) for factor in (1, len(yhat) ** 0.5))
    if (size - bound > ROUNDING * scale * square).any():
        raise ArithmeticError(f"theorem 4.1 fails, by {(size / bound - 1).max():.2g}")
    plain = parts(g_at(norm.y), yhat)
    plain_bound = scale * (plain[0] - plain[1] - plain[2])

    limit = np.linalg.norm(x, 2) ** 2
    of_weights = np.sum((x.T @ norm.d) ** 2, axis=0)
    if (of_weights > limit * bound * (1 + ROUNDING)).any():
        raise ArithmeticError(f"theorem 4.4 fails, by {(of_weights / (limit * bound) - 1).max():.2g}")
    printed, unsquared = (
        scale * ((limit * square) ** power - by_mean - limit * len(yhat) * by_yhat) for power in (2, 1)
    )
    return Step(
        size, scale, square, np.array([by_mean, by_yhat]) / square, 1 - size / bound, by_root / size - 1,
        plain[0], 1 - size / plain_bound,
        *along_gradients(norm, g_at, rng.choice(len(scale), CHANNELS, replace=False)),
        1 - of_weights / (limit * bound), printed / (limit * size) - 1, unsquared / (limit * size) - 1,
    )  # fmt: skip


def train(eps: float, scale: int, steps: int, seed: int, data: Any) -> list[list[Step]]:
    images, _, labels, _ = data
    rng = np.random.default_rng(seed)
    network = dense_network(SIZES, rng, lambda units: [Watched(units, eps)])
    for layer in network.layers[:-1]:
        if isinstance(layer, Dense):
            layer.weight *= scale
    optimizer, found = SGD(network, RATE), []
    for step in range(steps):
        progress(f"eps {eps:g}, weights x{scale}: step {step + 1} of {steps}")
        batch = rng.choice(len(images), BATCH, replace=False)
        network.loss(images[batch], labels[batch])
        at = [i for i, layer in enumerate(network.layers) if isinstance(layer, Watched)]
        found.append([measure(network, i, network.layers[i - 1].x, labels[batch], rng) for i in at])
        optimizer.step()
    return found


def lemma(count: int, rng: np.random.Generator, data: Any) -> Lemma:
    """Lemma 4.5 for a linear fit: every digit is a unit, whose w0 are random with the length of its v."""
    images, _, labels, _ = data
    target = np.eye(10)[labels]
    directions = np.linalg.svd(images - images.mean(axis=0), full_matrices=False)[2][:20]
    x = images @ directions.T  # not centred
    centred = x - x.mean(axis=0)
    v = np.linalg.lstsq(centred, target, rcond=None)[0]  # with a bias
    w0 = rng.standard_normal((count, *v.shape)) * np.linalg.norm(v, axis=0) / len(v) ** 0.5

    def to_line(v: Array) -> Array:
        """The closest of v's multiples."""
        return v * np.sum(w0 * v, axis=1, keepdims=True) / np.sum(v**2, axis=0)

    def square(w: Array) -> Array:
        return np.sum(w**2, axis=1)

    def bound(v: Array) -> Array:
        of_v = np.sum(v**2, axis=0)
        return square(w0 - v) - (of_v - np.sum(w0 * v, axis=1)) ** 2 / of_v

    # v's multiples are optima with batch norm, as the gradient says; gamma is the best one and may be negative
    closest, largest = to_line(v), 0.0
    for w in closest[:10]:
        y, saved = fastbn.batch_norm(x @ w, channel_axis=-1, eps=0)
        gamma = np.mean(y * target, axis=0)
        error = gamma * y + target.mean(axis=0) - target
        largest = max(largest, np.abs(x.T @ fastbn.batch_norm_backward(gamma * error, saved).x).max() / len(x))
    before, learnt = square(w0 - v), square(w0 - closest)
    if (learnt - bound(v) > ROUNDING * before).any():
        raise ArithmeticError("lemma 4.5 fails where gamma and beta are learnt")

    # Constant gamma and beta: the best direction, of most correlation with the target, is still v's. Without a bias the
    # best weights have another.
    unbiased = np.linalg.lstsq(x, target, rcond=None)[0]
    agrees, positive = np.sum(w0 * unbiased, axis=1) > 0, np.sum(w0 * v, axis=1, keepdims=True) > 0
    constant = square(w0 - to_line(v) * positive)  # gamma > 0: half of the line
    return Lemma(before, bound(v), learnt, constant[agrees], bound(unbiased)[agrees], float(largest))


def collected(steps: list[list[Step]], field: str) -> Array:
    """(steps, layers, ...)."""
    return np.array([[getattr(of_layer, field) for of_layer in layers] for layers in steps])


def report(r: Result) -> None:
    slacks = {"4.1": "slack", "4.1, g without": "plain_slack", "4.2, first part": "second", "4.4": "weights"}
    shares = {
        "4.1 with 1/sqrt(m)": "root", "4.2, second part": "relaxed",
        "4.4 as printed": "printed", "its g_j not squared": "unsquared",
    }  # fmt: skip
    rows: list[Sequence[object]] = []
    for (eps, scale), steps in r.steps.items():
        for theorem, field in (slacks | shares).items():
            values = collected(steps, field)
            tolerance = DIFFERENCES if field in ("second", "relaxed") else ROUNDING
            spread = np.quantile(values, (0, 0.5, 1)) if theorem in slacks else 3 * ["-"]
            fails = f"{np.mean(values < -tolerance):.1%}"
            rows.append((theorem, f"{eps:g}", scale, values.size, fails, *spread))
    table(("theorem", "eps", "weights x", "cases", "fails", "slack: least", "median", "most"), rows)

    print("\nmedians of the units, means of ten steps, eps = 0")
    rows, fields = [], ("size", "scale", "gradient", "removed", "plain")
    for scale in (1, 10):
        for name, steps in (("first", r.steps[0, scale][:10]), ("last", r.steps[0, scale][-10:])):
            size, factor, gradient, removed, plain = (
                np.median(collected(steps, field), axis=-1).mean(axis=0) for field in fields
            )
            for i in range(len(size)):
                less = (f"{share:.1%}" for share in removed[i])
                rows.append((scale, name, i + 1, size[i], factor[i], gradient[i], *less, plain[i]))
    table(("weights x", "steps", "layer", "|d|^2", "gamma^2/sigma^2", "|g|^2", "less 1", "yhat", "|g|^2 without"), rows)

    print()
    rows = []
    for name, (left, right) in sides(r.lemma).items():
        fails = f"{np.mean(left - right > ROUNDING * right):.1%}"
        rows.append((name, left.size, fails, *np.quantile(left / right, (0, 0.5, 1))))
    table(("lemma 4.5: gamma and beta", "cases", "fails", "left/right: least", "median", "most"), rows)
    gain = np.median(np.sqrt(r.lemma.learnt / r.lemma.before))
    print(f"learnt: the closest optimum is at {gain:.2f} of the distance; gradient there {r.lemma.gradient:.0e}")


def sides(r: Lemma) -> dict[str, tuple[Array, Array]]:
    return {"learnt": (r.learnt, r.bound), "constant": (r.constant, r.constant_bound)}


def draw(r: Result, output: str) -> None:
    titles = (
        "gradients of outputs, with / without batch norm", "4.1 and 4.2: slack is rounding, or eps's",
        "4.4: gradients of weights", "4.5: the inequality fails above 1",
    )  # fmt: skip
    figure, axes = panels("ab;cd", titles, (11, 7.5))
    steps = r.steps[0, 1]
    layers = range(len(SIZES) - 2)
    for (scale, colour), i in product(((1, BLUE), (10, GREEN)), layers):
        sizes = (np.median(collected(r.steps[0, scale], field)[:, i], axis=1) for field in ("size", "plain"))
        size, plain = (values[: len(values) // 10 * 10].reshape(-1, 10).mean(axis=1) for values in sizes)
        style = {"ls": ("-", "--", ":")[i], "color": colour, "lw": 1.2, "label": f"layer {i + 1}, weights x{scale}"}
        axes["a"].plot(np.arange(len(size)) * 10 + 5.5, size / plain, **style)
    at, reached = np.arange(1, len(steps) + 1), 100 * (1 - collected(steps, "weights"))
    for i in layers:
        middle = np.median(reached[:, i], axis=1)
        axes["c"].plot(at, middle, color=SHADES[BLUE][i], lw=1, label=f"layer {i + 1}, median unit")
    axes["c"].plot(at, reached.max(axis=(1, 2)), color=GREY, lw=1, label="the largest of all units")
    axes["a"].axhline(1, color=GREY, lw=1)
    bins = np.logspace(-17, -2, 61)
    for theorem, field, colour in (("4.1", "slack", BLUE), ("4.2", "second", GREEN)):
        for eps in (0, 1e-5):
            slack = np.abs(collected(r.steps[eps, 1], field)).ravel()
            style = {"histtype": "stepfilled" if eps else "step", "color": colour, "alpha": 0.5 if eps else 1}
            weights = np.full(len(slack), 100 / len(slack))
            axes["b"].hist(slack.clip(bins[0]), bins, weights=weights, label=f"{theorem}, eps {eps:g}", **style)
    for (name, (left, right)), colour in zip(sides(r.lemma).items(), (BLUE, ORANGE), strict=True):
        x, y = right.ravel()[:500], (left / right).ravel()[:500]
        axes["d"].plot(x, y, ".", ms=3, color=colour, label=f"gamma, beta {name}")
    axes["a"].set(yscale="log", xlabel="step", ylabel="|d|^2 / |g|^2 without, median unit", ylim=0.02)
    axes["b"].set(xscale="log", xlabel="|slack|, relative", ylabel="cases (%)")
    axes["c"].set(yscale="log", xlabel="step", ylabel="left side, % of the bound", ylim=(0.3, 500))
    axes["d"].set(xlabel="right side", ylabel="left side / right side", ylim=(0.92, 1.12))
    for letter, axis in axes.items():
        axis.legend(frameon=False, fontsize="small", ncols=2 if letter == "a" else 1)
    save(figure, output)


def main(argv: Sequence[str] | None = None) -> Result:
    args = options(__doc__, "smoothness_bounds.png").parse_args(argv)
    steps, count = (12, 100) if args.quick else (300, 1000)
    images, test_images, labels, test_labels = digits()
    data = images.astype(float), test_images.astype(float), labels, test_labels
    with one_thread():
        found = {of: train(*of, steps, args.seed, data) for of in ((0, 1), (1e-5, 1), (0, 10))}
        result = Result(found, lemma(count, np.random.default_rng(args.seed), data))
    report(result)
    draw(result, args.output)
    return result


if __name__ == "__main__":
    main()
