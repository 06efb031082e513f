// Shared memory: that of the resident blocks, with guards in front, between and behind.
#pragma once
#include "fibers.h"

namespace {

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

}  // namespace
