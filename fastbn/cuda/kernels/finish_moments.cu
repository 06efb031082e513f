// Merges the partials of all splits of a tile into its moments. Reads 32 bytes for each channel and split.

#include "moments.cuh"

KERNEL finish_moments(const Params p) {
    const Tile tile(p, blockIdx.x, 0);
    Partials partials;
    read_partials(p, tile, p.summed, partials);
    write_moments(p, tile, partials);
}
