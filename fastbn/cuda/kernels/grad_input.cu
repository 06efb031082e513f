// dx = unit (scale dz - w (offset + slope (x - mean))); dz too where there was a residual. Reads dy and x, writes dx:
// 3S bytes; with relu also reads y.
//
// As the second pass of a backward pass the coefficients follow from the sums that `grad_sums` left, which the first
// block of each tile writes; else they are given, the unit in the place of rstd.

#include "gradients.cuh"

KERNEL grad_input(const Params p) {
    unsigned at, split;
    find_work(p, at, split);
    const Tile tile(p, at, split);
    Linear linear[CHANNELS];
    if (p.partials != nullptr) {
        Sums sums[CHANNELS];
        read_sums(p, tile, p.summed, sums);
        if (split == 0) write_gradients(p, tile, sums);
        set_from_sums(p, tile, sums, linear);
    } else if (tile.active) {
#pragma unroll
        for (int ch = 0; ch < CHANNELS; ++ch) {
            const i64 kept = tile.kept(p, ch);
            const double mean = parameter(p.mean, p.mean_type, kept, 0.0);
            const double unit = parameter(p.spread, p.spread_type, kept, 1.0);
            const double scale = parameter(p.gamma, p.gamma_type, kept, 1.0);
            const double offset = parameter(p.offset, p.offset_type, kept, 0.0);
            const double slope = parameter(p.slope, p.slope_type, kept, 0.0);
            const double per_distance = power_of_two(-distance_exponent(mean, unit));
            linear[ch].set(exponent_of(unit), {scale, offset, slope * per_distance});
        }
    }
    Xhat xhat[CHANNELS];
#pragma unroll
    for (int ch = 0; ch < CHANNELS; ++ch)
        if (tile.active) xhat[ch].set(p, tile, ch);
    for (Index v = tile.start(); tile.within(v); v += ITEMS_PER_THREAD * ROWS) {
        Items x, dz;
        const int count = tile.within(v);
        if (!p.frozen) load(x, p.x, p.x_strides, p, tile, v, count);
        load_dz(dz, p, tile, v, count);
        write_dx(x, dz, p, tile, v, count, xhat, linear);
    }
}
