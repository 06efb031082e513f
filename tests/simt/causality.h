// What PTX's memory consistency model has before what, over the threads of a launch: causality order, as vector clocks.
// A thread's clock says what comes before its next access:
//
// - its own accesses before;
// - with a barrier of a block, a cluster or a warp (__syncwarp), what all that met there did before. Shuffles and votes
//   order nothing. A cluster's barrier orders by `arrive.release` and `wait.acquire`;
// - with a fence, what others had done before their fence, if since then they have written strongly what this thread
//   has read strongly before its own, both fences wide enough for both threads. Atomic operations hand on what they
//   have read.
//
// Strong are atomic operations, within their scope, and volatile accesses, within the system. A strong write alone
// hands on nothing, nor does a barrier of a block what one of its threads has read strongly. A fence of a block is
// forgotten where an atomic operation of another block hands on its message, which PTX does not say.
#pragma once
#include "cells.h"
#include "clocks.h"

#include <dlfcn.h>

namespace {

// What launches are executed by: threads that see all at once; the same, held against the model; threads that see of
// others only what they have to.
enum Mode : unsigned { interleaved, checked, stale };

constexpr unsigned most_calls = 32;

struct Knowledge {  // of a resident thread
    unsigned number;  // in the grid
    Clock now;
    Clock released[2];  // by its last fence, to its block and to the device
    Clock received[2];  // by strong reads, until a fence of that scope
    const void* calls[most_calls];  // where it goes on when the functions that it is in return
    unsigned depth;
};

struct Message {
    Clock of_block, of_device;
    unsigned block;  // that `of_block` is for
    bool mixed;      // `of_device` has what other blocks released
};

struct Meeting {  // at a cluster's barrier: what this round and the one before have brought
    Clock brought[2];
};

constexpr unsigned most_messages = 1024;

struct {
    Mode mode = interleaved;  // of launches from now on
    Kept<Knowledge> threads;
    Kept<Meeting> meetings;
    Clock everyone;  // room for a barrier's
    Clock fences;    // what is before the last fence of the device, where these have one order
    const char* base;  // of the kernel's library
    Message messages[most_messages];
    unsigned message_count;
} model;

inline bool modelled() { return model.mode != interleaved; }

Knowledge& knowledge_of(const Fiber& fiber) { return model.threads[&fiber - fibers.data]; }

inline Knowledge& mine() { return knowledge_of(self()); }

// ---- accesses

inline unsigned block_of(const Event& event) { return (event.thread - 1) / launch.block; }

inline bool morally_strong(Strength one, const Event& by, Strength other, unsigned block) {
    return one && other && ((one == of_device && other == of_device) || block_of(by) == block);
}

struct Use {
    bool reads, writes;
    Strength strength;
    bool past_first_level, read_only;
    uint32_t site;
};

inline Cell& cell_of(uintptr_t address) {
    Cell* page = shadow.page(address / page_size);
    if (!page) fail(no_launch, "no launch: too much memory for the model of it");
    return page[address % page_size];
}

// ---- messages: what strong accesses hand on

void receive(Knowledge& me, unsigned block, const Message& message) {
    if (message.block == block) {
        for (Clock& received : me.received) received.join(message.of_block);
        if (!message.mixed) me.received[0].join(message.of_device);
    }
    me.received[1].join(message.of_device);
}

void send(const Knowledge& me, unsigned block, Cell& cell, bool atomic) {
    const bool handed_on = atomic && cell.message;
    if (!cell.message) {
        if (model.message_count == most_messages) fail(no_launch, "no launch: too many places are written strongly");
        cell.message = static_cast<uint16_t>(model.message_count++);
    }
    Message& message = model.messages[cell.message];
    const bool same = handed_on && message.block == block;
    message.mixed = handed_on && (message.mixed || !same);
    if (!same) message.of_block.clear();
    if (!handed_on) message.of_device.clear();
    message.of_block.join(me.released[0]);
    message.of_device.join(me.released[1]);
    message.block = block;
}

// After an access, whose first byte is the cell's.
void exchange(Knowledge& me, unsigned block, Cell& cell, bool reads, bool writes, bool strong) {
    if (strong && reads && cell.message) receive(me, block, model.messages[cell.message]);
    if (strong && writes) send(me, block, cell, reads);
    if (!strong && writes) cell.message = 0;
}

// ---- what orders accesses

inline void next_step(Knowledge& thread) { ++thread.now.steps[thread.number]; }

void fence(bool of_device) {
    Knowledge& me = mine();
    for (unsigned scope = 0; scope <= (of_device ? 1 : 0); ++scope) {
        me.now.join(me.received[scope]);
        me.received[scope].clear();
    }
    if (of_device && model.mode == stale) {  // fence.sc; no race is excused by an order that another run may not have
        me.now.join(model.fences);
        model.fences.join(me.now);
    }
    for (unsigned scope = 0; scope <= (of_device ? 1 : 0); ++scope) me.released[scope].set(me.now);
    next_step(me);
}

// All these fibers have met.
template <class EachFiber>
void met(EachFiber each) {
    model.everyone.clear();
    each([](const Fiber& fiber) { model.everyone.join(knowledge_of(fiber).now); });
    each([](const Fiber& fiber) {
        Knowledge& thread = knowledge_of(fiber);
        thread.now.set(model.everyone);
        next_step(thread);
    });
}

void met(const Block& block) {
    met([&](auto visit) {
        for (unsigned i = 0; i < block.threads; ++i) visit(block.warps->fibers[i]);
    });
}

void met(const Warp& warp, unsigned mask) {
    met([&](auto visit) {
        for (unsigned rest = mask; rest; rest &= rest - 1) visit(warp.fibers[__builtin_ctz(rest)]);
    });
}

Clock& brought(const Cluster& cluster, unsigned round) {
    return model.meetings[&cluster - clusters.data].brought[round % 2];
}

void arrive(const Cluster& cluster, bool releases) {
    Knowledge& me = mine();
    brought(cluster, cluster.round).join(releases ? me.now : me.released[1]);
    next_step(me);
}

// All have arrived, so all have waited for the round before.
void begin_next_round(const Cluster& cluster) { brought(cluster, cluster.round).clear(); }

void acquire(const Cluster& cluster, unsigned round) { mine().now.join(brought(cluster, round)); }

// ---- launches

bool begin_model() {
    const size_t resident = static_cast<size_t>(launch.resident) * launch.block;
    const size_t meetings = launch.resident / launch.cluster;
    const size_t needed = resident * 5 + meetings * 2 + 2 + 2 * most_messages;
    sites.clear();
    Dl_info found;
    dladdr(reinterpret_cast<const void*>(launch.kernel), &found);
    model.base = static_cast<const char*>(found.dli_fbase);
    if (!clocks.reserve(static_cast<size_t>(launch.grid) * launch.block, needed) ||
        !model.threads.reserve(resident * sizeof(Knowledge)) || !model.meetings.reserve(meetings * sizeof(Meeting)) ||
        !shadow.clear(model.mode == stale) || !more_reads.clear())
        return false;
    model.everyone = clocks.make(), model.fences = clocks.make();
    for (Message& message : model.messages) message = {clocks.make(), clocks.make(), 0, false};
    model.message_count = 1;  // 0 is none
    for (size_t i = 0; i < meetings; ++i) model.meetings[i] = {{clocks.make(), clocks.make()}};
    for (size_t i = 0; i < resident; ++i) {
        Knowledge& thread = model.threads[i];
        thread.now = clocks.make();
        for (Clock& clock : thread.released) clock = clocks.make();
        for (Clock& clock : thread.received) clock = clocks.make();
    }
    return true;
}

// The resident blocks are new.
void begin_blocks() {
    shadow.forget(shared.data, shared.bytes);
    for (size_t i = 0; i < launch.resident / launch.cluster; ++i)
        for (Clock& clock : model.meetings[i].brought) clock.clear();
    for (size_t i = 0; i < static_cast<size_t>(launch.resident) * launch.block; ++i) {
        Knowledge& thread = model.threads[i];
        const Fiber& fiber = fibers[i];
        thread.number = fiber.block.x * launch.block + fiber.thread.x;
        thread.depth = 0;
        thread.now.clear();
        for (Clock& clock : thread.released) clock.clear();
        for (Clock& clock : thread.received) clock.clear();
        thread.now.first = thread.number, thread.now.last = thread.number + 1;
        next_step(thread);
    }
}

}  // namespace
