"""From parts to results, which are written in their dtype: see `statistics`.

In plain words, for parts of a kept index with numbers (n, q, a, b), from N = S = M2 = 0 on::

    delta = (q + a / n) - (o + S / N)                  # o: the first part's q, of which means are measured
    M2 += (b - a**2 / n) + delta**2 * N * n / (N + n)  # Chan, Golub & LeVeque 1983, eq. 2.1
    S += n * (q - o) + a                               # in two numbers: what a sum loses is summed as well
    N += n

    mean, var, std = o + S / N, M2 / (N - ddof), sqrt(M2 / (N - ddof))

Of sums, whose parts have (n, _, sum, rest), ``S += sum + rest`` and mean = S / N.
"""

from typing import Any, NamedTuple

import numpy as np

from fastbn.cpu.kernels.calls import F4, F8, I2, U2, bfloats, doubles, floats, halves, reserve
from fastbn.cpu.kernels.compiler import inline, kernel, offsets_of_arguments
from fastbn.cpu.kernels.doubles import (
    LANES,
    choose,
    everywhere,
    finite,
    first_lanes,
    first_there,
    greater,
    lane,
    put_value,
    put_values,
)
from fastbn.cpu.kernels.flags import lower_underflow_flag, underflowed
from fastbn.cpu.kernels.pointers import address
from fastbn.cpu.kernels.simd import any_greater, fma, load, root, zero_where_not_positive
from fastbn.cpu.kernels.statistics import field, kept_place
from fastbn.cpu.kernels.team import enter
from fastbn.cpu.kernels.team import store as put_word
from fastbn.cpu.kernels.vectors import two_sum
from fastbn.cpu.records import Results
from fastbn.cpu.statistics_sizes import FIELDS, LEAST_SQUARE, LEAST_WEIGHT, STD, SUM_OF_SQUARES
from fastbn.operands import CAREFUL, EMPTY, NO_DEGREES


class Targets(NamedTuple):
    """Where results of up to eight kept indices go, a step apart."""

    at: Any
    step: Any
    count: Any


# --- from parts -------------------------------------------------------------------------------------------------------


@kernel
def merge(
    thread, first, last, table, pitch, far, parts, at, step, count, mean, spread, ddof, status, formats, squares,
    compensated, weighted,
):  # fmt: skip
    """Results of kept indices from their parts, ``far`` apart, whose four fields are a pitch apart.

    Other kernels call it (`merge_parts`): compiled into each of them, it took a tenth to a half of their time.
    """
    zero, results = everywhere(0.0), Results(count, mean, spread, ddof, status, formats)
    for j in range(first, last, LANES):
        among = first_lanes(last - j)  # in the other lanes are other numbers, or none yet
        origin = choose(among, field(table, pitch + j, squares), zero)
        if checks(squares, compensated, weighted):
            lower_underflow_flag()
        n, s, rest = sums_of_part(table, j, pitch, among, first_there(squares, compensated))
        m2 = own_m2(n, s, rest, squares)
        hi, lo = s + zero, rest if squares is None else zero
        for k in range(1, parts):
            here = k * far + j
            part_n, s, rest = sums_of_part(table, here, pitch, among, first_there(squares, compensated))
            from_origin = choose(among, field(table, here + pitch, squares), zero) - origin
            hi, lo, m2 = merged(n, hi, lo, m2, part_n, from_origin, s, rest, squares)
            n = n + part_n
        if checks(squares, compensated, weighted) and parts > 1 and underflowed(lane(m2, 0)):
            status[CAREFUL] = 1.0
        to = Targets(at + j * step, step, min(LANES, last - j))
        finish(n, everywhere(1.0) / n, origin, hi, lo, m2, squares, first_there(compensated, weighted), results, to)


MERGE = offsets_of_arguments(merge)


@inline
def merging(params, results):
    """What `merge` is called with, where results' words are known; of options it has code of its own."""
    put_word(params + MERGE.count, results.count)
    put_word(params + MERGE.mean, results.mean)
    put_word(params + MERGE.spread, results.spread)
    put_word(params + MERGE.ddof, results.ddof)
    put_word(params + MERGE.status, results.status)
    put_word(params + MERGE.formats, results.formats)
    return params


@inline
def merge_parts(merge, params, table, pitch, far, parts, cells, at, step):
    """Results of so many cells, from a place on."""
    put_word(params + MERGE.table, table)
    put_word(params + MERGE.pitch, pitch)
    put_word(params + MERGE.far, far)
    put_word(params + MERGE.parts, parts)
    put_word(params + MERGE.at, at)
    put_word(params + MERGE.step, step)
    enter(merge, params, 0, 0, cells)


@inline
def sums_of_part(table, at, pitch, among, rest_is_used):
    """n, A and B of up to eight kept indices."""
    zero = everywhere(0.0)
    n, s = choose(among, load(table, at, 64), zero), choose(among, load(table, at + 2 * pitch, 64), zero)
    return n, s, choose(among, field(table, at + 3 * pitch, rest_is_used), zero)


@inline
def own_m2(n, s, rest, squares):
    """M2 of a part alone; zeros where squares are not wanted."""
    zero, one = everywhere(0.0), everywhere(1.0)
    if squares is None:
        return zero
    m2 = rest - s * (s / choose(greater(n, zero), n, one))
    return choose(greater(n, zero), zero_where_not_positive(m2, m2), zero)


@inline
def merged(n, hi, lo, m2, part_n, from_origin, s, rest, squares):
    """Sums, relative to an origin, and M2 of n values and of a part's, whose shift is ``from_origin`` from it."""
    if squares is None:
        hi, lost = two_sum(hi, s)
        return hi, lo + (lost + rest), m2
    zero, one = everywhere(0.0), everywhere(1.0)
    some = choose(greater(part_n, zero), part_n, one)
    both = choose(greater(n + part_n, zero), n + part_n, one)
    delta = (from_origin + s / some) - (hi + lo) / choose(greater(n, zero), n, one)
    between = choose(greater(n, zero), delta * delta * (n * (part_n / both)), zero)
    m2 = choose(greater(part_n, zero), m2 + (own_m2(part_n, s, rest, squares) + between), m2)
    moved, lost = two_sum(hi, part_n * from_origin)
    hi, more = two_sum(moved, s)
    return hi, lo + (lost + more), m2


@inline
def checks(squares, compensated, weighted):
    """Whether squares may have underflowed."""
    return squares is not None and (compensated is not None or weighted is not None)


@inline
def finish(n, each, origin, hi, lo, m2, squares, checked, results, to):
    """Results of up to eight kept indices; each is 1 / n."""
    zero, one = everywhere(0.0), everywhere(1.0)
    among = first_lanes(to.count)
    s = hi + lo
    s = choose(finite(lo), s, hi)  # what two-sum loses of infinities is NaN
    mu = s * each
    # The quotient once more: the mean of equal numbers is that number.
    rest = (fma(zero - mu, n, s) + ((hi - s) + lo)) * each
    if squares is not None:
        mu, lost = two_sum(origin, mu)
        rest = rest + lost
    better = mu + rest
    mu = choose(finite(better), better, mu)
    if squares is not None:
        put_spread(n, m2, checked, results, to, among)
    elif checked is not None and any_greater(choose(among, choose(finite(s), zero, one), zero), zero):
        results.status[CAREFUL] = 1.0
    if checked is not None:
        tiny = choose(greater(everywhere(LEAST_WEIGHT), n), n, zero)
        if any_greater(choose(among, tiny, zero), zero):  # 1/n may be infinite
            results.status[CAREFUL] = 1.0
    put_results(results.mean, results.formats.of_mean, to, mu)
    put_results(results.count, results.formats.of_count, to, n)
    if any_greater(choose(among, choose(greater(n, zero), zero, one), zero), zero):
        results.status[EMPTY] = 1.0


@inline
def put_spread(n, m2, checked, results, to, among):
    """Variances, their roots, or M2."""
    zero, one = everywhere(0.0), everywhere(1.0)
    result = choose(greater(n, zero), m2, everywhere(np.nan))
    if results.formats.form != SUM_OF_SQUARES:
        degrees = n - everywhere(results.ddof)
        left = choose(greater(degrees, zero), degrees, zero)
        result = m2 / left
        if results.formats.skip_nan != 0:
            result = choose(greater(left, zero), result, everywhere(np.nan))
        if results.formats.form == STD:
            result = root(result)
        if any_greater(choose(among, choose(greater(degrees, zero), zero, one), zero), zero):
            results.status[NO_DEGREES] = 1.0
    put_results(results.spread, results.formats.of_spread, to, result)
    if checked is not None:
        small = choose(greater(everywhere(LEAST_SQUARE), m2), m2, zero)
        unsound = choose(finite(m2), small, one)
        if any_greater(choose(among, unsound, zero), zero):
            results.status[CAREFUL] = 1.0


@inline
def put_results(out, kind, to, v):
    """Into an array at an address, whose dtype's kind is one of `calls.VECTOR_KINDS`; 0 for none."""
    if kind == F8:
        put(doubles(out), to, v)
    elif kind == F4:
        put(floats(out), to, v)
    elif kind == U2:
        put(halves(out), to, v)
    elif kind == I2:
        put(bfloats(out), to, v)


@inline
def put(out, to, v):
    if to.step == 1 and to.count == LANES:  # stores under a mask take twelve times as long on some processors
        put_values(out, to.at, v, None)
    elif to.step == 1:
        put_values(out, to.at, v, to.count)
    else:
        for k in range(to.count):
            put_value(out, to.at + k * to.step, lane(v, k))


@kernel
def finish_parts(thread, first, last, geometry, dimensions, merge, results, partials):
    """A task is a kept index of `inner`, or up to eight neighbours of `outer`."""
    parts, channels, params = geometry.parts, geometry.channels, merging(reserve(MERGE), results)
    groups = -(-channels // LANES)
    for task in range(first, last):
        if channels == 0:
            _, _, o_at = kept_place(task, geometry, dimensions)
            merge_parts(merge, params, address(partials, FIELDS * parts * task), 1, FIELDS, parts, 1, o_at, 1)
        else:
            k = task // groups
            cell = (task - k * groups) * LANES
            _, _, o_at = kept_place(k, geometry, dimensions)
            at, o_at = FIELDS * channels * parts * k + cell, o_at + cell * geometry.kept_step
            some = min(LANES, channels - cell)
            merge_parts(
                merge, params, address(partials, at), channels, FIELDS * channels, parts, some, o_at,
                geometry.kept_step,
            )  # fmt: skip
