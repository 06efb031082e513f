"""The contract of a backend, on CuPy arrays with CUDA kernels; `fastbn.cpu` says what each function does.

Every function describes its call as a `plans.Problem`, asks for the plan and launches it on the current stream; callers
make the arrays' device the current one. Per-channel numbers stay in their dtypes, and absent ones None: the kernels
convert. Results of a call and the scratch behind them are one allocation, so that a captured graph may be replayed as
long as the results live, unless callers copied something first.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fastbn.cuda import launch, plans
from fastbn.cuda.again import backward_again, forward_again, inference_again, moments_again
from fastbn.cuda.memory import (
    Array,
    Results,
    empty_like,
    folded_view,
    overlap,
    problem_of,
    same_or_apart,
    vector,
    writable_in_place,
)

__all__ = [
    "backward",
    "backward_again",
    "empty_like",
    "folded_view",
    "forward",
    "forward_again",
    "grad_input",
    "grad_sums",
    "inference_again",
    "moments",
    "moments_again",
    "normalize",
    "overlap",
    "same_or_apart",
    "vector",
    "writable_in_place",
    "xp",
]

xp = launch.cupy


def moments(x: Array, weight: Array | None) -> tuple[Array, Array, Array, Array]:
    problem = problem_of({"x": x}, weight)
    count, m2, mean, rstd = _run(plans.moments, problem, 4, x=x, weight=weight)
    return count, mean, m2, rstd


def normalize(
    x: Array,
    mean: Array,
    spread: Array,
    gamma: Array | None,
    beta: Array | None,
    eps: float | None,
    residual: Array | None,
    relu: bool,
    y: Array,
) -> None:
    arrays = {"x": x, "y": y, "residual": residual}
    numbers = {"mean": mean, "spread": spread, "gamma": gamma, "beta": beta}
    problem = problem_of(
        arrays, None, numbers, relu, residual is not None, eps=eps or 0.0, spread_is_variance=eps is not None
    )
    _run(plans.normalize, problem, 0, **arrays, **numbers)


def forward(
    x: Array,
    weight: Array | None,
    gamma: Array | None,
    beta: Array | None,
    eps: float,
    residual: Array | None,
    relu: bool,
    y: Array,
) -> tuple[Array, Array, Array, Array]:
    arrays, numbers = {"x": x, "y": y, "residual": residual}, {"gamma": gamma, "beta": beta}
    problem = problem_of(arrays, weight, numbers, relu, residual is not None, eps=eps)
    count, m2, mean, rstd = _run(plans.forward, problem, 4, weight=weight, **arrays, **numbers)
    return count, mean, m2, rstd


def grad_sums(
    dy: Array, x: Array, y: Array | None, weight: Array | None, mean: Array, rstd: Array
) -> tuple[Array, Array]:
    arrays, numbers = {"x": x, "dy": dy, "y": y}, {"mean": mean, "spread": rstd}
    problem = problem_of(arrays, weight, numbers, y is not None)
    dgamma, dbeta = _run(plans.grad_sums, problem, 2, weight=weight, **arrays, **numbers)
    return dgamma, dbeta


def grad_input(
    dy: Array,
    x: Array | None,
    y: Array | None,
    weight: Array | None,
    mean: Array,
    unit: Array,
    scale: Array,
    offset: Array,
    slope: Array,
    dx: Array,
    dresidual: Array | None,
) -> None:
    arrays = {"dy": dy, "x": x, "y": y, "dx": dx, "dresidual": dresidual}
    numbers = {"mean": mean, "spread": unit, "gamma": scale, "offset": offset, "slope": slope}
    problem = problem_of(arrays, weight, numbers, y is not None, dresidual is not None, frozen=x is None)
    _run(plans.grad_input, problem, 0, weight=weight, **arrays, **numbers)


def backward(
    dy: Array,
    x: Array,
    y: Array | None,
    weight: Array | None,
    mean: Array,
    rstd: Array,
    gamma: Array | None,
    count: Array,
    dmean: Array | None,
    dvar: Array | None,
    frozen: bool,
    dx: Array,
    dresidual: Array | None,
) -> tuple[Array, Array]:
    arrays = {"x": x, "dy": dy, "y": y, "dx": dx, "dresidual": dresidual}
    numbers = {"mean": mean, "spread": rstd, "gamma": gamma, "count": count, "dmean": dmean, "dvar": dvar}
    problem = problem_of(arrays, weight, numbers, y is not None, dresidual is not None, frozen=frozen)
    dgamma, dbeta = _run(plans.backward, problem, 2, weight=weight, **arrays, **numbers)
    return dgamma, dbeta


def _run(choose: Any, problem: plans.Problem, rows: int, **arrays: Array | None) -> list[Array]:
    """Launch the plan of a problem; the rows of results, each with a number for every kept channel."""
    channels = problem.shape[0] * problem.shape[2]
    if channels == 0:
        return [xp.empty(0, np.float64) for _ in range(rows)]
    plan = choose(problem)
    results, *scratch = Results(rows, channels, plan)()
    addresses = (arrays.get(name) for name in launch.POINTERS[: -len(scratch)])
    plan.run(*(0 if a is None else a.data.ptr for a in addresses), *scratch)
    return results
