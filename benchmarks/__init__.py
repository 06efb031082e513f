"""How fast fastbn is: asv's suite (`kernels`, `calls`), `peers`, `statistics`, `gpu`, and what they share."""

import os
import sys

if "ASV_COMMIT" in os.environ:  # asv measures commits in turn: each has compiled kernels of its own
    os.environ["NUMBA_CACHE_DIR"] = os.path.join(sys.prefix, "kernels", os.environ["ASV_COMMIT"])
