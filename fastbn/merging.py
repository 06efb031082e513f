"""Mergeable statistics: `Moments` and what is done with them, in float64 on small arrays of either kind."""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import numpy as np

from fastbn import validation
from fastbn.arrays import device_of, kind_of, on_device, one_kind
from fastbn.backend import backend_of
from fastbn.call import Call, Unlike, describe, find, keep
from fastbn.operands import RunningTypes
from fastbn.ways import Way, arriving

if TYPE_CHECKING:
    from fastbn.backend import Backend


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

    def __add__(self, other: Moments) -> Moments:  # type: ignore[override]  # a tuple appends
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
    signature: Any = Unlike()
    if all(type(m) is Moments for m in moments):
        signature = ("merge", describe(*itertools.chain(*moments)))
    run = find(signature)
    if run is None:
        run = keep(signature, _prepare_merge(*moments))
    merged: Moments = run(*moments)
    return merged


def _prepare_merge(*moments: Moments) -> Call:
    if not moments:
        raise ValueError("moments: expected at least one Moments, got none")
    with device_of(*moments):
        backend = _checked_together({f"moments[{i}]": operand for i, operand in enumerate(moments)})
        shape = moments[0].count.shape
        types, ways = zip(*(_vector(backend, a) for m in moments for a in m), strict=True)
        run = backend.merge(math.prod(shape), tuple(types[i : i + 3] for i in range(0, len(types), 3)))
        arrive, flat = arriving(*ways), len(shape) == 1

    def call(*moments: Moments) -> Moments:
        vectors: Iterable[Any] = itertools.chain(*moments)
        if arrive is not None:
            vectors = arrive(*vectors)
        count, mean, m2 = run(*vectors)
        if flat:
            return Moments(count, mean, m2)
        return Moments(count.reshape(shape), mean.reshape(shape), m2.reshape(shape))

    return backend.on_its_device(call, moments[0].count)


def _vector(backend: Backend, a: Any) -> tuple[Any, Way]:
    """The dtype of a vector of numbers as kernels take it, and what makes one of an array like this."""
    xp = backend.xp
    dtype = a.dtype.newbyteorder("=") if validation.is_float(a.dtype) else xp.dtype(float)
    if a.ndim == 1 and a.dtype == dtype and a.flags.c_contiguous and getattr(a.flags, "aligned", True):
        return dtype, None
    return dtype, lambda a: xp.ascontiguousarray(a, dtype=dtype).reshape(-1)


def _checked_together(operands: dict[str, Any], **others: Any) -> Backend:
    """Check moments that are to be combined, and other arrays with them: one kind, one shape. Returns the backend."""
    arrays: dict[str, Any] = {}
    for name, moments in operands.items():
        if not isinstance(moments, Moments):
            raise TypeError(f"{name}: expected a fastbn.Moments, got {type(moments).__name__}")
        arrays |= {f"{name}.{field}": array for field, array in zip(Moments._fields, moments, strict=True)}
    kind = one_kind(arrays | others)
    (first, example), *_ = arrays.items()
    for name, array in (arrays | others).items():
        if not (validation.is_float(array.dtype) or array.dtype.kind in "fiu"):
            raise TypeError(f"{name}: expected a float dtype, got {array.dtype}")
        if array.shape != example.shape:
            raise ValueError(f"{name}: expected the shape of {first}, {example.shape}, got {array.shape}")
    return backend_of(kind)


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
    signature: Any = Unlike()
    if type(moments) is Moments and (out is None or (isinstance(out, tuple) and len(out) == 2)):
        signature = "update_running", describe(mean, var, *moments, *(out or ())), skip_nonfinite
    run = find(signature)
    if run is None:
        run = keep(signature, _prepare_update(mean, var, moments, skip_nonfinite, out))
    both: tuple[Any, Any] = run(mean, var, moments, rate, correction, out)
    return both


def _prepare_update(mean: Any, var: Any, moments: Any, skip_nonfinite: bool, out: Any) -> Call:
    """``call(mean, var, moments, rate, correction, out)``."""
    outs = validation.pair("out", out)
    with device_of(mean):
        backend = _checked_together({"moments": moments}, mean=mean, var=var, **outs)
        for name, array in {"mean": mean, "var": var}.items():
            if not (validation.is_float(array.dtype) or array.dtype.kind == "f"):
                raise TypeError(f"{name}: expected a float dtype, got {array.dtype}")
        if out is not None:
            validation.output("out[0]", out[0], mean, "mean")
            validation.output("out[1]", out[1], var, "var")
        pair = (None, None) if out is None else out
        mean_type, make_mean, end_mean = _target(backend, mean, pair[0])
        var_type, make_var, end_var = _target(backend, var, pair[1])
        types, ways = zip(*(_vector(backend, a) for a in (mean, var, *moments)), strict=True)
        of_kernel = RunningTypes._make((*types, mean_type, var_type))
        run = backend.update_running(mean.size, of_kernel, bool(skip_nonfinite), out is None)
        arrive = arriving(*ways)

    def call(mean: Any, var: Any, moments: Moments, rate: Any, correction: Any, out: Any) -> tuple[Any, Any]:
        rate, correction = validation.rate_and_correction(rate, correction)
        vectors: Any = (mean, var, *moments)
        if arrive is not None:
            vectors = arrive(*vectors)
        given_mean, given_var = (None, None) if out is None else out
        new_mean = given_mean if make_mean is None else make_mean()
        new_var = given_var if make_var is None else make_var()
        run(*vectors, new_mean, new_var, rate, correction)
        if end_mean is not None:
            new_mean = end_mean(new_mean, given_mean)
        if end_var is not None:
            new_var = end_var(new_var, given_var)
        return (new_mean, new_var) if out is None else out

    return backend.on_its_device(call, mean)


def _target(backend: Backend, like: Any, out: Any) -> tuple[Any, Any, Any]:
    """Of a result like an array: the dtype that kernels write, what makes them one, what makes the result of that."""
    xp, dtype, shape = backend.xp, like.dtype, like.shape
    written = dtype if backend.writes(dtype) else xp.dtype(float)
    if written == dtype:
        if out is None:
            return dtype, partial(xp.ndarray, shape, dtype), None
        if out.dtype == dtype and out.flags.c_contiguous and getattr(out.flags, "aligned", True):
            return dtype, None, None

    def end(vector: Any, out: Any) -> Any:
        with np.errstate(over="ignore"):  # what float16 cannot hold
            if out is None:
                return vector.astype(dtype)
            out[...] = vector
            return out

    return written, partial(xp.ndarray, shape, written), end


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
    signature: Any = Unlike()
    if all(type(m) is Moments for m in batches):
        signature = ("population", describe(*itertools.chain(*batches)))
    run = find(signature)
    if run is None:
        run = keep(signature, _prepare_population(batches))
    both: tuple[Any, Any] = run(batches)
    return both


def _prepare_population(batches: list[Moments]) -> Call:
    if not batches:
        raise ValueError("moments_of_batches: expected at least one Moments, got none")
    with device_of(*batches):
        backend = _checked_together({f"moments_of_batches[{i}]": batch for i, batch in enumerate(batches)})
    xp, shape = backend.xp, batches[0].count.shape

    def call(batches: list[Moments]) -> tuple[Any, Any]:
        used, means, variances = (xp.zeros(shape) for _ in range(3))
        with np.errstate(all="ignore"):  # infinities of both signs, and batches that do not count
            for count, mean, m2 in batches:
                counts = count > 1
                used += counts
                means += xp.where(counts, mean, 0.0)
                variances += xp.where(counts, m2 / (count - 1), 0.0)
            return means / used, variances / used  # 0 / 0 where none counts

    return backend.on_its_device(call, batches[0].count)
