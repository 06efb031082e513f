"""Prepared calls of gradients: what `fastbn.call` keeps for them (see `fastbn.prepare_forward`)."""

from __future__ import annotations

from functools import partial
from numbers import Real
from typing import Any

from fastbn import validation
from fastbn.arrays import device_of, one_kind
from fastbn.backend import Backend, backend_of
from fastbn.call import Call, Once
from fastbn.layout import Layout
from fastbn.operands import GradientTypes
from fastbn.pieces import kernels_for
from fastbn.saved import Gradients, Saved, new
from fastbn.ways import Way, Ways


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
        recompute = relu and y is None
        if recompute and (frozen or saved.has_residual):
            raise ValueError("saved.y: expected the output, which relu's gradient needs here, got None")
        out = validation.output("out", out, x)
        if frozen and not (dmean is None and dvar is None):
            raise ValueError("dmean, dvar: expected None with frozen statistics, which do not depend on x")
        ways = Ways(backend, layout, x)
        types, to_vectors = _types_of(ways, saved, dmean, dvar)
        weight_, to_weight = ways.combined_weight(saved.weight)
        kernels, ways = kernels_for(ways, weight_, [x, dy, y], [out])
        (x_, to_x), (dy_, to_dy), (y_, to_y) = ways.data(x), ways.data(dy), ways.optional(y)
        dx_, to_dx = ways.result(x, out)
        residual_, to_residual = ways.result(x, None) if saved.has_residual else (None, None)
        if gather is None:
            run = kernels.backward(dy_, x_, y_, weight_, types, recompute, frozen, dx_, residual_)
        else:
            sums = (backend.xp.dtype(float),) * 2
            run = _summed_over_ranks(
                backend, layout, kernels.grad_sums(dy_, x_, y_, weight_, types, recompute),
                kernels.grad_input(dy_, x_, y_, weight_, types, recompute, sums, dx_, residual_),
            )  # fmt: skip
        arriving = {
            "dy": to_dy, "x": to_x, "y": to_y, "weight": to_weight, **to_vectors, "dx": to_dx, "dresidual": to_residual,
        }  # fmt: skip
        run = ways.through(run, arriving, results=["dx", "dresidual"])
        return backend.on_its_device(_backward(ways, run, saved, plain, backend.allocator(x)), x)


def _backward(ways: Ways, run: Call, saved: Saved, plain: Any, make: Call) -> Call:
    """The call of `batch_norm_backward`, with what is like the saved values."""
    shaped, gathered, has_residual = ways.shaped(), saved.gathered, saved.has_residual
    frozen, relu, by_itself = saved.moments is None, saved.activation is not None, Once(batch_norm_backward)

    def call(dy: Any, saved: Saved, dmean: Any, dvar: Any, out: Any, gather: Any) -> Gradients:
        x, y, gamma, beta, weight = saved.x, saved.y, saved.gamma, saved.beta, saved.weight
        mean, rstd, count = saved.mean, saved.rstd, saved.count
        if plain is not None:
            x = plain(x)
        gradients: Gradients
        if out is None:
            dx = make(x)
        elif ways.partly_overlaps(out, dy, x, y, gamma, beta, weight, mean, rstd, count, dmean, dvar):
            alone = dy, saved, dmean, dvar, None, gather
            gradients = by_itself(*alone)(*alone)
            out[...] = gradients.x
            return gradients._replace(x=out)
        else:
            dx = out
        dresidual = make(x) if has_residual else None
        y, count = y if relu else None, None if frozen else count
        if gathered:
            dgamma, dbeta = run(dy, x, y, weight, mean, rstd, gamma, count, beta, dmean, dvar, dx, dresidual, gather)
        else:
            dgamma, dbeta = run(dy, x, y, weight, mean, rstd, gamma, count, beta, dmean, dvar, dx, dresidual)
        if shaped is not None:
            dgamma, dbeta = shaped(dgamma), shaped(dbeta)
        gradients = new(Gradients, (dx, dgamma, dbeta, dresidual))
        return gradients

    return call


def _types_of(ways: Ways, saved: Saved, dmean: Any, dvar: Any) -> tuple[GradientTypes, dict[str, Way]]:
    """Of the vectors of a backward pass, and their ways."""
    found = {
        "mean": ways.vector(saved.mean),
        "rstd": ways.vector(saved.rstd),
        "gamma": ways.parameter("saved.gamma", saved.gamma),
        "count": ways.vector(None if saved.moments is None else saved.count),
        "beta": ways.parameter("saved.beta", saved.beta),
        "dmean": ways.parameter("dmean", dmean),
        "dvar": ways.parameter("dvar", dvar),
    }
    types = GradientTypes(**{name: dtype for name, (dtype, _) in found.items()})
    return types, {name: found[name][1] for name in types._fields}


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
    others = {f"saved.{name}": getattr(saved, name) for name in ("y", "gamma", "beta", "weight")}
    return one_kind(required, dmean=dmean, dvar=dvar, out=out, **others)


def _summed_over_ranks(backend: Backend, layout: Layout, grad_sums: Call, grad_input: Call) -> Call:
    """The backward pass with the sums of all ranks; it returns this rank's."""
    xp = backend.xp

    def run(
        dy: Any, x: Any, y: Any, w: Any, mean: Any, rstd: Any, gamma: Any, count: Any, beta: Any, dmean: Any, dvar: Any,
        dx: Any, dresidual: Any, gather: Any,
    ) -> tuple[Any, Any]:  # fmt: skip
        vectors = mean, rstd, gamma, count, beta, dmean, dvar
        dgamma, dbeta = grad_sums(dy, x, y, w, *vectors)
        local = xp.concatenate([layout.kept_array(xp, v).ravel() for v in (dgamma, dbeta)])
        summed = validation.gathered(xp, gather(local), local.size).sum(axis=0).reshape(2, *layout.kept_shape)
        sums = (layout.vector(xp, a) for a in summed)
        grad_input(dy, x, y, w, *vectors, *sums, dx, dresidual)
        return dgamma, dbeta

    return run


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
        run = kernels.grad_sums(dy_, x_, None, weight_, GradientTypes(mean_type, rstd_type), False)
        arriving = {"dy": to_dy, "x": to_x, "y": None, "weight": None, "mean": to_mean, "rstd": to_rstd}
        run, shaped = ways.through(run, arriving), ways.shaped()

    def call(dy: Any, x: Any, mean: Any, rstd: Any, where: Any, weights: Any) -> tuple[Any, Any]:
        weight = None if weigh is None else weigh(where, weights)[1]
        dgamma, dbeta = run(dy, x, None, weight, mean, rstd, None, None, None, None, None)
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
            count_type, to_count = float64, partial(_filled, xp, layout.collapsed[0] * layout.collapsed[2])
        else:
            count_type, to_count = ways.parameter("count", count)
        weight_, weigh = ways.weight(where, weights)
        kernels, ways = kernels_for(ways, weight_, [x, dy], [out])
        (dy_, to_dy), (x_, to_x) = ways.data(dy), ways.data(x)
        dx_, to_dx = ways.result(x, out)
        types = GradientTypes(mean_type, rstd_type, gamma_type, count_type)
        run = kernels.grad_input(dy_, x_, None, weight_, types, False, (dgamma_type, dbeta_type), dx_, None)
        arriving = {
            "dy": to_dy, "x": to_x, "y": None, "weight": None, "mean": to_mean, "rstd": to_rstd, "gamma": to_gamma,
            "count": to_count, "beta": None, "dmean": None, "dvar": None, "dgamma": to_dgamma, "dbeta": to_dbeta,
            "dx": to_dx, "dresidual": None,
        }  # fmt: skip
        run = ways.through(run, arriving, results=["dx"])
        call = _grad_input(ways, run, plain, weigh, axes, constant, backend.allocator(x))
        return backend.on_its_device(call, x)


def _grad_input(ways: Ways, run: Call, plain: Any, weigh: Any, axes: Any, constant: bool, make: Call) -> Call:
    """The call of `grad_input`; ``constant`` says that the count is a number."""
    by_itself = Once(grad_input)

    def call(
        dy: Any, x: Any, mean: Any, rstd: Any, gamma: Any, dgamma: Any, dbeta: Any, count: Any, where: Any,
        weights: Any, out: Any,
    ) -> Any:  # fmt: skip
        if plain is not None:
            x = plain(x)
        if out is None:
            dx = make(x)
        elif ways.partly_overlaps(
            out, dy, x, mean, rstd, gamma, dgamma, dbeta, None if constant else count, where, weights
        ):
            without = dy, x, mean, rstd, gamma, dgamma, dbeta, count, where, weights, None
            out[...] = by_itself(*without, axes)(*without)
            return out
        else:
            dx = out
        weight = None if weigh is None else weigh(where, weights)[1]
        run(dy, x, None, weight, mean, rstd, gamma, count, None, None, None, dgamma, dbeta, dx, None)
        return dx

    return call


def _filled(xp: Any, kept: int, number: Real) -> Any:
    """A number for every kept index."""
    return xp.full(kept, float(number))
