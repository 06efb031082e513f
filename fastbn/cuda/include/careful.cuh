// Sums and squares of elements one by one in float64, whatever they are: infinities, NaN, numbers at both ends of a range.
// Sums are of values times a unit, squares of distances times one (parts.cuh).

#pragma once

#include "parts.cuh"

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
