// Accesses to memory, which kernels compiled with -fsanitize=thread announce.
#pragma once
#include "fibers.h"

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
