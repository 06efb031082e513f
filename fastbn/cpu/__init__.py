"""The contract of a backend (`fastbn.backend`), on NumPy arrays with Numba kernels.

Here operands become strides and kinds of arrays (`memory`), `plans` chooses kernels and divides the work for them; a
`Program` runs, and is given the arrays themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from fastbn.cpu import gradient_plans, plans, team, vector_plans
from fastbn.cpu.extremes import find_beyond, weight_in_range
from fastbn.cpu.memory import (
    PLAIN,
    Array,
    alike,
    allocator,
    collapsed_view,
    disjoint,
    kernel_type_or_none,
    nontemporal_stores,
    overlap,
    reads,
    reads_slabs,
    same_or_apart,
    shape_of,
    strides_of,
    strides_of_weight,
    viewed,
)
from fastbn.cpu.program import Program, kernel_type
from fastbn.cpu.records import MomentRows, Sums, Union
from fastbn.cpu.statistics import statistic
from fastbn.formulas import LEAST_EPS, reciprocal_std
from fastbn.operands import AffineTypes, GradientTypes, Operand, RunningTypes, dense

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

xp = np
COUNT, M2, MEAN, RSTD = map(MomentRows._fields.index, ("count", "m2", "mean", "rstd"))  # rows of tables
OF_X = MomentRows._fields.index("gamma")  # rows before gamma and beta
DGAMMA, DBETA = map(Sums._fields.index, ("dgamma", "dbeta"))
N, HI, UNITED_M2 = map(Union._fields.index, ("n", "hi", "m2"))
LEAST_PIECE = 128 << 10  # to copy it takes 20 us, twice what a piece takes to be launched


def on_its_device(call: Callable[..., Any], x: Array) -> Callable[..., Any]:
    """There is but one."""
    return call


def place(a: Array) -> tuple[int, int]:
    """Device, and offset of the address from a multiple of 16 bytes where that decides about kernels: not here."""
    return 0, 0


def _launcher(plan: Callable[[int], Program], size: int) -> Callable[..., object]:
    """What runs the program on as many threads as so much work is worth; the number may change between calls."""
    if size < team.PARALLEL_FROM:
        return plan(1).prepared()

    def launch(*given: Any) -> None:
        plan(team.threads_for(size))(*given)

    return launch


def _unscaled(table: Array, k: int) -> tuple[Array, Array, Array, Array]:
    """Count, mean, M2 and rstd, of weights that were divided by 2^k."""
    if k != 0:
        for row in (COUNT, M2):
            table[row] = np.ldexp(table[row], k)
    return table[COUNT], table[MEAN], table[M2], table[RSTD]


def moments(x: Operand, weight: Operand | None) -> Callable[..., tuple[Array, ...]]:
    return _moments(x, weight, 0.0)


def _moments(x: Operand, weight: Operand | None, eps: float) -> Callable[..., tuple[Array, ...]]:
    shape, kind, xs, (ws, weights), kept = (
        shape_of(x),
        kernel_type(x.dtype),
        strides_of(x),
        strides_of_weight(weight),
        x.kept,
    )
    launch = _launcher(lambda threads: plans.moments(shape, kind, xs, ws, weights, threads), x.size)

    def run(x: Array, weight: Array | None) -> tuple[Array, ...]:
        table, k = np.empty((OF_X, kept)), 0
        if weight is not None:
            weight, k = weight_in_range(weight, x)
        launch(x, weight, table, eps)
        return _unscaled(table, k)

    return run


def normalize(
    x: Operand, y: Operand, residual: Operand | None, parameters: AffineTypes, eps: float | None, relu: bool
) -> Callable[..., None]:
    shape, kind, (xs, ys, rs) = shape_of(x), kernel_type(x.dtype), map(strides_of, (x, y, residual))
    kinds = tuple(map(kernel_type_or_none, parameters))
    launch = _launcher(
        lambda threads: plans.normalize(shape, kind, xs, ys, rs, kinds, eps is None, relu, threads), x.size
    )
    added, allowed, operands = 0.0 if eps is None else eps, nontemporal_stores(y), (x, residual, y)
    beyond = None
    if x.dtype.itemsize < 8 and added < LEAST_EPS:
        beyond = find_beyond(x.kept, np.dtype(float) if eps is not None else parameters.spread, parameters.gamma)

    def run(
        x: Array, residual: Array | None, y: Array, mean: Array, spread: Array, gamma: Array | None, beta: Array | None
    ) -> None:
        if beyond and beyond(spread if eps is None else reciprocal_std(spread.astype(float), eps), gamma):
            _normalize_in_float64(operands, x, residual, y, mean, spread, gamma, beta, eps, relu)
        else:
            launch(x, y, residual, mean, spread, gamma, beta, added, allowed(y) if allowed else PLAIN)

    return run


def _normalize_in_float64(
    operands: tuple[Operand | None, ...], x: Array, residual: Array | None, y: Array,
    mean: Array, spread: Array, gamma: Array | None, beta: Array | None, eps: float | None, relu: bool,
) -> None:  # fmt: skip
    """Copies of the arrays; the result is rounded once more."""
    given = mean, spread, gamma, beta
    of_x, of_residual, of_y = operands
    assert of_x is not None
    assert of_y is not None
    wide, result = dense(of_x.shape, np.dtype(float)), np.empty(of_x.shape)
    types = AffineTypes(*(None if a is None else a.dtype for a in given))
    added = None if of_residual is None else np.array(viewed(of_residual, residual), float, order="C")
    run = normalize(wide, wide, None if added is None else wide, types, eps, relu)
    run(np.array(viewed(of_x, x), float, order="C"), added, result, *given)
    viewed(of_y, y)[...] = result


def forward(
    x: Operand, weight: Operand | None, y: Operand, residual: Operand | None, gamma: Any, beta: Any,
    eps: float, relu: bool, running: tuple[Any, Any] | None,
) -> Callable[..., tuple[Array, ...]]:  # fmt: skip
    if running is not None:
        return _updating(forward(x, weight, y, residual, gamma, beta, eps, relu, None), x.kept, running)
    shape, kind, (xs, ys, rs), kept = shape_of(x), kernel_type(x.dtype), map(strides_of, (x, y, residual)), x.kept
    (ws, weights), kinds = strides_of_weight(weight), (kernel_type_or_none(gamma), kernel_type_or_none(beta))
    launch = _launcher(
        lambda threads: plans.forward(shape, kind, xs, ws, weights, ys, rs, kinds, relu, threads), x.size
    )
    allowed, operands = nontemporal_stores(y), (x, residual, y)
    weighted, narrow, size = weight, x.dtype.itemsize < 8, (len(MomentRows._fields), kept)
    beyond = find_beyond(kept, np.dtype(float), gamma) if narrow and eps < LEAST_EPS else None

    def run(
        x: Array, weight: Array | None, gamma: Array | None, beta: Array | None, residual: Array | None, y: Array
    ) -> tuple[Array, ...]:
        if beyond and any(a is not None and np.may_share_memory(a, y) for a in (x, residual, gamma, beta)):
            vectors = _moments(operands[0], weighted, eps)(x, weight)  # before y is written, should float64 be needed
            _, mean, _, rstd = vectors
            given = mean, rstd, gamma, beta
            types = AffineTypes(*(None if a is None else a.dtype for a in given))
            normalize(operands[0], operands[2], operands[1], types, None, relu)(x, residual, y, *given)
            return vectors
        table, k = np.empty(size), 0
        if weight is not None:
            weight, k = weight_in_range(weight, x)
        launch(x, weight, y, residual, gamma, beta, table, eps, allowed(y) if allowed else PLAIN)
        if beyond and beyond(table[RSTD], gamma):
            _normalize_in_float64(operands, x, residual, y, table[MEAN], table[RSTD], gamma, beta, None, relu)
        return _unscaled(table, k) if k else (table[COUNT], table[MEAN], table[M2], table[RSTD])

    return run


def _updating(forward: Callable[..., tuple[Array, ...]], kept: int, running: tuple[Any, Any]) -> Callable[..., Any]:
    """The forward pass, and then running statistics, which take no share of its time."""
    update = update_running(kept, RunningTypes.in_place(running, np.dtype(float)), False, False)

    def run(
        x: Array, weight: Array | None, gamma: Array | None, beta: Array | None, residual: Array | None, y: Array,
        mean: Array, var: Array, rate: float, correction: float,
    ) -> tuple[Array, ...]:  # fmt: skip
        count, batch_mean, m2, rstd = forward(x, weight, gamma, beta, residual, y)
        update(mean, var, count, batch_mean, m2, mean, var, rate, correction)
        return count, batch_mean, m2, rstd

    return run


def grad_sums(
    dy: Operand, x: Operand, y: Operand | None, weight: Operand | None, types: GradientTypes, recompute: bool
) -> Callable[..., tuple[Array, Array]]:
    shape, kind, (dys, xs, ys), kept = shape_of(x), kernel_type(x.dtype), map(strides_of, (dy, x, y)), x.kept
    (ws, weights), kinds, empty = strides_of_weight(weight), tuple(map(kernel_type_or_none, types)), x.size == 0
    size = len(Sums._fields), kept
    launch = _launcher(
        lambda threads: gradient_plans.grad_sums(shape, kind, dys, xs, ys, ws, weights, kinds, recompute, threads),
        x.size,
    )

    def run(dy: Array, x: Array, y: Array | None, weight: Array | None, *vectors: Any) -> tuple[Array, Array]:
        if empty:  # the empty sum is 0, though rstd is NaN
            return np.zeros(kept), np.zeros(kept)
        if weight is not None:
            weight, _ = weight_in_range(weight, x)
        sums = np.empty(size)
        launch(dy, x, y, weight, *vectors, sums)
        return sums[DGAMMA], sums[DBETA]

    return run


def grad_input(
    dy: Operand, x: Operand, y: Operand | None, weight: Operand | None, types: GradientTypes, recompute: bool,
    sums: tuple[Any, Any], dx: Operand, dresidual: Operand | None,
) -> Callable[..., None]:  # fmt: skip
    shape, kind, (dys, xs, ys, dxs, drs) = shape_of(x), kernel_type(x.dtype), map(strides_of, (dy, x, y, dx, dresidual))
    (ws, weights), types = strides_of_weight(weight), _with_count_in_range(types, weight)
    kinds = tuple(map(kernel_type_or_none, (*types, *sums)))
    launch = _launcher(
        lambda threads: gradient_plans.grad_input(
            shape, kind, dys, xs, ys, ws, weights, dxs, drs, kinds, recompute, threads
        ),
        x.size,
    )
    allowed = nontemporal_stores(dx, dresidual)

    def run(
        dy: Array, x: Array, y: Array | None, weight: Array | None, mean: Array, rstd: Array, gamma: Array | None,
        count: Array, beta: Array | None, dmean: Array | None, dvar: Array | None, dgamma: Array, dbeta: Array,
        dx: Array, dresidual: Array | None,
    ) -> None:  # fmt: skip
        if weight is not None:
            weight, count = _in_range(weight, count, x)
        nontemporal = allowed(dx, dresidual) if allowed else PLAIN
        numbers = mean, rstd, gamma, count, beta, dmean, dvar, dgamma, dbeta
        launch(dy, x, y, weight, dx, dresidual, *numbers, nontemporal)

    return run


def _with_count_in_range(types: GradientTypes, weight: Operand | None) -> GradientTypes:
    """The count beside weights is what `_in_range` makes of it, in float64."""
    return types if weight is None or types.count is None else types._replace(count=np.dtype(float))


def _in_range(weight: Array, count: Array, x: Array) -> tuple[Array | None, Array]:
    """Weights and their sum over the same power of two."""
    scaled, k = weight_in_range(weight, x)
    count = count.astype(np.float64, copy=False)
    return scaled, count if k == 0 else np.ldexp(count, -k)


def backward(
    dy: Operand, x: Operand, y: Operand | None, weight: Operand | None, types: GradientTypes, recompute: bool,
    frozen: bool, dx: Operand, dresidual: Operand | None,
) -> Callable[..., tuple[Array, Array]]:  # fmt: skip
    shape, kind, (dys, xs, ys, dxs, drs) = shape_of(x), kernel_type(x.dtype), map(strides_of, (dy, x, y, dx, dresidual))
    (ws, weights), types = strides_of_weight(weight), _with_count_in_range(types, weight)
    kinds = tuple(map(kernel_type_or_none, types))
    launch = _launcher(
        lambda threads: gradient_plans.backward(
            shape, kind, dys, xs, ys, ws, weights, dxs, drs, kinds, frozen, recompute, threads
        ),
        x.size,
    )
    allowed, kept, empty = nontemporal_stores(dx, dresidual), x.kept, x.size == 0
    size = len(Sums._fields), kept

    def run(
        dy: Array, x: Array, y: Array | None, weight: Array | None, mean: Array, rstd: Array, gamma: Array | None,
        count: Array | None, beta: Array | None, dmean: Array | None, dvar: Array | None, dx: Array,
        dresidual: Array | None,
    ) -> tuple[Array, Array]:  # fmt: skip
        if empty:
            return np.zeros(kept), np.zeros(kept)
        if weight is not None and count is not None:
            weight, count = _in_range(weight, count, x)
        sums = np.empty(size)
        nontemporal = allowed(dx, dresidual) if allowed else PLAIN
        numbers = mean, rstd, gamma, count, beta, dmean, dvar, sums
        launch(dy, x, y, weight, dx, dresidual, *numbers, nontemporal)
        return sums[DGAMMA], sums[DBETA]

    return run


def writes(dtype: Any) -> bool:
    return dtype in (np.dtype(np.float32), np.dtype(float))


def update_running(kept: int, types: RunningTypes, skip_nonfinite: bool, fresh: bool) -> Callable[..., object]:
    return vector_plans.update_running(kept, tuple(map(kernel_type, types)), skip_nonfinite).prepared()


MERGED_AT_ONCE = 8  # parts that one program merges


def merge(kept: int, types: tuple[tuple[Any, Any, Any], ...]) -> Callable[..., tuple[Array, Array, Array]]:
    kinds = [tuple(map(kernel_type, three)) for three in types]
    size, of_state = MERGED_AT_ONCE, (len(Union._fields), kept)
    starts = range(0, len(kinds), size)
    launches = [
        vector_plans.merge(kept, tuple(kinds[i : i + size]), i == 0, i + size >= len(kinds)).prepared() for i in starts
    ]

    def run(*vectors: Array) -> tuple[Array, Array, Array]:
        state = np.empty(of_state)
        for i, launch in enumerate(launches):
            launch(state, *vectors[3 * size * i : 3 * size * (i + 1)])
        return state[N], state[HI], state[UNITED_M2]

    return run
