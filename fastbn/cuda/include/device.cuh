// What the hardware gives, under the names that the kernels use.
//
// No header is included: NVRTC compiles a kernel in a third of the time, and runs where no toolkit is installed.
// The tests execute all the other files on the CPU, where these few functions are replaced.

#pragma once

__device__ __forceinline__ unsigned char* dynamic_shared() {
    extern __shared__ uint4 fastbn_dynamic_shared[];
    return reinterpret_cast<unsigned char*>(fastbn_dynamic_shared);
}

__device__ __forceinline__ float half_to_float(unsigned short bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}

__device__ __forceinline__ unsigned short float_to_half(float value) {
    unsigned short bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}

__device__ __forceinline__ float bfloat16_to_float(unsigned short bits) {
    return __uint_as_float(static_cast<unsigned>(bits) << 16);
}

// One of two side by side: the upper one is cut out by one instruction, where by itself it takes two or three. What is
// written in C the compiler takes out of branches, and keeps 64 numbers instead of 32 registers of pairs.
__device__ __forceinline__ float bfloat16_of_pair(unsigned bits, int upper) {
    unsigned value;
    if (upper)
        asm("and.b32 %0, %1, -65536;" : "=r"(value) : "r"(bits));
    else
        asm("shl.b32 %0, %1, 16;" : "=r"(value) : "r"(bits));
    return __uint_as_float(value);
}

__device__ __forceinline__ unsigned short float_to_bfloat16(float value) {
#if __CUDA_ARCH__ >= 800
    unsigned short bits;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
#else
    const unsigned bits = __float_as_uint(value);
    return value == value ? (bits + 0x7fff + (bits >> 16 & 1)) >> 16 : 0x7fff;
#endif
}

// Threads of all blocks of a cluster; what they wrote to global memory before is seen after.
__device__ __forceinline__ void cluster_barrier() {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.arrive.release;\n\tbarrier.cluster.wait.acquire;" ::: "memory");
#endif
}

__device__ __forceinline__ void trap() { asm volatile("trap;"); }

// Called while waiting for other blocks.
__device__ __forceinline__ void backoff() { __nanosleep(40); }

// Reciprocals of positive normal numbers, from the hardware's 20 bits by Newton's steps. A division calls a subroutine,
// which costs registers, spills, and a third of the compilation.
__device__ __forceinline__ double reciprocal(double value) {
    double r;
    asm("rcp.approx.ftz.f64 %0, %1;" : "=d"(r) : "d"(value));
    r = fma(r, fma(-value, r, 1.0), r);
    r = fma(r, fma(-value, r, 1.0), r);
    return fma(r, fma(-value, r, 1.0), r);
}

__device__ __forceinline__ float reciprocal(float value) {
    float r;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(value));
    return r;
}

// 1 / sqrt(value), for any value: infinite at 0, NaN below.
__device__ __forceinline__ double reciprocal_sqrt(double value) {
    double r;
    asm("rsqrt.approx.ftz.f64 %0, %1;" : "=d"(r) : "d"(value));
    if (!(value > 2.3e-308 && value < 1.7e308)) return r;  // already what it should be; steps would make it NaN
    const double half = 0.5 * r;
    r = fma(half, fma(-value * r, r, 1.0), r);
    r = fma(0.5 * r, fma(-value * r, r, 1.0), r);
    return fma(0.5 * r, fma(-value * r, r, 1.0), r);
}
