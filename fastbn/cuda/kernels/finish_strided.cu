// Results of the parts that `strided_statistics` has left of each kept index, `splits` of them: reads 24 to 72 bytes of
// each. Of parts' n, sum, mean mu and M2, merged in pairs (parts.cuh):
//
//     count = sum(n),   mean = sum(sum) / count,   M2 = sum(M2 + n (mu - mean)^2)
//     var = M2 / (count - ddof),   std = sqrt(var)
//
// Threads stand along the parts, and beside each other on kept indices.

#include "parts.cuh"

extern "C" __global__ void __launch_bounds__(THREADS) finish_strided(const Params p) {
    const int thread = threadIdx.x, length = static_cast<int>(p.along), width = static_cast<int>(p.beside);
    const int along = thread % length, beside = thread / length;
    const i64 first = static_cast<i64>(blockIdx.x) * width, kept = first + beside;
    if (beside < width) {
        Part whole;
        whole.clear();
        if (kept < p.kept)
            for (i64 split = along; split < p.splits; split += length) {
                const double* from = part_at(p, kept, split);
                Part part;
#pragma unroll
                for (int k = 0; k < NUMBERS_OF_PART; ++k) reinterpret_cast<double*>(&part)[k] = from[k];
                add(whole, part);
            }
        slots()[along * width + beside] = whole;
    }
    merge_slots(length * width, width);
    if (thread < width && first + thread < p.kept) write_results(p, first + thread, slots()[thread]);
}
