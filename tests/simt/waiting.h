// What threads wait for: barriers and the collectives of a warp, and what is wrong where they wait for ever.
#pragma once
#include "fibers.h"

namespace {

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
    block.at_block_barrier = 0;
    for (unsigned i = 0; i < block.warp_count; ++i) {
        Warp& warp = block.warps[i];
        warp.at_block_barrier = 0;
        warp.ready = warp.existing;
        block.ready_warps |= warp.bit;
    }
}

// Whether a thread of the block that is at its barrier has to come to the cluster's first.
bool waits_for_one_that_has_not_arrived(const Block& block) {
    for (unsigned i = 0; block.at_block_barrier && i < block.warp_count; ++i) {
        const Warp& warp = block.warps[i];
        for (unsigned rest = warp.at_block_barrier; rest; rest &= rest - 1)
            if (!warp.fibers[__builtin_ctz(rest)].arrived) return true;
    }
    return false;
}

// Those that wait; others have arrived and still run.
void release_from_cluster(Block& block) {
    block.at_cluster_barrier = 0;
    for (unsigned i = 0; i < block.warp_count; ++i) {
        Warp& warp = block.warps[i];
        if (!warp.at_cluster_barrier) continue;
        warp.ready |= warp.at_cluster_barrier;
        warp.at_cluster_barrier = 0;
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

}  // namespace
