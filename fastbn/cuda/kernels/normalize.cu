// y = act((x - mean) * rstd * gamma + beta + residual). Reads x, writes y: 2S bytes, 3S with a residual.
//
// The mean and the rstd are given (or the variance, to which eps is added); the second pass of a batch normalization
// takes them from the results of the first.

#include "normalized.cuh"

KERNEL normalize(const Params p) {
    unsigned at, split;
    find_work(p, at, split);
    const Tile tile(p, at, split);
    Affine affine[CHANNELS];
    set_affine(p, tile, reinterpret_cast<Affine*>(dynamic_shared()), affine, [&](int, i64 at) {
        if (p.summed) return read_statistics(p, at);
        const double mean = parameter(p.mean, p.mean_type, at, 0.0);
        const double spread = parameter(p.spread, p.spread_type, at, 1.0);
        return Statistics{mean, 0.0, p.spread_is_variance ? reciprocal_sqrt(spread + p.eps) : spread};
    });
    const auto take = [&](Index v, int count) {
        Items items;
        load(items, p.x, p.x_strides, p, tile, v, count);
        write_normalized(items, p, tile, v, count, affine);
    };
    Index v = tile.start();
    for (; tile.whole(v); v += CHUNK) take(v, ITEMS_PER_THREAD);
    if (const int count = tile.within(v)) take(v, count);
}
