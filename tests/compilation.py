"""Which kernels tests need, and what compiling these takes: ``python -m tests.compilation [pytest's arguments]``.

Most of the default run is compilation. Printed are tests that would save much of it if they were slow, since few others
need their kernels: seconds, and the tests to be added to slow.txt together. No test goes that is the last of its
function. Kernels for NumPy arrays alone are looked at, and an empty cache is used.
"""

import collections
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import pytest

ENOUGH = 0.2  # seconds saved for each test that goes
TOGETHER = 12  # tests that go for one kernel, at most
FOLDER = "FASTBN_TESTS_COMPILATION"  # of the environment: where workers note what they see


class Notes:
    """A plugin of pytest: kernels that each test asks for, though others did before, and seconds of compilations."""

    def __init__(self, folder):
        from fastbn import call
        from fastbn.cpu import code, program

        self._out = (Path(folder) / str(os.getpid())).open("w")
        self._kernels, self._seconds, self._forget = set(), {}, call.forget
        addresses, object_code = code.addresses, code._object_code

        def noted_addresses(kernels, *later):
            self._kernels.update(map(self._name, kernels))
            return addresses(kernels, *later)

        def timed_object_code(name, kinds, *rest):
            start = time.perf_counter()
            found = object_code(name, kinds, *rest)
            self._seconds[self._name((name, kinds))] = time.perf_counter() - start
            return found

        code.addresses = program.addresses = noted_addresses
        code._object_code = timed_object_code

    @staticmethod
    def _name(kernel):
        return " ".join([kernel[0], *kernel[1]])

    def pytest_runtest_logstart(self, nodeid):
        self._kernels, self._seconds = set(), {}
        self._forget()

    def pytest_runtest_logfinish(self, nodeid):
        kernels = sorted(self._kernels | set(self._seconds))
        print(json.dumps([nodeid, kernels, self._seconds]), file=self._out, flush=True)


def pytest_configure(config):
    if FOLDER in os.environ:
        config.pluginmanager.register(Notes(os.environ[FOLDER]))


def noted(arguments):
    """Of a run of pytest: the kernels that each test needs, and seconds of each kernel."""
    needs, seconds = collections.defaultdict(set), {}
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {FOLDER: folder, "NUMBA_CACHE_DIR": f"{folder}/cache"}
        pytest.main(["-p", "tests.compilation", *arguments])
        for file in filter(Path.is_file, Path(folder).iterdir()):
            for test, kernels, compiled in map(json.loads, file.open()):
                needs[test].update(kernels)
                seconds |= compiled
    return {test: kernels & seconds.keys() for test, kernels in needs.items()}, seconds


def function_of(test):
    return test.partition("[")[0]


def best(needs, seconds):
    """Seconds that a set of tests saves, and these; the most for each of them."""
    tests_of = collections.defaultdict(set)
    for test, kernels in needs.items():
        for kernel in kernels:
            tests_of[kernel].add(test)
    remaining = collections.Counter(map(function_of, needs))
    found = 0.0, set()
    for tests in tests_of.values():
        lost = collections.Counter(map(function_of, tests))
        if len(tests) > TOGETHER or any(remaining[function] == count for function, count in lost.items()):
            continue
        saved = sum(seconds[kernel] for kernel in set().union(*map(needs.get, tests)) if tests_of[kernel] <= tests)
        found = max(found, (saved, tests), key=lambda pair: pair[0] / max(1, len(pair[1])))
    return found


def main(arguments):
    needs, seconds = noted(arguments)
    print(f"{len(seconds)} kernels, {sum(seconds.values()):.0f} s")
    while True:
        saved, tests = best(needs, seconds)
        if saved < ENOUGH * max(1, len(tests)):
            return
        print(f"\n{saved:.1f} s", *sorted(tests), sep="\n")
        needs = {test: kernels for test, kernels in needs.items() if test not in tests}


if __name__ == "__main__":
    main(sys.argv[1:] or ["tests", "--ignore", "tests/cuda"])
