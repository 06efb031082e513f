// The sums of the backward pass, dbeta = sum dz and dgamma = sum dz (x - mean) rstd, and dx from them:
//
//     dx = scale dz - w (offset + slope (x - mean)),   scale = gamma rstd,
//     offset = (scale dbeta - dmean) / count,   slope = (scale rstd dgamma - 2 dvar) / count
//
// A position of weight 0 whose dz is 0 is skipped, whatever x is there: it adds nothing to the sums, and its dx is 0.
// Coefficients have units where they would leave the range of the elements' type (centre.cuh).
//
// A thread sums GROUP elements of a channel in the type of the elements' arithmetic; all else is float64, in a fixed order.
// After: Ioffe & Szegedy (2015), section 3.

#pragma once

#include "affine.cuh"
#include "tile.cuh"

#define OF_Y 1  // relu's gradient, which passes where y > 0
#define OF_X 2  // y being computed again: S bytes less, where there was no residual

struct Xhat {  // of a channel: (x - mean) rstd
    Centre centre;
    real rstd;  // per unit
#if RELU == OF_X
    real scale, bias;  // of y
#endif

    __device__ __forceinline__ void set(const Params& p, i64 at) {
        const double mean = parameter(p.mean, p.mean_type, at, 0.0);
        const double value = parameter(p.spread, p.spread_type, at, 1.0);
        const int exponent = distance_exponent(mean, value);
        centre.set(mean, 0.0, exponent);
        rstd = static_cast<real>(value * power_of_two(-exponent));
#if RELU == OF_X
        Affine y;
        y.set(p, at, Statistics{mean, 0.0, value});
        scale = y.scale, bias = y.bias;
#endif
    }

    __device__ __forceinline__ void clear() {  // threads behind the last channel sum nothing times rstd
        centre = Centre{0, 0, 0};
        rstd = 0;
#if RELU == OF_X
        scale = bias = 0;
#endif
    }
};

struct Sums {
    double dgamma, dbeta;
};

struct Linear {  // dx of a channel: unit (scale dz - w (offset + slope distance))
    real scale, offset, slope, unit;

    // From scale, offset and slope in the unit 2^exponent, of distances from a centre. Its own unit is as near to 1 as
    // their range allows.
    __device__ __forceinline__ void set(int exponent, double scale_, double offset_, double slope_, const Xhat& xhat) {
        const double low = xhat.centre.low, moved = low == 0 ? 0 : slope_ * low;
        const double coefficients[3] = {scale_, offset_ - moved, slope_};
        int least = MOST_EXPONENT, most = LEAST_EXPONENT;
#pragma unroll
        for (int i = 0; i < 3; ++i) {
            const int its = exponent_of(coefficients[i]);
            if (its == NO_EXPONENT) continue;
            least = min(least, exponent + its);
            most = max(most, exponent + its);
        }
        const int beyond = max(most - MOST_EXPONENT, min(least - LEAST_EXPONENT, 0));
        const int own = max(-UNITS, min(beyond, UNITS));
        const double factor = power_of_two(exponent - own);
        scale = static_cast<real>(coefficients[0] * factor);
        offset = static_cast<real>(coefficients[1] * factor);
        slope = static_cast<real>(coefficients[2] * factor);
        unit = static_cast<real>(power_of_two(own));
    }
};

// dz of a vector of dy: 0 where the activation's output, y(j) of the vector's elements, is not positive; NaN passes.
template <class Output>
__device__ __forceinline__ void mask(Packed& dy, real most, Output y) {
    Elements gradient;
    gradient.packed = dy;
#pragma unroll
    for (int j = 0; j < VECTOR; ++j)
        if (y(j) <= most) gradient.each[j] = 0;
    dy = gradient.packed;
}

__device__ __forceinline__ void load_dz(
    Items& dz, const Items& x, const Xhat (&xhat)[CHANNELS], const Params& p, const Tile& tile, Index v, int count
) {
    load(dz, p.dy, p.dy_strides, p, tile, v, count);
#if RELU == OF_Y
    Items y;
    load(y, p.y, p.y_strides, p, tile, v, count);
#endif
#if RELU
#pragma unroll
    for (int k = 0; k < ITEMS_PER_THREAD; ++k)
        if (k < count)
#if RELU == OF_Y
            mask(dz[k], 0, [&](int j) { return element(y[k], j); });
#else
            mask(dz[k], MOST_ROUNDED_TO_0, [&](int j) {
                const Xhat of = tile.of_element(xhat, j);
                return affine_of(of.centre.distance(element(x[k], j)), of.scale, of.bias);
            });
#endif
#endif
}

// Whether an element has neither a weight nor a gradient.
__device__ __forceinline__ bool skipped(const Params& p, const Tile& tile, Index v, int j, real dz) {
    return WEIGHT && dz == 0 && !(static_cast<real>(weight_of(p, tile, v, j)) > 0);
}

#define GROUP 16  // elements of a channel, at least, that are summed before they are added in float64
#define CHUNKS_OF_GROUP (GROUP / (ITEMS_PER_THREAD * DEPTH) > 1 ? GROUP / (ITEMS_PER_THREAD * DEPTH) : 1)

// What a thread sums of a channel: dz and dz times the distance, of a group of chunks in the type of the elements'
// arithmetic. The factor rstd comes last, once: for each element it takes an instruction.
struct Gathered {
    Sums sums;
    real plain, product;
    bool any;  // positions that are not skipped: without, rstd may be NaN

    __device__ __forceinline__ void clear() {
        sums = Sums{0, 0};
        any = !WEIGHT;
        clear_group();
    }

    __device__ __forceinline__ void clear_group() { plain = product = 0; }

    __device__ __forceinline__ void flush() {
        sums.dbeta += plain;
        sums.dgamma += product;
        clear_group();
    }

    __device__ __forceinline__ Sums whole(const Xhat& xhat) const {
        const double dbeta = sums.dbeta + plain, low = xhat.centre.low;
        return Sums{any ? (sums.dgamma + product - (low == 0 ? 0 : low * dbeta)) * xhat.rstd : 0, dbeta};
    }
};

// The sums of a chunk of vectors, to each of the thread's channels.
__device__ __forceinline__ void add_sums(
    Gathered (&gathered)[CHANNELS], const Items& x, const Items& dz, int count, const Xhat (&xhat)[CHANNELS],
    const Params& p, const Tile& tile, Index v
) {
#if RUN
    real plain[CHANNELS] = {0, 0}, product[CHANNELS] = {0, 0};
    real places[VECTOR] = {}, products[VECTOR] = {};
#pragma unroll
    for (int k = 0; k < ITEMS_PER_THREAD; ++k)
        if (k < count)
#pragma unroll
            for (int j = 0; j < VECTOR; ++j) {
                const real g = element(dz[k], j), distance = tile.of_element(xhat, j).centre.distance(element(x[k], j));
                places[j] = k > 0 ? places[j] + g : g;
                products[j] = k > 0 ? fma(g, distance, products[j]) : g * distance;
            }
    tile.add_places(plain, places);
    tile.add_places(product, products);
#pragma unroll
    for (int ch = 0; ch < CHANNELS; ++ch) gathered[ch].plain += plain[ch], gathered[ch].product += product[ch];
#else
#pragma unroll
    for (int ch = 0; ch < CHANNELS; ++ch) {
        const int from = ALONG_CHANNELS ? ch : 0;
        real plain = 0, product = 0;
#pragma unroll
        for (int k = 0; k < ITEMS_PER_THREAD; ++k)
            if (k < count) {
                real part = 0, part_product = 0;
#pragma unroll
                for (int j = from; j < from + DEPTH; ++j) {
                    const real g = element(dz[k], j), distance = xhat[ch].centre.distance(element(x[k], j));
                    part = j > from ? part + g : g;
                    if (!skipped(p, tile, v + k * ROWS, j, g)) {
                        part_product = j > from ? fma(g, distance, part_product) : g * distance;
                        gathered[ch].any = true;
                    }
                }
                plain = k > 0 ? plain + part : part;
                product = k > 0 ? product + part_product : part_product;
            }
        gathered[ch].plain += plain;
        gathered[ch].product += product;
    }
#endif
    if ((v - tile.first) / CHUNK % CHUNKS_OF_GROUP == CHUNKS_OF_GROUP - 1)
#pragma unroll
        for (int ch = 0; ch < CHANNELS; ++ch) gathered[ch].flush();
}

// --- shared memory: numbers of a tile's channels, which are made once for all threads; sums ---------------------------

#define NUMBERS_BYTES ((sizeof(Xhat) * WIDTH + sizeof(Linear) * WIDTH + 15) / 16 * 16)
#define SUM_BYTES (NUMBERS_BYTES + sizeof(Sums) * (WIDTH + (RUN ? 2 * THREADS : WIDTH * WARPS)))

__device__ __forceinline__ Xhat* xhat_of_channels() { return reinterpret_cast<Xhat*>(dynamic_shared()); }

__device__ __forceinline__ Linear* linear_of_channels() { return reinterpret_cast<Linear*>(xhat_of_channels() + WIDTH); }

__device__ __forceinline__ Sums* summed_channels() { return reinterpret_cast<Sums*>(dynamic_shared() + NUMBERS_BYTES); }

// A thread's own of them.
template <class Numbers>
__device__ __forceinline__ void fetch_numbers(const Tile& tile, const Numbers* channels, Numbers (&own)[CHANNELS]) {
#pragma unroll
    for (int ch = 0; ch < CHANNELS; ++ch) own[ch] = channels[tile.own(ch)];
}

__device__ __forceinline__ void set_xhat(const Params& p, const Tile& tile, Xhat (&xhat)[CHANNELS]) {
    for (int q = threadIdx.x; q < WIDTH; q += THREADS) {
        if (tile.has(p, q))
            xhat_of_channels()[q].set(p, tile.kept(p, q));
        else
            xhat_of_channels()[q].clear();
    }
    __syncthreads();
    fetch_numbers(tile, xhat_of_channels(), xhat);
}

// As merge_block of moments.cuh, of plain sums: those of the channel q come to summed_channels()[q], for the thread
// q % THREADS to read.
template <int SIDE, int EACH>
__device__ __forceinline__ void sum_block(Sums (&sums)[EACH]) {
    constexpr int width = SIDE * EACH;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    Sums *results = summed_channels(), *scratch = results + width;
#pragma unroll
    for (int ch = 0; ch < EACH; ++ch) {
        sums[ch].dgamma = added_across(sums[ch].dgamma, SIDE, 32);
        sums[ch].dbeta = added_across(sums[ch].dbeta, SIDE, 32);
    }
    Sums* to = WARPS == 1 ? results : scratch + warp;
    if (lane < SIDE)
#pragma unroll
        for (int ch = 0; ch < EACH; ++ch) to[(lane * EACH + ch) * WARPS] = sums[ch];
    __syncthreads();
    if (WARPS == 1) return;
    for (int q = threadIdx.x; q < width; q += THREADS) {
        Sums whole{0, 0};
#pragma unroll
        for (int w = 0; w < WARPS; ++w) {
            whole.dgamma += scratch[q * WARPS + w].dgamma;
            whole.dbeta += scratch[q * WARPS + w].dbeta;
        }
        results[q] = whole;
    }
}

// Of all threads' channels.
__device__ __forceinline__ void sum_block(const Gathered (&gathered)[CHANNELS], const Xhat (&xhat)[CHANNELS]) {
    Sums sums[CHANNELS];
#pragma unroll
    for (int ch = 0; ch < CHANNELS; ++ch) sums[ch] = gathered[ch].whole(xhat[ch]);
#if RUN
    Sums *results = summed_channels(), *scratch = results + WIDTH;
#pragma unroll
    for (int ch = 0; ch < CHANNELS; ++ch) scratch[ch * THREADS + threadIdx.x] = sums[ch];
    __syncthreads();
    for (int q = threadIdx.x / 32; q < WIDTH; q += WARPS) {
        Sums whole{0, 0};
        for_parts_of_run(q, [&](int at) { whole.dgamma += scratch[at].dgamma, whole.dbeta += scratch[at].dbeta; });
        whole.dgamma = added_across(whole.dgamma, 1, 32);
        whole.dbeta = added_across(whole.dbeta, 1, 32);
        if (threadIdx.x % 32 == 0) results[q] = whole;
    }
    __syncthreads();
#else
    sum_block<LANES, CHANNELS>(sums);
#endif
}

// --- between blocks: partials[split][field][channel], added up once, in the order of splits ---------------------------

__device__ __forceinline__ double* slot(const Params& p, i64 split, i64 at) {
    return p.partials + split * 2 * p.batches * p.channels + at;
}

// Those of a block's channels, as sum_block leaves them.
__device__ __forceinline__ void write_sums(const Params& p, const Tile& tile, i64 split) {
    for (int q = threadIdx.x; q < WIDTH && tile.has(p, q); q += THREADS) {
        double* to = slot(p, split, tile.kept(p, q));
        to[0] = summed_channels()[q].dgamma, to[p.batches * p.channels] = summed_channels()[q].dbeta;
    }
}

// dgamma and dbeta, a row of the results each.
__device__ __forceinline__ Sums write_gradients(const Params& p, i64 at, const Sums& sums) {
    p.results[at] = sums.dgamma;
    p.results[p.batches * p.channels + at] = sums.dbeta;
    return sums;
}

// What another block, or the launch before, has written.
__device__ __forceinline__ Sums read_gradients(const Params& p, i64 at) {
    return Sums{
        read_shared_with_others(p.results + at), read_shared_with_others(p.results + p.batches * p.channels + at)
    };
}

// The gradients of PIECE channels of a tile, from `base` on, from the sums of all splits.
__device__ __forceinline__ void add_piece(const Params& p, const Tile& tile, i64 splits, int base) {
    const int q = base + threadIdx.x % PIECE;
    Sums whole[1] = {{0, 0}};
    if (tile.has(p, q))
        for (i64 split = threadIdx.x / PIECE; split < splits; split += THREADS / PIECE) {
            const double* from = slot(p, split, tile.kept(p, q));
            whole[0].dgamma += read_shared_with_others(from);
            whole[0].dbeta += read_shared_with_others(from + p.batches * p.channels);
        }
    sum_block<PIECE, 1>(whole);
    if (threadIdx.x < PIECE && tile.has(p, q)) write_gradients(p, tile.kept(p, q), summed_channels()[threadIdx.x]);
    __syncthreads();  // as in merge_piece
}

__device__ __forceinline__ Linear linear_of(const Params& p, i64 at, const Sums& sums, const Xhat& xhat) {
    const double rstd = parameter(p.spread, p.spread_type, at, 1.0);
    const int exponent = max(0, min(exponent_of(rstd), 1022));
    const double per_unit = power_of_two(-exponent);
    const double scale = parameter(p.gamma, p.gamma_type, at, 1.0) * (rstd * per_unit);
    double offset = 0, slope = 0;
    if (!p.frozen) {
        const double mean = parameter(p.mean, p.mean_type, at, 0.0);
        const double per_distance = power_of_two(-distance_exponent(mean, rstd));
        const double count = parameter(p.count, p.count_type, at, 1.0);
        const double dmean = parameter(p.dmean, p.dmean_type, at, 0.0);
        const double dvar = parameter(p.dvar, p.dvar_type, at, 0.0);
        const double share = count > 0 ? reciprocal(count) : not_a_number();
        offset = (scale * sums.dbeta - dmean * per_unit) * share;
        slope = (scale * (rstd * per_distance) * sums.dgamma - 2.0 * dvar * per_unit * per_distance) * share;
    }
    Linear linear;
    linear.set(exponent, scale, offset, slope, xhat);
    return linear;
}

// dx of a chunk in the place of x.
template <bool FROZEN>
__device__ __forceinline__ void put_dx(
    Items& x, const Items& dz, const Params& p, const Tile& tile, Index v, int count,
    const Xhat (&xhat)[CHANNELS], const Linear (&linear)[CHANNELS]
) {
#pragma unroll
    for (int k = 0; k < ITEMS_PER_THREAD; ++k)
        if (k < count) {
            Elements results;
#pragma unroll
            for (int j = 0; j < VECTOR; ++j) {
                const Linear of = tile.of_element(linear, j);
                const real z = element(dz[k], j);
                real g = of.scale * z;
                if (!FROZEN) {
                    real share = of.offset + of.slope * tile.of_element(xhat, j).centre.distance(element(x[k], j));
#if WEIGHT
                    const real w = static_cast<real>(weight_of(p, tile, v + k * ROWS, j));
                    share = w > 0 ? w * share : 0;
#endif
                    g = fma(of.scale, z, -share);
                }
                g *= of.unit;
                results.each[j] = encoded(skipped(p, tile, v + k * ROWS, j, z) ? 0 : g);
            }
            x[k] = results.packed;
        }
}

// Writes dx, and dz where there was a residual. Without x, or with frozen statistics, dx = scale dz.
__device__ __forceinline__ void write_dx(
    Items& x, const Items& dz, const Params& p, const Tile& tile, Index v, int count,
    const Xhat (&xhat)[CHANNELS], const Linear (&linear)[CHANNELS]
) {
#if RESIDUAL
    store(dz, p.dresidual, p.dresidual_strides, p, tile, v, count);
#endif
    if (p.frozen)  // once for a chunk: as a condition on each element it takes an instruction
        put_dx<true>(x, dz, p, tile, v, count, xhat, linear);
    else
        put_dx<false>(x, dz, p, tile, v, count, xhat, linear);
    store(x, p.dx, p.dx_strides, p, tile, v, count);
}
