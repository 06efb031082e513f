"""Which Numba is installed."""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path


def fingerprint() -> str:
    """Of the file that names its version, 0.01 s cheaper to find than its metadata; of nothing where there is none."""
    numba = importlib.util.find_spec("numba")
    named = b"" if numba is None or numba.origin is None else Path(numba.origin).with_name("_version.py").read_bytes()
    return hashlib.sha256(named).hexdigest()
