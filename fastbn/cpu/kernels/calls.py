"""From a call of a built-in function to its kernels: `fastbn.cpu.program` lays out what is read here.

Python calls it as it calls its own functions in C, so the arrays come as objects; what is read of them has a fixed
place in every object (`fastbn.cpu.objects`). All launches of a call run before it returns.
"""

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from fastbn.cpu.kernels.compiler import inline, offsets, plain
from fastbn.cpu.kernels.pointers import value
from fastbn.cpu.kernels.team import add, load, nanoseconds, run_tasks, store
from fastbn.cpu.objects import DATA_AT, FLOAT_AT
from fastbn.cpu.program_words import (
    ALWAYS,
    AT_LEAST,
    DATA,
    FREE,
    HEADER,
    INC_REF,
    LAUNCHES,
    LONG_WAIT,
    MALLOC,
    MOST_ARGUMENTS,
    MOST_WON,
    NEVER,
    NO_MEMORY,
    NOWHERE,
    NUMBER,
    ON_STACK,
    RELEASES,
    REST,
    RESTORE_THREAD,
    SAVE_THREAD,
    SCRATCH,
    SCRATCH_BYTES,
    TEAM,
    VECTOR_KINDS,
    VECTORS,
    WORTH,
    LaunchWords,
    SourceWords,
    VectorWords,
)  # fmt: skip
from fastbn.cpu.team_words import POSSIBLE

word = types.int64
I64 = ir.IntType(64)
STACK = ON_STACK // 8
CLOCK = 2  # words of a clock
VECTOR, LAUNCH, SOURCE = map(offsets, (VectorWords, LaunchWords, SourceWords))
OF_VECTOR, OF_LAUNCH, OF_SOURCE = (8 * len(record) for record in (VECTOR, LAUNCH, SOURCE))  # bytes
F8, F4, U2, I2 = (VECTOR_KINDS.index(kind) for kind in ("f8*", "f4*", "u2*", "i2*"))


# --- instructions -----------------------------------------------------------------------------------------------------


@intrinsic(prefer_literal=True)
def reserve(typing, words):
    """The address of so many words on the stack, from the start of a cache line on, until the function returns.

    Or of a word for each of some `offsets`.
    """
    count = len(words) if isinstance(words, types.BaseTuple) else words.literal_value

    def codegen(context, builder, signature, values):
        place = cgutils.alloca_once(builder, I64, size=count)
        place.align = 64
        return builder.ptrtoint(place, I64)

    return word(words), codegen


@intrinsic
def invoke(typing, function, argument):
    """Call a function of the interpreter at an address; one without parameters ignores the argument."""

    def codegen(context, builder, signature, values):
        pointer = builder.inttoptr(values[0], ir.FunctionType(I64, [I64]).as_pointer())
        return builder.call(pointer, values[1:])

    return word(word, word), codegen


@intrinsic
def as_double(typing, bits):
    """The number with these bits."""

    def codegen(context, builder, signature, values):
        return builder.bitcast(values[0], ir.DoubleType())

    return types.float64(word), codegen


def _pointer_to(dtype):
    @intrinsic
    def pointer(typing, address):
        def codegen(context, builder, signature, values):
            return builder.inttoptr(values[0], context.get_value_type(signature.return_type))

        return types.CPointer(dtype)(word), codegen

    return pointer


doubles, floats, halves, bfloats = map(_pointer_to, (types.float64, types.float32, types.uint16, types.int16))


# --- a call -----------------------------------------------------------------------------------------------------------


@inline
def data_of(args, slot):
    """The address of the first element of an array that was given."""
    return load(load(args + slot) + DATA_AT)


@inline
def number_of(args, slot):
    """The bits of a number that was given."""
    return load(load(args + slot) + FLOAT_AT)


@inline
def fill_vector(args, scratch, at):
    """A vector of float64 from one of any dtype, or from its default."""
    slot, kind, default = load(at + VECTOR.slot), load(at + VECTOR.kind), load(at + VECTOR.default)
    count, to, start = load(at + VECTOR.length), load(at + VECTOR.to), load(at + VECTOR.start)
    out = doubles((scratch if to == NOWHERE else data_of(args, to)) + start)
    given = 0 if slot == NOWHERE else data_of(args, slot)
    for i in range(count):
        if kind == F8:
            out[i] = value(doubles(given), i)
        elif kind == F4:
            out[i] = value(floats(given), i)
        elif kind == U2:
            out[i] = value(halves(given), i)
        elif kind == I2:
            out[i] = value(bfloats(given), i)
        else:
            out[i] = as_double(default)


@inline
def argument(args, scratch, at):
    """A word of a kernel's arguments."""
    source, slot, extra = load(at + SOURCE.source), load(at + SOURCE.slot), load(at + SOURCE.extra)
    if source == DATA:
        return data_of(args, slot) + extra
    if source == NUMBER:
        return number_of(args, slot)
    if source == SCRATCH:
        return scratch + extra
    if source == AT_LEAST:
        return 1 if as_double(number_of(args, slot)) >= as_double(extra) else 0
    return extra


@inline
def release(words, clock):
    """Let go of the interpreter's lock, if this call is to: what `take_back` wants, a thread or 0, and the time."""
    releases, began = load(words + RELEASES), 0
    if releases == NEVER:
        return 0, began
    if POSSIBLE and releases != ALWAYS:
        began = nanoseconds(clock)
        if began < load(releases):
            return 0, began
    return invoke(load(words + SAVE_THREAD), 0), began


@inline
def take_back(words, thread, clock, began):
    """Have the lock again. Where that has taken too long lately, calls that need not release it keep it for a while."""
    releases, before = load(words + RELEASES), 0
    balance, waiting = releases + 8, releases + 16
    if POSSIBLE and releases != ALWAYS:
        before = nanoseconds(clock)
        add(waiting, 1)
    invoke(load(words + RESTORE_THREAD), thread)
    if POSSIBLE and releases != ALWAYS:
        waited = (nanoseconds(clock) - before) // max(1, add(waiting, -1))
        lost = max(-MOST_WON, load(balance) + waited - WORTH * (before - began))
        if lost > LONG_WAIT:
            store(releases, nanoseconds(clock) + REST * lost)
            lost = 0
        store(balance, lost)


@plain
def call(me, args, count):
    """``PyObject *call(PyObject *self, PyObject *const *args, Py_ssize_t nargs)``; self is the array of its words."""
    words = load(me + DATA_AT)
    scratch, taken = reserve(STACK), 0
    if load(words + SCRATCH_BYTES) > ON_STACK:
        taken = invoke(load(words + MALLOC), load(words + SCRATCH_BYTES) + 64)
        if taken == 0:
            return invoke(load(words + NO_MEMORY), 0)
        scratch = taken + 63 & ~63
    clock = reserve(CLOCK)
    thread, began = release(words, clock)
    at = words + HEADER
    for _ in range(load(words + VECTORS)):
        fill_vector(args, scratch, at)
        at += OF_VECTOR
    params = reserve(MOST_ARGUMENTS)
    for _ in range(load(words + LAUNCHES)):
        entry, tasks, num_threads = load(at + LAUNCH.entry), load(at + LAUNCH.tasks), load(at + LAUNCH.threads)
        end, lately = load(at + LAUNCH.arguments), at + LAUNCH.lately
        at += OF_LAUNCH
        for i in range(end):
            store(params + 8 * i, argument(args, scratch, at))
            at += OF_SOURCE
        run_tasks(load(words + TEAM), entry, params, tasks, num_threads, lately)
    if thread:
        take_back(words, thread, clock, began)
    if taken:
        invoke(load(words + FREE), taken)
    invoke(load(words + INC_REF), me)
    return me
