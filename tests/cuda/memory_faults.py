"""Faults in what orders memory between threads, found by the model of memory (tests/simt/races.h) in every schedule.

Most pass where threads see at once what others write. See `tests.cuda.faults`.
"""

from tests.cuda.fault import Fault

RACE, CACHE, PATH = "race", "first-level cache", "read-only path"

RELEASE = "        __threadfence();\n        atomicAdd(counter, 1u);\n"
POLL = "        while (static_cast<int>(*reinterpret_cast<volatile unsigned*>(counter) - everyone) < 0) backoff();\n"
ACQUIRE = POLL + "        __threadfence();\n"
COUNTER = "*reinterpret_cast<volatile unsigned*>(counter)"
READ = "*reinterpret_cast<const volatile double*>(at)"
CLUSTER = "    cluster_barrier();\n"
ARRIVE, WAIT = "barrier.cluster.arrive.release;\\n\\t", "barrier.cluster.wait.acquire;"

BARRIER = [  # of a group of blocks, in tile.cuh: what is wrong, a text and what stands in its place, and the rule
    ("releases nothing", RELEASE, RELEASE.replace("        __threadfence();\n", ""), RACE),
    ("releases to its block", RELEASE, RELEASE.replace("fence", "fence_block"), RACE),
    ("releases after it has arrived", RELEASE, "        atomicAdd(counter, 1u);\n        __threadfence();\n", RACE),
    ("arrives without an atomic operation", "atomicAdd(counter, 1u)", "*counter += 1", RACE),
    ("arrives by a load and a store", "atomicAdd(counter, 1u)", f"{COUNTER} = {COUNTER} + 1", RACE),
    ("arrives within its block", "atomicAdd(counter, 1u)", "atomicAdd_block(counter, 1u)", RACE),
    ("polls by plain loads", COUNTER, "*counter", RACE),
    ("polls past the first-level cache alone", COUNTER, "__ldcg(counter)", RACE),
    ("acquires nothing", ACQUIRE, POLL, RACE),
    ("acquires from its block", ACQUIRE, ACQUIRE.replace("fence", "fence_block"), RACE),
    ("acquires before it has waited", ACQUIRE, "        __threadfence();\n" + POLL, RACE),
    ("does not wait", ACQUIRE, "        __threadfence();\n", RACE),
    ("arrives before its threads", "#else\n    __syncthreads();\n", "#else\n", RACE),
    (
        "one thread waits",
        "        __threadfence();\n    }\n    __syncthreads();",
        "        __threadfence();\n    }",
        RACE,
    ),
    ("is the block's", "#else\n    __syncthreads();\n    if (threadIdx.x == 0) {", "#else\n    if (false) {", RACE),
    ("values of others by plain loads", READ, "*at", CACHE),
    ("values of others by ld.global.nc", READ, "__ldg(at)", PATH),
]

CLUSTERS = [  # the barrier of a cluster: in whose text; None: the kernel's
    ("does not exist", None, CLUSTER, "", RACE),
    ("is the block's", None, CLUSTER, "    __syncthreads();\n", RACE),
    ("is the block's, between fences", None, CLUSTER, "    __threadfence(), __syncthreads(), __threadfence();\n", RACE),
    ("relaxed", "device.cuh", "arrive.release", "arrive.relaxed", RACE),
    ("does not wait", "device.cuh", ARRIVE + WAIT, ARRIVE, RACE),
    ("values of others by plain loads", None, READ, "*at", CACHE),
]

CALLS = {  # of a group's barrier
    "forward": ("write_partials(p, tile, split);\n", "merge_piece(p, tile, p.splits, q);\n"),
    "backward": ("write_sums(p, tile, split);\n", "add_piece(p, tile, p.splits, q);\n"),
}
CALL = "            group_barrier(p, ++round);\n"

WRITTEN_PARTS = "= partials[ch];\n    __syncthreads();\n    if (WARPS == 1) return;"
WRITTEN_SUMS = "* WARPS] = sums[ch];\n    __syncthreads();\n    if (WARPS == 1) return;"
COEFFICIENTS = "    }\n    __syncthreads();\n#pragma unroll\n    for (int ch = 0; ch < CHANNELS; ++ch) affine"
NUMBERS = "    __syncthreads();\n    fetch_numbers(tile, xhat_of_channels(), xhat);"

BLOCKS = [  # barriers of a block
    ("block: parts read before they are written", "statistics", WRITTEN_PARTS, "moments, rows"),
    ("block: results read before they are written", "statistics",
     "q < width) results[q] = whole;\n    }\n    __syncthreads();", "moments, columns"),
    ("block: sums read before they are written", "grad_sums", WRITTEN_SUMS, "parts, rows"),
    ("block: sums of the next piece", "backward", "threadIdx.x]);\n    __syncthreads();",
     "backward, cooperative, tall columns"),
    ("block: coefficients read before they are written", "normalize", COEFFICIENTS, "forward, two passes"),
    ("block: coefficients of the tile before", "forward", COEFFICIENTS,
     "forward, cooperative, blocks take several tiles"),
    ("block: numbers read before they are written", "grad_sums", NUMBERS, "parts, columns"),
    ("block: numbers of the tile before", "backward", NUMBERS, "backward, cooperative, blocks take several tiles"),
    ("block: dx before its coefficients", "backward", "        __syncthreads();\n        Linear linear[CHANNELS];",
     "backward, block, rows"),
    ("block: dx of a second pass before its coefficients", "grad_input",
     "given_sums(p, kept), of);\n    }\n    __syncthreads();", "backward, two passes"),
    ("runs: parts read before they are written", "statistics",
     "scratch[ch * THREADS + threadIdx.x] = partials[ch];\n    __syncthreads();", "moments, runs"),
    ("runs: results read before they are written", "statistics",
     "if (threadIdx.x % 32 == 0) results[q] = whole;\n    }\n    __syncthreads();", "moments, runs"),
    ("runs: sums read before they are written", "backward",
     "scratch[ch * THREADS + threadIdx.x] = sums[ch];\n    __syncthreads();", "backward, cooperative, runs"),
    ("runs: sums of a channel read before they are written", "backward",
     "if (threadIdx.x % 32 == 0) results[q] = whole;\n    }\n    __syncthreads();", "backward, cooperative, runs"),
]  # fmt: skip

FAULTS = [
    *(
        Fault(f"barrier of a group: {name}", kernel, text, wrong, f"{kernel}, cooperative", rule)
        for kernel in CALLS
        for name, text, wrong, rule in BARRIER
    ),
    *(
        Fault(f"barrier of a cluster: {name}", where or kernel, text, wrong, f"{kernel}, cluster", rule)
        for kernel in CALLS
        for name, where, text, wrong, rule in CLUSTERS
        if where is None or kernel == "forward"
    ),
    *(
        Fault(f"{strategy}, no barrier {when}", kernel, before + CALL, before, f"{kernel}, {strategy}", RACE)
        for kernel, texts in CALLS.items()
        for strategy in ("cooperative", "cluster")
        for before, when in zip(texts, ("behind parts", "behind merges"), strict=True)
    ),
    Fault(
        "barrier of a group: arrives before other warps",
        "forward",
        "#else\n    __syncthreads();\n",
        "#else\n    __syncwarp();\n",
        "forward, cooperative, wide columns",
        RACE,
    ),
    *(
        Fault(name, kernel, text, text.replace("    __syncthreads();", ""), run, RACE)
        for name, kernel, text, run in BLOCKS
    ),
]
