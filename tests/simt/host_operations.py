"""CuPy's operators, ufuncs, methods and functions of arrays in host memory, computed by NumPy."""

from __future__ import annotations

import contextlib
import functools
import inspect
import operator
import warnings
from typing import Any

import numpy as np

from tests.simt.host_memory import operations, to_numpy


@contextlib.contextmanager
def _silent() -> Any:
    """GPUs do not warn."""
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        yield


def _host(value: Any) -> Any:
    """An argument for NumPy; a NumPy array where CuPy wants its own is refused in CuPy's words."""
    import cupy

    if isinstance(value, cupy.ndarray):
        return to_numpy(value)
    if isinstance(value, np.ndarray):
        raise TypeError(f"Unsupported type {type(value)}")
    if isinstance(value, (list, tuple)):
        return type(value)(map(_host, value))
    return value


def _flushed(value: Any) -> Any:
    """An array in which subnormal numbers of float32 and bfloat16 are 0, as CuPy compiles its kernels (`-ftz=true`).

    Those of float16, which become float32 first, and of float64 count.
    """
    if getattr(getattr(value, "dtype", None), "name", "") not in ("float32", "bfloat16"):
        return value
    tiny = np.abs(value) < np.finfo(np.float32).tiny
    return np.where(tiny, np.copysign(value.dtype.type(0), value), value) if tiny.any() else value


def _device(value: Any) -> Any:
    """A result of NumPy's in an allocation of its own: contiguous, as kernels write; an array where NumPy's is none."""
    import cupy

    if isinstance(value, (tuple, list)):
        return tuple(map(_device, value))
    value = np.asarray(value)
    result = cupy.empty(value.shape, value.dtype)
    to_numpy(result)[...] = value
    return result


def _where(condition: Any, x: Any, y: Any, out: Any = None, **_options: Any) -> Any:
    return _copy(np.where(condition, x, y), out)


def _copy(source: Any, out: Any = None, casting: str = "unsafe", where: Any = True, **_options: Any) -> Any:
    if out is None:
        return source
    np.copyto(out, source, casting, where)
    return out


class Ufunc:
    """In the place of one of CuPy's ufunc objects: its signature and refusals, NumPy's arithmetic."""

    def __init__(self, original: Any) -> None:
        self.original = original
        self.short = original.name.removeprefix("cupy_")
        self.compute = {"copy": _copy, "where": _where}.get(self.short) or getattr(np, self.short)
        self.takes_bfloat16 = any("E" in types for types in original.types)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.original, name)

    def __call__(self, *args: Any, out: Any = None, dtype: Any = None, _where: Any = None, **options: Any) -> Any:
        import cupy

        original = self.original
        if wrong := options.keys() - {"casting"}:
            raise TypeError(f"Wrong arguments {wrong}")
        if not original.nin <= len(args) <= original.nargs or (out is not None and len(args) > original.nin):
            raise TypeError(f"Wrong number of arguments for {original.name!r}")
        outs = (*args[original.nin :], *(out if isinstance(out, tuple) else () if out is None else (out,)))
        given = [array for array in outs if array is not None]
        for array in (*args[: original.nin], *given):
            if not isinstance(array, (cupy.ndarray, bool, int, float, complex, np.generic)):
                raise TypeError(f"Unsupported type {type(array)}")
        inputs = [self._readable(array) for array in args[: original.nin]]
        dtypes = {array.dtype for array in (*inputs, *given) if hasattr(array, "dtype")}
        computes = self.short != "where" and (self.short != "copy" or len(dtypes) > 1)
        if computes:
            inputs = [_flushed(array) for array in inputs]
        if given:
            options["out"] = tuple(None if array is None else _host(array) for array in outs)
        if not isinstance(self.compute, np.ufunc) and given:
            options["out"] = options["out"][0]
        options |= {key: _host(value) for key, value in (("where", _where), ("dtype", dtype)) if value is not None}
        with _silent():
            result = self.compute(*inputs, **options)
            if computes and given:
                for array in given:
                    np.copyto(_host(array), _flushed(_host(array)), where=options.get("where", True))
            elif computes:
                result = tuple(map(_flushed, result)) if isinstance(result, tuple) else _flushed(result)
        if np.size(result[0] if isinstance(result, tuple) else result):
            operations[self.short] += 1
        if not given:
            return _device(result)
        return given[0] if original.nout == 1 else tuple(given)

    def _readable(self, value: Any) -> Any:
        """Without a loop for bfloat16 CuPy takes the one for float32."""
        value = _host(value)
        lacking = getattr(getattr(value, "dtype", None), "name", "") == "bfloat16" and not self.takes_bfloat16
        return value.astype(np.float32) if lacking else value


def _binary(name: str) -> tuple[Any, Any, Any]:
    """An operator, reflected and in place. NumPy arrays come to the ufunc by NumPy's `__array_ufunc__`."""
    import cupy

    def forward(self: Any, other: Any) -> Any:
        if isinstance(other, cupy.ndarray):
            return getattr(cupy, name)(self, other)
        asked = getattr(other, "__array_ufunc__", operator)
        if asked is None or (asked is operator and getattr(other, "__array_priority__", 0) > self.__array_priority__):
            return NotImplemented
        return getattr(np, name)(self, other)

    def reflected(self: Any, other: Any) -> Any:
        return getattr(cupy, name)(other, self)

    def in_place(self: Any, other: Any) -> Any:
        return getattr(cupy, name)(self, other, self)

    return forward, reflected, in_place


def _comparison(name: str) -> Any:
    forward, *_ = _binary(name)

    def compare(self: Any, other: Any) -> Any:
        import cupy

        if name in ("equal", "not_equal") and (other is None or type(other).__eq__ is object.__eq__):
            return cupy.full(self.shape, name == "not_equal")
        if isinstance(other, np.ndarray) and other.ndim == 0:
            other = other.item()
        return forward(self, other)

    return compare


BINARY = {
    "add": "add",
    "sub": "subtract",
    "mul": "multiply",
    "truediv": "true_divide",
    "floordiv": "floor_divide",
    "mod": "remainder",
    "pow": "power",
    "lshift": "left_shift",
    "rshift": "right_shift",
    "and": "bitwise_and",
    "or": "bitwise_or",
    "xor": "bitwise_xor",
}
COMPARISONS = {
    "lt": "less",
    "le": "less_equal",
    "eq": "equal",
    "ne": "not_equal",
    "gt": "greater",
    "ge": "greater_equal",
}
UNARY = {"neg": "negative", "pos": "positive", "abs": "absolute", "invert": "invert"}
METHODS = {  # CuPy's parameters, of which NumPy has more
    "all": "axis out keepdims",
    "any": "axis out keepdims",
    "argmax": "axis out keepdims",
    "argmin": "axis out keepdims",
    "argsort": "axis kind",
    "clip": "min max out",
    "compress": "condition axis out",
    "cumprod": "axis dtype out",
    "cumsum": "axis dtype out",
    "dot": "b out",
    "max": "axis out keepdims",
    "mean": "axis dtype out keepdims",
    "min": "axis out keepdims",
    "nonzero": "",
    "prod": "axis dtype out keepdims",
    "ptp": "axis out keepdims",
    "repeat": "repeats axis",
    "round": "decimals out",
    "searchsorted": "v side sorter",
    "sort": "axis kind",
    "std": "axis dtype out ddof keepdims",
    "sum": "axis dtype out keepdims",
    "take": "indices axis out",
    "trace": "offset axis1 axis2 dtype out",
    "var": "axis dtype out ddof keepdims",
}
FUNCTIONS = [  # of which CuPy has kernels of its own
    "allclose", "arange", "argmax", "argmin", "array_equal", "bincount", "clip", "count_nonzero", "cumprod",
    "cumsum", "diff", "dot", "einsum", "eye", "histogram", "identity", "inner", "isclose", "isin", "kron",
    "linspace", "matmul", "median", "meshgrid", "nan_to_num", "nancumsum", "nanmax", "nanmean", "nanmin", "nanstd",
    "nansum", "nanvar", "outer", "pad", "percentile", "quantile", "searchsorted", "sort", "tensordot", "tile",
    "tri", "tril", "triu", "unique", "vdot",
]  # fmt: skip


def _bound(parameters: inspect.Signature, what: str, args: Any, keywords: dict[str, Any]) -> dict[str, Any]:
    """The arguments by name; those that CuPy has not are refused."""
    try:
        return parameters.bind(*args, **keywords).arguments
    except TypeError as error:
        raise TypeError(f"{what}: {error}") from None


def _method(name: str, names: str) -> Any:
    parameters = [inspect.Parameter(p, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=None) for p in names.split()]
    signature = inspect.Signature(parameters)

    def method(self: Any, *args: Any, **keywords: Any) -> Any:
        given = _bound(signature, name, args, keywords)
        out = given.get("out")
        value, arguments = _flushed(to_numpy(self)), {key: _host(argument) for key, argument in given.items()}
        half = name in ("sum", "prod", "mean", "var", "std") and value.dtype.itemsize == 2 and value.dtype.kind in "fV"
        if half:  # CuPy sums them in float32
            wanted, out_view = arguments.pop("dtype", None) or value.dtype, arguments.pop("out", None)
            value = value.astype(np.promote_types(np.float32, wanted))
        if self.size:
            operations[name] += 1
        with _silent():
            result = np.ptp(value, **arguments) if name == "ptp" else getattr(value, name)(**arguments)
            if half:
                result = _copy(result.astype(wanted), out_view)
            result = _flushed(result)
        return result if result is None else _device(result) if out is None else out

    return method


def function_like(original: Any, name: str) -> Any:
    signature = inspect.signature(original) if inspect.isfunction(original) else None

    @functools.wraps(original)
    def function(*args: Any, **keywords: Any) -> Any:
        if signature is not None:
            _bound(signature, name, args, keywords)
        operations[name] += 1
        with _silent():
            result = getattr(np, name)(*_host(args), **{key: _host(value) for key, value in keywords.items()})
        return keywords["out"] if keywords.get("out") is not None else _device(result)

    return function


def _is_advanced(index: Any) -> bool:
    """Whether an index is more than slices and integers, and so copies."""
    import cupy

    parts = index if isinstance(index, tuple) else (index,)
    return any(isinstance(part, (list, tuple, bool, np.bool_, np.ndarray, cupy.ndarray)) for part in parts)


def _host_index(index: Any) -> Any:
    """Indices, unlike operands, may be NumPy arrays."""
    if isinstance(index, tuple):
        return tuple(map(_host_index, index))
    return index if isinstance(index, (list, np.ndarray)) else _host(index)


# --- methods and functions of CuPy on them ----------------------------------------------------------------------------


def array_methods() -> dict[str, Any]:
    """Methods of `cupy.ndarray` that end in calls of the driver, with CuPy's semantics."""
    import cupy

    view_of, assign = cupy.ndarray.__getitem__, cupy.ndarray.__setitem__

    def getitem(self: Any, index: Any) -> Any:
        if not _is_advanced(index):
            return view_of(self, index)
        operations["take"] += 1
        return _device(to_numpy(self)[_host_index(index)])

    def setitem(self: Any, index: Any, value: Any) -> None:
        if not _is_advanced(index):
            assign(self, index, value)  # by `fill`, a copy of memory or of elements
        else:
            operations["put"] += 1
            with _silent():
                to_numpy(self)[_host_index(index)] = _host(value)

    def copy(self: Any, order: str = "C") -> Any:
        return self.astype(self.dtype, order=order)

    def fill(self: Any, value: Any) -> None:
        value = _host(value) if isinstance(value, cupy.ndarray) else np.asarray(value, self.dtype)
        if value.shape != ():
            raise ValueError("non-scalar numpy.ndarray cannot be used for fill")
        if self.size:
            operations["fill"] += 1
            with _silent():
                to_numpy(self)[...] = value

    def get(self: Any, stream: Any = None, order: str = "C", out: Any = None, blocking: bool = True) -> np.ndarray:
        if out is not None and (out.dtype, out.shape) != (self.dtype, self.shape):
            raise (TypeError if out.dtype != self.dtype else ValueError)(f"{out.dtype} {out.shape} array cannot be got")
        if self.size:
            operations["get"] += 1
        if out is None:
            return to_numpy(self).copy(order)
        np.copyto(out, to_numpy(self))
        return out

    def put(self: Any, array: np.ndarray, stream: Any = None) -> None:
        if not isinstance(array, np.ndarray) or array.dtype != self.dtype:
            raise TypeError(f"expected a numpy.ndarray of {self.dtype}")
        if array.shape != self.shape:
            raise ValueError(f"Shape mismatch. Old shape: {self.shape}, new shape: {array.shape}")
        operations["set"] += 1
        to_numpy(self)[...] = array

    methods = {"__getitem__": getitem, "__setitem__": setitem, "copy": copy, "fill": fill, "get": get, "set": put}
    methods |= {name: _method(name, names) for name, names in METHODS.items()}
    methods |= {f"__{short}__": _comparison(name) for short, name in COMPARISONS.items()}
    for short, name in (BINARY | {"matmul": "matmul"}).items():
        forward, reflected, in_place = _binary(name)
        methods |= {f"__{short}__": forward, f"__r{short}__": reflected}
        if short in BINARY:
            methods[f"__i{short}__"] = in_place
    for short, name in UNARY.items():
        methods[f"__{short}__"] = lambda self, name=name: getattr(cupy, name)(self)
    return methods


def array(
    obj: Any,
    dtype: Any = None,
    copy: bool | None = True,
    order: str | None = "K",
    subok: bool = False,
    ndmin: int = 0,
    blocking: bool = False,
) -> Any:
    """`cupy.array`, and what `cupy.asarray` calls; NumPy arrays are welcome here."""
    import cupy

    order = order or "K"
    if subok:
        raise NotImplementedError  # as CuPy itself
    if isinstance(obj, cupy.ndarray):
        result = obj._astype(dtype or obj.dtype, order=order, copy=copy)
        return result.reshape((1,) * (ndmin - result.ndim) + result.shape) if result.ndim < ndmin else result
    if _holds_arrays(obj):
        operations["concatenate"] += 1
        return _device(np.array(_host(obj), dtype, ndmin=ndmin))
    host = np.array(obj, dtype, copy=None, ndmin=ndmin)
    fortran = order == "F" or (order in "KA" and isinstance(obj, np.ndarray) and obj.flags.fnc)
    result = cupy.ndarray(host.shape, host.dtype.newbyteorder("="), order="F" if fortran else "C")
    if result.size:
        operations["set"] += 1
        to_numpy(result)[...] = host
    return result


def _holds_arrays(value: Any) -> bool:
    import cupy

    if isinstance(value, (list, tuple)):
        return any(map(_holds_arrays, value))
    return isinstance(value, cupy.ndarray)


def concatenate(arrays: Any, axis: int, out: Any = None, dtype: Any = None, casting: str = "same_kind") -> Any:
    import cupy

    if not all(isinstance(array, cupy.ndarray) for array in arrays):
        raise TypeError("Only cupy arrays can be concatenated")
    operations["concatenate"] += 1
    result = np.concatenate(_host(list(arrays)), axis, _host(out), dtype=dtype, casting=casting)
    return _device(result) if out is None else out
