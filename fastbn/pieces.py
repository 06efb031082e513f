"""Batch norm of arrays that kernels cannot walk as a whole: in pieces, so that nothing is copied, or a piece at a time.

An array is cut along its outermost axes. In a piece some reduced axes are *repeated*: kernels take them as kept, so
that each of their indices gets the same parameters, and sums of its own, which are added up here. Images without their
border go in one piece where channels come first, and in one for each image where they come last::

    NCHW, x[:, :, 1:-1, 1:-1]      N is repeated                  (1, H, NC, W)
    NHWC, x[:, 1:-1, 1:-1]         cut along N; H is repeated     (H, W, C, 1)

Statistics are those of `direct_reductions`, whose kernel walks any strides.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from typing import Any, NamedTuple

from fastbn import direct_reductions
from fastbn.backend import Backend
from fastbn.formulas import batch_rstd, rounded, rstd_with
from fastbn.layout import Layout, Shape, layout_of
from fastbn.operands import Affine, Numbers, Operand, dense
from fastbn.ways import Ways, WaysToPieces, arriving

OF_A_ROW = 64  # bytes of parameters, and of what kernels make of them, for each index that a piece keeps
AT_LEAST = 16  # pieces in an array that is cut: from 2 MB on the CPU, copying takes longer than what pieces share
SHARE, LITTLE = 64, 256 << 10  # of these a piece takes such a part of x, or so many bytes


class Cut(NamedTuple):
    axes: Shape
    """Along which arrays are cut, outermost first: into slices of one index, along the last one of ``step``."""
    step: int
    kept: frozenset[int]
    """Axes that kernels take as kept."""
    strides: Shape
    """Of the array from which the layout of pieces comes."""

    def indices(self, shape: Shape) -> Iterator[tuple[slice, ...]]:
        """Of each piece."""
        steps = [1] * (len(self.axes) - 1) + [self.step] * bool(self.axes)
        for starts in product(*(range(0, shape[axis], step) for axis, step in zip(self.axes, steps, strict=True))):
            index = [slice(None)] * len(shape)
            for axis, start, step in zip(self.axes, starts, steps, strict=True):
                index[axis] = slice(start, min(start + step, shape[axis]))
            yield tuple(index)


def kernels_for(
    ways: Ways, weight: Operand | None, read: Sequence[Any], written: Sequence[Any]
) -> tuple[Backend | Pieces, Ways]:
    """The backend, or what calls it in pieces; and the ways of arrays to it.

    The first of the arrays is x; one that is None is absent, or written into a new array.
    """
    backend, x = ways.backend, read[0]
    arrays = [a for a in read if a is not None] + [backend.alike(x) if a is None else a for a in written]
    if weight is not None or all(_walks(backend, ways.layout, a) for a in arrays):
        return backend, ways
    cut = cut_of(backend, ways.layout.kept, arrays)
    if cut is None:
        return backend, ways
    return Pieces(backend, ways.layout, cut), WaysToPieces(backend, ways.layout, x)


def is_cut(backend: Backend, layout: Layout, x: Any) -> bool:
    """Whether batch norm of x alone goes in pieces."""
    return not _walks(backend, layout, x) and cut_of(backend, layout.kept, [x]) is not None


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
        reduced = [axis for axis in order[n:] if axis not in kept]
        for m in range(max(1, len(reduced))):
            together = kept.union(reduced[:m])
            for a in pieces:
                if all(_walks(backend, layout_of(shape, a.strides, together), b) for b in pieces):
                    return _with_few_rows(Cut(axes, 1, together, a.strides), x, order, shape, least)
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
    return Cut(tuple(axes), max(1, least // max(1, of_one)), kept, x.strides)


def _walks(backend: Backend, layout: Layout, a: Any) -> bool:
    """Whether kernels read and write an array where it lies."""
    view = backend.folded_view(layout, a)
    return view is not None and backend.reads(view)


OfPiece = Callable[..., Any]
"""``run(read, vectors, written)`` of one piece: lists of arrays, parameters and arrays."""


class Pieces:
    """The part of the contract `fastbn.backend.Backend` that batch norm takes, for arrays in the caller's shape."""

    def __init__(self, backend: Backend, layout: Layout, cut: Cut) -> None:
        self._backend, self._layout, self._cut = backend, layout, cut

    # --- the contract ---

    def moments(self, x: Operand, weight: Operand | None) -> Callable[..., tuple[Any, ...]]:
        return self._moments(x, 0.0)

    def normalize(
        self, x: Operand, y: Operand, residual: Operand | None, parameters: Affine, eps: float | None, relu: bool
    ) -> Callable[..., None]:
        def prepare(x: Operand, residual: Operand | None, y: Operand) -> OfPiece:
            run = self._backend.normalize(x, y, residual, parameters, eps, relu)
            return lambda read, vectors, written: run(*read, *written, *vectors)

        each = OfEachPiece(self._backend, self._layout, self._cut, prepare)

        def run(x: Any, residual: Any, y: Any, *vectors: Any) -> None:
            for _ in each([x, residual], vectors, [y]):
                pass

        return run

    def forward(
        self, x: Operand, weight: Operand | None, y: Operand, residual: Operand | None, gamma: Any, beta: Any,
        eps: float, relu: bool, running: tuple[Any, Any] | None,
    ) -> Callable[..., tuple[Any, ...]]:  # fmt: skip
        float64 = self._backend.xp.dtype(float)
        moments = self._moments(x, eps)
        normalize = self.normalize(x, y, residual, Affine(float64, float64, gamma, beta), None, relu)
        update = None
        if running is not None:
            types, kept = (*running, *(float64,) * 3, *running), math.prod(self._layout.kept_shape)
            update = self._backend.update_running(kept, types, False, False)

        def run(x: Any, weight: Any, gamma: Any, beta: Any, residual: Any, y: Any, *running: Any) -> tuple[Any, ...]:
            count, mean, m2, rstd = moments(x, None)
            normalize(x, residual, y, mean, rstd, gamma, beta)
            if update is not None:
                *both, rate, correction = running
                update(*both, count, mean, m2, *both, rate, correction)
            return count, mean, m2, rstd

        return run

    def grad_sums(
        self, dy: Operand, x: Operand, y: Operand | None, weight: Operand | None, mean: Any, rstd: Any
    ) -> Callable[..., tuple[Any, Any]]:
        def prepare(dy: Operand, x: Operand, y: Operand | None) -> OfPiece:
            run = self._backend.grad_sums(dy, x, y, None, mean, rstd)
            return lambda read, vectors, written: run(*read, None, *vectors)

        each = OfEachPiece(self._backend, self._layout, self._cut, prepare)
        return lambda dy, x, y, weight, *vectors: self._added_up(x.shape, each([dy, x, y], vectors, []))

    def grad_input(
        self, dy: Operand, x: Operand, y: Operand | None, weight: Operand | None, numbers: Numbers,
        sums: tuple[Any, Any], dx: Operand, dresidual: Operand | None,
    ) -> Callable[..., None]:  # fmt: skip
        def prepare(dy: Operand, x: Operand, y: Operand | None, dx: Operand, dresidual: Operand | None) -> OfPiece:
            run = self._backend.grad_input(dy, x, y, None, numbers, sums, dx, dresidual)
            return lambda read, vectors, written: run(*read, None, *vectors, *written)

        each = OfEachPiece(self._backend, self._layout, self._cut, prepare)

        def run(dy: Any, x: Any, y: Any, weight: Any, *others: Any) -> None:
            for _ in each([dy, x, y], others[:-2], others[-2:]):
                pass

        return run

    def backward(
        self, dy: Operand, x: Operand, y: Operand | None, weight: Operand | None, numbers: Numbers, frozen: bool,
        dx: Operand, dresidual: Operand | None, dtype: Any,
    ) -> Callable[..., tuple[Any, Any]]:  # fmt: skip
        float64 = self._backend.xp.dtype(float)
        if dtype != float64:
            return rounded(self.backward(dy, x, y, weight, numbers, frozen, dx, dresidual, float64), dtype)
        if not frozen:
            sums = self.grad_sums(dy, x, y, None, numbers.mean, numbers.rstd)
            grad_input = self.grad_input(dy, x, y, None, numbers, (float64, float64), dx, dresidual)

            def run(dy: Any, x: Any, y: Any, weight: Any, *others: Any) -> tuple[Any, Any]:
                vectors, written = others[:-2], others[-2:]
                dgamma, dbeta = sums(dy, x, y, None, *vectors[:2])
                grad_input(dy, x, y, None, *vectors, dgamma, dbeta, *written)
                return dgamma, dbeta

            return run

        def prepare(dy: Operand, x: Operand, y: Operand | None, dx: Operand, dresidual: Operand | None) -> OfPiece:
            run = self._backend.backward(dy, x, y, None, numbers, True, dx, dresidual, float64)
            return lambda read, vectors, written: run(*read, None, *vectors, *written)

        each = OfEachPiece(self._backend, self._layout, self._cut, prepare)
        return lambda dy, x, y, weight, *others: self._added_up(x.shape, each([dy, x, y], others[:-2], others[-2:]))

    # --- what the pieces have in common ---

    def _moments(self, of_x: Operand, eps: float) -> Callable[..., tuple[Any, ...]]:
        """Of the whole array, with the bits that x by itself has."""
        backend, layout, xp = self._backend, self._layout, self._backend.xp
        walked: list[Callable[..., Any]] = []
        in_any_strides: list[Callable[..., Any]] = []

        def prepare(x: Any) -> None:
            if _walks(backend, layout, x):  # it is another array that is not
                walked.append(backend.moments(Ways(backend, layout, x).data(x)[0], None))
            elif (found := direct_reductions.moments(x, None, None, layout.kept)) is not None:
                in_any_strides.append(found)

        def run(x: Any, weight: Any) -> tuple[Any, ...]:
            if not walked and not in_any_strides:
                prepare(x)
            if walked:
                count, mean, m2, rstd = walked[0](x, None)
                return count, mean, m2, rstd_with(xp, rstd, eps)
            if in_any_strides and (moments := in_any_strides[0](x, None, None)) is not None:
                count, mean, m2 = (layout.vector(xp, a) for a in moments)
                return count, mean, m2, batch_rstd(count, m2, eps)
            # Squares left the range of float64: rare enough for a copy.
            folded = xp.ascontiguousarray(layout.fold(x))
            count, mean, m2, rstd = backend.moments(dense(layout.folded, x.dtype, of_x.device), None)(folded, None)
            return count, mean, m2, rstd_with(xp, rstd, eps)

        return run

    def _added_up(self, shape: Shape, results: Iterator[tuple[Any, Layout, Any]]) -> tuple[Any, Any]:
        """Sums of all pieces, in their order, as vectors."""
        xp, kept = self._backend.xp, self._layout.kept
        repeated = tuple(axis for axis in range(len(shape)) if axis not in kept)
        totals = xp.zeros((2, *(size if axis in kept else 1 for axis, size in enumerate(shape))))
        for index, layout, sums in results:
            sizes = iter(layout.kept_shape)
            of_piece = tuple(next(sizes) if axis in layout.kept else 1 for axis in range(len(shape)))
            place = tuple(part if axis in kept else slice(None) for axis, part in enumerate(index))
            for total, vector in zip(totals, sums, strict=True):
                total[place] += layout.kept_array(xp, vector).reshape(of_piece).sum(axis=repeated, keepdims=True)
        dgamma, dbeta = (self._layout.vector(xp, total.reshape(self._layout.kept_shape)) for total in totals)
        return dgamma, dbeta


class OfEachPiece:
    """``each(read, vectors, written)`` runs what is prepared on every piece of arrays, which may be None.

    ``prepare(*operands)`` is called once for all pieces that lie alike.
    """

    def __init__(self, backend: Backend, layout: Layout, cut: Cut, prepare: Callable[..., OfPiece]) -> None:
        self._backend, self._layout, self._cut, self._prepare = backend, layout, cut, prepare
        self._varies = any(axis in layout.kept for axis in cut.axes)  # whether parameters do from piece to piece
        self._prepared: dict[Any, tuple[Layout, Any, OfPiece]] = {}

    def __call__(
        self, read: Sequence[Any], vectors: Sequence[Any], written: Sequence[Any]
    ) -> Iterator[tuple[tuple[slice, ...], Layout, Any]]:
        """Gives the index, the layout and the results of each piece."""
        arrays, first = [*read, *written], len(read)
        shape = next(a.shape for a in arrays if a is not None)
        whole = [None if v is None else self._in_all_axes(v, shape) for v in vectors]
        spread, spread_for = whole, None
        for index in self._cut.indices(shape):
            views = [None if a is None else a[index] for a in arrays]
            layout, arrive, run = self._run_for(views, first, math.prod(shape))
            if self._varies or spread_for is not layout:
                spread, spread_for = [None if v is None else self._spread(v, index, layout) for v in whole], layout
            given = views if arrive is None else arrive(*views)
            result = run(given[:first], spread, given[first:])
            for view, a in zip(views[first:], given[first:], strict=True):
                if view is not a:
                    layout.unfold(a, view)
            yield index, layout, result

    def _run_for(self, views: list[Any], first: int, size: int) -> tuple[Layout, Any, OfPiece]:
        key = tuple(None if a is None else (a.shape, self._backend.place(a)) for a in views)
        found = self._prepared.get(key)
        if found is None:
            shape = next(a.shape for a in views if a is not None)
            layout = layout_of(shape, self._cut.strides, self._cut.kept)
            ways = Ways(self._backend, layout, next(a for a in views if a is not None), size)
            both = [
                (None, None) if a is None else (ways.data(a) if i < first else ways.result(a, a))
                for i, a in enumerate(views)
            ]
            run = self._prepare(*(operand for operand, _ in both))
            found = self._prepared[key] = layout, arriving(*(way for _, way in both)), run
        return found

    def _in_all_axes(self, vector: Any, shape: Shape) -> Any:
        """A vector of parameters as an array with the dimensions of x."""
        kept = self._layout.kept_array(self._backend.xp, vector)
        return kept.reshape([size if axis in self._layout.kept else 1 for axis, size in enumerate(shape)])

    def _spread(self, numbers: Any, index: tuple[slice, ...], layout: Layout) -> Any:
        """Parameters of a piece as a vector, the same for each index of repeated axes."""
        xp, kept = self._backend.xp, self._layout.kept
        part = numbers[tuple(i if axis in kept else slice(None) for axis, i in enumerate(index))]
        part = part.reshape([size for axis, size in enumerate(part.shape) if axis in layout.kept])
        return xp.ascontiguousarray(layout.laid_out(xp, part)).reshape(-1)
