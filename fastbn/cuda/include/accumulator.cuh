// Moments of what one thread reads, a chunk of ITEMS_PER_THREAD vectors at a time. Either in two sweeps over each chunk, of n
// elements x:
//
//     m = mean(x - first),   e = (x - first) - m,   c = mean(e)
//     a = first + m + c - origin                    the distance of the chunk's mean from the thread's first element
//     away += n a,   squares += (sum(e^2) - n c^2) + n a^2
//
// or in one, of halves and of float32 channels-last, whose n elements of some chunks make a group:
//
//     m = mean(x - shift),   a = shift + m - origin
//     away += n a,   squares += (sum((x - shift)^2) - n m^2) + n a^2,   shift += m
//
// and at the end mean = origin + away / n, M2 = squares - away^2 / n. With weights, n and the sums are weighted.
//
// A chunk or group is summed in the type of the elements' arithmetic, where nothing cancels: x - first is exact next to x,
// and c takes back what m was rounded by; the shift is the mean of the thread's first elements, then that of the group
// before, so errors are relative to squares of distances between neighbouring groups, some M2 at most. Groups are added in
// float64: 10 operations for GROUP elements. Rounding then enlarges M2 by 2^-53 times their number at most, since no group
// of m among n values lies further than sqrt(n/m) deviations from the mean.
//
// Two sweeps convert halves twice, and wait for the first: 61 instructions for eight where one takes 43. Of float32
// channels-first they take 33, less than memory has time for, and are more accurate.
//
// Squares that leave the range of their type, at either end, are taken again element by element, from memory: those of
// float32 in float64, those of float64 of distances times a unit, 2^600, 1 or 2^-600 (moments.cuh).

#pragma once

#include "chunk.cuh"

#define ONE_SWEEP (!WEIGHT && (DTYPE <= 1 || (DTYPE == 2 && ALONG_CHANNELS)))
// Whether there are registers for what tells channels of one number; without, their elements are taken again.
#define BITS (DTYPE == 2 || (DTYPE == 1 && __CUDA_ARCH__ >= 800))
#define GROUP 32  // elements of a channel, at least, that one sweep sums before it adds in float64
#define CHUNKS (GROUP / (ITEMS_PER_THREAD * DEPTH))
// Eight at most: where a thread's first element lies far from all others so does the shift, and squares from there are
// larger than M2: 8 times with two elements to a shift and 32 to a group, where the variance was off by 1.2e-6.
#define CHUNKS_OF_GROUP (CHUNKS > 8 ? 8 : CHUNKS > 1 ? CHUNKS : 1)

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
#if ONE_SWEEP
        shift = origin;
        clear_group();
#endif
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
        const real correction = errors.sum * inverse;
        const real start = origin == origin ? origin : first;
        const double distance = (static_cast<double>(first) - start) + (static_cast<double>(middle) + correction);
        const real m2 = errors.squares - errors.sum * correction;
        if (!add_part(weights.sum, start, distance, m2) && !constant(chunk, weights, start))
            add_carefully(chunk.again(), start);
    }

    // Elements of a weight, whose mean is so far from the origin; not where squares leave their range.
    __device__ __forceinline__ bool add_part(double weight, real start, double distance, real m2) {
        const double moved = weight * distance;
        const double more = squares + (m2 + moved * distance);
        if (!(in_range(more, weight) && unit == 1)) return false;
#if WEIGHT
        n += weight;
#endif
        away += moved;
        squares = more;
        origin = start;
        return true;
    }

    // Of squares, whether they are neither infinite nor have lost digits to underflow, which those of float16 never do.
    __device__ __forceinline__ static bool in_range(double more, double weight) {
#if WEIGHT
        return more >= LEAST_SQUARES * (1 + weight) && is_finite(more);
#else  // by exponents: consumers' GPUs compare 64 times as many integers
        const unsigned least = DTYPE == 0 ? 0 : static_cast<unsigned>(LEAST_EXPONENT_OF_SQUARES + 1023) << 20;
        return static_cast<unsigned>(__double_as_longlong(more) >> 32) - least < 0x7ff00000u - least;
#endif
    }

    // Whether all elements so far are one number, as in the channels that a relu has left nothing of.
    __device__ __forceinline__ bool constant(const Chunk& chunk, const Weights& weights, real start) {
        bool same = squares == 0 && is_finite(start);
#pragma unroll
        for (int k = 0; k < ITEMS_PER_THREAD; ++k)
            if (k < chunk.count)
#pragma unroll
                for (int j = 0; j < DEPTH; ++j)
                    if (chunk.holds(j) && weights.selects(k, j)) same = same && chunk.at(k, j) == start;
        if (same) origin = start;
#if WEIGHT
        if (same) n += weights.sum;
#endif
        return same;
    }

    // Elements among which are infinite ones, NaN, or some with squares beyond the type's range.
    __device__ __forceinline__ void add_carefully(const Again& again, real start) {
        real infinite = 0;  // the sum of all that is not finite
        again.each([&](real value, real weight) {
            if (!is_finite(value)) infinite += value;
#if WEIGHT
            n += weight;
#endif
        });
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
        while (!added_in_units(again) && unit > LARGE_UNIT) {
            away *= LARGE_UNIT;
            squares *= LARGE_UNIT;
            squares *= LARGE_UNIT;
            unit *= LARGE_UNIT;
        }
#else
        added_in_units(again);
#endif
    }

    // Adds elements, but for squares that overflow.
    __device__ __forceinline__ bool added_in_units(const Again& again) {
        double moved = away, more = squares;
        again.each([&](real value, real weight) {
            const double distance = value * static_cast<double>(unit) - origin * static_cast<double>(unit);
            moved += weight * distance;
            more += weight * distance * distance;
        });
        if (!is_finite(more)) return false;
        away = moved;
        squares = more;
        return true;
    }

#if ONE_SWEEP
    real shift, sum, sum_of_squares;  // of the distances of a group's elements from the shift
#if BITS
    unsigned bits;  // of these distances: without any, as in channels that a relu has left nothing of, all are 0
#endif

    __device__ __forceinline__ void clear_group() {
        sum = sum_of_squares = 0;
#if BITS
        bits = 0;
#endif
    }

    // Whether all elements so far are the origin, so that there is nothing to add.
    __device__ __forceinline__ bool constant() const {
#if BITS
        return squares == 0 && bits << 1 == 0 && shift == origin;
#else
        return false;  // of float16 nothing underflows
#endif
    }

    // One chunk, to the group.
    __device__ __forceinline__ void sum_up(const Chunk& chunk) {
        real total = 0, squares_of_all = 0;
#pragma unroll
        for (int k = 0; k < ITEMS_PER_THREAD; ++k)
            if (k < chunk.count) {
                real part = 0, part_of_squares = 0;
#pragma unroll
                for (int j = 0; j < DEPTH; ++j) {
                    const real d = chunk.at(k, j) - shift;
                    part = j > 0 ? part + d : d;
                    part_of_squares = j > 0 ? fma(d, d, part_of_squares) : d * d;
#if BITS
                    bits |= __float_as_uint(d);
#endif
                }
                total = k > 0 ? total + part : part;
                squares_of_all = k > 0 ? squares_of_all + part_of_squares : part_of_squares;
            }
        sum += total;
        sum_of_squares += squares_of_all;
    }

    // To the mean of some first elements: their first one, where they are equal.
    __device__ __forceinline__ void set_shift(const Chunk& chunk) {
        const real first = chunk.first();
        real total = 0;
#pragma unroll
        for (int k = 0; k < (ALONG_CHANNELS ? ITEMS_PER_THREAD : 1); ++k)
            if (k < chunk.count)
#pragma unroll
                for (int j = 0; j < DEPTH; ++j)
                    if (!RUN || chunk.holds(j)) total += chunk.at(k, j) - first;
        const int taken = ALONG_CHANNELS ? chunk.count : max(1, chunk.tile.depth(chunk.channel));
        shift = first + total * reciprocal(static_cast<real>(taken));
    }

    // The group, of n elements.
    __device__ __forceinline__ void flush(const Again& again, real weight, real inverse) {
        const real middle = sum * inverse, m2 = sum_of_squares - sum * middle;
        const real start = origin == origin ? origin : shift;
        const double distance = (static_cast<double>(shift) - start) + middle;
        if (add_part(weight, start, distance, m2)) {
            shift += middle;
        } else {
            if (!(origin == origin) && is_finite(shift)) origin = shift;
            if (!constant()) flush_carefully(again);
        }
        clear_group();
    }

    __device__ __forceinline__ void flush_carefully(const Again& again) {
        real first = origin;
        if (!(first == first)) again.each([&](real value, real) { first = first == first ? first : value; });
        add_carefully(again, first);
        shift = is_finite(first) ? first : 0;
    }
#endif

    // `taken`: the number of elements, where weights do not tell.
    __device__ __forceinline__ Partial partial(double taken) const {
#if WEIGHT
        taken = n;
#endif
        if (taken == 0) return Partial{0, 0, 0, 0};
        if (squares != squares) return Partial{taken, away, 0, not_a_number()};
        const double low = away * reciprocal(taken);
        return partial_in_units(taken, origin, low, squares - away * low, unit);
    }
};

// A chunk of vectors, to each of the thread's channels what it has of them.
#if RUN && !ONE_SWEEP
// Both at once, as each element is of one: apart, their loops cost a third more than one channel's loads of 2 bytes.
__device__ __forceinline__ void add_chunk(
    Accumulator (&accumulators)[CHANNELS], const Items& items, int count, const Params& p, const Tile& tile, Index v
) {
    if (count == 0) return;
    const Chunk chunks[CHANNELS] = {{items, count, 0, p, tile, v}, {items, count, 1, p, tile, v}};
    Weights weights[CHANNELS];
    real first[CHANNELS], inverse[CHANNELS], middle[CHANNELS], distances[CHANNELS] = {0, 0};
    real sums[CHANNELS] = {0, 0}, squares[CHANNELS] = {0, 0};
    real places[VECTOR] = {}, errors_of_places[VECTOR] = {}, squares_of_places[VECTOR] = {};
#pragma unroll
    for (int ch = 0; ch < CHANNELS; ++ch) {
        weights[ch].load(chunks[ch], first[ch]);
        inverse[ch] = reciprocal(static_cast<real>(weights[ch].sum));
    }
#pragma unroll
    for (int k = 0; k < ITEMS_PER_THREAD; ++k)
        if (k < count)
#pragma unroll
            for (int j = 0; j < VECTOR; ++j) places[j] += element(items[k], j) - tile.of_element(first, j);
    tile.add_places(distances, places);
#pragma unroll
    for (int ch = 0; ch < CHANNELS; ++ch) middle[ch] = distances[ch] * inverse[ch];
#pragma unroll
    for (int k = 0; k < ITEMS_PER_THREAD; ++k)
        if (k < count)
#pragma unroll
            for (int j = 0; j < VECTOR; ++j) {
                const real e = (element(items[k], j) - tile.of_element(first, j)) - tile.of_element(middle, j);
                errors_of_places[j] += e;
                squares_of_places[j] += e * e;
            }
    tile.add_places(sums, errors_of_places);
    tile.add_places(squares, squares_of_places);
#pragma unroll
    for (int ch = 0; ch < CHANNELS; ++ch)
        if (tile.depth(ch) > 0)
            accumulators[ch].add_sums(
                chunks[ch], weights[ch], first[ch], middle[ch], inverse[ch], Errors{sums[ch], squares[ch]}
            );
}
#elif ONE_SWEEP
// The channels' groups, of `waiting` vectors before v.
__device__ __forceinline__ void flush(
    Accumulator (&accumulators)[CHANNELS], int waiting, const Params& p, const Tile& tile, Index v
) {
#pragma unroll
    for (int ch = 0; ch < CHANNELS; ++ch) {
        const real weight = static_cast<real>(waiting * tile.depth(ch));
        if (RUN && weight == 0) continue;
        accumulators[ch].flush(Again{waiting, ch, p, tile, v - waiting * ROWS}, weight, reciprocal(weight));
    }
}

#if RUN
// A chunk to the groups of both channels at once, as each element is of one.
__device__ __forceinline__ void sum_up(
    Accumulator (&accumulators)[CHANNELS], const Items& items, int count, const Tile& tile
) {
    const real shift[CHANNELS] = {accumulators[0].shift, accumulators[1].shift};
    real total[CHANNELS] = {0, 0}, squares[CHANNELS] = {0, 0};
    real places[VECTOR] = {}, squares_of_places[VECTOR] = {};
#pragma unroll
    for (int k = 0; k < ITEMS_PER_THREAD; ++k)
        if (k < count)
#pragma unroll
            for (int j = 0; j < VECTOR; ++j) {
                const real d = element(items[k], j) - tile.of_element(shift, j);
                places[j] = k > 0 ? places[j] + d : d;
                squares_of_places[j] = k > 0 ? fma(d, d, squares_of_places[j]) : d * d;
#if BITS
                accumulators[0].bits |= __float_as_uint(d);
#endif
            }
    tile.add_places(total, places);
    tile.add_places(squares, squares_of_places);
#pragma unroll
    for (int ch = 0; ch < CHANNELS; ++ch)
        accumulators[ch].sum += total[ch], accumulators[ch].sum_of_squares += squares[ch];
#if BITS
    accumulators[1].bits = accumulators[0].bits;  // of both
#endif
}
#endif

__device__ __forceinline__ void add_chunk(
    Accumulator (&accumulators)[CHANNELS], const Items& items, int count, const Params& p, const Tile& tile, Index v
) {
    if (v == tile.start() && count > 0)
#pragma unroll
        for (int ch = 0; ch < CHANNELS; ++ch) accumulators[ch].set_shift(Chunk{items, count, ch, p, tile, v});
#if RUN
    sum_up(accumulators, items, count, tile);
#else
#pragma unroll
    for (int ch = 0; ch < CHANNELS; ++ch) accumulators[ch].sum_up(Chunk{items, count, ch, p, tile, v});
#endif
    const bool last_of_group = (v - tile.first) / CHUNK % CHUNKS_OF_GROUP == CHUNKS_OF_GROUP - 1;
    if (count == ITEMS_PER_THREAD && last_of_group) flush(accumulators, CHUNKS_OF_GROUP * count, p, tile, v + CHUNK);
}

// What is left of a group, when the last chunk was of `count` vectors from v on.
__device__ __forceinline__ void add_rest(
    Accumulator (&accumulators)[CHANNELS], int count, const Params& p, const Tile& tile, Index v
) {
    const unsigned chunk = static_cast<unsigned>((v - tile.first) / CHUNK) % CHUNKS_OF_GROUP;
    const int waiting = (chunk * ITEMS_PER_THREAD + count) % (CHUNKS_OF_GROUP * ITEMS_PER_THREAD);
    if (waiting > 0) flush(accumulators, waiting, p, tile, v + count * ROWS);
}
#else
__device__ __forceinline__ void add_chunk(
    Accumulator (&accumulators)[CHANNELS], const Items& items, int count, const Params& p, const Tile& tile, Index v
) {
#pragma unroll
    for (int ch = 0; ch < CHANNELS; ++ch) accumulators[ch].add(Chunk{items, count, ch, p, tile, v});
}
#endif

// Merges what all threads of a block have of their channels; a thread's last chunk was of `count` vectors from v on.
__device__ __forceinline__ void merge_block(
    Accumulator (&accumulators)[CHANNELS], int count, const Params& p, const Tile& tile, Index v
) {
#if ONE_SWEEP
    add_rest(accumulators, count, p, tile, v);
#endif
    const double vectors = tile.taken(v, count);
    Partial partials[CHANNELS];
#pragma unroll
    for (int ch = 0; ch < CHANNELS; ++ch) partials[ch] = accumulators[ch].partial(vectors * tile.depth(ch));
#if RUN
    merge_run(partials);
#else
    merge_block<LANES, CHANNELS>(partials);
#endif
}
