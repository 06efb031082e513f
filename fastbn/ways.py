"""The ways from callers' arrays to what kernels see, and back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from fastbn import validation
from fastbn.backend import Backend
from fastbn.layout import Layout
from fastbn.operands import Operand, dense

Way = Callable[[Any], Any] | None
"""From a caller's array to one that lies as its operand says; None where that is itself."""


def arriving(*ways: Way) -> Callable[..., Any] | None:
    """What takes arrays by their ways, one each; None where all lie as they should."""
    if not any(ways):
        return None
    return lambda *arrays: tuple(a if way is None else way(a) for a, way in zip(arrays, ways, strict=True))


class Ways:
    """From the arrays of calls, which share x's layout, to the backend's kernels and back. No array is kept."""

    def __init__(self, backend: Backend, layout: Layout, x: Any, of: int = 0) -> None:
        self.backend, self.layout, self.shape, self._of = backend, layout, x.shape, of
        self.device, _ = backend.place(x)

    def _operand(self, view: Any, fresh: bool = False) -> Operand:
        """A collapsed array where it lies."""
        device, offset = self.backend.place(view)
        return Operand(view.shape, view.strides, view.dtype, fresh, device, 0 if fresh else offset, self._of)

    def optional(self, a: Any) -> tuple[Operand | None, Way]:
        """`data` that may be absent."""
        return (None, None) if a is None else self.data(a)

    def data(self, a: Any, fresh: bool = False) -> tuple[Operand, Way]:
        """An array that is read: it is copied where kernels cannot walk it."""
        view = self.backend.collapsed_view(self.layout, a)
        if view is not None and self.backend.reads(view):
            return self._operand(view, fresh), None
        layout, xp, dtype = self.layout, self.backend.xp, a.dtype.newbyteorder("=")
        copied = dense(layout.collapsed, dtype, self.device)
        return copied, lambda a: xp.ascontiguousarray(layout.collapse(a), dtype=dtype)

    def result(self, x: Any, out: Any) -> tuple[Operand, Way]:
        """An array like x that is written, or `out`: where kernels cannot, they write one whose numbers are copied."""
        operand, way = self.data(self.backend.alike(x) if out is None else out, out is None)
        if way is None:
            return operand, None
        xp, dtype, shape = self.backend.xp, operand.dtype, operand.shape
        return operand, lambda _: xp.empty(shape, dtype)

    def parameter(self, name: str, p: Any) -> tuple[Any, Way]:
        """The dtype of a vector of parameters, of which each kept index has one; it is checked."""
        if p is not None:
            validation.parameter(name, p, self.layout)
        return self.vector(p)

    def vector(self, p: Any) -> tuple[Any, Way]:
        """The same unchecked. Kernels take floats of all sorts, in one piece."""
        if p is None:
            return None, None
        layout, xp = self.layout, self.backend.xp
        dtype = p.dtype.newbyteorder("=") if validation.is_float(p.dtype) else xp.dtype(float)
        in_order = p.ndim == 1 and p.shape == layout.kept_shape and p.flags.c_contiguous
        if in_order and p.dtype == dtype and getattr(p.flags, "aligned", True):
            return dtype, None
        return dtype, lambda p: xp.ascontiguousarray(layout.laid_out(xp, p), dtype=dtype).reshape(-1)

    def updated(self, running: tuple[Any, Any]) -> bool:
        """Whether kernels can update running statistics where they are; these are checked."""
        found = [
            self.vector(validation.running(f"running[{i}]", array, self.layout)) for i, array in enumerate(running)
        ]
        return all(way is None and self.backend.writes(dtype) for dtype, way in found)

    def weight(self, where: Any, weights: Any) -> tuple[Operand | None, Any]:
        """``where * weights``, and what makes of them their product and how kernels see it."""
        if where is None and weights is None:
            return None, None
        layout, xp, shape = self.layout, self.backend.xp, self.shape

        def way(where: Any, weights: Any) -> tuple[Any, Any]:
            combined = validation.combined_weight(xp, where, weights, shape)
            return combined, layout.collapse_weight(xp, combined, shape)

        return self._operand(way(where, weights)[1]), way

    def combined_weight(self, weight: Any) -> tuple[Operand | None, Way]:
        """The same of a product."""
        if weight is None:
            return None, None
        layout, xp, shape = self.layout, self.backend.xp, self.shape
        return self._operand(layout.collapse_weight(xp, weight, shape)), lambda w: layout.collapse_weight(xp, w, shape)

    def shaped(self) -> Way:
        """From a kernel's vector to an array of the channels' shape."""
        layout, xp = self.layout, self.backend.xp
        if layout.kept_order is None and len(layout.kept_shape) == 1:
            return None
        return lambda vector: layout.kept_array(xp, vector)

    def through(self, run: Callable[..., Any], ways: dict[str, Way], results: Sequence[str] = ()) -> Callable[..., Any]:
        """``run`` with arrays that go to it by their ways, in this order, and with those that are results back from it.

        It may take more arguments after these.
        """
        arrive, arrays, expand = arriving(*ways.values()), len(ways), self.layout.expand
        if arrive is None:
            return run
        places = [list(ways).index(name) for name in results]

        def through(*arguments: Any) -> Any:
            given = arrive(*arguments[:arrays])
            returned = run(*given, *arguments[arrays:])
            for place in places:
                if given[place] is not arguments[place]:
                    expand(given[place], arguments[place])
            return returned

        return through

    def partly_overlaps(self, out: Any, *inputs: Any) -> bool:
        """Whether an input shares memory with `out` but not element for element: it would be lost before it is read."""
        if self.backend.disjoint(out, *inputs):
            return False
        same_or_apart = self.backend.same_or_apart
        return any(a is not None and a is not out and not same_or_apart(out, a) for a in inputs)


class WaysToPieces(Ways):
    """The same for kernels that take arrays apart themselves (`fastbn.pieces`): all lie as they should."""

    def data(self, a: Any, fresh: bool = False) -> tuple[Operand, Way]:
        return self._operand(a, fresh), None
