// CUDA C++ for the CPU: what kernels use of the language and of fastbn/cuda/device.cuh, under the same names. A kernel's
// text follows, then SIMT_ENTRY. Nothing of the standard library is included: it would take most of a compilation.
#pragma once
#include "runtime.h"

#define SIMT_EMULATION 1

// ---- the language

#define __global__ __attribute__((noinline))  // SIMT_ENTRY's call is the only one
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __restrict__
#define __launch_bounds__(...)
#define __cluster_dims__(...)

#define threadIdx (simt_self->thread)
#define blockIdx (simt_self->block)
#define blockDim (simt_self->block_size)
#define gridDim (simt_self->grid_size)

struct alignas(8) int2 {
    int x, y;
};
struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct alignas(16) double2 {
    double x, y;
};

inline int2 make_int2(int x, int y) { return {x, y}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline double2 make_double2(double x, double y) { return {x, y}; }

namespace simt {

template <class To, class From>
inline To bit_cast(From value) {
    static_assert(sizeof(To) == sizeof(From), "as many bits");
    To result;
    __builtin_memcpy(&result, &value, sizeof result);
    return result;
}

template <class T>
struct Same {
    typedef T type;
};

template <class T>
inline T* aligned(T* address) {
    if (bit_cast<size_t>(address) % alignof(T)) simt_misaligned(address, alignof(T));
    return address;
}

// Stores the result of a call, which the compiler does not announce (simt.py).
template <class To, class From>
inline void assign(To& to, const From& value) {
    to = value;
}

}  // namespace simt

// ---- memory

inline unsigned char* dynamic_shared() { return simt_self->shared; }

// Loads and stores that the compiler announces are plain or volatile; others announce themselves where it does, right
// before the load.
#ifdef __SANITIZE_THREAD__
#define SIMT_SILENT __attribute__((no_sanitize("thread")))
#define SIMT_ACCESS(address, use) simt_access(address, sizeof *(address), use, __builtin_return_address(0))
#else
#define SIMT_SILENT
#define SIMT_ACCESS(address, use) (void)0
#endif

template <class T>
SIMT_SILENT inline T __ldg(const T* address) {
    simt::aligned(address);
    SIMT_ACCESS(address, simt::reads | simt::never_written);
    return *address;
}
template <class T>
inline T __ldcs(const T* address) {
    return *simt::aligned(address);
}
template <class T>
SIMT_SILENT inline T __ldcg(const T* address) {
    simt::aligned(address);
    SIMT_ACCESS(address, simt::reads | simt::past_first_level);
    return *address;
}
template <class T>
inline void __stcs(T* address, typename simt::Same<T>::type value) {
    *simt::aligned(address) = value;
}
template <class T>
inline void __stwb(T* address, typename simt::Same<T>::type value) {
    *simt::aligned(address) = value;
}
template <class T>
inline void __stcg(T* address, typename simt::Same<T>::type value) {
    *simt::aligned(address) = value;
}

inline void __threadfence() { simt_fence(true); }
inline void __threadfence_block() { simt_fence(false); }

// All others may run between an atomic operation and what follows, or kernels would depend on who came last.
SIMT_SILENT inline unsigned atomicAdd(unsigned* address, unsigned value) {
    simt::aligned(address);
    SIMT_ACCESS(address, simt::reads | simt::writes | simt::strong_in_device);
    const unsigned before = *address;
    *address = before + value;
    simt_atomic(value != 0);
    return before;
}
SIMT_SILENT inline unsigned atomicAdd_block(unsigned* address, unsigned value) {
    simt::aligned(address);
    SIMT_ACCESS(address, simt::reads | simt::writes | simt::strong_in_block);
    const unsigned before = *address;
    *address = before + value;
    simt_atomic(value != 0);
    return before;
}

inline void trap() { simt_trap(); }

// What a thread calls whenever it finds that it has to wait for another. Loops that do not call it never end.
inline void backoff() { simt_spin(); }

// ---- barriers and the collectives of warps

inline void __syncthreads() { simt_block_barrier(); }
#ifndef SIMT_CLUSTER_BARRIER  // what device.cuh has
#define SIMT_CLUSTER_BARRIER simt_cluster_arrive(true), simt_cluster_wait()
#endif
inline void cluster_barrier() { SIMT_CLUSTER_BARRIER; }

// As cluster.map_shared_rank of cooperative groups: the same place in the shared memory of another block.
template <class T>
inline T* map_shared_rank(T* address, unsigned rank) {
    const size_t offset = simt::bit_cast<size_t>(address) - simt::bit_cast<size_t>(simt_self->shared);
    return simt::bit_cast<T*>(simt::bit_cast<size_t>(simt_shared_of(rank)) + offset);
}
inline void __syncwarp(unsigned mask = 0xffffffffu) { simt_syncwarp(mask); }
inline unsigned __ballot_sync(unsigned mask, int predicate) { return simt_vote(simt::ballot, mask, predicate); }
inline int __any_sync(unsigned mask, int predicate) { return simt_vote(simt::any, mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return simt_vote(simt::all, mask, !predicate) == 0; }

namespace simt {

template <class T>
inline T shuffled(unsigned collective, unsigned mask, T value, unsigned source) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8, "a shuffle takes 4 or 8 bytes");
    if constexpr (sizeof(T) == 4) {
        const unsigned bits = bit_cast<unsigned>(value);
        return bit_cast<T>(static_cast<unsigned>(simt_shuffle(collective, mask, bits, source)));
    } else {
        const unsigned long long bits = bit_cast<unsigned long long>(value);
        return bit_cast<T>(simt_shuffle(collective + eight_bytes, mask, bits, source));
    }
}

inline unsigned lane() { return simt_self->thread.x % 32; }

}  // namespace simt

template <class T>
inline T __shfl_sync(unsigned mask, T value, int lane) {
    return simt::shuffled(simt::shuffle, mask, value, lane & 31);
}
template <class T>
inline T __shfl_xor_sync(unsigned mask, T value, int bits) {
    return simt::shuffled(simt::shuffle_xor, mask, value, simt::lane() ^ (bits & 31));
}
template <class T>
inline T __shfl_down_sync(unsigned mask, T value, unsigned delta) {
    const unsigned source = simt::lane() + (delta & 31);
    return simt::shuffled(simt::shuffle_down, mask, value, source < 32 ? source : simt::lane());
}
template <class T>
inline T __shfl_up_sync(unsigned mask, T value, unsigned delta) {
    delta &= 31;
    return simt::shuffled(simt::shuffle_up, mask, value, simt::lane() - (delta <= simt::lane() ? delta : 0));
}

// ---- bits

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __popcll(unsigned long long bits) { return __builtin_popcountll(bits); }
inline int __clz(int bits) { return bits ? __builtin_clz(bits) : 32; }
inline int __clzll(long long bits) { return bits ? __builtin_clzll(bits) : 64; }
inline int __ffs(int bits) { return __builtin_ffs(bits); }
inline int __ffsll(long long bits) { return __builtin_ffsll(bits); }
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned long long>(a) * b >> 32; }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
    return static_cast<unsigned __int128>(a) * b >> 64;
}

inline unsigned __float_as_uint(float value) { return simt::bit_cast<unsigned>(value); }
inline float __uint_as_float(unsigned bits) { return simt::bit_cast<float>(bits); }
inline int __float_as_int(float value) { return simt::bit_cast<int>(value); }
inline float __int_as_float(int bits) { return simt::bit_cast<float>(bits); }
inline long long __double_as_longlong(double value) { return simt::bit_cast<long long>(value); }
inline double __longlong_as_double(long long bits) { return simt::bit_cast<double>(bits); }

// ---- arithmetic: the C functions, and their names for float too

#define SIMT_FUNCTION(name)                        \
    extern "C" double name(double) noexcept;       \
    extern "C" float name##f(float) noexcept;      \
    inline float name(float x) { return __builtin_##name##f(x); }
#define SIMT_FUNCTION_OF_2(name)                       \
    extern "C" double name(double, double) noexcept;   \
    extern "C" float name##f(float, float) noexcept;   \
    inline float name(float x, float y) { return __builtin_##name##f(x, y); }
SIMT_FUNCTION(sqrt)
SIMT_FUNCTION(fabs)
SIMT_FUNCTION(floor)
SIMT_FUNCTION(ceil)
SIMT_FUNCTION(trunc)
SIMT_FUNCTION(rint)
SIMT_FUNCTION(exp)
SIMT_FUNCTION(exp2)
SIMT_FUNCTION(expm1)
SIMT_FUNCTION(log)
SIMT_FUNCTION(log2)
SIMT_FUNCTION(log1p)
SIMT_FUNCTION(tanh)
SIMT_FUNCTION(erf)
SIMT_FUNCTION_OF_2(fmin)
SIMT_FUNCTION_OF_2(fmax)
SIMT_FUNCTION_OF_2(fmod)
SIMT_FUNCTION_OF_2(pow)
SIMT_FUNCTION_OF_2(copysign)
#undef SIMT_FUNCTION
#undef SIMT_FUNCTION_OF_2

extern "C" double fma(double, double, double) noexcept;
extern "C" float fmaf(float, float, float) noexcept;
inline float fma(float x, float y, float z) { return __builtin_fmaf(x, y, z); }
extern "C" double ldexp(double, int) noexcept;
extern "C" float ldexpf(float, int) noexcept;
inline float ldexp(float x, int exponent) { return __builtin_ldexpf(x, exponent); }

extern "C" int abs(int) noexcept;
inline float abs(float x) { return __builtin_fabsf(x); }
inline double abs(double x) { return __builtin_fabs(x); }

inline bool isfinite(float x) { return __builtin_isfinite(x); }
inline bool isfinite(double x) { return __builtin_isfinite(x); }
inline bool isnan(float x) { return __builtin_isnan(x); }
inline bool isnan(double x) { return __builtin_isnan(x); }
inline bool isinf(float x) { return __builtin_isinf(x); }
inline bool isinf(double x) { return __builtin_isinf(x); }

template <class T>
inline T min(T a, T b) {
    return b < a ? b : a;
}
template <class T>
inline T max(T a, T b) {
    return a < b ? b : a;
}
inline float min(float a, float b) { return __builtin_fminf(a, b); }
inline float max(float a, float b) { return __builtin_fmaxf(a, b); }
inline double min(double a, double b) { return __builtin_fmin(a, b); }
inline double max(double a, double b) { return __builtin_fmax(a, b); }

inline float rsqrtf(float x) { return 1.0f / __builtin_sqrtf(x); }
inline float rsqrt(float x) { return rsqrtf(x); }
inline double rsqrt(double x) { return 1.0 / __builtin_sqrt(x); }
inline float __frsqrt_rn(float x) { return static_cast<float>(1.0 / __builtin_sqrt(static_cast<double>(x))); }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fsqrt_rn(float x) { return __builtin_sqrtf(x); }
inline float __fadd_rn(float x, float y) { return x + y; }
inline float __fsub_rn(float x, float y) { return x - y; }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __fdiv_rn(float x, float y) { return x / y; }
inline float __fdividef(float x, float y) { return x / y; }
inline float __fmaf_rn(float x, float y, float z) { return __builtin_fmaf(x, y, z); }
inline double __drcp_rn(double x) { return 1.0 / x; }
inline double __dsqrt_rn(double x) { return __builtin_sqrt(x); }
inline double __dadd_rn(double x, double y) { return x + y; }
inline double __dsub_rn(double x, double y) { return x - y; }
inline double __dmul_rn(double x, double y) { return x * y; }
inline double __ddiv_rn(double x, double y) { return x / y; }
inline double __fma_rn(double x, double y, double z) { return __builtin_fma(x, y, z); }

inline float reciprocal(float value) { return 1.0f / value; }
inline double reciprocal(double value) { return 1.0 / value; }
inline double reciprocal_sqrt(double value) { return 1.0 / __builtin_sqrt(value); }

// ---- formats of 16 bits

inline float half_to_float(unsigned short bits) { return static_cast<float>(simt::bit_cast<_Float16>(bits)); }

inline unsigned short float_to_half(float value) {
    return simt::bit_cast<unsigned short>(static_cast<_Float16>(value));
}

inline float bfloat16_to_float(unsigned short bits) {
    return simt::bit_cast<float>(static_cast<unsigned>(bits) << 16);
}

inline float bfloat16_of_pair(unsigned bits, int upper) {
    return simt::bit_cast<float>(upper ? bits & 0xffff0000u : bits << 16);
}

inline unsigned short float_to_bfloat16(float value) {
    const unsigned bits = simt::bit_cast<unsigned>(value);
    if (value != value) return 0x7fff;
    return static_cast<unsigned short>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);  // half to even
}

// ---- the way in

namespace simt {

template <class Params>
inline void call(void (*kernel)(Params), const void* params) {
    const Params copy = *static_cast<const Params*>(params);
    kernel(copy);
}

template <class Params>
constexpr unsigned size_of_params(void (*)(Params)) {
    return sizeof(Params);
}

}  // namespace simt

#define SIMT_ENTRY(kernel)                                                                     \
    extern "C" __attribute__((visibility("default"))) void simt_entry(const void* params) {    \
        simt::call(kernel, params);                                                            \
    }                                                                                          \
    extern "C" __attribute__((visibility("default"))) const unsigned simt_params_size =        \
        simt::size_of_params(kernel);
