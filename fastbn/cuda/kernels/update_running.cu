// Running mean and variance after one more batch, of moments in memory: running.cuh. A thread has a channel, of which it
// reads all five numbers before it writes two (56 bytes at most): new arrays may be old ones.

#include "running.cuh"

struct Params {  // launch.py writes it: `RUNNING`
    const char *mean, *var, *count, *batch_mean, *m2;
    char *new_mean, *new_var;
    double rate, correction;
    i64 mean_type, var_type, count_type, batch_mean_type, m2_type;  // new ones have the types of the old
    i64 channels, skip_nonfinite;
};

extern "C" __global__ void __launch_bounds__(THREADS) update_running(const Params p) {
    const i64 at = static_cast<i64>(blockIdx.x) * THREADS + threadIdx.x;
    if (at >= p.channels) return;
    const Batch batch{
        parameter(p.count, p.count_type, at, 0.0), parameter(p.batch_mean, p.batch_mean_type, at, 0.0),
        parameter(p.m2, p.m2_type, at, 0.0)
    };
    update_channel(
        p.mean, p.var, p.new_mean, p.new_var, p.mean_type, p.var_type, at, batch, p.rate, p.correction, p.skip_nonfinite
    );
}
