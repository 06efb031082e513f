// What parts of a kept index come to, the merge of two, and results. All is float64, in a fixed order.
//
// A sum is in two numbers, of which the second has what the first lost (Knuth's two-sum). So is the mean of a spread, what
// float64 data far from 0 lose when they are merged: of n elements, mean mu and M2 = sum((x - mu)^2)
//
//     N = n + n',   delta = mu' - mu,   mean = mu + delta n'/N,   M2 + M2' + delta^2 n n'/N
//
// (Chan, Golub & LeVeque 1983, eq. 2.1). Where both are wanted the mean is that of the sum: `mean` and `mean_var` have the
// same digits.
//
// Float64 data may leave its range. Their sums are then of values times 2^-64, their squares of distances times 2^600 or
// 2^-600: no distance of float64 numbers needs another. With infinities or NaN a sum is that of these, and M2 is NaN.
// Macros: SUMS, SQUARES, 0 or 1.

#pragma once

#include "rounding.cuh"
#include "walk.cuh"

#define LEAST_SQUARES_OF_DOUBLES 0x1p-900  // below, sums of squares have lost digits to underflow
#define SMALL_UNIT 0x1p600                 // for small distances
#define LARGE_UNIT 0x1p-600
#define SUM_UNIT 0x1p-64

#if DTYPE == FLOAT64
#define OPTIONAL_UNIT double unit = 1
#else
#define OPTIONAL_UNIT static constexpr double unit = 1
#endif

struct Sum {
    double n, high, low;  // of values times the unit
    OPTIONAL_UNIT;

    __device__ __forceinline__ void set(double n_, double high_, double low_, double unit_ = 1) {
        n = n_, high = high_, low = low_;
#if DTYPE == FLOAT64
        unit = unit_;
#endif
    }
};

struct Spread {
    double n, high, low, m2;  // the mean is high + low; M2 is of distances times the unit
    OPTIONAL_UNIT;

    __device__ __forceinline__ void set(double n_, double high_, double low_, double m2_, double unit_ = 1) {
        n = n_, high = high_, low = low_, m2 = m2_;
#if DTYPE == FLOAT64
        unit = unit_;
#endif
    }

    __device__ __forceinline__ double per_unit() const { return unit == 1 ? 1 : unit > 1 ? LARGE_UNIT : SMALL_UNIT; }

    __device__ __forceinline__ double m2_in(double other) const {
        const double factor = other * per_unit();
        return m2 * factor * factor;
    }
};

struct Part {
#if SUMS
    Sum sum;
#endif
#if SQUARES
    Spread spread;
#endif

    __device__ __forceinline__ void clear() {
#if SUMS
        sum.set(0, 0, 0);
#endif
#if SQUARES
        spread.set(0, 0, 0, 0);
#endif
    }

    __device__ __forceinline__ double n() const {
#if SUMS
        return sum.n;
#else
        return spread.n;
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

// --- sums -------------------------------------------------------------------------------------------------------------

__device__ __forceinline__ Sum merged(const Sum& a, const Sum& b) {
    double lost, high = two_sum(a.high, b.high, lost);
    Sum whole;
    whole.set(a.n + b.n, high, (a.low + b.low) + lost);
#if DTYPE == FLOAT64
    if (a.unit == 1 && b.unit == 1 && is_finite(high)) return whole;
    const double of_a = a.unit == 1 ? SUM_UNIT : 1, of_b = b.unit == 1 ? SUM_UNIT : 1;
    high = two_sum(a.high * of_a, b.high * of_b, lost);
    whole.set(a.n + b.n, high, (a.low * of_a + b.low * of_b) + lost, SUM_UNIT);
#endif
    if (!is_finite(high)) whole.low = 0;
    return whole;
}

__device__ __forceinline__ double mean_of(const Sum& part) {
    const double sum = part.high + part.low, mean = quotient(sum, part.n);
    // The quotient once more: the mean of equal numbers is that number.
    const double better = mean + (fma(-mean, part.n, sum) + ((part.high - sum) + part.low)) * reciprocal(part.n);
    const double per_unit = part.unit == 1 ? 1 : 1 / SUM_UNIT;
    return part.n > 0 ? (is_finite(better) ? better : mean) * per_unit : not_a_number();
}

// --- spreads ----------------------------------------------------------------------------------------------------------

// One whose mean is origin + low / unit, which is in range where the distance from the origin is not.
__device__ __forceinline__ Spread spread_in_units(double n, double origin, double low, double m2, double unit) {
    Spread part;
    part.set(n, origin, low, m2 > 0 ? m2 : 0, unit);
    if (unit != 1) {
        part.high = (origin * unit + low) * part.per_unit();
        part.low = ((origin * unit - part.high * unit) + low) * part.per_unit();
    }
    return part;
}

__device__ __forceinline__ Spread merged(const Spread& a, const Spread& b) {
    if (a.n == 0) return b;
    if (b.n == 0) return a;
    const double n = a.n + b.n, share = b.n * reciprocal(n);
    const double delta = (b.high - a.high) + (b.low - a.low);
    const double m2 = (a.m2 + b.m2) + delta * delta * (a.n * share);
    Spread whole;
    whole.set(n, a.high, a.low + delta * share, m2);
    bool in_range = is_finite(m2);
#if DTYPE == FLOAT64
    in_range = in_range && a.unit == 1 && b.unit == 1;
    in_range = in_range && (m2 >= LEAST_SQUARES_OF_DOUBLES || (m2 == 0 && delta == 0));
    if (in_range) return whole;
#pragma unroll 1
    for (double unit = SMALL_UNIT; unit >= LARGE_UNIT; unit *= LARGE_UNIT) {
        const double far = (b.high * unit - a.high * unit) + (b.low * unit - a.low * unit);
        const double squares = (a.m2_in(unit) + b.m2_in(unit)) + far * far * (a.n * share);
        if (is_finite(squares)) return spread_in_units(n, a.high, a.low * unit + far * share, squares, unit);
    }
#endif
    if (!in_range) whole.set(n, (a.high + a.low) + (b.high + b.low), 0, not_a_number());
    return whole;
}

#define VARIANCE 0  // forms
#define DEVIATION 1
#define SUM_OF_SQUARES 2

__device__ __forceinline__ double root(double value) {
    const double inverse = reciprocal_sqrt(value), r = value * inverse;
    if (!(value > 0 && is_finite(r))) return value;  // 0, infinite or NaN
    return fma(fma(-r, r, value), 0.5 * inverse, r);
}

__device__ __forceinline__ double spread_of(const Params& p, const Spread& part) {
    const double per_unit = part.per_unit(), degrees = part.n - p.ddof;
    if (p.form == SUM_OF_SQUARES) return part.n > 0 ? part.m2 * per_unit * per_unit : not_a_number();
    if (!(degrees > 0)) return part.m2 > 0 && !p.skip_nan ? infinity() : not_a_number();
    const double var = quotient(part.m2, degrees);
    return p.form == DEVIATION ? root(var) * per_unit : var * per_unit * per_unit;
}

// --- both -------------------------------------------------------------------------------------------------------------

__device__ __forceinline__ void add(Part& part, const Part& other) {
#if SUMS
    part.sum = merged(part.sum, other.sum);
#endif
#if SQUARES
    part.spread = merged(part.spread, other.spread);
#endif
}

// Of a block: into the first slots of so many channels the merge of what lies in those behind, a channel apart.
__device__ __forceinline__ Part* slots() { return reinterpret_cast<Part*>(dynamic_shared()); }

__device__ __forceinline__ void merge_slots(int slots_of_block, int channels) {
    Part* all = slots();
    __syncthreads();
    for (int rows = slots_of_block / channels; rows > 1;) {
        const int half = (rows + 1) / 2;
        for (int i = threadIdx.x; i < (rows - half) * channels; i += THREADS) add(all[i], all[i + half * channels]);
        rows = half;
        __syncthreads();
    }
}

// Between blocks, in global memory.
#define NUMBERS_OF_PART (static_cast<int>(sizeof(Part) / sizeof(double)))

__device__ __forceinline__ double* part_at(const Params& p, i64 kept, i64 split) {
    return p.parts + (kept * p.splits + split) * NUMBERS_OF_PART;
}

__device__ __forceinline__ void write_number(char* data, i64 type, i64 index, double value) {
    if (data != nullptr) write_bits(data, type, index, bits_of(value, type));
}

__device__ __forceinline__ void write_results(const Params& p, i64 kept, const Part& part) {
    const i64 at = Place(p, kept).results;
    write_number(p.count, p.count_type, at, part.n());
#if SUMS
    write_number(p.mean, p.mean_type, at, mean_of(part.sum));
#endif
#if SQUARES
    write_number(p.spread, p.spread_type, at, spread_of(p, part.spread));
#endif
}

// What a block has come to, of kept indices from the first of a row on.
__device__ __forceinline__ void write_block(const Params& p, i64 first, i64 end, i64 split) {
    for (int i = threadIdx.x; i < p.width; i += THREADS) {
        const i64 kept = first + i;
        if (kept >= end) continue;
        if (p.parts == nullptr) {
            write_results(p, kept, slots()[i]);
            continue;
        }
        const double* from = reinterpret_cast<const double*>(slots() + i);
        double* to = part_at(p, kept, split);
#pragma unroll
        for (int k = 0; k < NUMBERS_OF_PART; ++k) to[k] = from[k];
    }
}
