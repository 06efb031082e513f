"""Singular values of layer Jacobians, and how Gaussian activations are: two conjectures of Ioffe & Szegedy, measured.

Section 3.3 conjectures "that Batch Normalization may lead the layer Jacobians to have singular values close to 1, which
is known to be beneficial for training (Saxe et al., 2013)". From one normalised vector to the next, xhat' = F(xhat): if
both are Gaussian and uncorrelated and F is linear, I = Cov[xhat'] = J Cov[xhat] J' = J J', so singular values are 1.
Of a sample, in a layer with weights W and an activation f, its statistics being constants::

    J = diag(1/sigma') W diag(f'(gamma xhat + beta) gamma)         without batch norm: J = W diag(f'(x))

Section 3.2 puts batch norm before the activation since "W u + b is more likely to have a symmetric, non-sparse
distribution, that is 'more Gaussian'", than u. The measure is the Wasserstein distance of a unit's standardised values
from a Gaussian: the mean of |value - quantile|, 0.03 for a sample of a Gaussian of this size, 0.54 for -1 and 1.

Networks of ten layers of 64 tanh or relu units learn the digits: plain, with orthogonal weights as in Saxe et al., and
with batch norm, from weights of the usual size (of variance 1/64, twice that for relu) and of a third and three times
it. Measured on 500 training samples; the quadratic mean of singular values is what keeps the size of a gradient.

What shows: with batch norm the quadratic mean is 1.1 (tanh) and 1.2 (relu) whatever the size of the weights, and 0.5 to
1.1 after training, where a plain network's goes with its weights. W u + b is closer to a Gaussian than u, with and
without batch norm, though less so in deeper layers and after training. What does not: singular values are not close to
1 one by one. With weights of the usual size a tenth is below 0.07 and a tenth above 1.6, and with relu half are 0;
those of orthogonal weights are closer. Units are correlated, so the premise does not hold. Nor is the quadratic mean 1:
for wide relu networks at initialisation Yang et al. prove that gradients' squares grow by pi/(pi - 1) = 1.21^2 a layer.

Run ``python examples/layer_jacobians.py`` (half a minute; ``--quick``: seconds).

Source: Ioffe & Szegedy, "Batch Normalization: Accelerating Deep Network Training by Reducing Internal Covariate Shift",
ICML 2015, sections 3.2 and 3.3. Saxe, McClelland & Ganguli, "Exact solutions to the nonlinear dynamics of learning in
deep linear neural networks", ICLR 2014. Yang, Pennington, Rao, Sohl-Dickstein & Schoenholz, "A mean field theory of
batch normalization", ICLR 2019.
"""

from collections.abc import Sequence
from itertools import pairwise, product
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
from exact import ExactBatchNorm, in_float64
from gallery import BLUE, GREEN, ORANGE, SHADES, Array, digits, one_thread, options, panels, progress, save, table
from network import SGD, Dense, Layer, Network, ReLU, Tanh, softmax_loss

import fastbn

DEPTH, UNITS, BATCH, RATE = 10, 64, 60, 0.1
SAMPLES, JACOBIANS = 500, 20  # measured on so many samples; one Jacobian for each of so many
PLAIN, ORTHOGONAL, NORMALIZED = "plain", "orthogonal", "batch norm"
COLOURS = {PLAIN: ORANGE, ORTHOGONAL: GREEN, NORMALIZED: BLUE}
TANH, RELU = "tanh", "relu"
ACTIVATIONS: dict[str, tuple[type[Layer], float]] = {TANH: (Tanh, 1.0), RELU: (ReLU, 2**0.5)}
GAINS = (1 / 3, 1.0, 3.0)


class Block(NamedTuple):
    dense: Dense
    norm: ExactBatchNorm | None
    activation: Layer


class Measured(NamedTuple):
    """Of one network at one time; NaN where it has overflown."""

    singular: Array  # (DEPTH - 1, samples, UNITS), falling
    gradient: Array  # (DEPTH,): size of the loss's gradient in each layer's xhat
    inputs: Array  # (DEPTH - 1,): median distance from a Gaussian of a layer's u, from the second layer on
    outputs: Array  # the same of W u + b
    correlation: Array  # (DEPTH - 1,): quadratic mean of those of pairs of units of W u + b
    accuracy: float

    def size(self) -> Array:
        """The quadratic mean of each layer's singular values."""
        return np.sqrt(np.mean(self.singular**2, axis=(1, 2)))


Key = tuple[str, str, float]  # activation, network, size of the weights
Results = dict[Key, tuple[list[Measured], list[Measured]]]  # before and after training: one per seed


def build(activation: str, kind: str, gain: float, rng: np.random.Generator) -> tuple[Network, list[Block]]:
    layer, usual = ACTIVATIONS[activation]
    blocks = []
    for _ in range(DEPTH):
        dense = Dense(UNITS, UNITS, gain * usual * UNITS**-0.5, rng, bias=kind != NORMALIZED)
        if kind == ORTHOGONAL:
            q, r = np.linalg.qr(rng.standard_normal((UNITS, UNITS)))
            dense.weight[:] = gain * usual * q * np.sign(np.diag(r))
        blocks.append(Block(dense, ExactBatchNorm(UNITS, 1e-5) if kind == NORMALIZED else None, layer()))
    layers = [part for block in blocks for part in block if part is not None]
    return in_float64([*layers, Dense(UNITS, 10, UNITS**-0.5, rng)]), blocks


def jacobians(block: Block, following: Block) -> Array:
    """After a forward pass, of some samples: from this block's xhat (or W u + b) to the next one's; transposed."""
    z = block.activation.backward(np.ones((SAMPLES, UNITS)))[:JACOBIANS]  # f'
    if block.norm is not None and following.norm is not None:
        return (z * block.norm.gamma)[:, :, None] * following.dense.weight * following.norm.saved.rstd
    return z[:, :, None] * following.dense.weight


def from_gaussian(values: Array) -> float:
    """The median over units of their Wasserstein distance from a Gaussian of their mean and variance."""
    moving = values[:, np.ptp(values, axis=0) > 0]  # not relu units that are always 0
    if not moving.size or not np.isfinite(moving).all():
        return np.nan
    standardised, _ = fastbn.batch_norm(np.ascontiguousarray(moving), channel_axis=-1, eps=0)
    quantiles = [NormalDist().inv_cdf((i + 0.5) / len(values)) for i in range(len(values))]
    return float(np.median(np.abs(np.sort(standardised, axis=0) - np.array(quantiles)[:, None]).mean(axis=0)))


def correlation(values: Array) -> float:
    standardised, _ = fastbn.batch_norm(values, channel_axis=-1, eps=0)
    matrix = standardised.T @ standardised / len(values)
    return float(np.sqrt(np.mean(matrix[~np.eye(UNITS, dtype=bool)] ** 2)))


def measure(network: Network, blocks: list[Block], data: Any) -> Measured:
    images, test_images, labels, test_labels = data
    accuracy = network.accuracy(test_images, test_labels)
    logits = network.forward(images[:SAMPLES], training=True)
    pairs = list(pairwise(blocks))
    found = np.array([jacobians(*pair) for pair in pairs])
    singular = np.linalg.svd(found, compute_uv=False) if np.isfinite(found).all() else np.full(found.shape[:3], np.nan)
    u = [block.dense.x for block in blocks[1:]]
    sums = [block.dense.x @ block.dense.weight + block.dense.bias for block in blocks[1:]]
    distances = [[from_gaussian(values) for values in of] for of in (u, sums)]
    dy, gradient = softmax_loss(logits, labels[:SAMPLES])[1], []
    activations = {id(block.activation): block.norm for block in blocks}
    for layer in reversed(network.layers):
        dy = layer.backward(dy)
        if id(layer) in activations:
            norm = activations[id(layer)]
            gradient.append(np.linalg.norm(dy if norm is None else dy * norm.gamma))
    return Measured(
        singular, np.array(gradient[::-1]), *map(np.array, distances), np.array([*map(correlation, sums)]), accuracy
    )


def train(key: Key, steps: int, seed: int, data: Any) -> tuple[Measured, Measured]:
    """Before and after; the same mini-batches for every network."""
    progress(f"{key[0]}, {key[1]}, weights x{key[2]:.2g}, seed {seed}")
    network, blocks = build(*key, np.random.default_rng(seed))
    optimizer, rng = SGD(network, RATE), np.random.default_rng(seed + 1000)
    before = measure(network, blocks, data)
    for _ in range(steps):
        batch = rng.choice(len(data[0]), BATCH, replace=False)
        network.loss(data[0][batch], data[2][batch])
        optimizer.step()
    return before, measure(network, blocks, data)


def report(results: Results) -> None:
    rows: list[Sequence[object]] = []
    for (activation, kind, gain), times in results.items():
        for time, found in zip(("before", "after"), times, strict=True):
            sizes = np.mean([run.size() for run in found], axis=0)
            tenths = np.quantile([run.singular for run in found], (0.1, 0.5, 0.9))
            flow = np.exp(np.mean([np.log(run.gradient[0] / run.gradient[-1]) for run in found]))
            accuracy = f"{100 * np.mean([run.accuracy for run in found]):.1f}"
            rows.append(
                (
                    activation,
                    kind,
                    f"{gain:.2g}",
                    time,
                    accuracy,
                    f"{sizes.min():.2f}-{sizes.max():.2f}",
                    *(f"{v:.2f}" for v in tenths),
                    flow,
                )
            )
    columns = "", "", "weights x", "training", "test %", "size, layers", "10 %", "50 %", "90 %", "gradient, first/last"
    table(columns, rows)
    print("\ndistance from a Gaussian in layers 2, 6 and 10; correlation of units; weights of the usual size")
    rows = []
    for (activation, kind, gain), times in results.items():
        if gain == 1:
            for time, found in zip(("before", "after"), times, strict=True):
                cells = (
                    np.mean([getattr(run, of) for run in found], axis=0)[[0, 4, 8]]
                    for of in ("inputs", "outputs", "correlation")
                )
                rows.append((activation, kind, time, *(f"{v:.3f}" for of in cells for v in of)))
    table(("", "", "training", "u: 2", "6", "10", "W u + b: 2", "6", "10", "correlation: 2", "6", "10"), rows)
    print(f"a Gaussian's own: {from_gaussian(np.random.default_rng(0).standard_normal((SAMPLES, UNITS))):.3f}")


def draw(results: Results, output: str) -> None:
    titles = (
        "tanh: Jacobians after training; lines of (c)", "tanh: spectrum; dotted: before it",
        "tanh: gradients after training", "tanh: after training",
    )  # fmt: skip
    figure, axes = panels("ab;cd", titles, (11, 7.5))
    layers = np.arange(2, DEPTH + 1)
    for kind, (gain, shade) in product((PLAIN, NORMALIZED), zip(GAINS, range(3), strict=True)):
        if (TANH, kind, gain) in results:
            found = results[TANH, kind, gain]
            style = {"color": SHADES[COLOURS[kind]][shade], "lw": 1.3, "label": f"{kind}, weights x{gain:.2g}"}
            axes["a"].plot(layers, np.mean([run.size() for run in found[1]], axis=0), **style)
            gradient = np.mean([run.gradient / run.gradient[-1] for run in found[1]], axis=0)
            axes["c"].plot(np.arange(1, DEPTH + 1), gradient, **style)
    for kind, (before, after) in ((kind, results[TANH, kind, 1.0]) for kind in COLOURS):
        style = {"color": COLOURS[kind], "lw": 1.3}
        for found, line in ((before, ":"), (after, "-")):
            spectrum = np.mean([run.singular for run in found], axis=(0, 1, 2))
            axes["b"].plot(np.arange(1, UNITS + 1), spectrum, line, **style, label=kind if found is after else None)
        if kind != ORTHOGONAL:
            for field, line in (("inputs", "--"), ("outputs", "-")):
                name = f"{kind}, {'u' if field == 'inputs' else 'W u + b'}"
                values = np.mean([getattr(run, field) for run in after], axis=0)
                axes["d"].plot(layers, values, line, **style, label=name)
    for letter in "abc":
        axes[letter].axhline(1, color="0.5", lw=1)
    axes["a"].set(ylim=(0, 1.8), xlabel="layer", ylabel="quadratic mean of singular values")
    axes["b"].set(xlabel="singular value, largest first", ylabel="its mean over layers and samples")
    axes["c"].set(yscale="log", xlabel="layer", ylabel="|gradient| / that of the last layer")
    axes["d"].set(xlabel="layer", ylabel="distance from a Gaussian", ylim=0)
    for letter in "bcd":
        axes[letter].legend(frameon=False, fontsize="small")
    save(figure, output)


def main(argv: Sequence[str] | None = None) -> Results:
    args = options(__doc__, "layer_jacobians.png").parse_args(argv)
    steps, count, gains = (40, 1, GAINS[1:]) if args.quick else (500, 3, GAINS)
    images, test_images, labels, test_labels = digits()
    data = images.astype(float), test_images.astype(float), labels, test_labels
    results: Results = {}
    with one_thread(), np.errstate(all="ignore"):
        for key in product(ACTIVATIONS, COLOURS, gains):
            if key[1] != ORTHOGONAL or key[2] == 1:
                runs = [train(key, steps, seed, data) for seed in range(args.seed, args.seed + count)]
                results[key] = [run[0] for run in runs], [run[1] for run in runs]
        report(results)
        draw(results, args.output)
    return results


if __name__ == "__main__":
    main()
