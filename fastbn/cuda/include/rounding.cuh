// Numbers in float64 as any float type has them, each rounded once.

#pragma once

#include "parameters.cuh"

// Rounded towards an odd last bit, so that rounding the result to fewer bits rounds the value but once.
__device__ __forceinline__ float rounded_to_odd(double value) {
    const float nearest = static_cast<float>(value);
    const double back = nearest;
    if (back == value || value != value) return nearest;
    const unsigned bits = __float_as_uint(nearest) - (fabs(back) > fabs(value) ? 1 : 0);
    return __uint_as_float(bits | 1);
}

__device__ __forceinline__ u64 bits_of(double value, i64 type) {
    if (type == FLOAT64) return static_cast<u64>(__double_as_longlong(value));
    if (type == FLOAT32) return __float_as_uint(static_cast<float>(value));
    const float odd = rounded_to_odd(value);
    return type == FLOAT16 ? float_to_half(odd) : float_to_bfloat16(odd);
}

__device__ __forceinline__ void write_bits(char* data, i64 type, i64 index, u64 bits) {
    if (type == FLOAT64)
        reinterpret_cast<u64*>(data)[index] = bits;
    else if (type == FLOAT32)
        reinterpret_cast<unsigned*>(data)[index] = static_cast<unsigned>(bits);
    else
        reinterpret_cast<unsigned short*>(data)[index] = static_cast<unsigned short>(bits);
}
