// y = act((x - mean) * rstd * gamma + beta + residual). Reads x, writes y: 2S bytes, 3S with a residual.
//
// The mean and the rstd are given (or the variance, to which eps is added); or, as the second pass of a batch
// normalization, merged from the partials that `statistics` left, and written by the first block of each tile.

#include "affine.cuh"

KERNEL normalize(const Params p) {
    unsigned at, split;
    find_work(p, at, split);
    const Tile tile(p, at, split);
    Affine affine[CHANNELS];
    if (p.partials != nullptr) {
        Partials partials;
        read_partials(p, tile, p.summed, partials);
        if (split == 0) write_moments(p, tile, partials);
        set_from_partials(p, tile, partials, affine);
    } else if (tile.active) {
#pragma unroll
        for (int ch = 0; ch < CHANNELS; ++ch) {
            const double mean = parameter(p.mean, p.mean_type, tile.kept(p, ch), 0.0);
            const double spread = parameter(p.spread, p.spread_type, tile.kept(p, ch), 1.0);
            affine[ch].set(p, tile, ch, mean, 0.0, p.spread_is_variance ? reciprocal_sqrt(spread + p.eps) : spread);
        }
    }
    for (Index v = tile.start(); tile.within(v); v += ITEMS_PER_THREAD * ROWS) {
        Items items;
        const int count = tile.within(v);
        load(items, p.x, p.x_strides, p, tile, v, count);
        write_normalized(items, p, tile, v, count, affine);
    }
}
