// y = act((x - mean) * rstd * gamma + beta + residual), of vectors in registers.

#pragma once

#include "affine.cuh"
#include "moments.cuh"

#define SIGN_IS_KNOWN (RELU && !RESIDUAL)  // by the backward pass, which has the mean and not its rest

// Numbers of a tile's channels lie in shared memory, where `statistics(q, at)` of each are made once for all threads.
template <class Source>
__device__ __forceinline__ void set_affine(
    const Params& p, const Tile& tile, Affine* shared, Affine (&affine)[CHANNELS], Source statistics
) {
    for (int q = threadIdx.x; q < WIDTH && tile.has(p, q); q += THREADS) {
        const i64 at = tile.kept(p, q);
        Statistics of = statistics(q, at);
        if (SIGN_IS_KNOWN) of.rest = 0;
        shared[q].set(p, at, of);
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
                real z = affine_of(a.centre.distance(element(items[k], j)), a.scale, a.bias);
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
