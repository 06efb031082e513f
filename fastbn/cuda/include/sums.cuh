// What one thread adds up of a kept index, over the elements x that take part. By dtype:
//
// - Integers of up to 32 bits: sums and sums of squares of integers, exact. M2 = B - A^2/n in two numbers of float64 each.
// - Sums of longer integers: 128 bits, exact.
// - Sums of float32 and halves: in float32 with what each addition lost (two-sum, 6 operations), in float64 every GROUP
//   elements: 0.1 operations of float64 each, of which consumers' GPUs do 1/64 as many. For results in float64: in float64.
// - Sums of float64: in float64 with what each addition lost.
// - Squares of floats and longer integers, around a shift: of each group of n elements
//
//       a = sum(x - shift),  b = sum((x - shift)^2),   away += n (shift - origin) + a
//       squares += (b - a^2/n) + n (shift - origin + a/n)^2,   shift += a/n
//
//   and at the end mean = origin + away / n, M2 = squares - away^2 / n (Chan, Golub & LeVeque 1983). Groups are added up
//   in the type of the elements' arithmetic. The shift is the mean of the thread's first vectors, then that of the group
//   before: so errors are relative to squares of distances between neighbouring groups, which are at most some M2.
//
// Where that is not enough (infinities, NaN, squares or sums out of the range of their type, at either end) they are odd,
// and the thread takes its elements again, one by one in float64: `CarefulSum`, `CarefulSpread`.

#pragma once

#include "parts.cuh"

#define GROUP 32  // elements
#define BATCHES (GROUP / (ITEMS_PER_THREAD * DEPTH) > 1 ? GROUP / (ITEMS_PER_THREAD * DEPTH) : 1)

#define LEAST_SQUARES_OF_FLOATS 0x1p-76f  // squares below 2^-126 are 0, which is 2^-50 of it
#define LEAST_SHIFT 0x1p-100f             // distances from a smaller one are 0 below 2^-126
#define LEAST_FLOATS 0x60000000u          // bits of exponents that one of 2^-63 or larger has

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

// --- sums -------------------------------------------------------------------------------------------------------------

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

// --- squares ----------------------------------------------------------------------------------------------------------

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
__device__ __forceinline__ bool is_finite_value(Value value) { return is_finite(static_cast<double>(value)); }

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
        return far && (differ == 0 || (b >= LEAST_SQUARES_OF_FLOATS && is_finite(b)));
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

// --- what is wanted ---------------------------------------------------------------------------------------------------

struct Accumulator {
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

// --- one by one -------------------------------------------------------------------------------------------------------

struct CarefulSum {
    double n, high, low, odd;  // odd: the sum of what is not finite, NaN and infinities

    __device__ __forceinline__ void clear() { n = high = low = odd = 0; }

    __device__ __forceinline__ void add(double value, double unit) {
        n += 1;
        if (!is_finite(value)) odd += value;
        double lost;
        high = two_sum(high, is_finite(value) ? value * unit : 0, lost);
        low += lost;
    }

    __device__ __forceinline__ bool done() const { return true; }

    __device__ __forceinline__ void put(Sum& part, double unit) const {
        if (odd != 0)
            part.set(n, odd, 0);
        else
            part.set(n, high, low, unit);
    }
};

struct CarefulSpread {
    double n, origin, away, squares, odd;
    bool begun;

    __device__ __forceinline__ void clear() {
        n = origin = away = squares = odd = 0;
        begun = false;
    }

    __device__ __forceinline__ void add(double value, double unit) {
        n += 1;
        if (!is_finite(value)) {
            odd += value;
            return;
        }
        if (!begun) origin = value;
        begun = true;
        const double d = value * unit - origin * unit;
        away += d;
        squares = fma(d, d, squares);
    }

    // Whether no square has overflown.
    __device__ __forceinline__ bool done() const { return is_finite(squares); }

    __device__ __forceinline__ void put(Spread& part, double unit) const {
        const double by = quotient(away, n);
        if (odd != 0)
            part.set(n, odd, 0, not_a_number());
        else
            part = spread_in_units(n, origin, by, squares - away * by, unit);
    }
};
