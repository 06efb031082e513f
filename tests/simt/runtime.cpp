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
// Threads see what others write at once, in order, and the collectives of a warp order memory as __syncwarp does, none
// of which a GPU promises: races.h and stale.h are about that, of kernels whose accesses are announced.
//
// An error abandons all fibers: control goes back to simt_launch, and their stacks are used again.
#include "accesses.h"
#include "fibers.h"
#include "shared.h"
#include "waiting.h"

namespace {

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
        if (slot % launch.cluster == 0)
            cluster = {&blocks[slot], launch.cluster, launch.cluster * launch.block, 0, 0, 0};
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
            fiber.arrived = false;
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
    if (block.at_cluster_barrier && !me.arrived)
        fail_at(block_barrier, me, "while other threads of the block are at the cluster's");
    me.warp->at_block_barrier |= 1u << me.lane;
    if (++block.at_block_barrier == block.threads) {
        if (modelled()) met(block);
        release(block);
    }
    run(me, next_in(block));
}

void simt_cluster_arrive(bool releases) {
    Fiber& me = self();
    Block& block = *me.warp->block;
    Cluster& cluster = *block.cluster;
    if (cluster.exited) fail_at(cluster_barrier, me, others_exited);
    if (me.arrived) fail_at(cluster_barrier, me, "where it has arrived before and not waited");
    me.arrived = true;
    me.round = cluster.round;
    if (modelled()) arrive(cluster, releases);
    if (++cluster.at_barrier < cluster.threads) return;
    cluster.at_barrier = 0;
    ++cluster.round;
    if (modelled()) begin_next_round(cluster);
    for (unsigned i = 0; i < cluster.block_count; ++i) release_from_cluster(cluster.blocks[i]);
}

void simt_cluster_wait() {
    Fiber& me = self();
    Warp& warp = *me.warp;
    Block& block = *warp.block;
    Cluster& cluster = *block.cluster;
    if (!me.arrived) fail_at(cluster_barrier, me, "where it waits and has not arrived");
    me.arrived = false;
    if (cluster.round == me.round) {
        if (waits_for_one_that_has_not_arrived(block))
            fail_at(cluster_barrier, me, "while other threads of the block are at the block's");
        warp.at_cluster_barrier |= 1u << me.lane;
        ++block.at_cluster_barrier;
        run(me, next_in(block));
    } else {
        warp.ready |= 1u << me.lane;
        block.ready_warps |= warp.bit;
        run(me, next());
    }
    if (modelled()) acquire(cluster, me.round);
}

unsigned char* simt_shared_of(unsigned rank) {
    const Block& block = *self().warp->block;
    const Cluster& cluster = *block.cluster;
    if (rank >= cluster.block_count || cluster.blocks[rank].exited)
        fail(outside_shared, "block %u, thread %u: block %u of the cluster %s", self().block.x, self().thread.x, rank,
             rank < cluster.block_count ? "has exited" : "does not exist");
    return cluster.blocks[rank].warps->fibers->shared;
}

void simt_fence(bool of_device) {
    const bool delayed = model.mode == stale && order == Order::random;  // others may run before and behind it
    if (delayed && at_random(2)) simt_spin();
    if (modelled()) fence(of_device);
    if (delayed && at_random(2)) simt_spin();
}

void simt_syncwarp(unsigned mask) {
    meet(simt::syncwarp, mask, 0, 0, [](Warp& warp, unsigned lanes) {
        if (modelled()) met(warp, lanes);
    });
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

// ---- what Python calls

int simt_launch(void (*kernel)(const void*), const void* parameters, size_t parameter_bytes, unsigned grid,
                unsigned block, size_t shared_bytes, unsigned resident, unsigned cluster, unsigned schedule,
                char* message_buffer, size_t message_buffer_size) {
    message = message_buffer;
    message_size = message_buffer_size;
    error = 0;
    const size_t shared_stride = (shared_bytes + guard_size + 127) / 128 * 128;
    launch = {kernel, grid, block, resident, cluster, shared_bytes, shared_stride};
    if (parameter_bytes > max_params || !reserve() || (modelled() && !begin_model())) {
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
        if (modelled()) begin_blocks();
        if (model.mode == stale) memset(all_seen, 0, sizeof all_seen);
        run(caller, next());
        hide();
        check_shared();
    }
#ifdef __SANITIZE_ADDRESS__
    // Functions that were abandoned have not cleared what is poisoned around their variables.
    if (error) __asan_unpoison_memory_region(stacks.data, stacks.bytes);
#endif
    return error;
}
