// dgamma and dbeta. Reads dy and x, and y under relu: 2S or 3S bytes.
//
// Each block takes one split of one tile; with one split it writes the sums, else partial ones, which `finish_sums`
// or the pass that writes dx adds up in a fixed order.

#include "gradients.cuh"

KERNEL grad_sums(const Params p) {
    unsigned at, split;
    find_work(p, at, split);
    const Tile tile(p, at, split);
    Xhat xhat[CHANNELS];
    Sums sums[CHANNELS];
#pragma unroll
    for (int ch = 0; ch < CHANNELS; ++ch) {
        if (tile.active) xhat[ch].set(p, tile, ch);
        sums[ch] = Sums{0, 0};
    }
    for (Index v = tile.start(); tile.within(v); v += ITEMS_PER_THREAD * ROWS) {
        Items x, dz;
        const int count = tile.within(v);
        load(x, p.x, p.x_strides, p, tile, v, count);
        load_dz(dz, p, tile, v, count);
#pragma unroll
        for (int ch = 0; ch < CHANNELS; ++ch) add_sums(sums[ch], x, dz, count, ch, xhat[ch], p, tile, v);
    }
    sum_block(sums);
    if (p.partials != nullptr)
        write_sums(p, tile, split, sums);
    else
        write_gradients(p, tile, sums);
}
