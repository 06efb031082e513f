// Threads that see of others only what they have to, by PTX's model: every other write stays in its thread's store
// buffer, or behind an old line of the reader's first-level cache. A read takes the newest value whose write comes
// before it in causality order. A strong read of a strong write does so every other time, so that who waits goes on;
// atomic operations take the last value. So kernels with races compute wrong numbers, or wait for ever; of others
// nothing changes but how often they wait. Fences of the device come in the order of execution (fence.sc), so that not
// every outcome that PTX allows is seen.
//
// Values are kept as bytes, a few for each. Memory has the last ones; an old one lies there for the time of a load.
#pragma once
#include "causality.h"

namespace {

constexpr size_t most_shown = 512;

struct {
    unsigned char* at;
    size_t bytes = 0;
    unsigned char last[most_shown];  // values
} shown;

inline void hide() {
    if (!shown.bytes) return;
    memcpy(shown.at, shown.last, shown.bytes);
    shown.bytes = 0;
}

inline bool visible(const Knowledge& me, uint32_t thread, uint32_t step) {
    return !thread || thread == me.number + 1 || me.now.knows(thread - 1, step);
}

// What threads have read strongly: of each place the last write, which they do not go back behind.
struct Seen {
    uint64_t address;
    uint32_t reader, writer, step;  // 0 is none, 1 the first of the grid
    bool waits;                     // the next read goes on
};

Seen all_seen[1 << 14];

// Null where another read has the place: its thread then sees the last value.
inline Seen* seen_before(const Knowledge& me, const void* address) {
    const uint64_t key = reinterpret_cast<uint64_t>(address);
    Seen& seen = all_seen[((key ^ static_cast<uint64_t>(me.number) << 32) * 0x9e3779b97f4a7c15ull) >> 50];
    if (!seen.reader) seen = {key, me.number + 1, 0, 0, false};
    return seen.address == key && seen.reader == me.number + 1 ? &seen : nullptr;
}

inline bool is_write(const Seen* seen, uint32_t writer, uint32_t step) {
    return seen && seen->writer == writer && seen->step == step;
}

// The value that the thread sees of a byte.
inline unsigned char seen_of(const Knowledge& me, const Cell& cell, unsigned char last, const Seen* seen) {
    const Event& write = cell.write;
    if (visible(me, write.thread, write.step) || is_write(seen, write.thread, write.step)) return last;
    const Versions& versions = shadow.versions_of(cell);
    for (unsigned i = 0; i < versions.count; ++i) {
        const uint32_t thread = versions.threads[i], step = versions.steps[i];
        if (visible(me, thread, step) || is_write(seen, thread, step)) return versions.values[i];
    }
    return versions.count ? versions.values[versions.count - 1] : last;
}

// Before a load. Whether it takes an old value.
inline bool show(const Knowledge& me, unsigned block, unsigned char* address, uint32_t bytes, const Use& use) {
    bool all_visible = true;
    for (uint32_t i = 0; i < bytes && all_visible; ++i) {
        const Event& write = cell_of(reinterpret_cast<uintptr_t>(address + i)).write;
        all_visible = visible(me, write.thread, write.step);
    }
    if (all_visible) return false;
    const Event& write = cell_of(reinterpret_cast<uintptr_t>(address)).write;
    Seen* seen = nullptr;
    if (morally_strong(cell_of(reinterpret_cast<uintptr_t>(address)).write_strength, write, use.strength, block)) {
        seen = seen_before(me, address);
        if (seen) seen->waits = !seen->waits;
        if (!seen || !seen->waits || is_write(seen, write.thread, write.step)) {
            if (seen) seen->writer = write.thread, seen->step = write.step;
            return false;
        }
    }
    shown.at = address;
    shown.bytes = bytes < most_shown ? bytes : most_shown;
    for (uint32_t i = 0; i < shown.bytes; ++i) {
        shown.last[i] = address[i];
        address[i] = seen_of(me, cell_of(reinterpret_cast<uintptr_t>(address + i)), address[i], seen);
    }
    return true;
}

// Before a store.
inline void keep(const Knowledge& me, Cell& cell, unsigned char value, Strength strength) {
    const uint32_t thread = me.number + 1, step = me.now.steps[me.number];
    if (cell.write.thread != thread || cell.write.step != step) {  // nobody need see what a step overwrites
        Versions& versions = shadow.versions_of(cell);
        versions.count = versions.count < most_versions ? versions.count + 1 : most_versions;
        for (unsigned i = versions.count - 1; i > 0; --i) {
            versions.threads[i] = versions.threads[i - 1];
            versions.steps[i] = versions.steps[i - 1];
            versions.values[i] = versions.values[i - 1];
        }
        versions.threads[0] = cell.write.thread, versions.steps[0] = cell.write.step, versions.values[0] = value;
    }
    cell.write = {thread, step, 0};
    cell.write_strength = strength;
}

void see(const void* address, uint32_t bytes, const Use& use) {
    Knowledge& me = mine();
    const unsigned block = self().block.x;
    unsigned char* data = static_cast<unsigned char*>(const_cast<void*>(address));
    if (use.writes) {
        for (uint32_t i = 0; i < bytes; ++i)
            keep(me, cell_of(reinterpret_cast<uintptr_t>(data + i)), data[i], use.strength);
    } else if (show(me, block, data, bytes, use)) {
        return;  // what is not seen hands on nothing
    }
    exchange(me, block, cell_of(reinterpret_cast<uintptr_t>(data)), use.reads, use.writes, use.strength);
}

}  // namespace
