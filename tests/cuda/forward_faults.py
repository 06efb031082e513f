"""Faults in what a block sees, in statistics, and in the forward pass: see `tests.cuda.faults`."""

from tests.cuda.fault import Fault

FAULTS = [
    # tile.cuh
    Fault(
        "one vector behind the last", "statistics",
        "(last - v + (ROWS - 1)) / ROWS", "(last - v + ROWS) / ROWS", "moments, narrow columns",
    ),
    Fault(
        "one vector behind the last is written", "normalize",
        "(last - v + (ROWS - 1)) / ROWS", "(last - v + ROWS) / ROWS", "frozen",
    ),
    Fault(
        "incomplete rows of threads left out", "statistics",
        "(last - v + (ROWS - 1)) / ROWS", "(last - v) / ROWS", "moments, rows",
    ),
    Fault(
        "channels behind the last", "normalize",
        "active = has(p, slot);", "active = true;", "forward, two passes",
    ),
    Fault(
        "parts of channels behind the last", "grad_sums",
        "p, const Tile& tile, i64 split) {\n    for (int q = threadIdx.x; q < WIDTH && tile.has(p, q);",
        "p, const Tile& tile, i64 split) {\n    for (int q = threadIdx.x; q < WIDTH;",
        "parts, columns",
    ),
    Fault(
        "last vector of a split left out", "statistics",
        "end < p.vectors ? end : p.vectors", "end < p.vectors ? end - 1 : p.vectors", "moments, columns",
    ),
    Fault(
        "last split too long", "statistics",
        "end < p.vectors ? end : p.vectors", "end", "moments, columns",
    ),
    Fault(
        "backwards from one block too many", "normalize",
        "gridDim.x - 1 - blockIdx.x", "gridDim.x - blockIdx.x", "forward, two passes",
    ),
    Fault(
        "division by the vectors of a row", "statistics",
        ">> p.row_shift;", ">> (p.row_shift + 1);", "moments, rows",
    ),
    Fault(
        "division by the vectors of a row, any strides", "statistics",
        ">> p.row_shift : v", ">> (p.row_shift + 1) : v", "moments, rows, any strides",
    ),
    Fault(
        "rows: no gaps between them", "statistics",
        "vectors + (v + row * gap)", "vectors + v", "moments, rows",
    ),
    Fault(
        "rows: gaps as long as strides", "normalize",
        "/ VECTOR - static_cast<unsigned>(p.row_vectors);", "/ VECTOR;", "frozen, rows",
    ),
    Fault(
        "vectors of a chunk side by side", "statistics",
        "static_cast<u64>(step) * (k * ROWS)", "static_cast<u64>(step) * k", "moments, long columns",
    ),
    Fault(
        "whole chunks of one vector more", "statistics",
        "(ITEMS_PER_THREAD - 1) * ROWS < last", "(ITEMS_PER_THREAD - 2) * ROWS < last", "moments, rows",
    ),
    Fault(
        "the last chunk left out", "normalize",
        "if (const int count = tile.within(v)) take(v, count);", "", "frozen",
    ),
    Fault(
        "position in a row, in vectors", "statistics",
        "static_cast<unsigned>(p.row_vectors)) * DEPTH", "static_cast<unsigned>(p.row_vectors))",
        "moments, rows, any strides",
    ),
    Fault(
        "position in a row, in vectors, 64 bits", "statistics",
        "(v - outer * p.row_vectors) * DEPTH", "(v - outer * p.row_vectors)", "moments, rows, 64 bits",
    ),
    Fault(
        "stride of batches", "statistics",
        "return batch * strides[0] + (origin", "return (origin", "moments, batches",
    ),
    Fault(
        "numbers of batches", "statistics",
        "return batch * p.channels + origin + q;", "return origin + q;", "moments, batches",
    ),
    Fault(
        "weights along a vector of rows", "statistics",
        "j * p.weight_strides[3]", "0", "moments, rows, outliers without weight",
    ),
    Fault(
        "weights along a vector of channels", "statistics",
        "j * p.weight_strides[2]", "0", "moments, columns, weights of each channel",
    ),
    Fault(
        "vectors stored beyond the count", "forward",
        "store(items, p.y, p.y_strides, p, tile, v, count);",
        "store(items, p.y, p.y_strides, p, tile, v, ITEMS_PER_THREAD);",
        "forward, block, rows",
    ),
    Fault(
        "float16 parameters read as bfloat16", "normalize",
        "type == FLOAT16 ? half_to_float(bits)", "type == BFLOAT16 ? half_to_float(bits)", "frozen, float16 parameters",
    ),
    # tile.cuh: warps and groups of blocks
    Fault(
        "half of a warp shuffles", "statistics",
        "__shfl_xor_sync(0xffffffffu", "__shfl_xor_sync(0xffffu", "moments, rows",
    ),
    Fault(
        "butterfly from the first lane", "grad_sums",
        "int bit = from; bit < to;", "int bit = 1; bit < to;", "parts, columns",
    ),
    Fault(
        "butterfly without the last step", "grad_sums",
        "int bit = from; bit < to;", "int bit = from; bit < to / 2;", "parts, rows",
    ),
    Fault(
        "clusters do not wait", "forward",
        "    cluster_barrier();\n", "\n", "forward, cluster",
    ),
    Fault(
        "barrier of a group: round not counted", "forward",
        "write_partials(p, tile, split);\n            group_barrier(p, ++round);\n",
        "write_partials(p, tile, split);\n            group_barrier(p, round);\n",
        "forward, cooperative",
    ),
    Fault(
        "barrier of a group: the first round's number", "forward",
        "round * static_cast<unsigned>(p.splits)", "static_cast<unsigned>(p.splits)",
        "forward, cooperative, groups take several tiles",
    ),
    Fault(
        "barrier of a group: one counter for all", "forward",
        "p.counters + blockIdx.x / static_cast<unsigned>(p.splits)", "p.counters", "forward, cooperative",
    ),
    Fault(
        "barrier of a group: arrives before its threads", "backward",
        "#else\n    __syncthreads();\n    if (threadIdx.x == 0) {", "#else\n    if (threadIdx.x == 0) {",
        "backward, cooperative, few narrow columns",
    ),
    Fault(
        "barrier of a group: one thread waits", "forward",
        "        __threadfence();\n    }\n    __syncthreads();", "        __threadfence();\n    }",
        "forward, cooperative",
    ),
    # accumulator.cuh
    Fault(
        "distances from 0", "statistics",
        "first = chunk.first();\n        return !RUN", "first = 0;\n        return !RUN",
        "moments, rows, float64, far from 0",
    ),
    Fault(
        "E[x^2] - E[x]^2", "statistics",
        "middle = sum_of_distances(chunk, weights, first) * inverse;", "middle = -first;", "moments, rows, far from 0",
    ),
    Fault(
        "one pass over a chunk", "statistics",
        "middle = sum_of_distances(chunk, weights, first) * inverse;", "middle = 0;", "moments, outliers first",
    ),
    Fault(
        "mean of a chunk not corrected", "statistics",
        "(static_cast<double>(middle) + correction)", "static_cast<double>(middle)", "moments, outliers first",
    ),
    Fault(
        "each chunk has its own origin", "statistics",
        "start = origin == origin ? origin : first;", "start = first;", "moments, rows",
    ),
    Fault(
        "chunks of a thread: no delta^2", "statistics",
        "squares + (m2 + moved * distance)", "squares + m2", "moments, rows",
    ),
    Fault(
        "groups: distances from 0", "statistics",
        "shift = first + total * reciprocal", "shift = 0 * total * reciprocal", "moments, columns, far from 0",
    ),
    Fault(
        "groups: distances from the first element", "statistics",
        "shift = first + total * reciprocal", "shift = first + 0 * total * reciprocal",
        "moments, long columns of halves, outliers first",
    ),
    Fault(
        "groups: squares of distances from the shift", "statistics",
        "m2 = sum_of_squares - sum * middle", "m2 = sum_of_squares", "moments, columns",
    ),
    Fault(
        "groups: the last one left out", "statistics",
        "    add_rest(accumulators, count, p, tile, v);\n", "", "moments, columns",
    ),
    Fault(
        "groups: the last one of whole chunks", "statistics",
        "chunk * ITEMS_PER_THREAD + count) %", "chunk * ITEMS_PER_THREAD) %", "moments, long columns",
    ),
    Fault(
        "groups: sums go on", "statistics",
        "        clear_group();\n    }\n\n    __device__ __forceinline__ void flush_carefully",
        "    }\n\n    __device__ __forceinline__ void flush_carefully",
        "moments, long columns",
    ),
    Fault(
        "groups: squares that underflow", "statistics",
        "squares == 0 && bits << 1 == 0 && shift == origin", "squares == 0 && shift == origin",
        "moments, columns, tiny",
    ),
    Fault(
        "groups: other elements taken again", "statistics",
        "v - waiting * ROWS}", "v - waiting * ROWS + ROWS}", "moments, columns, tiny",
    ),
    Fault(
        "elements of weight 0 not left out where squares overflow", "statistics",
        "tile.holds(channel, j) && weight > 0", "tile.holds(channel, j)", "moments, rows, huge, NaN without weight",
    ),
    Fault(
        "distances from an element of weight 0", "statistics",
        "if (!some && w[k][j] > 0) {", "if (!some) {", "moments, rows, outliers without weight",
    ),
    Fault(
        "weights not multiplied", "statistics",
        "return w[k][j] * value;", "return value;", "moments, columns, weights",
    ),
    Fault(
        "weights behind the last", "statistics",
        "k < count ? weight_of(p, tile, v + k * ROWS, from() + j) : 0.0",
        "weight_of(p, tile, v + k * ROWS, from() + j)",
        "moments, columns, weights",
    ),
    Fault(
        "last infinity alone", "statistics",
        "away = odd ? away + infinite : infinite;", "away = infinite;", "moments, long columns, infinities",
    ),
    Fault(
        "squares that overflow", "statistics",
        ">> 32) - least < 0x7ff00000u - least;", ">> 32) >= least;", "moments, rows, huge",
    ),
    Fault(
        "squares that underflow", "forward",
        "static_cast<unsigned>(LEAST_EXPONENT_OF_SQUARES + 1023) << 20", "0", "training, block, rows, small",
    ),
    Fault(
        "units of a thread: none for small distances", "forward",
        "if (squares == 0) unit = SMALL_UNIT;", "", "training, cooperative, float64, small",
    ),
    Fault(
        "units of a thread: squares keep the one before", "forward",
        "squares *= LARGE_UNIT;\n            squares *= LARGE_UNIT;", "squares *= LARGE_UNIT;", "mixed scales, rows",
    ),
    # moments.cuh
    Fault(
        "units of parts: not written", "forward",
        "to[4 * all] = partial.unit;", "to[4 * all] = 1;", "training, cooperative, float64, small",
    ),
    Fault(
        "units of parts: always the last", "forward",
        "if (!found && is_finite(squares)) {", "if (is_finite(squares)) {", "training, cooperative, float64, small",
    ),
    Fault(
        "units of parts: M2 taken as it is", "finish_moments",
        "a.m2_in(unit) + b.m2_in(unit)", "a.m2 + b.m2", "mixed scales, columns",
    ),
    Fault(
        "units of parts: rstd without", "forward",
        "partial.unit * partial.unit) * partial.unit;", "partial.unit * partial.unit);",
        "training, cooperative, float64, small",
    ),
    Fault(
        "merge: share of the other part", "finish_moments",
        "share = b.n * reciprocal(n)", "share = a.n * reciprocal(n)", "moments, many splits",
    ),
    Fault(
        "merge: no delta^2", "finish_moments",
        "(a.m2 + b.m2) + delta * delta * (a.n * share)", "(a.m2 + b.m2)", "moments, many splits",
    ),
    Fault(
        "merge: shifts ignored", "finish_moments",
        "(b.origin - a.origin) + (b.low - a.low)", "(b.origin - a.origin)", "moments, many splits",
    ),
    Fault(
        "lanes: no delta^2", "statistics",
        "added_across(a.m2 + moved * distance, from, to)", "added_across(a.m2, from, to)", "moments, rows",
    ),
    Fault(
        "lanes: shifts ignored", "statistics",
        "(a.origin - origin) + a.low", "(a.origin - origin)", "moments, rows",
    ),
    Fault(
        "lanes: origin of another channel", "statistics",
        "a.n > 0) & group;", "a.n > 0);", "moments, columns, NaN",
    ),
    Fault(
        "lanes: group of the first channel", "statistics",
        "return pattern << (threadIdx.x % side);", "return pattern;", "moments, columns, NaN",
    ),
    Fault(
        "lanes: group of the warp's first merge", "statistics",
        "(1u << WARPS % 32) - 1) << (lane - member)", "(1u << WARPS % 32) - 1)", "moments, columns, NaN",
    ),
    Fault(
        "lanes: infinities as numbers", "statistics",
        "if (careful) {", "if (false) {", "moments, columns, NaN",
    ),
    Fault(
        "block: parts read before they are written", "statistics",
        "= partials[ch];\n    __syncthreads();\n    if (WARPS == 1)", "= partials[ch];\n    if (WARPS == 1)",
        "moments, rows",
    ),
    Fault(
        "block: results read before they are written", "statistics",
        "q < width) results[q] = whole;\n    }\n    __syncthreads();", "q < width) results[q] = whole;\n    }",
        "moments, columns",
    ),
    Fault(
        "block: no more channels than merges at once", "statistics",
        "base += THREADS / WARPS)", "base += WIDTH)", "moments, wide columns",
    ),
    Fault(
        "block: results of no channel", "statistics",
        "if (member == 0 && q < width) results", "if (member == 0) results", "moments, columns",
    ),
    Fault(
        "slots of parts overlap", "statistics",
        "#define FIELDS (sizeof(Partial) / sizeof(double))", "#define FIELDS (sizeof(Partial) / sizeof(double) - 1)",
        "moments, columns",
    ),
    Fault(
        "merge: one row of threads alone", "finish_moments",
        "split < splits; split += THREADS / PIECE)", "split < splits; split += splits)", "moments, many splits",
    ),
    Fault(
        "merge: the last split left out", "finish_moments",
        "split < splits; split += THREADS / PIECE)", "split + 1 < splits; split += THREADS / PIECE)",
        "moments, narrow columns",
    ),
    Fault(
        "merge: fields beside one another", "statistics",
        "to[all] = partial.origin", "to[1] = partial.origin", "moments, columns",
    ),
    Fault(
        "merge: fields of the next split", "finish_moments",
        "read_shared_with_others(from + 2 * all)", "read_shared_with_others(from + 6 * all)", "moments, columns",
    ),
    Fault(
        "merge: some channels alone", "forward",
        "for (int q = split * PIECE; q < WIDTH; q += splits * PIECE) merge_piece(p, tile, p.splits, q);",
        "if (split == 0) merge_piece(p, tile, p.splits, 0);",
        "forward, cooperative",
    ),
    Fault(
        "merge: as many channels as blocks", "forward",
        "q += splits * PIECE) merge_piece", "q += WIDTH) merge_piece", "forward, cluster, columns",
    ),
    Fault(
        "merge: the first block's channels for all", "forward",
        "int q = split * PIECE; q < WIDTH;", "int q = 0; q < PIECE;", "forward, cooperative",
    ),
    Fault(
        "merge: channels behind the last", "finish_moments",
        "if (threadIdx.x < PIECE && tile.has(p, q)) write_moments", "if (threadIdx.x < PIECE) write_moments",
        "moments, narrow columns",
    ),
    Fault(
        "merged: read before they are written", "forward",
        "merge_piece(p, tile, p.splits, q);\n            group_barrier(p, ++round);\n",
        "merge_piece(p, tile, p.splits, q);\n",
        "forward, cooperative",
    ),
    # centre.cuh
    Fault(
        "no units of large distances", "forward",
        "abs(exponent) <= NEAR_RSTD", "exponent <= NEAR_RSTD", "training, block, columns, large, affine",
    ),
    Fault(
        "no units of small distances", "forward",
        "abs(exponent) <= NEAR_RSTD", "exponent >= -NEAR_RSTD", "training, block, rows, small, large gamma",
    ),
    # affine.cuh, normalized.cuh
    Fault(
        "low part of a given mean", "normalize",
        "low = is_finite(left) ? static_cast<real>(left) : 0;", "low = 0;", "frozen",
    ),
    Fault(
        "low part of the batch's mean", "forward",
        "low = is_finite(left) ? static_cast<real>(left) : 0;", "low = 0;", "forward, block, rows, far from 0",
    ),
    Fault(
        "low part of the batch's mean, float64", "forward",
        "- static_cast<double>(high)) + rest * factor", "- static_cast<double>(high))",
        "forward, block, rows, float64, far from 0",
    ),
    Fault(
        "residual after relu", "forward",
        "z += element(added[k], j);\n#endif\n                if (RELU) z = z <= 0 ? 0 : z;",
        "if (RELU) z = z <= 0 ? 0 : z;\n                z += element(added[k], j);\n#endif\n",
        "forward, block, rows, all",
    ),
    Fault(
        "relu of NaN", "forward",
        "z = z <= 0 ? 0 : z;", "z = z > 0 ? z : 0;", "forward, block, columns, NaN",
    ),
    Fault(
        "numbers of the vector's first channel", "normalize",
        "return channels[ALONG_CHANNELS ? j : 0];", "return channels[0];", "forward, two passes",
    ),
    Fault(
        "coefficients read before they are written", "normalize",
        "    }\n    __syncthreads();\n#pragma unroll\n    for (int ch = 0; ch < CHANNELS; ++ch) affine",
        "    }\n#pragma unroll\n    for (int ch = 0; ch < CHANNELS; ++ch) affine",
        "forward, two passes",
    ),
    Fault(
        "coefficients of the tile before", "forward",
        "    }\n    __syncthreads();\n#pragma unroll\n    for (int ch = 0; ch < CHANNELS; ++ch) affine",
        "    }\n#pragma unroll\n    for (int ch = 0; ch < CHANNELS; ++ch) affine",
        "forward, cooperative, blocks take several tiles",
    ),
    Fault(
        "coefficients of the first threads' channels", "normalize",
        "q < WIDTH && tile.has(p, q); q += THREADS) {\n        const i64 at = tile.kept(p, q);\n        Statistics of",
        "q < WIDTH && tile.has(p, q); q += WIDTH) {\n        const i64 at = tile.kept(p, q);\n        Statistics of",
        "inference, more channels than threads",
    ),
    Fault(
        "eps", "normalize",
        "reciprocal_sqrt(spread + p.eps)", "reciprocal_sqrt(spread)", "frozen",
    ),
    # forward.cu
    Fault(
        "merge: before others have written", "forward",
        "write_partials(p, tile, split);\n            group_barrier(p, ++round);\n",
        "write_partials(p, tile, split);\n",
        "forward, cooperative",
    ),
    Fault(
        "blocks wait before they have written", "forward",
        "            write_partials(p, tile, split);\n            group_barrier(p, ++round);\n",
        "            group_barrier(p, ++round);\n            write_partials(p, tile, split);\n",
        "forward, cooperative",
    ),
    Fault(
        "x kept: another vector read", "forward",
        "items[k] = kept[(chunk * ITEMS_PER_THREAD + k) * THREADS]",
        "items[k] = kept[(chunk * ITEMS_PER_THREAD + ITEMS_PER_THREAD - 1 - k) * THREADS]",
        "forward, block, rows",
    ),
    Fault(
        "x kept where parts are merged", "forward",
        "dynamic_shared() + (MERGE_BYTES + AFFINE_BYTES + 15) / 16 * 16)", "dynamic_shared())", "forward, block, rows",
    ),
    Fault(
        "x kept: as many vectors as of the last chunk", "forward",
        "tile, v, ITEMS_PER_THREAD, affine)", "tile, v, count, affine)", "forward, block, rows",
    ),
    Fault(
        "tiles left out", "forward",
        "at < p.tiles; at += gridDim.x / splits)", "at < p.tiles; at += gridDim.x)",
        "forward, cooperative, groups take several tiles",
    ),
]  # fmt: skip
