// Squares of what one thread has of a kept index. Of integers of up to 32 bits A = sum(x) and B = sum(x^2) are integers,
// exact, and M2 = B - A^2/n is in two numbers of float64 each. Of floats and longer integers squares are of distances from
// a shift, in groups of n elements:
//
//     a = sum(x - shift),  b = sum((x - shift)^2),   away += n (shift - origin) + a
//     squares += (b - a^2/n) + n (shift - origin + a/n)^2,   shift += a/n
//
// and at the end mean = origin + away / n, M2 = squares - away^2 / n (Chan, Golub & LeVeque 1983). A group is added up in
// the type of the elements' arithmetic, groups in float64. The shift is the mean of the thread's first vectors, then that
// of the group before: so errors are relative to squares of distances between neighbouring groups, some M2 at most.
//
// Squares of infinities and NaN, and those beyond the range of their type at either end, are odd (careful.cuh).

#pragma once

#include "sums.cuh"

#define LEAST_SQUARES_OF_FLOATS 0x1p-76f  // squares below 2^-126 are 0, which is 2^-50 of it
#define LEAST_SHIFT 0x1p-100f             // distances from a smaller one are 0 below 2^-126

#if !OF_FLOATS && !OF_LONGS

struct Squares {
    u64 squares;
    i64 sum;
    OfGroup group;
    unsigned of_group;  // squares of bytes
#if DTYPE == INT32 || DTYPE == UINT32
    unsigned more;  // squares times 2^64
#else
    static constexpr unsigned more = 0;
#endif

    __device__ __forceinline__ void clear() {
        squares = 0, sum = 0;
        group = 0, of_group = 0;
#if DTYPE == INT32 || DTYPE == UINT32
        more = 0;
#endif
    }

    __device__ __forceinline__ void begin(const Batch& batch, int from) {}
    __device__ __forceinline__ void begin_at(Value value) {}

    __device__ __forceinline__ void add(Value value) {
        group += value;
#if DTYPE == INT32 || DTYPE == UINT32
        const unsigned size = value < 0 ? 0u - static_cast<unsigned>(value) : static_cast<unsigned>(value);
        const u64 square = static_cast<u64>(size) * size;
        squares += square;
        more += squares < square ? 1 : 0;
#else
        const unsigned size = static_cast<unsigned>(value);  // squares are below 2^32, whatever the sign
        if (sizeof(T) == 1)
            of_group += size * size;
        else
            squares += size * size;
#endif
    }

    __device__ __forceinline__ void flush(int count) {
        sum += group;
        squares += of_group;
        group = 0, of_group = 0;
    }

    __device__ __forceinline__ bool is_odd() const { return false; }

    __device__ __forceinline__ void put(Spread& part, double n) const {
        double rest, lost, below;
        const double total = halves_of(sum, rest), mean = quotient(total, n);
        const double b = two_sum(static_cast<double>(more) * 0x1p64, halves_of(squares, below), lost);
        const double more_of_mean = (fma(-mean, n, total) + rest) * reciprocal(n);
        const double between = total * mean;  // A^2/n, and what that loses
        const double less = fma(total, mean, -between) + (total * more_of_mean + rest * mean);
        const double m2 = (b - between) + ((lost + below) - less);
        part.set(n, mean, more_of_mean, m2 > 0 ? m2 : 0);
    }
};

#else

#if OF_LONGS  // distances are rounded but once
typedef double real;

__device__ __forceinline__ double distance(Value value, Value shift) {
    const u64 size = value < shift ? static_cast<u64>(shift) - static_cast<u64>(value)
                                   : static_cast<u64>(value) - static_cast<u64>(shift);
    return value < shift ? -static_cast<double>(size) : static_cast<double>(size);
}

__device__ __forceinline__ Value moved(Value shift, double by) {
    const u64 size = static_cast<u64>(fmin(fabs(by), 0x1.fffffffffffffp63));
    return static_cast<Value>(by < 0 ? static_cast<u64>(shift) - size : static_cast<u64>(shift) + size);
}

__device__ __forceinline__ bool is_finite_value(Value) { return true; }

#else
typedef Value real;

__device__ __forceinline__ real distance(Value value, Value shift) { return value - shift; }
__device__ __forceinline__ Value moved(Value shift, real by) { return shift + by; }

#if IN_FLOAT64
__device__ __forceinline__ bool is_finite_value(Value value) { return is_finite(value); }
#else
__device__ __forceinline__ bool is_finite_value(Value value) { return fabs(value) <= 3.4028235e38f; }
#endif

#endif

// Without the sign: 0 for 0.
__device__ __forceinline__ unsigned bits_of_distance(float value) { return __float_as_uint(value) << 1; }

__device__ __forceinline__ unsigned bits_of_distance(double value) {
    const u64 bits = static_cast<u64>(__double_as_longlong(value)) << 1;
    return static_cast<unsigned>(bits >> 32 | bits);
}

struct Squares {
    double away, squares;
    Value shift, origin;
    real a, b;
    unsigned differ;  // bits of distances: 0 where all elements are the shift
    bool begun, odd;

    __device__ __forceinline__ void clear() {
        away = squares = 0;
        shift = origin = 0;
        a = b = 0;
        differ = 0;
        begun = odd = false;
    }

    __device__ __forceinline__ void begin_at(Value value) {
        if (begun) return;
        shift = origin = value;
        begun = true;
    }

    // The first shift: the mean of what is finite in a batch.
    __device__ __forceinline__ void begin(const Batch& batch, int from) {
        if (begun) return;
        Value first = 0;
        real sum = 0;
        int count = 0;
#pragma unroll
        for (int k = 0; k < ITEMS_PER_THREAD; ++k)
            if (k < batch.count)
#pragma unroll
                for (int j = 0; j < DEPTH; ++j) {
                    const Value value = batch.at(k, from + j);
                    if (batch.takes(k, from + j) && is_finite_value(value)) {
                        if (count == 0) first = value;
                        sum += distance(value, first);
                        ++count;
                    }
                }
        if (count > 0) begin_at(moved(first, sum * reciprocal(static_cast<real>(count))));
    }

    __device__ __forceinline__ void add(Value value) {
        const real d = distance(value, shift);
        a += d;
        b = fma(d, d, b);
        differ |= bits_of_distance(d);
    }

    __device__ __forceinline__ bool in_range() const {
#if OF_LONGS
        return true;
#elif IN_FLOAT64
        return differ == 0 || (b >= LEAST_SQUARES_OF_DOUBLES && is_finite(b));
#else
        const bool far = shift == 0 || fabs(shift) >= LEAST_SHIFT;
        return far && (differ == 0 || (b >= LEAST_SQUARES_OF_FLOATS && is_finite_value(b)));
#endif
    }

    __device__ __forceinline__ void flush(int elements) {
        if (elements == 0) return;
        odd = odd || !in_range();
        const double count = elements, far = distance(shift, origin);
        const real by = a * reciprocal(static_cast<real>(elements));
        const double here = far + by;
        away += fma(count, far, static_cast<double>(a));
        squares += static_cast<double>(b - a * by) + count * here * here;
        shift = moved(shift, by);
        a = b = 0;
        differ = 0;
    }

    __device__ __forceinline__ bool is_odd() const { return odd || !is_finite(squares); }

    __device__ __forceinline__ void put(Spread& part, double n) const {
        const double by = quotient(away, n), m2 = squares - away * by;
#if OF_LONGS
        double rest;
        const double start = halves_of(origin, rest);
        part.set(n, start, rest + by, m2 > 0 ? m2 : 0);
#else
        part.set(n, static_cast<double>(origin), by, m2 > 0 ? m2 : 0);
#endif
    }
};

#endif
