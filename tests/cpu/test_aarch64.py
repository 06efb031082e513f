"""64-bit ARM, by QEMU's emulation of a process: kernels that are made ahead there give the same bits as here.

Wants Debian's `qemu-user` and `mmdebstrap`, which fetch a Python for it; ``FASTBN_AARCH64`` names a folder that has one
already. Four minutes of a processor, in most of which LLVM compiles, emulated.
"""

import os
import platform
import shutil
import sys
from pathlib import Path

import pytest

import fastbn
from tests import interpreters

pytestmark = pytest.mark.slow
PYTHON = "3.11"  # that Debian 12 has

CALLS = """
import hashlib
import numpy as np
import fastbn

rng, digest = np.random.default_rng(0), hashlib.sha256()
for dtype, shape, axis in (np.float32, (6, 5, 40), 1), (np.float16, (300, 20), 1):
    x, dy = (3 + rng.standard_normal((2, *shape))).astype(dtype)
    y, saved = fastbn.batch_norm(x, channel_axis=axis, activation="relu")
    grads = fastbn.batch_norm_backward(dy, saved)
    for a in y, saved.mean, saved.rstd, grads.x, grads.gamma, grads.beta, fastbn.var(x, 0), fastbn.nanmean(x):
        digest.update(np.ascontiguousarray(a).tobytes())
"""
MAKE = f"""
import pathlib, sys
from fastbn.cpu import code, shipped
kernels = code.record()
exec({CALLS!r})
objects = dict(code.build(name, kinds, ["generic"]) for name, kinds in kernels)
folder = pathlib.Path(sys.argv[1])
folder.mkdir()
shipped.write(folder / "generic", code.sources(), {{name: content for name, (content,) in objects.items()}})
print(len(objects))
"""
RUN = f"""
import pathlib, platform, sys
from fastbn.cpu import code, shipped
shipped.FOLDER = pathlib.Path(sys.argv[1])
exec({CALLS!r})
print(digest.hexdigest(), platform.machine(), code.loaded, code.compiled, "numba" in sys.modules)
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder with ARM's Python, and NumPy and Numba in ``site``."""
    if platform.machine() != "x86_64" or shutil.which("qemu-aarch64") is None:
        pytest.skip("no qemu-aarch64: apt-get install qemu-user mmdebstrap")
    if "FASTBN_AARCH64" in os.environ:
        return Path(os.environ["FASTBN_AARCH64"])
    if shutil.which("mmdebstrap") is None:
        pytest.skip("no mmdebstrap: apt-get install mmdebstrap")
    folder = tmp_path_factory.mktemp("aarch64") / "root"
    packages = "--include=python3,libstdc++6"
    system = ["mmdebstrap", "--mode=root", "--variant=extract", "--arch=arm64", packages, "bookworm", folder]
    interpreters.run(system, timeout=3600)
    wheels = [f"--platform=manylinux_{glibc}_aarch64" for glibc in ("2_17", "2_27", "2_28")]
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--only-binary=:all:", f"--python-version={PYTHON}"]
    to = ["--platform=manylinux2014_aarch64", "--target", folder / "site"]
    interpreters.run([*pip, *wheels, *to, "numpy", "numba"], timeout=3600)
    return folder


def emulated(root, cache, program, *arguments):
    """What a program prints there."""
    path = f"{Path(fastbn.__file__).parents[1]}:{root / 'site'}"
    own = {"PYTHONHOME": root / "usr", "PYTHONPATH": path, "NUMBA_CACHE_DIR": cache, "FASTBN_COMPILE_HELPER": 0}
    given = [word for name, value in own.items() for word in ("-E", f"{name}={value}")]
    python = root / "usr" / "bin" / f"python{PYTHON}"
    command = ["qemu-aarch64", "-L", root, *given, python, "-B", "-c", program, *arguments]
    return interpreters.run(command, timeout=3600)


def test_the_same_bits(root, tmp_path):
    """From an archive that is made there, as wheels' are."""
    count = emulated(root, tmp_path / "cache", MAKE, tmp_path / "archives").strip()
    found = emulated(root, tmp_path / "other", RUN, tmp_path / "archives").split()
    assert found[1:] == ["aarch64", count, "0", "False"]
    assert found[0] == interpreters.run(interpreters.python(CALLS + "print(digest.hexdigest())")).strip()
