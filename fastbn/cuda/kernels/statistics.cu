// Moments of every channel, with weights w or 1
//
//     count = sum(w),   mean = sum(w x) / count,   M2 = sum(w (x - mean)^2)
//
// in the steps of accumulator.cuh. Reads x once: S bytes.
//
// Each block takes one split of one tile; with one split it writes the moments, else partial ones, which
// `finish_moments` merges. No atomics, no order that could vary: every run gives the same bits.

#include "accumulator.cuh"

KERNEL statistics(const Params p) {
    unsigned at, split;
    find_work(p, at, split);
    const Tile tile(p, at, split);
    Accumulator accumulators[CHANNELS];
#pragma unroll
    for (int ch = 0; ch < CHANNELS; ++ch) accumulators[ch].clear();
    const auto take = [&](Index v, int count) {
        Items items;
        load(items, p.x, p.x_strides, p, tile, v, count);
        add_chunk(accumulators, items, count, p, tile, v);
    };
    Index v = tile.start();
    for (; tile.whole(v); v += CHUNK) take(v, ITEMS_PER_THREAD);
    const int count = tile.within(v);
    if (count > 0) take(v, count);
    merge_block(accumulators, count, p, tile, v);
    if (p.splits > 1) {
        write_partials(p, tile, split);
        return;
    }
    for (int q = threadIdx.x; q < WIDTH && tile.has(p, q); q += THREADS)
        write_moments(p, tile.kept(p, q), merged_channels()[q]);
}
