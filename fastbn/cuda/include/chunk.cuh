// What a thread holds of one of its channels at a time: elements, their weights, and sums of them in the type of the
// elements' arithmetic, whose formulas are in accumulator.cuh.

#pragma once

#include "moments.cuh"

// The elements of one of a thread's channels in some vectors, from memory: seldom, and not to be unrolled.
struct Again {
    int count, channel;  // vectors, and which of the thread's channels
    const Params& p;
    const Tile& tile;
    Index v;

    // Calls `take` with each element that has a weight, and that.
    template <class Take>
    __device__ __forceinline__ void each(Take take) const {
        T* start = start_of(p.x, p.x_strides, tile);
        const int from = ALONG_CHANNELS ? channel : 0;
#pragma unroll 1
        for (int k = 0; k < count; ++k) {
            const Packed packed = *vector_at(start, p.x_strides, p, v + k * ROWS, 0);
#pragma unroll
            for (int j = from; j < from + DEPTH; ++j) {
                const real weight = static_cast<real>(weight_of(p, tile, v + k * ROWS, j));
                if (tile.holds(channel, j) && weight > 0) take(element(packed, j), weight);
            }
        }
    }
};

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
    __device__ __forceinline__ Again again() const { return Again{count, channel, p, tile, v}; }
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
