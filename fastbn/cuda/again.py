"""The short way of `repeated`: a plan made before, and what is left to do for arrays like those it was made for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastbn.arguments import is_float
from fastbn.cuda import launch, plans
from fastbn.cuda.memory import Array, Results, extent, folded_view, problem_of
from fastbn.layout import Layout
from fastbn.merging import Moments
from fastbn.saved import Gradients, Saved

cupy = launch.cupy

Call = Callable[..., Any]


class _Like:
    """Arrays like those of an earlier call, in what its key does not say: device, alignment, gaps between numbers."""

    def __init__(self, data: tuple[Array | None, ...], numbers: tuple[Array | None, ...]) -> None:
        arrays = data + numbers
        self.device = next(a.data.device_id for a in arrays if a is not None)
        self.offs = [0 if a is None else a.data.ptr % 16 for a in arrays]
        self.steps = [None] * len(data) + [() if a is None else a.strides for a in numbers]
        self.extents = [(0, 0) if a is None else extent(a) for a in arrays]

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


Arrays = dict[str, Array | None]


def _seen_by_kernels(layout: Layout, data: Arrays, numbers: Arrays) -> tuple[Arrays, Arrays] | None:
    """The arrays of a call as its kernels take them; None where something has to be copied, or channels are on several
    axes: such calls go the documented way.
    """
    if len(layout.kept_shape) != 1 or 0 in layout.folded:
        return None
    folded = {name: None if a is None else folded_view(layout, a) for name, a in data.items()}
    viewed = all((folded[name] is None) == (a is None) for name, a in data.items())
    plain = all(
        a is None or (is_float(a.dtype) and a.shape == layout.kept_shape and a.strides[0] == a.itemsize)
        for a in numbers.values()
    )
    return (folded, numbers) if viewed and plain else None


def _allocator(x: Array) -> Callable[[], Array]:
    """Makes arrays like x, a result in its order; of x nothing is kept."""
    ndarray, shape, dtype, strides, nbytes, alloc = cupy.ndarray, x.shape, x.dtype, x.strides, x.nbytes, cupy.cuda.alloc
    if x.flags.c_contiguous:
        return lambda: ndarray(shape, dtype)
    return lambda: ndarray(shape, dtype, alloc(nbytes), strides)


def _runner(plan: plans.Plan) -> Callable[..., None]:
    """What launches a plan: its only launch itself, where nothing else is to do."""
    return plan.run if plan.counters or len(plan.launches) > 1 else plan.launches[0]


def forward_again(
    layout: Layout, saved: Saved, x: Array, y: Array, beta: Array | None, eps: float, residual: Array | None,
    out: Array | None,
) -> Call | None:  # fmt: skip
    """``call(x, gamma, beta, residual, out)`` does what `batch_norm` does."""
    numbers = {"gamma": saved.gamma, "beta": beta}
    seen = _seen_by_kernels(layout, {"x": x, "residual": residual, "y": y}, numbers)
    if seen is None:
        return None
    relu, channel_axis, activation = saved.activation is not None, saved.channel_axis, saved.activation
    plan = plans.forward(problem_of(seen[0], None, seen[1], relu, residual is not None, eps=eps))
    like = _Like((x, residual, y), (saved.gamma, beta))
    run, results, make = _runner(plan), Results(4, layout.kept_shape[0], plan), _allocator(y)

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


def backward_again(layout: Layout, saved: Saved, dy: Array, gradients: Gradients, out: Array | None) -> Call | None:
    """``call(dy, saved, out)`` does what `batch_norm_backward` does, without dmean and dvar."""
    x, y, dx, dresidual, has_residual = saved.x, saved.y, gradients.x, gradients.residual, saved.has_residual
    frozen = saved.moments is None
    data = {"x": x, "y": y, "dy": dy, "dx": dx, "dresidual": dresidual}
    numbers = {"gamma": saved.gamma, "mean": saved.mean, "spread": saved.rstd, "count": None if frozen else saved.count}
    seen = None if saved.weight is not None else _seen_by_kernels(layout, data, numbers)
    if seen is None:
        return None
    plan = plans.backward(problem_of(seen[0], None, seen[1], y is not None, has_residual, frozen=frozen))
    like = _Like(tuple(data.values()), tuple(numbers.values()))
    run, results = _runner(plan), Results(2, layout.kept_shape[0], plan)
    make, make_residual = _allocator(dx), None if dresidual is None else _allocator(dresidual)

    def call(dy: Array, saved: Saved, out: Array | None) -> Gradients | None:
        dx = make() if out is None else out
        dresidual = None if make_residual is None else make_residual()
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
    layout: Layout, x: Array, y: Array, mean: Array, var: Array, gamma: Array | None, beta: Array | None, eps: float,
    residual: Array | None, relu: bool, out: Array | None,
) -> Call | None:  # fmt: skip
    """``call(x, mean, var, gamma, beta, residual, out)`` does what `batch_norm_inference` does."""
    numbers = {"mean": mean, "spread": var, "gamma": gamma, "beta": beta}
    seen = _seen_by_kernels(layout, {"x": x, "residual": residual, "y": y}, numbers)
    if seen is None:
        return None
    problem = problem_of(seen[0], None, seen[1], relu, residual is not None, eps=eps, spread_is_variance=True)
    like = _Like((x, residual, y), (mean, var, gamma, beta))
    run, make = _runner(plans.normalize(problem)), _allocator(y)

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


def moments_again(layout: Layout, x: Array) -> None:
    """Statistics of CuPy arrays always go the documented way."""
