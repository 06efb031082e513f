"""The contract of a backend (`fastbn.backend`), on CuPy arrays with CUDA kernels.

Functions of arrays describe their calls as a `problems.Problem`, for which a plan is chosen, and return what launches
that on the current stream; `statistic` and `update_running` have plans of their own, `merge` is made of CuPy's
operations. Per-channel numbers stay in their dtypes, and absent ones None:
the kernels convert. Results of a call and the scratch behind them are one allocation, so that a captured graph may be
replayed as long as the results live, unless callers copied something first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any

import numpy as np

from fastbn import formulas
from fastbn.cuda import launch, plans, problems
from fastbn.cuda.memory import (
    Array,
    alike,
    allocator,
    collapsed_view,
    disjoint,
    overlap,
    place,
    problem_of,
    reads,
    reads_slabs,
    results_of,
    same_or_apart,
    type_of,
)
from fastbn.cuda.strided import statistic
from fastbn.operands import AffineTypes, GradientTypes, Operand, RunningTypes

__all__ = [
    "LEAST_PIECE",
    "alike",
    "allocator",
    "backward",
    "collapsed_view",
    "disjoint",
    "forward",
    "grad_input",
    "grad_sums",
    "merge",
    "moments",
    "normalize",
    "on_its_device",
    "overlap",
    "place",
    "reads",
    "reads_slabs",
    "same_or_apart",
    "statistic",
    "update_running",
    "writes",
    "xp",
]

xp = launch.cupy
LEAST_PIECE = 4 << 20  # to copy it takes 3 us at 3 TB/s, less than a launch takes the host


def on_its_device(call: Callable[..., Any], x: Array) -> Callable[..., Any]:
    device, runtime = x.data.device_id, launch.runtime

    def run(*arguments: Any) -> Any:
        if runtime.getDevice() == device:
            return call(*arguments)
        with xp.cuda.Device(device):
            return call(*arguments)

    return run


def _launcher(
    choose: Any, problem: problems.Problem, rows: int, names: str, scalars: Sequence[str] = ()
) -> Callable[..., list[Array]]:
    """Of arrays by these names, launches the problem's plan; gives rows of results, a number for every kept index.

    They come in the order in which kernels write them, which is the contract's: count, mean, M2 and rstd, or the sums.
    Scalars come behind the arrays. All else is packed beforehand: what is left is a few microseconds of a call.
    """
    if problem.kept == 0:
        return lambda *arrays: [xp.empty(0, np.float64) for _ in range(rows)]
    plan: plans.Plan = choose(problem)
    order = {name: i for i, name in enumerate(names.split()) if name in problem.pointers}
    present = [name for name in launch.TILES.pointers if name in order]
    places = [order[name] for name in present]
    pick = itemgetter(*places) if len(places) > 1 else itemgetter(slice(places[0], places[0] + 1))
    if rows == 0:
        run_elementwise = plan.bound(present)

        def launched(*arrays: Array | None) -> list[Array]:
            run_elementwise(*[a.data.ptr for a in pick(arrays)])
            return []

        return launched
    pointers, make_results = results_of(plan, rows, problem.kept)
    run, arrays = plan.bound([*present, *pointers, *scalars]), len(names.split())

    def launched_with_results(*given: Any) -> list[Array]:
        results, addresses = make_results()
        run(*[a.data.ptr for a in pick(given)], *addresses, *given[arrays:])
        return results

    return launched_with_results


def moments(x: Operand, weight: Operand | None) -> Callable[..., list[Array]]:
    return _launcher(plans.moments, problem_of({"x": x}, weight), 4, "x weight")


def normalize(
    x: Operand, y: Operand, residual: Operand | None, parameters: AffineTypes, eps: float | None, relu: bool
) -> Callable[..., object]:
    problem = problem_of(
        {"x": x, "y": y, "residual": residual}, None, parameters._asdict(), relu,
        residual is not None, eps=eps or 0.0, spread_is_variance=eps is not None,
    )  # fmt: skip
    return _launcher(plans.normalize, problem, 0, "x residual y mean spread gamma beta")


def forward(
    x: Operand, weight: Operand | None, y: Operand, residual: Operand | None, gamma: Any, beta: Any,
    eps: float, relu: bool, running: tuple[Any, Any] | None,
) -> Callable[..., list[Array]]:  # fmt: skip
    arrays, numbers = {"x": x, "y": y, "residual": residual}, {"gamma": gamma, "beta": beta}
    names, scalars = "x weight gamma beta residual y", tuple[str, ...]()
    if running is not None:
        numbers |= zip(launch.RUNNING_STATISTICS, running, strict=True)
        names, scalars = f"{names} {' '.join(launch.RUNNING_STATISTICS)}", launch.TILES.scalars
    problem = problem_of(arrays, weight, numbers, relu, residual is not None, eps=eps)
    return _launcher(plans.forward, problem, 4, names, scalars)


VECTORS = " ".join(GradientTypes._fields).replace("rstd", "spread")


def _relu(y: Operand | None, recompute: bool) -> int:
    return problems.OF_X if recompute else problems.OF_Y if y is not None else 0


def _vectors(types: GradientTypes) -> dict[str, Any]:
    return dict(zip(VECTORS.split(), types, strict=True))


def _no_sums(kept: int) -> Callable[..., list[Array]]:
    """Of no elements: 0, though rstd is NaN."""
    return lambda *arrays: [xp.zeros(kept), xp.zeros(kept)]


def grad_sums(
    dy: Operand, x: Operand, y: Operand | None, weight: Operand | None, types: GradientTypes, recompute: bool
) -> Callable[..., list[Array]]:
    if x.size == 0:
        return _no_sums(x.kept)
    vectors = {"mean": types.mean, "spread": types.rstd}
    if recompute:
        vectors |= {"gamma": types.gamma, "beta": types.beta}
    problem = problem_of({"x": x, "dy": dy, "y": y}, weight, vectors, _relu(y, recompute))
    return _launcher(plans.grad_sums, problem, 2, f"dy x y weight {VECTORS}")


def grad_input(
    dy: Operand, x: Operand, y: Operand | None, weight: Operand | None, types: GradientTypes, recompute: bool,
    sums: tuple[Any, Any], dx: Operand, dresidual: Operand | None,
) -> Callable[..., object]:  # fmt: skip
    vectors = _vectors(types) | dict(zip(("dgamma", "dbeta"), sums, strict=True))
    problem = problem_of(
        {"dy": dy, "x": x, "y": y, "dx": dx, "dresidual": dresidual}, weight, vectors, _relu(y, recompute),
        dresidual is not None, frozen=False,
    )  # fmt: skip
    return _launcher(plans.grad_input, problem, 0, f"dy x y weight {VECTORS} dgamma dbeta dx dresidual")


def backward(
    dy: Operand, x: Operand, y: Operand | None, weight: Operand | None, types: GradientTypes, recompute: bool,
    frozen: bool, dx: Operand, dresidual: Operand | None,
) -> Callable[..., list[Array]]:  # fmt: skip
    if x.size == 0:
        return _no_sums(x.kept)
    arrays = {"x": x, "dy": dy, "y": y, "dx": dx, "dresidual": dresidual}
    relu = _relu(y, recompute)
    problem = problem_of(arrays, weight, _vectors(types), relu, dresidual is not None, frozen=frozen)
    return _launcher(plans.backward, problem, 2, f"dy x y weight {VECTORS} dx dresidual")


def writes(dtype: Any) -> bool:
    return True


def update_running(kept: int, types: RunningTypes, skip_nonfinite: bool, fresh: bool) -> Callable[..., None]:
    if kept == 0:
        return lambda *given: None
    read, vectors = len(launch.MOMENTS), len(types)
    numbers = tuple(map(type_of, types[:read]))
    step = plans.update_running(launch.device(launch.current_device()), kept, numbers, skip_nonfinite)
    launched = step.bound([*launch.RUNNING.pointers, *launch.RUNNING.scalars])
    sizes = [kept * dtype.itemsize for dtype in types]

    def run(*given: Any) -> None:
        arrays, scalars = given[:vectors], given[vectors:]
        addresses = [a.data.ptr for a in arrays]
        if fresh or not some_overlap_partly(addresses, sizes):
            launched(*addresses, *scalars)
            return
        new = arrays[read:]
        copies = [xp.empty_like(a) for a in new]
        launched(*addresses[:read], *(a.data.ptr for a in copies), *scalars)
        for to, found in zip(new, copies, strict=True):
            to[...] = found

    return run


def some_overlap_partly(addresses: Sequence[int], sizes: Sequence[int]) -> bool:
    """Whether one of the last two vectors overlaps another one, but number for number."""
    for i in (-2, -1):
        first, size = addresses[i], sizes[i]
        for other, width in zip(addresses, sizes):  # noqa: B905 (strict takes a tenth of the time)
            if other < first + size and first < other + width and (other != first or width != size):
                return True
    return False


def merge(kept: int, types: tuple[tuple[Any, Any, Any], ...]) -> Callable[..., tuple[Array, Array, Array]]:
    def run(*vectors: Array) -> tuple[Array, Array, Array]:
        parts = (vectors[i : i + 3] for i in range(0, len(vectors), 3))
        count, mean, _, m2 = formulas.united(xp, ((n, mean, xp.zeros(kept), m2) for n, mean, m2 in parts))
        return count, mean, m2

    return run
