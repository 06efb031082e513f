// Sums of what one thread has of a kept index, by dtype:
//
// - integers of up to 32 bits: integers, exact; longer ones: 128 bits, exact;
// - float32 and halves: in float32 with what each addition lost (two-sum, 6 operations), and in float64 every GROUP
//   elements: 0.1 operations of float64 each, of which consumers' GPUs do 1/64 as many; for results in float64 in float64;
// - float64: in float64 with what each addition lost.
//
// Sums of infinities or NaN, and those beyond the range of their type at either end, are odd (careful.cuh).

#pragma once

#include "parts.cuh"

#define GROUP 32  // elements
#define BATCHES (GROUP / (ITEMS_PER_THREAD * DEPTH) > 1 ? GROUP / (ITEMS_PER_THREAD * DEPTH) : 1)

#define LEAST_FLOATS 0x60000000u  // bits of exponents that a number of 2^-63 or larger has

__device__ __forceinline__ float two_sum(float a, float b, float& lost) {
    const float s = a + b, t = s - a;
    lost = (a - (s - t)) + (b - t);
    return s;
}

// An integer of 64 bits as two numbers.
__device__ __forceinline__ double halves_of(u64 value, double& low) {
    return two_sum(
        static_cast<double>(static_cast<unsigned>(value >> 32)) * 0x1p32,
        static_cast<double>(static_cast<unsigned>(value)), low
    );
}

__device__ __forceinline__ double halves_of(i64 value, double& low) {
    return two_sum(
        static_cast<double>(static_cast<int>(value >> 32)) * 0x1p32,
        static_cast<double>(static_cast<unsigned>(value)), low
    );
}

#if OF_LONGS

struct Sums {
    u64 low;
    i64 high;

    __device__ __forceinline__ void clear() { low = 0, high = 0; }

    __device__ __forceinline__ void add(Value value) {
        const u64 bits = static_cast<u64>(value);
        low += bits;
        high += (low < bits ? 1 : 0) - (value < 0 ? 1 : 0);
    }

    __device__ __forceinline__ void flush() {}
    __device__ __forceinline__ bool is_odd() const { return false; }

    __device__ __forceinline__ void put(Sum& part, double n) const {
        double below, rest, lost;
        const double of_low = halves_of(low, below), of_high = halves_of(high, rest);
        const double sum = two_sum(of_high * 0x1p64, of_low, lost);
        part.set(n, sum, (rest * 0x1p64 + below) + lost);
    }
};

#elif !OF_FLOATS

#if DTYPE == INT32 || DTYPE == UINT32
typedef i64 OfGroup;  // a sum of some elements
#else
typedef int OfGroup;
#endif

struct Sums {
    i64 sum;
    OfGroup group;

    __device__ __forceinline__ void clear() { sum = 0, group = 0; }
    __device__ __forceinline__ void add(Value value) { group += value; }

    __device__ __forceinline__ void flush() {
        sum += group;
        group = 0;
    }

    __device__ __forceinline__ bool is_odd() const { return false; }

    __device__ __forceinline__ void put(Sum& part, double n) const {
        double rest;
        const double total = halves_of(sum, rest);
        part.set(n, total, rest);
    }
};

#else

struct Sums {
    double high, low;
#if DTYPE != FLOAT64
    Value group;
#if !IN_FLOAT64
    float lost;     // of the group
    unsigned bits;  // of all elements
    bool tiny;
#endif
#endif

    __device__ __forceinline__ void clear() {
        high = low = 0;
#if DTYPE != FLOAT64 && !IN_FLOAT64
        tiny = false;
#endif
        clear_group();
    }

    __device__ __forceinline__ void clear_group() {
#if DTYPE != FLOAT64
        group = 0;
#if !IN_FLOAT64
        lost = 0;
        bits = 0;
#endif
#endif
    }

    __device__ __forceinline__ void add(Value value) {
#if DTYPE == FLOAT64
        double rest;
        high = two_sum(high, value, rest);
        low += rest;
#elif IN_FLOAT64
        group += value;
#else
        float rest;
        group = two_sum(group, value, rest);
        lost += rest;
        bits |= __float_as_uint(value);
#endif
    }

    __device__ __forceinline__ void flush() {
#if DTYPE != FLOAT64
        double rest;
        high = two_sum(high, static_cast<double>(group), rest);
        low += rest;
#if !IN_FLOAT64
        low += static_cast<double>(lost);
        tiny = tiny || ((bits & LEAST_FLOATS) == 0 && bits << 1 != 0);
#endif
        clear_group();
#endif
    }

    __device__ __forceinline__ bool is_odd() const {
#if DTYPE != FLOAT64 && !IN_FLOAT64
        if (tiny) return true;
#endif
        return !is_finite(high + low);
    }

    __device__ __forceinline__ void put(Sum& part, double n) const { part.set(n, high, low); }
};

#endif
