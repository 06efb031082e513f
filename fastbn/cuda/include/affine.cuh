// y = act((x - mean) * rstd * gamma + beta + residual), of vectors in registers.
//
// The mean is subtracted in two partials, since x*s + (beta - mean*s) is 7.5e-4 off where the mean is 10^4 deviations.

#pragma once

#include "centre.cuh"
#include "moments.cuh"

struct Affine {
    Centre centre;
    real scale, shift;

    __device__ __forceinline__ void set(
        const Params& p, const Tile& tile, int ch, double mean, double rest, double rstd
    ) {
        const i64 at = tile.kept(p, ch);
        const int exponent = distance_exponent(mean, rstd);
        centre.set(mean, rest, exponent);
        scale = static_cast<real>(rstd * power_of_two(-exponent) * parameter(p.gamma, p.gamma_type, at, 1.0));
        shift = static_cast<real>(parameter(p.beta, p.beta_type, at, 0.0));
    }
};

__device__ __forceinline__ void set_from_partials(
    const Params& p, const Tile& tile, const Partials& partials, Affine (&affine)[CHANNELS]
) {
    if (!tile.active) return;
#pragma unroll
    for (int ch = 0; ch < CHANNELS; ++ch) {
        const double mean = partials[ch].mean(), rest = (partials[ch].origin - mean) + partials[ch].shift;
        affine[ch].set(p, tile, ch, mean, rest, batch_rstd(partials[ch], p.eps));
    }
}

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
                const Affine& a = affine[ALONG_CHANNELS ? j : 0];
                real z = a.centre.distance(element(items[k], j)) * a.scale + a.shift;
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
