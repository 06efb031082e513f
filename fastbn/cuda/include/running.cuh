// Running mean and variance of a channel after one more batch:
//
//     new = (1 - rate) old + rate batch,   var of the batch = m2 / (count - correction)
//
// in float64, each step rounded as NumPy rounds it, so that both give the same bits; then once to the type of the
// running statistics. Channels that stay as they are keep their bits: those with count <= correction, with
// `skip_nonfinite` those whose batch is not finite, and all where the rate is 0.

#pragma once

#include "rounding.cuh"

struct Batch {  // of a channel
    double count, mean, m2;
};

// The bits of a number, as many as its type has.
__device__ __forceinline__ u64 bits_at(const char* data, i64 type, i64 index) {
    if (type == FLOAT64) return reinterpret_cast<const u64*>(data)[index];
    if (type == FLOAT32) return reinterpret_cast<const unsigned*>(data)[index];
    return reinterpret_cast<const unsigned short*>(data)[index];
}

// The old number moved towards the batch's. At rate 1 nothing is left of it, which may be infinite.
__device__ __forceinline__ double moved(double old, double batch, double rate) {
    return rate == 1 ? batch : __dadd_rn(__dmul_rn(1 - rate, old), __dmul_rn(rate, batch));
}

// New ones have the types of the old ones, and may be these.
__device__ __forceinline__ void update_channel(
    const char* mean, const char* var, char* new_mean, char* new_var, i64 mean_type, i64 var_type, i64 at,
    const Batch& batch, double rate, double correction, bool skip_nonfinite
) {
    const double divisor = batch.count - correction;
    const double batch_var = divisor > 0 ? batch.m2 / divisor : not_a_number();
    u64 bits_of_mean = bits_at(mean, mean_type, at), bits_of_var = bits_at(var, var_type, at);
    bool counts = batch.count > correction && rate != 0;
    if (skip_nonfinite) counts = counts && is_finite(batch.mean) && is_finite(batch_var);
    if (counts) {
        bits_of_mean = bits_of(moved(parameter(mean, mean_type, at, 0.0), batch.mean, rate), mean_type);
        bits_of_var = bits_of(moved(parameter(var, var_type, at, 0.0), batch_var, rate), var_type);
    }
    write_bits(new_mean, mean_type, at, bits_of_mean);
    write_bits(new_var, var_type, at, bits_of_var);
}
