"""Gradient descent in normalised parametrisation (GDNP): shared by the programs on length and direction.

A linear unit w'x is written w = g v / ||v||_S with ||v||_S^2 = v'Sv and S = E[xx']. Over a sample of centred inputs
this is batch norm of x'v with gamma = g, beta = 0 and eps = 0. GDNP finds the length g by bisection, the direction v by
gradient descent.

Source: Kohler, Daneshmand, Lucchi, Hofmann, Zhou & Neymeyr, "Exponential convergence rates for Batch Normalization: The
power of length-direction decoupling in non-convex optimization", AISTATS 2019, algorithm 1.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

import fastbn

Array = np.ndarray[Any, Any]
LONGEST = 1024.0  # of a unit; a loss without a finite best length would let it grow for ever


def sigmoid(a: Array) -> Array:
    return 0.5 * np.tanh(0.5 * a) + 0.5  # 1 / (1 + exp(-a)) would overflow


def normalized(x: Array, v: Array) -> tuple[Array, fastbn.Saved]:
    """Batch norm of x'v: x'v / ||v||_S; and what its backward pass needs."""
    h, saved = fastbn.batch_norm((x @ v)[:, None], eps=0)
    return h[:, 0], saved


def direction_gradient(x: Array, dh: Array, saved: fastbn.Saved) -> Array:
    """The gradient in v of a function of h = x'v / ||v||_S, from that in h."""
    return x.T @ fastbn.batch_norm_backward(dh[:, None], saved).x[:, 0]


def final_rate(second_moments: Array, line: Array) -> float:
    """The largest eigenvalue of 1 - S/L off a line, in the inner product of S: 1 - mu/L, or less by interlacing."""
    eigenvalues, vectors = np.linalg.eigh(second_moments)
    e = np.sqrt(eigenvalues) * (vectors.T @ line)
    off = np.eye(len(e)) - np.outer(e, e) / (e @ e)
    return float(np.linalg.eigvalsh(off @ np.diag(1 - eigenvalues / eigenvalues[-1]) @ off)[-1])


class Loss(NamedTuple):
    """First and second derivative of each sample's loss in its margin a = y w'x; `smoothness` bounds the second."""

    first: Callable[[Array], Array]
    second: Callable[[Array], Array]
    smoothness: float = np.inf


class Sample:
    """Inputs (n, d), centred over the sample, and labels -1 or 1; expectations are means over the sample."""

    def __init__(self, x: Array, y: Array) -> None:
        self.x, self.y = x - fastbn.mean(x, axis=0), y
        self.S, self.u = self.x.T @ self.x / len(x), self.x.T @ y / len(x)
        self.inverse = np.linalg.inv(self.S)
        self.line = self.inverse @ self.u
        smallest, *_, self.largest = np.linalg.eigvalsh(self.S)
        self.rate = float(1 - smallest / self.largest)  # the bound on what a step of GDNP leaves: 1 - mu/L

    def weights(self, v: Array, g: float) -> Array:
        return g * v / np.sqrt(v @ self.S @ v)

    def margins(self, w: Array) -> Array:
        return self.y * (self.x @ w)

    def gradient(self, slopes: Array) -> Array:
        """Of the mean loss in w, from the loss's slopes in the margins."""
        return self.x.T @ (self.y * slopes) / len(self.x)

    def gradient_norm(self, slopes: Array) -> float:
        """The paper's: that of S^-1."""
        gradient = self.gradient(slopes)
        return float(np.sqrt(gradient @ self.inverse @ gradient))

    def angle(self, v: Array, other: Array) -> float:
        """Between the lines of two vectors, in degrees, in the inner product of S."""
        cosine = v @ self.S @ other / np.sqrt((v @ self.S @ v) * (other @ self.S @ other))
        return float(np.degrees(np.arccos(np.minimum(1, np.abs(cosine)))))


def gaussian_classes(n: int, d: int, condition: float, separation: float, rng: np.random.Generator) -> Sample:
    """Two classes for which z = y x is Gaussian, E[z] = u, E[zz'] = S with eigenvalues from 1 to 1 / condition.

    The separation u'S^-1 u is between 0 and 1.
    """
    e = rng.standard_normal(d)
    e /= np.linalg.norm(e)
    z = rng.standard_normal((n, d))
    # E[zz'] = 1 stays: the mean along e takes from the variance there.
    z += np.outer(np.sqrt(separation) - (1 - np.sqrt(1 - separation)) * (z @ e), e)
    y = np.where(np.arange(n) % 2, 1.0, -1.0)
    return Sample(y[:, None] * z * np.sqrt(np.geomspace(1, 1 / condition, d)), y)


def best_length(slope: Callable[[float], float], halvings: int) -> float:
    """Where the derivative in g is 0: downhill from 0 until it changes its sign, then by bisection."""
    sign = -np.sign(slope(0.0))
    near, far = 0.0, sign
    while slope(far) * sign < 0 and abs(far) < LONGEST:
        near, far = far, 2 * far
    for _ in range(halvings):
        middle = (near + far) / 2
        near, far = (middle, far) if slope(middle) * sign < 0 else (near, middle)
    return float(near + far) / 2


def gdnp(
    sample: Sample, loss: Loss, v: Array, steps: int, halvings: int = 50, u: Array | None = None
) -> tuple[Array, float, list[float]]:
    """Direction, length and gradient's norm, of which one for each step; the first is that of the given v.

    The paper's step is -||v||_S^3 / (L g k) with k = E[loss'] u'v - E[loss''] (u'v)^2 g / ||v||_S; taken where `u` is
    given. For Gaussian z, Stein's lemma makes k equal to ||v||_S (df/dg - E[loss''] g), which takes account of other
    units too; taken otherwise.
    """
    norms, move = [], np.zeros_like(v)
    for _ in range(steps):
        v = v + move
        h, saved = normalized(sample.x, v)
        h, length = h * sample.y, 1 / saved.rstd[0]
        g = best_length(lambda g, h=h: float(np.mean(loss.first(g * h) * h)), halvings)
        slopes, curvature = loss.first(g * h), np.mean(loss.second(g * h))
        norms.append(sample.gradient_norm(slopes))
        if u is None:
            k = length * (np.mean(slopes * h) - curvature * g)
        else:
            k = u @ v * (np.mean(slopes) - curvature * (u @ v) * g / length)
        if g * k == 0:
            break
        gradient = direction_gradient(sample.x, g * sample.y * slopes / len(h), saved)
        move = length**3 / (sample.largest * g * k) * gradient
    return v, g, norms
