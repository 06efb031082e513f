// dx = unit (scale dz - w (offset + slope (x - mean))); dz too where there was a residual. Reads dy and x, writes dx:
// 3S bytes; with relu also reads y.
//
// As the second pass of a backward pass the coefficients follow from the sums that the first left in the results; else
// they are given, the unit in the place of rstd.

#include "gradients.cuh"

__device__ __forceinline__ Linear given_linear(const Params& p, i64 at, const Xhat& xhat) {
    const double mean = parameter(p.mean, p.mean_type, at, 0.0);
    const double unit = parameter(p.spread, p.spread_type, at, 1.0);
    const double scale = parameter(p.gamma, p.gamma_type, at, 1.0);
    const double offset = parameter(p.offset, p.offset_type, at, 0.0);
    const double slope = parameter(p.slope, p.slope_type, at, 0.0);
    const double per_distance = power_of_two(-distance_exponent(mean, unit, NEAR_RSTD));
    Linear linear;
    linear.set(exponent_of(unit), scale, offset, slope * per_distance, xhat);
    return linear;
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
        linear_of_channels()[q] = p.summed ? linear_of(p, kept, read_gradients(p, kept), of) : given_linear(p, kept, of);
    }
    __syncthreads();
    Linear linear[CHANNELS];
    fetch_numbers(tile, linear_of_channels(), linear);
    const auto take = [&](Index v, int count) {
        Items x, dz;
        if (!p.frozen) load(x, p.x, p.x_strides, p, tile, v, count);
        load_dz(dz, p, tile, v, count);
        write_dx(x, dz, p, tile, v, count, xhat, linear);
    };
    Index v = tile.start();
    for (; tile.whole(v); v += CHUNK) take(v, ITEMS_PER_THREAD);
    if (const int count = tile.within(v)) take(v, count);
}
