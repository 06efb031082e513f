// Merges the parts of all splits of a tile into its moments. Reads 32 bytes for each channel and split.

#include "moments.cuh"

KERNEL finish_moments(const Params p) {
    const Tile tile(p, blockIdx.x, 0);
    Part parts[CHANNELS];
    read_parts(p, tile, p.summed, parts);
    write_moments(p, tile, parts);
}
