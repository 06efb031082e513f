// Batch normalization in one launch. Of every channel
//
//     count, mean, M2 = moments of x
//     rstd = 1 / sqrt(M2 / count + eps)
//     y = act((x - mean) rstd gamma + beta + residual)
//
// x is read once and kept on the chip until its statistics are known: the last chunk in registers, those before in
// shared memory. Reads x and writes y: 2S bytes, 3S with a residual. Whoever writes a channel's statistics updates its
// running ones (running.cuh): 16 to 32 bytes.
//
// A tile belongs to a group of `splits` blocks: one, a cluster, or blocks of a cooperative launch, which exchange their
// partials through global memory: each block merges those of some channels for the others, 96 bytes for each channel
// and block in all. Groups take tile after tile.
// After: Ioffe & Szegedy (2015), Algorithm 1; kept on the chip as in NVIDIA Apex's groupbn.

#include "accumulator.cuh"
#include "normalized.cuh"

KERNEL forward(const Params p) {
    Affine* shared = reinterpret_cast<Affine*>(dynamic_shared() + MERGE_BYTES);
    Packed* kept = reinterpret_cast<Packed*>(dynamic_shared() + (MERGE_BYTES + AFFINE_BYTES + 15) / 16 * 16) + threadIdx.x;
    const unsigned splits = static_cast<unsigned>(p.splits), split = blockIdx.x % splits;
    trap_unless(gridDim.x % splits == 0);
    unsigned round = 0;
    for (unsigned at = blockIdx.x / splits; at < p.tiles; at += gridDim.x / splits) {
        const Tile tile(p, at, split);
        Accumulator accumulators[CHANNELS];
#pragma unroll
        for (int ch = 0; ch < CHANNELS; ++ch) accumulators[ch].clear();
        Items items;
        Index v = tile.start();
        int chunk = 0;
        const auto take = [&](int count) {
            load(items, p.x, p.x_strides, p, tile, v, count);
            add_chunk(accumulators, items, count, p, tile, v);
        };
        while (tile.whole(v)) {
            take(ITEMS_PER_THREAD);
            if (v + CHUNK >= tile.last) break;  // the last chunk stays in registers
            keep(kept, chunk, items);
            v += CHUNK;
            ++chunk;
        }
        const int count = tile.within(v);
        if (count < ITEMS_PER_THREAD) take(count);
        merge_block(accumulators, count, p, tile, v);
        if (p.splits > 1) {
            write_partials(p, tile, split);
            group_barrier(p, ++round);
            for (int q = split * PIECE; q < WIDTH; q += splits * PIECE) merge_piece(p, tile, p.splits, q);
            group_barrier(p, ++round);
        }
        Affine affine[CHANNELS];
        set_affine(p, tile, shared, affine, [&](int q, i64 at) {
            return p.splits > 1 ? read_statistics(p, at) : write_moments(p, at, merged_channels()[q]);
        });
        write_normalized(items, p, tile, v, count, affine);
        while (chunk-- > 0) {
            v -= CHUNK;
            fetch(items, kept, chunk);
            write_normalized(items, p, tile, v, ITEMS_PER_THREAD, affine);
        }
    }
}
