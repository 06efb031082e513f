"""`Saved`: what the forward pass leaves for the backward pass; `Gradients`: what the backward pass returns."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, Literal, NamedTuple

from fastbn import validation
from fastbn.arrays import device_of, one_kind
from fastbn.backend import backend_of
from fastbn.call import Call, axes_of, describe, find, keep, number_of
from fastbn.formulas import reciprocal_std
from fastbn.merging import Moments

new: Any = tuple.__new__  # of named tuples: their own takes twice as long, 0.4 us of a call


class Gradients(NamedTuple):
    """Gradients of a loss: ``x`` and ``residual`` like x (residual None without one), gamma and beta float64."""

    x: Any
    gamma: Any
    beta: Any
    residual: Any


class Saved(NamedTuple):
    """What `batch_norm` saves for `batch_norm_backward`. It refers to x, gamma, beta, `where` and `weights`, and after
    relu with a residual to y, so these must not change in between.

    `arrays` and `from_arrays` take it apart into arrays and a hashable rest, as frameworks want to store it.
    """

    x: Any
    """The input; None where `out` overwrote it."""
    y: Any
    """The output, where it takes that to tell where relu lets the gradient pass: with a residual. Else it is None."""
    gamma: Any
    weight: Any
    """where * weights, or None."""
    moments: Moments | None
    """Over all ranks; None for frozen statistics."""
    mean: Any
    rstd: Any
    count: Any
    channel_axis: int | tuple[int, ...]
    activation: Literal["relu"] | None
    has_residual: bool
    gathered: bool
    beta: Any = None
    """With relu and without y: with it x tells where the gradient passes."""

    def arrays(self) -> tuple[tuple[Any, ...], Hashable]:
        """The arrays alone, and all the rest, hashable: ``Saved.from_arrays(*saved.arrays())`` is the same again.

        Examples
        --------
        >>> import numpy as np, fastbn
        >>> _, saved = fastbn.batch_norm(np.ones((2, 3), np.float32))
        >>> arrays, static = saved.arrays()
        >>> fastbn.Saved.from_arrays(arrays, static).x is saved.x
        True
        """
        moments = (None, None, None) if self.moments is None else tuple(self.moments)
        slots = (self.x, self.y, self.gamma, self.weight, *moments, self.mean, self.rstd, self.beta)
        present = tuple(array is not None for array in slots)
        static = (present, self.channel_axis, self.activation, self.has_residual, self.gathered)
        return tuple(array for array in slots if array is not None), static

    @classmethod
    def from_arrays(cls, arrays: Any, static: Any) -> Saved:
        """The inverse of `arrays`; the arrays may have become others of the same shapes."""
        present, channel_axis, activation, has_residual, gathered = static
        if len(arrays) != sum(present):
            raise ValueError(f"arrays: expected {sum(present)} arrays, got {len(arrays)}")
        remaining = iter(arrays)
        x, y, gamma, weight, *moments, mean, rstd, beta = (next(remaining) if there else None for there in present)
        return make_saved(
            x=x, y=y, gamma=gamma, beta=beta, weight=weight, mean=mean, rstd=rstd,
            moments=None if moments[0] is None else Moments(*moments), channel_axis=channel_axis, activation=activation,
            has_residual=has_residual, gathered=gathered,
        )  # fmt: skip

    @classmethod
    def frozen(
        cls,
        x: Any,
        mean: Any,
        var: Any,
        gamma: Any = None,
        *,
        eps: float = 1e-5,
        channel_axis: int | tuple[int, ...] = 1,
        y: Any = None,
        activation: Literal["relu"] | None = None,
    ) -> Saved:
        """For the backward pass of `batch_norm_inference`, whose statistics do not depend on x.

        Parameters
        ----------
        x, mean, var, gamma, eps, channel_axis, activation
            As given to `batch_norm_inference`.
        y : array, optional
            Its result; needed with ``activation="relu"``.

        Returns
        -------
        Saved
            `batch_norm_backward` then gives ``dx = gamma * rstd * dz``.

        Raises
        ------
        TypeError, ValueError
            As `batch_norm_inference`; relu without y.

        Notes
        -----
        The gradients that reach the statistics themselves follow from the parameters':
        ``dmean = -gamma * rstd * dbeta`` and ``dvar = -gamma * rstd**2 * dgamma / 2``.

        Examples
        --------
        >>> import numpy as np, fastbn
        >>> x, one = np.array([[2.0, 3.0]]), np.ones(2)
        >>> saved = fastbn.Saved.frozen(x, one, 4 * one, eps=0)
        >>> fastbn.batch_norm_backward(np.ones((1, 2)), saved).x
        array([[0.5, 0.5]])
        """
        signature = "frozen", describe(x, mean, var, gamma, y), number_of(eps), axes_of(channel_axis), activation
        run = find(signature)
        if run is None:
            run = keep(signature, _prepare_frozen(x, mean, var, gamma, eps, channel_axis, y, activation))
        saved: Saved = run(x, mean, var, gamma, y)
        return saved


def make_saved(
    *, x: Any, y: Any, gamma: Any, weight: Any, moments: Moments | None, mean: Any, rstd: Any, channel_axis: Any,
    activation: Any, has_residual: bool, gathered: bool, beta: Any = None,
) -> Saved:  # fmt: skip
    """All are made here, so that the order of the fields stands in one place."""
    count = None if moments is None else moments.count
    saved: Saved = new(
        Saved, (x, y, gamma, weight, moments, mean, rstd, count, channel_axis, activation, has_residual, gathered, beta)
    )
    return saved


def _prepare_frozen(
    x: Any, mean: Any, var: Any, gamma: Any, eps: Any, channel_axis: Any, y: Any, activation: Any
) -> Call:
    """``call(x, mean, var, gamma, y)``."""
    with device_of(x):
        backend = backend_of(one_kind({"x": x, "mean": mean, "var": var}, gamma=gamma, y=y))
        plain = validation.plainer(x)
        x = validation.data("x", x)
        layout = validation.layout_for(x, channel_axis)
        eps, relu = validation.epsilon(eps), validation.is_relu(activation)
        validation.like("y", y, x)
        if relu and y is None:
            raise ValueError("y: expected the output of the inference, which relu's gradient needs, got None")
        for name, parameter in {"mean": mean, "var": var, "gamma": gamma}.items():
            if parameter is not None:
                validation.parameter(name, parameter, layout)
    xp, shape = backend.xp, layout.kept_shape
    axes, activation = validation.static_axes(channel_axis), "relu" if relu else None

    def of_kept(parameter: Any) -> Any:
        """One number for each kept index, in an array of its own."""
        whole = xp.empty(shape)
        whole[...] = parameter
        return whole

    def call(x: Any, mean: Any, var: Any, gamma: Any, y: Any) -> Saved:
        return make_saved(
            x=x if plain is None else plain(x), y=y if relu else None, gamma=gamma, weight=None, moments=None,
            mean=of_kept(mean), rstd=xp.asarray(reciprocal_std(of_kept(var), eps)),  # of no axes it would be a number
            channel_axis=axes, activation=activation, has_residual=False, gathered=False,
        )  # fmt: skip

    return backend.on_its_device(call, x)
