// What is known of every byte of memory: who wrote it last, who has read it since, and from which lines of a kernel.
#pragma once
#include "fibers.h"

namespace {

// ---- lines of a kernel: an instruction, and the calls that led there

constexpr unsigned depth_of_site = 4;

struct Site {
    const void* at[depth_of_site];  // the innermost first
};

struct {
    Site sites[1 << 14];

    void clear() { memset(sites, 0, sizeof sites); }

    // The number of a site, by hashing; 0 where there is no room.
    uint32_t number(const Site& site) {
        uint64_t hash = 0;
        for (const void* at : site.at) hash = (hash ^ reinterpret_cast<uint64_t>(at)) * 0x9e3779b97f4a7c15ull;
        constexpr uint32_t size = sizeof sites / sizeof *sites;
        for (uint32_t i = hash >> 50, tried = 0; tried < size - 1; ++tried, i = (i + 1) % size) {
            if (i == 0) continue;
            if (sites[i].at[0] && memcmp(&sites[i], &site, sizeof site) == 0) return i;
            if (sites[i].at[0]) continue;
            sites[i] = site;
            return i;
        }
        return 0;
    }
} sites;

// ---- bytes

// How far an access that takes part in the order of all is seen: PTX's strong operations, and their scopes.
enum Strength : uint8_t { weak, of_block, of_device };

struct Event {  // the last write of a byte, or a read since
    uint32_t thread, step, site;  // thread 0 is none, 1 the first of the grid
};

struct Cell {
    Event write, read;
    uint32_t more_reads;  // that no barrier orders before the first
    uint16_t message;     // of a strong write: what its reader may learn
    Strength write_strength : 2, read_strength : 2;
    bool read_only : 1;   // it was read by ld.global.nc
};

// Values that a byte had before the last, and who had written them, the newest first.
constexpr unsigned most_versions = 3;

struct Versions {
    uint32_t threads[most_versions], steps[most_versions];
    uint8_t values[most_versions], count;
};

struct Read {
    Event event;
    Strength strength;
    uint32_t next;
};

constexpr size_t page_size = 4096;

// Pages of cells, found by hashing. They are zero at first.
struct Shadow {
    static constexpr uint32_t most = 1 << 14, slots = 1 << 15;

    Kept<Cell> cells;
    Kept<Versions> versions;  // where values are kept
    uint64_t keys[slots];
    uint32_t places[slots], count;
    uint64_t last_key;
    Cell* last;
    bool keeps_values;

    bool clear(bool with_values) {
        if (!cells.reserve(most * page_size * sizeof(Cell))) return false;
        if (with_values && !versions.reserve(most * page_size * sizeof(Versions))) return false;
        madvise(cells.data, count * page_size * sizeof(Cell), MADV_DONTNEED);
        if (versions.data) madvise(versions.data, count * page_size * sizeof(Versions), MADV_DONTNEED);
        keeps_values = with_values;
        memset(keys, 0, sizeof keys);
        count = 0, last_key = 0;
        return true;
    }

    // Of the page, or null where there is no room.
    Cell* page(uint64_t key) {
        if (key == last_key) return last;
        uint32_t slot = static_cast<uint32_t>(key * 0x9e3779b97f4a7c15ull >> 49);
        while (keys[slot] && keys[slot] != key) slot = (slot + 1) % slots;
        if (!keys[slot]) {
            if (count == most) return nullptr;
            keys[slot] = key;
            places[slot] = count++;
        }
        last_key = key;
        return last = &cells[places[slot] * page_size];
    }

    Versions& versions_of(const Cell& cell) { return versions[&cell - cells.data]; }

    // What lies there is another block's from now on.
    void forget(const void* data, size_t bytes) {
        const uint64_t begin = reinterpret_cast<uint64_t>(data) / page_size;
        const uint64_t end = (reinterpret_cast<uint64_t>(data) + bytes + page_size - 1) / page_size;
        for (uint32_t slot = 0; slot < slots; ++slot)
            if (keys[slot] >= begin && keys[slot] < end) {
                memset(&cells[places[slot] * page_size], 0, page_size * sizeof(Cell));
                if (keeps_values) memset(&versions[places[slot] * page_size], 0, page_size * sizeof(Versions));
            }
    }
} shadow;

// Further reads of cells, in lists.
struct MoreReads {
    static constexpr uint32_t most = 1 << 24;

    Kept<Read> reads;
    uint32_t used, free;

    bool clear() {
        used = 1, free = 0;  // 0 ends a list
        return reads.reserve(most * sizeof(Read));
    }

    // 0 where there is no room.
    uint32_t add(const Read& read) {
        uint32_t place = free;
        if (place)
            free = reads[place].next;
        else if (used < most)
            place = used++;
        if (place) reads[place] = read;
        return place;
    }

    void drop(uint32_t list) {
        while (list) {
            const uint32_t next = reads[list].next;
            reads[list].next = free;
            free = list;
            list = next;
        }
    }
} more_reads;

}  // namespace
