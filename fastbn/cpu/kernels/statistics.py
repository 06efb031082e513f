"""Mean and variance of arrays as they lie: any strides, any real dtype, masks, NaNs left out; results in their dtype.

For each kept index, over the values x that count (all, or those of a mask, or those that are not NaN):

    n = number of x;  mean = sum(x) / n;  m2 = sum((x - mean)^2);  var = m2 / (n - ddof)

Everything is summed in float64, and an array's kept indices in parts of its reduced ones, by shape alone:

- Sums: float32, halves and integers of up to 32 bits are exact in float64; what float64 and integers of 64 bits lose is
  summed as well (Knuth's two-sum, 7 operations a value). Sums of parts are added so in any case.
- Squares: of x - shift, with the mean of eight values as shift: A = sum(x - shift), B = sum((x - shift)^2),
  m2 = B - A^2/n (Chan, Golub & LeVeque 1983, eq. 1.7 with a shift). That loses as many bits as the mean's distance from
  the shift is large beside the deviation; where these are too many, the part is summed again around its mean. Parts
  are merged by Chan's update (eq. 2.1).

`statistics_inner` goes along rows whose values are reduced, `statistics_outer` along rows of kept indices; here are
what both share, and how parts become results. What is not float32 or float64 side by side is fetched: converted, some
hundred values at a time, by a kernel of its own for each dtype, so that the others need not know it. The geometry is
laid out in `fastbn.cpu.statistics`. A part's numbers are (n, shift, A, B), of sums (n, _, sum, rest).
"""

import numpy as np

from fastbn.cpu.kernels.calls import F4, F8, I2, U2, bfloats, doubles, floats, halves, reserve
from fastbn.cpu.kernels.compiler import inline, kernel
from fastbn.cpu.kernels.doubles import (
    LANES,
    choose,
    either,
    everywhere,
    finite,
    first_bytes_not_zero,
    first_values,
    greater,
    lane,
    put_value,
    put_values,
    value_at,
    values,
)
from fastbn.cpu.kernels.flags import lower_underflow_flag, underflowed
from fastbn.cpu.kernels.simd import address, any_greater, fma, load, root, zero_where_not_positive
from fastbn.cpu.kernels.team import enter
from fastbn.cpu.kernels.team import store as put_word
from fastbn.cpu.statistics import (
    CAREFUL,
    CHANNELS,
    COUNT_KIND,
    DIMENSION,
    DIMENSIONS,
    EMPTY,
    FIELDS,
    FORM,
    ITEMSIZE,
    KEPT_DIMENSIONS,
    KEPT_STEP,
    LEAST_SQUARE,
    MASK,
    MEAN_KIND,
    NO_DEGREES,
    OF_ROWS,
    OF_VALUES,
    PARTS,
    ROW_DIMENSIONS,
    SKIP_NAN,
    SPREAD_KIND,
    STD,
    SUM_OF_SQUARES,
)

PEEKS = 8  # values of a part, of whose mean the first shift is made
# How much larger A^2/n may be than m2: four lose two bits of 53, sixteen four, which narrower data can spare.
FAR, FAR_OF_FLOATS = 4.0, 16.0
LOOKS = 3  # at a part, each around the mean that the one before has found

# --- places -----------------------------------------------------------------------------------------------------------


@inline
def place(index, geometry, first, count):
    """Where an index into so many dimensions is: in x, in the mask, in the results."""
    x, w, o = 0, 0, 0
    for k in range(first + DIMENSION * (count - 1), first - 1, -DIMENSION):
        outer = index // geometry[k]
        i = index - outer * geometry[k]
        x += i * geometry[k + 1]
        w += i * geometry[k + 2]
        o += i * geometry[k + 3]
        index = outer
    return x, w, o


@inline
def row_at(r, geometry):
    """Where row r is in x and in the mask."""
    x, w, _ = place(r, geometry, DIMENSIONS + DIMENSION * geometry[KEPT_DIMENSIONS], geometry[ROW_DIMENSIONS])
    return x, w


@inline
def rows_from(r, last, geometry):
    """Rows a step apart from row r on: where the first one is in x and in the mask, the steps, how many, how many of
    their dimension are left.
    """
    first, count = DIMENSIONS + DIMENSION * geometry[KEPT_DIMENSIONS], geometry[ROW_DIMENSIONS]
    if count == 0:
        return 0, 0, 0, 0, 1, 1
    x, w = row_at(r, geometry)
    innermost = first + DIMENSION * (count - 1)
    left = geometry[innermost] - r % geometry[innermost]
    return x, w, geometry[innermost + 1], geometry[innermost + 2], min(left, last - r), left


# --- sums -------------------------------------------------------------------------------------------------------------


@inline
def two_sum(a, b):
    """The rounded sum and what it lost."""
    s = a + b
    t = s - a
    return s, (a - (s - t)) + (b - t)


@inline
def add(a, b, v, shift, squares, exact):
    """Values to the sums a, b."""
    if squares is not None:
        d = v - shift
        return a + d, fma(d, d, b)
    if exact is not None:
        s, lost = two_sum(a, v)
        return s, b + lost
    return a + v, b


@inline
def is_far(n, a, b, exact):
    """Whether the shift is too far from the mean."""
    between = a * a / n
    m2 = b - between
    return between > (FAR if exact is not None else FAR_OF_FLOATS) * m2 and between < np.inf


@inline
def short(number, exact):
    """As float32 has it, so that floats' and integers' distances from it are exact."""
    if exact is None:
        return np.float64(np.float32(number))
    return number


# --- masks ------------------------------------------------------------------------------------------------------------


@inline
def mask_of(where, ones, geometry):
    """The bytes that say which values of a row count, how far apart they are, and whether NaNs are left out."""
    of_values = geometry[MASK] == OF_VALUES
    return either(of_values, where, ones), 1 if of_values else 0, geometry[SKIP_NAN] != 0


@inline
def row_counts(where, at, geometry):
    """Whether a mask of rows has this one."""
    return geometry[MASK] != OF_ROWS or value_at(where, at) != 0.0


# --- arrays of a thread -----------------------------------------------------------------------------------------------


@inline
def field(workspace, at, used):
    """Eight numbers of a field; zeros where it is not used."""
    if used is not None:
        return load(workspace, at, 64)
    return everywhere(0.0)


@inline
def fetched(raw, fetch, at, step, n, geometry, workspace, into):
    """Copy n values a step apart, of any dtype, to a place in ``workspace`` as float64."""
    params = reserve(3)
    put_word(params, address(raw, at * geometry[ITEMSIZE]))
    put_word(params + 8, step)
    put_word(params + 16, address(workspace, into))
    enter(fetch, params, 0, 0, n)


# --- results ----------------------------------------------------------------------------------------------------------


@inline
def merge_parts(a, at, pitch, far, parts, cells, squares, exact, geometry, count, mean, spread, o_at, ddof, status):
    """Results of neighbouring kept indices from their parts, ``far`` apart, whose four fields are a pitch apart."""
    zero, one = everywhere(0.0), everywhere(1.0)
    for j in range(0, cells, LANES):
        n, hi, lo, m2 = zero, zero, zero, zero
        among = first_bytes_not_zero(None, 0, cells - j)  # in the other lanes are other numbers, or none yet
        origin = choose(among, field(a, at + pitch + j, squares), zero)
        lower_underflow_flag()
        for k in range(parts):
            here = at + k * far + j
            part_n, s = choose(among, load(a, here, 64), zero), choose(among, load(a, here + 2 * pitch, 64), zero)
            rest = s
            if squares is not None or exact is not None:
                rest = choose(among, load(a, here + 3 * pitch, 64), zero)
            if squares is not None:
                some = choose(greater(part_n, zero), part_n, one)
                part_m2 = rest - s * (s / some)
                part_m2 = zero_where_not_positive(part_m2, part_m2)
                apart = choose(among, load(a, here + pitch, 64), zero) - origin
                both = choose(greater(n + part_n, zero), n + part_n, one)
                delta = (apart + s / some) - (hi + lo) / choose(greater(n, zero), n, one)
                between = choose(greater(n, zero), delta * delta * (n * (part_n / both)), zero)
                m2 = choose(greater(part_n, zero), m2 + (part_m2 + between), m2)
                moved, lost = two_sum(hi, part_n * apart)
                hi, more = two_sum(moved, s)
                lo = lo + (lost + more)
            else:
                hi, lost = two_sum(hi, s)
                lo = lo + (lost + rest if exact is not None else lost)
            n = n + part_n
        if squares is not None and exact is not None and parts > 1 and underflowed(lane(m2, 0)):
            status[CAREFUL] = 1.0
        finish(
            n, origin, hi, lo, m2, squares, exact, geometry, count, mean, spread,
            o_at + j * geometry[KEPT_STEP], min(LANES, cells - j), ddof, status,
        )  # fmt: skip


@inline
def finish(n, origin, hi, lo, m2, squares, exact, geometry, count, mean, spread, at, cells, ddof, status):
    """Results of up to eight kept indices."""
    zero, one = everywhere(0.0), everywhere(1.0)
    among = first_bytes_not_zero(None, 0, cells)
    s = hi + lo
    s = choose(finite(lo), s, hi)  # what two-sum loses of infinities is NaN
    mu = s / n
    # The quotient once more: the mean of equal numbers is that number.
    rest = (fma(zero - mu, n, s) + ((hi - s) + lo)) / n
    if squares is not None:
        mu, lost = two_sum(origin, mu)
        rest = rest + lost
    better = mu + rest
    mu = choose(finite(better), better, mu)
    if squares is not None:
        degrees = n - everywhere(ddof)
        left = choose(greater(degrees, zero), degrees, zero)
        result = m2
        if geometry[FORM] != SUM_OF_SQUARES:
            result = m2 / left
            if geometry[SKIP_NAN] != 0:
                result = choose(greater(left, zero), result, everywhere(np.nan))
            if geometry[FORM] == STD:
                result = root(result)
            if any_greater(choose(among, choose(greater(degrees, zero), zero, one), zero), zero):
                status[NO_DEGREES] = 1.0
        else:
            result = choose(greater(n, zero), result, everywhere(np.nan))
        put_results(spread, geometry[SPREAD_KIND], at, geometry[KEPT_STEP], result, cells)
        if exact is not None:
            small = choose(greater(everywhere(LEAST_SQUARE), m2), m2, zero)
            unsound = choose(finite(m2), small, one)
            if any_greater(choose(among, unsound, zero), zero):
                status[CAREFUL] = 1.0
    elif exact is not None and any_greater(choose(among, choose(finite(s), zero, one), zero), zero):
        status[CAREFUL] = 1.0
    put_results(mean, geometry[MEAN_KIND], at, geometry[KEPT_STEP], mu, cells)
    put_results(count, geometry[COUNT_KIND], at, geometry[KEPT_STEP], n, cells)
    if any_greater(choose(among, choose(greater(n, zero), zero, one), zero), zero):
        status[EMPTY] = 1.0


@inline
def put_results(out, kind, at, step, v, n):
    """Into an array at an address, whose dtype's kind is one of `RESULTS`; 0 for none."""
    if kind == F8:
        put(doubles(out), at, step, v, n)
    elif kind == F4:
        put(floats(out), at, step, v, n)
    elif kind == U2:
        put(halves(out), at, step, v, n)
    elif kind == I2:
        put(bfloats(out), at, step, v, n)


@inline
def put(out, at, step, v, n):
    if step == 1:
        put_values(out, at, v, n)
    else:
        for k in range(n):
            put_value(out, at + k * step, lane(v, k))


@kernel
def finish_parts(thread, first, last, squares, exact, geometry, partials, count, mean, spread, ddof, status):
    """A task is a kept index of `inner`, or up to eight neighbours of `outer`."""
    parts, channels = geometry[PARTS], geometry[CHANNELS]
    groups = -(-channels // LANES)
    for task in range(first, last):
        if channels == 0:
            _, _, o_at = place(task, geometry, DIMENSIONS, geometry[KEPT_DIMENSIONS])
            merge_parts(
                partials, FIELDS * parts * task, 1, FIELDS, parts, 1, squares, exact, geometry,
                count, mean, spread, o_at, ddof, status,
            )  # fmt: skip
        else:
            k = task // groups
            cell = (task - k * groups) * LANES
            _, _, o_at = place(k, geometry, DIMENSIONS, geometry[KEPT_DIMENSIONS])
            merge_parts(
                partials, FIELDS * channels * parts * k + cell, channels, FIELDS * channels, parts,
                min(LANES, channels - cell), squares, exact, geometry,
                count, mean, spread, o_at + cell * geometry[KEPT_STEP], ddof, status,
            )  # fmt: skip


# --- any dtype, any step ----------------------------------------------------------------------------------------------


@kernel
def fetch(thread, first, last, x, step, out):
    """Copy values from the first to the last, a step apart, as float64."""
    whole = last - (last - first) % LANES
    if step == 1:
        for i in range(first, whole, LANES):
            put_values(out, i, values(x, i, None), LANES)
        if whole < last:
            put_values(out, whole, first_values(x, whole, None, last - whole), last - whole)
    else:
        for i in range(first, whole, LANES):
            put_values(out, i, values(x, i * step, step), LANES)
        if whole < last:
            put_values(out, whole, first_values(x, whole * step, step, last - whole), last - whole)
