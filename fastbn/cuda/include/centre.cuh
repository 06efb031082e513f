// The distance of elements from their channel's mean, in units in which no number leaves the range of its type.
//
// Units are powers of two, 1 for ordinary data, whose bits they do not change. They matter at both ends of float32:
// rstd is 10^37 where deviations are 10^-37; it is subnormal, hence 0, where these are 10^38, and x - mean overflows.

#pragma once

#include "tile.cuh"

#if DTYPE == 3
#define LEAST_EXPONENT -360  // of numbers that are multiplied with elements
#define MOST_EXPONENT 900
#define UNITS 1022  // the largest exponent of a unit
#else
#define LEAST_EXPONENT -40
#define MOST_EXPONENT 100
#define UNITS 126
#endif

#define NEAR_RSTD 4  // exponents up to which distances are as they are: near 1, since dz is multiplied with them too
#define NO_EXPONENT -1023

__device__ __forceinline__ int exponent_of(double value) {  // none of 0, infinities and NaN
    const int bits = static_cast<int>(__double_as_longlong(value) >> 52) & 2047;
    return bits == 2047 ? NO_EXPONENT : bits - 1023;
}

__device__ __forceinline__ double power_of_two(int exponent) {  // -1022 to 1023
    return __longlong_as_double(static_cast<i64>(exponent + 1023) << 52);
}

// The exponent of the unit of a channel's distances.
__device__ __forceinline__ int distance_exponent(double mean, double rstd) {
    int exponent = exponent_of(rstd);
    if (exponent == NO_EXPONENT || abs(exponent) <= NEAR_RSTD) exponent = 0;
    exponent = min(exponent, MOST_EXPONENT - exponent_of(mean));  // nor may the mean get out of range
    exponent = max(-UNITS, min(exponent, UNITS));
#if DTYPE != 3
    // Tiny elements and a larger eps: the low part of the mean would be subnormal.
    if (exponent == 0 && mean != 0 && fabs(mean) < 0x1p-80) exponent = 32;
#endif
    return exponent;
}

struct Centre {  // of a channel
    real high, low, unit;  // the mean times the unit is high + low

    // The mean is mean + rest.
    __device__ __forceinline__ void set(double mean, double rest, int exponent) {
        const double factor = power_of_two(exponent);
        unit = static_cast<real>(factor);
        high = static_cast<real>(mean * factor);
        const double left = (mean * factor - static_cast<double>(high)) + rest * factor;
        low = is_finite(left) ? static_cast<real>(left) : 0;
    }

    // From the high part; what is linear in the distance takes the low part into its constant, once for a channel: for
    // each element it takes an instruction.
    __device__ __forceinline__ real distance(real x) const { return fma(x, unit, -high); }
};
