// y = act((x - mean) * rstd * gamma + beta + residual), of vectors in registers.
//
// The mean's high part is subtracted first, since x*s + (beta - mean*s) is 7.5e-4 off where the mean is 10^4 deviations;
// its low part, below 2^-24 of it, is in the bias.

#pragma once

#include "centre.cuh"
#include "moments.cuh"

struct Affine {
    Centre centre;
    real scale, bias;

    __device__ __forceinline__ void set(const Params& p, i64 at, const Statistics& of) {
        const int exponent = distance_exponent(of.mean, of.rstd);
        centre.set(of.mean, of.rest, exponent);
        scale = static_cast<real>(of.rstd * power_of_two(-exponent) * parameter(p.gamma, p.gamma_type, at, 1.0));
        const double moved = static_cast<double>(centre.low) * static_cast<double>(scale);
        bias = static_cast<real>(parameter(p.beta, p.beta_type, at, 0.0) - (centre.low == 0 ? 0 : moved));
    }
};

// Those of a tile's channels lie in shared memory, where `statistics(q, at)` of each are made once for all threads.
template <class Source>
__device__ __forceinline__ void set_affine(
    const Params& p, const Tile& tile, Affine* shared, Affine (&affine)[CHANNELS], Source statistics
) {
    for (int q = threadIdx.x; q < WIDTH && tile.has(p, q); q += THREADS) {
        const i64 at = tile.kept(p, q);
        shared[q].set(p, at, statistics(q, at));
    }
    __syncthreads();
#pragma unroll
    for (int ch = 0; ch < CHANNELS; ++ch) affine[ch] = shared[tile.own(ch)];
}

#define AFFINE_BYTES (sizeof(Affine) * WIDTH)  // WIDTH of them, behind what merges

// Normalises what a thread holds and writes it.
__device__ __forceinline__ void write_normalized(
    Items& items, const Params& p, const Tile& tile, Index v, int count, const Affine (&affine)[CHANNELS]
) {
#if RESIDUAL
    Items added;
    load(added, p.residual, p.residual_strides, p, tile, v, count);
#endif
#pragma unroll
    for (int k = 0; k < ITEMS_PER_THREAD; ++k)
        if (k < count) {
            Elements results;
#pragma unroll
            for (int j = 0; j < VECTOR; ++j) {
                const Affine a = tile.of_element(affine, j);
                real z = a.centre.distance(element(items[k], j)) * a.scale + a.bias;
#if RESIDUAL
                z += element(added[k], j);
#endif
                if (RELU) z = z <= 0 ? 0 : z;  // NaN passes
                results.each[j] = encoded(z);
            }
            items[k] = results.packed;
        }
    store(items, p.y, p.y_strides, p, tile, v, count);
}
