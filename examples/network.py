"""Layers of the gallery's networks, in NumPy; batch norm is `fastbn.BatchNorm`.

A layer has ``forward(x, training)`` and, for the input of its last forward pass, ``backward(dy)``, which returns dx and
leaves the gradients of its parameters in ``gradients``. Channels are the last axis: (samples, units) and
(samples, height, width, channels). `Network` puts layers in a row, `SGD` takes the steps.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

import fastbn

Array = np.ndarray[Any, Any]


class Layer(ABC):
    """No parameters; those that have some name them."""

    names: tuple[str, ...] = ()
    gradients: dict[str, Array]

    @abstractmethod
    def forward(self, x: Array, training: bool) -> Array: ...

    @abstractmethod
    def backward(self, dy: Array) -> Array: ...


class Dense(Layer):
    """``y = x W + b``; without a bias where batch norm follows, whose beta takes its place."""

    def __init__(self, inputs: int, units: int, std: float, rng: np.random.Generator, bias: bool = True) -> None:
        self.weight = rng.normal(0, std, (inputs, units)).astype(np.float32)
        self.bias = np.zeros(units, np.float32)
        self.names = ("weight", "bias") if bias else ("weight",)

    def forward(self, x: Array, training: bool) -> Array:
        self.x = x
        y = x @ self.weight
        if "bias" in self.names:
            y += self.bias
        return y

    def backward(self, dy: Array) -> Array:
        self.gradients = {"weight": self.x.T @ dy, "bias": dy.sum(axis=0)}
        return dy @ self.weight.T


class Convolution(Dense):
    """3x3, zeros around: every position's nine neighbours in a row (im2col), then a dense layer."""

    def __init__(self, channels: int, to: int, std: float, rng: np.random.Generator, bias: bool = True) -> None:
        super().__init__(9 * channels, to, std, rng, bias)

    def forward(self, x: Array, training: bool) -> Array:
        self.shape = x.shape
        n, height, width, channels = x.shape
        padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2))  # n, h, w, channels, 3, 3
        columns = windows.transpose(0, 1, 2, 4, 5, 3).reshape(n * height * width, 9 * channels)
        return super().forward(columns, training).reshape(n, height, width, -1)

    def backward(self, dy: Array) -> Array:
        n, height, width, channels = self.shape
        columns = super().backward(dy.reshape(n * height * width, -1)).reshape(n, height, width, 3, 3, channels)
        padded = np.zeros((n, height + 2, width + 2, channels), columns.dtype)
        for i in range(3):
            for j in range(3):
                padded[:, i : i + height, j : j + width] += columns[:, :, :, i, j]
        return padded[:, 1:-1, 1:-1]


class BatchNorm(fastbn.BatchNorm, Layer):
    """fastbn's layer, of the last axis, told with each pass whether it trains.

    `gather` synchronises processes, as in `fastbn.batch_norm`. With ``activation="relu"`` the two are one kernel.
    """

    names = ("gamma", "beta")

    def __init__(self, channels: int, activation: Any = None, gather: Callable[..., Any] | None = None) -> None:
        super().__init__(channels, channel_axis=-1)
        self.activation, self.gather = activation, gather

    def forward(self, x: Array, training: bool) -> Array:
        self.train(training)
        return super().forward(x, activation=self.activation, gather=self.gather)

    def backward(self, dy: Array) -> Array:
        dx = super().backward(dy)
        self.gradients = {"gamma": self.dgamma, "beta": self.dbeta}
        return dx


def whiten(x: Array, eps: float, mean: Any = None, cov: Any = None) -> tuple[Array, ...]:
    """ZCA whitening, ``(x - mean) S^(-1/2)`` with ``S = cov + eps I = V diag(s^2) V'``, of the batch or as given.

    Returns the whitened x, then mean, cov, x - mean, V and s.
    """
    mean = fastbn.mean(x, axis=0) if mean is None else mean
    centered = x - mean
    cov = centered.T @ centered / len(x) if cov is None else cov
    eigenvalues, v = np.linalg.eigh(cov)
    s = np.sqrt(np.maximum(eigenvalues, 0) + eps)
    return centered @ ((v / s) @ v.T), mean, cov, centered, v, s


class Whitening(BatchNorm):
    """Batch norm of all features together, of rows (samples, units).

    The gradient goes through the eigendecomposition (Huang et al., "Decorrelated Batch Normalization", CVPR 2018);
    with `constants` it takes mean and covariance for constants.
    """

    def __init__(self, features: int, eps: float, constants: bool = False) -> None:
        super().__init__(features)
        self.mean, self.cov = np.zeros(features, np.float32), np.eye(features, dtype=np.float32)
        self.eps, self.constants = eps, constants

    def forward(self, x: Array, training: bool) -> Array:
        given = () if training else (self.mean, self.cov)
        self.xhat, mean, cov, *self.rest = whiten(x, self.eps, *given)
        self.mean += 0.1 * (mean - self.mean)
        self.cov += 0.1 * (cov - self.cov)
        return self.xhat * self.gamma + self.beta

    def backward(self, dy: Array) -> Array:
        self.gradients = {"gamma": (dy * self.xhat).sum(axis=0), "beta": dy.sum(axis=0)}
        dxhat, (centered, v, s) = dy * self.gamma, self.rest
        dx = dxhat @ ((v / s) @ v.T)
        if self.constants:
            return dx
        f = -1 / (np.outer(s, s) * (s[:, None] + s))  # d S^(-1/2) = V [f o (V' dS V)] V'
        dcov = v @ (f * (v.T @ (centered.T @ dxhat) @ v)) @ v.T
        dx += centered @ (dcov + dcov.T) / len(dy)
        return dx - dx.mean(axis=0)


class Sigmoid(Layer):
    def forward(self, x: Array, training: bool) -> Array:
        self.y = 0.5 * np.tanh(0.5 * x) + 0.5  # 1 / (1 + exp(-x)) would overflow
        return self.y

    def backward(self, dy: Array) -> Array:
        return dy * self.y * (1 - self.y)


class Tanh(Layer):
    def forward(self, x: Array, training: bool) -> Array:
        self.y = np.tanh(x)
        return self.y

    def backward(self, dy: Array) -> Array:
        return dy * (1 - self.y**2)


class ReLU(Layer):
    def forward(self, x: Array, training: bool) -> Array:
        self.y = np.maximum(x, 0)
        return self.y

    def backward(self, dy: Array) -> Array:
        return dy * (self.y > 0)


class Dropout(Layer):
    """In training each value is 0 with probability `rate`, others grow by 1 / (1 - rate)."""

    def __init__(self, rate: float, rng: np.random.Generator) -> None:
        self.rate, self.rng = rate, rng

    def forward(self, x: Array, training: bool) -> Array:
        kept = np.ones_like(x) if not training else (self.rng.random(x.shape) >= self.rate) / (1 - self.rate)
        self.kept = kept.astype(x.dtype)
        return x * self.kept

    def backward(self, dy: Array) -> Array:
        return dy * self.kept


class Noise(Layer):
    """Santurkar et al. (2018), appendix A: ``y = s x + m`` for each value, from distributions that change all the time.

    Each pass draws every channel's sigma from U(1, 1.25) and mu from U(-0.5, 0.5), then every value's s from
    N(sigma, 0.1) and m from U(mu - 0.1, mu + 0.1). Inference takes the expectation, 1.125 x.
    """

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng

    def forward(self, x: Array, training: bool) -> Array:
        if not training:
            return x * x.dtype.type(1.125)
        sigma, mu = self.rng.uniform(1, 1.25, x.shape[-1]), self.rng.uniform(-0.5, 0.5, x.shape[-1])
        self.s = self.rng.normal(sigma, 0.1, x.shape).astype(x.dtype)
        return self.s * x + self.rng.uniform(mu - 0.1, mu + 0.1, x.shape).astype(x.dtype)

    def backward(self, dy: Array) -> Array:
        return dy * self.s


class MeanPool(Layer):
    """The mean of 2x2 positions, which divide height and width."""

    def forward(self, x: Array, training: bool) -> Array:
        n, height, width, channels = x.shape
        return x.reshape(n, height // 2, 2, width // 2, 2, channels).mean(axis=(2, 4))

    def backward(self, dy: Array) -> Array:
        return (dy / 4).repeat(2, axis=1).repeat(2, axis=2)


class Flatten(Layer):
    def forward(self, x: Array, training: bool) -> Array:
        self.shape = x.shape
        return x.reshape(len(x), -1)

    def backward(self, dy: Array) -> Array:
        return dy.reshape(self.shape)


def softmax_loss(logits: Array, labels: Array, batch: int | None = None) -> tuple[float, Array]:
    """The mean cross-entropy, and its gradient; of a part of a batch of so many samples, its share of both."""
    shifted = logits - logits.max(axis=1, keepdims=True, initial=-np.inf)
    log_sums = np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    rows, count = np.arange(len(labels)), batch or len(labels)
    probabilities = np.exp(shifted - log_sums)
    probabilities[rows, labels] -= 1
    return float((log_sums[:, 0] - shifted[rows, labels]).sum() / count), probabilities / logits.dtype.type(count)


class Network:
    """Layers in a row."""

    def __init__(self, layers: Iterable[Layer]) -> None:
        self.layers: Sequence[Layer] = list(layers)

    def forward(self, x: Array, training: bool = False) -> Array:
        for layer in self.layers:
            x = layer.forward(x, training)
        return x

    def backward(self, dy: Array) -> Array:
        for layer in reversed(self.layers):
            dy = layer.backward(dy)
        return dy

    def loss(self, x: Array, labels: Array, batch: int | None = None) -> float:
        """Of a batch, or its part (see `softmax_loss`), as in training; leaves its gradients in the layers."""
        value, dlogits = softmax_loss(self.forward(x, training=True), labels, batch)
        self.backward(dlogits)
        return value

    def parameters(self) -> list[Array]:
        """The arrays themselves: who writes them changes the network."""
        return [getattr(layer, name) for layer in self.layers for name in layer.names]

    def gradients(self) -> list[Array]:
        """Those of `parameters`, in their order, after a backward pass."""
        return [layer.gradients[name] for layer in self.layers for name in layer.names]

    def accuracy(self, x: Array, labels: Array) -> float:
        """The share of samples whose largest logit is the label's, by running statistics."""
        return float(np.mean(self.forward(x).argmax(axis=1) == labels))


class SGD:
    """Stochastic gradient descent: ``v = momentum v + g``, ``w = w - rate v``."""

    def __init__(self, network: Network, rate: float, momentum: float = 0.0) -> None:
        self.network, self.rate, self.momentum = network, rate, momentum
        self.velocities = [np.zeros_like(w) for w in network.parameters()]

    def step(self) -> None:
        """Down the gradients that are in the layers."""
        for w, v, g in zip(self.network.parameters(), self.velocities, self.network.gradients(), strict=True):
            v *= self.momentum
            v += g
            w -= self.rate * v


def vgg(normalization: Callable[[int], Iterable[Layer]], rng: np.random.Generator) -> Network:
    """Twice two 3x3 convolutions and a pool, then a dense layer: Simonyan & Zisserman's kind, for (8, 8, 1) images.

    ``normalization(channels)`` gives the layers between a convolution and its relu. Weights start as He et al.'s, with
    variance 2 / inputs.
    """
    layers: list[Layer] = []
    channels = 1
    for to in (16, 16, 32, 32):
        between = list(normalization(to))
        std = float(np.sqrt(2 / (9 * channels)))
        layers += [Convolution(channels, to, std, rng, bias=not between), *between, ReLU()]
        if channels == to:
            layers.append(MeanPool())
        channels = to
    return Network([*layers, Flatten(), Dense(4 * channels, 10, float(np.sqrt(2 / (4 * channels))), rng)])
