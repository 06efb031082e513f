"""How many threads the kernels for NumPy arrays run on, at most: `get_num_threads`, `set_num_threads`, `num_threads`.

Unless told, the smallest of what the process may use: the processors that the calling thread may run on, the quota of
its control groups (a container with 2 of 64 cores), ``OMP_NUM_THREADS``, ``NUMBA_NUM_THREADS``, and where Numba or
PyTorch is loaded `numba.set_num_threads` and `torch.set_num_threads`. The environment is read when fastbn is imported,
the quota once a second, all else at every call, so that a change counts from the next one on.

Small arrays, and whatever is faster so, one thread computes. Results are the same bits on any number.
"""

from __future__ import annotations

import math
import operator
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from fastbn.numba_parts import threads as threads_of_numba

__all__ = ["get_num_threads", "num_threads", "set_num_threads"]

ANY = sys.maxsize  # no limit
QUOTA_SECONDS = 1.0  # for which the quota counts as known: to read it takes 0.13 ms, and it seldom changes

_of_process: int | None = None
_of_context: ContextVar[int | None] = ContextVar("fastbn.num_threads", default=None)


def get_num_threads() -> int:
    """The number of threads that kernels called here run on, at most.

    The number of the innermost `num_threads`, else of `set_num_threads`, else what the process may use.

    Returns
    -------
    int
        At least 1.

    Examples
    --------
    >>> import fastbn.threads
    >>> fastbn.threads.get_num_threads() >= 1
    True
    """
    return _of_context.get() or _of_process or _usable()


def set_num_threads(n: int | None) -> None:
    """Set the number of threads for the whole process, and for those that it forks.

    Parameters
    ----------
    n : int or None
        At least 1, and it may be more than there are processors; None for what the process may use, as at first.

    Raises
    ------
    TypeError
        If ``n`` is no integer.
    ValueError
        If ``n`` is less than 1.

    Examples
    --------
    >>> import fastbn.threads
    >>> fastbn.threads.set_num_threads(1)
    >>> fastbn.threads.get_num_threads()
    1
    >>> fastbn.threads.set_num_threads(None)
    """
    global _of_process
    _of_process = None if n is None else _checked(n)


@contextmanager
def num_threads(n: int) -> Iterator[None]:
    """Set the number of threads for what this Python thread, or asynchronous task, calls within.

    It goes before `set_num_threads`. Other Python threads keep theirs; tasks that are started within take it over.

    Parameters
    ----------
    n : int
        At least 1.

    Raises
    ------
    TypeError
        If ``n`` is no integer.
    ValueError
        If ``n`` is less than 1.

    Examples
    --------
    >>> import numpy as np
    >>> import fastbn
    >>> with fastbn.threads.num_threads(1):
    ...     print(fastbn.mean(np.arange(6.0)))
    2.5
    """
    token = _of_context.set(_checked(n))
    try:
        yield
    finally:
        _of_context.reset(token)


def _checked(n: int) -> int:
    try:
        number = None if isinstance(n, bool) else operator.index(n)
    except TypeError:
        number = None
    if number is None:
        raise TypeError(f"n: expected an integer, got {type(n).__name__}")
    if number < 1:
        raise ValueError(f"n: expected at least 1, got {number}")
    return number


# --- what the process may use -----------------------------------------------------------------------------------------


def _usable() -> int:
    """It is asked at every call of a large array: 0.7 us, 0.3 of them for the processors; 1 us with Numba and PyTorch.

    Neither is imported for it, which takes a second.
    """
    limits = [_processors(), _given()]
    if (chosen := threads_of_numba.chosen()) is not None:
        limits.append(chosen)
    if torch := sys.modules.get("torch"):
        limits.append(_of_torch(torch))
    return min(limits)


def _processors() -> int:
    """That the calling thread may run on now."""
    return len(os.sched_getaffinity(0)) if _HAS_AFFINITY else os.cpu_count() or 1


def _given() -> int:
    """By the environment, and by the quota as it was less than a second ago."""
    global _known
    until, limit = _known
    now = time.monotonic()
    if now >= until:
        limit = min(_of_environment, _quota(Path("/")))
        _known = now + QUOTA_SECONDS, limit
    return limit


def _of_torch(torch: Any) -> int:
    ask = getattr(torch, "get_num_threads", None)  # not there while it is being imported
    return ANY if ask is None else ask()


def _number(text: str | None) -> int:
    """Of a variable of the environment; OpenMP's may be a list, with one for each level of nested teams."""
    first = (text or "").partition(",")[0].strip()
    return (int(first) if first.isdecimal() else 0) or ANY


_HAS_AFFINITY = hasattr(os, "sched_getaffinity")
_of_environment = min(_number(os.environ.get(name)) for name in ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS"))
_known = -math.inf, ANY  # until when `_given` need not read the quota, and the limit till then

# --- the quota of control groups --------------------------------------------------------------------------------------


def _quota(root: Path) -> int:
    """Whole processors that control groups of either version leave the process: one more would be throttled.

    Each group and all above it have a quota, and the least counts. A container sees its own group where the mount
    begins, though ``/proc`` may name it by its path outside.
    """
    try:
        lines = os.fsdecode((root / "proc/self/cgroup").read_bytes()).split("\n")
    except OSError:
        return ANY
    least = math.inf
    for line in lines:
        controllers, _, path = line.partition(":")[2].partition(":")
        if controllers and "cpu" not in controllers.split(","):
            continue
        group = Path(path.lstrip("/"))
        for mount in ("cpu", "cpu,cpuacct") if controllers else ("", "unified"):
            for above in (group, *group.parents):
                least = min(least, _quota_of_group(root / "sys/fs/cgroup" / mount / above))
    return ANY if least == math.inf else max(1, int(least))


def _quota_of_group(group: Path) -> float:
    """Processors, as ``cpu.max`` (version 2) or ``cpu.cfs_quota_us`` (version 1) tells; infinity without a limit."""
    try:
        if (group / "cpu.max").exists():
            quota, period = map(int, (group / "cpu.max").read_text().split())
        else:
            quota, period = (int((group / f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period"))
    except (OSError, ValueError):  # no such file, or "max"
        return math.inf
    return quota / period if quota > 0 and period > 0 else math.inf
