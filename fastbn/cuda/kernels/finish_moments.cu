// Merges the partials of all splits of a pass, a block for PIECE channels. Of splits' n, mu and M2, relative to some o
// (moments.cuh):
//
//     count = sum(n),   away = sum(n (mu - o)),   mean = o + away / count
//     M2 = sum(M2 + n (mu - o)^2) - away^2 / count
//
// Reads 32 bytes for each channel and split, 40 of float64 data, in whole sectors.
//
// A launch of its own, since its end is what orders memory: blocks that merge when they are the last to arrive would
// need a counter cleared before every call, which costs as much, and fences.

#include "moments.cuh"

KERNEL finish_moments(const Params p) {
    trap_unless(gridDim.x == p.tiles);
    const Tile tile(p, blockIdx.x, 0);
    merge_piece(p, tile, p.summed, 0);
}
