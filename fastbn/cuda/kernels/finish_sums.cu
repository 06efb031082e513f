// Adds up the sums of all splits of a tile. Reads 16 bytes for each channel and split.

#include "gradients.cuh"

KERNEL finish_sums(const Params p) {
    const Tile tile(p, blockIdx.x, 0);
    Sums sums[CHANNELS];
    read_sums(p, tile, p.summed, sums);
    write_gradients(p, tile, sums);
}
