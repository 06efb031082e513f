"""Prepared calls of the forward pass and of `normalize`: what `fastbn.call` keeps for them.

As in `fastbn.prepare_gradients`, each function checks the arguments of a call, chooses how arrays become what kernels
take (`fastbn.ways`), asks the backend for kernels, and returns a function of the arrays alone, which allocates results
and runs these. What is left to look at in each call is whether `out` overlaps an input, whether running statistics
share memory with anything, rate and correction, and the values of weights.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from fastbn import validation
from fastbn.arrays import device_of, one_kind
from fastbn.backend import Backend, backend_of
from fastbn.call import Call, Once
from fastbn.formulas import LEAST_EPS, batch_rstd
from fastbn.layout import Layout
from fastbn.merging import Moments, merge, update_running
from fastbn.operands import AffineTypes
from fastbn.pieces import kernels_for
from fastbn.saved import Saved, make_saved, new
from fastbn.ways import Ways


def batch_norm(
    x: Any, gamma: Any, beta: Any, where: Any, weights: Any, residual: Any, out: Any, gather: Any, running: Any,
    channel_axis: Any, eps: Any, activation: Any,
) -> Call:  # fmt: skip
    """``call(x, gamma, beta, where, weights, residual, out, gather, running, rate, correction)``."""
    with device_of(x):
        optional = {"gamma": gamma, "beta": beta, "where": where, "weights": weights, "residual": residual, "out": out}
        backend = backend_of(one_kind({"x": x}, **optional, **validation.pair("running", running)))
        plain = validation.plainer(x)
        x = validation.data("x", x)
        layout = validation.layout_for(x, channel_axis)
        eps, relu = validation.epsilon(eps), validation.is_relu(activation)
        ways = Ways(backend, layout, x)
        gamma_type, to_gamma = ways.parameter("gamma", gamma)
        beta_type, to_beta = ways.parameter("beta", beta)
        residual = validation.like("residual", residual, x)
        out, gather = validation.output("out", out, x), validation.hook(gather)
        updates = running is not None and ways.updated(running) and gather is None
        weight_, weigh = ways.weight(where, weights)
        kernels, ways = kernels_for(ways, weight_, [x, residual], [out])
        (x_, to_x), (residual_, to_residual) = ways.data(x), ways.optional(residual)
        y_, to_y = ways.result(x, out)
        if gather is None:
            types = (running[0].dtype, running[1].dtype) if updates else None
            run = kernels.forward(x_, weight_, y_, residual_, gamma_type, beta_type, eps, relu, types)
        else:
            float64 = backend.xp.dtype(float)
            parameters = AffineTypes(float64, float64, gamma_type, beta_type)
            moments, apply = kernels.moments(x_, weight_), kernels.normalize(x_, y_, residual_, parameters, None, relu)
            run = _over_ranks(backend, layout, moments, apply, eps)
        arriving = {
            "x": to_x, "weight": None, "gamma": to_gamma, "beta": to_beta, "residual": to_residual, "y": to_y,
        }  # fmt: skip
        run = ways.through(run, arriving, results=["y"])
        axes, activation = validation.static_axes(channel_axis), "relu" if relu else None
        # Relu's gradient passes where y > 0, which x tells by the same arithmetic; but not that of tiny eps.
        keeps_y = relu and (residual is not None or eps < LEAST_EPS)
        options = _Options(axes, eps, activation, residual is not None, gather is not None, keeps_y)
        return backend.on_its_device(_forward(ways, run, options, plain, weigh, updates, backend.allocator(x)), x)


class _Options(NamedTuple):
    """Of a forward pass."""

    channel_axis: Any
    eps: float
    activation: str | None
    has_residual: bool
    gathered: bool
    keeps_y: bool
    """For the backward pass."""


def _forward(ways: Ways, run: Call, options: _Options, plain: Any, weigh: Any, updates: bool, make: Call) -> Call:
    """The call of `batch_norm`; ``updates`` says that the kernel does so with running statistics."""
    backend, shaped = ways.backend, ways.shaped()
    axes, eps, activation, has_residual, gathered, keeps_y = options
    keeps_beta = activation is not None and not keeps_y
    check_running, by_itself = _running_check(backend), Once(batch_norm)

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
            if ways.partly_overlaps(out, x, residual, gamma, beta, where, weights):
                alone = x, gamma, beta, where, weights, residual, None, gather, running
                result, saved = by_itself(*alone, axes, eps, activation)(*alone, rate, correction)
                saved = saved._replace(x=kept_x, y=out if keeps_y else None, **_copied(backend, out, saved))
                out[...] = result
                return out, saved
        weight, w = (None, None) if weigh is None else weigh(where, weights)
        if weight is not None and out is not None and backend.overlap(out, weight):
            weight = weight.copy()  # for the backward pass: y is going to be there
        if gathered:
            count, mean, m2, rstd = run(x, w, gamma, beta, residual, y, gather)
        elif updates:
            count, mean, m2, rstd = run(x, w, gamma, beta, residual, y, *running, rate, correction)
        else:
            count, mean, m2, rstd = run(x, w, gamma, beta, residual, y)
        if shaped is not None:
            count, mean, m2, rstd = shaped(count), shaped(mean), shaped(m2), shaped(rstd)
        moments = new(Moments, (count, mean, m2))
        if running is not None and not updates:
            update_running(running[0], running[1], moments, rate=rate, correction=correction, out=running)
        saved = make_saved(
            x=kept_x, y=y if keeps_y else None, gamma=gamma, beta=beta if keeps_beta else None, weight=weight,
            moments=moments, mean=mean, rstd=rstd, channel_axis=axes, activation=activation, has_residual=has_residual,
            gathered=gathered,
        )  # fmt: skip
        return y, saved

    return call


def _copied(backend: Backend, out: Any, saved: Saved) -> dict[str, Any]:
    """Copies of what the backward pass reads of the arguments, where it shares memory with an array to be written."""
    given = {"gamma": saved.gamma, "beta": saved.beta, "weight": saved.weight}
    return {name: a.copy() for name, a in given.items() if a is not None and backend.overlap(out, a)}


def _running_check(backend: Backend) -> Call:
    """``check(running, rate, correction, *others)`` gives the two numbers.

    It raises where running statistics share memory with each other or with others.
    """
    disjoint, overlap = backend.disjoint, backend.overlap
    names = "running[1]", "x", "gamma", "beta", "where", "weights", "residual", "out"

    def check(running: tuple[Any, Any], rate: Any, correction: Any, *others: Any) -> tuple[float, float]:
        mean, var = running
        rate, correction = validation.rate_and_correction(rate, correction)
        for a in others:  # which `disjoint` does not count
            if a is mean or a is var:
                break
        else:
            if mean is not var and disjoint(mean, var, *others) and disjoint(var, *others):
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


def normalize(
    x: Any, mean: Any, spread: Any, gamma: Any, beta: Any, residual: Any, out: Any,
    channel_axis: Any, eps: Any, activation: Any,
) -> Call:  # fmt: skip
    """``call(x, mean, spread, gamma, beta, residual, out)``: the spread is the variance, or without eps rstd."""
    name = "rstd" if eps is None else "var"
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
        (x_, to_x), (residual_, to_residual) = ways.data(x), ways.optional(residual)
        y_, to_y = ways.result(x, out)
        parameters = AffineTypes(mean_type, spread_type, gamma_type, beta_type)
        run = kernels.normalize(x_, y_, residual_, parameters, eps, relu)
        arriving = {
            "x": to_x, "residual": to_residual, "y": to_y, "mean": to_mean, "spread": to_spread, "gamma": to_gamma,
            "beta": to_beta,
        }  # fmt: skip
        run, make, by_itself = ways.through(run, arriving, results=["y"]), backend.allocator(x), Once(normalize)

    def call(x: Any, mean: Any, spread: Any, gamma: Any, beta: Any, residual: Any, out: Any) -> Any:
        if plain is not None:
            x = plain(x)
        if out is None:
            y = make(x)
        elif ways.partly_overlaps(out, x, residual, mean, spread, gamma, beta):
            alone = x, mean, spread, gamma, beta, residual, None
            out[...] = by_itself(*alone, axes, eps, activation)(*alone)
            return out
        else:
            y = out
        run(x, residual, y, mean, spread, gamma, beta)
        return y

    return backend.on_its_device(call, x)
