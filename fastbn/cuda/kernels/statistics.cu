// Moments of each channel. Reads x once: S bytes.
//
// Each block takes one split of one tile; with one split it writes the moments, else its part, which `finish_moments`
// or the normalising pass merges. No atomics, no order that could vary: the bits are the same in every run.

#include "moments.cuh"

KERNEL statistics(const Params p) {
    unsigned at, split;
    find_work(p, at, split);
    const Tile tile(p, at, split);
    Running running[CHANNELS];
#pragma unroll
    for (int ch = 0; ch < CHANNELS; ++ch) running[ch].clear();
    double taken = 0;
    for (Index v = tile.start(); tile.within(v); v += HELD * ROWS) {
        Packed held[HELD];
        const int count = tile.within(v);
        load(held, p.x, p.x_strides, p, tile, v, count);
#pragma unroll
        for (int ch = 0; ch < CHANNELS; ++ch) running[ch].add(held, count, ch, p, tile, v);
        taken += count * DEPTH;
    }
    Part parts[CHANNELS];
#pragma unroll
    for (int ch = 0; ch < CHANNELS; ++ch) parts[ch] = running[ch].part(taken);
    merge_block(parts);
    if (p.partials != nullptr)
        write_parts(p, tile, split, parts);
    else
        write_moments(p, tile, parts);
}
