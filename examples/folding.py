"""Frozen and folded: inference needs the population's statistics, and with these batch norm vanishes into the weights.

A convolution network is trained on scikit-learn's digits with batch norm before each relu, and then recognises the test
images in three ways::

    batch         y = gamma (W x - E) / sqrt(Var + eps) + beta,   E and Var of the images that are asked together
    population    the same; E and the unbiased Var averaged over mini-batches of the training set
    folded        y = (s W) x + (beta - s E),   s = gamma / sqrt(Var + eps), E and Var the population's

By the batch's statistics an image's answer depends on the company it is asked in. By the population's it does not;
batch norm is then linear, and `fastbn.fold` multiplies it into the convolution: the same answers to rounding.

Run ``python examples/folding.py`` (half a minute; ``--quick``: seconds). The picture: (a) test accuracy by the size of
batches that mix the digits, or are sorted by them; (b) where the time of inference goes, on one thread.

Where it does not show: folding saves less than batch norm took, since the convolution now adds a bias, and for many
images it saves little, since convolutions by im2col take most of the time. Batch norm that does the relu in the same
kernel ("fused") then saves more: the folded network makes another trip over memory for its relu.

Sources: Ioffe & Szegedy, "Batch Normalization: Accelerating Deep Network Training by Reducing Internal Covariate
Shift", ICML 2015, section 3.1 and Algorithm 2; folding: Jacob et al., "Quantization and Training of Neural Networks for
Efficient Integer-Arithmetic-Only Inference", CVPR 2018, section 3.2.
"""

from collections.abc import Sequence
from copy import copy
from itertools import pairwise
from time import process_time
from typing import NamedTuple

import numpy as np
from gallery import BLUE, GREEN, GREY, PURPLE, digits, one_thread, options, panels, progress, save, table
from network import SGD, Array, BatchNorm, Convolution, Network, ReLU, vgg

import fastbn

BATCH = 64
SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 450)  # of batches of test images, 45 of each digit
KINDS, REST = {Convolution: "convolution", BatchNorm: "batch norm", ReLU: "relu"}, "pools, dense"
COLOURS = {"convolution": "0.75", "batch norm": BLUE, "relu": GREEN, REST: "0.5"}


class Result(NamedTuple):
    own: dict[str, list[float]]  # test accuracy by the batch's statistics, for each of SIZES
    population: float  # test accuracy by the population's
    folded: float
    change: float  # the largest of a logit by folding, over the largest logit
    ms: dict[int, dict[str, dict[str, float]]]  # by images, network and kind of layer


def train(images: Array, labels: Array, epochs: int, seed: int) -> Network:
    rng = np.random.default_rng(seed)
    network = vgg(lambda channels: [BatchNorm(channels)], rng)
    optimizer = SGD(network, rate=0.1, momentum=0.9)
    for epoch in range(epochs):
        for chosen in np.array_split(rng.permutation(len(images)), len(images) // BATCH):
            loss = network.loss(images[chosen], labels[chosen])
            optimizer.step()
        progress(f"epoch {epoch + 1} of {epochs}: loss {loss:.4f}")
    return network


def own_accuracy(network: Network, images: Array, labels: Array, size: int) -> float:
    """Of batches of so many images, by each batch's own statistics."""
    logits = [network.forward(images[i : i + size], training=True) for i in range(0, len(images), size)]
    return float(np.mean(np.concatenate(logits).argmax(axis=1) == labels))


def set_population(network: Network, batches: Sequence[Array]) -> None:
    """Algorithm 2, steps 8 to 10."""
    layers = [layer for layer in network.layers if isinstance(layer, BatchNorm)]
    moments = []
    for batch in batches:
        network.forward(batch, training=True)
        moments.append([layer.moments for layer in layers])
    for layer, of_batches in zip(layers, zip(*moments, strict=True), strict=True):
        layer.mean, layer.var = fastbn.population(of_batches)


def folded(network: Network) -> Network:
    """Batch norm within the convolutions' weights and biases."""
    layers = [copy(layer) for layer in network.layers]
    for layer, bn in pairwise(layers):
        if isinstance(bn, BatchNorm):
            layer.weight, layer.bias = bn.fold_into(layer.weight, axis=1)
            layer.names = "weight", "bias"
    return Network(layer for layer in layers if not isinstance(layer, BatchNorm))


def fused(network: Network) -> Network:
    """Batch norm and relu in one kernel."""
    layers = [copy(layer) for layer in network.layers if not isinstance(layer, ReLU)]
    for layer in layers:
        if isinstance(layer, BatchNorm):
            layer.activation = "relu"
    return Network(layers)


def milliseconds(networks: dict[str, Network], images: Array, rounds: int) -> dict[str, dict[str, float]]:
    """What each kind of layer takes in an inference, on one thread: medians; the networks take turns."""
    progress(f"inference of {len(images)} images")
    runs: dict[str, list[Array]] = {name: [] for name in networks}
    for name in [*networks] * rounds:
        x, stamps = images, [process_time()]
        for layer in networks[name].layers:
            x = layer.forward(x, training=False)
            stamps.append(process_time())
        runs[name].append(np.diff(stamps))
    result = {name: dict.fromkeys(COLOURS, 0.0) for name in networks}
    for name, network in networks.items():
        for layer, seconds in zip(network.layers, np.median(runs[name], axis=0), strict=True):
            result[name][KINDS.get(type(layer), REST)] += 1e3 * float(seconds)
    return result


def report(result: Result) -> None:
    table(("batches of", *result.own), list(zip(SIZES, *result.own.values(), strict=True)))
    print(f"population's statistics: {result.population:.3g}; folded: {result.folded:.3g}, ", end="")
    print(f"logits change by {result.change:.1e} of the largest\n")
    rows = []
    for images, ms in result.ms.items():
        whole, fused_, folded_ = (sum(kinds.values()) for kinds in ms.values())
        part = ms["population"]["batch norm"]
        shares = part / whole, (whole - folded_) / whole, (whole - folded_) / part, (whole - fused_) / whole
        rows.append((images, whole, ms["population"]["convolution"], part, *(f"{share:.1%}" for share in shares)))
    shares = "batch norm's share", "folding saves", "of batch norm", "fusing relu saves"
    table(("images", "network, ms", "convolutions", "batch norm", *shares), rows)


def draw(result: Result, output: str) -> None:
    figure, axes = panels("ab", ("digits recognised", "time of inference, and number of images"))
    for (name, accuracies), colour in zip(result.own.items(), (GREY, PURPLE), strict=True):
        axes["a"].semilogx(SIZES, accuracies, "o-", base=2, color=colour, label=f"the batch's statistics, {name}")
    axes["a"].axhline(result.population, color=BLUE, label="the population's statistics, and folded")
    axes["a"].set(xlabel="images in a batch", ylabel="test accuracy", ylim=(0.7, 1.01))
    axes["a"].legend(frameon=False, loc="lower right")
    for images, ms in result.ms.items():
        shares = 100 * np.array([[*kinds.values()] for kinds in ms.values()]).T / sum(ms["population"].values())
        for kind, share, start in zip(COLOURS, shares, np.cumsum(shares, axis=0) - shares, strict=True):
            label = kind if images == 1 else None
            axes["b"].barh([f"{name}, {images}" for name in ms], share, left=start, color=COLOURS[kind], label=label)
    axes["b"].invert_yaxis()
    axes["b"].set_xlabel("% of the network's with the population's statistics")
    axes["b"].legend(frameon=False, ncols=4, loc="upper center", bbox_to_anchor=(0.4, -0.12))
    save(figure, output)


def main(argv: Sequence[str] | None = None) -> Result:
    args = options(__doc__, "folding.png").parse_args(argv)
    epochs, rounds = (2, 20) if args.quick else (8, 200)
    images, test_images, labels, test_labels = digits(images=True)
    orders = {"mixed digits": np.arange(len(test_labels)), "sorted by digit": np.argsort(test_labels, kind="stable")}
    with one_thread():
        network = train(images, labels, epochs, args.seed)
        own = {k: [own_accuracy(network, test_images[o], test_labels[o], n) for n in SIZES] for k, o in orders.items()}
        set_population(network, np.array_split(images, len(images) // BATCH))
        networks = {"population": network, "fused": fused(network), "folded": folded(network)}
        ms = {count: milliseconds(networks, test_images[:count], rounds) for count in (1, 32, len(test_images))}
        logits, same = network.forward(test_images), networks["folded"].forward(test_images)
    population, folded_ = (float(np.mean(z.argmax(axis=1) == test_labels)) for z in (logits, same))
    result = Result(own, population, folded_, float(np.abs(same - logits).max() / np.abs(logits).max()), ms)
    report(result)
    draw(result, args.output)
    return result


if __name__ == "__main__":
    main()
