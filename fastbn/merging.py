"""Mergeable statistics: `Moments` and what is done with them, in float64 on small arrays of either kind."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any, NamedTuple, NoReturn

import numpy as np

from fastbn import arguments
from fastbn.dispatch import device_of, kind_of, on_device, one_kind


def namespace(array: Any) -> Any:
    """numpy, or the cupy that the array came from."""
    return sys.modules[kind_of("array", array)]


class Moments(NamedTuple):
    """Count, mean and sum of squared deviations of each channel, float64 arrays of the channels' shape.

    What `moments` returns and `merge` combines. Counts are sums of weights where there were weights; a channel of
    count 0 has mean and m2 NaN.

    ``a + b`` is ``merge(a, b)``, and `sum` takes a list of moments; ``merge(*several)`` rounds the mean but once.

    Examples
    --------
    >>> import numpy as np, fastbn
    >>> m = fastbn.moments(np.array([[1.0, 4.0], [3.0, 8.0]]))
    >>> m.mean, m.var(), m.var(correction=1)
    (array([2., 6.]), array([1., 4.]), array([2., 8.]))
    >>> whole = m + fastbn.moments(np.array([[5.0, 6.0]]))
    >>> whole.count, whole.mean
    (array([3., 3.]), array([3., 6.]))
    """

    count: Any
    mean: Any
    m2: Any

    @property
    def __array_priority__(self) -> float:
        """An array beside moments leaves the operator to them."""
        return 1.0

    def __add__(self, other: Moments) -> Moments:  # type: ignore[override]
        return merge(self, other) if isinstance(other, Moments) else self._not_combined("+", other)

    def __radd__(self, other: Any) -> Moments:
        """`sum` starts from 0."""
        return self if type(other) is int and other == 0 else self._not_combined("+", other)

    def __mul__(self, other: Any) -> NoReturn:
        self._not_combined("*", other)

    def __rmul__(self, other: Any) -> NoReturn:
        self._not_combined("*", other)

    def _not_combined(self, operator: str, other: Any) -> NoReturn:
        """What a tuple would do, to append and to repeat, makes no moments."""
        raise TypeError(f"unsupported operand for {operator}: fastbn.Moments and {type(other).__name__}")

    @on_device
    def var(self, correction: float = 0) -> Any:
        """Variance ``m2 / (count - correction)``; NaN where nothing is left to divide by."""
        xp = namespace(self.m2)
        divisor = self.count - correction
        return self.m2 / xp.where(divisor > 0, divisor, np.nan)

    @on_device
    def std(self, correction: float = 0) -> Any:
        """Standard deviation ``sqrt(var(correction))``."""
        return namespace(self.m2).sqrt(self.var(correction))

    @on_device
    def rstd(self, eps: float = 1e-5) -> Any:
        """Reciprocal standard deviation ``1 / sqrt(var + eps)`` with the biased variance."""
        with np.errstate(divide="ignore"):
            return 1.0 / namespace(self.m2).sqrt(self.var() + eps)


@on_device
def merge(*moments: Moments) -> Moments:
    """Moments of the union of disjoint samples, by Chan's update in the order given.

    Parameters
    ----------
    *moments : Moments
        At least one, all of one shape. Where an operand's count is 0 the other is returned bit for bit, whatever the
        operand's mean and m2 hold.

    Returns
    -------
    Moments

    Raises
    ------
    ValueError
        No operand, or shapes that differ.
    TypeError
        An operand that is not a `Moments`, or operands of different kinds of array.

    Notes
    -----
    With ``d = mean_b - mean_a`` and ``n = n_a + n_b``: ``mean = mean_a + d n_b / n`` and
    ``m2 = m2_a + m2_b + d^2 n_a n_b / n``. Where a mean is not finite, infinities of one sign give that infinity, NaN
    and infinities of both signs NaN, in any order, and m2 is NaN: as `moments` of the whole.

    Merging is exact to 14 digits, but of means that are rounded to float64. With r the mean in standard deviations,
    these roundings move the standard deviation by up to ``2^-53 r`` of itself: of random data, 14 digits are left at
    r = 1e4, 10 at 1e8 and 6 at 1e12; 12, 8 and 4 are sure. `moments` of the whole loses none, nor does `fastbn.dask`,
    whose means have two parts on the way.

    References
    ----------
    Chan, Golub & LeVeque, "Algorithms for computing the sample variance", The American Statistician 37 (1983), eq. 2.1.

    Examples
    --------
    >>> import numpy as np, fastbn
    >>> x = np.arange(12.0).reshape(6, 2)
    >>> both = fastbn.merge(fastbn.moments(x[:2]), fastbn.moments(x[2:]))
    >>> both.mean, both.m2
    (array([5., 6.]), array([70., 70.]))
    """
    if not moments:
        raise ValueError("moments: expected at least one Moments, got none")
    xp = _checked_together({f"moments[{i}]": operand for i, operand in enumerate(moments)})
    n, mean, _, m2 = united(xp, ((m.count, m.mean, xp.zeros(m.mean.shape), m.m2) for m in moments))
    return Moments(n, mean, m2)


def united(xp: Any, parts: Iterable[tuple[Any, Any, Any, Any]]) -> tuple[Any, Any, Any, Any]:
    """Count, mean and m2 of a union whose means are each the sum of two numbers: (count, hi, lo, m2) of each part.

    ``hi`` is the sum rounded to float64. So merging adds no error of the mean's size, however many parts there are.
    """
    first, *others = parts
    n, hi, lo, m2 = (xp.array(a, dtype=xp.float64) for a in first)
    rest = xp.zeros_like(m2)  # of m2: 20 000 equal parts would cost a digit and a half
    with np.errstate(all="ignore"):
        for count, other_hi, other_lo, other_m2 in others:
            together = xp.asarray(n + count)
            share = count / together
            delta = (other_hi - hi) + (other_lo - lo)
            high, low = _two_sum(hi, lo + delta * share)
            # Infinities, or finite means so far apart that their difference overflows.
            finite = xp.isfinite(delta)
            high = xp.where(finite, high, hi * (n / together) + other_hi * share)
            squares, left = _two_sum(m2, other_m2 + delta * delta * (n * share))
            squares = xp.where(xp.isfinite(high), squares, np.nan)
            both, none = (count != 0) & (n != 0), n == 0
            hi = xp.where(both, high, xp.where(none, other_hi, hi))
            lo = xp.where(both, xp.where(finite, low, 0.0), xp.where(none, other_lo, lo))
            m2 = xp.where(both, squares, xp.where(none, other_m2, m2))
            rest = rest + xp.where(both & xp.isfinite(left), left, 0.0)
            n = together
    return n, hi, lo, xp.where(rest == 0, m2, m2 + rest)


def _two_sum(a: Any, b: Any) -> tuple[Any, Any]:
    """The rounded sum and what rounding left of it (Knuth, The Art of Computer Programming 2, 4.2.2, theorem B)."""
    total = a + b
    shared = total - a
    return total, (a - (total - shared)) + (b - shared)


def _checked_together(operands: dict[str, Any], **others: Any) -> Any:
    """Check moments that are to be combined, and other arrays with them: one kind, one shape. Returns the namespace."""
    arrays: dict[str, Any] = {}
    for name, moments in operands.items():
        if not isinstance(moments, Moments):
            raise TypeError(f"{name}: expected a fastbn.Moments, got {type(moments).__name__}")
        arrays |= {f"{name}.{field}": array for field, array in zip(Moments._fields, moments, strict=True)}
    one_kind(arrays | others)
    (first, example), *_ = arrays.items()
    for name, array in (arrays | others).items():
        if not (arguments.is_float(array.dtype) or array.dtype.kind in "fiu"):
            raise TypeError(f"{name}: expected a float dtype, got {array.dtype}")
        if array.shape != example.shape:
            raise ValueError(f"{name}: expected the shape of {first}, {example.shape}, got {array.shape}")
    return namespace(example)


@on_device
def update_running(
    mean: Any,
    var: Any,
    moments: Moments,
    *,
    rate: float = 0.1,
    correction: float = 1,
    skip_nonfinite: bool = False,
    out: tuple[Any, Any] | None = None,
) -> tuple[Any, Any]:
    """Running statistics after one more batch: ``(1 - rate) * running + rate * batch``.

    Parameters
    ----------
    mean, var : array
        Running mean and variance, of any float dtype and the moments' shape.
    moments : Moments
        The batch's.
    rate : float
        Weight of the new batch, in [0, 1]: PyTorch's ``momentum``; Keras, Flax and ONNX weight the old statistics.
    correction : float
        The batch's variance is ``m2 / (count - correction)``. Channels with ``count <= correction`` stay as they are.
    skip_nonfinite : bool
        Leave channels alone whose batch mean or variance is NaN or infinite.
    out : pair of arrays, optional
        Written and returned; may be ``(mean, var)`` themselves.

    Returns
    -------
    mean, var : array
        In the dtypes of the arguments `mean` and `var`, computed in float64.

    Raises
    ------
    ValueError
        A rate outside [0, 1], a shape that is not the moments', an `out` of another shape or dtype, or read-only.
    TypeError
        Arrays of another kind than the moments', or not of a float dtype.

    Examples
    --------
    >>> import numpy as np, fastbn
    >>> batch = fastbn.moments(np.array([[1.0], [3.0]]))
    >>> fastbn.update_running(np.zeros(1), np.ones(1), batch)
    (array([0.2]), array([1.1]))
    """
    outs = {}
    if out is not None:
        if not isinstance(out, tuple) or len(out) != 2:
            raise TypeError(f"out: expected a pair of arrays, got {type(out).__name__}")
        outs = {"out[0]": out[0], "out[1]": out[1]}
    xp = _checked_together({"moments": moments}, mean=mean, var=var, **outs)
    for name, array in {"mean": mean, "var": var}.items():
        if not (arguments.is_float(array.dtype) or array.dtype.kind == "f"):
            raise TypeError(f"{name}: expected a float dtype, got {array.dtype}")
    if out is not None:
        arguments.output("out[0]", out[0], mean, "mean")
        arguments.output("out[1]", out[1], var, "var")
    rate = arguments.real("rate", rate)
    if not 0 <= rate <= 1:
        raise ValueError(f"rate: expected a number in [0, 1], got {rate}")
    batch_var = moments.var(correction)
    update = moments.count > correction
    if skip_nonfinite:
        update &= xp.isfinite(moments.mean) & xp.isfinite(batch_var)
    results = []
    with np.errstate(invalid="ignore", over="ignore"):  # infinities of both signs; what float16 cannot hold
        for array, batch in ((mean, moments.mean), (var, batch_var)):
            running = array.astype(xp.float64)
            # The ends are exact and take nothing of the other side, which may be infinite.
            mixed = batch if rate == 1 else running if rate == 0 else (1.0 - rate) * running + rate * batch
            results.append(xp.where(update, mixed, running).astype(array.dtype))
    if out is None:
        return results[0], results[1]
    out[0][...], out[1][...] = results
    return out


def population(moments_of_batches: Iterable[Moments]) -> tuple[Any, Any]:
    """Population mean and variance from the moments of many batches, every batch counting the same.

    Parameters
    ----------
    moments_of_batches : iterable of Moments
        All of one shape. Per channel, batches with count <= 1 are skipped; NaN where none is left.

    Returns
    -------
    mean, var : array
        Float64: the averages over batches of the mean and of the unbiased variance ``m2 / (count - 1)``.

    Raises
    ------
    ValueError
        No batch at all, or shapes that differ.

    References
    ----------
    Ioffe & Szegedy, "Batch Normalization", ICML 2015, Algorithm 2, step 10.

    Examples
    --------
    >>> import numpy as np, fastbn
    >>> batches = (np.array([[1.0], [3.0]]), np.array([[5.0], [5.0]]))
    >>> fastbn.population(fastbn.moments(b) for b in batches)
    (array([3.5]), array([1.]))
    """
    if not isinstance(moments_of_batches, Iterable):
        raise TypeError(
            f"moments_of_batches: expected Moments to iterate over, got {type(moments_of_batches).__name__}"
        )
    batches = list(moments_of_batches)
    if not batches:
        raise ValueError("moments_of_batches: expected at least one Moments, got none")
    with device_of(*batches):
        xp = _checked_together({f"moments_of_batches[{i}]": batch for i, batch in enumerate(batches)})
        used, mean, var = (xp.zeros(batches[0].count.shape) for _ in range(3))
        with np.errstate(invalid="ignore"):  # infinities of both signs
            for m in batches:
                counts = m.count > 1
                used += counts
                mean += xp.where(counts, m.mean, 0.0)
                var += xp.where(counts, m.var(correction=1), 0.0)
        divisor = xp.where(used > 0, used, np.nan)
        return mean / divisor, var / divisor
