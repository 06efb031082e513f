// y of a channel's elements, z = (x - mean) rstd gamma + beta before residual and activation: the forward pass and relu's
// gradient compute it alike, so that this knows its sign without reading y.
//
// The mean's high part is subtracted first, since x*s + (beta - mean*s) is 7.5e-4 off where the mean is 10^4 deviations;
// its low part, below 2^-24 of it, is in the bias.

#pragma once

#include "centre.cuh"

struct Statistics {  // what normalisation takes
    double mean, rest, rstd;  // the mean is mean + rest
};

struct Affine {
    Centre centre;
    real scale, bias;

    __device__ __forceinline__ void set(const Params& p, i64 at, const Statistics& of) {
        const int exponent = distance_exponent(of.mean, of.rstd);
        centre.set(of.mean, of.rest, exponent);
        scale = static_cast<real>(of.rstd * power_of_two(-exponent) * parameter(p.gamma, p.gamma_type, at, 1.0));
        const double moved = static_cast<double>(centre.low) * static_cast<double>(scale);
        bias = static_cast<real>(parameter(p.beta, p.beta_type, at, 0.0) - (centre.low == 0 ? 0 : moved));
    }
};

__device__ __forceinline__ real affine_of(real distance, real scale, real bias) { return fma(distance, scale, bias); }

#if DTYPE == FLOAT16
#define MOST_ROUNDED_TO_0 0x1p-25f  // what is stored of it is 0
#elif DTYPE == BFLOAT16
#define MOST_ROUNDED_TO_0 0x1p-134f
#else
#define MOST_ROUNDED_TO_0 0
#endif
