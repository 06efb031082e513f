// Threads as fibers: what the scheduler knows of them, and which one runs next.
#pragma once
#include "runtime.h"

#include <cstdarg>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <sys/mman.h>

#include "switch.h"

#if defined(__has_feature)
#if __has_feature(address_sanitizer)
#define __SANITIZE_ADDRESS__ 1
#endif
#endif
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

simt::Thread* simt_self;

namespace {

enum Error : int {
    deadlock = 1,
    wrong_barrier,
    wrong_collective,
    outside_shared,
    misaligned,
    no_launch,
    trapped,
    weak_memory
};

constexpr unsigned warp_size = 32;
constexpr unsigned every_lane = 0xffffffffu;
constexpr unsigned max_idle_rounds = 10000;
constexpr size_t max_params = 4096;

#ifdef __SANITIZE_ADDRESS__
constexpr size_t stack_size = 1 << 20;  // a report is made on the stack of the fiber
#else
constexpr size_t stack_size = 1 << 16;
#endif
constexpr size_t stack_stride = stack_size + 5 * 64;  // tops of stacks in different sets of the caches

constexpr size_t guard_size = 1024;
constexpr unsigned char poison = 0xff;
constexpr uint16_t guard_pattern = 0xfff5;  // NaN in every format like the poison, but another one

struct Warp;
struct Block;

struct alignas(64) Fiber : simt::Thread {
    void* stack_pointer;
    Warp* warp;
    unsigned lane;
    unsigned round;  // of the cluster's barrier, that the thread has arrived at
    bool arrived;     // and not yet waited
#ifdef __SANITIZE_ADDRESS__
    const void* stack;
    size_t stack_bytes;
    void* fake_stack;
#endif
};

struct Warp {
    // Sets of lanes. One that exists is in one of the sets from `ready` on, or runs.
    unsigned existing, ready, meeting, spinning, at_block_barrier, at_cluster_barrier, exited;
    unsigned bit;  // the warp in its block's sets
    Block* block;
    Fiber* fibers;
    // Of every lane: its collective and mask, what it brings, whose value it asks for, what it gets.
    uint64_t keys[warp_size], values[warp_size], results[warp_size];
    uint8_t sources[warp_size];
};

struct Cluster {
    Block* blocks;
    unsigned block_count, threads, at_barrier, exited;
    unsigned round;  // of the barrier, which so many are through
};

struct Block {
    unsigned ready_warps;  // all that have a ready lane, and perhaps some that have none any more
    unsigned threads, at_block_barrier, at_cluster_barrier, exited;
    unsigned warp_count;
    Warp* warps;
    Cluster* cluster;
};

// Memory kept from launch to launch. It grows by being mapped anew: nothing in it outlives a launch.
template <class T>
struct Kept {
    T* data = nullptr;
    size_t bytes = 0;

    bool reserve(size_t wanted) {
        if (wanted <= bytes) return true;
        if (data) munmap(data, bytes);
        data = nullptr;
        bytes = 0;
        const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
        void* mapped = mmap(nullptr, wanted, PROT_READ | PROT_WRITE, flags, -1, 0);
        if (mapped == MAP_FAILED) return false;
        madvise(mapped, wanted, MADV_NOHUGEPAGE);  // most of a stack is never touched
        data = static_cast<T*>(mapped);
        bytes = wanted;
        return true;
    }
    T& operator[](size_t index) { return data[index]; }
};

Kept<unsigned char> stacks, shared;
Kept<Fiber> fibers;
Kept<Warp> warps;
Kept<Block> blocks;
Kept<Cluster> clusters;
Kept<unsigned> groups;

struct Launch {
    void (*kernel)(const void*);
    unsigned grid, block;        // sizes
    unsigned resident, cluster;  // blocks that run together, blocks of a cluster
    size_t shared_bytes, shared_stride;
} launch;

alignas(64) unsigned char params[max_params];

Fiber caller;          // simt_launch itself
unsigned live;         // threads that have not exited
unsigned idle_rounds;  // how often spinning threads alone were left since one exited or changed memory atomically
char* message;         // of an error
size_t message_size;
int error;

enum class Order { ascending, descending, random } order;
uint64_t random_state;

unsigned random_bits() {  // xorshift64*
    random_state ^= random_state >> 12;
    random_state ^= random_state << 25;
    random_state ^= random_state >> 27;
    return static_cast<unsigned>(random_state * 0x2545f4914f6cdd1dull >> 32);
}

inline bool at_random(unsigned once_in) { return order == Order::random && random_bits() % once_in == 0; }

inline unsigned choose(unsigned set) {
    if (order == Order::ascending) return __builtin_ctz(set);
    if (order == Order::descending) return 31 - __builtin_clz(set);
    const unsigned turn = random_bits() % 32;
    return (__builtin_ctz(set >> turn | set << (-turn % 32)) + turn) % 32;
}

// ---- arithmetic

class SubnormalsAreZero {  // while it lives
public:
#if defined(__x86_64__)
    SubnormalsAreZero() : before(__builtin_ia32_stmxcsr()) { __builtin_ia32_ldmxcsr(before | 0x8040); }
    ~SubnormalsAreZero() { __builtin_ia32_ldmxcsr(before); }

private:
    unsigned before;
#else
    SubnormalsAreZero() {
        asm volatile("mrs %0, fpcr" : "=r"(before));
        asm volatile("msr fpcr, %0" ::"r"(before | 1 << 24));
    }
    ~SubnormalsAreZero() { asm volatile("msr fpcr, %0" ::"r"(before)); }

private:
    uint64_t before;
#endif
};

// ---- who runs

bool within(const void* address, const void* data, size_t bytes) {
    return reinterpret_cast<uintptr_t>(address) - reinterpret_cast<uintptr_t>(data) < bytes;
}

inline Fiber& self() { return static_cast<Fiber&>(*simt_self); }

inline void run(Fiber& from, Fiber& to, bool for_good = false) {
    if (&from == &to) return;
    simt_self = &to;
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_start_switch_fiber(for_good ? nullptr : &from.fake_stack, to.stack, to.stack_bytes);
#endif
    simt_switch(&from.stack_pointer, to.stack_pointer);
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#endif
    (void)for_good;
}

[[noreturn, gnu::cold, gnu::format(printf, 2, 3)]] void fail(Error kind, const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(message, message_size, format, arguments);
    va_end(arguments);
    error = kind;
    run(self(), caller, true);
    __builtin_unreachable();
}

[[noreturn]] void explain_deadlock();

inline Fiber& take_from(Warp& warp) {
    const unsigned lane = choose(warp.ready);
    warp.ready &= ~(1u << lane);
    return warp.fibers[lane];
}

Fiber* find_in(Block& block) {
    while (block.ready_warps) {
        Warp& warp = block.warps[choose(block.ready_warps)];
        if (warp.ready) return &take_from(warp);
        block.ready_warps &= ~warp.bit;
    }
    return nullptr;
}

Fiber* find() {
    const unsigned start = order == Order::random ? random_bits() % launch.resident : 0;
    for (unsigned i = 0; i < launch.resident; ++i) {
        const unsigned slot = order == Order::descending ? launch.resident - 1 - i : (start + i) % launch.resident;
        if (Fiber* fiber = find_in(blocks[slot])) return fiber;
    }
    return nullptr;
}

bool wake_spinning() {
    bool found = false;
    for (unsigned i = 0; i < launch.resident; ++i) {
        Block& block = blocks[i];
        for (unsigned j = 0; j < block.warp_count; ++j) {
            Warp& warp = block.warps[j];
            if (!warp.spinning) continue;
            warp.ready = warp.spinning;
            warp.spinning = 0;
            block.ready_warps |= warp.bit;
            found = true;
        }
    }
    return found;
}

Fiber& next() {
    for (;;) {
        if (Fiber* fiber = find()) return *fiber;
        if (++idle_rounds > max_idle_rounds || !wake_spinning()) explain_deadlock();
    }
}

Fiber& next_in(Block& block) {
    if (at_random(8)) return next();
    Fiber* fiber = find_in(block);
    return fiber ? *fiber : next();
}

inline Fiber& next_in(Warp& warp) {
    if (warp.ready && !at_random(8)) return take_from(warp);
    return next_in(*warp.block);
}

}  // namespace
