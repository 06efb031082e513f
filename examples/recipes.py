"""Recipes for scikit-learn, xarray, ONNX, and whatever speaks DLPack; each is a test (``tests/api/test_recipes.py``).

``from recipes import Scaler, standardized, onnx_batch_normalization, moments_of``
"""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.base import BaseEstimator, OneToOneFeatureMixin, TransformerMixin

import fastbn


class Scaler(OneToOneFeatureMixin, TransformerMixin, BaseEstimator):
    """scikit-learn's StandardScaler on mergeable moments: parts may come in any number, from any number of machines.

    scikit-learn's own adds sums of squares in x's dtype, and those of float16 overflow; these are float64 about the
    mean. ``moments_`` of two scalers merge: ``fastbn.merge(a.moments_, b.moments_)``.

    Examples
    --------
    >>> x = np.array([[1.0, 10.0], [3.0, 30.0]])
    >>> Scaler().fit(x).transform(x)
    array([[-1., -1.],
           [ 1.,  1.]])
    """

    def fit(self, x: np.ndarray, y: Any = None) -> Scaler:
        """Forget what was seen before."""
        self.moments_ = None
        return self.partial_fit(x)

    def partial_fit(self, x: np.ndarray, y: Any = None) -> Scaler:
        """Take in more rows."""
        seen = fastbn.moments(x)
        before = getattr(self, "moments_", None)
        self.moments_ = seen if before is None else fastbn.merge(before, seen)
        self.n_features_in_ = x.shape[1]
        return self

    def transform(self, x: np.ndarray) -> np.ndarray:
        """Mean 0 and variance 1; columns that do not vary become 0."""
        std = self.moments_.std()
        return fastbn.normalize(x, self.moments_.mean, 1 / np.where(std > 0, std, 1))


def standardized(array: Any, dim: str) -> Any:
    """An xarray.DataArray with mean 0 and variance 1 for each index of `dim`: all other dimensions are reduced.

    Examples
    --------
    >>> import xarray as xr
    >>> standardized(xr.DataArray([[1.0, 10.0], [3.0, 30.0]], dims=("time", "station")), "station").values
    array([[-1., -1.],
           [ 1.,  1.]])
    """
    import xarray as xr

    others = [name for name in array.dims if name != dim]

    def normalized(values: np.ndarray) -> np.ndarray:  # core dimensions come last, `dim` among them the last
        return fastbn.batch_norm(np.ascontiguousarray(values), channel_axis=-1, eps=0.0)[0]

    core = [*others, dim]
    found = xr.apply_ufunc(normalized, array, input_core_dims=[core], output_core_dims=[core], keep_attrs=True)
    return found.transpose(*array.dims)


def onnx_batch_normalization(
    x: np.ndarray, scale: np.ndarray, bias: np.ndarray, mean: np.ndarray, var: np.ndarray,
    epsilon: float = 1e-5, momentum: float = 0.9, training_mode: int = 0,
) -> Any:  # fmt: skip
    """The operator BatchNormalization of ONNX, version 15: its momentum weighs the old, its running variance is biased.

    Examples
    --------
    >>> x, one = np.array([[1.0], [3.0]]), np.ones(1)
    >>> y, mean, var = onnx_batch_normalization(x, one, 0 * one, 0 * one, one, training_mode=1)
    >>> mean.round(3), var.round(3)
    (array([0.2]), array([1.]))
    """
    if not training_mode:
        return fastbn.batch_norm_inference(x, mean, var, scale, bias, eps=epsilon)
    y, saved = fastbn.batch_norm(x, scale, bias, eps=epsilon)
    return y, *fastbn.update_running(mean, var, saved.moments, rate=1 - momentum, correction=0)


def moments_of(producer: Any, channel_axis: int = 1) -> fastbn.Moments:
    """Of an array of any library on the CPU that speaks DLPack, without a copy.

    Examples
    --------
    >>> moments_of(np.array([[1.0, 10.0], [3.0, 30.0]])).mean
    array([ 2., 20.])
    """
    return fastbn.moments(np.from_dlpack(producer), channel_axis=channel_axis)


def on_gpu(producer: Any) -> Any:
    """The same memory as a CuPy array: of PyTorch, JAX or Numba, by DLPack or by ``__cuda_array_interface__``.

    Either is a view. What the producer has queued on another stream comes before what CuPy queues on its current one;
    ``torch.from_dlpack(y)`` and the like are the way back.
    """
    import cupy

    return cupy.from_dlpack(producer) if hasattr(producer, "__dlpack__") else cupy.asarray(producer)
