// How a block sees the arrays: element (batch, outer, channel, inner), of which batch and channel are kept, outer and
// inner reduced; each array has its own strides. The host chooses by macros:
//
//   DTYPE             0 float16, 1 bfloat16, 2 float32, 3 float64
//   VECTOR            elements of a load: 16 bytes where alignment and sizes allow it
//   ALONG_CHANNELS    1: a vector lies along the channels (channels-last); 0: along the inner axis (channels-first)
//   RUN               0; or, where rows have odd lengths, elements of a channel in its row: vectors run on from one
//                     channel into the next, each through two of them at most
//   LANES             threads side by side along the channels; the others stand along the reduced axes
//   THREADS           of a block
//   ITEMS_PER_THREAD  vectors of one array that a thread has in registers, all their loads in flight together
//   WIDE              1: a channel has 2^31 vectors or more
//   STEPS             how a channel's vectors lie in all arrays, where 32 bits count them: 1 at equal distances, 2 in rows
//                     without gaps, 0 in any other way: an address takes 1, 5 and 12 instructions
//   WEIGHT            0 none, 1 bool, 2 float64, 3 float32
//   RELU, RESIDUAL    0 or 1; RELU 2 in gradients, which compute y again
//   CLUSTER           blocks of a cluster, 1 without
//   MIN_BLOCKS        resident on a multiprocessor at least: without it ptxas spills a few bytes to reach a number of
//                     blocks that nothing asked for
//
// A tile is the WIDTH channels of one block, over all their reduced positions; `splits` blocks may share it.

#pragma once

#include "device.cuh"
#include "parameters.cuh"

#if DTYPE == 3
typedef double T;
typedef double real;  // the type of all arithmetic on elements
#elif DTYPE == 2
typedef float T;
typedef float real;
#else
typedef unsigned short T;
typedef float real;
#endif

#if RUN && (WEIGHT || ALONG_CHANNELS)
#error "vectors run across rows channels-first, without weights"
#endif

#if ALONG_CHANNELS
#define CHANNELS VECTOR  // channels of a thread
#define DEPTH 1          // elements of one channel in a vector, at most
#define WIDTH (LANES * CHANNELS)  // channels of a tile
#elif RUN
#define CHANNELS 2
#define DEPTH VECTOR
#define WIDTH (LANES * VECTOR / RUN)
#else
#define CHANNELS 1
#define DEPTH VECTOR
#define WIDTH LANES
#endif
#define ROWS (THREADS / LANES)    // threads along the reduced axes
#define WARPS (THREADS / 32)
#if CLUSTER > 1
#define KERNEL extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) __cluster_dims__(CLUSTER, 1, 1)
#else
#define KERNEL extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS)
#endif

#if WIDE
typedef i64 Index;  // of a vector among those of a channel
#else
typedef unsigned Index;
#endif

typedef i64 Strides[4];  // of batch, outer, channel and inner, in elements

// The same for all kernels on arrays; what one does not use is null. launch.py writes it: `TILES`. Parameters are
// contiguous, one for each kept channel; their types are as DTYPE.
struct Params {
    char *x, *y, *residual, *dy, *dx, *dresidual, *weight;
    const char *gamma, *beta, *mean, *spread, *count, *dmean, *dvar, *dgamma, *dbeta;
    char *running_mean, *running_var;  // updated, if they are given
    double *results, *partials;
    unsigned* counters;
    double rate, correction;  // of the running statistics
    Strides x_strides, y_strides, residual_strides, dy_strides, dx_strides, dresidual_strides, weight_strides;
    i64 gamma_type, beta_type, mean_type, spread_type, count_type, dmean_type, dvar_type, dgamma_type, dbeta_type;
    i64 running_mean_type, running_var_type;
    i64 batches, channels;      // kept sizes
    i64 vectors, row_vectors;   // of a channel; of these in one run of the inner axis
    i64 row_magic, row_shift;   // v / row_vectors = umulhi(v, magic) >> shift; magic 0: row_vectors is 1
    i64 tiles_per_batch, tiles, splits, share;  // vectors of a channel in one split
    i64 backwards;              // second passes go backwards: what the first read last is still in the cache
    i64 summed;                 // splits of the pass before, whose partials or results are read; 0 without
    i64 spread_is_variance, frozen;
    double eps;
};

// --- elements --------------------------------------------------------------------------------------------------------

template <int BYTES> struct Words;
template <> struct Words<16> { typedef uint4 type; };
template <> struct Words<8> { typedef uint2 type; };
template <> struct Words<4> { typedef unsigned type; };
template <> struct Words<2> { typedef unsigned short type; };
typedef typename Words<VECTOR * sizeof(T)>::type Packed;

typedef Packed Items[ITEMS_PER_THREAD];

#define PAIRS (DTYPE == 1 && VECTOR > 1)  // of bfloat16

union Elements {
    Packed packed;
    T each[VECTOR];
#if PAIRS
    unsigned pairs[VECTOR / 2];
#endif
};

__device__ __forceinline__ real decoded(T element) {
#if DTYPE == 0
    return half_to_float(element);
#elif DTYPE == 1
    return bfloat16_to_float(element);
#else
    return element;
#endif
}

__device__ __forceinline__ T encoded(real value) {
#if DTYPE == 0
    return float_to_half(value);
#elif DTYPE == 1
    return float_to_bfloat16(value);
#else
    return value;
#endif
}

__device__ __forceinline__ real element(const Packed& packed, int j) {
    Elements elements;
    elements.packed = packed;
#if PAIRS
    return bfloat16_of_pair(elements.pairs[j / 2], j % 2);
#else
    return decoded(elements.each[j]);
#endif
}

// --- where a thread stands -------------------------------------------------------------------------------------------

struct Tile {
    i64 batch, origin;  // the first channel of the tile
    int slot;           // and of this thread, from there on
    bool active;        // false beyond the last channel
    Index first, last;  // vectors of this block
#if RUN
    int cut;  // elements of a vector before the thread's second channel
#endif

    __device__ __forceinline__ Tile(const Params& p, unsigned tile, unsigned split) {
        const int lane = threadIdx.x % LANES;
        const unsigned per_batch = static_cast<unsigned>(p.tiles_per_batch), row = tile / per_batch;
        batch = row;
        origin = static_cast<i64>(tile - row * per_batch) * WIDTH;
#if RUN
        slot = lane * VECTOR / RUN;
        cut = min((slot + 1) * RUN - lane * VECTOR, VECTOR);
        active = threadIdx.x < ROWS * LANES;
#else
        slot = lane * CHANNELS;
        active = has(p, slot);
#endif
        const i64 start = split * p.share, end = start + p.share;
        first = static_cast<Index>(start < p.vectors ? start : p.vectors);
        last = static_cast<Index>(end < p.vectors ? end : p.vectors);
        if (!active) last = 0;
    }

    // Whether all vectors of a thread's chunk from v on are this block's. Only a thread's last chunk is not whole: loops
    // over the others have no conditions.
    __device__ __forceinline__ bool whole(Index v) const { return v + (ITEMS_PER_THREAD - 1) * ROWS < last; }

    // Of the vectors v, v + ROWS, ... of one thread, how many are this block's, ITEMS_PER_THREAD at most.
    __device__ __forceinline__ int within(Index v) const {
        if (v >= last) return 0;
        const Index left = (last - v + (ROWS - 1)) / ROWS;
        return left < ITEMS_PER_THREAD ? static_cast<int>(left) : ITEMS_PER_THREAD;
    }

    __device__ __forceinline__ Index start() const { return first + threadIdx.x / LANES; }

    // How many a thread has, `count` of them from v on.
    __device__ __forceinline__ double taken(Index v, int count) const {
        return static_cast<double>((v - start()) / ROWS + count);
    }

    // Of the channel `q` of the tile: whether there is one, and its place among all that have statistics.
    __device__ __forceinline__ bool has(const Params& p, int q) const { return origin + q < p.channels; }

    __device__ __forceinline__ i64 kept(const Params& p, int q) const { return batch * p.channels + origin + q; }

    // The place of one of this thread's channels in the tile.
    __device__ __forceinline__ int own(int ch) const { return RUN ? min(slot + ch, WIDTH - 1) : slot + ch; }

    // Elements of one of this thread's channels in a vector, and whether the element j is of it.
#if RUN
    __device__ __forceinline__ int depth(int ch) const { return ch == 0 ? cut : VECTOR - cut; }

    __device__ __forceinline__ bool holds(int ch, int j) const { return (j < cut) == (ch == 0); }
#else
    __device__ __forceinline__ int depth(int) const { return DEPTH; }

    __device__ __forceinline__ bool holds(int ch, int j) const { return !ALONG_CHANNELS || j == ch; }
#endif

    // What belongs to the channel of the element j, of this thread's channels.
    template <class Number>
    __device__ __forceinline__ Number of_element(const Number (&channels)[CHANNELS], int j) const {
#if RUN
        // A number at a time: of whole structures sm_100 gets branches, or four moves for each number.
        Number chosen;
        const real *one = reinterpret_cast<const real*>(channels), *two = reinterpret_cast<const real*>(channels + 1);
#pragma unroll
        for (int i = 0; i < static_cast<int>(sizeof(Number) / sizeof(real)); ++i)
            reinterpret_cast<real*>(&chosen)[i] = j < cut ? one[i] : two[i];
        return chosen;
#else
        return channels[ALONG_CHANNELS ? j : 0];
#endif
    }

#if RUN
    // Adds what the element j gives to the sum of its channel.
    __device__ __forceinline__ void add(real (&sums)[CHANNELS], int j, real value) const {
        if (j < cut)
            sums[0] += value;
        else
            sums[1] += value;
    }

    // Likewise what all elements at each place in a vector give: loops add by places, as two channels for each element
    // are two instructions, and on sm_100 another six that move.
    __device__ __forceinline__ void add_places(real (&sums)[CHANNELS], const real (&places)[VECTOR]) const {
#pragma unroll
        for (int j = 0; j < VECTOR; ++j) add(sums, j, places[j]);
    }
#endif

    __device__ __forceinline__ i64 base(const Strides& strides) const {
        const int along = RUN ? threadIdx.x % LANES * VECTOR : 0;
        return batch * strides[0] + (origin + (RUN ? 0 : slot)) * strides[2] + along;
    }
};

// Of a grid of another size than was planned results would be wrong, and groups of blocks wait for ever.
__device__ __forceinline__ void trap_unless(bool right) {
    if (!right) trap();
}

// Which tile and which split of it a block of an elementwise or summing pass works on: neighbours in memory run
// together.
__device__ __forceinline__ void find_work(const Params& p, unsigned& tile, unsigned& split) {
    trap_unless(gridDim.x == p.tiles * p.splits);
    const unsigned block = p.backwards ? gridDim.x - 1 - blockIdx.x : blockIdx.x;
#if ALONG_CHANNELS
    const unsigned tiles = static_cast<unsigned>(p.tiles);
    split = block / tiles;
    tile = block - split * tiles;
#else
    const unsigned splits = static_cast<unsigned>(p.splits);
    tile = block / splits;
    split = block - tile * splits;
#endif
}

#define CHUNK (ITEMS_PER_THREAD * ROWS)  // from a thread's vector to the first of its next chunk

struct Position {  // on the reduced axes
    i64 outer, inner;

    __device__ __forceinline__ Position(const Params& p, Index v) {
#if WIDE
        outer = v / p.row_vectors;
        inner = (v - outer * p.row_vectors) * DEPTH;
#else
        const unsigned row = p.row_magic ? __umulhi(v, static_cast<unsigned>(p.row_magic)) >> p.row_shift : v;
        outer = row;
        inner = static_cast<i64>(v - row * static_cast<unsigned>(p.row_vectors)) * DEPTH;
#endif
    }

    __device__ __forceinline__ i64 offset(const Strides& strides) const {
        return outer * strides[1] + inner * strides[3];
    }
};

// The vector v + k * ROWS of a channel, of data that begin with the thread's own.
__device__ __forceinline__ Packed* vector_at(T* start, const Strides& strides, const Params& p, Index v, int k) {
    Packed* vectors = reinterpret_cast<Packed*>(start);
#if STEPS == 1
    const unsigned step = static_cast<unsigned>(strides[1]) / VECTOR;
    return vectors + v * step + static_cast<u64>(step) * (k * ROWS);
#elif STEPS == 2
    // What is the same for all k is an offset within the instruction that loads.
    const unsigned gap = static_cast<unsigned>(strides[1]) / VECTOR - static_cast<unsigned>(p.row_vectors);
    const unsigned row = __umulhi(v + k * ROWS, static_cast<unsigned>(p.row_magic)) >> p.row_shift;
    return vectors + (v + row * gap) + k * ROWS;
#else
    return reinterpret_cast<Packed*>(start + Position(p, v + k * ROWS).offset(strides));
#endif
}

__device__ __forceinline__ T* start_of(const char* data, const Strides& strides, const Tile& tile) {
    return const_cast<T*>(reinterpret_cast<const T*>(data)) + tile.base(strides);
}

// ITEMS_PER_THREAD vectors of an array, as many as `count`; the others are left alone.
__device__ __forceinline__ void load(
    Items& items, const char* data, const Strides& strides, const Params& p, const Tile& tile, Index v, int count
) {
    T* start = start_of(data, strides, tile);
#pragma unroll
    for (int k = 0; k < ITEMS_PER_THREAD; ++k)
        if (k < count) items[k] = *vector_at(start, strides, p, v, k);
}

__device__ __forceinline__ void store(
    const Items& items, char* data, const Strides& strides, const Params& p, const Tile& tile, Index v, int count
) {
    T* start = start_of(data, strides, tile);
#pragma unroll
    for (int k = 0; k < ITEMS_PER_THREAD; ++k)
        if (k < count)  // an assignment of a uint4 becomes four stores before sm_100
            __stwb(vector_at(start, strides, p, v, k), items[k]);
}

// What a thread keeps on the chip: chunks in shared memory, `kept` being its own place in the first vectors.
__device__ __forceinline__ void keep(Packed* kept, int chunk, const Items& items) {
#pragma unroll
    for (int k = 0; k < ITEMS_PER_THREAD; ++k) kept[(chunk * ITEMS_PER_THREAD + k) * THREADS] = items[k];
}

__device__ __forceinline__ void fetch(Items& items, const Packed* kept, int chunk) {
#pragma unroll
    for (int k = 0; k < ITEMS_PER_THREAD; ++k) items[k] = kept[(chunk * ITEMS_PER_THREAD + k) * THREADS];
}

// The weight of element j of the vector v.
__device__ __forceinline__ double weight_of(const Params& p, const Tile& tile, Index v, int j) {
#if WEIGHT
    const Position at(p, v);
    const i64 along = ALONG_CHANNELS ? j * p.weight_strides[2] : j * p.weight_strides[3];
    const i64 index = tile.base(p.weight_strides) + at.offset(p.weight_strides) + along;
#if WEIGHT == 1
    return reinterpret_cast<const unsigned char*>(p.weight)[index] ? 1.0 : 0.0;
#elif WEIGHT == 3
    return reinterpret_cast<const float*>(p.weight)[index];
#else
    return reinterpret_cast<const double*>(p.weight)[index];
#endif
#else
    return 1.0;
#endif
}

// --- blocks that work together ---------------------------------------------------------------------------------------

#if RUN
// Calls `take` with the places of all parts of the channel `q`, that of the thread t's channel ch being
// ch * THREADS + t, each by one lane of a warp.
template <class Take>
__device__ __forceinline__ void for_parts_of_run(int q, Take take) {
    constexpr int most = (RUN + 2 * VECTOR - 2) / VECTOR;  // vectors that a channel has part of
    const int first = q * RUN / VECTOR, last = ((q + 1) * RUN - 1) / VECTOR;
    for (int i = threadIdx.x % 32; i < most * ROWS; i += 32) {
        const int row = i / most, at = first + i - row * most;
        if (at <= last) take((at * VECTOR < q * RUN ? THREADS : 0) + row * LANES + at);
    }
}
#endif

#define PIECE (WIDTH < 4 ? WIDTH : 4)  // channels that a block merges for its group: float64 numbers of a sector

// All blocks of a group of `splits` wait for one another; what they wrote to global memory before is seen after. The
// launch is cooperative: all groups are on the device. `round` counts the barriers of this launch from 1.
__device__ __forceinline__ void group_barrier(const Params& p, unsigned round) {
#if CLUSTER > 1
    cluster_barrier();
#else
    __syncthreads();
    if (threadIdx.x == 0) {
        unsigned* counter = p.counters + blockIdx.x / static_cast<unsigned>(p.splits);
        const unsigned everyone = round * static_cast<unsigned>(p.splits);
        __threadfence();
        atomicAdd(counter, 1u);
        while (static_cast<int>(*reinterpret_cast<volatile unsigned*>(counter) - everyone) < 0) backoff();
        __threadfence();
    }
    __syncthreads();
#endif
}

__device__ __forceinline__ double read_shared_with_others(const double* at) {  // past the first-level cache
    return *reinterpret_cast<const volatile double*>(at);
}

__device__ __forceinline__ double added_across(double value, int from, int to) {  // lanes whose numbers differ there
    for (int bit = from; bit < to; bit *= 2) value += __shfl_xor_sync(0xffffffffu, value, bit);
    return value;
}
