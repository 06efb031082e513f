// What one thread adds up of a kept index, over the elements x that take part. By dtype:
//
// - Integers of up to 32 bits: sums and sums of squares of integers, exact. m2 = B - A^2/n in two numbers of float64 each.
// - Sums of longer integers: 128 bits, exact.
// - Sums of float32 and halves: in float32 with what each addition lost (two-sum, 6 operations), in float64 every GROUP
//   elements: 0.1 operations of float64 each, where consumers' GPUs have 1/64 of them. For results in float64: in float64.
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
// Where that is not enough (infinities, NaN, squares or sums out of the range of their type, at either end) the
// accumulator is `odd` and the thread takes its elements again, one by one in float64: `Careful`.

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
    return two_sum(static_cast<double>(static_cast<unsigned>(value >> 32)) * 0x1p32,
                   static_cast<double>(static_cast<unsigned>(value)), low);
}

__device__ __forceinline__ double halves_of(i64 value, double& low) {
    return two_sum(static_cast<double>(static_cast<int>(value >> 32)) * 0x1p32,
                   static_cast<double>(static_cast<unsigned>(value)), low);
}

#if !OF_FLOATS && (!SQUARES || !OF_LONGS)  // --- integers, exactly ------------------------------------------------------

struct Accumulator {
    i64 n;
#if OF_LONGS
    u64 low;
    i64 high;
#else
    i64 sum;
#endif
#if SQUARES
    u64 squares;
    unsigned more;  // times 2^64, of integers of 32 bits
#endif
    static constexpr bool odd = false;

    __device__ __forceinline__ void clear() {
        n = 0;
#if OF_LONGS
        low = 0, high = 0;
#else
        sum = 0;
#endif
#if SQUARES
        squares = 0, more = 0;
#endif
    }

    __device__ __forceinline__ void add_one(Value value) {
#if OF_LONGS
        const u64 bits = static_cast<u64>(value);
        low += bits;
        high += (low < bits ? 1 : 0) - (value < 0 ? 1 : 0);
#else
        sum += value;
#endif
#if SQUARES
#if DTYPE == INT32 || DTYPE == UINT32
        const unsigned size = value < 0 ? 0u - static_cast<unsigned>(value) : static_cast<unsigned>(value);
        const u64 square = static_cast<u64>(size) * size;
        squares += square;
        more += squares < square ? 1 : 0;
#else
        const unsigned size = static_cast<unsigned>(value);  // squares are below 2^32, whatever the sign
        squares += size * size;
#endif
#endif
    }

    __device__ __forceinline__ void add(const Batch& batch, int from) {
        int part = 0, taken = 0;  // of short integers, whose sums of a batch are below 2^31
        unsigned part_of_squares = 0;
#pragma unroll
        for (int k = 0; k < ITEMS_PER_THREAD; ++k)
            if (k < batch.count)
#pragma unroll
                for (int j = 0; j < DEPTH; ++j)
                    if (batch.takes(k, from + j)) {
                        const Value value = batch.at(k, from + j);
                        if (sizeof(T) == 1) {
                            part += static_cast<int>(value);
                            part_of_squares += static_cast<unsigned>(value * value);
                        } else {
                            add_one(value);
                        }
                        if (COUNTED) ++taken;
                    }
        n += COUNTED ? taken : batch.count * DEPTH;
#if !OF_LONGS
        sum += part;
#if SQUARES
        squares += part_of_squares;
#endif
#endif
    }

    __device__ __forceinline__ void flush() {}

    __device__ __forceinline__ void add_edge(Value value) {
        add_one(value);
        ++n;
    }

    __device__ __forceinline__ void put(Part& part) const {
        double rest, lost;
#if OF_LONGS
        double below, of_low = halves_of(low, below), of_high = halves_of(high, rest);
        of_high = two_sum(of_high * 0x1p64, of_low, lost);
        part.set(static_cast<double>(n), of_high, (rest * 0x1p64 + below) + lost, 0);
#else
        const double total = halves_of(sum, rest);
#if SQUARES
        if (n == 0) {
            part.set(0, 0, 0, 0);
            return;
        }
        double below, b = halves_of(squares, below);
        b = two_sum(static_cast<double>(more) * 0x1p64, b, lost);
        const double count = static_cast<double>(n), mean = quotient(total, count);
        const double more_of_mean = (fma(-mean, count, total) + rest) * reciprocal(count);
        const double between = total * mean;  // A^2/n, and what that loses
        const double less = fma(total, mean, -between) + (total * more_of_mean + rest * mean);
        const double m2 = (b - between) + ((lost + below) - less);
        part.set(count, mean, more_of_mean, m2 > 0 ? m2 : 0);
#else
        part.set(static_cast<double>(n), total, rest, 0);
#endif
#endif
    }
};

#elif !SQUARES  // --- sums of floats ------------------------------------------------------------------------------------

struct Accumulator {
    double high, low;
    i64 n;
    bool odd;
#if DTYPE != FLOAT64
    Value group;
#if !IN_FLOAT64
    float lost;  // of the group
    unsigned bits;
#endif
#endif

    __device__ __forceinline__ void clear() {
        high = low = 0;
        n = 0;
        odd = false;
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

    __device__ __forceinline__ void add_one(Value value) {
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

    __device__ __forceinline__ void add(const Batch& batch, int from) {
#pragma unroll
        for (int k = 0; k < ITEMS_PER_THREAD; ++k)
            if (k < batch.count)
#pragma unroll
                for (int j = 0; j < DEPTH; ++j) {
                    const Value value = batch.at(k, from + j);
                    if (batch.takes(k, from + j) && is_number(value)) {
                        add_one(value);
                        if (COUNTED) ++n;
                    }
                }
        if (!COUNTED) n += batch.count * DEPTH;
    }

    __device__ __forceinline__ void flush() {
#if DTYPE != FLOAT64
        double rest;
        high = two_sum(high, static_cast<double>(group), rest);
        low += rest;
#if !IN_FLOAT64
        low += static_cast<double>(lost);
        odd = odd || ((bits & LEAST_FLOATS) == 0 && bits << 1 != 0);
#endif
        clear_group();
#endif
    }

    __device__ __forceinline__ void add_edge(Value value) {
        add_one(value);
        ++n;
        flush();
    }

    __device__ __forceinline__ bool is_odd() const { return odd || !is_finite(high + low); }

    __device__ __forceinline__ void put(Part& part) const { part.set(static_cast<double>(n), high, low, 0); }
};

#else  // --- squares around a shift -------------------------------------------------------------------------------------

#if OF_LONGS
typedef double real;
#else
typedef Value real;
#endif

#if OF_LONGS  // distances are rounded but once

__device__ __forceinline__ double distance(Value value, Value shift) {
    const u64 size = value < shift ? static_cast<u64>(shift) - static_cast<u64>(value)
                                   : static_cast<u64>(value) - static_cast<u64>(shift);
    return value < shift ? -static_cast<double>(size) : static_cast<double>(size);
}

__device__ __forceinline__ Value moved(Value shift, double by) {
    const u64 size = static_cast<u64>(fmin(fabs(by), 0x1.fffffffffffffp63));
    return static_cast<Value>(by < 0 ? static_cast<u64>(shift) - size : static_cast<u64>(shift) + size);
}

#else

__device__ __forceinline__ real distance(Value value, Value shift) { return value - shift; }
__device__ __forceinline__ Value moved(Value shift, real by) { return shift + by; }

#endif

__device__ __forceinline__ bool is_finite_value(Value value) {
    return !OF_FLOATS || is_finite(static_cast<double>(value));
}

__device__ __forceinline__ unsigned bits_of_distance(float value) { return __float_as_uint(value) << 1; }

__device__ __forceinline__ unsigned bits_of_distance(double value) {
    const u64 bits = static_cast<u64>(__double_as_longlong(value)) << 1;
    return static_cast<unsigned>(bits >> 32 | bits);
}

struct Accumulator {
    double away, squares;
    i64 n;
    Value shift, origin;
    real a, b;
    unsigned differ;  // bits of distances: 0 where all elements are the shift
    int taken;        // of the group
    bool begun, odd;

    __device__ __forceinline__ void clear() {
        away = squares = 0;
        n = 0;
        shift = origin = 0;
        a = b = 0;
        differ = 0;
        taken = 0;
        begun = odd = false;
    }

    __device__ __forceinline__ void begin_at(Value value) {
        shift = origin = value;
        begun = true;
    }

    // The first shift: the mean of what is finite in a batch.
    __device__ __forceinline__ void begin(const Batch& batch, int from) {
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

    __device__ __forceinline__ void add_one(Value value) {
        const real d = distance(value, shift);
        a += d;
        b = fma(d, d, b);
        differ |= bits_of_distance(d);
    }

    __device__ __forceinline__ void add(const Batch& batch, int from) {
        if (!begun) begin(batch, from);
#pragma unroll
        for (int k = 0; k < ITEMS_PER_THREAD; ++k)
            if (k < batch.count)
#pragma unroll
                for (int j = 0; j < DEPTH; ++j) {
                    const Value value = batch.at(k, from + j);
                    if (batch.takes(k, from + j) && is_number(value)) {
                        add_one(value);
                        if (COUNTED) ++taken;
                    }
                }
        if (!COUNTED) taken += batch.count * DEPTH;
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

    __device__ __forceinline__ void flush() {
        if (taken == 0) return;
        odd = odd || !in_range();
        const double count = taken, far = distance(shift, origin);
        const real by = a * reciprocal(static_cast<real>(taken));
        const double here = far + by;
        away += fma(count, far, static_cast<double>(a));
        squares += static_cast<double>(b - a * by) + count * here * here;
        shift = moved(shift, by);
        n += taken;
        a = b = 0;
        differ = 0;
        taken = 0;
    }

    __device__ __forceinline__ void add_edge(Value value) {
        if (!begun) begin_at(value);
        add_one(value);
        ++taken;
        flush();
    }

    __device__ __forceinline__ bool is_odd() const { return odd || !is_finite(squares); }

    __device__ __forceinline__ void put(Part& part) const {
        if (n == 0) {
            part.set(0, 0, 0, 0);
            return;
        }
        const double count = static_cast<double>(n), by = quotient(away, count), m2 = squares - away * by;
#if OF_LONGS
        double rest;
        const double start = halves_of(origin, rest);
        part.set(count, start, rest + by, m2 > 0 ? m2 : 0);
#else
        part.set(count, static_cast<double>(origin), by, m2 > 0 ? m2 : 0);
#endif
    }
};

#endif

// --- one by one -------------------------------------------------------------------------------------------------------

#if OF_FLOATS

// The same in float64 with units, whatever the values are.
struct Careful {
    double n, origin, away, squares, odd;  // odd: the sum of what is not finite, NaN and infinities
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
#if SQUARES
        if (!begun) origin = value;
        const double d = value * unit - origin * unit;
        away += d;
        squares = fma(d, d, squares);
#else
        double lost;
        away = two_sum(away, value * unit, lost);
        squares += lost;
#endif
        begun = true;
    }

    // Whether all that is finite was added up without loss.
    __device__ __forceinline__ bool done() const { return is_finite(squares); }

    __device__ __forceinline__ void put(Part& part, double unit) const {
        if (odd != 0) {
            part.set(n, odd, 0, not_a_number());
            return;
        }
#if SQUARES
        if (n == 0) {
            part.set(0, 0, 0, 0);
            return;
        }
        const double by = quotient(away, n);
#if DTYPE == FLOAT64
        part = part_in_units(n, origin, by, squares - away * by, unit);
#else
        part.set(n, origin, by, max(squares - away * by, 0.0));
#endif
#else
        part.set(n, away, squares, 0, unit);
#endif
    }
};

#endif
