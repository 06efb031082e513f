"""How many threads the kernels for NumPy arrays run on.

Unless told, the smallest of what the process may use: the processors that it may run on, the quota of its control
groups (a container with 2 of 64 cores), ``OMP_NUM_THREADS``, ``NUMBA_NUM_THREADS``, `numba.set_num_threads`, and where
PyTorch is loaded `torch.set_num_threads`. It is asked at every call, so a change of any of them counts from the next
on; the environment is read when fastbn is imported, the quota once for each process.

It is a number of threads at most: small arrays, and whatever is faster so, one thread computes. Results are the same
bits on any number.
"""

from __future__ import annotations

import operator
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from pathlib import Path

__all__ = ["get_num_threads", "num_threads", "set_num_threads"]

ANY = sys.maxsize  # no limit

_of_process: int | None = None
_of_context: ContextVar[int | None] = ContextVar("fastbn.num_threads", default=None)


def get_num_threads() -> int:
    """The number of threads that kernels called here run on, at most.

    Examples
    --------
    >>> import fastbn.threads
    >>> fastbn.threads.get_num_threads() >= 1
    True
    """
    return _of_context.get() or _of_process or _usable()


def set_num_threads(n: int | None) -> None:
    """Set the number of threads for the whole process; it may be more than there are processors.

    Parameters
    ----------
    n : int or None
        At least 1; None for what the process may use, as at first.

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
        raise TypeError(f"n: expected an integer, got {n!r}")
    if number < 1:
        raise ValueError(f"n: expected at least 1, got {number}")
    return number


# --- what the process may use -----------------------------------------------------------------------------------------


def _number(text: str | None) -> int | None:
    """Of an environment's variable; OpenMP's may be a list, one for each level of nested teams."""
    first = (text or "").partition(",")[0].strip()
    return int(first) if first.isdecimal() and int(first) > 0 else None


def _usable() -> int:
    return min(_fixed(), _processors(), _of_numba(), _of_torch())  # 1 us, at every call of a large array


@cache
def _fixed() -> int:
    """What does not change: the environment's numbers and the quota."""
    limits = _omp, _numba, _quota(Path("/"))
    return min((limit for limit in limits if limit is not None), default=ANY)


def _processors() -> int:
    """That the calling thread may run on now."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _of_numba() -> int:
    """What `numba.set_num_threads` chose, which has started Numba's threads; asking before would start them."""
    parallel = sys.modules.get("numba.np.ufunc.parallel")
    if parallel is None or not getattr(parallel, "_is_initialized", False):
        return ANY
    chosen: int = parallel.get_num_threads()
    return chosen if chosen < parallel.config.NUMBA_NUM_THREADS else ANY  # else nobody has chosen


def _of_torch() -> int:
    ask = getattr(sys.modules.get("torch"), "get_num_threads", None)  # not there while it is being imported
    return ANY if ask is None else ask()


_omp, _numba = (_number(os.environ.get(name)) for name in ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS"))
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_fixed.cache_clear)  # it may enter another group


def _quota(root: Path) -> int | None:
    """Whole processors that the process's control groups of either version leave it; part of one would be throttled.

    The least of all groups above it counts; None without a limit.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return None
    quotas = []
    for line in lines:
        controllers, _, path = line.partition(":")[2].partition(":")
        if controllers and "cpu" not in controllers.split(","):
            continue
        group = Path(path.lstrip("/"))
        mounts = [
            root / "sys/fs/cgroup" / name for name in (("cpu", "cpu,cpuacct") if controllers else ("", "unified"))
        ]
        quotas += [_quota_at(mount / above) for mount in mounts for above in (group, *group.parents)]
    found = [quota for quota in quotas if quota is not None]
    return max(1, int(min(found))) if found else None


def _quota_at(group: Path) -> float | None:
    """Processors, as ``cpu.max`` (version 2) or ``cpu.cfs_quota_us`` (version 1) tells."""
    try:
        if (group / "cpu.max").exists():
            quota, period = (group / "cpu.max").read_text().split()
        else:
            quota, period = ((group / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period"))
        return int(quota) / int(period) if int(quota) > 0 and int(period) > 0 else None
    except (OSError, ValueError):  # no such file, or "max"
        return None
