// Vector clocks: of each thread of the grid, up to which of its steps a thread knows what it did. A step ends where a
// thread releases what it has done.
//
// After: Lamport (1978); Flanagan & Freund, FastTrack (2009).
#pragma once
#include "fibers.h"

namespace {

struct Clock {
    uint32_t* steps;       // of each thread of the grid; 0 where nothing is known
    unsigned first, last;  // threads outside of these have 0

    bool knows(unsigned thread, uint32_t step) const { return step <= steps[thread]; }

    void clear() {
        if (first < last) memset(steps + first, 0, (last - first) * sizeof *steps);
        first = last = 0;
    }

    void join(const Clock& other) {
        if (other.first >= other.last) return;
        const bool empty = first >= last;
        first = empty || other.first < first ? other.first : first;
        last = empty || other.last > last ? other.last : last;
        for (unsigned i = other.first; i < other.last; ++i)
            steps[i] = other.steps[i] > steps[i] ? other.steps[i] : steps[i];
    }

    void set(const Clock& other) {
        clear();
        if (other.first >= other.last) return;
        first = other.first, last = other.last;
        memcpy(steps + first, other.steps + first, (last - first) * sizeof *steps);
    }
};

// Where clocks lie, a launch's one behind the other. Untouched memory is zero and takes no room.
struct {
    Kept<uint32_t> memory;
    size_t threads = 0, used = 0, count = 0;

    bool reserve(size_t threads_of_grid, size_t clocks) {
        threads = threads_of_grid, used = 0, count = clocks;
        const size_t bytes = threads * clocks * sizeof(uint32_t);
        if (bytes >> 36 || !memory.reserve(bytes)) return false;
        madvise(memory.data, memory.bytes, MADV_DONTNEED);
        return true;
    }

    bool full() const { return used == count; }

    Clock make() { return {memory.data + threads * used++, 0, 0}; }
} clocks;

}  // namespace
