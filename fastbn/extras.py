"""What optional parts need, for errors that say how to get it.

They name the packages themselves, not ``fastbn[torch]``: that works wherever fastbn came from, a folder or a wheel's
file, and leaves it as it is. The same are the extras of pyproject.toml, which a test compares.
"""

REQUIREMENTS = {
    "cuda12": "cupy-cuda12x[ctk]>=14",
    "cuda13": "cupy-cuda13x[ctk]>=14",
    "torch": "torch>=2.6",
    "jax": "jax>=0.5",
    "dask": "dask[array]>=2024.12",
    "mpi": "mpi4py>=4",
    "bfloat16": "ml_dtypes>=0.5",
}


def install(extra: str) -> str:
    """The command that installs what an extra needs."""
    return f'pip install "{REQUIREMENTS[extra]}"'
