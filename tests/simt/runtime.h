// What the scheduler (runtime.cpp) and the kernels' header (emulation.h) share.
#pragma once

typedef decltype(sizeof 0) size_t;

namespace simt {

struct Index {
    unsigned x;  // blocks and grids have one dimension: y and z do not compile
};

// What a kernel reads of its own thread.
struct Thread {
    Index thread, block, block_size, grid_size;
    unsigned char* shared;
};

// The collectives of a warp. Lanes meet only in the same one, with values of the same size.
enum Collective : unsigned { syncwarp, ballot, any, all, shuffle, shuffle_xor, shuffle_down, shuffle_up };
constexpr unsigned eight_bytes = 8;  // added to a shuffle

// What an access to memory is. Strong ones are those of PTX, in their scope.
enum Use : unsigned {
    reads = 1,
    writes = 2,
    strong_in_block = 4,
    strong_in_device = 8,
    past_first_level = 16,  // ld.cg
    never_written = 32      // ld.global.nc
};

}  // namespace simt

#pragma GCC visibility push(default)
extern "C" {
extern simt::Thread* simt_self;  // the thread that runs
void simt_block_barrier();
void simt_cluster_arrive(bool releases);
void simt_cluster_wait();  // acquires
unsigned char* simt_shared_of(unsigned rank);  // of that block of the cluster
void simt_fence(bool of_device);               // else of the block
void simt_access(const void* address, unsigned bytes, unsigned use, const void* instruction);
void simt_syncwarp(unsigned mask);
unsigned simt_vote(unsigned collective, unsigned mask, bool predicate);  // the lanes whose predicate holds
unsigned long long simt_shuffle(unsigned collective, unsigned mask, unsigned long long bits, unsigned source);
void simt_spin();                // goes on when no other thread can; too often in vain is an error
void simt_atomic(bool changes);  // the same after an atomic operation, whose changes are not in vain
[[noreturn]] void simt_trap();
[[noreturn]] void simt_misaligned(const void* address, unsigned alignment);

// Gives 0, or an error's kind and message. `resident` blocks run together and divide the grid; `cluster` blocks share a
// barrier and divide those. One launch at a time.
int simt_launch(void (*kernel)(const void*), const void* params, size_t params_bytes, unsigned grid, unsigned block,
                size_t shared_bytes, unsigned resident, unsigned cluster, unsigned schedule, char* message,
                size_t message_size);
}
#pragma GCC visibility pop
