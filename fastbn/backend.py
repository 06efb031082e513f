"""The contract of a backend: kernels for one kind of array, and what it takes to call them; and which one it is.

A backend is a module. `fastbn.cpu` is the one of NumPy arrays, `fastbn.cuda` that of CuPy arrays.

Kernels are prepared for operands (`fastbn.operands`): collapsed arrays ``(batch, outer, channel, inner)`` or, in slabs,
``(far, near, outer, channel, inner)``, of one dtype, float16, bfloat16, float32 or float64, and vectors of parameters,
a float of each kept index, whose dtypes are given. What is prepared runs on arrays that lie so, in any shape, since
kernels see but addresses. A weight is None, or an array of bools, float32 or float64, with size 1 where it does not
vary. Results are float64 vectors of a number for each kept index: ``batch * channel``, or in slabs ``channel``. Arrays
that are written may be inputs as well, element for element. What is absent is None.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from fastbn.layout import Layout, Shape
from fastbn.operands import AffineTypes, GradientTypes, Mask, Operand, RunningTypes, Statistic


class Backend(Protocol):
    """What a module of kernels has."""

    @property
    def xp(self) -> Any:
        """The library of the arrays."""

    @property
    def LEAST_PIECE(self) -> int:  # noqa: N802  # a backend is a module, where it is a constant
        """Bytes of a piece of an array that are worth a launch of its own (`fastbn.pieces`)."""

    # --- kernels ---

    def moments(self, x: Operand, weight: Operand | None) -> Callable[..., Any]:
        """``run(x, weight)`` gives count, mean, M2 and ``1 / std``, right even where M2 is 0 or infinite in float64."""

    def normalize(
        self, x: Operand, y: Operand, residual: Operand | None, parameters: AffineTypes, eps: float | None, relu: bool
    ) -> Callable[..., Any]:
        """``run(x, residual, y, mean, spread, gamma, beta)``: ``y = (x - mean) * rstd * gamma + beta + residual``.

        Then relu, if `relu`. The spread is the variance, to which eps is added, or without eps the rstd.
        """

    def forward(
        self, x: Operand, weight: Operand | None, y: Operand, residual: Operand | None, gamma: Any, beta: Any,
        eps: float, relu: bool, running: tuple[Any, Any] | None,
    ) -> Callable[..., Any]:  # fmt: skip
        """``run(x, weight, gamma, beta, residual, y)``: y by x's own statistics; gives count, mean, M2 and rstd.

        With dtypes of running statistics, ``run(..., y, running_mean, running_var, rate, correction)`` updates these,
        which share no memory with others, as `update_running` does.
        """

    def grad_sums(
        self, dy: Operand, x: Operand, y: Operand | None, weight: Operand | None, types: GradientTypes, recompute: bool
    ) -> Callable[..., Any]:
        """``run(dy, x, y, weight, *vectors)`` gives ``dgamma = sum(dz * xhat)`` and ``dbeta = sum(dz)``.

        dz is dy, or 0 where y <= 0. There is y, or with ``recompute`` that of x, mean, rstd, gamma and beta, with the
        sign of what `forward` wrote without a residual, or else no relu. What has weight 0 and dz 0 is left out,
        whatever x is there.
        """

    def grad_input(
        self, dy: Operand, x: Operand, y: Operand | None, weight: Operand | None, types: GradientTypes, recompute: bool,
        sums: tuple[Any, Any], dx: Operand, dresidual: Operand | None,
    ) -> Callable[..., Any]:  # fmt: skip
        """``run(dy, x, y, weight, *vectors, dgamma, dbeta, dx, dresidual)``: dx of the sums; ``dresidual = dz``.

        ``dx = scale * dz - weight * (offset + slope * (x - mean))``, ``scale = gamma * rstd``,
        ``offset = (scale * dbeta - dmean) / count``, ``slope = (scale * rstd * dgamma - 2 * dvar) / count``. Where
        weight and dz are 0, dx is 0, whatever x is.
        """

    def backward(
        self, dy: Operand, x: Operand, y: Operand | None, weight: Operand | None, types: GradientTypes, recompute: bool,
        frozen: bool, dx: Operand, dresidual: Operand | None,
    ) -> Callable[..., Any]:  # fmt: skip
        """``run(dy, x, y, weight, *vectors, dx, dresidual)``: both; gives the sums.

        With frozen statistics dx has no terms through mean and variance.
        """

    def statistic(
        self, x: Any, mask: Mask | None, kept: frozenset[int], what: Statistic, result_strides: Shape
    ) -> Callable[..., Any] | None:
        """``run(x, where, count, mean, spread, status, ddof)`` writes results of the kept axes' indices, in any dtype.

        x is an array of any real dtype and strides; results have their strides, in elements, for each of its axes. The
        status is ``STATUS`` float64 zeros of the host (`fastbn.operands`), which become 1 where a result needs more
        care than this takes (``CAREFUL``: infinities, or squares beyond the range of float64), where an index has
        ``count <= ddof`` (``NO_DEGREES``), and where a count is 0 (``EMPTY``); a device, which is not waited for, takes
        that care and leaves them. None: there is no such kernel.
        """

    # --- vectors of a number per kept index, in their own dtypes ---

    def update_running(self, kept: int, types: RunningTypes, skip_nonfinite: bool, fresh: bool) -> Callable[..., Any]:
        """``run(*vectors, rate, correction)``: `fastbn.formulas.running`, from five vectors into the new ones.

        The new ones have the old ones' dtypes, or are float64 where the backend does not write these (`writes`). They
        are fresh, or may share memory with the others.
        """

    def writes(self, dtype: Any) -> bool:
        """Whether `update_running` and `forward` write vectors of a dtype."""

    def merge(self, kept: int, types: tuple[tuple[Any, Any, Any], ...]) -> Callable[..., Any]:
        """``run(count, mean, m2, count, mean, m2, ...)`` gives those of all: `fastbn.formulas.united`."""

    # --- arrays ---

    def collapsed_view(self, layout: Layout, a: Any) -> Any:
        """An array as kernels see it; None where that takes a copy."""

    def reads(self, view: Any) -> bool:
        """Whether kernels can walk a collapsed array, and write it."""

    def reads_slabs(self, views: Sequence[Any]) -> bool:
        """Whether they also walk arrays in slabs (`fastbn.layout.layout_in_slabs`), which is faster than in pieces."""

    def place(self, a: Any) -> tuple[int, int]:
        """The device, and the offset of the address from a multiple of 16 bytes where that decides about kernels."""

    def allocator(self, a: Any) -> Callable[[Any], Any]:
        """What makes results like arrays that lie like this one."""

    def alike(self, a: Any) -> Any:
        """An array that lies as such results do, which nobody reads or writes."""

    def disjoint(self, out: Any, *others: Any) -> bool:
        """Whether an array surely shares no memory with others, but itself and None. It is cheap to ask."""

    def overlap(self, a: Any, b: Any) -> bool:
        """Whether two arrays share memory; yes where that is too hard to decide."""

    def same_or_apart(self, a: Any, b: Any) -> bool:
        """Whether each element of `a` lies where the same element of `b` does, or the arrays share no memory."""

    def on_its_device(self, call: Callable[..., Any], x: Any) -> Callable[..., Any]:
        """The call, with the device of this array the current one."""


def backend_of(kind: str) -> Backend:
    """The module of kernels for arrays of this kind."""
    if kind == "numpy":
        from fastbn import cpu

        return cpu
    from fastbn import cuda

    return cuda
