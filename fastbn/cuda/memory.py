"""CuPy arrays as kernels take them: addresses, strides and types; results with their scratch; what overlaps what."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from fastbn.cuda import launch, problems
from fastbn.cuda.plans import Plan
from fastbn.cuda.problems import Problem, Strides
from fastbn.layout import Layout
from fastbn.operands import Operand

cupy = launch.cupy

Array = Any  # cupy.ndarray

_TYPES = {"float16": 0, "bfloat16": 1, "float32": 2, "float64": 3}
_WEIGHTS = {"bool": 1, "float64": 2, "float32": 3}
_known_types: dict[Any, int] = {}


def type_of(dtype: Any) -> int:
    """The kernels' number for a dtype (``dtype.name`` alone takes a microsecond)."""
    known = _known_types.get(dtype)
    if known is None:
        known = _known_types[dtype] = _TYPES[dtype.name]
    return known


def strides_of(o: Operand) -> Strides:
    """Strides in elements; 0 where there is one element, so that arrays of one layout have one plan."""
    itemsize = o.dtype.itemsize
    return tuple(s // itemsize if n > 1 else 0 for s, n in zip(o.strides, o.shape, strict=True))


def problem_of(
    arrays: dict[str, Operand | None], weight: Operand | None, types: dict[str, Any] | None = None,
    relu: int = 0, residual: bool = False, eps: float = 0.0, **options: bool,
) -> Problem:  # fmt: skip
    """The description of calls: all that a plan depends on. Types are those of per-channel numbers."""
    present = {name: o for name, o in arrays.items() if o is not None}
    first = next(iter(present.values()))
    return Problem(
        device=launch.device(first.device),
        shape=first.shape,
        dtype=type_of(first.dtype),
        itemsize=first.dtype.itemsize,
        operands=tuple((name, problems.Placement(strides_of(o), o.offset)) for name, o in present.items()),
        weight=0 if weight is None else _WEIGHTS[weight.dtype.name],
        weight_strides=() if weight is None else strides_of(weight),
        types=tuple((name, type_of(dtype)) for name, dtype in (types or {}).items() if dtype is not None),
        relu=int(relu),
        residual=residual,
        options=tuple((name, int(value)) for name, value in options.items()),
        eps=eps,
    )


def place(a: Array) -> tuple[int, int]:
    """Device, and offset of the address from a multiple of 16 bytes."""
    return a.data.device_id, a.data.ptr % 16


def results_of(plan: Plan, rows: int, kept: int) -> tuple[list[str], Callable[[], tuple[list[Array], list[int]]]]:
    """The pointers to a plan's results and scratch, and what makes these in one allocation.

    It gives rows of float64 results, one number for every kept index, and the addresses of the pointers.
    """
    row, ndarray, shape, alloc = kept * 8, cupy.ndarray, (kept,), cupy.cuda.alloc
    scratch = {"partials": plan.partials * 8, "counters": plan.counters}
    pointers, starts, nbytes = ["results"], [], rows * row
    for name, size in scratch.items():
        if size:
            pointers.append(name)
            starts.append(nbytes)
            nbytes += size
    others = [i * row for i in range(1, rows)]

    def make() -> tuple[list[Array], list[int]]:
        memory = alloc(nbytes)
        start = memory.ptr
        results, addresses = [ndarray(shape, float, memory)], [start]
        for at in others:
            results.append(ndarray(shape, float, memory + at))
        for at in starts:
            addresses.append(start + at)
        return results, addresses

    return pointers, make


def collapsed_view(layout: Layout, a: Array) -> Array | None:
    """An array as kernels see it; None where that takes a copy."""
    view = a.transpose(layout.order)
    try:
        view.shape = layout.collapsed
    except (AttributeError, ValueError):  # as the library's version has it
        return None
    return view


def alike(a: Array) -> Array:
    """In its order and without gaps; in its memory, which costs none."""
    strides, step = [0] * a.ndim, a.itemsize
    for axis in sorted(range(a.ndim), key=lambda axis: (abs(a.strides[axis]), -axis)):
        strides[axis] = step
        step *= a.shape[axis]
    return cupy.ndarray(a.shape, a.dtype, a.data, tuple(strides))


def allocator(a: Array) -> Callable[[Array], Array]:
    """What makes results like arrays that lie like this one, of which nothing is kept."""
    ndarray, alloc, shape, dtype = cupy.ndarray, cupy.cuda.alloc, a.shape, a.dtype
    if a.flags.c_contiguous:
        return lambda _: ndarray(shape, dtype)
    strides, nbytes = alike(a).strides, a.nbytes
    return lambda _: ndarray(shape, dtype, alloc(nbytes), strides)


def reads(view: Array) -> bool:
    """Whether kernels can walk a collapsed array: whatever its strides."""
    return True


def reads_slabs(views: Sequence[Array]) -> bool:
    """They have no such form."""
    return False


def _extent(a: Array) -> tuple[int, int]:
    """The addresses of an array's first byte in memory and of the one behind its last."""
    start: int = a.data.ptr
    if a.flags.c_contiguous:
        return start, start + a.nbytes
    reach = [(n - 1) * s for n, s in zip(a.shape, a.strides, strict=True)]
    return start + sum(r for r in reach if r < 0), start + sum(r for r in reach if r > 0) + a.itemsize


class _Shadow:
    """The extent of a device array as NumPy sees it, for questions about addresses; never read."""

    def __init__(self, a: Array) -> None:
        self.__array_interface__ = {
            "version": 3,
            "shape": a.shape,
            "strides": a.strides,
            "typestr": f"|V{a.itemsize}",
            "data": (a.data.ptr, False),
        }


_shares_memory: Any = np.shares_memory


def disjoint(out: Array, *others: Array | None) -> bool:
    low, high = _extent(out)
    for a in others:
        if a is not None and a is not out:
            first, end = _extent(a)
            if first < high and low < end:
                return False
    return True


def overlap(a: Array, b: Array) -> bool:
    """Whether two arrays share memory; yes where that is too hard to decide."""
    (low, high), (first, end) = _extent(a), _extent(b)
    if high <= first or end <= low or a.size == 0 or b.size == 0:
        return False
    try:
        return bool(_shares_memory(np.asarray(_Shadow(a)), np.asarray(_Shadow(b)), max_work=1000))
    except np.exceptions.TooHardError:
        return True


def same_or_apart(a: Array, b: Array) -> bool:
    """Whether each element of `a` lies where the same element of `b` does, or the arrays share no memory."""
    return (a.data.ptr == b.data.ptr and a.strides == b.strides and a.shape == b.shape) or not overlap(a, b)
