// Adds up the sums of all splits of a pass, a block for PIECE channels:
//
//     dbeta = sum(dbeta of a split),   dgamma = sum(dgamma of a split)
//
// Reads 16 bytes for each channel and split, in whole sectors.

#include "gradients.cuh"

KERNEL finish_sums(const Params p) {
    trap_unless(gridDim.x == p.tiles);
    const Tile tile(p, blockIdx.x, 0);
    add_piece(p, tile, p.summed, 0);
}
