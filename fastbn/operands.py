"""What a call hands to a backend: checked parameters as vectors, and the arrays that kernels write."""

from __future__ import annotations

from typing import Any

from fastbn import arguments
from fastbn.layout import Layout


def vector(name: str, parameter: Any, layout: Layout, backend: Any, default: float = 0.0) -> Any:
    """A checked parameter as the backend's kernels take it."""
    if parameter is not None:
        arguments.parameter(name, parameter, layout)
    return backend.vector(layout, parameter, default)


def float64_vector(name: str, parameter: Any, layout: Layout, backend: Any, default: float = 0.0) -> Any:
    """A checked parameter as a float64 vector for formulas, which kernels take as well."""
    if parameter is None:
        return backend.xp.full(layout.folded[0] * layout.folded[2], default)
    return layout.vector(backend.xp, arguments.parameter(name, parameter, layout))


class Target:
    """The folded array that kernels write for a result, and the way from there to the caller's array.

    It is a view of the caller's array where that can be viewed and kernels can write it, else an array of its own.
    """

    def __init__(self, backend: Any, layout: Layout, result: Any, given: bool, *inputs: Any) -> None:
        self.layout, self.result = layout, arguments.plain(result)
        result = self.result
        view = backend.folded_view(layout, result)
        in_place = view is not None
        if given and in_place:
            # Kernels read and write element by element: an input may be the output, but not lie askew to it.
            in_place = all(backend.same_or_apart(result, a) for a in inputs if a is not None)
        self.in_place = in_place and backend.writable_in_place(view)
        if self.in_place:
            self.array = view
        else:
            self.array = backend.xp.empty(layout.folded, result.dtype.newbyteorder("="))

    def deliver(self) -> None:
        if not self.in_place:
            self.layout.unfold(self.array, self.result)
