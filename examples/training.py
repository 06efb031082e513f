"""Recipes for training loops on arrays: group norm, layer norm, checkpoints; tested in `tests/api/test_recipes.py`.

``from training import group_norm, group_norm_backward, layer_norm, layer_norm_backward, save, load``

Both norms are batch norm's kernels with other axes kept. What is theirs is that gamma and beta are not of the axes that
have statistics: these are a sample's, those a channel's. The gradient of a loss with respect to the normalised
``xhat = (x - mean) rstd`` is ``gamma dy``, and the sums of the backward pass are over that, for each mean there is::

    dx = rstd (gamma dy - (sum(gamma dy) + xhat sum(gamma dy xhat)) / n)    n: values of a mean
    dgamma = sum(dy xhat)    dbeta = sum(dy)                                over all samples, for each gamma

On CuPy arrays they are the same with ``import cupy as np``.
"""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from typing import Any

import numpy as np

import fastbn


def group_norm(x: Any, groups: int, gamma: Any, beta: Any, eps: float = 1e-5) -> tuple[Any, Any]:
    """Of (samples, channels, ...), by the statistics of each sample's groups of channels: Wu & He, ECCV 2018.

    One group is layer norm over a sample, as many groups as channels are instance norm. Returns y and what the backward
    pass takes.

    Examples
    --------
    >>> x = np.array([[1.0, 3.0, 10.0, 30.0]])
    >>> group_norm(x, 2, gamma=np.array([1.0, 1.0, 1.0, 5.0]), beta=np.zeros(4), eps=0)[0]
    array([[-1.,  1., -1.,  5.]])
    """
    samples, channels = x.shape[:2]
    if channels % groups:
        raise ValueError(f"groups: expected a divisor of {channels} channels, got {groups}")
    of_groups = fastbn.moments(x.reshape(samples, groups, -1), channel_axis=(0, 1))
    # Numbers of a sample's channels, so that one pass over x has them all.
    mean, rstd = (np.repeat(a, channels // groups, axis=1) for a in (of_groups.mean, of_groups.rstd(eps)))
    y = fastbn.normalize(x, mean, rstd, gamma, beta, channel_axis=(0, 1))
    return y, (x, groups, mean, rstd, gamma)


def group_norm_backward(dy: Any, saved: Any) -> tuple[Any, Any, Any]:
    """The gradients of x, gamma and beta; those of gamma and beta are float64."""
    x, groups, mean, rstd, gamma = saved
    samples, channels = x.shape[:2]
    sums = fastbn.grad_sums(dy, x, mean, rstd, channel_axis=(0, 1))  # for each sample's channels
    dgamma, dbeta = (a.sum(axis=0) for a in sums)
    of_groups = ((gamma * a).reshape(samples, groups, -1).sum(axis=2) for a in sums)
    of_channels = (np.repeat(a, channels // groups, axis=1) for a in of_groups)
    dxhat = fastbn.normalize(dy, np.zeros(1), np.ones(1), gamma)  # gamma * dy
    count = x.size // (samples * groups)
    dx = fastbn.grad_input(dxhat, x, mean, rstd, None, *of_channels, count, channel_axis=(0, 1), out=dxhat)
    return dx, dgamma, dbeta


def layer_norm(x: Any, gamma: Any, beta: Any, eps: float = 1e-5) -> tuple[Any, Any]:
    """Of (..., features), by the statistics of each position; gamma and beta are per feature: Ba, Kiros & Hinton, 2016.

    Returns y and what the backward pass takes, which is xhat and no x.

    Examples
    --------
    >>> layer_norm(np.array([[1.0, 3.0], [30.0, 10.0]]), gamma=np.array([1.0, 5.0]), beta=np.zeros(2), eps=0)[0]
    array([[-1.,  5.],
           [ 1., -5.]])
    """
    rows = x.reshape(-1, x.shape[-1])
    of_rows = fastbn.moments(rows, channel_axis=0)
    rstd = of_rows.rstd(eps)
    xhat = fastbn.normalize(rows, of_rows.mean, rstd, channel_axis=0)
    y = fastbn.normalize(xhat, np.zeros(1), np.ones(1), gamma, beta, channel_axis=1)  # gamma * xhat + beta
    return y.reshape(x.shape), (xhat, rstd, gamma)


def layer_norm_backward(dy: Any, saved: Any) -> tuple[Any, Any, Any]:
    """The gradients of x, gamma and beta; those of gamma and beta are float64."""
    xhat, rstd, gamma = saved
    itself = np.zeros(1), np.ones(1)  # mean and rstd of xhat, whose own xhat it is
    rows = dy.reshape(xhat.shape)
    dgamma, dbeta = fastbn.grad_sums(rows, xhat, *itself, channel_axis=1)
    dxhat = fastbn.normalize(rows, *itself, gamma, channel_axis=1)  # gamma * dy
    sums = fastbn.grad_sums(dxhat, xhat, *itself, channel_axis=0)
    dx = fastbn.grad_input(dxhat, xhat, *itself, rstd, *sums, xhat.shape[1], channel_axis=0, out=dxhat)
    return dx.reshape(dy.shape), dgamma, dbeta


def save(path: str | PathLike[str], norms: Mapping[str, fastbn.BatchNorm]) -> None:
    """Write batch norms by their names in a network: a .safetensors file, if it is to be called so, or an .npz.

    Names are those that PyTorch's model with modules of these names would give them, such as "bn1.weight".
    """
    state = {f"{name}.{key}": array for name, norm in norms.items() for key, array in norm.state().items()}
    for key, array in state.items():
        if hasattr(array, "get"):  # CuPy's
            state[key] = array.get()
        if array.dtype.name == "bfloat16":  # which neither format reads as NumPy arrays; this loses nothing
            state[key] = state[key].astype(np.float32)
    if str(path).endswith(".safetensors"):
        from safetensors.numpy import save_file

        save_file(state, path)
    else:
        np.savez(path, **state)


def load(path: str | PathLike[str], norms: Mapping[str, fastbn.BatchNorm]) -> None:
    """Read what `save` wrote, or the batch norms of a model of PyTorch's from a .safetensors file."""
    if str(path).endswith(".safetensors"):
        from safetensors.numpy import load_file

        state = load_file(path)
    else:
        with np.load(path) as arrays:
            state = dict(arrays)
    for name, norm in norms.items():
        norm.load({key.removeprefix(f"{name}."): state[key] for key in state if key.startswith(f"{name}.")})
