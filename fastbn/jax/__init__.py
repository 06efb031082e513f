"""Batch norm for JAX by fastbn's CPU kernels, under ``jit``, ``grad`` and ``vmap``; running statistics are returned.

XLA calls the kernels by its foreign function interface on its own buffers (`fastbn.jax.xla`). Nothing is compiled but
by XLA and Numba. On other devices than the CPU arrays go to the host and back. A step's statistics travel from the
forward to the backward pass in float64, as bits, whether or not ``jax_enable_x64`` is set.
"""

from __future__ import annotations

try:
    import jax as _jax
except ImportError as error:
    from fastbn.extras import install as _install

    raise ImportError(f"fastbn.jax needs JAX, which is not installed: {_install('jax')}") from error

from fastbn.jax.functional import batch_norm

__all__ = ["batch_norm"]

del _jax
