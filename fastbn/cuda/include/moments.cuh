// Partial moments, count, mean and sum of squared deviations (M2), and their merge: of a block's threads, of several
// blocks. Of parts of n elements, mean mu and M2 each, relative to any common origin o:
//
//     N = sum(n),   away = sum(n (mu - o)),   squares = sum(M2 + n (mu - o)^2)
//     mean = o + away / N,   M2 = squares - away^2 / N
//
// After: Chan, Golub & LeVeque (1983). A merge of many takes one division; all is float64, in a fixed order.
//
// Means are kept in two parts, origin and low, so that float64 data far from 0 lose nothing when they are merged.
// Squares of float64 numbers that leave its range are taken of distances times a unit: 2^600, 1 or 2^-600. No distance
// of float64 numbers needs another.

#pragma once

#include "affine.cuh"
#include "running.cuh"
#include "tile.cuh"

#if DTYPE == 3
#define LEAST_EXPONENT_OF_SQUARES -900
#define LEAST_SQUARES 0x1p-900  // below, sums of squares have lost digits to underflow
#define SMALL_UNIT 0x1p600      // for small distances
#define LARGE_UNIT 0x1p-600
#else
#define LEAST_EXPONENT_OF_SQUARES -76
#define LEAST_SQUARES 0x1p-76  // squares below 2^-126 are 0, which is 2^-50 of it
#define SMALL_UNIT 1.0
#define LARGE_UNIT 1.0
#endif

struct Partial {  // of a channel
    double n, origin, low, m2;  // the mean is origin + low
#if DTYPE == 3
    double unit = 1;  // m2 is of deviations times this
#else
    static constexpr double unit = 1;
#endif

    __device__ __forceinline__ double mean() const { return n > 0 ? origin + low : not_a_number(); }

    __device__ __forceinline__ double per_unit() const { return unit == 1 ? 1 : unit > 1 ? LARGE_UNIT : SMALL_UNIT; }

    __device__ __forceinline__ double m2_in(double other) const {
        const double factor = other * per_unit();
        return m2 * factor * factor;
    }
};


// A partial whose mean is origin + low / unit, which is in range where the distance from the origin is not.
__device__ __forceinline__ Partial partial_in_units(double n, double origin, double low, double m2, double unit) {
    m2 = m2 >= 0 || m2 != m2 ? m2 : 0;
#if DTYPE == 3
    if (unit != 1 && m2 != 0) {
        Partial partial{n, 0, 0, m2, unit};
        partial.origin = (origin * unit + low) * partial.per_unit();
        partial.low = ((origin * unit - partial.origin * unit) + low) * partial.per_unit();
        return partial;
    }
#endif
    return Partial{n, origin, low, m2};
}

// --- merges of two, of lanes, of a block -----------------------------------------------------------------------------

// Whether squares, those of this distance among them, were added up without loss.
__device__ __forceinline__ bool in_range(double squares, double distance) {
#if DTYPE == 3
    return is_finite(squares) && (squares >= LEAST_SQUARES || (squares == 0 && distance == 0));
#else
    return is_finite(squares);
#endif
}

// Where the mean is infinite: shares of the means. Infinities of both signs make a NaN.
__device__ __forceinline__ double share_of_mean(const Partial& a, double n) {
    const double share = a.n * reciprocal(n);
    return a.n > 0 ? share * a.origin + share * a.low : 0;
}

__device__ __forceinline__ Partial merged(const Partial& a, const Partial& b) {
    if (a.n == 0) return b;
    if (b.n == 0) return a;
    const double n = a.n + b.n, share = b.n * reciprocal(n);
    const double delta = (b.origin - a.origin) + (b.low - a.low);
    const double m2 = (a.m2 + b.m2) + delta * delta * (a.n * share);
    if (in_range(m2, delta) && a.unit == 1 && b.unit == 1) return Partial{n, a.origin, a.low + delta * share, m2};
#if DTYPE == 3
#pragma unroll 1
    for (double unit = SMALL_UNIT; unit >= LARGE_UNIT; unit *= LARGE_UNIT) {
        const double far = (b.origin * unit - a.origin * unit) + (b.low * unit - a.low * unit);
        const double squares = (a.m2_in(unit) + b.m2_in(unit)) + far * far * (a.n * share);
        if (is_finite(squares)) return partial_in_units(n, a.origin, a.low * unit + far * share, squares, unit);
    }
#endif
    const bool odd = a.m2 != a.m2 || b.m2 != b.m2;
    return Partial{n, share_of_mean(a, n) + share_of_mean(b, n), 0, odd ? not_a_number() : infinity()};
}

// As merged_across, where squares leave the range of float64 or something is not finite.
__device__ __forceinline__ Partial merged_carefully(const Partial& a, double n, double origin, int from, int to) {
    const double odd = added_across(a.m2 != a.m2 ? 1 : 0, from, to);
    const double mean = added_across(share_of_mean(a, n), from, to);
    Partial whole{n, mean, 0, odd > 0 ? not_a_number() : infinity()};
#if DTYPE == 3
    bool found = false;
#pragma unroll 1
    for (double unit = SMALL_UNIT; unit >= LARGE_UNIT; unit *= LARGE_UNIT) {
        const double distance = a.n > 0 ? (a.origin * unit - origin * unit) + a.low * unit : 0;
        const double moved = a.n * distance;
        const double away = added_across(moved, from, to);
        const double squares = added_across(a.m2_in(unit) + moved * distance, from, to);
        if (!found && is_finite(squares)) {
            const double low = away * reciprocal(n);
            whole = partial_in_units(n, origin, low, squares - away * low, unit);
            found = true;
        }
    }
#endif
    return whole;
}

// The partials of lanes that differ in the bits from `from` to below `to`; `group` are the lanes of this one's merge.
__device__ __forceinline__ Partial merged_across(const Partial& a, int from, int to, unsigned group) {
    const unsigned some = __ballot_sync(0xffffffffu, a.n > 0) & group;
    const int leader = some ? __ffs(some) - 1 : threadIdx.x % 32;
    const double origin = __shfl_sync(0xffffffffu, a.origin, leader);
    const double distance = a.n > 0 ? (a.origin - origin) + a.low : 0;
    const double moved = a.n * distance;
    const double n = added_across(a.n, from, to);
    const double away = added_across(moved, from, to);
    const double squares = added_across(a.m2 + moved * distance, from, to);
    const unsigned careful = __ballot_sync(0xffffffffu, !in_range(squares, distance) || a.unit != 1);
    if (careful) {
        const Partial whole = merged_carefully(a, n, origin, from, to);
        if (careful & group) return whole;
    }
    const double low = n > 0 ? away * reciprocal(n) : 0, m2 = squares - away * low;
    return Partial{n, origin, low, m2 > 0 ? m2 : 0};
}

// The lanes of a warp that have this thread's channels, where `side` of them stand side by side.
__device__ __forceinline__ unsigned lanes_alike(int side) {
    unsigned pattern = 1;
    for (int bit = side; bit < 32; bit *= 2) pattern |= pattern << bit;
    return pattern << (threadIdx.x % side);
}

// Shared memory of a merge: a partial of each channel, merged; one for each warp and channel, or each thread's.
#define MERGE_BYTES (sizeof(Partial) * (WIDTH + (RUN ? 2 * THREADS : WIDTH * WARPS)))

__device__ __forceinline__ Partial* merged_channels() { return reinterpret_cast<Partial*>(dynamic_shared()); }

// Merges the partials of all threads of a block, of which `SIDE` stand side by side along the channels with `EACH`
// channels. That of the channel q comes to merged_channels()[q], for the thread q % THREADS to read.
template <int SIDE, int EACH>
__device__ __forceinline__ void merge_block(Partial (&partials)[EACH]) {
    constexpr int width = SIDE * EACH;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    Partial *results = merged_channels(), *scratch = results + width;
#pragma unroll
    for (int ch = 0; ch < EACH; ++ch) partials[ch] = merged_across(partials[ch], SIDE, 32, lanes_alike(SIDE));
    Partial* to = WARPS == 1 ? results : scratch + warp;
    if (lane < SIDE)
#pragma unroll
        for (int ch = 0; ch < EACH; ++ch) to[(lane * EACH + ch) * WARPS] = partials[ch];
    __syncthreads();
    if (WARPS == 1) return;
    if (width == 1) {
        if (warp > 0) return;
        const Partial mine = lane < WARPS ? scratch[lane] : Partial{0, 0, 0, 0};
        const Partial whole = merged_across(mine, 1, 32, 0xffffffffu);
        if (lane == 0) results[0] = whole;
        return;
    }
    const int member = threadIdx.x % WARPS;
    const unsigned group = (WARPS == 32 ? 0xffffffffu : (1u << WARPS % 32) - 1) << (lane - member);
    for (int base = 0; base < width; base += THREADS / WARPS) {
        const int q = base + threadIdx.x / WARPS;
        const Partial mine = q < width ? scratch[q * WARPS + member] : Partial{0, 0, 0, 0};
        const Partial whole = merged_across(mine, 1, WARPS, group);
        if (member == 0 && q < width) results[q] = whole;
    }
    __syncthreads();
}

#if RUN
// The same where a thread's two channels lie anywhere in the tile.
__device__ __forceinline__ void merge_run(const Partial (&partials)[CHANNELS]) {
    Partial *results = merged_channels(), *scratch = results + WIDTH;
#pragma unroll
    for (int ch = 0; ch < CHANNELS; ++ch) scratch[ch * THREADS + threadIdx.x] = partials[ch];
    __syncthreads();
    for (int q = threadIdx.x / 32; q < WIDTH; q += WARPS) {
        Partial mine{0, 0, 0, 0};
        for_parts_of_run(q, [&](int at) { mine = merged(mine, scratch[at]); });
        const Partial whole = merged_across(mine, 1, 32, 0xffffffffu);
        if (threadIdx.x % 32 == 0) results[q] = whole;
    }
    __syncthreads();
}
#endif

// --- statistics of a channel ------------------------------------------------------------------------------------------

// 1 / sqrt(var + eps) of a batch; NaN without samples.
__device__ __forceinline__ double batch_rstd(const Partial& partial, double eps) {
    if (partial.n == 0) return not_a_number();
    const double var = partial.m2 * reciprocal(partial.n);
#if DTYPE == 3
    const double spread = var * partial.per_unit() * partial.per_unit() + eps;
    if (partial.unit != 1 && !(spread >= LEAST_SQUARES && is_finite(spread)))
        return reciprocal_sqrt(var + eps * partial.unit * partial.unit) * partial.unit;
    return reciprocal_sqrt(spread);
#else
    return reciprocal_sqrt(var + eps);
#endif
}

// Writes count, mean, M2 and rstd, a row of the results each, and where other blocks go on the rest of the mean, the
// first row of the partials. Running statistics move towards what is written.
__device__ __forceinline__ Statistics write_moments(const Params& p, i64 at, const Partial& partial) {
    const i64 all = p.batches * p.channels;
    const double mean = partial.mean();
    const Statistics found{mean, (partial.origin - mean) + partial.low, batch_rstd(partial, p.eps)};
    const double m2 = partial.n > 0 ? partial.m2_in(1) : not_a_number();
    p.results[at] = partial.n;
    p.results[all + at] = found.mean;
    p.results[2 * all + at] = m2;
    p.results[3 * all + at] = found.rstd;
    if (p.partials != nullptr) p.partials[at] = found.rest;
    if (p.running_mean != nullptr)
        update_channel(
            p.running_mean, p.running_var, p.running_mean, p.running_var, p.running_mean_type, p.running_var_type, at,
            Batch{partial.n, mean, m2}, p.rate, p.correction, false
        );
    return found;
}

// What another block, or the launch before, has written.
__device__ __forceinline__ Statistics read_statistics(const Params& p, i64 at) {
    const i64 all = p.batches * p.channels;
    return Statistics{
        read_shared_with_others(p.results + all + at), read_shared_with_others(p.partials + at),
        read_shared_with_others(p.results + 3 * all + at)
    };
}

// --- between blocks: partials[split][field][channel] behind the row of rests, merged once, in the order of splits -----

#define FIELDS (sizeof(Partial) / sizeof(double))

__device__ __forceinline__ double* slot(const Params& p, i64 split, i64 at) {
    return p.partials + (1 + split * FIELDS) * p.batches * p.channels + at;
}

// Those of a block's channels, as merge_block leaves them.
__device__ __forceinline__ void write_partials(const Params& p, const Tile& tile, i64 split) {
    const i64 all = p.batches * p.channels;
    for (int q = threadIdx.x; q < WIDTH && tile.has(p, q); q += THREADS) {
        const Partial& partial = merged_channels()[q];
        double* to = slot(p, split, tile.kept(p, q));
        to[0] = partial.n, to[all] = partial.origin, to[2 * all] = partial.low, to[3 * all] = partial.m2;
#if DTYPE == 3
        to[4 * all] = partial.unit;
#endif
    }
}

__device__ __forceinline__ Partial read_partial(const Params& p, i64 split, i64 at) {
    const i64 all = p.batches * p.channels;
    const double* from = slot(p, split, at);
    return Partial{
        read_shared_with_others(from), read_shared_with_others(from + all), read_shared_with_others(from + 2 * all),
        read_shared_with_others(from + 3 * all),
#if DTYPE == 3
        read_shared_with_others(from + 4 * all),
#endif
    };
}

// The moments of PIECE channels of a tile, from `base` on, from the partials of all splits.
__device__ __forceinline__ void merge_piece(const Params& p, const Tile& tile, i64 splits, int base) {
    const int q = base + threadIdx.x % PIECE;
    Partial whole[1] = {{0, 0, 0, 0}};
    if (tile.has(p, q))
        for (i64 split = threadIdx.x / PIECE; split < splits; split += THREADS / PIECE)
            whole[0] = merged(whole[0], read_partial(p, split, tile.kept(p, q)));
    merge_block<PIECE, 1>(whole);
    if (threadIdx.x < PIECE && tile.has(p, q)) write_moments(p, tile.kept(p, q), merged_channels()[threadIdx.x]);
    __syncthreads();  // the next merge of a single warp takes the same places without a barrier before
}
