"""A second process that compiles: two kernels at once where a call needs several, and what comes after it meanwhile.

Numba compiles one function at a time in a process. The other one writes to the same store (`store`), so it makes no
difference to anything but time: what it does not do, for whatever reason, is compiled here.
"""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress

from fastbn.threads import get_num_threads

OFF = "FASTBN_COMPILE_HELPER"
LONGEST_WAIT = 60.0  # seconds that a kernel is waited for: the other process may have been stopped
Kernel = tuple[str, tuple[str, ...]]

# Says that it is there, then reads a kernel a line, compiles it and says so, until nothing more comes. PYTHONPATH may
# have relative folders, which would be others by now: it gets what became of them.
_PROGRAM = """
import sys
del sys.path[0]  # the working directory: others may have put a json.py there
import json
sys.path[:] = json.loads(sys.argv[1])
from fastbn.cpu import code
print(flush=True)
for line in sys.stdin:
    name, kinds = json.loads(line)
    code.compile_to_store(name, tuple(kinds))
    print(flush=True)
"""


class Helper:
    """Compiles kernels from the end of a queue, from which others may take from the front."""

    def __init__(self, queue: deque[Kernel], later: Iterable[Kernel]) -> None:
        self._queue, self._later = queue, deque(later)
        self._taken: dict[Kernel, threading.Event] = {}
        self._thread = threading.Thread(target=self._feed, name="fastbn compiles", daemon=True)
        self._thread.start()

    def wait_for(self, kernel: Kernel) -> None:
        """Until it is done with a kernel, if that is one that it has begun."""
        begun = self._taken.get(kernel)
        if begun is not None:
            begun.wait(LONGEST_WAIT)

    def _feed(self) -> None:
        try:
            process = subprocess.Popen(
                [sys.executable, "-E", "-c", _PROGRAM, json.dumps([p for p in sys.path if isinstance(p, str)])],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
                env=os.environ | {OFF: "0"},
            )  # fmt: skip
        except (OSError, RuntimeError):  # RuntimeError: the interpreter ends
            return
        atexit.register(process.kill)
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            if process.stdout.readline() != "\n":  # another program; nobody shall wait for it
                return
            for queue in (self._queue, self._later):
                while queue:
                    kernel = queue.pop() if queue is self._queue else queue.popleft()
                    self._taken[kernel] = threading.Event()
                    try:
                        process.stdin.write(json.dumps(kernel) + "\n")
                        process.stdin.flush()
                        if not process.stdout.readline():
                            return
                    finally:
                        self._taken[kernel].set()
        except (OSError, IndexError):  # it has died; the last one of the queue went to another
            pass
        finally:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                with suppress(OSError):  # of what it did not read
                    pipe.close()
            atexit.unregister(process.kill)


_helper: Helper | None = None


def compile_all(missing: list[Kernel], later: list[Kernel], compile_here: Callable[[Kernel], object]) -> None:
    """Compile what is missing, and begin with what is wanted later."""
    global _helper
    queue = deque(missing)
    if len(missing) + len(later) > 1 and _may_help():
        with suppress(RuntimeError):  # no more threads
            _helper = Helper(queue, later)
    while queue:
        try:
            kernel = queue.popleft()
        except IndexError:
            break
        compile_here(kernel)
    for kernel in missing:
        wait_for(kernel)


def wait_for(kernel: Kernel) -> None:
    """If the second process is at it now."""
    if _helper is not None:
        _helper.wait_for(kernel)


def _may_help() -> bool:
    frozen = not sys.executable or getattr(sys, "frozen", False)
    return not frozen and os.environ.get(OFF) != "0" and get_num_threads() > 1


def _after_fork() -> None:
    global _helper
    _helper = None  # its thread is the parent's


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
