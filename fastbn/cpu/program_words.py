"""What programs (`program`) and the code that runs them (`kernels.calls`, `kernels.signatures`) have in common."""

from __future__ import annotations

from typing import NamedTuple

# Where an argument comes from. CONSTANT: itself. NUMBER: a number given at each call. DATA, SCRATCH: an array given at
# each call, or the scratch memory, so many bytes from the first element. AT_LEAST: whether a number given is at least
# so large. TEMPORARY: scratch memory that one launch alone uses. INTEGERS: constants behind the program's words.
# FUNCTION: the address of a kernel that the launched one calls. `_prepare` makes CONSTANT or SCRATCH of the last three.
CONSTANT, NUMBER, DATA, SCRATCH, AT_LEAST, TEMPORARY, INTEGERS, FUNCTION = range(8)
MOST_ARGUMENTS = 32
ON_STACK = 3 << 10  # bytes of scratch memory at most; with more a frame exceeds 4 kB, which Windows makes a call for

# The interpreter's lock is let go of by calls with so much work, so that other Python threads run meanwhile. Below
# KEPT_WORK, 12 us, handing it over takes longer than that saves: eight threads together took 1.3 to 1.5 times one's
# with 9 us, 0.7 to 0.95 from 14 us on. But a thread that computes in Python gives the lock back only after 5 ms, a
# hundred times as long as such calls: below LONG_WORK they measure how long they wait for it, and when waits lately
# were more than WORTH times as long as the work done without it, calls keep it for REST times as long. Threads that
# wait for it at once, for each other among others, share the time that is lost.
KEPT_WORK, LONG_WORK = 3 << 15, 1 << 23
KEPT_UNTIMED = 1 << 18  # where the system's clock is not asked
NEVER, ALWAYS = 0, 1  # release it; or the address of `_lock`
WORTH, REST = 4, 8
LONG_WAIT, MOST_WON = 4_000_000, 20_000_000  # ns: lost at once; of time that was well spent, as much as counts

# The words of a program, in bytes: its header, `VectorWords`, and each launch's `LaunchWords` and `SourceWords`.
TEAM, RELEASES, SAVE_THREAD, RESTORE_THREAD, INC_REF, NO_MEMORY, MALLOC, FREE = range(0, 64, 8)
SCRATCH_BYTES, VECTORS, LAUNCHES, HEADER = range(64, 96, 8)
NOWHERE = -1  # as a slot: no array is given; as the place of a copy: the scratch memory
VECTOR_KINDS = ("none", "f8*", "f4*", "u2*", "i2*")  # what a vector of parameters may be


class VectorWords(NamedTuple):
    """Words: a vector of parameters that is copied."""

    slot: int
    """Of the array that is given, or `NOWHERE`."""
    kind: int
    """An index into `VECTOR_KINDS`."""
    default: int
    """Bits of the number in place of an array."""
    length: int
    to: int
    """The slot of the array that it is copied to, or `NOWHERE`: the scratch memory."""
    start: int
    """Where in that, in bytes."""


class LaunchWords(NamedTuple):
    """Words: a kernel's address, how many tasks it has, for how many threads; how many `SourceWords` follow."""

    entry: int
    tasks: int
    threads: int
    arguments: int
    lately: int = 0
    """The ns that it took."""


class SourceWords(NamedTuple):
    """Words: where an argument comes from."""

    source: int
    slot: int
    extra: int


# Objects and functions of the interpreter, in the words that `signatures` has.
ARRAY_TYPE, NONE_AT, TRUE_AT, FALSE_AT, NEW_BYTES, INCREASE = range(0, 48, 8)
