// Real numbers of any dtype, read where they lie by vectors and decoded in registers. Macros:
//
//   DTYPE             of parameters.cuh or below
//   VECTOR            elements of a load, side by side; 1 where they are not
//   ALONG_KEPT        1: the elements of a vector belong to kept indices of their own; 0: all to one
//   ITEMS_PER_THREAD  vectors whose loads are in flight together
//   IN_FLOAT64        1: floats are added up in float64 throughout; 0: float32 sums of some are
//   MASK, SKIP_NAN    0 or 1

#pragma once

#include "parameters.cuh"

#define INT8 4
#define INT16 5
#define INT32 6
#define INT64 7
#define UINT8 8
#define UINT16 9
#define UINT32 10
#define UINT64 11
#define BOOL 12

#define OF_FLOATS (DTYPE <= FLOAT64)
#define OF_LONGS (DTYPE == INT64 || DTYPE == UINT64)
#define COUNTED (MASK || SKIP_NAN)  // not all elements take part

#if DTYPE == FLOAT64
typedef double T;
#elif DTYPE == FLOAT32
typedef float T;
#elif DTYPE == INT8
typedef signed char T;
#elif DTYPE == INT16
typedef short T;
#elif DTYPE == INT32
typedef int T;
#elif DTYPE == INT64
typedef i64 T;
#elif DTYPE == UINT8 || DTYPE == BOOL
typedef unsigned char T;
#elif DTYPE == UINT32
typedef unsigned T;
#elif DTYPE == UINT64
typedef u64 T;
#else  // UINT16, and the bits of halves
typedef unsigned short T;
#endif

#if OF_FLOATS && IN_FLOAT64
typedef double Value;  // as what an element is added up
#elif OF_FLOATS
typedef float Value;
#elif DTYPE == UINT32 || OF_LONGS
typedef T Value;
#else
typedef int Value;
#endif

#if ALONG_KEPT
#define CHANNELS VECTOR  // kept indices of a thread
#define DEPTH 1          // elements of one of them in a vector
#else
#define CHANNELS 1
#define DEPTH VECTOR
#endif

template <int BYTES> struct Words;
template <> struct Words<16> { typedef uint4 type; };
template <> struct Words<8> { typedef uint2 type; };
template <> struct Words<4> { typedef unsigned type; };
template <> struct Words<2> { typedef unsigned short type; };
template <> struct Words<1> { typedef unsigned char type; };
typedef typename Words<VECTOR * sizeof(T)>::type Packed;
typedef typename Words<VECTOR>::type Bytes;  // of a mask

#define PAIRS (DTYPE == BFLOAT16 && VECTOR > 1)

union Elements {
    Packed packed;
    T each[VECTOR];
#if PAIRS
    unsigned pairs[VECTOR / 2];
#endif
};

union Flags {
    Bytes packed;
    unsigned char each[VECTOR];
};

__device__ __forceinline__ Value decoded(T element) {
#if DTYPE == FLOAT16
    return half_to_float(element);
#elif DTYPE == BFLOAT16
    return bfloat16_to_float(element);
#elif DTYPE == BOOL
    return element != 0;
#else
    return element;
#endif
}

__device__ __forceinline__ bool is_number(Value value) { return !SKIP_NAN || value == value; }

// What a thread has in registers at once: vectors, and for each a bit for every element that the mask takes.
struct Batch {
    Packed items[ITEMS_PER_THREAD];
#if MASK
    unsigned taken[ITEMS_PER_THREAD];
#endif
    int count;

    __device__ __forceinline__ Value at(int k, int j) const {
        Elements elements;
        elements.packed = items[k];
#if PAIRS
        return bfloat16_of_pair(elements.pairs[j / 2], j % 2);
#else
        return decoded(elements.each[j]);
#endif
    }

    __device__ __forceinline__ bool takes(int k, int j) const {
#if MASK
        return taken[k] >> j & 1;
#else
        return true;
#endif
    }
};

// The bits of a mask for the elements of a vector, whose bytes are `step` apart.
__device__ __forceinline__ unsigned mask_bits(const unsigned char* where, i64 step) {
    unsigned bits = 0;
    if (VECTOR > 1 && step == 1 && reinterpret_cast<u64>(where) % VECTOR == 0) {
        Flags flags;
        flags.packed = __ldg(reinterpret_cast<const Bytes*>(where));
#pragma unroll
        for (int j = 0; j < VECTOR; ++j) bits |= (flags.each[j] != 0 ? 1u : 0u) << j;
    } else {
#pragma unroll
        for (int j = 0; j < VECTOR; ++j) bits |= (where[j * step] != 0 ? 1u : 0u) << j;
    }
    return bits;
}
