// Count, mean and sum of squared deviations (M2): of a thread's vectors, of a block's threads, of several blocks.
//
// A thread takes HELD vectors at a time. Relative to their first element p, with d = x - p, m = mean(d), e = d - m:
//     mean = p + m + sum(e)/n,   M2 = sum(e^2) - sum(e)^2/n
// in the type of the elements' arithmetic, where nothing cancels. Chunks, threads and blocks are merged in float64 as
// Chan, Golub & LeVeque (1983) do, with the sums n*a and M2 + n*a^2 of the distances a from a common origin: a merge of
// many takes one division. Rounding then enlarges M2 by 2^-53 times the number of chunks at most, since no chunk of m
// among n values lies further than sqrt(n/m) deviations from the mean.
// Means are kept in two parts, origin and shift, so that float64 data far from 0 lose nothing when they are merged.

struct Part {
    double n, origin, shift, m2;  // the mean is origin + shift

    __device__ __forceinline__ double mean() const { return n > 0 ? origin + shift : not_a_number(); }
};

// --- a thread ---------------------------------------------------------------------------------------------------------

struct Running {  // of one channel
    double away, squares;  // sums of n*a and of M2 + n*a^2 of the chunks
    real origin;           // the first finite element; NaN before
#if WEIGHT
    double n;  // sum of the weights
#endif
    // Once squares is NaN there were infinite values or NaNs, and away is their sum.

    __device__ __forceinline__ void clear() {
        away = squares = 0;
        origin = static_cast<real>(not_a_number());
#if WEIGHT
        n = 0;
#endif
    }

    // One chunk; `before` is the number of elements taken before it, where weights do not tell.
    __device__ __forceinline__ void add(
        const Packed (&held)[HELD], int count, int channel, const Params& p, const Tile& tile, Index v, double before
    ) {
        if (count == 0) return;
        const int from = ALONG_CHANNELS ? channel : 0;
#if WEIGHT
        real w[HELD][DEPTH];
        double weight = 0;
        real first = 0;
        bool some = false;
#pragma unroll
        for (int k = 0; k < HELD; ++k)
#pragma unroll
            for (int j = 0; j < DEPTH; ++j) {
                const double exact = k < count ? weight_of(p, tile, v + k * ROWS, from + j) : 0.0;
                w[k][j] = static_cast<real>(exact);
                weight += exact;
                if (!some && exact > 0) {
                    first = element(held[k], from + j);
                    some = true;
                }
            }
        if (!some) return;
#define SELECTED(k, j) (w[k][j] > 0)
#define TIMES_WEIGHT(k, j) w[k][j] *
#else
        const double weight = count * DEPTH;
        const real first = element(held[0], from);
#define SELECTED(k, j) true
#define TIMES_WEIGHT(k, j)
#endif
        real total = 0;
#pragma unroll
        for (int k = 0; k < HELD; ++k)
            if (k < count) {
                real part = 0;
#pragma unroll
                for (int j = 0; j < DEPTH; ++j)
                    if (SELECTED(k, j)) part += TIMES_WEIGHT(k, j) (element(held[k], from + j) - first);
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
                    if (SELECTED(k, j)) {
                        const real e = (element(held[k], from + j) - first) - middle;
                        part += TIMES_WEIGHT(k, j) e;
                        part_square += TIMES_WEIGHT(k, j) (e * e);
                    }
                rest += part;
                square += part_square;
            }
        const real correction = rest * inverse;
        const real start = origin == origin ? origin : first;
        const double distance = (static_cast<double>(first) - start) + (static_cast<double>(middle) + correction);
        const double moved = weight * distance;
        const double more = squares + ((square - rest * correction) + moved * distance);
        if (is_finite(more)) {
#if WEIGHT
            n += weight;
#endif
            away += moved;
            squares = more;
            origin = start;
        } else {
            // Infinities, NaN, or squares beyond the type's range: one by one.
#pragma unroll
            for (int k = 0; k < HELD; ++k)
                if (k < count)
#pragma unroll
                    for (int j = 0; j < DEPTH; ++j)
                        if (SELECTED(k, j)) {
                            add_carefully(element(held[k], from + j), TIMES_WEIGHT(k, j) 1.0, before);
                            before += 1;
                        }
        }
#undef SELECTED
#undef TIMES_WEIGHT
    }

    __device__ __forceinline__ void add_carefully(real value, double weight, double before) {
#if WEIGHT
        before = n;
        n += weight;
#endif
        const bool odd = squares != squares;
        if (!is_finite(value)) {
            away = odd ? away + value : value;
            squares = not_a_number();
        }
        if (odd || !is_finite(value)) return;
        if (origin != origin) origin = value;
#if DTYPE == 3
        // Even distances may overflow: a running mean of shares, which cannot.
        const double shift = before > 0 ? away * reciprocal(before) : 0, mean = before > 0 ? origin + shift : value;
        const double share = weight * reciprocal(before + weight);
        squares = (squares - away * shift) + (value - mean) * (value - mean) * (before * share);
        origin = mean + (value * share - mean * share);
        away = 0;
#else
        const double distance = static_cast<double>(value) - origin;
        away += weight * distance;
        squares += weight * distance * distance;
#endif
    }

    // `taken`: the number of elements, where weights do not tell.
    __device__ __forceinline__ Part part(double taken) const {
#if WEIGHT
        taken = n;
#endif
        if (taken == 0) return Part{0, 0, 0, 0};
        if (squares != squares) return Part{taken, away, 0, not_a_number()};
        const double shift = away * reciprocal(taken), m2 = squares - away * shift;
        return Part{taken, origin, shift, m2 >= 0 || m2 != m2 ? m2 : 0};
    }
};

// --- several parts ----------------------------------------------------------------------------------------------------

// Where a distance overflows, or the mean is infinite: shares of the means. Infinities of both signs make a NaN.
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
    if (is_finite(m2)) return Part{n, a.origin, a.shift + delta * share, m2};
    const bool odd = a.m2 != a.m2 || b.m2 != b.m2;
    return Part{n, share_of_mean(a, n) + share_of_mean(b, n), 0, odd ? not_a_number() : infinity()};
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
    if (!__all_sync(0xffffffffu, is_finite(squares))) {
        const double odd = added_across(a.m2 != a.m2 ? 1 : 0, from, to);
        const double mean = added_across(share_of_mean(a, n), from, to);
        if (!is_finite(squares)) return Part{n, mean, 0, odd > 0 ? not_a_number() : infinity()};
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

#define MERGE_BYTES (sizeof(Part) * WIDTH * (WARPS + 1))

// --- between blocks: fixed slots in global memory, read in a fixed order ----------------------------------------------

__device__ __forceinline__ double* slot(const Params& p, const Tile& tile, int ch, i64 splits, i64 split) {
    return p.partials + (tile.kept(p, ch) * splits + split) * 4;
}

__device__ __forceinline__ void write_parts(const Params& p, const Tile& tile, i64 split, const Part (&parts)[CHANNELS]) {
    if (threadIdx.x / LANES != 0 || !tile.active) return;
#pragma unroll
    for (int ch = 0; ch < CHANNELS; ++ch) {
        double* to = slot(p, tile, ch, p.splits, split);
        to[0] = parts[ch].n, to[1] = parts[ch].origin, to[2] = parts[ch].shift, to[3] = parts[ch].m2;
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
                };
                parts[ch] = merged(parts[ch], other);
            }
    }
    merge_block(parts);
}

// 1 / sqrt(var + eps) of a batch; NaN without samples.
__device__ __forceinline__ double batch_rstd(const Part& part, double eps) {
    return part.n > 0 ? reciprocal_sqrt(part.m2 * reciprocal(part.n) + eps) : not_a_number();
}

// Count, M2, mean and rstd, a row of the results each.
__device__ __forceinline__ void write_moments(const Params& p, const Tile& tile, const Part (&parts)[CHANNELS]) {
    if (threadIdx.x / LANES != 0 || !tile.active) return;
    const i64 all = p.batches * p.channels;
#pragma unroll
    for (int ch = 0; ch < CHANNELS; ++ch) {
        const i64 at = tile.kept(p, ch);
        p.results[at] = parts[ch].n;
        p.results[all + at] = parts[ch].n > 0 ? parts[ch].m2 : not_a_number();
        p.results[2 * all + at] = parts[ch].mean();
        if (p.eps >= 0) p.results[3 * all + at] = batch_rstd(parts[ch], p.eps);
    }
}
