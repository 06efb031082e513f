"""Least squares by length and direction: a problem that is not convex, and converges as fast as a convex one.

With S = E[xx'], u = E[yx], the weights w = g v / ||v||_S and their best length g = u'v / ||v||_S, the mean squared
error of w'x is E[y^2] + rho(v), where rho(v) = -(u'v)^2 / v'Sv is a Rayleigh quotient. It is not convex, yet gradient
descent on v with steps v'Sv / (2 L |rho(v)|) converges at a linear rate::

    rho(v_t) - rho* <= (1 - mu/L)^2t (rho(v_0) - rho*)        mu, L: the extreme eigenvalues of S

x'v / ||v||_S is batch norm of x'v over the sample (eps = 0), and its backward pass gives the gradient in v.

Run ``python examples/least_squares.py`` (20 seconds). The picture: the share of the explained variance that is missing,
for best weights (a) in a random direction, (b) along the eigenvector of mu; (c) steps until 1e-8 is missing.

Where it does not show: batch norm is not faster than plain gradient descent on w with steps 1/L, whose bound is the
same. (With these steps v moves to where a step of plain gradient descent from w points, and then the length is made the
best: that proves the bound.) In a random direction both need about as many steps. Only where the best weights lie
along the slowest direction is batch norm faster: it need not wait for the length, and what is left to find, the
direction, converges at the rate of the other eigenvalues. ("theory": the largest eigenvalue of 1 - S/L off the best
direction.) Sample and population do not differ: all holds for the sample's own S and u, whatever the distribution.

Source: Kohler, Daneshmand, Lucchi, Hofmann, Zhou & Neymeyr, "Exponential convergence rates for Batch Normalization: The
power of length-direction decoupling in non-convex optimization", AISTATS 2019, section 3, theorem 1.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from gallery import BLUE, GREY, ORANGE, one_blas_thread, options, panels, progress, save, table
from gdnp import Array, direction_gradient, final_rate, normalized

SAMPLES, INPUTS = 100, 10
CLOSE = 1e-8  # of the explained variance
RANDOM, SLOWEST = "random direction", "slowest direction"
BOUND, PLAIN, BATCH_NORM = "bound", "plain", "batch norm"
STYLES = {BOUND: (GREY, "--", 1.5), PLAIN: (ORANGE, "-", 3), BATCH_NORM: (BLUE, "-", 1.5)}


class Problem(NamedTuple):
    """Centred inputs whose S is diagonal, exactly: its eigenvalues go from L = 1 to mu."""

    x: Array
    y: Array
    eigenvalues: Array
    u: Array

    @property
    def best(self) -> Array:
        return self.u / self.eigenvalues

    def missing(self, w: Array) -> float:
        """(error - least error) / (E[y^2] - least error), without the cancellation of these differences."""
        return float(np.sum(self.eigenvalues * (w - self.best) ** 2) / (self.u @ self.best))

    def gradient(self, v: Array) -> Array:
        """Of rho, by its formula."""
        ratio = self.u @ v / np.sum(self.eigenvalues * v**2)
        return -2 * ratio * (self.u - ratio * self.eigenvalues * v)


class Result(NamedTuple):
    best: str
    condition: float
    steps: Array  # that were recorded
    missing: dict[str, Array]  # before these steps, by method
    theory: float  # batch norm's rate in the end
    gradient_error: float  # largest difference between batch norm's gradient and the formula, over the first gradient

    def needed(self, method: str) -> int:
        """Steps until no more than CLOSE is missing."""
        return int(self.steps[np.argmax(self.missing[method] <= CLOSE)])

    def rate(self, method: str) -> float:
        """What a step leaves of the distance to the best weights, over the last quarter of the steps."""
        late = slice(3 * len(self.steps) // 4, None)
        return float(np.exp(np.polyfit(self.steps[late], np.log(self.missing[method][late]), 1)[0] / 2))


def problem(condition: float, best: str, rng: np.random.Generator) -> Problem:
    eigenvalues = np.geomspace(1, 1 / condition, INPUTS)
    x = rng.standard_normal((SAMPLES, INPUTS))
    orthonormal = np.linalg.qr(x - x.mean(axis=0))[0]
    x = np.sqrt(SAMPLES * eigenvalues) * orthonormal
    y = x @ (rng.standard_normal(INPUTS) if best == RANDOM else np.eye(INPUTS)[-1])
    noise = rng.standard_normal(SAMPLES)
    y += 0.1 * np.std(y) * (noise - orthonormal @ (orthonormal.T @ noise))  # not explained by x: the best weights stay
    return Problem(x, y, eigenvalues, x.T @ y / SAMPLES)


def rayleigh(p: Problem, v: Array) -> tuple[float, float, Array]:
    """The best length g = E[y h], ||v||_S, and the gradient of rho(v) = -g^2, all by batch norm."""
    h, saved = normalized(p.x, v)
    g = float(h @ p.y) / SAMPLES
    return g, 1 / saved.rstd[0], direction_gradient(p.x, -2 * g * p.y / SAMPLES, saved)


def descend(condition: float, best: str, steps: int, rng: np.random.Generator) -> Result:
    """Both methods, from the same weights."""
    p, v = problem(condition, best, rng), rng.standard_normal(INPUTS)
    g, norm, gradient = rayleigh(p, v)
    w, first = g * v / norm, np.abs(gradient).max()
    records, error = [], 0.0
    for step in range(steps + 1):
        g, norm, gradient = rayleigh(p, v)
        if step % (steps // 100) == 0:
            progress(f"condition {condition}, {best}: step {step} of {steps}")
            records.append((step, p.missing(g * v / norm), p.missing(w)))
            error = max(error, float(np.abs(gradient - p.gradient(v)).max() / first))
        v = v - norm**2 / (2 * g**2) * gradient
        w = w - (p.eigenvalues * w - p.u)
    at, by_direction, by_weights = np.array(records).T
    missing = {BOUND: by_weights[0] * (1 - 1 / condition) ** (2 * at), PLAIN: by_weights, BATCH_NORM: by_direction}
    return Result(best, condition, at, missing, final_rate(np.diag(p.eigenvalues), p.best), error)


def draw(results: list[Result], output: str) -> None:
    titles = f"best weights: {RANDOM}", f"best weights: {SLOWEST}", "steps needed"
    figure, axes = panels("abc", titles, (12, 4.2))
    for letter, best, ends in (("a", RANDOM, "-"), ("b", SLOWEST, ":")):
        chosen = [r for r in results if r.best == best]
        shown = next(r for r in reversed(chosen) if r.condition <= 1000)
        conditions = [r.condition for r in chosen]
        for method, (colour, line, width) in STYLES.items():
            axes[letter].plot(shown.steps, shown.missing[method], line, color=colour, lw=width, label=method)
            if method != BOUND:
                needed = [r.needed(method) for r in chosen]
                style = {"color": colour, "lw": width, "ms": 2 * width + 3, "label": f"{method}, {best}"}
                axes["c"].plot(conditions, needed, "o" + ends, **style)
        axes[letter].set(yscale="log", ylim=(1e-10, 3), xlabel=f"step, for L/mu = {shown.condition}")
        axes[letter].set_ylabel("explained variance missing, share")
        axes[letter].legend(frameon=False)
    axes["c"].set(
        xscale="log", yscale="log", xlabel="condition number L/mu", ylabel=f"steps to {CLOSE:g}", ylim=(30, 1e6)
    )
    axes["c"].legend(frameon=False)
    save(figure, output)


def main(argv: Sequence[str] | None = None) -> list[Result]:
    args = options(__doc__, "least_squares.png").parse_args(argv)
    conditions = (10, 100) if args.quick else (10, 100, 1000, 10_000)
    with one_blas_thread():
        results = [
            descend(condition, best, 12 * condition, np.random.default_rng(args.seed))
            for best in (RANDOM, SLOWEST)
            for condition in conditions
        ]
    rows = []
    for r in results:
        rates = (r.rate(PLAIN), r.rate(BATCH_NORM), r.theory)
        needed = (r.needed(method) for method in (BOUND, PLAIN, BATCH_NORM))
        rows.append(
            (r.best, r.condition, *(f"{(1 - rate) * r.condition:.3f}" for rate in rates), *needed, r.gradient_error)
        )
    table(("best weights", "L/mu", "plain's", "batch norm's", "theory", "bound", "plain", "batch norm", "error"), rows)
    print(f"""
plain's, batch norm's, theory: (1 - rate) L/mu, where the rate is what a step leaves of the distance; the bound's is 1
bound, plain, batch norm: steps until {CLOSE:g} of the explained variance is missing
error: of batch norm's backward pass against the formula for the gradient, over the largest gradient's size""")
    draw(results, args.output)
    return results


if __name__ == "__main__":
    main()
