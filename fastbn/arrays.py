"""Of which library an array is, and on which device. Never imports what the user has not imported."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import numpy as np

_INSTEAD = {
    "torch": "use fastbn.torch, or pass t.detach().numpy() (CPU) or cupy.from_dlpack(t) (CUDA)",
    "jax": "use fastbn.jax.batch_norm, or pass numpy.asarray(a)",
    "jaxlib": "use fastbn.jax.batch_norm, or pass numpy.asarray(a)",
    "mlx": "pass numpy.asarray(a)",
    "tensorflow": "pass t.numpy()",
    "keras": "pass keras.ops.convert_to_numpy(t)",
    "dask": "use fastbn.dask for statistics, or pass a.compute()",
    "pandas": "pass .to_numpy()",
    "polars": "pass .to_numpy()",
    "pyarrow": "pass .to_numpy()",
    "awkward": "pass awkward.to_numpy(a)",
    "xarray": "pass .values",
    "h5py": "pass d[...]",
    "zarr": "pass a[...]",
    "scipy": "pass .toarray()",
    "cupyx": "pass .toarray()",
    "sparse": "pass .todense()",
}


def kind_of(name: str, array: Any) -> str:
    """'numpy' or 'cupy'; a TypeError that says what to pass instead for everything else."""
    kind = type(array)
    if kind is np.ndarray or kind is np.memmap:
        return "numpy"
    cupy = sys.modules.get("cupy")
    if cupy is not None and isinstance(array, cupy.ndarray):
        _check_places(name, array)
        return "cupy"
    raise TypeError(
        f"{name}: expected a numpy.ndarray or a cupy.ndarray, got {_type_name(kind)}; {_what_to_call(array)}"
    )


def _check_places(name: str, array: Any) -> None:
    """A GPU reads elements at multiples of their size alone, also to copy them elsewhere."""
    size = array.itemsize
    if any(place % size for place in (array.data.ptr, *array.strides)):
        raise ValueError(
            f"{name}: expected elements at multiples of their {size} bytes, got address {array.data.ptr} and strides "
            f"{array.strides}"
        )


def one_kind(required: dict[str, Any], **optional: Any) -> str:
    """The kind that all the given arrays share, and the device; an optional one may be None."""
    first, kind, device = "", "", 0
    for name, array in (required | {n: a for n, a in optional.items() if a is not None}).items():
        found = kind_of(name, array)
        if not kind:
            first, kind = name, found
            device = array.data.device_id if kind == "cupy" else 0
        elif found != kind:
            raise TypeError(f"{name}: expected a {kind}.ndarray like {first}, got a {found}.ndarray")
        elif kind == "cupy" and array.data.device_id != device:
            raise ValueError(
                f"{name}: expected an array on CUDA device {device} like {first}, got one on {array.data.device_id}"
            )
    return kind


def device_of(*arguments: Any) -> AbstractContextManager[Any]:
    """A context in which the device of the first array is the current one: there results are allocated, kernels run.

    Arrays are looked for in tuples too, as moments are.
    """
    cupy = sys.modules.get("cupy")
    if cupy is not None:
        first = next(_arrays(cupy, arguments), None)
        if first is not None and first.data.device_id != cupy.cuda.runtime.getDevice():
            context: AbstractContextManager[Any] = cupy.cuda.Device(first.data.device_id)
            return context
    return nullcontext()


def _arrays(cupy: Any, values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        if isinstance(value, cupy.ndarray):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from _arrays(cupy, value)


P = ParamSpec("P")
R = TypeVar("R")


def on_device(function: Callable[P, R]) -> Callable[P, R]:
    """The function, run on the device of its first array."""

    @wraps(function)
    def run(*args: P.args, **keywords: P.kwargs) -> R:
        with device_of(*args, *keywords.values()):
            return function(*args, **keywords)

    return run


def is_foreign(value: Any) -> bool:
    """Whether a value is an array of a library other than NumPy, or a NumPy subclass with a meaning of its own."""
    if isinstance(value, (np.ndarray, np.generic)):
        return isinstance(value, np.ndarray) and type(value) not in (np.ndarray, np.memmap)
    # Sparse arrays of SciPy and CuPy know none of the protocols: NumPy would make one object of them.
    protocols = ("__array__", "__dlpack__", "__array_interface__", "__cuda_array_interface__", "toarray")
    return any(hasattr(value, protocol) for protocol in protocols)


def _type_name(kind: type) -> str:
    return kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"


def _what_to_call(value: Any) -> str:
    if isinstance(value, np.ma.MaskedArray):
        return "pass a.data and where=~numpy.ma.getmaskarray(a)"
    if value is None:
        return "it is required"
    if isinstance(value, (np.ndarray, np.generic, list, tuple, int, float)):
        return "pass numpy.asarray(a)"
    on_gpu = hasattr(value, "__cuda_array_interface__")
    otherwise = "pass cupy.from_dlpack(a) or cupy.asarray(a)" if on_gpu else "convert it to a NumPy array"
    return _INSTEAD.get(type(value).__module__.partition(".")[0], otherwise)
