// What parts of a kept index come to, the merge of two, and results. All is float64, in a fixed order. For sums a part is
// n and the sum, in two numbers of which the second has what the first lost (Knuth's two-sum); for squares
//
//     n, mean mu and M2 = sum((x - mu)^2);   N = n + n',   delta = mu' - mu,   mu + delta n'/N,   M2 + M2' + delta^2 n n'/N
//
// (Chan, Golub & LeVeque 1983, eq. 2.1), the mean in two numbers as well: what float64 data far from 0 lose when merged.
//
// Float64 data may leave its range. Their sums are then of values times 2^-64, their squares of distances times 2^600 or
// 2^-600: no distance of float64 numbers needs another. A part with infinities or NaN has their sum for a mean, NaN for
// M2. Macros: SQUARES, 0 for sums.

#pragma once

#include "rounding.cuh"
#include "walk.cuh"

#define LEAST_SQUARES_OF_DOUBLES 0x1p-900  // below, sums of squares have lost digits to underflow
#define SMALL_UNIT 0x1p600                 // for small distances
#define LARGE_UNIT 0x1p-600
#define SUM_UNIT 0x1p-64

struct Part {
    double n, high, low;  // the sum times the unit, or the mean, is high + low
    double m2;            // of distances times the unit
#if DTYPE == FLOAT64
    double unit;
#else
    static constexpr double unit = 1;
#endif

    __device__ __forceinline__ void set(double n_, double high_, double low_, double m2_, double unit_ = 1) {
        n = n_, high = high_, low = low_, m2 = m2_;
#if DTYPE == FLOAT64
        unit = unit_;
#endif
    }

    __device__ __forceinline__ double per_unit() const {
        if (unit == 1) return 1;
#if SQUARES
        return unit > 1 ? LARGE_UNIT : SMALL_UNIT;
#else
        return 1 / SUM_UNIT;
#endif
    }
};

// The rounded sum of two, and what it lost.
__device__ __forceinline__ double two_sum(double a, double b, double& lost) {
    const double s = a + b, t = s - a;
    lost = (a - (s - t)) + (b - t);
    return s;
}

__device__ __forceinline__ double quotient(double a, double b) {  // of b > 0, as good as correctly rounded
    const double inverse = reciprocal(b), q = a * inverse, better = fma(fma(-q, b, a), inverse, q);
    return is_finite(better) ? better : q;
}

#if SQUARES

// A part whose mean is origin + shift / unit, which is in range where the distance from the origin is not.
__device__ __forceinline__ Part part_in_units(double n, double origin, double shift, double m2, double unit) {
    Part part;
    part.set(n, origin, shift, m2 > 0 ? m2 : 0, unit);
    if (unit != 1) {
        const double per_unit = unit > 1 ? LARGE_UNIT : SMALL_UNIT;
        part.high = (origin * unit + shift) * per_unit;
        part.low = ((origin * unit - part.high * unit) + shift) * per_unit;
    }
    return part;
}

__device__ __forceinline__ double m2_in(const Part& part, double unit) {
    const double factor = unit * part.per_unit();
    return part.m2 * factor * factor;
}

__device__ __forceinline__ Part merged(const Part& a, const Part& b) {
    if (a.n == 0) return b;
    if (b.n == 0) return a;
    const double n = a.n + b.n, share = b.n * reciprocal(n);
    const double delta = (b.high - a.high) + (b.low - a.low);
    const double m2 = (a.m2 + b.m2) + delta * delta * (a.n * share);
    Part whole;
    whole.set(n, a.high, a.low + delta * share, m2);
    bool in_range = is_finite(m2);
#if DTYPE == FLOAT64
    in_range = in_range && a.unit == 1 && b.unit == 1;
    in_range = in_range && (m2 >= LEAST_SQUARES_OF_DOUBLES || (m2 == 0 && delta == 0));
    if (in_range) return whole;
#pragma unroll 1
    for (double unit = SMALL_UNIT; unit >= LARGE_UNIT; unit *= LARGE_UNIT) {
        const double far = (b.high * unit - a.high * unit) + (b.low * unit - a.low * unit);
        const double squares = (m2_in(a, unit) + m2_in(b, unit)) + far * far * (a.n * share);
        if (is_finite(squares)) return part_in_units(n, a.high, a.low * unit + far * share, squares, unit);
    }
#endif
    if (!in_range) whole.set(n, (a.high + a.low) + (b.high + b.low), 0, not_a_number());
    return whole;
}

#else

__device__ __forceinline__ Part merged(const Part& a, const Part& b) {
    double lost, high = two_sum(a.high, b.high, lost);
    Part whole;
    whole.set(a.n + b.n, high, (a.low + b.low) + lost, 0);
#if DTYPE == FLOAT64
    if (a.unit == 1 && b.unit == 1 && is_finite(high)) return whole;
    const double of_a = a.unit == 1 ? SUM_UNIT : 1, of_b = b.unit == 1 ? SUM_UNIT : 1;
    high = two_sum(a.high * of_a, b.high * of_b, lost);
    whole.set(a.n + b.n, high, (a.low * of_a + b.low * of_b) + lost, 0, SUM_UNIT);
#endif
    if (!is_finite(high)) whole.low = 0;
    return whole;
}

#endif

// --- a block ----------------------------------------------------------------------------------------------------------

__device__ __forceinline__ Part* slots() { return reinterpret_cast<Part*>(dynamic_shared()); }

// Into the first slots of so many channels the merge of what lies in those behind, a channel apart.
__device__ __forceinline__ void merge_slots(int slots_of_block, int channels) {
    Part* all = slots();
    __syncthreads();
    for (int rows = slots_of_block / channels; rows > 1;) {
        const int half = (rows + 1) / 2;
        for (int i = threadIdx.x; i < (rows - half) * channels; i += THREADS)
            all[i] = merged(all[i], all[i + half * channels]);
        rows = half;
        __syncthreads();
    }
}

// --- between blocks ---------------------------------------------------------------------------------------------------

#define NUMBERS_OF_PART (sizeof(Part) / sizeof(double))

__device__ __forceinline__ double* part_at(const Params& p, i64 kept, i64 split) {
    return p.parts + (kept * p.splits + split) * NUMBERS_OF_PART;
}

// --- results ----------------------------------------------------------------------------------------------------------

#define VARIANCE 0  // forms
#define DEVIATION 1
#define SUM_OF_SQUARES 2

__device__ __forceinline__ double root(double value) {
    const double inverse = reciprocal_sqrt(value), r = value * inverse;
    if (!(value > 0 && is_finite(r))) return value;  // 0, infinite or NaN
    return fma(fma(-r, r, value), 0.5 * inverse, r);
}

#if SQUARES

__device__ __forceinline__ double mean_of(const Part& part) { return part.high + part.low; }

__device__ __forceinline__ double spread_of(const Params& p, const Part& part) {
    const double per_unit = part.per_unit(), degrees = part.n - p.ddof;
    if (p.form == SUM_OF_SQUARES) return part.n > 0 ? part.m2 * per_unit * per_unit : not_a_number();
    if (!(degrees > 0)) return part.m2 > 0 && !p.skip_nan ? infinity() : not_a_number();
    const double var = quotient(part.m2, degrees);
    return p.form == DEVIATION ? root(var) * per_unit : var * per_unit * per_unit;
}

#else

__device__ __forceinline__ double mean_of(const Part& part) {
    const double sum = part.high + part.low, mean = quotient(sum, part.n);
    const double better = mean + (fma(-mean, part.n, sum) + ((part.high - sum) + part.low)) * reciprocal(part.n);
    return (is_finite(better) ? better : mean) * part.per_unit();
}

#endif

__device__ __forceinline__ void write_number(char* data, i64 type, i64 index, double value) {
    if (data != nullptr) write_bits(data, type, index, bits_of(value, type));
}

__device__ __forceinline__ void write_results(const Params& p, i64 kept, const Part& part) {
    const i64 at = Place(p, kept).results;
    write_number(p.count, p.count_type, at, part.n);
    write_number(p.mean, p.mean_type, at, part.n > 0 ? mean_of(part) : not_a_number());
#if SQUARES
    write_number(p.spread, p.spread_type, at, spread_of(p, part));
#endif
}

// What a block has come to, of kept indices from the first of a row on.
__device__ __forceinline__ void write_block(const Params& p, i64 first, i64 end, i64 split) {
    for (int i = threadIdx.x; i < p.width; i += THREADS) {
        const i64 kept = first + i;
        if (kept >= end) continue;
        const Part& part = slots()[i];
        if (p.parts == nullptr) {
            write_results(p, kept, part);
            continue;
        }
        double* to = part_at(p, kept, split);
        to[0] = part.n, to[1] = part.high, to[2] = part.low, to[3] = part.m2;
#if DTYPE == FLOAT64
        to[4] = part.unit;
#endif
    }
}
