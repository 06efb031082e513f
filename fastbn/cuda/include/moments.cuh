// Count, mean and sum of squared deviations (M2): of a thread's vectors, of a block's threads, of several blocks.
//
// A thread takes HELD vectors at a time. Relative to their first element p, with d = x - p, m = mean(d), e = d - m:
//     mean = p + m + sum(e)/n,   M2 = sum(e^2) - sum(e)^2/n
// in the type of the elements' arithmetic, where nothing cancels. Chunks, threads and blocks are merged in float64 as
// Chan, Golub & LeVeque (1983) do, with the sums n*a and M2 + n*a^2 of the distances a from a common origin: a merge of
// many takes one division. Rounding then enlarges M2 by 2^-53 times the number of chunks at most, since no chunk of m
// among n values lies further than sqrt(n/m) deviations from the mean.
// Means are kept in two parts, origin and shift, so that float64 data far from 0 lose nothing when they are merged.
//
// Squares that leave the range of their type, at either end, are taken again: those of float32 in float64, those of
// float64 of distances times a unit, 2^600, 1 or 2^-600. No distance of float64 numbers needs another.

#pragma once

#include "tile.cuh"

#if DTYPE == 3
#define LEAST_SQUARES 0x1p-900  // below, sums of squares have lost digits to underflow
#define SMALL_UNIT 0x1p600      // for small distances
#define LARGE_UNIT 0x1p-600
#else
#define LEAST_SQUARES 0x1p-76  // squares below 2^-126 are 0, which is 2^-50 of it
#define SMALL_UNIT 1.0
#define LARGE_UNIT 1.0
#endif

struct Part {
    double n, origin, shift, m2;  // the mean is origin + shift
#if DTYPE == 3
    double unit = 1;  // m2 is of deviations times this
#else
    static constexpr double unit = 1;
#endif

    __device__ __forceinline__ double mean() const { return n > 0 ? origin + shift : not_a_number(); }

    __device__ __forceinline__ double per_unit() const { return unit == 1 ? 1 : unit > 1 ? LARGE_UNIT : SMALL_UNIT; }

    __device__ __forceinline__ double m2_in(double other) const {
        const double factor = other * per_unit();
        return m2 * factor * factor;
    }
};

// A part whose mean is origin + shift / unit, which is in range where the distance from the origin is not.
__device__ __forceinline__ Part part_in_units(double n, double origin, double shift, double m2, double unit) {
    m2 = m2 >= 0 || m2 != m2 ? m2 : 0;
#if DTYPE == 3
    if (unit != 1 && m2 != 0) {
        Part part{n, 0, 0, m2, unit};
        part.origin = (origin * unit + shift) * part.per_unit();
        part.shift = ((origin * unit - part.origin * unit) + shift) * part.per_unit();
        return part;
    }
#endif
    return Part{n, origin, shift, m2};
}

// --- a thread ---------------------------------------------------------------------------------------------------------

struct Weights {  // of the elements of one channel that a thread holds
#if WEIGHT
    real w[HELD][DEPTH];

    __device__ __forceinline__ bool selects(int k, int j) const { return w[k][j] > 0; }
    __device__ __forceinline__ real times(int k, int j, real value) const { return w[k][j] * value; }
#else
    __device__ __forceinline__ bool selects(int k, int j) const { return true; }
    __device__ __forceinline__ real times(int k, int j, real value) const { return value; }
#endif
};

struct Running {  // of one channel
    double away, squares;  // sums of n*a and of M2 + n*a^2 of the chunks, with distances times the unit
    real origin;           // the first finite element; NaN before
#if DTYPE == 3
    double unit;
#else
    static constexpr double unit = 1;
#endif
#if WEIGHT
    double n;  // sum of the weights
#endif
    // Once squares is NaN there were infinite values or NaNs, and away is their sum.

    __device__ __forceinline__ void clear() {
        away = squares = 0;
        origin = static_cast<real>(not_a_number());
#if DTYPE == 3
        unit = 1;
#endif
#if WEIGHT
        n = 0;
#endif
    }

    // One chunk.
    __device__ __forceinline__ void add(
        const Packed (&held)[HELD], int count, int channel, const Params& p, const Tile& tile, Index v
    ) {
        if (count == 0) return;
        const int from = ALONG_CHANNELS ? channel : 0;
        Weights weights;
#if WEIGHT
        double weight = 0;
        real first = 0;
        bool some = false;
#pragma unroll
        for (int k = 0; k < HELD; ++k)
#pragma unroll
            for (int j = 0; j < DEPTH; ++j) {
                const double exact = k < count ? weight_of(p, tile, v + k * ROWS, from + j) : 0.0;
                weights.w[k][j] = static_cast<real>(exact);
                weight += exact;
                if (!some && exact > 0) {
                    first = element(held[k], from + j);
                    some = true;
                }
            }
        if (!some) return;
        const double least = LEAST_SQUARES * (1 + weight);
#else
        const double weight = count * DEPTH, least = LEAST_SQUARES;
        const real first = element(held[0], from);
#endif
        real total = 0;
#pragma unroll
        for (int k = 0; k < HELD; ++k)
            if (k < count) {
                real part = 0;
#pragma unroll
                for (int j = 0; j < DEPTH; ++j)
                    if (weights.selects(k, j)) part += weights.times(k, j, element(held[k], from + j) - first);
                total += part;
            }
        const real inverse = reciprocal(static_cast<real>(weight)), middle = total * inverse;
        real rest = 0, square = 0;
#pragma unroll
        for (int k = 0; k < HELD; ++k)
            if (k < count) {
                real part = 0, part_square = 0;
#pragma unroll
                for (int j = 0; j < DEPTH; ++j)
                    if (weights.selects(k, j)) {
                        const real e = (element(held[k], from + j) - first) - middle;
                        part += weights.times(k, j, e);
                        part_square += weights.times(k, j, e * e);
                    }
                rest += part;
                square += part_square;
            }
        const real correction = rest * inverse;
        const real start = origin == origin ? origin : first;
        const double distance = (static_cast<double>(first) - start) + (static_cast<double>(middle) + correction);
        const double moved = weight * distance;
        const double more = squares + ((square - rest * correction) + moved * distance);
        if ((more >= least && is_finite(more) && unit == 1) || constant(held, count, from, weights, start)) {
#if WEIGHT
            n += weight;
#endif
            away += moved;
            squares = more;
            origin = start;
        } else {
            add_carefully(held, count, from, weights, start);
        }
    }

    // Whether all elements so far are one number, as in the channels that a relu has left nothing of.
    __device__ __forceinline__ bool constant(
        const Packed (&held)[HELD], int count, int from, const Weights& weights, real start
    ) const {
        bool same = squares == 0 && is_finite(start);
#pragma unroll
        for (int k = 0; k < HELD; ++k)
            if (k < count)
#pragma unroll
                for (int j = 0; j < DEPTH; ++j)
                    if (weights.selects(k, j)) same = same && element(held[k], from + j) == start;
        return same;
    }

    // A chunk with infinite values, NaN, or squares beyond the type's range.
    __device__ __forceinline__ void add_carefully(
        const Packed (&held)[HELD], int count, int from, const Weights& weights, real start
    ) {
        real infinite = 0;  // the sum of all that is not finite
#pragma unroll
        for (int k = 0; k < HELD; ++k)
            if (k < count)
#pragma unroll
                for (int j = 0; j < DEPTH; ++j)
                    if (weights.selects(k, j)) {
                        const real value = element(held[k], from + j);
                        if (!is_finite(value)) infinite += value;
#if WEIGHT
                        n += weights.w[k][j];
#endif
                    }
        const bool odd = squares != squares;
        if (odd || infinite != 0) {
            away = odd ? away + infinite : infinite;
            squares = not_a_number();
            return;
        }
        origin = start;
#if DTYPE == 3
        if (squares == 0) unit = SMALL_UNIT;
#pragma unroll 1
        while (!added_in_units(held, count, from, weights) && unit > LARGE_UNIT) {
            away *= LARGE_UNIT;
            squares *= LARGE_UNIT;
            squares *= LARGE_UNIT;
            unit *= LARGE_UNIT;
        }
#else
        added_in_units(held, count, from, weights);
#endif
    }

    // Adds a chunk, but for squares that overflow.
    __device__ __forceinline__ bool added_in_units(
        const Packed (&held)[HELD], int count, int from, const Weights& weights
    ) {
        double moved = away, more = squares;
#pragma unroll
        for (int k = 0; k < HELD; ++k)
            if (k < count)
#pragma unroll
                for (int j = 0; j < DEPTH; ++j)
                    if (weights.selects(k, j)) {
                        const double value = element(held[k], from + j), weight = weights.times(k, j, 1);
                        const double distance = value * unit - origin * unit;
                        moved += weight * distance;
                        more += weight * distance * distance;
                    }
        if (!is_finite(more)) return false;
        away = moved;
        squares = more;
        return true;
    }

    // `taken`: the number of elements, where weights do not tell.
    __device__ __forceinline__ Part part(double taken) const {
#if WEIGHT
        taken = n;
#endif
        if (taken == 0) return Part{0, 0, 0, 0};
        if (squares != squares) return Part{taken, away, 0, not_a_number()};
        const double shift = away * reciprocal(taken);
        return part_in_units(taken, origin, shift, squares - away * shift, unit);
    }
};

// --- several parts ----------------------------------------------------------------------------------------------------

// Whether squares, those of this distance among them, were added up without loss.
__device__ __forceinline__ bool in_range(double squares, double distance) {
#if DTYPE == 3
    return is_finite(squares) && (squares >= LEAST_SQUARES || (squares == 0 && distance == 0));
#else
    return is_finite(squares);
#endif
}

// Where the mean is infinite: shares of the means. Infinities of both signs make a NaN.
__device__ __forceinline__ double share_of_mean(const Part& a, double n) {
    const double share = a.n * reciprocal(n);
    return a.n > 0 ? share * a.origin + share * a.shift : 0;
}

__device__ __forceinline__ Part merged(const Part& a, const Part& b) {
    if (a.n == 0) return b;
    if (b.n == 0) return a;
    const double n = a.n + b.n, share = b.n * reciprocal(n);
    const double delta = (b.origin - a.origin) + (b.shift - a.shift);
    const double m2 = (a.m2 + b.m2) + delta * delta * (a.n * share);
    if (in_range(m2, delta) && a.unit == 1 && b.unit == 1) return Part{n, a.origin, a.shift + delta * share, m2};
#if DTYPE == 3
#pragma unroll 1
    for (double unit = SMALL_UNIT; unit >= LARGE_UNIT; unit *= LARGE_UNIT) {
        const double far = (b.origin * unit - a.origin * unit) + (b.shift * unit - a.shift * unit);
        const double squares = (a.m2_in(unit) + b.m2_in(unit)) + far * far * (a.n * share);
        if (is_finite(squares)) return part_in_units(n, a.origin, a.shift * unit + far * share, squares, unit);
    }
#endif
    const bool odd = a.m2 != a.m2 || b.m2 != b.m2;
    return Part{n, share_of_mean(a, n) + share_of_mean(b, n), 0, odd ? not_a_number() : infinity()};
}

// As merged_across, where squares leave the range of float64 or something is not finite.
__device__ __forceinline__ Part merged_carefully(const Part& a, double n, double origin, int from, int to) {
    const double odd = added_across(a.m2 != a.m2 ? 1 : 0, from, to);
    const double mean = added_across(share_of_mean(a, n), from, to);
    Part whole{n, mean, 0, odd > 0 ? not_a_number() : infinity()};
#if DTYPE == 3
    bool found = false;
#pragma unroll 1
    for (double unit = SMALL_UNIT; unit >= LARGE_UNIT; unit *= LARGE_UNIT) {
        const double distance = a.n > 0 ? (a.origin * unit - origin * unit) + a.shift * unit : 0;
        const double moved = a.n * distance;
        const double away = added_across(moved, from, to);
        const double squares = added_across(a.m2_in(unit) + moved * distance, from, to);
        if (!found && is_finite(squares)) {
            const double shift = away * reciprocal(n);
            whole = part_in_units(n, origin, shift, squares - away * shift, unit);
            found = true;
        }
    }
#endif
    return whole;
}

// The parts of lanes that differ in the bits from `from` to below `to`; `group` are the lanes of this one's merge.
__device__ __forceinline__ Part merged_across(const Part& a, int from, int to, unsigned group) {
    const unsigned some = __ballot_sync(0xffffffffu, a.n > 0) & group;
    const int leader = some ? __ffs(some) - 1 : threadIdx.x % 32;
    const double origin = __shfl_sync(0xffffffffu, a.origin, leader);
    const double distance = a.n > 0 ? (a.origin - origin) + a.shift : 0;
    const double moved = a.n * distance;
    const double n = added_across(a.n, from, to);
    const double away = added_across(moved, from, to);
    const double squares = added_across(a.m2 + moved * distance, from, to);
    const unsigned careful = __ballot_sync(0xffffffffu, !in_range(squares, distance) || a.unit != 1);
    if (careful) {
        const Part whole = merged_carefully(a, n, origin, from, to);
        if (careful & group) return whole;
    }
    const double shift = n > 0 ? away * reciprocal(n) : 0, m2 = squares - away * shift;
    return Part{n, origin, shift, m2 > 0 ? m2 : 0};
}

// The lanes of a warp that have this thread's channels.
__device__ __forceinline__ unsigned lanes_alike() {
    unsigned pattern = 1;
    for (int bit = LANES; bit < 32; bit *= 2) pattern |= pattern << bit;
    return pattern << (threadIdx.x % LANES);
}

// The parts of all threads of a block that have the same channel, given to all of them. Shared memory: one part for
// each warp and channel, and one for each channel.
__device__ __forceinline__ void merge_block(Part (&parts)[CHANNELS]) {
#pragma unroll
    for (int ch = 0; ch < CHANNELS; ++ch) parts[ch] = merged_across(parts[ch], LANES, 32, lanes_alike());
    if (WARPS == 1) return;
    Part* scratch = reinterpret_cast<Part*>(dynamic_shared());
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    __syncthreads();  // the scratch may still be read from the merge before
    if (lane < LANES)
#pragma unroll
        for (int ch = 0; ch < CHANNELS; ++ch) scratch[(lane * CHANNELS + ch) * WARPS + warp] = parts[ch];
    __syncthreads();
    if (WIDTH == 1) {  // every warp for itself: no second barrier
        const Part mine = lane < WARPS ? scratch[lane] : Part{0, 0, 0, 0};
        parts[0] = merged_across(mine, 1, 32, 0xffffffffu);
        return;
    }
    Part* results = scratch + WIDTH * WARPS;
    const int member = threadIdx.x % WARPS;
    const unsigned group = (WARPS == 32 ? 0xffffffffu : (1u << WARPS % 32) - 1) << (lane - member);
    for (int base = 0; base < WIDTH; base += THREADS / WARPS) {
        const int q = base + threadIdx.x / WARPS;
        const Part mine = q < WIDTH ? scratch[q * WARPS + member] : Part{0, 0, 0, 0};
        const Part whole = merged_across(mine, 1, WARPS, group);
        if (member == 0 && q < WIDTH) results[q] = whole;
    }
    __syncthreads();
#pragma unroll
    for (int ch = 0; ch < CHANNELS; ++ch) parts[ch] = results[(threadIdx.x % LANES) * CHANNELS + ch];
}

#define MERGE_BYTES ((sizeof(Part) * WIDTH * (WARPS + 1) + 15) / 16 * 16)

// --- between blocks: fixed slots in global memory, read in a fixed order ----------------------------------------------

__device__ __forceinline__ double* slot(const Params& p, const Tile& tile, int ch, i64 splits, i64 split) {
    return p.partials + (tile.kept(p, ch) * splits + split) * (sizeof(Part) / sizeof(double));
}

__device__ __forceinline__ void write_parts(const Params& p, const Tile& tile, i64 split, const Part (&parts)[CHANNELS]) {
    if (threadIdx.x / LANES != 0 || !tile.active) return;
#pragma unroll
    for (int ch = 0; ch < CHANNELS; ++ch) {
        double* to = slot(p, tile, ch, p.splits, split);
        to[0] = parts[ch].n, to[1] = parts[ch].origin, to[2] = parts[ch].shift, to[3] = parts[ch].m2;
#if DTYPE == 3
        to[4] = parts[ch].unit;
#endif
    }
}

// The parts of `splits` blocks, merged, given to all threads.
__device__ __forceinline__ void read_parts(const Params& p, const Tile& tile, i64 splits, Part (&parts)[CHANNELS]) {
#pragma unroll
    for (int ch = 0; ch < CHANNELS; ++ch) {
        parts[ch] = Part{0, 0, 0, 0};
        if (tile.active)
            for (i64 split = threadIdx.x / LANES; split < splits; split += ROWS) {
                const double* from = slot(p, tile, ch, splits, split);
                const Part other{
                    read_shared_with_others(from), read_shared_with_others(from + 1),
                    read_shared_with_others(from + 2), read_shared_with_others(from + 3),
#if DTYPE == 3
                    read_shared_with_others(from + 4),
#endif
                };
                parts[ch] = merged(parts[ch], other);
            }
    }
    merge_block(parts);
}

// 1 / sqrt(var + eps) of a batch; NaN without samples.
__device__ __forceinline__ double batch_rstd(const Part& part, double eps) {
    if (part.n == 0) return not_a_number();
    const double var = part.m2 * reciprocal(part.n);
#if DTYPE == 3
    const double spread = var * part.per_unit() * part.per_unit() + eps;
    if (part.unit != 1 && !(spread >= LEAST_SQUARES && is_finite(spread)))
        return reciprocal_sqrt(var + eps * part.unit * part.unit) * part.unit;
    return reciprocal_sqrt(spread);
#else
    return reciprocal_sqrt(var + eps);
#endif
}

// Count, M2, mean and rstd, a row of the results each.
__device__ __forceinline__ void write_moments(const Params& p, const Tile& tile, const Part (&parts)[CHANNELS]) {
    if (threadIdx.x / LANES != 0 || !tile.active) return;
    const i64 all = p.batches * p.channels;
#pragma unroll
    for (int ch = 0; ch < CHANNELS; ++ch) {
        const i64 at = tile.kept(p, ch);
        p.results[at] = parts[ch].n;
        p.results[all + at] = parts[ch].n > 0 ? parts[ch].m2_in(1) : not_a_number();
        p.results[2 * all + at] = parts[ch].mean();
        p.results[3 * all + at] = batch_rstd(parts[ch], p.eps);
    }
}
