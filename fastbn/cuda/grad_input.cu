// dx = scale dz - w (offset + slope (x - mean)); dz too where there was a residual. Reads dy and x, writes dx: 3S bytes;
// with relu also reads y.
//
// As the second pass of a backward pass the numbers follow from the sums that `grad_sums` left, which the first block of
// each tile writes; else they are given.

KERNEL grad_input(const Params p) {
    unsigned at, split;
    find_work(p, at, split);
    const Tile tile(p, at, split);
    Centre centre[CHANNELS];
    Linear linear[CHANNELS];
#pragma unroll
    for (int ch = 0; ch < CHANNELS; ++ch)
        if (tile.active) {
            centre[ch].set(p, tile, ch);
            const i64 kept = tile.kept(p, ch);
            linear[ch].scale = static_cast<real>(number(p.gamma, p.gamma_type, kept, 1.0));
            linear[ch].offset = static_cast<real>(number(p.offset, p.offset_type, kept, 0.0));
            linear[ch].slope = static_cast<real>(number(p.slope, p.slope_type, kept, 0.0));
        }
    if (p.partials != nullptr) {
        Sums sums[CHANNELS];
        read_sums(p, tile, p.summed, sums);
        if (split == 0) write_gradients(p, tile, sums);
        set_from_sums(p, tile, sums, linear);
    }
    for (Index v = tile.start(); tile.within(v); v += HELD * ROWS) {
        Packed x[HELD], dz[HELD];
        const int count = tile.within(v);
        if (!p.frozen) load(x, p.x, p.x_strides, p, tile, v, count);
        load_dz(dz, p, tile, v, count);
        write_dx(x, dz, p, tile, v, count, centre, linear);
    }
}
