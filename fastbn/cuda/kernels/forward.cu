// Batch normalization in one launch. Of every channel
//
//     count, mean, M2 = moments of x
//     rstd = 1 / sqrt(M2 / count + eps)
//     y = act((x - mean) rstd gamma + beta + residual)
//
// x is read once and kept on the chip until its statistics are known: the last chunk in registers, those before in
// shared memory. Reads x and writes y: 2S bytes, 3S with a residual.
//
// A tile belongs to a group of `splits` blocks: one, a cluster, or blocks of a cooperative launch, which exchange their
// partials through global memory. Groups take tile after tile.
// After: Ioffe & Szegedy (2015), Algorithm 1; kept on the chip as in NVIDIA Apex's groupbn.

#include "accumulator.cuh"
#include "affine.cuh"

KERNEL forward(const Params p) {
    Packed* kept = reinterpret_cast<Packed*>(dynamic_shared() + MERGE_BYTES) + threadIdx.x;
    const unsigned splits = static_cast<unsigned>(p.splits), split = blockIdx.x % splits;
    unsigned round = 0;
    for (unsigned at = blockIdx.x / splits; at < p.tiles; at += gridDim.x / splits) {
        const Tile tile(p, at, split);
        Accumulator accumulators[CHANNELS];
#pragma unroll
        for (int ch = 0; ch < CHANNELS; ++ch) accumulators[ch].clear();
        Items items;
        Index v = tile.start();
        int count = tile.within(v), chunk = 0;
        double taken = 0;
        while (true) {
            load(items, p.x, p.x_strides, p, tile, v, count);
#pragma unroll
            for (int ch = 0; ch < CHANNELS; ++ch) accumulators[ch].add(items, count, ch, p, tile, v);
            taken += count * DEPTH;
            const int next = tile.within(v + ITEMS_PER_THREAD * ROWS);
            if (next == 0) break;  // the last chunk stays in registers
            keep(kept, chunk, items);
            v += ITEMS_PER_THREAD * ROWS;
            count = next;
            ++chunk;
        }
        Partials partials;
#pragma unroll
        for (int ch = 0; ch < CHANNELS; ++ch) partials[ch] = accumulators[ch].partial(taken);
        merge_block(partials);
        if (p.splits > 1) {
            write_partials(p, tile, split, partials);
            group_barrier(p, ++round);
            read_partials(p, tile, p.splits, partials);
        }
        if (split == 0) write_moments(p, tile, partials);
        Affine affine[CHANNELS];
        set_from_partials(p, tile, partials, affine);
        while (true) {
            write_normalized(items, p, tile, v, count, affine);
            if (chunk-- == 0) break;
            v -= ITEMS_PER_THREAD * ROWS;
            count = ITEMS_PER_THREAD;
            fetch(items, kept, chunk);
        }
    }
}
