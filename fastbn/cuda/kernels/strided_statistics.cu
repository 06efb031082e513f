// Count, mean and spread of arrays as they lie: any strides, any real dtype, a mask of bytes, NaN left out, results in
// their dtype at any strides. Reads every element that is reduced once, and its byte of the mask: S bytes; nothing is
// copied.
//
// A block has `width` kept indices and one split of their reduced dimensions. Its threads stand `along` these and
// `beside` each other on kept ones, so that neighbours read neighbouring addresses whichever dimension lies innermost:
//
// - the innermost is reduced: vectors along it, threads along rows; of short rows several beside each other. A single
//   long row need not begin or end with a vector: elements at its ends are added one by one.
// - the innermost is kept (ALONG_KEPT): vectors of kept indices, lines of threads along the reduced dimensions.
// - the innermost is kept and small: it and the reduced dimension above are one row of vectors. As `along` is a multiple
//   of its size, each element of a thread's vectors always has the same kept index.
//
// Threads whose sums or squares are odd take their elements again. Blocks merge their threads' parts; of several splits
// `finish_strided` does. Every run gives the same bits.

#include "careful.cuh"
#include "squares.cuh"

#define RAGGED (REDUCED == 1 && VECTOR > 1 && !ALONG_KEPT)

struct Accumulator {  // of a kept index
#if SUMS
    Sums sums;
#endif
#if SQUARES
    Squares squares;
#endif
#if COUNTED
    i64 n;
    int taken;  // since the last flush
#endif

    __device__ __forceinline__ void clear() {
#if SUMS
        sums.clear();
#endif
#if SQUARES
        squares.clear();
#endif
#if COUNTED
        n = 0, taken = 0;
#endif
    }

    __device__ __forceinline__ void add_one(Value value) {
#if SUMS
        sums.add(value);
#endif
#if SQUARES
        squares.add(value);
#endif
#if COUNTED
        ++taken;
#endif
    }

    __device__ __forceinline__ void add(const Batch& batch, int from) {
#if SQUARES
        squares.begin(batch, from);
#endif
#pragma unroll
        for (int k = 0; k < ITEMS_PER_THREAD; ++k)
            if (k < batch.count)
#pragma unroll
                for (int j = 0; j < DEPTH; ++j) {
                    const Value value = batch.at(k, from + j);
                    if (batch.takes(k, from + j) && is_number(value)) add_one(value);
                }
    }

    // After so many elements, of which a mask or NaN may have left out some.
    __device__ __forceinline__ void flush(int elements) {
#if COUNTED
        elements = taken;
        n += taken;
        taken = 0;
#endif
#if SUMS
        sums.flush();
#endif
#if SQUARES
        squares.flush(elements);
#endif
    }

    __device__ __forceinline__ void add_end(Value value) {
#if SQUARES
        squares.begin_at(value);
#endif
        add_one(value);
        flush(1);
    }

    __device__ __forceinline__ void put(Part& part, i64 elements) const {
#if COUNTED
        elements = n;
#endif
        part.clear();
        if (elements == 0) return;
#if SUMS
        sums.put(part.sum, static_cast<double>(elements));
#endif
#if SQUARES
        squares.put(part.spread, static_cast<double>(elements));
#endif
    }
};

// Elements before a single row's first whole vector; `work` and `start` are then of its whole vectors.
__device__ __forceinline__ int cut_head(const Params& p, Work& work, Place& start) {
#if RAGGED
    const i64 address = static_cast<i64>(reinterpret_cast<u64>(p.x)) / static_cast<int>(sizeof(T)) + start.x;
    const int head = static_cast<int>(-address & (VECTOR - 1));
    const i64 whole = (p.run - head) / VECTOR;
    start.x += head;
    start.where += head * p.vector_where;
    if (work.active) work.take(p, whole);
    return head;
#else
    return 0;
#endif
}

__device__ __forceinline__ const T* data_of(const Params& p) { return reinterpret_cast<const T*>(p.x); }

// Calls take(value) for the elements of one channel of a thread that the mask takes.
template <class Take>
__device__ __forceinline__ void each(const Params& p, const Work& work, const Place& start, int ch, Take take) {
    Walk walk(p, start, work.first);
#pragma unroll 1
    for (unsigned v = 0; v < work.count; ++v) {
#pragma unroll 1
        for (int j = 0; j < DEPTH; ++j)
            if (!MASK || p.where[walk.where + (ch + j) * p.vector_where]) take(decoded(data_of(p)[walk.x + ch + j]));
        walk.advance(p);
    }
}

// The same for the ends of a row: elements before its first and behind its last whole vector, of the first split.
template <class Take>
__device__ __forceinline__ void each_of_ends(
    const Params& p, const Work& work, const Place& start, int head, Take take
) {
#if RAGGED
    if (work.split != 0 || !work.active) return;
    const int tail = static_cast<int>((p.run - head) & (VECTOR - 1));
#pragma unroll 1
    for (int e = work.along; e < head + tail; e += static_cast<int>(p.along)) {
        const i64 at = e < head ? e - head : p.run - head - tail + (e - head);
        if (!MASK || p.where[start.where + at * p.vector_where]) take(decoded(data_of(p)[start.x + at]));
    }
#endif
}

__device__ __forceinline__ void read(Batch& batch, const Params& p, Walk& walk, unsigned left) {
    batch.count = left < ITEMS_PER_THREAD ? static_cast<int>(left) : ITEMS_PER_THREAD;
#pragma unroll
    for (int k = 0; k < ITEMS_PER_THREAD; ++k)
        if (k < batch.count) {
            batch.items[k] = __ldg(reinterpret_cast<const Packed*>(data_of(p) + walk.x));
#if MASK
            batch.taken[k] = mask_bits(p.where + walk.where, p.vector_where);
#endif
            walk.advance(p);
        }
}

#if OF_FLOATS
// Takes the elements of one channel of a thread again, in units from the smallest distances' to the largest's.
template <class Careful, class Result>
__device__ __forceinline__ void take_again(
    const Params& p, const Work& work, const Place& start, int head, int ch, double unit, Result& part
) {
    Careful careful;
#pragma unroll 1
    while (true) {
        careful.clear();
        const auto take = [&](Value value) {
            if (is_number(value)) careful.add(static_cast<double>(value), unit);
        };
        each(p, work, start, ch, take);
        each_of_ends(p, work, start, head, take);
        if (careful.done() || unit <= LARGE_UNIT) break;
        unit *= LARGE_UNIT;
    }
    careful.put(part, unit);
}
#endif

extern "C" __global__ void __launch_bounds__(THREADS, 2) strided_statistics(const Params p) {
    Work work(p);
    Place start(p, work.active ? work.kept : 0);
    const int head = cut_head(p, work, start);
    Accumulator accumulators[CHANNELS];
#pragma unroll
    for (int ch = 0; ch < CHANNELS; ++ch) accumulators[ch].clear();
    Walk walk(p, start, work.first);
    int batches = 0, group = 0;
    i64 elements = 0;
    for (unsigned left = work.count; left > 0;) {
        Batch batch;
        read(batch, p, walk, left);
        left -= batch.count;
#pragma unroll
        for (int ch = 0; ch < CHANNELS; ++ch) accumulators[ch].add(batch, ch);
        group += batch.count * DEPTH;
        if (++batches == BATCHES || left == 0) {
#pragma unroll
            for (int ch = 0; ch < CHANNELS; ++ch) accumulators[ch].flush(group);
            elements += group;
            batches = group = 0;
        }
    }
    each_of_ends(p, work, start, head, [&](Value value) {
        if (is_number(value)) {
            accumulators[0].add_end(value);
            ++elements;
        }
    });
    Part* mine = slots() + (work.along * static_cast<int>(p.beside) + work.beside) * CHANNELS;
    const bool has_slots = work.along < p.along && work.beside < p.beside;
    unsigned odd_sums = 0, odd_squares = 0;  // channels
#pragma unroll
    for (int ch = 0; ch < CHANNELS; ++ch) {
        if (has_slots) accumulators[ch].put(mine[ch], elements);
#if SUMS
        if (accumulators[ch].sums.is_odd()) odd_sums |= 1u << ch;
#endif
#if SQUARES
        if (accumulators[ch].squares.is_odd()) odd_squares |= 1u << ch;
#endif
    }
#if OF_FLOATS
#pragma unroll 1
    for (int ch = 0; (odd_sums | odd_squares) >> ch != 0; ++ch) {
#if SUMS
        if (odd_sums >> ch & 1)
            take_again<CarefulSum>(p, work, start, head, ch, DTYPE == FLOAT64 ? SUM_UNIT : 1, mine[ch].sum);
#endif
#if SQUARES
        if (odd_squares >> ch & 1)
            take_again<CarefulSpread>(p, work, start, head, ch, DTYPE == FLOAT64 ? SMALL_UNIT : 1, mine[ch].spread);
#endif
    }
#endif
    merge_slots(static_cast<int>(p.along * p.beside) * CHANNELS, static_cast<int>(p.width));
    write_block(p, work.tile, work.end, work.split);
}
