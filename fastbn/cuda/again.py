"""The short way of `repeated`: a plan made before, and what is left to do for arrays like those it was made for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastbn.cuda import launch, plans
from fastbn.cuda.memory import Array, Results, empty_like, extent, overlap, problem_of
from fastbn.layout import Layout
from fastbn.merging import Moments
from fastbn.saved import Gradients, Saved

cupy = launch.cupy

Call = Callable[..., Any]


class _Like:
    """Arrays like those of an earlier call, in what its key does not say: device, alignment, gaps between numbers."""

    def __init__(self, layout: Layout, data: dict[str, Array | None], numbers: dict[str, Array | None]) -> None:
        first: Array = next(iter(data.values()))
        self.device = first.data.device_id
        arrays = (*data.values(), *numbers.values())
        self.offs = [0 if a is None else a.data.ptr % 16 for a in arrays]
        self.steps = [None] * len(data) + [() if a is None else a.strides for a in numbers.values()]
        self.extents = [(0, 0) if a is None else extent(a) for a in arrays]
        self.folded = {name: None if a is None else layout.fold(a) for name, a in data.items()}
        self.numbers = {name: None if a is None else a.reshape(-1) for name, a in numbers.items()}
        self.usable = (
            len(layout.kept_shape) == 1
            and first.size > 0
            and all(
                a is None or (a.shape == layout.kept_shape and a.strides[0] == a.itemsize) for a in numbers.values()
            )
            and all(
                a is None or overlap(a, whole) for a, whole in zip(self.folded.values(), data.values(), strict=True)
            )
        )
        """Whether there is a short way at all: kernels see the arrays as they lie, nothing is copied."""

    def addresses(self, *arrays: Array | None) -> list[int] | None:
        """Where arrays lie, 0 for None; or None where they are not like the earlier ones."""
        device, found = self.device, []
        for a, off, step in zip(arrays, self.offs, self.steps):  # noqa: B905 (strict takes a tenth of the time)
            if a is None:
                found.append(0)
                continue
            memory = a.data
            address = memory.ptr
            if address & 15 != off if step is None else a.strides != step:
                return None
            if memory.device_id != device:
                return None
            found.append(address)
        return found if launch.current_device() == device else None

    def apart(self, which: int, addresses: list[int]) -> bool:
        """Whether the array of this number shares no memory with the others."""
        low, high = (addresses[which] + end for end in self.extents[which])
        return not any(
            address and i != which and address + first < high and low < address + end
            for i, (address, (first, end)) in enumerate(zip(addresses, self.extents, strict=True))
        )


def _allocator(x: Array) -> Callable[[], Array]:
    """Makes arrays like x: the constructor takes half the time of empty_like."""
    if x.flags.c_contiguous:
        ndarray, shape, dtype = cupy.ndarray, x.shape, x.dtype
        return lambda: ndarray(shape, dtype)
    return lambda: empty_like(x)


def _runner(plan: plans.Plan) -> Callable[..., None]:
    """What launches a plan: its only launch itself, where nothing else is to do."""
    return plan.run if plan.counters or len(plan.launches) > 1 else plan.launches[0]


def forward_again(
    layout: Layout, saved: Saved, x: Array, beta: Array | None, eps: float, residual: Array | None, out: Array | None
) -> Call | None:
    """``call(x, gamma, beta, residual, out)`` does what `batch_norm` does."""
    y = empty_like(x) if out is None else out
    like = _Like(layout, {"x": x, "residual": residual, "y": y}, {"gamma": saved.gamma, "beta": beta})
    if not like.usable:
        return None
    relu, channel_axis, activation = saved.activation is not None, saved.channel_axis, saved.activation
    problem = problem_of(like.folded, None, like.numbers, relu, residual is not None, eps=eps)
    plan, make = plans.forward(problem), _allocator(x)
    run, results = _runner(plan), Results(4, layout.kept_shape[0], plan)

    def call(
        x: Array, gamma: Array | None, beta: Array | None, residual: Array | None, out: Array | None
    ) -> tuple[Array, Saved] | None:
        y = make() if out is None else out
        at = like.addresses(x, residual, y, gamma, beta)
        if at is None or (out is not None and not like.apart(2, at)):
            return None
        (count, m2, mean, rstd), start, partials, counters = results()
        run(at[0], at[2], at[1], 0, 0, 0, 0, at[3], at[4], 0, 0, 0, 0, 0, 0, 0, start, partials, counters)
        return y, Saved(
            x, y if relu else None, gamma, None, Moments(count, mean, m2), mean, rstd, count,
            channel_axis, activation, residual is not None, False,
        )  # fmt: skip

    return call


def backward_again(layout: Layout, saved: Saved, dy: Array, out: Array | None) -> Call | None:
    """``call(dy, saved, out)`` does what `batch_norm_backward` does, without dmean and dvar."""
    x, has_residual, frozen = saved.x, saved.has_residual, saved.moments is None
    if saved.weight is not None:
        return None
    dx = empty_like(x) if out is None else out
    dresidual = empty_like(x) if has_residual else None
    numbers = {"gamma": saved.gamma, "mean": saved.mean, "spread": saved.rstd, "count": None if frozen else saved.count}
    like = _Like(layout, {"x": x, "y": saved.y, "dy": dy, "dx": dx, "dresidual": dresidual}, numbers)
    if not like.usable:
        return None
    problem = problem_of(like.folded, None, like.numbers, saved.y is not None, has_residual, frozen=frozen)
    plan, make = plans.backward(problem), _allocator(x)
    run, results = _runner(plan), Results(2, layout.kept_shape[0], plan)

    def call(dy: Array, saved: Saved, out: Array | None) -> Gradients | None:
        dx = make() if out is None else out
        dresidual = make() if has_residual else None
        count = None if frozen else saved.count
        at = like.addresses(saved.x, saved.y, dy, dx, dresidual, saved.gamma, saved.mean, saved.rstd, count)
        if at is None or (out is not None and not like.apart(3, at)):
            return None
        (dgamma, dbeta), start, partials, counters = results()
        run(
            at[0], at[1], 0, at[2], at[3], at[4], 0, at[5], 0, at[6], at[7], at[8], 0, 0, 0, 0,
            start, partials, counters,
        )  # fmt: skip
        return Gradients(dx, dgamma, dbeta, dresidual)

    return call


def inference_again(
    layout: Layout, x: Array, mean: Array, var: Array, gamma: Array | None, beta: Array | None, eps: float,
    residual: Array | None, relu: bool, out: Array | None,
) -> Call | None:  # fmt: skip
    """``call(x, mean, var, gamma, beta, residual, out)`` does what `batch_norm_inference` does."""
    y = empty_like(x) if out is None else out
    numbers = {"mean": mean, "spread": var, "gamma": gamma, "beta": beta}
    like = _Like(layout, {"x": x, "residual": residual, "y": y}, numbers)
    if not like.usable:
        return None
    problem = problem_of(like.folded, None, like.numbers, relu, residual is not None, eps=eps, spread_is_variance=True)
    run, make = _runner(plans.normalize(problem)), _allocator(x)

    def call(
        x: Array, mean: Array, var: Array, gamma: Array | None, beta: Array | None, residual: Array | None,
        out: Array | None,
    ) -> Array | None:  # fmt: skip
        y = make() if out is None else out
        at = like.addresses(x, residual, y, mean, var, gamma, beta)
        if at is None or (out is not None and not like.apart(2, at)):
            return None
        run(at[0], at[2], at[1], 0, 0, 0, 0, at[5], at[6], at[3], at[4], 0, 0, 0, 0, 0, 0, 0, 0)
        return y

    return call
