"""A machine without a GPU that `benchmarks/gpu.py` takes for one: events, streams and graphs by the clock."""

import json
import time

import numpy as np

TOY = (2, 4, 3, 5)
NAME = "Toy GPU"


class Event:
    """Of `cupy.cuda`."""

    done = False

    def record(self, stream=None):
        self.time = time.perf_counter()

    def synchronize(self):
        pass


class Graph:
    """Of `cupy.cuda.graph`, and of `torch.cuda`."""

    def __init__(self):
        self.launches = 0

    def launch(self, stream=None):
        self.launches += 1

    def replay(self):
        self.launches += 1


class Stream:
    """Of `cupy.cuda`."""

    capturing = False

    def __init__(self, null=False, non_blocking=False):
        assert non_blocking  # work of the default stream would wait for a blocking one, and end a capture

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def begin_capture(self, mode=None):
        self.capturing = True

    def end_capture(self):
        assert self.capturing
        return Graph()

    def synchronize(self):
        assert not self.capturing


class Pool:
    def free_all_blocks(self, stream=None):
        pass


def raw_kernel(source, name, *_args, **_keywords):
    def launch(grid, block, args):
        assert isinstance(args[0], np.int64)  # the kernel's long long
        assert args[0] > 0

    assert f"void {name}(long long" in source
    return launch


PROPERTIES = {"name": NAME.encode()}


def recorded(path):
    return json.loads(path.read_text(encoding="utf-8"))


def arguments(path, *more, shape=TOY):
    return ["--quick", "--no-tests", "--out", str(path), "--shape", ",".join(map(str, shape)), *more]
