// dx = unit (scale dz - w (offset + slope (x - mean))); dz too where there was a residual. Reads dy and x, writes dx:
// 3S bytes; with relu and a residual also reads y.
//
// The sums are those that the first pass of a backward pass left in the results, or given.

#include "gradients.cuh"

__device__ __forceinline__ Sums given_sums(const Params& p, i64 at) {
    return Sums{parameter(p.dgamma, p.dgamma_type, at, 0.0), parameter(p.dbeta, p.dbeta_type, at, 0.0)};
}

KERNEL grad_input(const Params p) {
    unsigned at, split;
    find_work(p, at, split);
    const Tile tile(p, at, split);
    Xhat xhat[CHANNELS];
    set_xhat(p, tile, xhat);
    for (int q = threadIdx.x; q < WIDTH && tile.has(p, q); q += THREADS) {
        const i64 kept = tile.kept(p, q);
        const Xhat& of = xhat_of_channels()[q];
        linear_of_channels()[q] = linear_of(p, kept, p.summed ? read_gradients(p, kept) : given_sums(p, kept), of);
    }
    __syncthreads();
    Linear linear[CHANNELS];
    fetch_numbers(tile, linear_of_channels(), linear);
    const auto take = [&](Index v, int count) {
        Items x, dz;
        if (!p.frozen) load(x, p.x, p.x_strides, p, tile, v, count);
        load_dz(dz, x, xhat, p, tile, v, count);
        write_dx(x, dz, p, tile, v, count, xhat, linear);
    };
    Index v = tile.start();
    for (; tile.whole(v); v += CHUNK) take(v, ITEMS_PER_THREAD);
    if (const int count = tile.within(v)) take(v, count);
}
