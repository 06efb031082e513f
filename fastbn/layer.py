"""`BatchNorm`: parameters, running statistics and gradients of a layer, for training loops on arrays.

All that is computed, public functions compute: a layer of another kind is written like this one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from fastbn import validation
from fastbn.arrays import device_of, one_kind
from fastbn.backend import backend_of
from fastbn.functional import Gather, batch_norm, batch_norm_backward, batch_norm_inference
from fastbn.merging import Moments, namespace
from fastbn.primitives import Activation, Axes, fold
from fastbn.saved import Saved

__all__ = ["BatchNorm"]


class BatchNorm:
    """Batch normalization as a layer: parameters, running statistics, and gradients of the last backward pass.

    Parameters
    ----------
    channels : int or tuple of ints
        The sizes of the axes kept: one, or one for each of `channel_axis`, in x's order.
    channel_axis, eps
        As for `batch_norm`.
    rate : float or None
        As for `update_running`: PyTorch's ``momentum``. None: the running statistics are the average of all batches,
        each weighing the same; one in which a channel has too few values counts for it as what the channel had before.
    correction : float
        As for `update_running`: 1 in PyTorch, 0 in Keras, Flax and ONNX.
    affine : bool
        Whether there are gamma and beta.
    dtype : dtype
        Of gamma, beta and their gradients: float16, bfloat16, float32 or float64, whatever x's is.
    xp : module, optional
        numpy, the default, or cupy, on its current device.

    Attributes
    ----------
    gamma, beta : array or None
        Of the channels' shape, 1 and 0 at first; None without `affine`.
    dgamma, dbeta : array or None
        Their gradients, in their dtype. `backward` makes new ones; None before.
    dresidual : array or None
        The gradient of the residual, in x's dtype, where `forward` was given one.
    mean, var : array
        Running statistics, float64, of the channels' shape, 0 and 1 at first.
    batches : int
        How many batches these have seen.
    moments : Moments or None
        Of the last batch in training, over all ranks: what `population` takes.
    training : bool
        Whether `forward` takes the batch's statistics and updates the running ones. `train` and `eval` set it.
    frozen : bool
        True: running statistics stay and are used in training, too; gamma and beta still have gradients.

    Raises
    ------
    TypeError, ValueError
        An argument of another type, or outside its range.

    Notes
    -----
    In training, per channel: ``y = act(gamma (x - E[x]) / sqrt(Var[x] + eps) + beta + residual)``, and
    ``mean += r (E[x] - mean)``, ``var += r (n / (n - correction) Var[x] - var)`` with r the rate, or ``1 / batches``.
    Channels with no more than `correction` values in a batch keep their running statistics. Otherwise
    ``y = act(gamma (x - mean) / sqrt(var + eps) + beta + residual)``.

    `forward` keeps `x`, `where`, and with relu `y`, until `backward` has used them or the next `forward`; in between
    neither they nor the layer's arrays may change. Copies and pickles of a layer are without: they begin with a
    forward pass.

    Instance norm has no statistics to keep: ``batch_norm(x, gamma, beta, channel_axis=(0, 1))``.

    References
    ----------
    Ioffe & Szegedy, "Batch Normalization", ICML 2015, Algorithms 1 and 2.

    Examples
    --------
    >>> import numpy as np, fastbn
    >>> norm = fastbn.BatchNorm(2)
    >>> x = np.array([[1.0, 2.0], [3.0, 6.0]], np.float32)
    >>> norm.forward(x).round(3)
    array([[-1., -1.],
           [ 1.,  1.]], dtype=float32)
    >>> norm.mean, norm.var
    (array([0.2, 0.4]), array([1.1, 1.7]))
    >>> dx = norm.backward(np.ones_like(x))
    >>> norm.dbeta
    array([2., 2.], dtype=float32)
    >>> norm.gamma -= 0.1 * norm.dgamma
    >>> norm.eval().forward(x).round(3)
    array([[0.763, 1.227],
           [2.67 , 4.295]], dtype=float32)
    """

    def __init__(
        self,
        channels: int | tuple[int, ...],
        *,
        channel_axis: Axes = 1,
        eps: float = 1e-5,
        rate: float | None = 0.1,
        correction: float = 1,
        affine: bool = True,
        dtype: Any = "float32",
        xp: Any = None,
    ) -> None:
        xp = np if xp is None else xp
        if getattr(xp, "__name__", None) not in ("numpy", "cupy"):
            raise TypeError(f"xp: expected numpy or cupy, got {xp!r}")
        if rate is not None and not 0 <= validation.real("rate", rate) <= 1:
            raise ValueError(f"rate: expected None or a number in [0, 1], got {rate}")
        if not math.isfinite(validation.real("correction", correction)):
            raise ValueError(f"correction: expected a finite number, got {correction}")
        dtype, shape = validation.float_dtype("dtype", dtype), validation.sizes("channels", channels, channel_axis)
        self.channel_axis = validation.static_axes(channel_axis)
        self.eps, self.rate, self.correction = validation.epsilon(eps), rate, validation.real("correction", correction)
        self.gamma: Any = xp.ones(shape, dtype) if affine else None
        self.beta: Any = xp.zeros(shape, dtype) if affine else None
        self.mean: Any = xp.zeros(shape)
        self.var: Any = xp.ones(shape)
        self.batches = 0
        self.training, self.frozen = True, False
        self.moments: Moments | None = None
        self.dgamma: Any = None
        self.dbeta: Any = None
        self.dresidual: Any = None
        self._saved: Any = None  # what makes the `Saved` of the last forward pass, and its hook

    def train(self, mode: bool = True) -> BatchNorm:
        """Normalise by the statistics of batches and update the running ones; with False as `eval`.

        Returns
        -------
        BatchNorm
            The layer itself.
        """
        self.training = bool(mode)
        return self

    def eval(self) -> BatchNorm:
        """Normalise by the running statistics, and let them be.

        Returns
        -------
        BatchNorm
            The layer itself.
        """
        return self.train(False)

    def forward(
        self,
        x: Any,
        *,
        where: Any = None,
        weights: Any = None,
        residual: Any = None,
        activation: Activation = None,
        gather: Gather | None = None,
        out: Any = None,
    ) -> Any:
        """Normalise, and in training update the running statistics.

        Parameters
        ----------
        x : array
            float16, bfloat16, float32 or float64, of any layout, with the layer's channels on its channel axes.
        where, weights, gather : optional
            What the batch's statistics count, and over which ranks: as for `batch_norm`. With running statistics they
            have no effect.
        residual, activation, out : optional
            As for `batch_norm`.

        Returns
        -------
        y : array
            x's dtype and element order.

        Raises
        ------
        TypeError, numpy.exceptions.AxisError
            As `batch_norm`.
        ValueError
            As `batch_norm`; another number of channels. Nothing has been written then.
        """
        kind = one_kind({"x": x, "mean": self.mean})
        found = tuple(x.shape[axis] for axis in sorted(validation.channel_axes(x.ndim, self.channel_axis)))
        if found != self.mean.shape:
            raise ValueError(
                f"x: expected {self.mean.shape} as the sizes of channel_axis {self.channel_axis}, got {found}, "
                f"x's shape being {x.shape}"
            )
        options: dict[str, Any] = {"channel_axis": self.channel_axis, "eps": self.eps, "activation": activation}
        if not self.training or self.frozen:
            written = out is not None and backend_of(kind).overlap(out, x)
            y = batch_norm_inference(
                x, self.mean, self.var, self.gamma, self.beta, residual=residual, out=out, **options
            )
            frozen = partial(Saved.frozen, x, self.mean, self.var, self.gamma, y=y, **options)
            self._saved = lambda: frozen()._replace(x=None if written else x, has_residual=residual is not None), None
            return y
        rate = 1 / (self.batches + 1) if self.rate is None else self.rate
        y, saved = batch_norm(
            x, self.gamma, self.beta, where=where, weights=weights, residual=residual, gather=gather, out=out,
            running=(self.mean, self.var), rate=rate, correction=self.correction, **options,
        )  # fmt: skip
        self.batches, self.moments, self._saved = self.batches + 1, saved.moments, (lambda: saved, gather)
        return y

    def backward(self, dy: Any, *, out: Any = None) -> Any:
        """Gradients from that of the output of the last forward pass; each forward pass has one backward pass.

        Parameters
        ----------
        dy : array
            x's shape and dtype, of any layout.
        out : array, optional
            Written and returned; x's shape and dtype. It may be `dy`.

        Returns
        -------
        dx : array
            x's dtype and element order: `batch_norm_backward` has the formula. The attributes `dgamma` and `dbeta`
            (with `gather` this rank's share) and `dresidual` are new arrays then.

        Raises
        ------
        RuntimeError
            No forward pass since the last backward pass.
        TypeError, ValueError
            As `batch_norm_backward`; then the backward pass may be tried again.
        """
        if self._saved is None:
            raise RuntimeError("backward: expected a forward pass before it, one for each backward pass, got none")
        make_saved, gather = self._saved
        dx, dgamma, dbeta, self.dresidual = batch_norm_backward(dy, make_saved(), gather=gather, out=out)
        self._saved = None  # so that x is not kept alive beside the next one
        with device_of(self.mean), np.errstate(over="ignore"):  # what float16 cannot hold
            if self.gamma is not None:
                self.dgamma = dgamma.astype(self.gamma.dtype)
            if self.beta is not None:
                self.dbeta = dbeta.astype(self.beta.dtype)
        return dx

    def state(self) -> dict[str, Any]:
        """Copies of parameters and running statistics, by the names of PyTorch's state dict.

        Returns
        -------
        dict
            ``weight`` (gamma) and ``bias`` (beta) if there are any, ``running_mean``, ``running_var``, and
            ``num_batches_tracked``, an int64 array without axes.

        Examples
        --------
        >>> import fastbn
        >>> list(fastbn.BatchNorm(3, affine=False).state())
        ['running_mean', 'running_var', 'num_batches_tracked']
        """
        with device_of(self.mean):
            state = {name: array.copy() for name, array in self._arrays().items()}
            return state | {"num_batches_tracked": namespace(self.mean).asarray(self.batches, dtype="int64")}

    def load(self, state: Mapping[str, Any]) -> BatchNorm:
        """Take over what `state` gave, or a batch norm's part of a state dict of PyTorch.

        Parameters
        ----------
        state : mapping
            Of just the names that `state` gives; arrays, or what the layer's library makes arrays of, such as PyTorch's
            tensors on the CPU. Values are written into the layer's arrays, in their dtypes.

        Returns
        -------
        BatchNorm
            The layer itself.

        Raises
        ------
        TypeError
            What is no mapping, or no real numbers.
        ValueError
            Names that are missing or not known, another shape. Nothing has been written then.

        Examples
        --------
        >>> import fastbn
        >>> norm = fastbn.BatchNorm(3)
        >>> fastbn.BatchNorm(3).load(norm.state())
        BatchNorm(3, channel_axis=1, eps=1e-05, rate=0.1, correction=1, dtype=float32, xp=numpy)
        """
        if not isinstance(state, Mapping):
            raise TypeError(f"state: expected a mapping of names to arrays, got {type(state).__name__}")
        with device_of(self.mean):
            arrays = self._arrays()
            expected = [*arrays, "num_batches_tracked"]
            if set(state) != set(expected):
                missing, unknown = [n for n in expected if n not in state], [n for n in state if n not in expected]
                came = " and ".join(f"{what} {names}" for what, names in (("no", missing), ("also", unknown)) if names)
                raise ValueError(f"state: expected the names {expected}, got {came}")
            xp = namespace(self.mean)
            new = {name: _loaded(xp, name, state[name], array.shape) for name, array in arrays.items()}
            batches = _loaded(xp, "num_batches_tracked", state["num_batches_tracked"], ())
            if batches.dtype.kind not in "iu" or batches < 0:
                raise ValueError(
                    f"state['num_batches_tracked']: expected an integer >= 0, got {batches.dtype} {batches}"
                )
            with np.errstate(over="ignore"):  # what the layer's dtype cannot hold
                for name, array in arrays.items():
                    array[...] = new[name].astype(array.dtype)
            self.batches = int(batches)
        return self

    def fold_into(self, kernel: Any, kernel_bias: Any = None, *, axis: int = 0, groups: int = 1) -> tuple[Any, Any]:
        """Kernel and bias of the linear layer before this one with its inference folded in, by `fold`.

        Parameters
        ----------
        kernel, kernel_bias, axis, groups
            As for `fold`.

        Returns
        -------
        kernel, bias : array
            Of the layer that does the work of both, in the kernel's dtype.

        Raises
        ------
        TypeError, ValueError, numpy.exceptions.AxisError
            As `fold`.

        Examples
        --------
        >>> import numpy as np, fastbn
        >>> norm = fastbn.BatchNorm(2, eps=0)
        >>> norm.mean += 1
        >>> norm.fold_into(np.array([[1.0, 2.0], [3.0, 4.0]]))
        (array([[1., 2.],
               [3., 4.]]), array([-1., -1.]))
        """
        return fold(
            kernel, kernel_bias, self.mean, self.var, self.gamma, self.beta, eps=self.eps, axis=axis, groups=groups
        )

    def _arrays(self) -> dict[str, Any]:
        """The arrays themselves, by PyTorch's names."""
        parameters = {} if self.gamma is None else {"weight": self.gamma, "bias": self.beta}
        return parameters | {"running_mean": self.mean, "running_var": self.var}

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_saved": None}

    def __repr__(self) -> str:
        shape, parameters = self.mean.shape, "affine=False" if self.gamma is None else f"dtype={self.gamma.dtype}"
        return (
            f"BatchNorm({shape[0] if len(shape) == 1 else shape}, channel_axis={self.channel_axis}, eps={self.eps}, "
            f"rate={self.rate}, correction={self.correction:g}, {parameters}, xp={namespace(self.mean).__name__})"
        )


def _loaded(xp: Any, name: str, value: Any, shape: tuple[int, ...]) -> Any:
    """A value of a state as an array of this shape."""
    try:
        array = xp.asarray(value)
    except (TypeError, ValueError, RuntimeError) as error:  # such as arrays of other devices and tensors with gradients
        raise TypeError(f"state[{name!r}]: expected an array for {xp.__name__}, got {type(value)}: {error}") from error
    if array.dtype.kind not in "fiu" and not validation.is_float(array.dtype):
        raise TypeError(f"state[{name!r}]: expected real numbers, got dtype {array.dtype}")
    if array.shape != shape:
        raise ValueError(f"state[{name!r}]: expected the shape {shape}, got {array.shape}")
    return array
