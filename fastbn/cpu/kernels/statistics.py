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

`inner` goes along rows whose values are reduced, `outer` along rows of kept indices; `finish_parts` merges parts. The
geometry is laid out in `fastbn.cpu.statistics`. A part's numbers are (n, shift, A, B), of sums (n, _, sum, rest).
"""

import numpy as np

from fastbn.cpu.kernels.calls import F4, F8, I2, U2, bfloats, doubles, floats, halves, reserve
from fastbn.cpu.kernels.compiler import inline, kernel
from fastbn.cpu.kernels.doubles import (
    LANES,
    both,
    bytes_not_zero,
    choose,
    either,
    everywhere,
    finite,
    first_bytes_not_zero,
    first_values,
    greater,
    how_many,
    lane,
    not_nan,
    put_value,
    put_values,
    shortened,
    value_at,
    values,
)
from fastbn.cpu.kernels.flags import lower_underflow_flag, underflowed
from fastbn.cpu.kernels.simd import address, any_greater, fma, load, root, store, zero_where_not_positive
from fastbn.cpu.kernels.team import enter
from fastbn.cpu.kernels.team import store as put_word
from fastbn.cpu.statistics import (
    BUFFER,
    CAREFUL,
    CHANNELS,
    COLUMNS,
    COUNT_KIND,
    DIMENSION,
    DIMENSIONS,
    EMPTY,
    FIELDS,
    FOLD,
    FORM,
    ITEMSIZE,
    KEPT_DIMENSIONS,
    KEPT_STEP,
    LEAST_SQUARE,
    MASK,
    MEAN_KIND,
    NO_DEGREES,
    OF_INNER,
    OF_ROWS,
    OF_VALUES,
    PARTS,
    PIECE,
    PIECES,
    ROW_DIMENSIONS,
    ROWS,
    ROWS_OF_A_PART,
    SIZE,
    SKIP_NAN,
    SPREAD_KIND,
    STD,
    STEP,
    SUM_OF_SQUARES,
    TAIL,
    TILE,
    WIDTH,
)

PEEKS = 8
LOOKS = 3  # at a part, each around the mean that the one before has found
LONG = (
    4096  # values of a row from which its quarters are read side by side: four streams are up to twice as fast as one
)
# How much larger A^2/n may be than m2: four lose two bits of 53, which float64 data keep; float32's 24 need no more.
FAR, FAR_OF_FLOATS = 4.0, 2.0**20


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
def counted(x, at, where, w_at, masked, skip_nan, shift):
    """Eight values, those that do not count replaced by the shift; how many count."""
    v = values(x, at, None)
    mask = not_nan(bytes_not_zero(where, w_at), v, skip_nan, masked)
    return choose(mask, v, shift), how_many(mask)


@inline
def first_counted(x, at, where, w_at, masked, skip_nan, shift, n):
    """The same of the first n."""
    v = first_values(x, at, None, n)
    mask = not_nan(first_bytes_not_zero(where, w_at, n), v, skip_nan, masked)
    return choose(mask, v, shift), how_many(mask)


@inline
def total(a, b, squares, exact):
    """The sums over the lanes."""
    s, rest = lane(a, 0), lane(b, 0)
    for k in range(1, LANES):
        if squares is None and exact is not None:
            s, lost = two_sum(s, lane(a, k))
            rest += lost + lane(b, k)
        else:
            s += lane(a, k)
            rest += lane(b, k)
    return s, rest


@inline
def together(a, b, more_a, more_b, squares, exact):
    """Sums of vectors."""
    if squares is None and exact is not None:
        s, lost = two_sum(a, more_a)
        return s, lost + (b + more_b)
    return a + more_a, b + more_b


@inline
def is_far(n, a, b, exact):
    """Whether the shift is too far from the mean."""
    between = a * a / n
    m2 = b - between
    return between > (FAR if exact is not None else FAR_OF_FLOATS) * m2 and between < np.inf


# --- along rows that are reduced --------------------------------------------------------------------------------------


@inline
def fetched(raw, fetch, at, step, n, geometry, workspace, into):
    """Copy n values a step apart, of any dtype, to a place in ``workspace`` as float64."""
    params = reserve(3)
    put_word(params, address(raw, at * geometry[ITEMSIZE]))
    put_word(params + 8, step)
    put_word(params + 16, address(workspace, into))
    enter(fetch, params, 0, 0, n)


@inline
def value_of(x, raw, fetch, at, geometry, workspace, buffer):
    """One value of either array."""
    number = 0.0
    if x is not None:
        number = value_at(x, at)
    if raw is not None:
        fetched(raw, fetch, at, 1, 1, geometry, workspace, buffer)
        number = value_at(workspace, buffer)
    return number


@inline
def short(number, exact):
    """As float32 has it, so that floats' and integers' distances from it are exact."""
    if exact is None:
        return np.float64(np.float32(number))
    return number


@inline
def peek(x, raw, fetch, at, where, w_at, exact, geometry, r, rows, columns, workspace, buffer):
    """The mean of some values of a part, for a shift; around the first that counts, so that it is that of constants."""
    size = rows * columns
    count = min(PEEKS, max(1, size >> 4))
    origin, s, n = 0.0, 0.0, 0
    for k in range(count):
        i = k * size // count if k > 0 else 0
        row = i // columns if rows > 1 else 0
        x_at, w_k = at + (i - row * columns) * geometry[STEP], w_at
        if geometry[MASK] == OF_VALUES:
            w_k += i - row * columns
        if row > 0:
            here, there = row_at(r + row, geometry), row_at(r, geometry)
            x_at += here[0] - there[0]
            w_k += here[1] - there[1]
        number = value_of(x, raw, fetch, x_at, geometry, workspace, buffer)
        if np.isfinite(number) and (geometry[MASK] == 0 or value_at(where, w_k) != 0.0):
            if n == 0:
                origin = number
            s += number - origin
            n += 1
    return short(origin + s / n, exact) if n > 0 else 0.0


@inline
def add_row(x, at, columns, where, w_at, by, masked, skip_nan, squares, exact, q, n, a0, a1, a2, a3, b0, b1, b2, b3):
    """A row to four sums of eight lanes each, and to the count."""
    far, jump, end = LANES, 4 * LANES, columns & -4 * LANES
    done = end
    if columns >= LONG:
        far, jump, end = columns // 4 & -LANES, LANES, columns // 4 & -LANES
        done = 4 * end
    i = 0
    while i < end:  # a range of unknown step would be counted by a division for each row
        v, c = counted(x, at + i, where, w_at + i * by, masked, skip_nan, q)
        a0, b0 = add(a0, b0, v, q, squares, exact)
        n += c
        v, c = counted(x, at + i + far, where, w_at + (i + far) * by, masked, skip_nan, q)
        a1, b1 = add(a1, b1, v, q, squares, exact)
        n += c
        v, c = counted(x, at + i + 2 * far, where, w_at + (i + 2 * far) * by, masked, skip_nan, q)
        a2, b2 = add(a2, b2, v, q, squares, exact)
        n += c
        v, c = counted(x, at + i + 3 * far, where, w_at + (i + 3 * far) * by, masked, skip_nan, q)
        a3, b3 = add(a3, b3, v, q, squares, exact)
        n += c
        i += jump
    for i in range(done, columns & -LANES, LANES):
        v, c = counted(x, at + i, where, w_at + i * by, masked, skip_nan, q)
        a0, b0 = add(a0, b0, v, q, squares, exact)
        n += c
    i = columns & -LANES
    if i < columns:
        v, c = first_counted(x, at + i, where, w_at + i * by, masked, skip_nan, q, columns - i)
        a1, b1 = add(a1, b1, v, q, squares, exact)
        n += c
    return n, a0, a1, a2, a3, b0, b1, b2, b3


@inline
def sums_of_rows(
    x, raw, fetch, at, where, ones, w_at, masked, squares, exact, geometry, r, last, columns, shift, workspace, buffer
):
    """n, A and B of rows from r to last. `at` and `w_at` are where row 0 begins."""
    q = everywhere(shift)
    a0 = everywhere(0.0)
    a1, a2, a3, b0, b1, b2, b3 = a0, a0, a0, a0, a0, a0, a0
    mask, by, skip_nan = mask_of(where, ones, geometry)
    n = 0
    while r < last:
        x_row, w_row, x_step, w_step, rows, _ = rows_from(r, last, geometry)
        r += rows
        x_row, w_row = at + x_row, w_at + w_row
        for _ in range(rows):
            if row_counts(where, w_row, geometry):
                if x is not None:
                    n, a0, a1, a2, a3, b0, b1, b2, b3 = add_row(
                        x, x_row, columns, mask, w_row * by, by, masked, skip_nan, squares, exact,
                        q, n, a0, a1, a2, a3, b0, b1, b2, b3,
                    )  # fmt: skip
                if raw is not None:
                    for c in range(0, columns, BUFFER):
                        part = min(BUFFER, columns - c)
                        fetched(
                            raw, fetch, x_row + c * geometry[STEP], geometry[STEP], part, geometry, workspace, buffer
                        )
                        n, a0, a1, a2, a3, b0, b1, b2, b3 = add_row(
                            workspace, buffer, part, mask, (w_row + c) * by, by, masked, skip_nan, squares, exact,
                            q, n, a0, a1, a2, a3, b0, b1, b2, b3,
                        )  # fmt: skip
            x_row += x_step
            w_row += w_step
    a0, b0 = together(a0, b0, a1, b1, squares, exact)
    a2, b2 = together(a2, b2, a3, b3, squares, exact)
    a0, b0 = together(a0, b0, a2, b2, squares, exact)
    a, b = total(a0, b0, squares, exact)
    return np.float64(n), a, b


@inline
def mask_of(where, ones, geometry):
    """The bytes that say which values of a row count, how far apart they are, and whether NaNs are left out."""
    of_values = geometry[MASK] == OF_VALUES
    return either(of_values, where, ones), 1 if of_values else 0, geometry[SKIP_NAN] != 0


@inline
def row_counts(where, at, geometry):
    """Whether a mask of rows has this one."""
    return geometry[MASK] != OF_ROWS or value_at(where, at) != 0.0


@kernel
def inner(
    thread, first, last, x, raw, fetch, where, ones, masked, squares, exact, geometry, partials, workspace,
    count, mean, spread, ddof, status,
):  # fmt: skip
    """A task is a part of a kept index: rows, or a piece of one."""
    parts, pieces, columns = geometry[PARTS], geometry[PIECES], geometry[COLUMNS]
    own = thread * OF_INNER
    buffer = own + FIELDS * LANES
    for task in range(first, last):
        t, part = task, 0
        if parts > 1:
            t = task // parts
            part = task - t * parts
        at, w_at, o_at = place(t, geometry, DIMENSIONS, geometry[KEPT_DIMENSIONS])
        r, width = part * geometry[ROWS_OF_A_PART], columns
        end = min(r + geometry[ROWS_OF_A_PART], geometry[ROWS])
        if pieces > 1:
            r = part // pieces
            end, start = r + 1, (part - r * pieces) * geometry[PIECE]
            width = min(geometry[PIECE], columns - start)
            at += start * geometry[STEP]
            w_at += start if geometry[MASK] == OF_VALUES else 0
        shift = 0.0
        if squares is not None:
            x_row, w_row = row_at(r, geometry)
            shift = peek(
                x, raw, fetch, at + x_row, where, w_at + w_row, exact, geometry, r, end - r, width, workspace, buffer
            )
            lower_underflow_flag()
        n, a, b = 0.0, 0.0, 0.0
        for look in range(LOOKS):
            n, a, b = sums_of_rows(
                x, raw, fetch, at, where, ones, w_at, masked, squares, exact, geometry, r, end, width, shift,
                workspace, buffer,
            )  # fmt: skip
            if squares is None or n == 0.0 or look + 1 == LOOKS or not is_far(n, a, b, exact):
                break
            shift = short(shift + a / n, exact)
        if exact is not None and squares is not None and underflowed(b):
            status[CAREFUL] = 1.0
        if parts > 1:
            partials[FIELDS * task], partials[FIELDS * task + 1] = n, shift
            partials[FIELDS * task + 2], partials[FIELDS * task + 3] = a, b
        else:
            workspace[own], workspace[own + LANES], workspace[own + 2 * LANES], workspace[own + 3 * LANES] = (
                n,
                shift,
                a,
                b,
            )
            merge_parts(
                workspace, own, LANES, 0, 1, 1, squares, exact, geometry, count, mean, spread, o_at, ddof, status
            )


# --- along rows of kept indices ---------------------------------------------------------------------------------------


@inline
def field(workspace, at, used):
    """Eight numbers of a field; zeros where it is not used."""
    if used is not None:
        return load(workspace, at, 64)
    return everywhere(0.0)


@inline
def add_to_columns(workspace, at, pitch, v, q, squares, exact):
    """Values to the sums of their columns."""
    a = load(workspace, at + 2 * pitch, 64)
    if squares is None and exact is None:
        store(workspace, at + 2 * pitch, a + v)
    else:
        a, b = add(a, load(workspace, at + 3 * pitch, 64), v, q, squares, exact)
        store(workspace, at + 2 * pitch, a)
        store(workspace, at + 3 * pitch, b)


@inline
def add_one_row(x, at, where, w_at, by, masked, skip_nan, squares, exact, columns, workspace, own, pitch):
    """A row to the sums of its columns, and to their counts if there are masks."""
    for c in range(0, columns, LANES):
        q = field(workspace, own + pitch + c, squares)
        if c + LANES <= columns:
            v = values(x, at + c, None)
            mask = not_nan(bytes_not_zero(where, w_at + c * by), v, skip_nan, masked)
            v = choose(mask, v, q)
        else:
            v = first_values(x, at + c, None, columns - c)
            mask = not_nan(first_bytes_not_zero(where, w_at + c * by, columns - c), v, skip_nan, masked)
            v = choose(mask, v, q)
        if masked is not None:
            one = choose(mask, everywhere(1.0), everywhere(0.0))
            store(workspace, own + c, load(workspace, own + c, 64) + one)
        add_to_columns(workspace, own + c, pitch, v, q, squares, exact)


@inline
def add_four(x, at, far, squares, exact, workspace, own, pitch, part):
    """Eight columns, or a part of them, of four rows, each ``far`` from the one before."""
    q = field(workspace, own + pitch, squares)
    a = load(workspace, own + 2 * pitch, 64)
    b = a
    if squares is not None or exact is not None:
        b = load(workspace, own + 3 * pitch, 64)
    for k in range(4):
        if part is None:
            v = values(x, at + k * far, None)
        else:
            v = choose(first_bytes_not_zero(None, 0, part), first_values(x, at + k * far, None, part), q)
        a, b = add(a, b, v, q, squares, exact)
    store(workspace, own + 2 * pitch, a)
    if squares is not None or exact is not None:
        store(workspace, own + 3 * pitch, b)


@inline
def add_four_rows(x, at, far, squares, exact, columns, workspace, own, pitch):
    whole = columns & -LANES
    for c in range(0, whole, LANES):
        add_four(x, at + c, far, squares, exact, workspace, own + c, pitch, None)
    if whole < columns:
        add_four(x, at + whole, far, squares, exact, workspace, own + whole, pitch, columns - whole)


@inline
def add_rows(
    x, raw, fetch, at, where, ones, w_at, masked, squares, exact, geometry, r, last, columns, workspace, own, pitch
):
    """Rows from r to last to the sums of their columns; how many values a cell has of them, if there are no masks."""
    mask, by, skip_nan = mask_of(where, ones, geometry)
    buffer = own + FIELDS * pitch
    n = 0
    while r < last:
        x_row, w_row, x_step, w_step, rows, left = rows_from(r, last, geometry)
        x_row, w_row = at + x_row, w_at + w_row
        r += rows
        whole = rows - 1 if geometry[TAIL] > 0 and rows == left else rows  # the last one of folded rows may be short
        done = 0
        if x is not None and masked is None:
            quarter = whole // 4
            for k in range(quarter):
                add_four_rows(x, x_row + k * x_step, quarter * x_step, squares, exact, columns, workspace, own, pitch)
            done = 4 * quarter
        for k in range(done, rows):
            width, w_k = columns if k < whole else geometry[TAIL], w_row + k * w_step
            if row_counts(where, w_k, geometry):
                if x is not None:
                    add_one_row(
                        x, x_row + k * x_step, mask, w_k * by, by, masked, skip_nan, squares, exact, width,
                        workspace, own, pitch,
                    )  # fmt: skip
                if raw is not None:
                    fetched(raw, fetch, x_row + k * x_step, geometry[STEP], width, geometry, workspace, buffer)
                    add_one_row(
                        workspace,
                        buffer,
                        mask,
                        w_k * by,
                        by,
                        masked,
                        skip_nan,
                        squares,
                        exact,
                        width,
                        workspace,
                        own,
                        pitch,
                    )
                n += geometry[FOLD] if k < whole else geometry[TAIL] // (geometry[CHANNELS] * geometry[SIZE])
        n += done * geometry[FOLD]
    return np.float64(n * geometry[SIZE])


@inline
def peek_at_row(x, at, where, w_at, by, masked, width, first, workspace, own, pitch):
    """A row to the sums around the first values that count in each column, and to their counts."""
    zero, one = everywhere(0.0), everywhere(1.0)
    for c in range(0, width, LANES):
        part = min(LANES, width - c)
        v = choose(first_bytes_not_zero(None, 0, part), first_values(x, at + c, None, part), zero)
        counts = both(finite(v), first_bytes_not_zero(where, w_at + c * by, part))
        if first and masked is None:
            store(workspace, own + pitch + c, choose(counts, v, zero))
        else:
            n, q = load(workspace, own + c, 64), load(workspace, own + pitch + c, 64)
            if masked is not None:
                q = choose(both(counts, greater(one, n)), v, q)
                store(workspace, own + pitch + c, q)
            d = choose(counts, v - q, zero)
            store(workspace, own + 2 * pitch + c, load(workspace, own + 2 * pitch + c, 64) + d)
            store(workspace, own + c, n + choose(counts, one, zero))


@inline
def peek_at_columns(
    x, raw, fetch, at, where, ones, w_at, masked, exact, geometry, r, last, columns, cells, workspace, own, pitch
):
    """A shift for each column, the same for all of a cell, from some rows of a part; their sums are used meanwhile."""
    buffer = own + FIELDS * pitch
    mask, by, _ = mask_of(where, ones, geometry)
    clear(workspace, own, columns)
    clear(workspace, own + pitch, columns)
    clear(workspace, own + 2 * pitch, columns)
    count = min(PEEKS, max(1, (last - r) >> (4 if exact is None else 2)))
    for k in range(count):
        row, w_row, _, _, _, left = rows_from(r + k * (last - r) // count, last, geometry)
        w_row += w_at
        width = geometry[TAIL] if geometry[TAIL] > 0 and left == 1 else columns
        if row_counts(where, w_row, geometry):
            if x is not None:
                peek_at_row(x, at + row, mask, w_row * by, by, masked, width, k == 0, workspace, own, pitch)
            if raw is not None:
                fetched(raw, fetch, at + row, geometry[STEP], width, geometry, workspace, buffer)
                peek_at_row(workspace, buffer, mask, w_row * by, by, masked, width, k == 0, workspace, own, pitch)
    for c in range(0, columns, LANES):
        n, q = load(workspace, own + c, 64), load(workspace, own + pitch + c, 64)
        if masked is None:
            n = n + everywhere(1.0)
        mu = q + load(workspace, own + 2 * pitch + c, 64) / choose(greater(n, everywhere(0.0)), n, everywhere(1.0))
        store(workspace, own + pitch + c, shortened(mu, exact))
    if cells < columns:
        of_first = geometry[SIZE] if geometry[FOLD] == 1 else 1
        for j in range(cells):
            origin, s = workspace[own + pitch + j * geometry[SIZE]], 0.0
            for i in range(of_first):
                s += workspace[own + pitch + j * geometry[SIZE] + i] - origin
            workspace[own + 2 * pitch + j] = short(origin + s / of_first, exact)
        spread_shifts(geometry, columns, cells, workspace, own, pitch)


@inline
def spread_shifts(geometry, columns, cells, workspace, own, pitch):
    """The shift of each cell, from where its sum stands, to all of its columns."""
    size = geometry[SIZE]
    j, c = 0, 0
    while c < columns:
        q = workspace[own + 2 * pitch + j]
        for i in range(c, c + size):
            workspace[own + pitch + i] = q
        c += size
        j = j + 1 if j + 1 < cells else 0


@inline
def gather_columns(geometry, columns, cells, squares, exact, masked, workspace, own, pitch):
    """The sums of each cell's columns, moved side by side."""
    size, folds = geometry[SIZE], geometry[FOLD]
    for j in range(0, cells, LANES):
        n, a = everywhere(0.0), everywhere(0.0)
        b = n
        for k in range(folds):
            for i in range(size):
                at = own + (k * cells + j) * size + i
                v = values(workspace, at + 2 * pitch, size)
                if masked is not None:
                    n = n + values(workspace, at, size)
                if squares is not None:
                    a, b = a + v, b + values(workspace, at + 3 * pitch, size)
                elif exact is not None:
                    a, lost = two_sum(a, v)
                    b = b + (lost + values(workspace, at + 3 * pitch, size))
                else:
                    a = a + v
        if masked is not None:
            store(workspace, own + j, n)
        if squares is not None:
            store(workspace, own + pitch + j, values(workspace, own + pitch + j * size, size))
        store(workspace, own + 2 * pitch + j, a)
        if squares is not None or exact is not None:
            store(workspace, own + 3 * pitch + j, b)


@inline
def some_are_far(cells, exact, workspace, own, pitch):
    """`is_far` of any cell. The lanes behind the last one hold sums of other columns."""
    limit = everywhere(FAR if exact is not None else FAR_OF_FLOATS)
    found = False
    for j in range(0, cells, LANES):
        n, a = load(workspace, own + j, 64), load(workspace, own + 2 * pitch + j, 64)
        between = a * a / choose(greater(n, everywhere(0.0)), n, everywhere(1.0))
        m2 = load(workspace, own + 3 * pitch + j, 64) - between
        cell = first_bytes_not_zero(None, 0, min(LANES, cells - j))
        between = choose(finite(between), between, everywhere(-1.0))
        if any_greater(choose(cell, between, everywhere(-1.0)), choose(cell, limit * m2, everywhere(0.0))):
            found = True
    return found


@inline
def better_shifts(exact, geometry, columns, cells, workspace, own, pitch):
    """The mean of each cell, for another look."""
    for j in range(cells):
        q, n, a = workspace[own + pitch + j], workspace[own + j], workspace[own + 2 * pitch + j]
        better = short(q + a / n, exact)
        workspace[own + 2 * pitch + j] = better if n > 0.0 and np.isfinite(better) else q
    spread_shifts(geometry, columns, cells, workspace, own, pitch)


@inline
def clear(workspace, at, count):
    for c in range(0, count, LANES):
        store(workspace, at + c, everywhere(0.0))


@inline
def sums_of_columns(
    x,
    raw,
    fetch,
    at,
    where,
    ones,
    w_at,
    masked,
    squares,
    exact,
    geometry,
    r,
    last,
    columns,
    cells,
    workspace,
    own,
    pitch,
):
    """n, shift, A and B of each cell, side by side in ``workspace``, a pitch apart."""
    if squares is not None:
        peek_at_columns(
            x,
            raw,
            fetch,
            at,
            where,
            ones,
            w_at,
            masked,
            exact,
            geometry,
            r,
            last,
            columns,
            cells,
            workspace,
            own,
            pitch,
        )
    for look in range(LOOKS):
        if masked is not None:
            clear(workspace, own, columns)
        clear(workspace, own + 2 * pitch, columns)
        if squares is not None or exact is not None:
            clear(workspace, own + 3 * pitch, columns)
        n = add_rows(
            x,
            raw,
            fetch,
            at,
            where,
            ones,
            w_at,
            masked,
            squares,
            exact,
            geometry,
            r,
            last,
            columns,
            workspace,
            own,
            pitch,
        )
        if columns > cells:
            gather_columns(geometry, columns, cells, squares, exact, masked, workspace, own, pitch)
        if masked is None:
            for j in range(0, cells, LANES):
                store(workspace, own + j, everywhere(n))
        if squares is None or look + 1 == LOOKS or not some_are_far(cells, exact, workspace, own, pitch):
            break
        better_shifts(exact, geometry, columns, cells, workspace, own, pitch)


@kernel
def outer(
    thread, first, last, x, raw, fetch, where, ones, masked, squares, exact, geometry, partials, workspace,
    count, mean, spread, ddof, status,
):  # fmt: skip
    """A task is a tile of cells in a part of the rows; tiles of a row are neighbours."""
    parts, channels, tile, pitch = geometry[PARTS], geometry[CHANNELS], geometry[TILE], geometry[WIDTH]
    tiles = -(-channels // tile)
    own = thread * (FIELDS + 1) * pitch
    for task in range(first, last):
        rest = task // tiles
        cell = (task - rest * tiles) * tile
        k = rest // parts
        part = rest - k * parts
        cells = min(tile, channels - cell)
        columns = geometry[FOLD] * cells * geometry[SIZE]
        at, w_at, o_at = place(k, geometry, DIMENSIONS, geometry[KEPT_DIMENSIONS])
        r = part * geometry[ROWS_OF_A_PART]
        at += cell * geometry[SIZE] * geometry[STEP]
        w_at += cell * geometry[SIZE] if geometry[MASK] == OF_VALUES else 0
        if squares is not None and exact is not None:
            lower_underflow_flag()
        sums_of_columns(
            x, raw, fetch, at, where, ones, w_at, masked, squares, exact, geometry,
            r, min(r + geometry[ROWS_OF_A_PART], geometry[ROWS]), columns, cells, workspace, own, pitch,
        )  # fmt: skip
        if squares is not None and exact is not None and underflowed(workspace[own]):
            status[CAREFUL] = 1.0
        if parts > 1:
            to = FIELDS * channels * (k * parts + part) + cell
            for f in range(FIELDS):
                for j in range(0, cells, LANES):
                    numbers = load(workspace, own + f * pitch + j, 64)
                    put_values(partials, to + f * channels + j, numbers, min(LANES, cells - j))
        else:
            merge_parts(
                workspace, own, pitch, 0, 1, cells, squares, exact, geometry, count, mean, spread,
                o_at + cell * geometry[KEPT_STEP], ddof, status,
            )  # fmt: skip


# --- results ----------------------------------------------------------------------------------------------------------


@inline
def merge_parts(a, at, pitch, far, parts, cells, squares, exact, geometry, count, mean, spread, o_at, ddof, status):
    """Results of neighbouring kept indices from their parts, ``far`` apart, whose four fields are a pitch apart."""
    zero, one = everywhere(0.0), everywhere(1.0)
    for j in range(0, cells, LANES):
        n, hi, lo, m2 = zero, zero, zero, zero
        origin = field(a, at + pitch + j, squares)
        for k in range(parts):
            here = at + k * far + j
            part_n, s = load(a, here, 64), load(a, here + 2 * pitch, 64)
            rest = s
            if squares is not None or exact is not None:
                rest = load(a, here + 3 * pitch, 64)
            if squares is not None:
                some = choose(greater(part_n, zero), part_n, one)
                part_m2 = rest - s * (s / some)
                part_m2 = zero_where_not_positive(part_m2, part_m2)
                apart = load(a, here + pitch, 64) - origin
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
    lower_underflow_flag()
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
    if squares is not None and exact is not None and underflowed(ddof):
        status[CAREFUL] = 1.0


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
