// Where elements are in arrays of any strides. Kept and reduced axes are dimensions, each with its size and its steps, in
// elements of x, bytes of the mask and elements of the results; merged and in order of memory, the innermost first.
//
// A thread goes through the reduced dimensions in strides of so many vectors. It divides once, for its first place; from
// there coordinates are added to, with a carry: two instructions for each dimension. Macros: REDUCED, how many there are.

#pragma once

#include "numbers.cuh"

#define MOST_DIMENSIONS 8

struct Params {  // launch.py writes it: `STATISTICS`
    const char* x;
    const unsigned char* where;
    char *count, *mean, *spread;  // results; null for those that are not wanted
    double* parts;                // of several splits; null with one
    double ddof;
    i64 kept_sizes[MOST_DIMENSIONS], kept_x[MOST_DIMENSIONS], kept_where[MOST_DIMENSIONS];
    i64 kept_results[MOST_DIMENSIONS];
    i64 sizes[MOST_DIMENSIONS], steps_x[MOST_DIMENSIONS], steps_where[MOST_DIMENSIONS];  // reduced, in vectors
    // A thread's stride: what it adds to each coordinate, and to the places; and what each carry adds to these.
    i64 strides[MOST_DIMENSIONS], carries_x[MOST_DIMENSIONS], carries_where[MOST_DIMENSIONS];
    i64 stride_x, stride_where;
    i64 kept_dimensions;
    i64 kept, row;          // kept indices, and those of a row of tiles
    i64 tiles, tiles_of_row, width;  // blocks beside each other; kept indices of each
    i64 splits, share, vectors;      // of the reduced dimensions; vectors of one, of all
    i64 along, beside;      // threads along the reduced dimensions, and beside each other on kept ones
    i64 run;                // elements of the innermost reduced dimension, where vectors need not begin or end with it
    i64 vector_where;       // between the mask's bytes for the elements of a vector
    i64 form, skip_nan;
    i64 count_type, mean_type, spread_type;
};

// Division where a 64-bit one, a subroutine of some hundred instructions, is seldom needed.
__device__ __forceinline__ i64 quotient_of(i64 a, i64 b) {
    if ((a | b) >> 32 == 0) return static_cast<unsigned>(a) / static_cast<unsigned>(b);
    return a / b;
}

struct Place {  // of a kept index
    i64 x, where, results;

    __device__ __forceinline__ Place(const Params& p, i64 kept) : x(0), where(0), results(0) {
#pragma unroll 1
        for (int d = 0; d < p.kept_dimensions; ++d) {
            const i64 outer = quotient_of(kept, p.kept_sizes[d]), at = kept - outer * p.kept_sizes[d];
            x += at * p.kept_x[d];
            where += at * p.kept_where[d];
            results += at * p.kept_results[d];
            kept = outer;
        }
    }
};

struct Walk {  // on the reduced dimensions, from one vector of a thread to its next
    i64 x, where;
#if REDUCED > 1
    unsigned at[REDUCED - 1];  // not of the outermost
#endif

    __device__ __forceinline__ Walk(const Params& p, const Place& start, i64 v) : x(start.x), where(start.where) {
#if REDUCED > 1
#pragma unroll
        for (int d = 0; d < REDUCED - 1; ++d) {
            const i64 outer = quotient_of(v, p.sizes[d]), here = v - outer * p.sizes[d];
            at[d] = static_cast<unsigned>(here);
            x += here * p.steps_x[d];
            if (MASK) where += here * p.steps_where[d];
            v = outer;
        }
#endif
        x += v * p.steps_x[REDUCED - 1];
        if (MASK) where += v * p.steps_where[REDUCED - 1];
    }

    __device__ __forceinline__ void advance(const Params& p) {
        x += p.stride_x;
        if (MASK) where += p.stride_where;
#if REDUCED > 1
        unsigned carry = 0;
#pragma unroll
        for (int d = 0; d < REDUCED - 1; ++d) {
            at[d] += static_cast<unsigned>(p.strides[d]) + carry;
            carry = at[d] >= static_cast<unsigned>(p.sizes[d]) ? 1 : 0;
            if (carry) {
                at[d] -= static_cast<unsigned>(p.sizes[d]);
                x += p.carries_x[d];
                if (MASK) where += p.carries_where[d];
            }
        }
#endif
    }
};

// What a thread has to do: vectors from a first one on, a stride apart.
struct Work {
    i64 kept;           // its first kept index
    i64 tile, end;      // the block's first one, and the one behind the last of the row
    int along, beside;  // where the thread stands in its block
    i64 split, first;
    unsigned count;     // vectors
    bool active;        // false behind the last kept index, or of more threads than there are places

    __device__ __forceinline__ Work(const Params& p) {
        const unsigned splits = static_cast<unsigned>(p.splits), tiles = static_cast<unsigned>(p.tiles);
        // Neighbours in memory run together.
        const unsigned number = ALONG_KEPT ? blockIdx.x % tiles : blockIdx.x / splits;
        split = ALONG_KEPT ? blockIdx.x / tiles : blockIdx.x - number * splits;
        const unsigned of_row = static_cast<unsigned>(p.tiles_of_row), row = number / of_row;
        const int thread = threadIdx.x, width = static_cast<int>(p.beside), length = static_cast<int>(p.along);
        along = ALONG_KEPT ? thread / width : thread % length;
        beside = ALONG_KEPT ? thread % width : thread / length;
        tile = row * p.row + (number - row * of_row) * p.width;
        end = row * p.row + p.row;
        kept = tile + beside * CHANNELS;
        first = split * p.share + along;
        active = along < length && beside < width && kept < end;
        take(p, active ? p.vectors : 0);
    }

    // Its share of so many vectors of the reduced dimensions.
    __device__ __forceinline__ void take(const Params& p, i64 vectors) {
        const i64 last = min(split * p.share + p.share, vectors);
        count = first < last ? static_cast<unsigned>((last - first + p.along - 1) / p.along) : 0;
    }
};
