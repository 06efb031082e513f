"""Which calls let go of the interpreter's lock, and that none waits long for it again and again."""

import ctypes
import os
import statistics
import sys
import threading
import time

import numpy as np
import pytest

import fastbn
from fastbn.cpu import program, program_words, team_words

KEPT, LONG = program.KEPT_WORK // 2, program.LONG_WORK // 2  # elements of a forward pass, which goes through them twice


def random(shape):
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


needs_clock = pytest.mark.skipif(not team_words.POSSIBLE, reason="such calls keep the lock on this system")


@pytest.fixture
def lock(monkeypatch, fresh_plans):
    """What calls do with the lock, which stays where it is; ``lock.wait`` seconds until it is taken back."""
    done = Lock()
    save = ctypes.PYFUNCTYPE(ctypes.c_int64)(done.save)
    restore = ctypes.PYFUNCTYPE(None, ctypes.c_int64)(done.restore)
    of_python = program._of_python
    instead = {"PyEval_SaveThread": save, "PyEval_RestoreThread": restore}

    def places(*names):
        return [ctypes.cast(instead[n], ctypes.c_void_p).value if n in instead else of_python(n)[0] for n in names]

    monkeypatch.setattr(program, "_of_python", places)
    program._lock[:] = 0, 0, 0
    done.functions = save, restore  # which live as long as programs that call them
    return done


class Lock:
    def __init__(self):
        self.released, self.taken, self.wait = 0, [], 0.0

    def save(self):
        self.released += 1
        return 7

    def restore(self, thread):
        self.taken.append(thread)
        time.sleep(self.wait)

    def times(self, elements):
        """That one call of so many elements lets go of it."""
        before = self.released
        fastbn.batch_norm(random((4, elements // 4)))
        assert self.taken == [7] * self.released
        return self.released - before


def test_by_size(lock):
    assert lock.times(KEPT - 4) == 0
    assert lock.times(KEPT) == team_words.POSSIBLE
    assert lock.times(LONG) == 1


def once(right):
    """Whether it is so in one of some tries: a busy machine may hold up any of them."""
    return any(right() for _ in range(20))


@needs_clock
def test_after_a_long_wait(lock):
    def rests():
        program._lock[:] = 0, 0, 0
        lock.wait = 2 * program_words.LONG_WAIT / 1e9
        assert lock.times(KEPT) == 1
        lock.wait = 0.0
        rest = program._lock[0] - time.monotonic_ns()
        released = [lock.times(elements) for elements in (KEPT, 2 * KEPT, LONG)]
        return rest > 0.9 * program_words.REST * program_words.LONG_WAIT and released == [0, 0, 1]

    assert once(rests)
    time.sleep(max(0, program._lock[0] - time.monotonic_ns()) / 1e9)
    assert lock.times(2 * KEPT) == 1


@needs_clock
def test_after_short_waits(lock):
    for _ in range(20):
        program._lock[:] = 0, 0, 0
        start = time.perf_counter_ns()
        assert lock.times(KEPT) == 1
        short = time.perf_counter_ns() - start < program_words.LONG_WAIT  # unless the machine has held the call up
        assert not (short and program._lock[0])


@needs_clock
def test_a_long_wait_among_others_is_none(lock):
    """A thread that has the lock may have lost its processor."""

    def balance():
        program._lock[:] = 0, -program_words.MOST_WON, 0
        assert lock.times(KEPT) == 1
        return program._lock[1]

    lock.wait = program_words.LONG_WAIT / 1e9
    assert once(lambda: balance() < -program_words.MOST_WON / 2)
    assert program._lock[0] == 0
    lock.wait = 2 * program_words.MOST_WON / 1e9
    balance()
    assert program._lock[0] > 0


@needs_clock
def test_work_without_the_lock_makes_up_for_waits(lock):
    def balance():
        program._lock[:] = 0, 0, 0
        assert lock.times(LONG // 2) == 1
        return program._lock[1]

    assert once(lambda: -program_words.MOST_WON <= balance() < 0)


@needs_clock
def test_threads_that_wait_together_share_the_loss(lock):
    def balance(others):
        program._lock[:] = 0, 0, others
        assert lock.times(KEPT) == 1
        assert program._lock[2] == others
        return program._lock[1]

    lock.wait = program_words.LONG_WAIT / 2e9
    alone, shared = (statistics.median(balance(others) for _ in range(21)) for others in (0, 7))
    assert alone > 0
    assert shared < alone / 4


@needs_clock
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_no_thread_of_a_forked_child_waits(lock):
    program._lock[2] = 3
    child = os.fork()
    if child == 0:
        os._exit(program._lock[2])
    program._lock[2] = 0
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@needs_clock
def test_beside_a_thread_that_computes_in_python():
    """Were the lock given away by each call, each would wait for the interpreter's switch interval."""
    program._lock[:] = 0, 0, 0
    x, out, took = random((4, KEPT // 2)), np.empty((4, KEPT // 2), np.float32), []
    fastbn.batch_norm(x, out=out)
    stop = threading.Event()

    def compute():
        while not stop.is_set():
            pass

    thread = threading.Thread(target=compute)
    thread.start()
    try:
        for _ in range(300):
            start = time.perf_counter()
            fastbn.batch_norm(x, out=out)
            took.append(time.perf_counter() - start)
    finally:
        stop.set()
        thread.join()
    assert np.median(took) < sys.getswitchinterval() / 4
