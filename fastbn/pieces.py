"""Batch norm of arrays that kernels cannot walk as a whole: in pieces, so that nothing is copied, or a piece at a time.

An array is cut along its outermost axes. In a piece some reduced axes are *repeated*: kernels take them as kept, so
that each of their indices gets the same parameters, and sums of its own, which are added up here. Images without their
border go in one piece where channels come first, and in one for each image where they come last::

    NCHW, x[:, :, 1:-1, 1:-1]      N is repeated                  (1, H, NC, W)
    NHWC, x[:, 1:-1, 1:-1]         cut along N; H is repeated     (H, W, C, 1)

Kernels of the CPU walk such arrays, and pieces, in slabs (`fastbn.layout`).

Statistics are x's own: where the backend walks x by itself they are its moments, else those of `direct_reductions`,
whose kernel walks any strides.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from fastbn import direct_reductions
from fastbn.backend import Backend
from fastbn.call import Call, Once
from fastbn.cuts import Cut, cut_of, walked_by
from fastbn.formulas import batch_rstd, rstd_with
from fastbn.layout import Layout, Shape
from fastbn.operands import AffineTypes, GradientTypes, Operand, RunningTypes, dense
from fastbn.ways import Ways, WaysToPieces, arriving


def kernels_for(
    ways: Ways, weight: Operand | None, read: Sequence[Any], written: Sequence[Any]
) -> tuple[Backend | Pieces, Ways]:
    """The backend, or what calls it in pieces; and the ways of arrays to it.

    The first of the arrays is x; one that is None is absent, or written into a new array.
    """
    backend, x = ways.backend, read[0]
    arrays = [a for a in read if a is not None] + [backend.alike(x) if a is None else a for a in written]
    if weight is not None:
        return backend, ways
    layout = walked_by(backend, ways.layout, arrays)
    if layout is not None and layout == walked_by(backend, ways.layout, [x]):  # by which x itself has its moments
        return backend, ways if layout == ways.layout else Ways(backend, layout, x)
    cut = cut_of(backend, ways.layout.kept, arrays)
    if cut is None:
        return backend, ways
    return Pieces(backend, ways.layout, cut), WaysToPieces(backend, ways.layout, x)


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
        self, x: Operand, y: Operand, residual: Operand | None, parameters: AffineTypes, eps: float | None, relu: bool
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
        normalize = self.normalize(x, y, residual, AffineTypes(float64, float64, gamma, beta), None, relu)
        update = None
        if running is not None:
            types, kept = RunningTypes.in_place(running, float64), math.prod(self._layout.kept_shape)
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
        self, dy: Operand, x: Operand, y: Operand | None, weight: Operand | None, types: GradientTypes, recompute: bool
    ) -> Callable[..., tuple[Any, Any]]:
        def prepare(dy: Operand, x: Operand, y: Operand | None) -> OfPiece:
            run = self._backend.grad_sums(dy, x, y, None, types, recompute)
            return lambda read, vectors, written: run(*read, None, *vectors)

        each = OfEachPiece(self._backend, self._layout, self._cut, prepare)
        return lambda dy, x, y, weight, *vectors: self._added_up(each([dy, x, y], vectors, []))

    def grad_input(
        self, dy: Operand, x: Operand, y: Operand | None, weight: Operand | None, types: GradientTypes, recompute: bool,
        sums: tuple[Any, Any], dx: Operand, dresidual: Operand | None,
    ) -> Callable[..., None]:  # fmt: skip
        def prepare(dy: Operand, x: Operand, y: Operand | None, dx: Operand, dresidual: Operand | None) -> OfPiece:
            run = self._backend.grad_input(dy, x, y, None, types, recompute, sums, dx, dresidual)
            return lambda read, vectors, written: run(*read, None, *vectors, *written)

        each = OfEachPiece(self._backend, self._layout, self._cut, prepare)

        def run(dy: Any, x: Any, y: Any, weight: Any, *others: Any) -> None:
            for _ in each([dy, x, y], others[:-2], others[-2:]):
                pass

        return run

    def backward(
        self, dy: Operand, x: Operand, y: Operand | None, weight: Operand | None, types: GradientTypes, recompute: bool,
        frozen: bool, dx: Operand, dresidual: Operand | None,
    ) -> Callable[..., tuple[Any, Any]]:  # fmt: skip
        if not frozen and (self._cut.axes or self._cut.kept != self._layout.kept):
            sums = self.grad_sums(dy, x, y, None, types, recompute)
            float64 = self._backend.xp.dtype(float)
            grad_input = self.grad_input(dy, x, y, None, types, recompute, (float64, float64), dx, dresidual)

            def run(dy: Any, x: Any, y: Any, weight: Any, *others: Any) -> tuple[Any, Any]:
                vectors, written = others[:-2], others[-2:]
                dgamma, dbeta = sums(dy, x, y, None, *vectors)
                grad_input(dy, x, y, None, *vectors, dgamma, dbeta, *written)
                return dgamma, dbeta

            return run

        def prepare(dy: Operand, x: Operand, y: Operand | None, dx: Operand, dresidual: Operand | None) -> OfPiece:
            run = self._backend.backward(dy, x, y, None, types, recompute, frozen, dx, dresidual)
            return lambda read, vectors, written: run(*read, None, *vectors, *written)

        each = OfEachPiece(self._backend, self._layout, self._cut, prepare)
        return lambda dy, x, y, weight, *others: self._added_up(each([dy, x, y], others[:-2], others[-2:]))

    # --- what the pieces have in common ---

    def _moments(self, of_x: Operand, eps: float) -> Callable[..., tuple[Any, ...]]:
        """Of the whole array, with the bits that x by itself has."""
        backend, layout, xp = self._backend, self._layout, self._backend.xp

        def with_eps(count: Any, mean: Any, m2: Any, rstd: Any) -> tuple[Any, ...]:
            return count, mean, m2, rstd_with(xp, rstd, eps)

        def copying() -> Call:
            of_copies = backend.moments(dense(layout.collapsed, of_x.dtype, of_x.device), None)
            return lambda x: with_eps(*of_copies(xp.ascontiguousarray(layout.collapse(x)), None))

        copied = Once(copying)

        def prepare(x: Any) -> Call:
            own = walked_by(backend, layout, [x])
            if own is not None:  # it is another array that is not
                walked = backend.moments(Ways(backend, own, x).data(x)[0], None)
                return lambda x: with_eps(*walked(x, None))
            in_any_strides = direct_reductions.moments(x, None, None, layout.kept)
            if in_any_strides is None:
                return copied()

            def run(x: Any) -> tuple[Any, ...]:
                moments = in_any_strides(x, None, None)
                if moments is None:  # squares left the range of float64: rare enough for a copy
                    vectors: tuple[Any, ...] = copied()(x)
                    return vectors
                count, mean, m2 = (layout.vector(xp, a) for a in moments)
                return count, mean, m2, batch_rstd(count, m2, eps)

            return run

        prepared = Once(prepare)
        return lambda x, weight: prepared(x)(x)

    def _added_up(self, results: Iterator[tuple[tuple[slice, ...], PieceVectors, Any]]) -> tuple[Any, Any]:
        """Sums of all pieces, in their order, as vectors."""
        totals: Any = None
        for index, parameters, sums in results:
            of_piece = [parameters.added_up(vector) for vector in sums]
            if not self._cut.axes:
                totals = of_piece
                break
            if totals is None:
                totals = [self._backend.xp.zeros(parameters.sizes) for _ in sums]
            for total, part in zip(totals, of_piece, strict=True):
                total[parameters.place(index)] += part
        dgamma, dbeta = (total.reshape(-1) for total in totals)
        return dgamma, dbeta


class PieceVectors:
    """Vectors of an array's parameters beside those of a piece, each in the order of its layout."""

    def __init__(self, xp: Any, layout: Layout, shape: Shape, piece: Layout, of_piece: Shape) -> None:
        self._xp, self._axes, axes = xp, layout.kept_axes(), piece.kept_axes()
        self._order = sorted(range(len(self._axes)), key=lambda i: axes.index(self._axes[i]))
        self._back = [self._order.index(i) for i in range(len(self._order))]
        self._repeated = tuple(i for i, axis in enumerate(axes) if axis not in layout.kept)
        self._there = tuple(of_piece[axis] for axis in axes)
        self._unrepeated = tuple(of_piece[axis] if axis in layout.kept else 1 for axis in axes)
        self.sizes = tuple(shape[axis] for axis in self._axes)
        self._same = self._there == self.sizes and self._order == sorted(self._order) and not self._repeated

    def place(self, index: tuple[slice, ...]) -> tuple[slice, ...]:
        """Of the kept indices of a piece."""
        return tuple(index[axis] for axis in self._axes)

    def of_piece(self, vector: Any, index: tuple[slice, ...]) -> Any:
        """The same numbers for each index of repeated axes."""
        if vector is None or self._same:
            return vector
        numbers = vector.reshape(self.sizes)[self.place(index)].transpose(self._order)
        repeated = self._xp.empty(self._there, vector.dtype)
        repeated[...] = numbers.reshape(self._unrepeated)
        return repeated.reshape(-1)

    def added_up(self, vector: Any) -> Any:
        """Sums of a piece, over repeated axes, in the shape of the kept ones."""
        if self._same:
            return vector.reshape(self.sizes)
        return vector.reshape(self._there).sum(axis=self._repeated).transpose(self._back)


class OfEachPiece:
    """``each(read, vectors, written)`` runs what is prepared on every piece of arrays, which may be None.

    ``prepare(*operands)`` is called once for all pieces that lie alike.
    """

    def __init__(self, backend: Backend, layout: Layout, cut: Cut, prepare: Callable[..., OfPiece]) -> None:
        self._backend, self._layout, self._cut, self._prepare = backend, layout, cut, prepare
        self._varies = any(axis in layout.kept for axis in cut.axes)  # whether parameters do from piece to piece
        self._prepared: dict[Any, tuple[Layout, PieceVectors, Any, OfPiece]] = {}

    def __call__(
        self, read: Sequence[Any], vectors: Sequence[Any], written: Sequence[Any]
    ) -> Iterator[tuple[tuple[slice, ...], PieceVectors, Any]]:
        """Gives the index, the parameters and the results of each piece."""
        arrays, first = [*read, *written], len(read)
        shape = next(a.shape for a in arrays if a is not None)
        spread: list[Any] = []
        spread_for = None
        for index in self._cut.indices(shape):
            views = [None if a is None else a[index] for a in arrays] if self._cut.axes else arrays
            layout, parameters, arrive, run = self._run_for(views, first, shape)
            if self._varies or spread_for is not parameters:
                spread, spread_for = [parameters.of_piece(v, index) for v in vectors], parameters
            given = views if arrive is None else arrive(*views)
            result = run(given[:first], spread, given[first:])
            if arrive is not None:
                for view, a in zip(views[first:], given[first:], strict=True):
                    if view is not a:
                        layout.expand(a, view)
            yield index, parameters, result

    def _run_for(self, views: list[Any], first: int, whole: Shape) -> tuple[Layout, PieceVectors, Any, OfPiece]:
        key = tuple(None if a is None else (a.shape, self._backend.place(a)) for a in views)
        found = self._prepared.get(key)
        if found is None:
            x = next(a for a in views if a is not None)
            layout = self._cut.layout(x.shape)
            ways = Ways(self._backend, layout, x, math.prod(whole))
            both = [
                (None, None) if a is None else (ways.data(a) if i < first else ways.result(a, a))
                for i, a in enumerate(views)
            ]
            parameters = PieceVectors(self._backend.xp, self._layout, whole, layout, x.shape)
            run = self._prepare(*(operand for operand, _ in both))
            found = self._prepared[key] = layout, parameters, arriving(*(way for _, way in both)), run
        return found
