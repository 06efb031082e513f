// Parameters of a channel, of any float type, in float64; special values.

#pragma once

#include "device.cuh"

typedef long long i64;
typedef unsigned long long u64;

#define FLOAT16 0  // types, as DTYPE
#define BFLOAT16 1
#define FLOAT32 2
#define FLOAT64 3

__device__ __forceinline__ double parameter(const char* data, i64 type, i64 index, double otherwise) {
    if (data == nullptr) return otherwise;
    if (type == FLOAT64) return reinterpret_cast<const double*>(data)[index];
    if (type == FLOAT32) return reinterpret_cast<const float*>(data)[index];
    const unsigned short bits = reinterpret_cast<const unsigned short*>(data)[index];
    return type == FLOAT16 ? half_to_float(bits) : bfloat16_to_float(bits);
}

__device__ __forceinline__ double not_a_number() { return __longlong_as_double(0x7ff8000000000000LL); }

__device__ __forceinline__ double infinity() { return __longlong_as_double(0x7ff0000000000000LL); }

__device__ __forceinline__ bool is_finite(double value) { return fabs(value) <= 1.7976931348623157e308; }
