"""Networks in float64 whose batch norm may have no eps: for what the literature states as an identity or a bound.

With eps = 0 the output does not depend on the scale of the weights before it, and gradients are orthogonal to them;
what eps = 1e-5 changes is measured with the same layer.
"""

from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise

import numpy as np
from gallery import Array
from network import Dense, Layer, Network, Tanh

import fastbn


class ExactBatchNorm(Layer):
    """Algorithms 1 and 2 of Ioffe & Szegedy, with any eps."""

    names = ("gamma", "beta")

    def __init__(self, channels: int, eps: float = 0.0) -> None:
        self.gamma, self.mean, self.beta, self.var = (np.full(channels, float(v)) for v in (1, 0, 0, 1))
        self.eps = eps

    def forward(self, x: Array, training: bool) -> Array:
        if not training:
            statistics = self.mean, self.var, self.gamma, self.beta
            return fastbn.batch_norm_inference(x, *statistics, channel_axis=-1, eps=self.eps)
        y, self.saved = fastbn.batch_norm(x, self.gamma, self.beta, channel_axis=-1, eps=self.eps)
        fastbn.update_running(self.mean, self.var, self.saved.moments, out=(self.mean, self.var))
        return y

    def backward(self, dy: Array) -> Array:
        dx, dgamma, dbeta, _ = fastbn.batch_norm_backward(dy, self.saved)
        self.gradients = {"gamma": dgamma, "beta": dbeta}
        return dx


def in_float64(layers: Iterable[Layer]) -> Network:
    """A network of these layers, whose arrays become float64."""
    network = Network(layers)
    for layer in network.layers:
        for name, value in vars(layer).items():
            if isinstance(value, np.ndarray):
                setattr(layer, name, value.astype(float))
    return network


def dense_network(
    sizes: Sequence[int],
    rng: np.random.Generator,
    between: Callable[[int], list[Layer]],
    activation: type[Layer] = Tanh,
) -> Network:
    """Dense layers with ``between(units)`` before each activation; weights of variance 1 / inputs."""
    layers: list[Layer] = []
    for inputs, units in pairwise(sizes[:-1]):
        norm = between(units)
        layers += [Dense(inputs, units, inputs**-0.5, rng, bias=not norm), *norm, activation()]
    return in_float64([*layers, Dense(*sizes[-2:], sizes[-2] ** -0.5, rng)])
