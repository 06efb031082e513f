"""The short way of `repeated`: a plan made before, and what is left to do for arrays like those it was made for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastbn.cuda import launch, plans
from fastbn.cuda.memory import Array, empty_like, extent, overlap, problem_of, results_of
from fastbn.layout import Layout
from fastbn.merging import Moments
from fastbn.saved import Gradients, Saved

cupy = launch.cupy

Call = Callable[..., Any]


class _Like:
    """Arrays like those of an earlier call, in what its key does not say: device, alignment, gaps between numbers."""

    def __init__(self, layout: Layout, data: dict[str, Array | None], numbers: dict[str, Array | None]) -> None:
        """`usable` tells whether there is a short way at all: kernels see the arrays as they lie, nothing is copied."""
        first: Array = next(iter(data.values()))
        present = [a for a in data.values() if a is not None]
        self.device = first.data.device_id
        self.offs = [0 if a is None else a.data.ptr % 16 for a in data.values()]
        self.numbers = {name: None if a is None else a.reshape(-1) for name, a in numbers.items()}
        self.steps = [None if a is None else a.strides for a in self.numbers.values()]
        self.usable = (
            len(layout.kept_shape) == 1
            and first.size > 0
            and all(
                a is None or (a.shape == layout.kept_shape and a.strides[0] == a.itemsize) for a in numbers.values()
            )
        )
        self.extents = [(0, 0) if a is None else extent(a) for a in (*data.values(), *numbers.values())]
        self.folded = {name: None if a is None else layout.fold(a) for name, a in data.items()}
        self.usable = self.usable and all(
            overlap(a, whole)
            for a, whole in zip((a for a in self.folded.values() if a is not None), present, strict=True)
        )

    def fits(self, data: tuple[Array | None, ...], numbers: tuple[Array | None, ...]) -> bool:
        device = self.device
        for a, off in zip(data, self.offs, strict=True):
            if a is not None:
                memory = a.data
                if memory.ptr % 16 != off or memory.device_id != device:
                    return False
        for a, step in zip(numbers, self.steps, strict=True):
            if a is not None and (a.strides != step or a.data.device_id != device):
                return False
        return bool(launch.current_device() == device)

    def apart(self, out: Array, which: int, *arrays: Array | None) -> bool:
        """Whether an output, the one of this number among all, shares no memory with the others."""
        low, high = self.extents[which]
        start = out.data.ptr
        low, high = start + low, start + high
        for i, (a, (first, end)) in enumerate(zip(arrays, self.extents, strict=True)):
            if i != which and a is not None and a.data.ptr + first < high and low < a.data.ptr + end:
                return False
        return True


def _allocator(x: Array) -> Callable[[], Array]:
    """Makes arrays like x: the constructor takes half the time of empty_like."""
    if x.flags.c_contiguous:
        ndarray, shape, dtype = cupy.ndarray, x.shape, x.dtype
        return lambda: ndarray(shape, dtype)
    return lambda: empty_like(x)


def _address(a: Array | None) -> int:
    return 0 if a is None else a.data.ptr


def forward_again(
    layout: Layout, saved: Saved, x: Array, beta: Array | None, eps: float, residual: Array | None, out: Array | None
) -> Call | None:
    """``call(x, gamma, beta, residual, out)`` does what `batch_norm` does."""
    y = empty_like(x) if out is None else out
    like = _Like(layout, {"x": x, "y": y, "residual": residual}, {"gamma": saved.gamma, "beta": beta})
    if not like.usable:
        return None
    relu, channel_axis, activation = saved.activation is not None, saved.channel_axis, saved.activation
    problem = problem_of(like.folded, None, like.numbers, relu, residual is not None, eps=eps)
    plan, channels, make = plans.forward(problem), layout.kept_shape[0], _allocator(x)

    def call(
        x: Array, gamma: Array | None, beta: Array | None, residual: Array | None, out: Array | None
    ) -> tuple[Array, Saved] | None:
        if out is not None and not like.apart(out, 1, x, out, residual, gamma, beta):
            return None
        y = make() if out is None else out
        if not like.fits((x, y, residual), (gamma, beta)):
            return None
        (count, m2, mean, rstd), scratch = results_of(4, channels, plan)
        plan.run(
            (
                x.data.ptr, y.data.ptr, _address(residual), 0, 0, 0, 0, _address(gamma), _address(beta),
                0, 0, 0, 0, 0, 0, 0, *scratch,
            )
        )  # fmt: skip
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
    like = _Like(
        layout,
        {"x": x, "y": saved.y, "dy": dy, "dx": dx, "dresidual": dresidual},
        {"gamma": saved.gamma, "mean": saved.mean, "spread": saved.rstd, "count": None if frozen else saved.count},
    )
    if not like.usable:
        return None
    problem = problem_of(like.folded, None, like.numbers, saved.y is not None, has_residual, frozen=frozen)
    plan, channels, make = plans.backward(problem), layout.kept_shape[0], _allocator(x)

    def call(dy: Array, saved: Saved, out: Array | None) -> Gradients | None:
        x, y, gamma, mean, rstd, count = saved.x, saved.y, saved.gamma, saved.mean, saved.rstd, saved.count
        if out is not None and not like.apart(out, 3, x, y, dy, out, None, gamma, mean, rstd, count):
            return None
        dx = make() if out is None else out
        dresidual = make() if has_residual else None
        if not like.fits((x, y, dy, dx, dresidual), (gamma, mean, rstd, None if frozen else count)):
            return None
        (dgamma, dbeta), scratch = results_of(2, channels, plan)
        plan.run(
            (
                x.data.ptr, _address(y), 0, dy.data.ptr, dx.data.ptr, _address(dresidual), 0, _address(gamma), 0,
                mean.data.ptr, rstd.data.ptr, 0 if frozen else count.data.ptr, 0, 0, 0, 0, *scratch,
            )
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
    like = _Like(layout, {"x": x, "y": y, "residual": residual}, numbers)
    if not like.usable:
        return None
    problem = problem_of(like.folded, None, like.numbers, relu, residual is not None, eps=eps, spread_is_variance=True)
    plan, make = plans.normalize(problem), _allocator(x)

    def call(
        x: Array, mean: Array, var: Array, gamma: Array | None, beta: Array | None, residual: Array | None,
        out: Array | None,
    ) -> Array | None:  # fmt: skip
        if out is not None and not like.apart(out, 1, x, out, residual, mean, var, gamma, beta):
            return None
        y = make() if out is None else out
        if not like.fits((x, y, residual), (mean, var, gamma, beta)):
            return None
        plan.run(
            (
                x.data.ptr, y.data.ptr, _address(residual), 0, 0, 0, 0, _address(gamma), _address(beta),
                mean.data.ptr, var.data.ptr, 0, 0, 0, 0, 0, 0, 0, 0,
            )
        )  # fmt: skip
        return y

    return call
