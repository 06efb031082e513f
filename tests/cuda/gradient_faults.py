"""Faults in gradients, in rows of odd lengths, and in running statistics: see `tests.cuda.faults`."""

from tests.cuda.fault import Fault

FAULTS = [
    # gradients.cuh
    Fault(
        "low part of the mean", "backward",
        "low = is_finite(left) ? static_cast<real>(left) : 0;", "low = 0;", "backward, block, rows, far from 0",
    ),
    Fault(
        "dx: low part of the mean", "backward",
        "moved = low == 0 ? 0 : slope_ * low;", "moved = 0;", "backward, block, rows, far from 0",
    ),
    Fault(
        "dgamma without rstd", "grad_sums",
        "low * dbeta)) * xhat.rstd", "low * dbeta))", "parts, rows",
    ),
    Fault(
        "sums: the last group left out", "grad_sums",
        "sums.dbeta + plain, low", "sums.dbeta, low", "parts, rows",
    ),
    Fault(
        "sums of nothing times an rstd that is NaN", "backward",
        "return Sums{any ? (", "return Sums{true ? (", "training, block, nothing selected",
    ),
    Fault(
        "sums: groups go on", "grad_sums",
        "sums.dgamma += product;\n        clear_group();", "sums.dgamma += product;", "parts, long columns",
    ),
    Fault(
        "sums: distances far from 1 beside small gradients", "backward",
        "#define NEAR_RSTD 4 ", "#define NEAR_RSTD 30 ", "training, block, rows, small deviations",
    ),
    Fault(
        "relu passes gradients at 0", "backward",
        "y(j) <= most", "y(j) < most", "backward, block, rows, all",
    ),
    Fault(
        "relu of NaN passes none", "backward",
        "if (y(j) <= most)", "if (!(y(j) > most))", "backward, block, columns, NaN",
    ),
    Fault(
        "relu: y again, without beta", "backward",
        "scale = y.scale, bias = y.bias;", "scale = y.scale, bias = 0;", "relu, block, rows",
    ),
    Fault(
        "relu: y again, of other channels", "grad_sums",
        "const Xhat of = tile.of_element(xhat, j);", "const Xhat of = xhat[0];", "relu, two passes",
    ),
    Fault(
        "relu: y again, of the first of a run's channels", "backward",
        "const Xhat of = tile.of_element(xhat, j);", "const Xhat of = xhat[0];", "relu, cooperative, runs",
    ),
    Fault(
        "relu: what is stored as 0 passes", "backward",
        "#define MOST_ROUNDED_TO_0 0x1p-25f", "#define MOST_ROUNDED_TO_0 0", "relu, block, columns, tiny",
    ),
    Fault(
        "relu: y knows more of the mean", "forward",
        "if (SIGN_IS_KNOWN) of.rest = 0;", "", "relu, block, rows, beside the mean",
    ),
    Fault(
        "dz not written", "backward",
        "    store(dz, p.dresidual, p.dresidual_strides, p, tile, v, count);\n", "", "backward, block, rows, all",
    ),
    Fault(
        "lanes: sums of all channels", "grad_sums",
        "added_across(sums[ch].dbeta, SIDE, 32)", "added_across(sums[ch].dbeta, 1, 32)", "parts, columns",
    ),
    Fault(
        "block: sums read before they are written", "grad_sums",
        "* WARPS] = sums[ch];\n    __syncthreads();\n", "* WARPS] = sums[ch];\n", "parts, rows",
    ),
    Fault(
        "one slot for the sums of all splits", "grad_sums",
        "return p.partials + split * 2 * p.batches * p.channels + at;", "return p.partials + at;", "parts, columns",
    ),
    Fault(
        "sums: fields beside one another", "grad_sums",
        "to[p.batches * p.channels] = summed_channels()[q].dbeta", "to[1] = summed_channels()[q].dbeta",
        "parts, columns",
    ),
    Fault(
        "sums: the last split left out", "finish_sums",
        "split < splits; split += THREADS / PIECE)", "split + 1 < splits; split += THREADS / PIECE)", "parts, columns",
    ),
    Fault(
        "sums: some channels alone", "backward",
        "for (int q = split * PIECE; q < WIDTH; q += splits * PIECE) add_piece(p, tile, p.splits, q);",
        "if (split == 0) add_piece(p, tile, p.splits, 0);",
        "backward, cooperative",
    ),
    Fault(
        "sums: read before they are added up", "backward",
        "add_piece(p, tile, p.splits, q);\n            group_barrier(p, ++round);\n",
        "add_piece(p, tile, p.splits, q);\n",
        "backward, cooperative",
    ),
    Fault(
        "sums: channels behind the last", "backward",
        "if (threadIdx.x < PIECE && tile.has(p, q)) write_gradients", "if (threadIdx.x < PIECE) write_gradients",
        "backward, cooperative, narrow columns",
    ),
    Fault(
        "sums: numbers of the tile before", "backward",
        "    __syncthreads();\n    fetch_numbers(tile, xhat_of_channels(), xhat);",
        "    fetch_numbers(tile, xhat_of_channels(), xhat);",
        "backward, cooperative, blocks take several tiles",
    ),
    Fault(
        "sums: numbers read before they are written", "grad_sums",
        "    __syncthreads();\n    fetch_numbers(tile, xhat_of_channels(), xhat);",
        "    fetch_numbers(tile, xhat_of_channels(), xhat);",
        "parts, columns",
    ),
    Fault(
        "dx: coefficients read before they are written", "backward",
        "        __syncthreads();\n        Linear linear[CHANNELS];", "        Linear linear[CHANNELS];",
        "backward, block, rows",
    ),
    Fault(
        "sums: one row of threads alone", "finish_sums",
        "split < splits; split += THREADS / PIECE)", "split < splits; split += splits)", "parts, many splits",
    ),
    Fault(
        "dx: dgamma scaled by rstd once", "grad_input",
        "scale * (rstd * per_distance) * sums.dgamma", "scale * per_distance * sums.dgamma", "backward, two passes",
    ),
    Fault(
        "dx: no dmean", "backward",
        "scale * sums.dbeta - dmean * per_unit", "scale * sums.dbeta", "backward, block, rows, float64, statistics",
    ),
    Fault(
        "dx: half of dvar", "backward",
        "- 2.0 * dvar", "- dvar", "backward, block, rows, float64, statistics",
    ),
    Fault(
        "dx: frozen statistics move", "backward",
        "if (!FROZEN) {", "{", "frozen, NaN",
    ),
    Fault(
        "dx: weights not multiplied", "backward",
        "w > 0 ? w * share : 0", "w > 0 ? share : 0", "backward, block, columns, weights",
    ),
    Fault(
        "dx: infinite share of weight 0", "backward",
        "w > 0 ? w * share : 0", "w * share", "backward, block, columns, weights",
    ),
    Fault(
        "dx: left in its unit", "backward",
        "                g *= of.unit;\n", "", "training, block, rows, large",
    ),
    Fault(
        "dx: scale becomes subnormal beside large sums", "backward",
        "min(least - LEAST_EXPONENT, 0)", "min(most - LEAST_EXPONENT, 0)", "training, block, columns, large, affine",
    ),
    Fault(
        "dx of what weighs nothing", "backward",
        "encoded(skipped(p, tile, v + k * ROWS, j, z) ? 0 : g)", "encoded(g)", "training, block, any channel",
    ),
    Fault(
        "sums with what weighs nothing", "grad_sums",
        "if (!skipped(p, tile, v + k * ROWS, j, g)) {", "{", "training, two passes, masked out",
    ),
    Fault(
        "sums without the gradients of what weighs nothing", "backward",
        "WEIGHT && dz == 0 && ", "WEIGHT && ", "training, block, masked out",
    ),
    # backward.cu
    Fault(
        "sums: blocks do not wait", "backward",
        "write_sums(p, tile, split);\n            group_barrier(p, ++round);\n", "write_sums(p, tile, split);\n",
        "backward, cooperative",
    ),
    Fault(
        "dz kept: x read", "backward",
        "fetch(dz, kept, 2 * chunk + 1);", "fetch(dz, kept, 2 * chunk);",
        "backward, block, rows",
    ),
    # rows of odd lengths
    Fault(
        "runs: tiny elements of the first channel alone", "forward",
        "return (j < cut) == (ch == 0);", "return ch == 0;", "training, block, runs, small",
    ),
    Fault(
        "runs: one element too many", "statistics",
        "(slot + 1) * RUN - lane * VECTOR, VECTOR)", "(slot + 1) * RUN - lane * VECTOR + 1, VECTOR)", "moments, runs",
    ),
    Fault(
        "runs: elements of the first channel alone", "statistics",
        "if (j < cut)\n            sums[0] += value;", "if (j < VECTOR)\n            sums[0] += value;",
        "moments, runs",
    ),
    Fault(
        "runs: errors from the first channel's middle", "statistics",
        " - tile.of_element(middle, j);", " - middle[0];", "moments, runs of float32",
    ),
    Fault(
        "runs: distances from the first channel's shift", "statistics",
        " - tile.of_element(shift, j);", " - shift[0];", "moments, runs",
    ),
    Fault(
        "runs: elements of whole vectors counted", "statistics",
        "return ch == 0 ? cut : VECTOR - cut;", "return VECTOR;", "moments, runs",
    ),
    Fault(
        "runs: parts of second channels", "statistics",
        "(at * VECTOR < q * RUN ? THREADS : 0)", "0", "moments, runs",
    ),
    Fault(
        "runs: last part left out", "statistics",
        "if (at <= last) take(", "if (at < last) take(", "moments, runs",
    ),
    Fault(
        "runs: parts of one row of threads", "statistics",
        "i < most * ROWS;", "i < most;", "moments, runs",
    ),
    Fault(
        "runs: parts read before they are written", "statistics",
        "scratch[ch * THREADS + threadIdx.x] = partials[ch];\n    __syncthreads();",
        "scratch[ch * THREADS + threadIdx.x] = partials[ch];",
        "moments, runs",
    ),
    Fault(
        "runs: place in the row", "normalize",
        "RUN ? threadIdx.x % LANES * VECTOR : 0;", "RUN ? threadIdx.x % LANES : 0;", "frozen, runs",
    ),
    Fault(
        "runs: one channel's coefficients", "forward",
        "[i] = j < cut ? one[i] : two[i];", "[i] = one[i];", "forward, block, runs",
    ),
    Fault(
        "runs: the next channel's coefficients", "forward",
        "RUN ? min(slot + ch, WIDTH - 1)", "RUN ? min(slot + 1, WIDTH - 1)", "forward, block, runs",
    ),
    Fault(
        "runs: sums of the first channel alone", "backward",
        "if (j < cut)\n            sums[0] += value;", "if (j < VECTOR)\n            sums[0] += value;",
        "backward, cooperative, runs",
    ),
    Fault(
        "runs: sums read before they are written", "backward",
        "scratch[ch * THREADS + threadIdx.x] = sums[ch];\n    __syncthreads();",
        "scratch[ch * THREADS + threadIdx.x] = sums[ch];",
        "backward, cooperative, runs",
    ),
    # update_running.cu
    Fault(
        "running: one channel behind the last", "update_running",
        "at >= p.channels", "at > p.channels", "running statistics",
    ),
    Fault(
        "running: one block alone", "update_running",
        "static_cast<i64>(blockIdx.x) * THREADS + threadIdx.x", "threadIdx.x", "running statistics",
    ),
    Fault(
        "running: as many samples as the correction", "update_running",
        "batch.count > correction", "batch.count >= correction", "running statistics",
    ),
    Fault(
        "running: what rate 0 leaves alone", "update_running",
        " && rate != 0", "", "running statistics",
    ),
    Fault(
        "running: what rate 1 leaves of infinite statistics", "update_running",
        "rate == 1 ? batch : ", "", "running statistics",
    ),
    Fault(
        "running: infinite variances not skipped", "update_running",
        " && is_finite(batch_var)", "", "running statistics",
    ),
    Fault(
        "running: products rounded together", "update_running",
        "__dadd_rn(__dmul_rn(1 - rate, old), __dmul_rn(rate, batch))", "fma(1 - rate, old, rate * batch)",
        "running statistics",
    ),
    Fault(
        "running: bits of what stays", "update_running",
        "bits_of_var = bits_at(var, var_type, at)",
        "bits_of_var = bits_of(parameter(var, var_type, at, 0.0), var_type)", "running statistics",
    ),
    Fault(
        "running: halves rounded twice", "update_running",
        "odd = rounded_to_odd(value)", "odd = static_cast<float>(value)", "running statistics",
    ),
]  # fmt: skip
