"""Axes to the flat view that kernels see: ``(batch, outer, channel, inner)``.

The axes of an array, ordered as they lie in memory, fall into alternating groups of kept and reduced axes. Kernels see
four groups: batch and channel are kept, outer and inner are reduced, and absent groups have size 1::

    NCHW, channel_axis=1          (1, N, C, HW)
    NHWC, channel_axis=-1         (1, NHW, C, 1)
    NCHW, channel_axis=(0, 1)     (1, 1, NC, HW)      instance norm
    NHWC, channel_axis=(0, 3)     (N, HW, C, 1)       instance norm

The order is derived once, from ``x``, and applied to every array of the call. Collapsing an array is a transpose and a
reshape. Kernels walk the groups by strides of their own, so the groups need not lie in this order: where the axes of a
group do not collapse into one, as in a spatial slice, they are two groups if two are left::

    NCHW, channel_axis=(0, 1), x[:, :, 1:-1, 1:-1]    (1, H, NC, W)

Where the kept axes are one group and up to four of reduced axes are left, each channel has *slabs*, which some kernels
walk: far, near, outer, channel and inner::

    NCHW, channel_axis=1, x[:, :, 1:-1, 1:-1]         (N, 1, H, C, W)
    NHWC, channel_axis=-1, x[:, 1:-1, 1:-1]           (N, H, W, C, 1)
    NCDHW, x[:, :, 1:-1, 1:-1, 1:-1]                  (N, D, H, C, W)

`fastbn.pieces` takes apart what has more.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, NamedTuple

Shape = tuple[int, ...]


class Layout(NamedTuple):
    """How the axes of one array fall into the four groups; made by `layout_of` or `layout_in_slabs`."""

    order: Shape
    """The axes as kernels see them."""
    collapsed: Shape
    """Sizes of batch, outer, channel and inner; in slabs, of far, near, outer, channel and inner."""
    kept_shape: Shape
    """Sizes of the kept axes in the array's own order: the shape of parameters and statistics."""
    kept_order: Shape | None
    """The kept axes as kernels see them, numbered among themselves; None where that is their own order."""
    kept: frozenset[int]

    def collapse(self, a: Any) -> Any:
        """The array as ``(batch, outer, channel, inner)``: a view where strides allow it, else a copy."""
        return a.transpose(self.order).reshape(self.collapsed)

    def collapse_weight(self, xp: Any, weight: Any, shape: Shape) -> Any:
        """A weight that broadcasts to ``shape``, contiguous, with size 1 for batch and channel if it has it there."""
        full = any(weight.shape[axis] != 1 for axis in self.kept)
        target = tuple(size if full or axis not in self.kept else 1 for axis, size in enumerate(shape))
        _batch, outer, _channel, inner = self.collapsed
        collapsed = self.collapsed if full else (1, outer, 1, inner)
        collapsed_weight = xp.broadcast_to(weight, target).transpose(self.order).reshape(collapsed)
        # One byte an element where a mask may be as large as x; else one kind of weight is enough to compile for.
        return xp.ascontiguousarray(collapsed_weight, dtype=None if full else xp.float64)

    def expand(self, collapsed: Any, into: Any) -> None:
        """Write a collapsed result into an array of the original shape."""
        target = into.transpose(self.order)
        target[...] = collapsed.reshape(target.shape)

    def laid_out(self, xp: Any, parameter: Any) -> Any:
        """A parameter that broadcasts to the kept shape, with the kept axes as kernels see them."""
        if parameter.shape != self.kept_shape:
            parameter = xp.broadcast_to(parameter, self.kept_shape)
        return parameter if self.kept_order is None else parameter.transpose(self.kept_order)

    def vector(self, xp: Any, parameter: Any) -> Any:
        """The same as a float64 vector of its own axes' product."""
        return self.laid_out(xp, parameter).astype(xp.float64, order="C", copy=False).reshape(-1)

    def kept_axes(self) -> Shape:
        """As kernels see them: the order of vectors of parameters."""
        return tuple(axis for axis in self.order if axis in self.kept)

    def kept_array(self, xp: Any, vector: Any) -> Any:
        """A kernel's result vector in the kept shape, C-contiguous."""
        if self.kept_order is None:
            return vector if vector.shape == self.kept_shape else vector.reshape(self.kept_shape)
        sizes = [self.kept_shape[axis] for axis in self.kept_order]
        inverse = sorted(range(len(sizes)), key=self.kept_order.__getitem__)
        return xp.ascontiguousarray(vector.reshape(sizes).transpose(inverse))


@lru_cache(maxsize=4096)
def layout_of(shape: Shape, strides: Shape, kept: frozenset[int]) -> Layout:
    """The layout of an array of this shape and these strides whose axes ``kept`` are kept."""
    # Broadcast axes (stride 0) go outermost: there they cost nothing, inside they would break contiguous runs.
    order = sorted(range(len(shape)), key=lambda axis: -abs(strides[axis]) if strides[axis] else -math.inf)
    order, sizes = _grouped(order, shape, strides, kept)
    kept_axes = sorted(kept)
    kept_order = tuple(kept_axes.index(axis) for axis in order if axis in kept)
    return Layout(
        order=tuple(order),
        collapsed=sizes if 0 not in shape else _empty(shape, kept),
        kept_shape=tuple(shape[axis] for axis in kept_axes),
        kept_order=None if kept_order == tuple(range(len(kept_order))) else kept_order,
        kept=kept,
    )


@lru_cache(maxsize=4096)
def layout_in_slabs(shape: Shape, strides: tuple[Shape, ...], kept: frozenset[int]) -> Layout | None:
    """The layout in slabs of arrays of these strides, or None; whether they may be read so, their views say."""
    order = sorted(range(len(shape)), key=lambda axis: -abs(strides[0][axis]))
    views = _neighbours(order, shape, kept, *strides)
    channels = [group for group in views if group[0] in kept]
    reduced = [group for group in views if group[0] not in kept]
    inner = reduced.pop() if reduced and views[-1] is reduced[-1] else []
    if len(channels) > 1 or not 1 <= len(reduced) <= 3:
        return None
    *slabs, outer = reduced
    far, near = [*slabs, [], []][:2]
    groups = [far, near, outer, channels[0] if channels else [], inner]
    placed = {axis for group in groups for axis in group}
    axes = [axis for axis in order if axis not in placed] + [axis for group in groups for axis in group]
    kept_axes = sorted(kept)
    kept_order = tuple(kept_axes.index(axis) for axis in axes if axis in kept)
    return Layout(
        order=tuple(axes),
        collapsed=tuple(math.prod(shape[axis] for axis in group) for group in groups),
        kept_shape=tuple(shape[axis] for axis in kept_axes),
        kept_order=None if kept_order == tuple(range(len(kept_order))) else kept_order,
        kept=kept,
    )


def _grouped(order: list[int], shape: Shape, strides: Shape, kept: frozenset[int]) -> tuple[list[int], Shape]:
    """Axes in the order of the four groups, and the groups' sizes."""
    together = _neighbours(order, shape, kept)
    views = _neighbours(order, shape, kept, strides)
    if len(views) > len(together) and (groups := _in_any_order(views, kept)) is not None:
        placed = {axis for group in groups for axis in group}
        order = [axis for axis in order if axis not in placed] + [axis for group in groups for axis in group]
        return order, tuple(math.prod(shape[axis] for axis in group) for group in groups)
    if len(together) > 4 or (len(together) == 4 and together[0][0] not in kept):
        fastest_is_kept = together[-1][0] in kept
        order.sort(key=lambda axis: (axis in kept) == fastest_is_kept)
        together = _neighbours(order, shape, kept)
    sizes = [math.prod(shape[axis] for axis in group) for group in together]
    # Absent groups: an array that ends in kept axes has no inner group, one that starts with reduced ones no batch.
    if together and together[-1][0] in kept:
        sizes.append(1)
    return order, (1,) * (4 - len(sizes)) + tuple(sizes)


def _neighbours(order: list[int], shape: Shape, kept: frozenset[int], *strides: Shape) -> list[list[int]]:
    """Neighbouring axes of one kind, together; given strides of arrays, only those that one stride walks in each.

    Axes of size 1 belong anywhere and are left out.
    """
    together: list[list[int]] = []
    for axis in order:
        if shape[axis] == 1:
            continue
        last = together[-1][-1] if together else None
        if (
            last is not None
            and (last in kept) == (axis in kept)
            and all(of_one[last] == shape[axis] * of_one[axis] for of_one in strides)
        ):
            together[-1].append(axis)
        else:
            together.append([axis])
    return together


def _in_any_order(views: list[list[int]], kept: frozenset[int]) -> tuple[list[int], ...] | None:
    """Batch, outer, channel and inner of groups that are views each, however they alternate; None if there are more."""
    of_kept = [group for group in views if group[0] in kept]
    reduced = [group for group in views if group[0] not in kept]
    inner = reduced.pop() if views[-1][0] not in kept else []
    if len(of_kept) > 2 or len(reduced) > 1:
        return None
    channel = of_kept.pop() if of_kept else []
    return (of_kept or [[]])[0], (reduced or [[]])[0], channel, inner


def _empty(shape: Shape, kept: frozenset[int]) -> Shape:
    """The collapsed shape of an array without elements."""
    channels = math.prod(shape[axis] for axis in kept)
    return 1, math.prod(size for axis, size in enumerate(shape) if axis not in kept), channels, 1
