// Moments of what one thread reads, a chunk of ITEMS_PER_THREAD vectors at a time. For each chunk of n elements x:
//
//     m = mean(x - first),   e = (x - first) - m,   c = mean(e)
//     a = first + m + c - origin                    the distance of the chunk's mean from the thread's first element
//     away += n a,   squares += (sum(e^2) - n c^2) + n a^2
//
// and at the end mean = origin + away / n, M2 = squares - away^2 / n. With weights, n and the sums are weighted.
//
// A chunk is summed in the type of the elements' arithmetic, where nothing cancels: x - first is exact next to x, and c
// takes back what m was rounded by. Chunks are added in float64. Rounding then enlarges M2 by 2^-53 times the number of
// chunks at most, since no chunk of m among n values lies further than sqrt(n/m) deviations from the mean.
//
// Squares that leave the range of their type, at either end, are taken again element by element: those of float32 in
// float64, those of float64 of distances times a unit, 2^600, 1 or 2^-600 (moments.cuh).

#pragma once

#include "moments.cuh"

struct Chunk {  // elements of one channel that a thread holds
    const Items& items;
    int count, channel;  // vectors, and which of the thread's channels
    const Params& p;
    const Tile& tile;
    Index v;

    __device__ __forceinline__ int from() const { return ALONG_CHANNELS ? channel : 0; }
    __device__ __forceinline__ real at(int k, int j) const { return element(items[k], from() + j); }
    __device__ __forceinline__ real first() const { return at(0, RUN && channel > 0 ? VECTOR - 1 : 0); }
    __device__ __forceinline__ bool holds(int j) const { return tile.holds(channel, from() + j); }
    __device__ __forceinline__ double weight_at(int k, int j) const {
        return k < count ? weight_of(p, tile, v + k * ROWS, from() + j) : 0.0;
    }
};

struct Weights {  // of a chunk
    double sum;

#if WEIGHT
    real w[ITEMS_PER_THREAD][DEPTH];

    __device__ __forceinline__ bool selects(int k, int j) const { return w[k][j] > 0; }
    __device__ __forceinline__ real times(int k, int j, real value) const { return w[k][j] * value; }

    // Whether there are any; then `first` is the first element that has one: as a factor, in its type.
    __device__ __forceinline__ bool load(const Chunk& chunk, real& first) {
        bool some = false;
        sum = 0;
        first = 0;
#pragma unroll
        for (int k = 0; k < ITEMS_PER_THREAD; ++k)
#pragma unroll
            for (int j = 0; j < DEPTH; ++j) {
                const double exact = chunk.weight_at(k, j);
                w[k][j] = static_cast<real>(exact);
                sum += exact;
                if (!some && w[k][j] > 0) {
                    first = chunk.at(k, j);
                    some = true;
                }
            }
        return some;
    }
#else
    __device__ __forceinline__ bool selects(int k, int j) const { return true; }
    __device__ __forceinline__ real times(int k, int j, real value) const { return value; }

    __device__ __forceinline__ bool load(const Chunk& chunk, real& first) {
        sum = chunk.count * chunk.tile.depth(chunk.channel);
        first = chunk.first();
        return !RUN || sum > 0;
    }
#endif
};

// --- sums of a chunk, in the type of the elements' arithmetic --------------------------------------------------------

__device__ __forceinline__ real sum_of_distances(const Chunk& chunk, const Weights& weights, real first) {
    real total = 0;
#pragma unroll
    for (int k = 0; k < ITEMS_PER_THREAD; ++k)
        if (k < chunk.count) {
            real part = 0;
#pragma unroll
            for (int j = 0; j < DEPTH; ++j)
                if (chunk.holds(j) && weights.selects(k, j)) part += weights.times(k, j, chunk.at(k, j) - first);
            total += part;
        }
    return total;
}

struct Errors {  // sums of e and of e^2
    real sum, squares;
};

__device__ __forceinline__ Errors sum_of_errors(const Chunk& chunk, const Weights& weights, real first, real middle) {
    Errors total{0, 0};
#pragma unroll
    for (int k = 0; k < ITEMS_PER_THREAD; ++k)
        if (k < chunk.count) {
            Errors part{0, 0};
#pragma unroll
            for (int j = 0; j < DEPTH; ++j)
                if (chunk.holds(j) && weights.selects(k, j)) {
                    const real e = (chunk.at(k, j) - first) - middle;
                    part.sum += weights.times(k, j, e);
                    part.squares += weights.times(k, j, e * e);
                }
            total.sum += part.sum;
            total.squares += part.squares;
        }
    return total;
}

// --- all chunks of a channel -----------------------------------------------------------------------------------------

struct Accumulator {
    double away, squares;  // of distances times the unit
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
    __device__ __forceinline__ void add(const Chunk& chunk) {
        Weights weights;
        real first;
        if (chunk.count == 0 || !weights.load(chunk, first)) return;
        const real inverse = reciprocal(static_cast<real>(weights.sum));
        const real middle = sum_of_distances(chunk, weights, first) * inverse;
        add_sums(chunk, weights, first, middle, inverse, sum_of_errors(chunk, weights, first, middle));
    }

    // One chunk, of which the sums are known.
    __device__ __forceinline__ void add_sums(
        const Chunk& chunk, const Weights& weights, real first, real middle, real inverse, const Errors& errors
    ) {
        const double weight = weights.sum, least = WEIGHT ? LEAST_SQUARES * (1 + weight) : LEAST_SQUARES;
        const real correction = errors.sum * inverse;
        const real start = origin == origin ? origin : first;
        const double distance = (static_cast<double>(first) - start) + (static_cast<double>(middle) + correction);
        const double moved = weight * distance;
        const double more = squares + ((errors.squares - errors.sum * correction) + moved * distance);
        if ((more >= least && is_finite(more) && unit == 1) || constant(chunk, weights, start)) {
#if WEIGHT
            n += weight;
#endif
            away += moved;
            squares = more;
            origin = start;
        } else {
            add_carefully(chunk, weights, start);
        }
    }

    // Whether all elements so far are one number, as in the channels that a relu has left nothing of.
    __device__ __forceinline__ bool constant(const Chunk& chunk, const Weights& weights, real start) const {
        bool same = squares == 0 && is_finite(start);
#pragma unroll
        for (int k = 0; k < ITEMS_PER_THREAD; ++k)
            if (k < chunk.count)
#pragma unroll
                for (int j = 0; j < DEPTH; ++j)
                    if (chunk.holds(j) && weights.selects(k, j)) same = same && chunk.at(k, j) == start;
        return same;
    }

    // A chunk with infinite values, NaN, or squares beyond the type's range.
    __device__ __forceinline__ void add_carefully(const Chunk& chunk, const Weights& weights, real start) {
        real infinite = 0;  // the sum of all that is not finite
#pragma unroll
        for (int k = 0; k < ITEMS_PER_THREAD; ++k)
            if (k < chunk.count)
#pragma unroll
                for (int j = 0; j < DEPTH; ++j)
                    if (chunk.holds(j) && weights.selects(k, j)) {
                        const real value = chunk.at(k, j);
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
        while (!added_in_units(chunk, weights) && unit > LARGE_UNIT) {
            away *= LARGE_UNIT;
            squares *= LARGE_UNIT;
            squares *= LARGE_UNIT;
            unit *= LARGE_UNIT;
        }
#else
        added_in_units(chunk, weights);
#endif
    }

    // Adds a chunk, but for squares that overflow.
    __device__ __forceinline__ bool added_in_units(const Chunk& chunk, const Weights& weights) {
        double moved = away, more = squares;
#pragma unroll
        for (int k = 0; k < ITEMS_PER_THREAD; ++k)
            if (k < chunk.count)
#pragma unroll
                for (int j = 0; j < DEPTH; ++j)
                    if (chunk.holds(j) && weights.selects(k, j)) {
                        const double value = chunk.at(k, j), weight = weights.times(k, j, 1);
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
    __device__ __forceinline__ Partial partial(double taken) const {
#if WEIGHT
        taken = n;
#endif
        if (taken == 0) return Partial{0, 0, 0, 0};
        if (squares != squares) return Partial{taken, away, 0, not_a_number()};
        const double shift = away * reciprocal(taken);
        return partial_in_units(taken, origin, shift, squares - away * shift, unit);
    }
};

// A chunk of vectors, to each of the thread's channels what it has of them.
#if RUN
// Both at once, as each element is of one: apart, their loops cost a third more than one channel's loads of 2 bytes.
__device__ __forceinline__ void add_chunk(
    Accumulator (&accumulators)[CHANNELS], const Items& items, int count, const Params& p, const Tile& tile, Index v
) {
    if (count == 0) return;
    const Chunk chunks[CHANNELS] = {{items, count, 0, p, tile, v}, {items, count, 1, p, tile, v}};
    Weights weights[CHANNELS];
    real first[CHANNELS], inverse[CHANNELS], middle[CHANNELS], distances[CHANNELS] = {0, 0};
    Errors errors[CHANNELS] = {{0, 0}, {0, 0}};
#pragma unroll
    for (int ch = 0; ch < CHANNELS; ++ch) {
        weights[ch].load(chunks[ch], first[ch]);
        inverse[ch] = reciprocal(static_cast<real>(weights[ch].sum));
    }
#pragma unroll
    for (int k = 0; k < ITEMS_PER_THREAD; ++k)
        if (k < count) {
            real part[CHANNELS] = {0, 0};
#pragma unroll
            for (int j = 0; j < VECTOR; ++j) tile.add(part, j, element(items[k], j) - tile.of_element(first, j));
#pragma unroll
            for (int ch = 0; ch < CHANNELS; ++ch) distances[ch] += part[ch];
        }
#pragma unroll
    for (int ch = 0; ch < CHANNELS; ++ch) middle[ch] = distances[ch] * inverse[ch];
#pragma unroll
    for (int k = 0; k < ITEMS_PER_THREAD; ++k)
        if (k < count) {
            real sum[CHANNELS] = {0, 0}, squares[CHANNELS] = {0, 0};
#pragma unroll
            for (int j = 0; j < VECTOR; ++j) {
                const real e = (element(items[k], j) - tile.of_element(first, j)) - tile.of_element(middle, j);
                tile.add(sum, j, e);
                tile.add(squares, j, e * e);
            }
#pragma unroll
            for (int ch = 0; ch < CHANNELS; ++ch) errors[ch].sum += sum[ch], errors[ch].squares += squares[ch];
        }
#pragma unroll
    for (int ch = 0; ch < CHANNELS; ++ch)
        if (tile.depth(ch) > 0)
            accumulators[ch].add_sums(chunks[ch], weights[ch], first[ch], middle[ch], inverse[ch], errors[ch]);
}
#else
__device__ __forceinline__ void add_chunk(
    Accumulator (&accumulators)[CHANNELS], const Items& items, int count, const Params& p, const Tile& tile, Index v
) {
#pragma unroll
    for (int ch = 0; ch < CHANNELS; ++ch) accumulators[ch].add(Chunk{items, count, ch, p, tile, v});
}
#endif

// Merges what all threads of a block have of their channels, of so many vectors.
__device__ __forceinline__ void merge_block(
    const Accumulator (&accumulators)[CHANNELS], const Tile& tile, double vectors
) {
    Partial partials[CHANNELS];
#pragma unroll
    for (int ch = 0; ch < CHANNELS; ++ch) partials[ch] = accumulators[ch].partial(vectors * tile.depth(ch));
#if RUN
    merge_run(partials);
#else
    merge_block<LANES, CHANNELS>(partials);
#endif
}
