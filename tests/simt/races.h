// Accesses held against PTX's model: of two to the same byte, one of them a write, one has to come before the other in
// causality order, or both are morally strong. All else is a race and ends the launch, whichever came first here.
//
// Two rules more. What another block has written in the same launch is not read by plain loads, since "multiple L1
// caches are not coherent for global data" (PTX, cache operators); by the model alone fences would do. And what is read
// by ld.global.nc (__ldg), which the model does not cover, is not written in the same launch.
#pragma once
#include "causality.h"
#include "shared.h"

namespace {

// ---- what is wrong

struct Described {
    char text[160];
};

Described described(const Site& site) {
    Described result = {"?"};
    size_t used = 0;
    for (const void* at : site.at)
        if (at && used < sizeof result.text - 24)
            used += snprintf(result.text + used, sizeof result.text - used, "%s{%tx}", used ? " < " : "",
                             static_cast<const char*>(at) - 1 - model.base);  // in the line of the call
    return result;
}

Described described(const void* address) {
    Described result;
    const size_t offset = reinterpret_cast<uintptr_t>(address) - reinterpret_cast<uintptr_t>(shared_of(0));
    if (offset < launch.resident * launch.shared_stride) {
        const size_t slot = offset / launch.shared_stride;
        snprintf(result.text, sizeof result.text, "byte %zu of block %u's shared memory", offset % launch.shared_stride,
                 blocks[slot].warps->fibers->block.x);
    } else {
        snprintf(result.text, sizeof result.text, "%p", address);
    }
    return result;
}

[[noreturn, gnu::cold]] void fail_by(const char* rule, const void* address, bool writes, uint32_t site, bool wrote,
                                     const Event& other, const char* why) {
    const Fiber& me = self();
    const unsigned number = other.thread - 1;
    fail(weak_memory, "%s: block %u, thread %u %s %s at %s, which block %u, thread %u %s at %s: %s", rule, me.block.x,
         me.thread.x, writes ? "writes" : "reads", described(address).text, described(sites.sites[site]).text,
         number / launch.block, number % launch.block, wrote ? "has written" : "has read",
         described(sites.sites[other.site]).text, why);
}

const char* const nothing_orders = "nothing orders one before the other";

// ---- accesses

inline void check_read(Cell& cell, const void* address, const Use& use, const Knowledge& me, unsigned block) {
    const Event& write = cell.write;
    const bool of_other = write.thread && write.thread != me.number + 1;
    if (of_other && !me.now.knows(write.thread - 1, write.step) &&
        !morally_strong(cell.write_strength, write, use.strength, block))
        fail_by("race", address, false, use.site, true, write, nothing_orders);
    if (use.read_only) {
        if (write.thread)
            fail_by("read-only path", address, false, use.site, true, write, "ld.global.nc is for what no one writes");
        cell.read_only = true;
    }
    if (of_other && block_of(write) != block && !use.strength && !use.past_first_level &&
        !within(address, shared.data, shared.bytes))
        fail_by("first-level cache", address, false, use.site, true, write,
                "a plain load may have an older value of it from its multiprocessor's cache");

    const Event read = {me.number + 1, me.now.steps[me.number], use.site};
    const auto covers = [&](const Event& before, Strength strength) {  // who races with that, races with this
        const bool earlier = before.thread == read.thread || me.now.knows(before.thread - 1, before.step);
        return earlier && use.strength <= strength;
    };
    if (!cell.read.thread || covers(cell.read, cell.read_strength)) {
        cell.read = read;
        cell.read_strength = use.strength;
        return;
    }
    for (uint32_t i = cell.more_reads; i; i = more_reads.reads[i].next) {
        Read& other = more_reads.reads[i];
        if (!covers(other.event, other.strength)) continue;
        other.event = read;
        other.strength = use.strength;
        return;
    }
    const uint32_t place = more_reads.add({read, use.strength, cell.more_reads});
    if (!place) fail(no_launch, "no launch: too many reads for the model of memory");
    cell.more_reads = place;
}

inline void check_write(Cell& cell, const void* address, const Use& use, const Knowledge& me, unsigned block) {
    const auto hold = [&](const Event& event, Strength strength, bool wrote) {
        if (event.thread && event.thread != me.number + 1 && !me.now.knows(event.thread - 1, event.step) &&
            !morally_strong(strength, event, use.strength, block))
            fail_by("race", address, true, use.site, wrote, event, nothing_orders);
    };
    hold(cell.write, cell.write_strength, true);
    hold(cell.read, cell.read_strength, false);
    for (uint32_t i = cell.more_reads; i; i = more_reads.reads[i].next)
        hold(more_reads.reads[i].event, more_reads.reads[i].strength, false);
    if (cell.read_only)
        fail_by("read-only path", address, true, use.site, false, cell.read, "ld.global.nc is for what no one writes");
    more_reads.drop(cell.more_reads);
    cell.more_reads = 0;
    cell.read = {};
    cell.write = {me.number + 1, me.now.steps[me.number], use.site};
    cell.write_strength = use.strength;
}

void check(const void* address, uint32_t bytes, const Use& use) {
    Knowledge& me = mine();
    const unsigned block = self().block.x;
    const uintptr_t begin = reinterpret_cast<uintptr_t>(address);
    for (uint32_t i = 0; i < bytes; ++i) {
        Cell& cell = cell_of(begin + i);
        const void* byte = reinterpret_cast<const void*>(begin + i);
        if (use.reads) check_read(cell, byte, use, me, block);
        if (use.writes) check_write(cell, byte, use, me, block);
    }
    exchange(me, block, cell_of(begin), use.reads, use.writes, use.strength);
}

}  // namespace
