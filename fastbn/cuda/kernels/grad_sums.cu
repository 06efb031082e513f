// Of every channel, with dz = dy, or 0 where y <= 0 under relu
//
//     dbeta = sum(dz),   dgamma = sum(dz (x - mean) rstd)
//
// Reads dy and x, and y under relu where there was a residual: 2S or 3S bytes.
//
// Each block takes one split of one tile; with one split it writes the sums, else partial ones, which `finish_sums`
// adds up in a fixed order.

#include "gradients.cuh"

KERNEL grad_sums(const Params p) {
    unsigned at, split;
    find_work(p, at, split);
    const Tile tile(p, at, split);
    Xhat xhat[CHANNELS];
    Gathered gathered[CHANNELS];
    set_xhat(p, tile, xhat);
#pragma unroll
    for (int ch = 0; ch < CHANNELS; ++ch) gathered[ch].clear();
    const auto take = [&](Index v, int count) {
        Items x, dz;
        load(x, p.x, p.x_strides, p, tile, v, count);
        load_dz(dz, x, xhat, p, tile, v, count);
        add_sums(gathered, x, dz, count, xhat, p, tile, v);
    };
    Index v = tile.start();
    for (; tile.whole(v); v += CHUNK) take(v, ITEMS_PER_THREAD);
    if (const int count = tile.within(v)) take(v, count);
    sum_block(gathered, xhat);
    if (p.splits > 1) {
        write_sums(p, tile, split);
        return;
    }
    for (int q = threadIdx.x; q < WIDTH && tile.has(p, q); q += THREADS)
        write_gradients(p, tile.kept(p, q), summed_channels()[q]);
}
