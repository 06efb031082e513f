// Accesses to memory, which kernels compiled with -fsanitize=thread announce: recorded, and what the model of memory
// does with them.
#pragma once
#include "races.h"
#include "stale.h"

namespace {

struct Access {
    uint64_t instruction, address;
    uint32_t block, thread, bytes, writes;
};

struct {
    Access* to = nullptr;  // null: nothing is recorded
    size_t capacity = 0, count = 0;
} record;

inline void note(const void* address, uint32_t bytes, bool writes, const void* instruction) {
    if (record.count < record.capacity)
        record.to[record.count] = {reinterpret_cast<uint64_t>(instruction), reinterpret_cast<uint64_t>(address),
                                   self().block.x, self().thread.x, bytes, writes};
    ++record.count;
}

uint32_t site_of(const void* instruction) {
    const Knowledge& me = mine();
    Site site = {{instruction}};
    for (unsigned i = 1; i < depth_of_site; ++i)
        if (me.depth >= i && me.depth - i < most_calls) site.at[i] = me.calls[me.depth - i];
    return sites.number(site);
}

// Those of the thread itself and its place, and of the kernel's argument, are left out.
inline void announce(const void* address, uint32_t bytes, unsigned use, const void* instruction) {
    if (model.mode == stale) hide();
    if ((!record.to && !modelled()) || within(address, stacks.data, stacks.bytes) ||
        within(address, fibers.data, fibers.bytes) || within(address, params, sizeof params) || address == &simt_self)
        return;
    const bool reads = use & simt::reads, writes = use & simt::writes;
    if (record.to && !within(address, shared.data, shared.bytes)) {
        if (reads) note(address, bytes, false, instruction);
        if (writes) note(address, bytes, true, instruction);
    }
    if (!modelled()) return;
    const Strength strength = use & simt::strong_in_device ? of_device : use & simt::strong_in_block ? of_block : weak;
    const bool past_first_level = use & simt::past_first_level, read_only = use & simt::never_written;
    if (model.mode == checked)
        check(address, bytes, {reads, writes, strength, past_first_level, read_only, site_of(instruction)});
    else
        see(address, bytes, {reads, writes, strength, past_first_level, read_only, 0});
}

}  // namespace

// Volatile accesses are relaxed ones of the system's scope.
#define SIMT_ANNOUNCED(name, bytes, use)                                                  \
    extern "C" __attribute__((visibility("default"))) void __tsan_##name(void* address) { \
        announce(address, bytes, use, __builtin_return_address(0));                       \
    }
#define SIMT_ANNOUNCED_OF(bytes)                                                        \
    SIMT_ANNOUNCED(read##bytes, bytes, simt::reads)                                     \
    SIMT_ANNOUNCED(write##bytes, bytes, simt::writes)                                   \
    SIMT_ANNOUNCED(unaligned_read##bytes, bytes, simt::reads)                           \
    SIMT_ANNOUNCED(unaligned_write##bytes, bytes, simt::writes)                         \
    SIMT_ANNOUNCED(volatile_read##bytes, bytes, simt::reads | simt::strong_in_device)   \
    SIMT_ANNOUNCED(volatile_write##bytes, bytes, simt::writes | simt::strong_in_device)
SIMT_ANNOUNCED_OF(1)
SIMT_ANNOUNCED_OF(2)
SIMT_ANNOUNCED_OF(4)
SIMT_ANNOUNCED_OF(8)
SIMT_ANNOUNCED_OF(16)
#undef SIMT_ANNOUNCED_OF
#undef SIMT_ANNOUNCED

#pragma GCC visibility push(default)
extern "C" {
void __tsan_init() {}
void __tsan_func_entry(void* where_it_returns_to) {
    if (model.mode != checked) return;
    Knowledge& me = mine();
    if (me.depth < most_calls) me.calls[me.depth] = where_it_returns_to;
    ++me.depth;
}
void __tsan_func_exit() {
    if (model.mode == checked) --mine().depth;
}
void __tsan_read_range(void* address, size_t bytes) {
    announce(address, static_cast<uint32_t>(bytes), simt::reads, __builtin_return_address(0));
}
void __tsan_write_range(void* address, size_t bytes) {
    announce(address, static_cast<uint32_t>(bytes), simt::writes, __builtin_return_address(0));
}
void simt_access(const void* address, unsigned bytes, unsigned use, const void* instruction) {
    announce(address, bytes, use, instruction);
}

// Records up to `capacity` accesses from now on; null ends it. Gives how many there were since the last call.
size_t simt_record(void* to, size_t capacity) {
    const size_t before = record.count;
    record.to = static_cast<Access*>(to);
    record.capacity = capacity;
    record.count = 0;
    return before;
}

// How launches are executed from now on: a `Mode`.
void simt_model(unsigned mode) { model.mode = static_cast<Mode>(mode); }
}
#pragma GCC visibility pop
