"""`Saved`: what the forward pass leaves for the backward pass; `Gradients`: what the backward pass returns."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, Literal, NamedTuple

from fastbn import validation
from fastbn.arrays import on_device, one_kind
from fastbn.backend import backend_of
from fastbn.formulas import reciprocal_std
from fastbn.merging import Moments


class Gradients(NamedTuple):
    """Gradients of a loss: ``x`` and ``residual`` like x (residual None without one), gamma and beta float64."""

    x: Any
    gamma: Any
    beta: Any
    residual: Any


class Saved(NamedTuple):
    """What `batch_norm` saves for `batch_norm_backward`. It refers to x, y, gamma,
    `where` and `weights`, so these must not change in between.

    `arrays` and `from_arrays` take it apart into arrays and a hashable rest, as frameworks want to store it.
    """

    x: Any
    """The input; None where `out` overwrote it."""
    y: Any
    """The output, with relu only: it tells where the gradient passes."""
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
        slots = (self.x, self.y, self.gamma, self.weight, *moments, self.mean, self.rstd)
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
        x, y, gamma, weight, *moments, mean, rstd = (next(remaining) if there else None for there in present)
        whole = None if moments[0] is None else Moments(*moments)
        count = None if whole is None else whole.count
        return cls(x, y, gamma, weight, whole, mean, rstd, count, channel_axis, activation, has_residual, gathered)

    @classmethod
    @on_device
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
        kind = one_kind({"x": x, "mean": mean, "var": var}, gamma=gamma, y=y)
        x = validation.data("x", x)
        layout = validation.layout_for(x, channel_axis)
        eps, relu = validation.epsilon(eps), validation.is_relu(activation)
        y = validation.like("y", y, x)
        if relu and y is None:
            raise ValueError("y: expected the output of the inference, which relu's gradient needs, got None")
        xp = backend_of(kind).xp
        mean = xp.broadcast_to(validation.parameter("mean", mean, layout), layout.kept_shape).astype(xp.float64)
        var = xp.broadcast_to(validation.parameter("var", var, layout), layout.kept_shape).astype(xp.float64)
        if gamma is not None:
            validation.parameter("gamma", gamma, layout)
        rstd = xp.asarray(reciprocal_std(var, eps))  # of no axes it would be a number
        y = y if relu else None
        channel_axis = validation.static_axes(channel_axis)
        return cls(x, y, gamma, None, None, mean, rstd, None, channel_axis, activation, False, False)
