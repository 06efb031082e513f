"""Learning a halfspace: the length by bisection, the direction through batch norm, at a linear rate.

The mean of loss(z'w), z = y x with labels y = -1 or 1, is minimised by GDNP (gdnp.py), whether it is convex or not. For
Gaussian z, T halvings for the length and t steps, mu and L the extreme eigenvalues of S = E[xx']::

    ||gradient||^2 <= c (1 - mu/L)^2t + c' 2^-T        (the gradient in w, by the paper's norm: that of S^-1)

The reason: by Stein's lemma the gradient is c1 u + c2 S w, u = E[z], whatever the loss. Batch norm's backward pass
takes away the part along S w. What is left of any loss is the gradient of the Rayleigh quotient of least_squares.py,
times a number that the step divides out. The rate of plain gradient descent depends on the loss too, whose curvature is
small where margins are large.

Losses: softplus(-a), and the squared error of a sigmoid, sigmoid(-a)^2, which is not convex. (The mean of sigmoid(-a)
falls for Gaussian z with every growing length: there is no best one.) Inputs: two Gaussian classes; scikit-learn's
digits, even against odd, by 40 principal components, which are far from Gaussian.

Run ``python examples/halfspace.py`` (half a minute). The picture: the norm of the gradient on all four.

Where it does not show: Stein's lemma holds in expectation. Means over n samples miss it by 1 / sqrt(n), so that the
direction that is found is not S^-1 u ("angle"), and the rate not quite that of the Rayleigh quotient ("theory"). For
the digits it does not hold: the gradient still falls at a linear rate, but slower than by 1 - mu/L, and with the
squared sigmoid accelerated gradient descent comes first to 1e-4.

Source: Kohler, Daneshmand, Lucchi, Hofmann, Zhou & Neymeyr, "Exponential convergence rates for Batch Normalization: The
power of length-direction decoupling in non-convex optimization", AISTATS 2019, section 4.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from gallery import BLUE, GREY, ORANGE, PURPLE, SHADES, digits, one_blas_thread, options, panels, progress, save, table
from gdnp import Array, Loss, Sample, final_rate, gaussian_classes, gdnp, sigmoid

CLOSE = 1e-4  # of the first gradient
GDNP, COARSE, PLAIN, ACCELERATED = "GDNP", "GDNP, 10 halvings", "gradient descent", "accelerated"
COLOURS = {PLAIN: ORANGE, ACCELERATED: PURPLE, COARSE: SHADES[BLUE][0], GDNP: BLUE}


class Result(NamedTuple):
    inputs: str
    loss: str
    bound: float  # 1 - mu/L
    theory: float  # that of the Rayleigh quotient in the end
    norms: dict[str, Array]  # of the gradient before each step, by method
    angle: float  # degrees between the direction found and S^-1 u, in the inner product of S

    def rate(self, method: str) -> float:
        """What a step leaves of the gradient: after the first quarter, as long as 1e-9 of the first is left."""
        norms = self.norms[method]
        at = np.flatnonzero(norms > 1e-9 * norms[0])
        at = at[at >= len(norms) // 4]
        return float(np.exp(np.polyfit(at, np.log(norms[at]), 1)[0]))

    def steps(self, method: str) -> int | str:
        """Until the gradient is CLOSE."""
        close = np.flatnonzero(self.norms[method] <= CLOSE * self.norms[method][0])
        return int(close[0]) if len(close) else f"> {len(self.norms[method])}"


def squared_slope(a: Array) -> Array:
    return -2 * sigmoid(-a) ** 2 * sigmoid(a)


def squared_curvature(a: Array) -> Array:
    s = sigmoid(-a)
    return s**2 * (1 - s) * (4 - 6 * s)


LOSSES = {
    "softplus": Loss(lambda a: -sigmoid(-a), lambda a: sigmoid(a) * sigmoid(-a), 0.25),
    "squared sigmoid": Loss(squared_slope, squared_curvature, 0.1541),
}


def digits_sample(components: int) -> Sample:
    """Even against odd."""
    train, test, *labels = digits()
    x = np.concatenate([train, test]).astype(np.float64)
    x -= x.mean(axis=0)
    principal = np.linalg.svd(x, full_matrices=False)[2][:components]
    return Sample(x @ principal.T, np.where(np.concatenate(labels) % 2 == 0, 1.0, -1.0))


def gradient_descent(sample: Sample, loss: Loss, w: Array, steps: int, accelerated: bool = False) -> list[float]:
    """Norms of the gradient; steps of 1 / smoothness, on request from where Nesterov's momentum has led."""
    norms, ahead = [], w
    for t in range(steps):
        norms.append(sample.gradient_norm(loss.first(sample.margins(w))))
        gradient = sample.gradient(loss.first(sample.margins(ahead)))
        last, w = w, ahead - gradient / (loss.smoothness * sample.largest)
        ahead = w + t / (t + 3) * (w - last) if accelerated else w
    return norms


def compare(inputs: str, sample: Sample, name: str, steps: int, rng: np.random.Generator) -> Result:
    """All methods, from the same weights: a random direction with its best length."""
    progress(f"{inputs}, {name}: {steps} steps of each method")
    loss = LOSSES[name]
    v, g, _ = gdnp(sample, loss, rng.standard_normal(len(sample.u)), 1)
    w = sample.weights(v, g)
    direction, _, norms = gdnp(sample, loss, v, steps, u=sample.u)
    by_method = {
        PLAIN: gradient_descent(sample, loss, w, steps),
        ACCELERATED: gradient_descent(sample, loss, w, steps, accelerated=True),
        COARSE: gdnp(sample, loss, v, steps, halvings=10, u=sample.u)[2],
        GDNP: norms,
    }
    arrays = {method: np.array(norms) for method, norms in by_method.items()}
    theory, angle = final_rate(sample.S, sample.line), sample.angle(direction, sample.line)
    return Result(inputs, name, sample.rate, theory, arrays, angle)


def draw(results: list[Result], output: str) -> None:
    figure, axes = panels("ab;cd", [f"{r.inputs}, {r.loss}" for r in results], (11, 7))
    for axis, r in zip(axes.values(), results, strict=True):
        for method, norms in r.norms.items():
            axis.plot(norms, color=COLOURS[method], label=method)
        steps = np.arange(len(r.norms[GDNP]))
        axis.plot(steps, r.norms[GDNP][0] * r.bound**steps, "--", color=GREY, label="the bound's rate, 1 - mu/L")
        axis.set(yscale="log", ylim=(1e-9, 1), xlabel="step", ylabel="norm of the gradient")
    axes["a"].legend(frameon=False)
    save(figure, output)


def main(argv: Sequence[str] | None = None) -> list[Result]:
    args = options(__doc__, "halfspace.png").parse_args(argv)
    rng = np.random.default_rng(args.seed)
    n, d, condition, components, steps = (4000, 10, 10, 20, 150) if args.quick else (10_000, 20, 50, 40, 1000)
    samples = {"Gaussian": gaussian_classes(n, d, condition, 0.6, rng), "digits": digits_sample(components)}
    with one_blas_thread():
        results = [compare(inputs, sample, name, steps, rng) for inputs, sample in samples.items() for name in LOSSES]
    rows = []
    for r in results:
        rates = (f"{rate:.4f}" for rate in (r.bound, r.theory, r.rate(GDNP), r.rate(PLAIN)))
        rows.append((r.inputs, r.loss, *rates, *(r.steps(method) for method in (GDNP, PLAIN, ACCELERATED)), r.angle))
    table(("inputs", "loss", "1 - mu/L", "theory", "GDNP's", "plain's", GDNP, PLAIN, ACCELERATED, "angle"), rows)
    print(f"""
GDNP's, plain's: the rate, what a step leaves of the gradient
{GDNP}, {PLAIN}, {ACCELERATED}: steps until {CLOSE:g} of the first gradient is left""")
    draw(results, args.output)
    return results


if __name__ == "__main__":
    main()
