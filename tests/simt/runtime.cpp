// Runs the threads of CUDA blocks as fibers, all on the calling thread of the operating system, in an order that an
// integer, the schedule, chooses. A fiber runs until it waits for others; it then switches to the next one directly.
//
// Schedule 0 goes on with the lowest lane of the current warp that can; where none can, with the lowest warp of the
// block, else with the lowest block. Schedule 1 takes the highest everywhere. So of two accesses to memory that no
// barrier orders, each comes first in one of the two, unless a thread spins before. The other schedules choose at
// random and leave warps and blocks early.
//
// float32 numbers that are subnormal count as 0, as CuPy compiles kernels. Here float64 ones do too.
//
// What this cannot show: threads see what others write at once, in order, and the collectives of a warp order memory as
// __syncwarp does, none of which a GPU promises.
//
// An error abandons all fibers: control goes back to simt_launch, and their stacks are used again.
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

enum Error : int { deadlock = 1, wrong_barrier, wrong_collective, outside_shared, misaligned, no_launch, trapped };

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

// ---- what a thread waits for

const char* const block_barrier = "__syncthreads()";
const char* const cluster_barrier = "cluster_barrier()";

unsigned mask_of(uint64_t key) { return static_cast<unsigned>(key); }

struct Text {
    char text[80];
};

Text describe(uint64_t key) {
    static const char* const names[] = {"__syncwarp",  "__ballot_sync",   "__any_sync",       "__all_sync",
                                        "__shfl_sync", "__shfl_xor_sync", "__shfl_down_sync", "__shfl_up_sync"};
    const unsigned collective = static_cast<unsigned>(key >> 32);
    const char* size = collective & simt::eight_bytes ? " of 8 bytes" : "";
    Text result;
    snprintf(result.text, sizeof result.text, "%s%s with mask 0x%08x", names[collective % 8], size, mask_of(key));
    return result;
}

// Fails if a lane of the mask waits elsewhere than this one.
void explain_meeting(const Warp& warp, unsigned lane) {
    const uint64_t key = warp.keys[lane];
    for (unsigned rest = mask_of(key); rest; rest &= rest - 1) {
        const unsigned other = __builtin_ctz(rest);
        const bool meets = warp.meeting >> other & 1;
        const uint64_t other_key = warp.keys[other];
        if ((meets && other_key == key) || warp.spinning >> other & 1) continue;
        const bool same_mask = mask_of(other_key) == mask_of(key);
        const char* name = !meets ? "deadlock" : same_mask ? "different collectives" : "mask mismatch";
        const char* barrier = warp.at_block_barrier >> other & 1 ? block_barrier : cluster_barrier;
        fail(meets ? wrong_collective : deadlock,
             "%s: block %u, thread %u waits in %s for thread %u, which waits %s %s", name,
             warp.fibers[lane].block.x, warp.fibers[lane].thread.x, describe(key).text, warp.fibers[other].thread.x,
             meets ? "in" : "at", meets ? describe(other_key).text : barrier);
    }
}

void explain_deadlock() {
    unsigned meeting = 0, spinning = 0, at_block_barrier = 0, at_cluster_barrier = 0;
    const Fiber* first = &self();
    for (unsigned i = 0; i < launch.resident; ++i) {
        const Block& block = blocks[i];
        at_block_barrier += block.at_block_barrier;
        at_cluster_barrier += block.at_cluster_barrier;
        for (unsigned j = 0; j < block.warp_count; ++j) {
            const Warp& warp = block.warps[j];
            for (unsigned rest = warp.meeting; rest; rest &= rest - 1) explain_meeting(warp, __builtin_ctz(rest));
            if (!spinning && warp.spinning) first = &warp.fibers[__builtin_ctz(warp.spinning)];
            meeting += __builtin_popcount(warp.meeting);
            spinning += __builtin_popcount(warp.spinning);
        }
    }
    fail(deadlock, "deadlock: spinning %u (block %u, thread %u), at %s %u, at %s %u, in collectives of their warps %u",
         spinning, first->block.x, first->thread.x, block_barrier, at_block_barrier, cluster_barrier,
         at_cluster_barrier, meeting);
}

// ---- barriers

[[noreturn, gnu::cold]] void fail_at(const char* barrier, const Fiber& me, const char* why) {
    fail(wrong_barrier, "block %u, thread %u is at %s, %s", me.block.x, me.thread.x, barrier, why);
}

const char* const others_exited = "which other threads never reach: they have exited";

void release(Block& block) {
    block.at_block_barrier = block.at_cluster_barrier = 0;
    for (unsigned i = 0; i < block.warp_count; ++i) {
        Warp& warp = block.warps[i];
        warp.at_block_barrier = warp.at_cluster_barrier = 0;
        warp.ready = warp.existing;
        block.ready_warps |= warp.bit;
    }
}

// ---- collectives of a warp

// Whether all lanes of the mask are in this meeting.
inline bool complete(const Warp& warp, unsigned mask, uint64_t key) {
    if ((warp.meeting & mask) != mask) return false;
    uint64_t differences = 0;
    if (mask == every_lane) {
        for (unsigned lane = 0; lane < warp_size; ++lane) differences |= warp.keys[lane] ^ key;
    } else {
        for (unsigned rest = mask; rest; rest &= rest - 1) differences |= warp.keys[__builtin_ctz(rest)] ^ key;
    }
    return differences == 0;
}

[[noreturn, gnu::cold]] void fail_at_mask(const Fiber& me, uint64_t key, const char* why) {
    fail(wrong_collective, "block %u, thread %u is in %s, %s", me.block.x, me.thread.x, describe(key).text, why);
}

// Gives what `resolve(warp, mask)` leaves in the lane's result. The lane that comes last resolves for all: any of them
// may bring its next value before another has left.
template <class Resolve>
inline uint64_t meet(unsigned collective, unsigned mask, uint64_t value, unsigned source, Resolve resolve) {
    Fiber& me = self();
    Warp& warp = *me.warp;
    const unsigned named = mask;
    mask &= warp.existing;  // lanes that a block of this size never had are not waited for, like on a GPU
    const uint64_t key = static_cast<uint64_t>(collective) << 32 | mask;
    if (!(named >> me.lane & 1)) fail_at_mask(me, key, "which lacks its own lane");
    if (mask & warp.exited) fail_at_mask(me, key, "which has lanes that have exited");
    warp.keys[me.lane] = key;
    warp.values[me.lane] = value;
    warp.sources[me.lane] = static_cast<uint8_t>(source);
    warp.meeting |= 1u << me.lane;
    if (complete(warp, mask, key)) {
        resolve(warp, mask);
        warp.meeting &= ~mask;
        warp.ready |= mask;
        warp.block->ready_warps |= warp.bit;
    }
    run(me, next_in(warp));
    return warp.results[me.lane];
}

// ---- a thread's life

[[noreturn]] void live_and_exit() {
#ifdef __SANITIZE_ADDRESS__
    const void* stack;
    size_t stack_bytes;
    __sanitizer_finish_switch_fiber(nullptr, &stack, &stack_bytes);
    if (!caller.stack) {  // the first fiber comes from there
        caller.stack = stack;
        caller.stack_bytes = stack_bytes;
    }
#endif
    launch.kernel(params);

    Fiber& me = self();
    Warp& warp = *me.warp;
    Block& block = *warp.block;
    Cluster& cluster = *block.cluster;
    if (block.at_block_barrier || cluster.at_barrier) {
        fail(wrong_barrier, "block %u, thread %u has exited while others wait for it at %s", me.block.x, me.thread.x,
             block.at_block_barrier ? block_barrier : cluster_barrier);
    }
    for (unsigned rest = warp.meeting; rest; rest &= rest - 1) {
        const unsigned other = __builtin_ctz(rest);
        if (!(mask_of(warp.keys[other]) >> me.lane & 1)) continue;
        fail(wrong_collective, "block %u, thread %u has exited while thread %u waits for it in %s", me.block.x,
             me.thread.x, warp.fibers[other].thread.x, describe(warp.keys[other]).text);
    }
    warp.exited |= 1u << me.lane;
    ++block.exited;
    ++cluster.exited;
    idle_rounds = 0;
    --live;
    run(me, live ? next_in(warp) : caller, true);
    __builtin_unreachable();
}

void prepare_stack(Fiber& fiber, size_t index) {
    unsigned char* stack = stacks.data + index * stack_stride;
    void** words = reinterpret_cast<void**>(stack + stack_size) - saved_words;
    for (unsigned i = 0; i < saved_words; ++i) words[i] = nullptr;
    words[return_word] = reinterpret_cast<void*>(live_and_exit);
    fiber.stack_pointer = words;
#ifdef __SANITIZE_ADDRESS__
    fiber.stack = stack;
    fiber.stack_bytes = stack_size;
    fiber.fake_stack = nullptr;
#endif
}

// ---- shared memory: that of the resident blocks, with guards in front, between and behind

unsigned char* shared_of(size_t slot) { return shared.data + guard_size + slot * launch.shared_stride; }

struct Guard {
    unsigned char *begin, *end;
    size_t size() const { return static_cast<size_t>(end - begin); }
};

Guard guard_behind(size_t slot) { return {shared_of(slot) + launch.shared_bytes, shared_of(slot + 1)}; }

Guard guard_in_front() { return {shared.data, shared_of(0)}; }

// What a guard holds, starting with the first or second byte of the pattern.
const unsigned char* intact(const Guard& guard) {
    static uint16_t words[guard_size];  // more bytes than any guard has
    if (!words[0]) {
        for (uint16_t& word : words) word = guard_pattern;
    }
    return reinterpret_cast<unsigned char*>(words) + reinterpret_cast<uintptr_t>(guard.begin) % 2;
}

void set(const Guard& guard) {
    memcpy(guard.begin, intact(guard), guard.size());
#ifdef __SANITIZE_ADDRESS__
    __asan_poison_memory_region(guard.begin, guard.size());
#endif
}

// The first byte that was written, or null.
const unsigned char* damage(const Guard& guard) {
#ifdef __SANITIZE_ADDRESS__
    __asan_unpoison_memory_region(guard.begin, guard.size());
#endif
    const unsigned char* expected = intact(guard);
    if (memcmp(guard.begin, expected, guard.size()) == 0) return nullptr;
    const unsigned char* byte = guard.begin;
    while (*byte == *expected) ++byte, ++expected;
    return byte;
}

void poison_shared() {
    set(guard_in_front());
    for (unsigned slot = 0; slot < launch.resident; ++slot) {
        memset(shared_of(slot), poison, launch.shared_bytes);
        set(guard_behind(slot));
    }
}

void report_damage(unsigned slot, const unsigned char* byte) {
    if (!byte || error) return;
    error = outside_shared;
    snprintf(message, message_size, "block %u has %zu bytes of shared memory; byte %td was written",
             blocks[slot].warps->fibers->block.x, launch.shared_bytes, byte - shared_of(slot));
}

void check_shared() {
    report_damage(0, damage(guard_in_front()));
    for (unsigned slot = 0; slot < launch.resident; ++slot) report_damage(slot, damage(guard_behind(slot)));
}

// ---- a launch

unsigned warps_of_block() { return (launch.block + warp_size - 1) / warp_size; }

bool reserve() {
    const size_t resident = launch.resident, threads = resident * launch.block;
    return stacks.reserve(threads * stack_stride) && fibers.reserve(threads * sizeof(Fiber)) &&
           warps.reserve(resident * warps_of_block() * sizeof(Warp)) && blocks.reserve(resident * sizeof(Block)) &&
           clusters.reserve(resident * sizeof(Cluster)) && groups.reserve(launch.grid * sizeof(unsigned)) &&
           shared.reserve(2 * guard_size + resident * launch.shared_stride);
}

// Everything about the blocks from `first_block` on, which run together.
void prepare(unsigned first_block) {
    const unsigned warp_count = warps_of_block();
    for (unsigned slot = 0; slot < launch.resident; ++slot) {
        Cluster& cluster = clusters[slot / launch.cluster];
        if (slot % launch.cluster == 0) cluster = {&blocks[slot], launch.cluster, launch.cluster * launch.block, 0, 0};
        Block& block = blocks[slot];
        block = {};
        block.ready_warps = every_lane >> (32 - warp_count);
        block.threads = launch.block;
        block.warp_count = warp_count;
        block.warps = &warps[slot * warp_count];
        block.cluster = &cluster;
        for (unsigned i = 0; i < warp_count; ++i) {
            Warp& warp = block.warps[i];
            const unsigned lanes = launch.block - i * warp_size;
            warp.existing = warp.ready = lanes < warp_size ? (1u << lanes) - 1 : every_lane;
            warp.meeting = warp.spinning = warp.at_block_barrier = warp.at_cluster_barrier = warp.exited = 0;
            warp.bit = 1u << i;
            warp.block = &block;
            warp.fibers = &fibers[static_cast<size_t>(slot) * launch.block + i * warp_size];
        }
        for (unsigned i = 0; i < launch.block; ++i) {
            const size_t index = static_cast<size_t>(slot) * launch.block + i;
            Fiber& fiber = fibers[index];
            fiber.thread.x = i;
            fiber.block.x = first_block + slot;
            fiber.block_size.x = launch.block;
            fiber.grid_size.x = launch.grid;
            fiber.shared = shared_of(slot);
            fiber.warp = &block.warps[i / warp_size];
            fiber.lane = i % warp_size;
            prepare_stack(fiber, index);
        }
    }
    live = launch.resident * launch.block;
    idle_rounds = 0;
}

void order_groups(unsigned count) {
    for (unsigned i = 0; i < count; ++i) groups[i] = order == Order::descending ? count - 1 - i : i;
    if (order != Order::random) return;
    for (unsigned i = count; i > 1; --i) {
        const unsigned other = random_bits() % i;
        const unsigned group = groups[i - 1];
        groups[i - 1] = groups[other];
        groups[other] = group;
    }
}

}  // namespace

// ---- what kernels call

void simt_block_barrier() {
    Fiber& me = self();
    Block& block = *me.warp->block;
    if (block.exited) fail_at(block_barrier, me, others_exited);
    if (block.at_cluster_barrier) fail_at(block_barrier, me, "while other threads of the block are at the cluster's");
    me.warp->at_block_barrier |= 1u << me.lane;
    if (++block.at_block_barrier == block.threads) release(block);
    run(me, next_in(block));
}

void simt_cluster_barrier() {
    Fiber& me = self();
    Block& block = *me.warp->block;
    Cluster& cluster = *block.cluster;
    if (cluster.exited) fail_at(cluster_barrier, me, others_exited);
    if (block.at_block_barrier) fail_at(cluster_barrier, me, "while other threads of the block are at the block's");
    me.warp->at_cluster_barrier |= 1u << me.lane;
    ++block.at_cluster_barrier;
    if (++cluster.at_barrier == cluster.threads) {
        cluster.at_barrier = 0;
        for (unsigned i = 0; i < cluster.block_count; ++i) release(cluster.blocks[i]);
    }
    run(me, cluster.at_barrier ? next_in(block) : next());
}

void simt_syncwarp(unsigned mask) {
    meet(simt::syncwarp, mask, 0, 0, [](Warp&, unsigned) {});
}

unsigned simt_vote(unsigned collective, unsigned mask, bool predicate) {
    const uint64_t votes = meet(collective, mask, predicate, 0, [](Warp& warp, unsigned lanes) {
        unsigned result = 0;
        for (unsigned rest = lanes; rest; rest &= rest - 1) {
            const unsigned lane = __builtin_ctz(rest);
            result |= static_cast<unsigned>(warp.values[lane]) << lane;
        }
        for (unsigned rest = lanes; rest; rest &= rest - 1) warp.results[__builtin_ctz(rest)] = result;
    });
    return static_cast<unsigned>(votes);
}

unsigned long long simt_shuffle(unsigned collective, unsigned mask, unsigned long long bits, unsigned source) {
    return meet(collective, mask, bits, source, [](Warp& warp, unsigned lanes) {
        for (unsigned rest = lanes; rest; rest &= rest - 1) {
            const unsigned lane = __builtin_ctz(rest);
            const unsigned from = warp.sources[lane];
            warp.results[lane] = lanes >> from & 1 ? warp.values[from] : ~0ull;  // poison: a GPU leaves it undefined
        }
    });
}

void simt_spin() {
    Fiber& me = self();
    me.warp->spinning |= 1u << me.lane;
    run(me, next_in(*me.warp));
}

void simt_atomic(bool changes) {
    if (changes) idle_rounds = 0;
    if (!at_random(2)) simt_spin();
}

void simt_trap() {
    const Fiber& me = self();
    fail(trapped, "block %u, thread %u trapped", me.block.x, me.thread.x);
}

void simt_misaligned(const void* address, unsigned alignment) {
    const Fiber& me = self();
    fail(misaligned, "block %u, thread %u accesses %p, which is no multiple of %u", me.block.x, me.thread.x, address,
         alignment);
}

// ---- accesses to memory, which kernels compiled with -fsanitize=thread announce

namespace {

struct Access {
    uint64_t instruction, address;
    uint32_t block, thread, bytes, writes;
};

struct {
    Access* to = nullptr;  // null: nothing is recorded
    size_t capacity = 0, count = 0;
} record;

bool within(const void* address, const void* data, size_t bytes) {
    return reinterpret_cast<uintptr_t>(address) - reinterpret_cast<uintptr_t>(data) < bytes;
}

// Those of the thread itself and its place, of shared memory and of the kernel's argument are left out.
inline void note(const void* address, uint32_t bytes, bool writes, const void* instruction) {
    if (!record.to || within(address, stacks.data, stacks.bytes) || within(address, shared.data, shared.bytes) ||
        within(address, fibers.data, fibers.bytes) || within(address, params, sizeof params) ||
        address == &simt_self)
        return;
    if (record.count < record.capacity)
        record.to[record.count] = {reinterpret_cast<uint64_t>(instruction), reinterpret_cast<uint64_t>(address),
                                   self().block.x, self().thread.x, bytes, writes};
    ++record.count;
}

}  // namespace

#define SIMT_NOTED(name, bytes, writes)                                                          \
    extern "C" __attribute__((visibility("default"))) void __tsan_##name(void* address) {        \
        note(address, bytes, writes, __builtin_return_address(0));                               \
    }
#define SIMT_NOTED_OF(bytes)                        \
    SIMT_NOTED(read##bytes, bytes, false)           \
    SIMT_NOTED(write##bytes, bytes, true)           \
    SIMT_NOTED(unaligned_read##bytes, bytes, false) \
    SIMT_NOTED(unaligned_write##bytes, bytes, true)
SIMT_NOTED_OF(1)
SIMT_NOTED_OF(2)
SIMT_NOTED_OF(4)
SIMT_NOTED_OF(8)
SIMT_NOTED_OF(16)
#undef SIMT_NOTED_OF
#undef SIMT_NOTED

#pragma GCC visibility push(default)
extern "C" {
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_read_range(void* address, size_t bytes) {
    note(address, static_cast<uint32_t>(bytes), false, __builtin_return_address(0));
}
void __tsan_write_range(void* address, size_t bytes) {
    note(address, static_cast<uint32_t>(bytes), true, __builtin_return_address(0));
}

// Records up to `capacity` accesses from now on; null ends it. Gives how many there were since the last call.
size_t simt_record(void* to, size_t capacity) {
    const size_t before = record.count;
    record.to = static_cast<Access*>(to);
    record.capacity = capacity;
    record.count = 0;
    return before;
}
}
#pragma GCC visibility pop

// ---- what Python calls

int simt_launch(void (*kernel)(const void*), const void* parameters, size_t parameter_bytes, unsigned grid,
                unsigned block, size_t shared_bytes, unsigned resident, unsigned cluster, unsigned schedule,
                char* message_buffer, size_t message_buffer_size) {
    message = message_buffer;
    message_size = message_buffer_size;
    error = 0;
    const size_t shared_stride = (shared_bytes + guard_size + 127) / 128 * 128;
    launch = {kernel, grid, block, resident, cluster, shared_bytes, shared_stride};
    if (parameter_bytes > max_params || !reserve()) {
        snprintf(message, message_size, "no launch: too many parameters, or no memory");
        return no_launch;
    }
    memcpy(params, parameters, parameter_bytes);
    order = schedule == 0 ? Order::ascending : schedule == 1 ? Order::descending : Order::random;
    random_state = schedule * 0x9e3779b97f4a7c15ull | 1;
    caller = {};
    simt_self = &caller;
    const unsigned group_count = grid / resident;
    order_groups(group_count);
    const SubnormalsAreZero arithmetic;
    for (unsigned i = 0; i < group_count && !error; ++i) {
        prepare(groups[i] * resident);
        poison_shared();
        run(caller, next());
        check_shared();
    }
#ifdef __SANITIZE_ADDRESS__
    // Functions that were abandoned have not cleared what is poisoned around their variables.
    if (error) __asan_unpoison_memory_region(stacks.data, stacks.bytes);
#endif
    return error;
}
