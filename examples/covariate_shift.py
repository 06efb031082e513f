"""Batch norm does not work by reducing internal covariate shift: section 2 of Santurkar et al.

First claim: noise after batch norm (`Noise`) makes the distributions of activations less stable than a plain network's,
and yet the network trains nearly as fast as without noise, faster than plain. Stability is how far the mean of a relu's
input moves in one step, in standard deviations, on the same images (with batch norm it is beta, which moves little).

Second claim: measured by gradients (definition 2.1), batch norm has no less covariate shift, and trains faster. Of the
weights of layer i at step t, on the batch of that step::

    G  = dL/dW_i at (W_1(t),   ..., W_i-1(t),   W_i(t), ..., W_k(t))
    G' = dL/dW_i at (W_1(t+1), ..., W_i-1(t+1), W_i(t), ..., W_k(t))         shift: || G - G' || and cos(G, G')

No shift is a cosine of 1. It shows in 25 linear layers, which fit a linear map of Gaussian data by gradient descent on
all of it, and hardly in a small VGG on the digits (`vgg`): there only layers 2 and 3 have a lower cosine with batch
norm, and its smaller gradients differ by less. Run ``python examples/covariate_shift.py [--quick]`` (a minute).

Source: Santurkar, Tsipras, Ilyas & Madry, "How Does Batch Normalization Help Optimization?", NeurIPS 2018, section 2,
appendix A. The paper's VGG learns CIFAR-10.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from functools import partial
from typing import NamedTuple

import numpy as np
from gallery import BLUE, ORANGE, PURPLE, Array, digits, one_thread, options, panels, progress, save, table
from network import SGD, BatchNorm, Dense, Network, Noise, ReLU, vgg

import fastbn

PLAIN, NORMALIZED = "plain", "batch norm"
COLOURS = {PLAIN: ORANGE, NORMALIZED: BLUE, "noisy batch norm": PURPLE}  # each has a layer more before the relus
RATE = 0.1  # the plain network learns at 0.03 to 0.3, 92 to 97 %, and not at 1
LINEAR_RATE = 0.01  # at 0.03 the plain network's loss rises at times, and its cosines fall there
EVERY = 10  # steps from one measurement to the next
Loss = Callable[[Network], float]  # one pass there and back


class Run(NamedTuple):
    """A training, at the measured steps."""

    steps: Array
    quality: Array  # test accuracy; the loss of a linear network
    moved: Array  # (steps, relus)
    shift: Array  # (steps, layers after the first, 2): distance and cosine


def gradients(network: Network, loss: Loss) -> list[dict[str, Array]]:
    """Of each layer with parameters. A copy makes the pass: running statistics stay, and the next pass's noise."""
    network = deepcopy(network)
    loss(network)
    return [layer.gradients for layer in network.layers if layer.names]


def covariate_shift(network: Network, rate: float, loss: Loss) -> Array:
    """Definition 2.1 for each layer that has earlier ones: distance and cosine of G and G'."""
    network = deepcopy(network)  # whose layers take their steps one after the other
    layers = [layer for layer in network.layers if layer.names]
    shifts = []
    for i, (layer, g) in enumerate(zip(layers, gradients(network, loss), strict=True)):
        if i and "weight" in g:
            a, b = (of["weight"].astype(float).ravel() for of in (g, gradients(network, loss)[i]))
            shifts.append((np.linalg.norm(a - b), a @ b / np.sqrt((a @ a) * (b @ b))))
        for name in layer.names:
            getattr(layer, name)[:] -= rate * g[name]
    return np.array(shifts)


def relu_inputs(network: Network, x: Array) -> list[tuple[Array, Array]]:
    """Mean and variance of every channel before each relu, as in training."""
    found = []
    for layer in deepcopy(network).layers:
        if isinstance(layer, ReLU):
            found.append(fastbn.mean_var(x, axis=(0, 1, 2)))
        x = layer.forward(x, training=True)
    return found


def train(name: str, network: Network, rate: float, losses: Iterable[Loss], quality: Loss, x: Array) -> Run:
    """A step down each of the losses; the relus' inputs are watched on x."""
    optimizer, found = SGD(network, rate), []
    for step, loss in enumerate(losses, 1):
        if measured := step == 1 or step % EVERY == 0:
            shift, before = covariate_shift(network, rate, loss), relu_inputs(network, x)
        loss(network)
        optimizer.step()
        if measured:
            both = zip(before, relu_inputs(network, x), strict=True)
            moved = [np.mean(abs(after - mean) / np.sqrt(var)) for (mean, var), (after, _) in both]
            found.append((step, quality(network), moved, shift))
            progress(f"{name}: step {step}, {found[-1][1]:.3f}")
    return Run(*map(np.array, zip(*found, strict=True)))


def train_vgg(name: str, steps: int, seed: int) -> Run:
    """The same initial weights and mini-batches whatever the name."""
    images, test_images, labels, test_labels = digits(images=True)
    rng, count = np.random.default_rng(seed), list(COLOURS).index(name)
    network = vgg(lambda channels: [BatchNorm(channels), Noise(*rng.spawn(1))][:count], rng)
    batches = (rng.choice(len(images), 64, replace=False) for _ in range(steps))
    losses = (partial(Network.loss, x=images[batch], labels=labels[batch]) for batch in batches)
    accuracy = partial(Network.accuracy, x=test_images, labels=test_labels)
    return train(f"VGG, {name}", network, RATE, losses, accuracy, images[:256])


def squared_error(network: Network, x: Array, target: Array) -> float:
    """The mean; leaves its gradients in the layers."""
    error = network.forward(x, training=True) - target
    network.backward(error * np.float32(2 / error.size))
    return float(np.mean(error**2))


def train_linear(name: str, steps: int, seed: int) -> Run:
    """The same initial weights and data whatever the name."""
    rng, units, std = np.random.default_rng(seed), 32, 32**-0.5
    layers = [layer for _ in range(25) for layer in (BatchNorm(units), Dense(units, units, std, rng, bias=False))][1:]
    network = Network(layers if name == NORMALIZED else layers[::2])
    x = rng.standard_normal((1000, units), dtype=np.float32)
    target = x @ rng.normal(0, std, (units, units)).astype(np.float32)  # of variance 1
    loss = partial(squared_error, x=x, target=target)
    return train(f"linear, {name}", network, LINEAR_RATE, [loss] * steps, loss, x)


def draw(vggs: dict[str, Run], linear: dict[str, Run], output: str) -> None:
    """Shift: medians over the steps, bars to the quartiles."""
    titles = "VGG", "VGG, a relu's input", "linear network", "VGG, shift", "linear network, shift"
    figure, axes = panels("abc;dee", titles, (11, 6.4))
    values = ("test accuracy", "mean moves, std per step", "squared error", "cosine of G and G'", "cosine of G and G'")
    for letter, value in zip("abcde", values, strict=True):
        axes[letter].set(xlabel="step" if letter in "abc" else "layer", ylabel=value)
    for letter, shifted, runs in (("a", "d", vggs), ("c", "e", linear)):
        for i, (name, run) in enumerate(runs.items()):
            axes[letter].plot(run.steps, run.quality, color=COLOURS[name], label=name)
            low, middle, high = np.quantile(run.shift[..., 1], (0.25, 0.5, 0.75), axis=0)
            at, bars = np.arange(len(middle)) + 1.9 + i / 10, (middle - low, high - middle)
            axes[shifted].errorbar(at, middle, bars, color=COLOURS[name], fmt="o", ms=3.5, lw=1)
            if runs is vggs:
                axes["b"].semilogy(run.steps, run.moved.mean(axis=1), color=COLOURS[name])
    axes["d"].set_xticks([2, 3, 4, 5])
    axes["a"].legend(frameon=False)
    save(figure, output)


def main(argv: Sequence[str] | None = None) -> tuple[dict[str, Run], dict[str, Run]]:
    """The VGG's runs and the linear network's."""
    args = options(__doc__, "covariate_shift.png").parse_args(argv)
    with one_thread():  # arrays this small gain nothing from a second one
        vggs = {name: train_vgg(name, 60 if args.quick else 400, args.seed) for name in COLOURS}
        linear = {name: train_linear(name, 20 if args.quick else 300, args.seed) for name in (PLAIN, NORMALIZED)}
    reached = {name: [*run.steps[run.quality >= 0.95], "never"][0] for name, run in vggs.items()}
    rows = [[name, f"{run.quality.max():.1%}", reached[name], np.median(run.moved)] for name, run in vggs.items()]
    table(["VGG", "best accuracy", "steps to 95 %", "means move by"], rows)
    print("\nInternal covariate shift of the second layer, one in the middle and the last: medians over the steps")
    for title, runs in (("VGG", vggs), ("linear network", linear)):
        shifts = {name: np.median(run.shift, axis=0).T for name, run in runs.items()}
        at = [0, shifts[PLAIN].shape[1] // 2, -1]
        rows = [[n, runs[n].quality[-1], *cosine[at], *distance[at]] for n, (distance, cosine) in shifts.items()]
        table([title, "accuracy" if runs is vggs else "loss", "cosine", "", "", "distance", "", ""], rows)
        far, near = shifts[NORMALIZED] > shifts[PLAIN]
        print(f"Batch norm shifts more in {sum(~near)} of {near.size} layers by the cosine, {sum(far)} by the distance")
    draw(vggs, linear, args.output)
    return vggs, linear


if __name__ == "__main__":
    main()
