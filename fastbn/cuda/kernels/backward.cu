// The backward pass in one launch. Of every channel, with dz = dy, or 0 where y <= 0 under relu, and W = sum(w)
//
//     xhat = (x - mean) rstd
//     dbeta = sum(dz),   dgamma = sum(dz xhat)
//     dx = gamma rstd (dz - w/W (dbeta + xhat dgamma)) + w/W (dmean + 2 (x - mean) dvar)
//     dresidual = dz
//
// x and dz are read once and kept on the chip until their sums are known. Reads x and dy, writes dx: 3S bytes; with a
// residual also writes dz, and under relu then also reads y. Groups of blocks as in forward.cu; sums and dx in gradients.cuh.

#include "gradients.cuh"

KERNEL backward(const Params p) {
    Packed* kept = reinterpret_cast<Packed*>(dynamic_shared() + SUM_BYTES) + threadIdx.x;
    const unsigned splits = static_cast<unsigned>(p.splits), split = blockIdx.x % splits;
    trap_unless(gridDim.x % splits == 0);
    unsigned round = 0;
    for (unsigned at = blockIdx.x / splits; at < p.tiles; at += gridDim.x / splits) {
        const Tile tile(p, at, split);
        Xhat xhat[CHANNELS];
        Gathered gathered[CHANNELS];
        set_xhat(p, tile, xhat);
#pragma unroll
        for (int ch = 0; ch < CHANNELS; ++ch) gathered[ch].clear();
        Items x, dz;
        Index v = tile.start();
        int chunk = 0;
        const auto take = [&](int count) {
            load(x, p.x, p.x_strides, p, tile, v, count);
            load_dz(dz, x, xhat, p, tile, v, count);
            add_sums(gathered, x, dz, count, xhat, p, tile, v);
        };
        while (tile.whole(v)) {
            take(ITEMS_PER_THREAD);
            if (v + CHUNK >= tile.last) break;  // the last chunk stays in registers
            keep(kept, 2 * chunk, x);
            keep(kept, 2 * chunk + 1, dz);
            v += CHUNK;
            ++chunk;
        }
        const int count = tile.within(v);
        if (count < ITEMS_PER_THREAD) take(count);
        sum_block(gathered, xhat);
        if (p.splits > 1) {
            write_sums(p, tile, split);
            group_barrier(p, ++round);
            for (int q = split * PIECE; q < WIDTH; q += splits * PIECE) add_piece(p, tile, p.splits, q);
            group_barrier(p, ++round);
        }
        for (int q = threadIdx.x; q < WIDTH && tile.has(p, q); q += THREADS) {
            const i64 place = tile.kept(p, q);
            const Sums whole = p.splits > 1 ? read_gradients(p, place) : write_gradients(p, place, summed_channels()[q]);
            linear_of_channels()[q] = linear_of(p, place, whole, xhat_of_channels()[q]);
        }
        __syncthreads();
        Linear linear[CHANNELS];
        fetch_numbers(tile, linear_of_channels(), linear);
        write_dx(x, dz, p, tile, v, count, xhat, linear);
        while (chunk-- > 0) {
            v -= CHUNK;
            fetch(x, kept, 2 * chunk);
            fetch(dz, kept, 2 * chunk + 1);
            write_dx(x, dz, p, tile, v, ITEMS_PER_THREAD, xhat, linear);
        }
    }
}
