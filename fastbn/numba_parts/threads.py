"""How many threads `numba.set_num_threads` chose, where somebody has imported Numba."""

from __future__ import annotations

import sys


def chosen() -> int | None:
    """In this Python thread; None where nobody has chosen, which all of Numba's threads are too.

    `numba.get_num_threads` would start Numba's threads, and takes locks, for 0.6 us.
    """
    parallel = sys.modules.get("numba.np.ufunc.parallel")
    if parallel is None or not getattr(parallel, "_is_initialized", False):  # choosing starts them
        return None
    number: int = parallel._get_num_threads()
    return number if 0 < number < parallel.config.NUMBA_NUM_THREADS else None
