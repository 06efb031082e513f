"""The sizes of the processor's caches."""

import os

ASSUMED_LAST, ASSUMED_CORE = 32 << 20, 512 << 10  # bytes, where the system does not tell


def last_cache() -> int:
    """Bytes of the last level of cache."""
    return _told("SC_LEVEL4_CACHE_SIZE", "SC_LEVEL3_CACHE_SIZE") or ASSUMED_LAST


def core_cache() -> int:
    """Bytes of one core's second-level cache."""
    return _told("SC_LEVEL2_CACHE_SIZE") or ASSUMED_CORE


def _told(*names: str) -> int:
    """The first of these that the system tells, or 0."""
    for name in names:
        try:
            size = os.sysconf(name)
        except (ValueError, OSError, AttributeError):
            continue
        if size > 0:
            return size
    return 0
