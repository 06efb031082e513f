"""Hidden units one after another: each finds the same line at a linear rate, wherever it begins.

A network F(x) = sum_i tanh(w_i'x) learns labels y = -1 or 1; tanh is odd, so that y F(x) = F(z) with z = y x, and the
loss is softplus(-F(z)). GDNP (gdnp.py) finds one unit's length and direction, w_i = g v / ||v||_S, while the others
stand still. For Gaussian z, u = E[z] and S = E[zz'], Stein's lemma gives the gradient in w_i. With h_i the derivative
of the loss in z'w_i and M_ij = E[dh_i / d(z'w_j)]::

    E[h_i z] = E[h_i] u + (S - uu') sum_j M_ij w_j = a_i u + M_ii S w_i + sum_(j != i) M_ij S w_j

Batch norm's backward pass takes away the part along S w_i. What is left is 0 only where w_i lies in the span of S^-1 u
and the other units. Where these are 0, or on the line of S^-1 u (that of linear regression), w_i is on it too: so are
all units that are optimised one after another, from 0. So are they where all gradients are 0, if M is invertible.

Run ``python examples/hidden_units.py`` (half a minute). The picture: (a) gradients of units optimised in turn;
(b) a unit's angle to the line (medians); (c) the angles of all units where that goes on for many rounds.

Where it does not show: other units elsewhere lead a unit away from the line, however many samples there are, though not
out of the span. Stein's lemma holds in expectation; angles fall with the samples as 1 / sqrt(n). And going round all
units leaves the line: for equal units on it M has three eigenvalues of -0.001 and one of 0.33 (by quadrature), it is a
saddle, though so flat that the errors of the sample decide where units turn: another sample's loss gains nothing.

Source: Kohler, Daneshmand, Lucchi, Hofmann, Zhou & Neymeyr, "Exponential convergence rates for Batch Normalization: The
power of length-direction decoupling in non-convex optimization", AISTATS 2019, section 5.
"""

from collections.abc import Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np
from gallery import BLUE, GREEN, GREY, PURPLE, SHADES, one_blas_thread, options, panels, progress, save, table
from gdnp import Array, Loss, Sample, gaussian_classes, gdnp, sigmoid

INPUTS, UNITS, CONDITION, SEPARATION, STEPS, HALVINGS = 10, 4, 5, 0.5, 40, 25
ZERO, ON_LINE, ELSEWHERE, SPAN = "others 0", "others on the line", "others elsewhere", "the same, to the span"
COLOURS = {ZERO: BLUE, ON_LINE: SHADES[BLUE][0], ELSEWHERE: PURPLE, SPAN: GREEN}
FROM_ZERO, FROM_RANDOM, KEPT = "from 0", "from random directions", "kept on the line"


class Rounds(NamedTuple):
    norms: list[list[float]]  # of the gradient of each unit in the first round, before each step
    angles: Array  # (rounds, units): to the line, degrees
    losses: list[float]  # in the end, in the sample and in another one
    units: Array  # in the end: weights in rows


class Result(NamedTuple):
    bound: float  # 1 - mu/L
    rounds: dict[str, Rounds]  # by where they begin
    spread: float  # the largest angle between directions found from random ones in the same sample
    sizes: Sequence[int]
    angles: dict[str, Array]  # (sizes, repeats): of one unit to the line or span, degrees


def loss_of_unit(others: Array) -> Loss:
    """The network's loss, softplus(-F(z)), in the margin of one unit; the other units' outputs add up to `others`."""

    def first(a: Array) -> Array:
        t = np.tanh(a)
        return -sigmoid(-others - t) * (1 - t**2)

    def second(a: Array) -> Array:
        t = np.tanh(a)
        s = sigmoid(-others - t)
        return s * (1 - t**2) * ((1 - s) * (1 - t**2) + 2 * t)

    return Loss(first, second)


def output(sample: Sample, units: Array) -> Array:
    """F(z) of the units whose weights are the rows."""
    return np.tanh(sample.y[:, None] * (sample.x @ units.T)).sum(axis=1)


def optimise(sample: Sample, others: Array, v: Array, steps: int = STEPS) -> tuple[Array, list[float]]:
    """A unit's weights, beside the others', and the norms of its gradient; one step finds the length alone."""
    v, g, norms = gdnp(sample, loss_of_unit(output(sample, others)), v, steps, HALVINGS)
    return sample.weights(v, g), norms


def angles_by_size(sizes: Sequence[int], repeats: int, rng: np.random.Generator) -> dict[str, Array]:
    """Every time other inputs, a random direction of the unit, and random lengths and directions of the others."""
    angles = {kind: np.zeros((len(sizes), repeats)) for kind in COLOURS}
    for at in np.ndindex(len(sizes), repeats):
        progress(f"{sizes[at[0]]} samples, {at[1] + 1} of {repeats}")
        sample = gaussian_classes(sizes[at[0]], INPUTS, CONDITION, SEPARATION, rng)
        lengths = rng.standard_normal(UNITS - 1)
        on_line = np.array([sample.weights(sample.line, g) for g in lengths])
        elsewhere = np.array([sample.weights(rng.standard_normal(INPUTS), g) for g in lengths])
        for kind, others in ((ZERO, 0 * on_line), (ON_LINE, on_line), (ELSEWHERE, elsewhere)):
            w, _ = optimise(sample, others, rng.standard_normal(INPUTS))
            angles[kind][at] = sample.angle(w, sample.line)
        span = np.vstack([sample.line, elsewhere])
        angles[SPAN][at] = sample.angle(w, np.linalg.solve(span @ sample.S @ span.T, span @ sample.S @ w) @ span)
    return angles


def go_round(start: str, samples: tuple[Sample, Sample], rounds: int, rng: np.random.Generator) -> Rounds:
    """Optimise each unit in turn in the first sample, from random directions; on the line their lengths alone."""
    sample, norms, angles = samples[0], [], []
    directions = np.tile(sample.line, (UNITS, 1)) if start == KEPT else rng.standard_normal((UNITS, INPUTS))
    lengths = rng.uniform(0.5, 1.5, UNITS) * (1e-9 if start == FROM_ZERO else 1)  # as good as 0, with a direction
    units = np.array([sample.weights(v, g) for v, g in zip(directions, lengths, strict=True)])
    for number in range(rounds):
        progress(f"units {start}: round {number + 1} of {rounds}")
        for i, others in enumerate(~np.eye(UNITS, dtype=bool)):
            units[i], unit_norms = optimise(sample, units[others], units[i], 1 if start == KEPT else STEPS)
            norms.append(unit_norms)
        angles.append([sample.angle(w, sample.line) for w in units])
    losses = [float(np.mean(np.logaddexp(0, -output(s, units)))) for s in samples]
    return Rounds(norms[:UNITS], np.array(angles), losses, units)


def report(r: Result) -> None:
    first = r.rounds[FROM_ZERO]
    rows = [
        (i + 1, norms[0], norms[-1], (norms[-1] / norms[10]) ** (1 / (STEPS - 11)), r.bound, first.angles[0, i])
        for i, norms in enumerate(first.norms)
    ]
    table(("unit, from 0", "first gradient", "last", "rate", "1 - mu/L", "angle to the line"), rows)
    print(f"unit 1 from random directions in the same sample: ends within {r.spread:.2g} degrees\n")
    table(("angle with samples:", *map(str, r.sizes)), [(kind, *np.median(a, axis=1)) for kind, a in r.angles.items()])
    rows = []
    for start, done in r.rounds.items():
        ends = (" ".join(f"{angle:.1f}" for angle in done.angles[i]) for i in (0, -1))
        rows.append((start, len(done.angles), *ends, *(f"{loss:.5f}" for loss in done.losses)))
    print()
    table(("units", "rounds", "angles after the first", "after the last", "loss", "in another sample"), rows)


def draw(r: Result, picture: str) -> None:
    titles = "one after another; dashed: 1 - mu/L", "a unit's angle to the line", "all units, round and round"
    figure, axes = panels("abc", titles, (12, 4.2))
    for i, norms in enumerate(r.rounds[FROM_ZERO].norms):
        axes["a"].plot(norms, color=BLUE, alpha=1 - 0.2 * i, label=f"unit {i + 1}")
        axes["a"].plot(norms[0] * r.bound ** np.arange(STEPS), "--", color=GREY, lw=1, alpha=1 - 0.2 * i)
    for kind, angles in r.angles.items():
        axes["b"].plot(r.sizes, np.median(angles, axis=1), "o-", color=COLOURS[kind], label=kind)
    axes["b"].plot(r.sizes, 300 / np.sqrt(r.sizes), "--", color=GREY, label="1 / sqrt(n)")
    for start, colour in ((FROM_RANDOM, PURPLE), (FROM_ZERO, BLUE)):
        axes["c"].plot(r.rounds[start].angles, color=colour, label=[start, *[None] * (UNITS - 1)])
    axes["a"].set(yscale="log", xlabel="step", ylabel="norm of the unit's gradient")
    axes["b"].set(xscale="log", yscale="log", xlabel="samples n", ylabel="angle, degrees")
    axes["c"].set(xlabel="rounds before", ylabel="angle to the line, degrees", ylim=(0, None))
    for axis in axes.values():
        axis.legend(frameon=False, fontsize="small")
    save(figure, picture)


def main(argv: Sequence[str] | None = None) -> Result:
    args = options(__doc__, "hidden_units.png").parse_args(argv)
    rng = np.random.default_rng(args.seed)
    sizes = (1000, 16_000) if args.quick else (1000, 3000, 10_000, 30_000, 100_000)
    n, rounds, starts = (4000, 2, 3) if args.quick else (10_000, 15, 10)
    with one_blas_thread():
        angles = angles_by_size(sizes, 3, rng)
        both = gaussian_classes(11 * n, INPUTS, CONDITION, SEPARATION, rng)
        samples = Sample(both.x[:n], both.y[:n]), Sample(both.x[n:], both.y[n:])
        found = [optimise(samples[0], np.zeros((1, INPUTS)), v)[0] for v in rng.standard_normal((starts, INPUTS))]
        spread = max(samples[0].angle(v, w) for v, w in combinations(found, 2))
        done = {start: go_round(start, samples, rounds, rng) for start in (FROM_ZERO, FROM_RANDOM, KEPT)}
    result = Result(samples[0].rate, done, spread, sizes, angles)
    report(result)
    draw(result, args.output)
    return result


if __name__ == "__main__":
    main()
