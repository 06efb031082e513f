// Batch normalization in one launch: x is read once and kept on the chip until its statistics are known, in registers
// and, beyond these, in shared memory. Reads x and writes y: 2S bytes, 3S with a residual.
//
// A tile belongs to a group of `splits` blocks: one, a cluster, or blocks of a cooperative launch, which exchange their
// parts through global memory. Groups take tile after tile.
// After: Ioffe & Szegedy (2015), Algorithm 1; kept on the chip as in NVIDIA Apex's groupbn.

#include "affine.cuh"
#include "moments.cuh"

KERNEL forward(const Params p) {
    Packed* kept = reinterpret_cast<Packed*>(dynamic_shared() + MERGE_BYTES) + threadIdx.x;
    const unsigned splits = static_cast<unsigned>(p.splits), split = blockIdx.x % splits;
    unsigned round = 0;
    for (unsigned at = blockIdx.x / splits; at < p.tiles; at += gridDim.x / splits) {
        const Tile tile(p, at, split);
        Running running[CHANNELS];
#pragma unroll
        for (int ch = 0; ch < CHANNELS; ++ch) running[ch].clear();
        Packed held[HELD];
        Index v = tile.start();
        int count = tile.within(v), chunk = 0;
        double taken = 0;
        while (true) {
            load(held, p.x, p.x_strides, p, tile, v, count);
#pragma unroll
            for (int ch = 0; ch < CHANNELS; ++ch) running[ch].add(held, count, ch, p, tile, v);
            taken += count * DEPTH;
            const int next = tile.within(v + HELD * ROWS);
            if (next == 0) break;  // the last chunk stays in registers
#pragma unroll
            for (int k = 0; k < HELD; ++k) kept[(chunk * HELD + k) * THREADS] = held[k];
            v += HELD * ROWS;
            count = next;
            ++chunk;
        }
        Part parts[CHANNELS];
#pragma unroll
        for (int ch = 0; ch < CHANNELS; ++ch) parts[ch] = running[ch].part(taken);
        merge_block(parts);
        if (p.splits > 1) {
            write_parts(p, tile, split, parts);
            group_barrier(p, ++round);
            read_parts(p, tile, p.splits, parts);
        }
        if (split == 0) write_moments(p, tile, parts);
        Affine affine[CHANNELS];
        set_from_parts(p, tile, parts, affine);
        while (true) {
            write_normalized(held, p, tile, v, count, affine);
            if (chunk-- == 0) break;
            v -= HELD * ROWS;
            count = HELD;
#pragma unroll
            for (int k = 0; k < HELD; ++k) held[k] = kept[(chunk * HELD + k) * THREADS];
        }
    }
}
