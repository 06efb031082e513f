"""A team of threads in which nobody waits for a thread that has not come.

The calling thread publishes a job, cut into chunks, and takes chunks until none is left; workers that are awake take
chunks too. In the end the caller waits only for chunks that a worker has begun, and where that takes long it fetches
the worker to its own core. A wake-up is a hint: it may come late or get lost, and then the caller has done it all.

Why a late worker cannot run an old job: all it touches are tickets, ``next << 32 | end`` of the chunks set aside for a
member, and these by compare-and-swap. A swap that succeeds took a chunk that nobody else has; the job is read after
that, and stays until every chunk taken is reported. The tickets of an old job are all empty.

Why it does not lose to one thread: a sleeper is called only where its part of the work is worth many times what calling
has cost lately; and when others cost jobs more (calling them, waiting for their last chunks) than they did of them,
the calling thread works alone until that loss is a small part of its time. What they won before counts, so that single
interruptions change nothing.

Memory is addressed by words, laid out in `fastbn.cpu.team_words`.
"""

import platform

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from fastbn.cpu.kernels.compiler import inline, plain
from fastbn.cpu.team_words import (
    ASLEEP,
    AT_ONCE,
    AVERAGE,
    BURST,
    BUSY,
    CALLED,
    CHUNK_COUNT,
    CLOCK,
    CONDITION,
    COST,
    CREDIT,
    DEBT,
    DONE,
    ENDED,
    ENTRY,
    FUTEX,
    FUTEXES,
    GETTID,
    HIRED,
    INSIDE,
    MEMBER,
    MEMBERS,
    MONOTONIC,
    MUTEX,
    NUMBER,
    OURS,
    PARAMS,
    POSSIBLE,
    SENT,
    SPENT,
    STOP,
    TASKS,
    TEAM,
    THEIRS,
    THREAD,
    THREADS,
    TICKET,
    WAITING,
)  # fmt: skip

CHUNKS = 16  # of a job for each thread: one that is held up in the middle of a chunk delays the end by that much
MOMENT = 16_000  # ns of work that are taken at once where chunks are shorter: taking some costs 0.4 us
SPIN = 100_000  # ns that a worker looks out for the next job before it sleeps
PATIENCE = 20_000  # ns that the caller waits for the last chunks before it fetches whoever has them
PAYS = 4  # a sleeper is called for so many times what calling it costs
LINDY = 4  # a burst of jobs is taken to go on for a fourth of the time that it has lasted
AMORTIZED = 16  # times as long as what jobs have lost on the team, beyond what they won, the caller works alone
NEGLIGIBLE = 5_000  # ns of a loss: the end of a job on two cores, between which lines of memory go to and fro
DEAR = 100_000  # ns of calling a sleeper, three times what it takes in a virtual machine
MOST_LOST = 10_000_000  # ns that are won or lost, at most: some interruptions, not a suspended machine

WAIT, WAKE = 128, 129  # a futex of this process alone
AWAY, HERE_ON = 1, 2  # where a worker was sent: to any other processor than the caller's, or to that one

word, none = types.int64, types.none
I64, VOID = ir.IntType(64), ir.VoidType()
pthread_mutex_lock, pthread_mutex_unlock, pthread_cond_signal = (
    types.ExternalFunction(f"pthread_{name}", types.int32(word))
    for name in ("mutex_lock", "mutex_unlock", "cond_signal")
)
pthread_cond_wait = types.ExternalFunction("pthread_cond_wait", types.int32(word, word))
syscall = types.ExternalFunction("syscall", word(*[word] * 7))
clock_gettime = types.ExternalFunction("clock_gettime", types.int32(types.int32, word))
sched_getcpu = types.ExternalFunction("sched_getcpu", types.int32())
sched_getaffinity = types.ExternalFunction("sched_getaffinity", types.int32(types.int32, word, word))
sched_setaffinity = types.ExternalFunction("sched_setaffinity", types.int32(types.int32, word, word))


# --- instructions -----------------------------------------------------------------------------------------------------


def _at(builder, address):
    return builder.inttoptr(address, I64.as_pointer())


@intrinsic
def load(typing, address):
    """The word at an address, as another thread left it."""

    def codegen(context, builder, signature, values):
        # in one order with swaps: what is looked at after a swap is no older than it
        return builder.load_atomic(_at(builder, values[0]), "seq_cst", 8, typ=I64)

    return word(word), codegen


@intrinsic
def store(typing, address, value):
    """Other threads that see the value see what was written before."""

    def codegen(context, builder, signature, values):
        builder.store_atomic(values[1], _at(builder, values[0]), "release", 8)
        return context.get_dummy_value()

    return none(word, word), codegen


@intrinsic
def add(typing, address, value):
    """Add to the word at an address."""

    def codegen(context, builder, signature, values):
        return builder.atomic_rmw("add", _at(builder, values[0]), values[1], "seq_cst")

    return word(word, word), codegen


@intrinsic
def swap_if(typing, address, old, new):
    """Whether the old value was there, and the new one is now."""

    def codegen(context, builder, signature, values):
        pair = builder.cmpxchg(_at(builder, values[0]), values[1], values[2], "seq_cst", "seq_cst")
        return builder.extract_value(pair, 1)

    return types.boolean(word, word, word), codegen


@intrinsic
def pause(typing):
    """Tell the processor that this loop waits."""

    def codegen(context, builder, signature, values):
        if platform.machine() == "x86_64":
            kind = ir.FunctionType(VOID, [])
            builder.call(cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.sse2.pause"), [])
        return context.get_dummy_value()

    return none(), codegen


@intrinsic
def enter(typing, entry, params, thread, first, last):
    """Call the kernel at an address."""

    def codegen(context, builder, signature, values):
        pointer = builder.inttoptr(values[0], ir.FunctionType(VOID, [I64] * 4).as_pointer())

        builder.call(pointer, values[1:])
        return context.get_dummy_value()

    return none(word, word, word, word, word), codegen


@intrinsic
def call_runner(typing, function, entry, params, tasks, num_threads):
    """Call a function that runs all tasks in another way, at an address."""

    def codegen(context, builder, signature, values):
        pointer = builder.inttoptr(values[0], ir.FunctionType(VOID, [I64] * 4).as_pointer())
        builder.call(pointer, values[1:])
        return context.get_dummy_value()

    return none(word, word, word, word, word), codegen


# --- what the system does ---------------------------------------------------------------------------------------------


@inline
def sleep_in_condition(member, address, value):
    pthread_mutex_lock(member + MUTEX)
    while load(address) == value:
        pthread_cond_wait(member + CONDITION, member + MUTEX)
    pthread_mutex_unlock(member + MUTEX)


@inline
def signal_condition(member):
    pthread_mutex_lock(member + MUTEX)  # the sleeper has looked before, or looks after this
    pthread_cond_signal(member + CONDITION)
    pthread_mutex_unlock(member + MUTEX)


@inline
def sleep_while(member, address, value):
    """A member sleeps while the word at an address has this value; it may return early."""
    if FUTEX and load(member + FUTEXES):
        syscall(FUTEX, address, WAIT, value, 0, 0, 0)
    else:
        sleep_in_condition(member, address, value)


@inline
def wake(member, address):
    """The member, if it sleeps there."""
    if FUTEX and load(member + FUTEXES):
        syscall(FUTEX, address, WAKE, 1, 0, 0, 0)
    else:
        signal_condition(member)


@inline
def nanoseconds(place):
    """Of the system's clock, by way of two words that nobody else uses."""
    clock_gettime(MONOTONIC, place)
    return load(place) * 1_000_000_000 + load(place + 8)


@inline
def now(member):
    """Nanoseconds; the clock's two words are the member's own."""
    return nanoseconds(member + CLOCK)


@inline
def send(member, where):
    """Put a worker on the caller's processor or away from it until it has run: the system may choose the wrong one."""
    if not FUTEX:
        return  # of Linux alone
    cpu, thread = sched_getcpu(), load(member + THREAD)
    if thread > 0 and 0 <= cpu < 1024 and sched_getaffinity(0, 128, member + OURS) > -1:
        for i in range(16):
            ours, this = load(member + OURS + 8 * i), 1 << (cpu & 63) if i == cpu >> 6 else 0
            store(member + THEIRS + 8 * i, this if where == HERE_ON else ours & ~this)
        sched_setaffinity(thread, 128, member + THEIRS)
        store(member + SENT, where)


# --- the team ---------------------------------------------------------------------------------------------------------


@inline
def member_at(team, k):
    return team + MEMBERS + k * MEMBER


@inline
def take(ticket, most, own):
    """The first of so many chunks, the first ones for the owner and the last for others, and how many; 0 if none is."""
    while True:
        old = load(ticket)
        first, end = old >> 32, old & 0xFFFFFFFF
        count = min(most, end - first)
        if count < 1:
            return 0, 0
        if own and swap_if(ticket, old, old + (count << 32)):
            return first, count
        if not own and swap_if(ticket, old, old - count):
            return end - count, count


@inline
def call_sleepers(team, me, average, left, threads):
    """As many as pay, were the chunks that may be left shared among all that were called.

    In a burst of jobs a worker that is awake stays awake: a part of what there was already counts as yet to come.
    """
    called, burst = load(me + CALLED), load(team + BURST) // LINDY
    while called + 1 < threads and average * left // (called + 2) + burst > PAYS * load(team + COST):
        called += 1
        member = member_at(team, called)
        if load(member + ASLEEP) == 1 and swap_if(member + ASLEEP, 1, 0):
            before, cost = now(me), load(team + COST)
            send(member, AWAY)
            wake(member, member + ASLEEP)
            spent = now(me) - before
            store(team + COST, cost + (min(spent, 4 * cost) - cost) // 8)  # an interruption is no cost
            store(me + SPENT, load(me + SPENT) + spent)
    store(me + CALLED, called)


@inline
def doubt_cost(team):
    """What has become so dear that nobody is called is not measured any more: after some jobs it is tried again."""
    cost = load(team + COST)
    if cost > DEAR:
        store(team + COST, cost - cost // 32)


@inline
def take_part(team, k, chunk, count):
    """Run these chunks, if there are any, and all that can be taken; returns how many."""
    me, entry, params, tasks = member_at(team, k), load(team + ENTRY), load(team + PARAMS), load(team + TASKS)
    chunks, most, threads = load(team + CHUNK_COUNT), load(team + AT_ONCE), load(team + THREADS)
    start, spent = now(me), load(me + SPENT)  # by the caller, before
    done, step, average = 0, 1, 0
    while True:
        if count == 0:
            chunk, count = take(me + TICKET, step, True)
        for i in range(1, threads):
            if count == 0:
                chunk, count = take(member_at(team, (k + i) % threads) + TICKET, step, False)
        if count == 0:
            break
        enter(entry, params, k, chunk * tasks // chunks, (chunk + count) * tasks // chunks)
        after = now(me)
        done += count
        average = (after - start - load(me + SPENT) + spent) // done
        step = min(most, max(1, MOMENT // (average + 1)))
        if k == 0:
            call_sleepers(team, me, average, chunks - done, threads)
        count = 0
    store(me + AVERAGE, average)
    return done


@inline
def wait_for_others(team, others, began, mine, threads):
    """Until the chunks that workers have begun are done; the caller's own processor is theirs before long."""
    me = member_at(team, 0)
    ended = now(me)
    late = ended + max(PATIENCE, (ended - began) // (2 * max(1, mine)))
    while load(team + DONE) != others:
        pause()
        if now(me) > late:
            add(team + WAITING, 1)  # before the look at what is done, also for other processors
            for k in range(1, threads):
                if load(member_at(team, k) + INSIDE) == 1:
                    send(member_at(team, k), HERE_ON)
            done = load(team + DONE)
            if done != others:
                sleep_while(me, team + DONE, done)
            store(team + WAITING, 0)


@inline
def alone(entry, params, tasks, num_threads):
    """In no larger parts than a thread would have had: work arrays are made for these."""
    for k in range(num_threads):
        enter(entry, params, 0, k * tasks // num_threads, (k + 1) * tasks // num_threads)


@inline
def nobody_comes(team, time, burst, threads):
    """Whether all workers sleep, and none would be called to a job that takes one thread so long."""
    for k in range(1, threads):
        if load(member_at(team, k) + ASLEEP) == 0:
            return False
    return time > 0 and time // 2 + burst // LINDY <= PAYS * load(team + COST)


@inline
def publish(team, entry, params, tasks, chunks, at_once, threads):
    """A job, of which each member has tickets for an equal part of the chunks; from then on others take some."""
    store(team + ENTRY, entry)
    store(team + PARAMS, params)
    store(team + TASKS, tasks)
    store(team + CHUNK_COUNT, chunks)
    store(team + AT_ONCE, at_once)
    store(team + THREADS, threads)
    store(team + DONE, 0)
    for k in range(threads):
        store(member_at(team, k) + TICKET, k * chunks // threads << 32 | (k + 1) * chunks // threads)


@inline
def run_together(team, entry, params, tasks, num_threads, lately):
    """Run all tasks, by the team or alone; a second caller meanwhile goes alone, as one does without a team (0).

    ``lately`` is where the time of the same job on one thread is kept, by which sleepers are called from the first.
    """
    if team == 0 or not swap_if(team + BUSY, 0, 1):
        alone(entry, params, tasks, num_threads)
        return
    me, threads, debt = member_at(team, 0), min(num_threads, load(team + HIRED) + 1), load(team + DEBT)
    began = now(me)
    burst = load(team + BURST) if began - load(team + ENDED) < SPIN else 0
    store(team + BURST, burst)
    if threads < 2 or tasks < 2 or debt > 0 or nobody_comes(team, load(lately), burst, threads):
        alone(entry, params, tasks, num_threads)
        ended = now(me)
        store(lately, ended - began)
        store(team + DEBT, max(0, debt - (ended - began)))
        store(team + BURST, min(burst + ended - began, MOST_LOST))
        store(team + ENDED, ended)
        doubt_cost(team)
        store(team + BUSY, 0)
        return
    chunks = min(tasks, num_threads * CHUNKS)
    store(me + CALLED, 0)
    store(me + SPENT, 0)
    publish(team, entry, params, tasks, chunks, max(1, chunks // num_threads), threads)
    call_sleepers(team, me, load(lately) // chunks, chunks, threads)
    mine = take_part(team, 0, 0, 0)
    ready, others = now(me), chunks - mine
    wait_for_others(team, others, began, mine, threads)
    ended = now(me)
    if mine > 0:
        store(lately, load(me + AVERAGE) * chunks)
    if load(me + SPENT) == 0:
        doubt_cost(team)
    won = others * load(me + AVERAGE) - (ended - ready) - load(me + SPENT)
    credit = min(load(team + CREDIT) + won, MOST_LOST) if mine > 0 else load(team + CREDIT)
    if credit < -NEGLIGIBLE:
        store(team + DEBT, AMORTIZED * min(-credit, MOST_LOST))
        burst = credit = 0
    store(team + CREDIT, credit)
    store(team + BURST, min(burst + ended - began, MOST_LOST))
    store(team + ENDED, ended)
    store(team + BUSY, 0)


@plain
def serve(me):
    """The life of a worker, as a thread of the system begins it."""
    team, k = load(me + TEAM), load(me + NUMBER)
    store(me + THREAD, syscall(GETTID, 0, 0, 0, 0, 0, 0) if FUTEX else 0)
    since = now(me)
    while load(team + STOP) == 0:
        chunk, count = take(me + TICKET, 1, True)
        if count > 0:
            store(me + INSIDE, 1)
            add(team + DONE, take_part(team, k, chunk, count))
            store(me + INSIDE, 0)

            if load(team + WAITING) == 1:
                wake(member_at(team, 0), team + DONE)
            since = now(me)
        elif now(me) - since < SPIN and load(team + DEBT) == 0:
            for _ in range(4):
                pause()
        else:
            swap_if(me + ASLEEP, 0, 1)
            ticket = load(me + TICKET)
            if ticket >> 32 >= ticket & 0xFFFFFFFF and load(team + STOP) == 0:
                sleep_while(me, me + ASLEEP, 1)
            store(me + ASLEEP, 0)
            since = now(me)
        sent = load(me + SENT)
        if sent:
            if sent == HERE_ON:
                since = now(me) - SPIN  # this processor is the caller's
            store(me + SENT, 0)
            if FUTEX:
                sched_setaffinity(0, 128, me + OURS)
    store(me + THREAD, 0)


@plain
def dismiss(team):
    """Tell all workers to leave."""
    store(team + STOP, 1)
    for k in range(1, load(team + HIRED) + 1):
        swap_if(member_at(team, k) + ASLEEP, 1, 0)
        wake(member_at(team, k), member_at(team, k) + ASLEEP)


@inline
def run_by_numba(team, entry, params, tasks, num_threads):
    """Run all tasks by Numba's threads, which one caller at a time may enter; another goes alone meanwhile."""
    if swap_if(team, 0, 1):
        call_runner(load(team + 8), entry, params, tasks, num_threads)
        store(team, 0)
    else:
        alone(entry, params, tasks, num_threads)


@inline
def run_tasks(team, entry, params, tasks, num_threads, lately):
    """By whom `team.team_for` says."""
    if num_threads < 2:
        enter(entry, params, 0, 0, tasks)
    elif team & 1:
        run_by_numba(team - 1, entry, params, tasks, num_threads)
    elif POSSIBLE:  # what a system lacks must not be named in the code: loading that would end the process
        run_together(team, entry, params, tasks, num_threads, lately)
