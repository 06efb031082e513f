"""Prepared calls of the kernels: what `fastbn.call` keeps.

Each function checks the arguments of a call, chooses how arrays become what kernels take (`operands`), asks the backend
for kernels, and returns a function of the arrays alone, which allocates results and runs these. What is left to look at
in each call is whether `out` overlaps an input, and the values of weights.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import partial
from numbers import Real
from typing import Any

from fastbn import validation
from fastbn.arrays import device_of, one_kind
from fastbn.backend import Backend, backend_of
from fastbn.formulas import batch_rstd, reciprocal_std
from fastbn.layout import Layout, Shape, layout_of
from fastbn.merging import Moments, merge, update_running
from fastbn.operands import Affine, Numbers
from fastbn.pieces import kernels_for
from fastbn.saved import Gradients, Saved
from fastbn.ways import Way, Ways, arriving

Call = Callable[..., Any]
# Where results are among what kernels take: y of `forward`, y of `normalize`, dx and dresidual.
Y, NORMALIZED, DX, DRESIDUAL, DX_ALONE = 5, 2, 10, 11, 12
new: Any = tuple.__new__  # of named tuples: their own takes twice as long, 0.4 us of a call


def batch_norm(
    x: Any, gamma: Any, beta: Any, where: Any, weights: Any, residual: Any, out: Any, gather: Any, running: Any,
    channel_axis: Any, eps: Any, activation: Any,
) -> Call:  # fmt: skip
    """``call(x, gamma, beta, where, weights, residual, out, gather, running, rate, correction)``."""
    with device_of(x):
        optional = {"gamma": gamma, "beta": beta, "where": where, "weights": weights, "residual": residual, "out": out}
        kind = one_kind({"x": x}, **optional, **validation.pair("running", running))
        backend = backend_of(kind)
        plain = validation.plainer(x)
        x = validation.data("x", x)
        layout = validation.layout_for(x, channel_axis)
        eps, relu = validation.epsilon(eps), validation.is_relu(activation)
        axes, activation = validation.static_axes(channel_axis), "relu" if relu else None
        ways = Ways(backend, layout, x)
        gamma_type, to_gamma = ways.parameter("gamma", gamma)
        beta_type, to_beta = ways.parameter("beta", beta)
        residual = validation.like("residual", residual, x)
        out, gather = validation.output("out", out, x), validation.hook(gather)
        by_kernels = running is not None and ways.updated(running) and gather is None
        weight_, weigh = ways.weight(where, weights)
        kernels, ways = kernels_for(ways, weight_, [x, residual], [out])
        make = backend.allocator(x)
        (x_, to_x), (residual_, to_residual) = ways.data(x), ways.optional(residual)
        y_, to_y = ways.result(x, out)
        if gather is None:
            types = (running[0].dtype, running[1].dtype) if by_kernels else None
            run = kernels.forward(x_, weight_, y_, residual_, gamma_type, beta_type, eps, relu, types)
        else:
            float64 = backend.xp.dtype(float)
            parameters = Affine(float64, float64, gamma_type, beta_type)
            moments, apply = kernels.moments(x_, weight_), kernels.normalize(x_, y_, residual_, parameters, None, relu)
            run = _over_ranks(backend, layout, moments, apply, eps)
    shaped, arrive = ways.shaped(), arriving(to_x, None, to_gamma, to_beta, to_residual, to_y)
    has_residual, gathered, check_running = residual is not None, gather is not None, _running_check(backend)

    def call(
        x: Any, gamma: Any, beta: Any, where: Any, weights: Any, residual: Any, out: Any, gather: Any, running: Any,
        rate: Any, correction: Any,
    ) -> tuple[Any, Saved]:  # fmt: skip
        if running is not None:
            rate, correction = check_running(running, rate, correction, x, gamma, beta, where, weights, residual, out)
        if plain is not None:
            x = plain(x)
        if out is None:
            y, kept_x = make(x), x
        else:
            y, kept_x = out, None if backend.overlap(out, x) else x
            if ways.askew(out, x, residual, gamma, beta, where, weights):
                alone = x, gamma, beta, where, weights, residual, None, gather, running
                result, saved = batch_norm(*alone, axes, eps, activation)(*alone, rate, correction)
                out[...] = result
                return out, saved._replace(x=kept_x, y=out if relu else None)
        weight, w = (None, None) if weigh is None else weigh(where, weights)
        if weight is not None and out is not None and backend.overlap(out, weight):
            weight = weight.copy()  # for the backward pass: y is going to be there
        given = x, w, gamma, beta, residual, y
        if arrive is not None:
            given = arrive(*given)
        if by_kernels:
            count, mean, m2, rstd = run(*given, *running, rate, correction)
        else:
            count, mean, m2, rstd = run(*given, gather) if gathered else run(*given)
        if given[Y] is not y:
            layout.unfold(given[Y], y)
        if shaped is not None:
            count, mean, m2, rstd = shaped(count), shaped(mean), shaped(m2), shaped(rstd)
        moments = new(Moments, (count, mean, m2))
        if running is not None and not by_kernels:
            update_running(running[0], running[1], moments, rate=rate, correction=correction, out=running)
        made = (
            kept_x, y if relu else None, gamma, weight, moments, mean, rstd, count, axes, activation, has_residual,
            gathered,
        )  # fmt: skip
        return y, new(Saved, made)

    return backend.on_its_device(call, x)


def _running_check(backend: Backend) -> Call:
    """``check(running, rate, correction, *others)`` gives the two numbers.

    It raises where running statistics share memory with each other or with others.
    """
    apart, overlap = backend.apart, backend.overlap
    names = "running[1]", "x", "gamma", "beta", "where", "weights", "residual", "out"

    def check(running: tuple[Any, Any], rate: Any, correction: Any, *others: Any) -> tuple[float, float]:
        mean, var = running
        if type(rate) is not float or not 0.0 <= rate <= 1.0:
            rate = validation.rate(rate)
        if type(correction) is not float:
            correction = validation.real("correction", correction)
        for a in others:  # which `apart` does not count
            if a is mean or a is var:
                break
        else:
            if mean is not var and apart(mean, var, *others) and apart(var, *others):
                return rate, correction
        for one, array in (("running[0]", mean), ("running[1]", var)):
            for name, other in zip(names, (var, *others), strict=True):
                if name != one and other is not None and overlap(array, other):
                    raise ValueError(f"{one}: expected memory of its own, which is updated, got some of {name}'s")
        return rate, correction

    return check


def _over_ranks(backend: Backend, layout: Layout, moments: Call, normalize: Call, eps: float) -> Call:
    """The forward pass with the statistics of all ranks, merged in rank order."""
    xp = backend.xp

    def run(x: Any, w: Any, gamma: Any, beta: Any, residual: Any, y: Any, gather: Any) -> tuple[Any, ...]:
        local = [layout.kept_array(xp, vector) for vector in moments(x, w)[:3]]
        packed = xp.concatenate([a.ravel() for a in local])
        rows = validation.gathered(xp, gather(packed), packed.size)
        count, mean, m2 = merge(*(Moments(*(a.reshape(layout.kept_shape) for a in row.reshape(3, -1))) for row in rows))
        rstd = batch_rstd(count, m2, eps)
        count, mean, m2, rstd = (layout.vector(xp, a) for a in (count, mean, m2, rstd))
        normalize(x, residual, y, mean, rstd, gamma, beta)
        return count, mean, m2, rstd

    return run


def batch_norm_backward(dy: Any, saved: Any, dmean: Any, dvar: Any, out: Any, gather: Any) -> Call:
    """``call(dy, saved, dmean, dvar, out, gather)``."""
    gather = validation.hook(gather)
    _check_saved(saved, gather)
    x, frozen, relu = saved.x, saved.moments is None, saved.activation is not None
    with device_of(dy):
        backend = backend_of(_kind_of_backward(dy, saved, dmean, dvar, out))
        layout = validation.layout_for(x, saved.channel_axis)
        plain = validation.plainer(x)
        x, dy = validation.plain(x), validation.like("dy", dy, x)
        y = validation.like("saved.y", saved.y, x, "saved.x") if relu else None
        out = validation.output("out", out, x)
        if frozen and not (dmean is None and dvar is None):
            raise ValueError("dmean, dvar: expected None with frozen statistics, which do not depend on x")
        ways = Ways(backend, layout, x)
        dmean_type, to_dmean = ways.parameter("dmean", dmean)
        dvar_type, to_dvar = ways.parameter("dvar", dvar)
        gamma_type, to_gamma = ways.parameter("saved.gamma", saved.gamma)
        (mean_type, to_mean), (rstd_type, to_rstd) = ways.vector(saved.mean), ways.vector(saved.rstd)
        count_type, to_count = ways.vector(None if frozen else saved.count)
        weight_, to_weight = ways.combined_weight(saved.weight)
        make, has_residual = backend.allocator(x), saved.has_residual
        kernels, ways = kernels_for(ways, weight_, [x, dy, y], [out])
        (x_, to_x), (dy_, to_dy), (y_, to_y) = ways.data(x), ways.data(dy), ways.optional(y)
        dx_, to_dx = ways.result(x, out)
        residual_, to_residual = ways.result(x, None) if has_residual else (None, None)
        numbers = Numbers(mean_type, rstd_type, gamma_type, count_type, dmean_type, dvar_type)
        if gather is None:
            run = kernels.backward(dy_, x_, y_, weight_, numbers, frozen, dx_, residual_)
        else:
            sums = (backend.xp.dtype(float),) * 2
            run = _summed_over_ranks(
                backend, layout, kernels.grad_sums(dy_, x_, y_, weight_, mean_type, rstd_type),
                kernels.grad_input(dy_, x_, y_, weight_, numbers, sums, dx_, residual_),
            )  # fmt: skip
    shaped, gathered = ways.shaped(), gather is not None
    arrive = arriving(
        to_dy, to_x, to_y, to_weight, to_mean, to_rstd, to_gamma, to_count, to_dmean, to_dvar, to_dx, to_residual
    )

    def call(dy: Any, saved: Saved, dmean: Any, dvar: Any, out: Any, gather: Any) -> Gradients:
        x, y, gamma, weight, _, mean, rstd, count, *_ = saved
        if plain is not None:
            x = plain(x)
        gradients: Gradients
        if out is None:
            dx = make(x)
        elif ways.askew(out, dy, x, y, gamma, weight, mean, rstd, count, dmean, dvar):
            apart = batch_norm_backward(dy, saved, dmean, dvar, None, gather)
            gradients = apart(dy, saved, dmean, dvar, None, gather)
            out[...] = gradients.x
            return gradients._replace(x=out)
        else:
            dx = out
        dresidual = make(x) if has_residual else None
        y, count = y if relu else None, None if frozen else count
        given = dy, x, y, weight, mean, rstd, gamma, count, dmean, dvar, dx, dresidual
        if arrive is not None:
            given = arrive(*given)
        dgamma, dbeta = run(*given, gather) if gathered else run(*given)
        if given[DX] is not dx:
            layout.unfold(given[DX], dx)
        if given[DRESIDUAL] is not dresidual:
            layout.unfold(given[DRESIDUAL], dresidual)
        if shaped is not None:
            dgamma, dbeta = shaped(dgamma), shaped(dbeta)
        gradients = new(Gradients, (dx, dgamma, dbeta, dresidual))
        return gradients

    return backend.on_its_device(call, x)


def _check_saved(saved: Any, gather: Any) -> None:
    if not isinstance(saved, Saved):
        raise TypeError(f"saved: expected a fastbn.Saved, got {type(saved).__name__}")
    if saved.x is None:
        raise ValueError(
            "saved: expected the input x, but out overwrote it in the forward pass; give it an out of its own"
        )
    if (gather is not None) != saved.gathered:
        came, went = ("a hook", "without one") if gather is not None else ("None", "with one")
        raise ValueError(f"gather: expected what the forward pass had, which ran {went}, got {came}")


def _kind_of_backward(dy: Any, saved: Saved, dmean: Any, dvar: Any, out: Any) -> str:
    """The kind of all arrays."""
    required = {"dy": dy, "saved.x": saved.x, "saved.mean": saved.mean, "saved.rstd": saved.rstd}
    if saved.moments is not None:
        required["saved.count"] = saved.count
    others = {f"saved.{name}": getattr(saved, name) for name in ("y", "gamma", "weight")}
    return one_kind(required, dmean=dmean, dvar=dvar, out=out, **others)


def _summed_over_ranks(backend: Backend, layout: Layout, grad_sums: Call, grad_input: Call) -> Call:
    """The backward pass with the sums of all ranks; it returns this rank's."""
    xp = backend.xp

    def run(
        dy: Any, x: Any, y: Any, w: Any, mean: Any, rstd: Any, gamma: Any, count: Any, dmean: Any, dvar: Any,
        dx: Any, dresidual: Any, gather: Any,
    ) -> tuple[Any, Any]:  # fmt: skip
        dgamma, dbeta = grad_sums(dy, x, y, w, mean, rstd)
        local = xp.concatenate([layout.kept_array(xp, v).ravel() for v in (dgamma, dbeta)])
        summed = validation.gathered(xp, gather(local), local.size).sum(axis=0).reshape(2, *layout.kept_shape)
        sums = (layout.vector(xp, a) for a in summed)
        grad_input(dy, x, y, w, mean, rstd, gamma, count, dmean, dvar, *sums, dx, dresidual)
        return dgamma, dbeta

    return run


def normalize(
    x: Any, mean: Any, spread: Any, gamma: Any, beta: Any, residual: Any, out: Any,
    channel_axis: Any, eps: Any, activation: Any, name: str,
) -> Call:  # fmt: skip
    """``call(x, mean, spread, gamma, beta, residual, out)``; spread, so named, is the variance, or without eps rstd."""
    with device_of(x):
        given = {"x": x, "mean": mean, name: spread}
        backend = backend_of(one_kind(given, gamma=gamma, beta=beta, residual=residual, out=out))
        plain = validation.plainer(x)
        x = validation.data("x", x)
        layout = validation.layout_for(x, channel_axis)
        eps = None if eps is None else validation.epsilon(eps)
        ways = Ways(backend, layout, x)
        spread_type, to_spread = ways.parameter(name, spread)
        axes, relu = validation.static_axes(channel_axis), validation.is_relu(activation)
        mean_type, to_mean = ways.parameter("mean", mean)
        gamma_type, to_gamma = ways.parameter("gamma", gamma)
        beta_type, to_beta = ways.parameter("beta", beta)
        residual, out = validation.like("residual", residual, x), validation.output("out", out, x)
        kernels, ways = kernels_for(ways, None, [x, residual], [out])
        make = backend.allocator(x)
        (x_, to_x), (residual_, to_residual) = ways.data(x), ways.optional(residual)
        y_, to_y = ways.result(x, out)
        parameters = Affine(mean_type, spread_type, gamma_type, beta_type)
        run = kernels.normalize(x_, y_, residual_, parameters, eps, relu)
    arrive = arriving(to_x, to_residual, to_y, to_mean, to_spread, to_gamma, to_beta)

    def call(x: Any, mean: Any, spread: Any, gamma: Any, beta: Any, residual: Any, out: Any) -> Any:
        if plain is not None:
            x = plain(x)
        if out is None:
            y = make(x)
        elif ways.askew(out, x, residual, mean, spread, gamma, beta):
            apart = normalize(x, mean, spread, gamma, beta, residual, None, axes, eps, activation, name)
            out[...] = apart(x, mean, spread, gamma, beta, residual, None)
            return out
        else:
            y = out
        given = x, residual, y, mean, spread, gamma, beta
        if arrive is not None:
            given = arrive(*given)
        run(*given)
        if given[NORMALIZED] is not y:
            layout.unfold(given[NORMALIZED], y)
        return y

    return backend.on_its_device(call, x)


def grad_sums(dy: Any, x: Any, mean: Any, rstd: Any, where: Any, weights: Any, channel_axis: Any) -> Call:
    """``call(dy, x, mean, rstd, where, weights)``."""
    with device_of(dy):
        backend = backend_of(one_kind({"dy": dy, "x": x, "mean": mean, "rstd": rstd}, where=where, weights=weights))
        x = validation.data("x", x)
        layout = validation.layout_for(x, channel_axis)
        dy = validation.like("dy", dy, x)
        ways = Ways(backend, layout, x)
        mean_type, to_mean = ways.parameter("mean", mean)
        rstd_type, to_rstd = ways.parameter("rstd", rstd)
        weight_, weigh = ways.weight(where, weights)
        kernels, ways = kernels_for(ways, weight_, [x, dy], [])
        (dy_, to_dy), (x_, to_x) = ways.data(dy), ways.data(x)
        run = kernels.grad_sums(dy_, x_, None, weight_, mean_type, rstd_type)
    shaped, arrive = ways.shaped(), arriving(to_dy, to_x, None, None, to_mean, to_rstd)

    def call(dy: Any, x: Any, mean: Any, rstd: Any, where: Any, weights: Any) -> tuple[Any, Any]:
        given = dy, x, None, None if weigh is None else weigh(where, weights)[1], mean, rstd
        if arrive is not None:
            given = arrive(*given)
        dgamma, dbeta = run(*given)
        return (dgamma, dbeta) if shaped is None else (shaped(dgamma), shaped(dbeta))

    return backend.on_its_device(call, x)


def grad_input(
    dy: Any, x: Any, mean: Any, rstd: Any, gamma: Any, dgamma: Any, dbeta: Any, count: Any, where: Any, weights: Any,
    out: Any, channel_axis: Any,
) -> Call:  # fmt: skip
    """``call(dy, x, mean, rstd, gamma, dgamma, dbeta, count, where, weights, out)``."""
    with device_of(dy):
        required = {"dy": dy, "x": x, "mean": mean, "rstd": rstd, "dgamma": dgamma, "dbeta": dbeta}
        if not isinstance(count, Real):
            required["count"] = count
        backend = backend_of(one_kind(required, gamma=gamma, where=where, weights=weights, out=out))
        xp = backend.xp
        plain = validation.plainer(x)
        x = validation.data("x", x)
        layout = validation.layout_for(x, channel_axis)
        dy, out = validation.like("dy", dy, x), validation.output("out", out, x)
        ways, float64, axes = Ways(backend, layout, x), xp.dtype(float), validation.static_axes(channel_axis)
        (mean_type, to_mean), (rstd_type, to_rstd) = ways.parameter("mean", mean), ways.parameter("rstd", rstd)
        gamma_type, to_gamma = ways.parameter("gamma", gamma)
        dgamma_type, to_dgamma = ways.parameter("dgamma", dgamma)
        dbeta_type, to_dbeta = ways.parameter("dbeta", dbeta)
        to_count: Way
        constant = isinstance(count, Real)
        if isinstance(count, Real):
            count_type, to_count = float64, partial(_filled, xp, layout.folded[0] * layout.folded[2])
        else:
            count_type, to_count = ways.parameter("count", count)
        weight_, weigh = ways.weight(where, weights)
        kernels, ways = kernels_for(ways, weight_, [x, dy], [out])
        make = backend.allocator(x)
        (dy_, to_dy), (x_, to_x) = ways.data(dy), ways.data(x)
        dx_, to_dx = ways.result(x, out)
        numbers = Numbers(mean_type, rstd_type, gamma_type, count_type)
        run = kernels.grad_input(dy_, x_, None, weight_, numbers, (dgamma_type, dbeta_type), dx_, None)
    arrive = arriving(
        to_dy, to_x, None, None, to_mean, to_rstd, to_gamma, to_count, None, None, to_dgamma, to_dbeta, to_dx, None
    )

    def call(
        dy: Any, x: Any, mean: Any, rstd: Any, gamma: Any, dgamma: Any, dbeta: Any, count: Any, where: Any,
        weights: Any, out: Any,
    ) -> Any:  # fmt: skip
        if plain is not None:
            x = plain(x)
        if out is None:
            dx = make(x)
        elif ways.askew(out, dy, x, mean, rstd, gamma, dgamma, dbeta, None if constant else count, where, weights):
            without = dy, x, mean, rstd, gamma, dgamma, dbeta, count, where, weights, None
            out[...] = grad_input(*without, axes)(*without)
            return out
        else:
            dx = out
        weight = None if weigh is None else weigh(where, weights)[1]
        given = dy, x, None, weight, mean, rstd, gamma, count, None, None, dgamma, dbeta, dx, None
        if arrive is not None:
            given = arrive(*given)
        run(*given)
        if given[DX_ALONE] is not dx:
            layout.unfold(given[DX_ALONE], dx)
        return dx

    return backend.on_its_device(call, x)


def _filled(xp: Any, kept: int, number: Real) -> Any:
    """A number for every kept index."""
    return xp.full(kept, float(number))


def fold(
    kernel: Any, kernel_bias: Any, mean: Any, var: Any, gamma: Any, beta: Any, eps: Any, axis: Any, groups: Any
) -> Call:
    """``call(kernel, kernel_bias, mean, var, gamma, beta)``."""
    with device_of(kernel):
        kind = one_kind({"kernel": kernel, "mean": mean, "var": var}, kernel_bias=kernel_bias, gamma=gamma, beta=beta)
        backend = backend_of(kind)
        kernel = validation.data("kernel", kernel)
        axes = validation.channel_axes(kernel.ndim, axis, "axis")
        if len(axes) != 1:
            raise TypeError(f"axis: expected an int, got {axis!r}")
        (axis,) = axes
        groups = _checked_groups(groups, kernel.shape, axis)
        eps = validation.epsilon(eps)
        layout = layout_of((groups * kernel.shape[axis],), (1,), frozenset((0,)))  # of the output channels
        given = {"kernel_bias": kernel_bias, "beta": beta, "mean": mean, "var": var, "gamma": gamma}
        for name, parameter in given.items():
            if parameter is not None:
                validation.parameter(name, parameter, layout)
    xp, dtype, inputs, inner = backend.xp, kernel.dtype, kernel.shape[axis - 1], (1,) * (kernel.ndim - 1 - axis)

    def call(kernel: Any, kernel_bias: Any, mean: Any, var: Any, gamma: Any, beta: Any) -> tuple[Any, Any]:
        scale = reciprocal_std(layout.vector(xp, var), eps)
        if gamma is not None:
            scale = scale * layout.vector(xp, gamma)
        bias = (0.0 if kernel_bias is None else layout.vector(xp, kernel_bias)) - layout.vector(xp, mean)
        bias = bias * scale
        if beta is not None:
            bias = bias + layout.vector(xp, beta)
        spread = scale
        if groups > 1:  # of each input channel and each output channel of its group
            spread = xp.repeat(scale.reshape(groups, -1), inputs // groups, axis=0)
        folded = kernel.astype(xp.float64) * spread.reshape(spread.shape + inner)
        return folded.astype(dtype, copy=False), bias.astype(dtype, copy=False)

    return backend.on_its_device(call, kernel)


def _checked_groups(groups: Any, shape: Shape, axis: int) -> int:
    """How many groups the axis before ``axis`` has; 1 on axis 0, where output channels are those of all groups."""
    try:
        number = operator.index(groups)
    except TypeError:
        raise TypeError(f"groups: expected an int, got {type(groups).__name__}") from None
    divided = max(axis - 1, 0)
    if number < 1 or shape[divided] % number:
        raise ValueError(
            f"groups: expected a divisor of kernel.shape[{divided}], which is {shape[divided]}, got {groups}"
        )
    return number if axis else 1
