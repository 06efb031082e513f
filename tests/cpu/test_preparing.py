"""Prepared calls: two threads that prepare one, and numbers of threads that no machine has."""

import ctypes
import sys
import threading

import numpy as np
import pytest

import fastbn
from fastbn.cpu import plans, program, team
from fastbn.cpu.records import Shape, Strides


def test_two_threads_prepare_one(monkeypatch):
    """The words that are told of the team are those that the call reads."""
    built_in, begun, finished = program._built_in, threading.Event(), threading.Event()

    def slowly(*given):
        made = built_in(*given)
        if threading.current_thread() is not threading.main_thread():
            begun.set()
            finished.wait(30)
        return made

    monkeypatch.setattr(program, "_built_in", slowly)
    shape, x = Shape(1, 64, 8, 1), np.random.default_rng(0).standard_normal((64, 8)).astype(np.float32)
    prepared = plans.moments.__wrapped__(shape, "f4*", Strides(512, 8, 1, 16), None, None, 2)
    tables = np.empty((2, 4, 8))
    other = threading.Thread(target=prepared, args=(x, None, tables[1], 0.0))
    other.start()
    assert begun.wait(30)
    prepared(x, None, tables[0], 0.0)
    finished.set()
    other.join()
    assert prepared.call.__self__ is prepared._words
    np.testing.assert_array_equal(tables[0], tables[1])
    np.testing.assert_allclose(tables[0, 2], x.mean(0), atol=1e-6)


def test_two_threads_make_the_first_function(monkeypatch):
    """Functions point to a structure that says what they are, and CPython copies nothing: it is one, and stays.

    Where each thread made its own, that of the first was freed when the second one's was kept.
    """
    address, both = program.address, threading.Barrier(2)
    monkeypatch.setattr(program, "address", lambda name: (both.wait(30), address(name))[1])
    made = []
    threads = [
        threading.Thread(
            target=lambda: made.append(program._built_in(program._call, "calls.call", np.zeros(12, np.int64)))
        )
        for _ in "ab"
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    definition_at = object.__basicsize__  # ml of a PyCFunctionObject, behind what every object begins with
    pointers = {ctypes.c_int64.from_address(id(function) + definition_at).value for function in made}
    assert len(made) == 2
    assert pointers == {ctypes.addressof(program._call)}


@pytest.mark.parametrize("threads", [1000, 10**6, sys.maxsize, 1 << 70])
def test_more_threads_than_a_team_has(threads, monkeypatch):
    """Work arrays are made for as many as there may be, not for as many as were asked for."""
    monkeypatch.setattr(team, "_refused", True)  # 255 threads would stay
    x = np.random.default_rng(0).standard_normal((16, 64, 16, 16)).astype(np.float32)
    assert x.size >= team.PARALLEL_FROM
    with fastbn.threads.num_threads(1):
        expected = fastbn.batch_norm(x)[0]
    with fastbn.threads.num_threads(threads):
        np.testing.assert_array_equal(fastbn.batch_norm(x)[0], expected)
        np.testing.assert_array_equal(fastbn.batch_norm(x)[0], expected)
