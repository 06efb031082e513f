// Running mean and variance after one more batch:
//
//     new = (1 - rate) old + rate batch,   var of the batch = m2 / (count - correction)
//
// in float64, each step rounded as NumPy rounds it, so that both give the same bits; then once to the type of the
// running statistics. A thread has a channel, of which it reads all five numbers before it writes two (56 bytes at
// most): new arrays may be old ones. Channels that stay as they are keep their bits: those with count <= correction,
// with `skip_nonfinite` those whose batch is not finite, and all where the rate is 0.

#include "rounding.cuh"

struct Params {  // launch.py writes it: `RUNNING`
    const char *mean, *var, *count, *batch_mean, *m2;
    char *new_mean, *new_var;
    double rate, correction;
    i64 mean_type, var_type, count_type, batch_mean_type, m2_type;  // new ones have the types of the old
    i64 channels, skip_nonfinite;
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

extern "C" __global__ void __launch_bounds__(THREADS) update_running(const Params p) {
    const i64 at = static_cast<i64>(blockIdx.x) * THREADS + threadIdx.x;
    if (at >= p.channels) return;
    const double mean = parameter(p.mean, p.mean_type, at, 0.0), var = parameter(p.var, p.var_type, at, 0.0);
    const double count = parameter(p.count, p.count_type, at, 0.0), divisor = count - p.correction;
    const double batch_mean = parameter(p.batch_mean, p.batch_mean_type, at, 0.0);
    const double m2 = parameter(p.m2, p.m2_type, at, 0.0);
    const double batch_var = divisor > 0 ? m2 / divisor : not_a_number();
    u64 new_mean = bits_at(p.mean, p.mean_type, at), new_var = bits_at(p.var, p.var_type, at);
    bool counts = count > p.correction && p.rate != 0;
    if (p.skip_nonfinite) counts = counts && is_finite(batch_mean) && is_finite(batch_var);
    if (counts) {
        new_mean = bits_of(moved(mean, batch_mean, p.rate), p.mean_type);
        new_var = bits_of(moved(var, batch_var, p.rate), p.var_type);
    }
    write_bits(p.new_mean, p.mean_type, at, new_mean);
    write_bits(p.new_var, p.var_type, at, new_var);
}
