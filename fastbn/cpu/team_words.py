"""What the team as Python sees it (`team`) and its compiled code (`kernels.team`) have in common."""

from __future__ import annotations

import platform
import sys
import time

# Numbers of system calls: futex, gettid.
CALLS = {"x86_64": (202, 186), "aarch64": (98, 178), "riscv64": (98, 178), "ppc64le": (221, 207)}
FUTEX, GETTID = CALLS.get(platform.machine(), (0, 0)) if sys.platform == "linux" else (0, 0)
POSSIBLE = FUTEX > 0 or sys.platform == "darwin"  # on this system: a constant in compiled code
MONOTONIC = getattr(time, "CLOCK_MONOTONIC", 1)

# The team's memory, in lines of 128 bytes (two of the processor's, which are fetched in pairs): the job, which stays
# as it is while it runs; its end; what the caller alone knows; then seven lines for each member, the caller first.
ENTRY, PARAMS, TASKS, CHUNK_COUNT, AT_ONCE, THREADS, STOP = range(0, 56, 8)
DONE, WAITING = range(128, 144, 8)  # chunks that workers have reported; whether the caller sleeps until they have
BUSY, COST, CREDIT, DEBT, BURST, ENDED, HIRED = range(256, 312, 8)
MEMBERS, MEMBER = 384, 896
TICKET, ASLEEP, CLOCK = 0, 128, 256
HANDLE, THREAD, INSIDE, SENT, AVERAGE, SPENT, CALLED, TEAM, NUMBER, FUTEXES = range(272, 352, 8)
OURS, THEIRS = 384, 512  # masks of processors: the caller's, and the one that a worker is sent to
MUTEX, CONDITION = 640, 768  # 64 and 48 bytes on macOS, 40 and 48 on Linux
