"""How arrays are cut that kernels cannot walk as a whole (`fastbn.pieces`)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any, NamedTuple

from fastbn.backend import Backend
from fastbn.layout import Layout, Shape, layout_in_slabs, layout_of

OF_A_ROW = 64  # bytes of parameters, and of what kernels make of them, for each index that a piece keeps
AT_LEAST = 16  # pieces in an array that is cut: from 2 MB on the CPU, copying takes longer than what pieces share
LEAST_IN_SLABS = 64 << 10  # bytes; to copy less takes 10 us, and no kernels of their own
SHARE, LITTLE = 64, 256 << 10  # a piece's parameters may take 1 / SHARE of x's bytes, or LITTLE bytes if that is more


class Cut(NamedTuple):
    axes: Shape
    """Along which arrays are cut, outermost first: into slices of one index, along the last one of ``step``."""
    step: int
    kept: frozenset[int]
    """Axes that kernels take as kept."""
    strides: tuple[Shape, ...]
    """Of the array from which the layout of pieces comes; or of all, in slabs."""
    slabs: bool = False

    def layout(self, shape: Shape) -> Layout:
        """Of a piece."""
        layout = layout_in_slabs(shape, self.strides, self.kept) if self.slabs else None
        return layout or layout_of(shape, self.strides[0], self.kept)

    def indices(self, shape: Shape) -> Iterator[tuple[slice, ...]]:
        """Of each piece."""
        steps = [1] * (len(self.axes) - 1) + [self.step] * bool(self.axes)
        for starts in product(*(range(0, shape[axis], step) for axis, step in zip(self.axes, steps, strict=True))):
            index = [slice(None)] * len(shape)
            for axis, start, step in zip(self.axes, starts, steps, strict=True):
                index[axis] = slice(start, min(start + step, shape[axis]))
            yield tuple(index)


def is_cut(backend: Backend, layout: Layout, x: Any) -> bool:
    """Whether batch norm of x alone goes in pieces."""
    return walked_by(backend, layout, [x]) is None and cut_of(backend, layout.kept, [x]) is not None


def walked_by(backend: Backend, layout: Layout, arrays: Sequence[Any]) -> Layout | None:
    """The layout by which kernels walk all arrays where they lie: the first one's own, or in slabs; or None."""
    if all(walks(backend, layout, a) for a in arrays):
        return layout
    if arrays[0].nbytes < LEAST_IN_SLABS:
        return None
    slabs = in_slabs(backend, layout.kept, arrays)
    return slabs if slabs is not None and slabs.kept_axes() == layout.kept_axes() else None


def cut_of(backend: Backend, kept: frozenset[int], arrays: Sequence[Any]) -> Cut | None:
    """How arrays of one shape are cut; None where they are so small that copying them costs little."""
    x = arrays[0]
    size, least = x.size * x.dtype.itemsize, backend.LEAST_PIECE
    if size < AT_LEAST * least or not (x.dtype.isnative and getattr(x.flags, "aligned", True)):
        return None
    order = sorted(range(x.ndim), key=lambda axis: -abs(x.strides[axis]))
    for n in range(x.ndim):
        axes = tuple(order[:n])
        shape = tuple(1 if axis in axes else size for axis, size in enumerate(x.shape))
        if math.prod(shape) * x.dtype.itemsize < least:
            break
        pieces = [a[tuple(slice(size) for size in shape)] for a in arrays]
        if in_slabs(backend, kept, pieces) is not None:
            return Cut(axes, 1, kept, tuple(a.strides for a in arrays), slabs=True)
        reduced = [axis for axis in order[n:] if axis not in kept]
        for m in range(max(1, len(reduced))):
            together = kept.union(reduced[:m])
            for a in pieces:
                if all(walks(backend, layout_of(shape, a.strides, together), b) for b in pieces):
                    return _with_few_rows(Cut(axes, 1, together, (a.strides,)), x, order, shape, least)
    return _copied(x, kept, order, least)


def _with_few_rows(cut: Cut, x: Any, order: list[int], shape: Shape, least: int) -> Cut:
    """The same, cut further where parameters of its rows would take much memory."""
    room = max(x.size * x.dtype.itemsize // SHARE, LITTLE)
    taken = OF_A_ROW * math.prod(shape[axis] for axis in cut.kept)
    axis = order[len(cut.axes)]
    if taken <= room or axis not in cut.kept:
        return cut
    of_one = max(1, math.prod(shape) // shape[axis] * x.dtype.itemsize)
    most = max(1, shape[axis] * room // taken, -(-least // of_one))
    return cut._replace(axes=(*cut.axes, axis), step=-(-shape[axis] // -(-shape[axis] // most)))


def _copied(x: Any, kept: frozenset[int], order: list[int], least: int) -> Cut:
    """Pieces of about so many bytes, which are copied one after the other."""
    of_one, axes = x.size * x.dtype.itemsize, []
    for axis in order:
        axes.append(axis)
        of_one //= x.shape[axis]
        if of_one <= least:
            break
    return Cut(tuple(axes), max(1, least // max(1, of_one)), kept, (x.strides,))


def in_slabs(backend: Backend, kept: frozenset[int], arrays: Sequence[Any]) -> Layout | None:
    """The layout in slabs of arrays of one shape, if kernels walk them so."""
    layout = layout_in_slabs(arrays[0].shape, tuple(a.strides for a in arrays), kept)
    views = [] if layout is None else [backend.collapsed_view(layout, a) for a in arrays]
    return layout if views and all(v is not None for v in views) and backend.reads_slabs(views) else None


def walks(backend: Backend, layout: Layout, a: Any) -> bool:
    """Whether kernels read and write an array where it lies."""
    view = backend.collapsed_view(layout, a)
    return view is not None and backend.reads(view)
