"""Compiled code on disk: shared, whole, safe, and never stale."""

import os
import shutil
import stat
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import fastbn
from fastbn.cpu import jit, store

PACKAGE = Path(fastbn.__file__).parent
PROGRAM = textwrap.dedent("""
    import sys
    sys.path.insert(0, sys.argv[1])
    import numpy as np
    import fastbn
    assert fastbn.__file__.startswith(sys.argv[1])
    print(fastbn.moments(np.arange(6.0).reshape(1, 2, 3)).mean)
""")


def run(installed, program=PROGRAM, stderr=subprocess.PIPE, warnings="error::RuntimeWarning", **environment):
    """Run a program in a fresh interpreter, with the package in this folder; what it printed."""
    kept = {k: v for k, v in os.environ.items() if k not in ("NUMBA_CACHE_DIR", "XDG_CACHE_HOME")}
    command = [sys.executable, "-W", warnings, "-c", program, str(installed)]
    finished = subprocess.run(command, env=kept | environment, stdout=subprocess.PIPE, stderr=stderr, text=True)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def install(folder):
    shutil.copytree(PACKAGE, folder / "fastbn", ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def compiled(cache):
    return {path.name: path.stat().st_mtime_ns for path in cache.rglob("*.nbc")}


def test_shared_and_never_stale(tmp_path):
    """Two environments compile once; a changed helper in another file than the kernel gives the new answer."""
    first, second, cache = install(tmp_path / "a"), install(tmp_path / "b"), tmp_path / "cache"
    shared = {"NUMBA_CACHE_DIR": str(cache), "PYTHONDONTWRITEBYTECODE": "1"}
    assert run(first, **shared) == "[1. 4.]\n"
    found = compiled(cache)
    assert found
    assert run(second, **shared) == "[1. 4.]\n"
    assert compiled(cache) == found
    helper = second / "fastbn" / "cpu" / "slab.py"
    changed = helper.read_text().replace("return n, pivot + mean, m2", "return n, pivot + mean + 10.0, m2")
    assert changed != helper.read_text()
    helper.write_text(changed)
    assert run(second, **shared) == "[11. 14.]\n"
    assert run(first, **shared) == "[1. 4.]\n"
    assert len(compiled(cache)) == len(found), "of the same names, in two folders"
    assert len(list((cache / "fastbn").iterdir())) == 2


def test_damaged_files(tmp_path):
    """Refused and written again: one cut off, one changed."""
    cache = tmp_path / "cache"
    assert run(PACKAGE.parent, NUMBA_CACHE_DIR=str(cache)) == "[1. 4.]\n"
    whole = {path: path.read_bytes() for path in cache.rglob("*.nbc")}
    cut, changed = whole
    cut.write_bytes(whole[cut][: len(whole[cut]) // 2])
    changed.write_bytes(whole[changed][:-9] + b"?" + whole[changed][-8:])
    assert run(PACKAGE.parent, NUMBA_CACHE_DIR=str(cache)) == "[1. 4.]\n"
    assert len(cut.read_bytes()) > len(whole[cut]) // 2 + 1
    assert changed.read_bytes()[-9:-8] != b"?"


def test_a_file_is_of_its_key(tmp_path):
    files = jit._Files(store.Store(tmp_path), "kernel")
    assert files.load(("key", 1)) is None
    files.save(("key", 1), "code")
    assert files.load(("key", 1)) == "code"
    assert files.load(("key", 2)) is None
    (tmp_path / files.file(("key", 2))).write_bytes((tmp_path / files.file(("key", 1))).read_bytes())
    assert files.load(("key", 2)) is None
    assert all(stat.S_IMODE(path.stat().st_mode) & 0o022 == 0 for path in tmp_path.iterdir())


def test_a_full_disk(tmp_path, monkeypatch):
    """Code that cannot be kept is used all the same."""
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    store.Store(tmp_path).write("name", b"content")
    assert store.Store(tmp_path).read("name") is None
    assert not list(tmp_path.iterdir())


# --- which folder -----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="owners and modes are POSIX's")
class TestSafety:
    def test_own_folders(self, tmp_path):
        folder = tmp_path / "fastbn"
        folder.mkdir(mode=0o700)
        assert store.why_unsafe(folder) is None

    def test_world_writable(self, tmp_path):
        folder = tmp_path / "open" / "fastbn"
        folder.mkdir(parents=True)
        folder.parent.chmod(0o777)
        assert "other users may write" in store.why_unsafe(folder)
        folder.parent.chmod(0o1777)  # as /tmp: what is in it can be renamed by its owner alone
        assert store.why_unsafe(folder) is None
        folder.chmod(0o1777)
        assert "other users may write" in store.why_unsafe(folder)

    def test_a_link_into_the_open(self, tmp_path):
        (tmp_path / "open").mkdir()
        (tmp_path / "open").chmod(0o777)
        (tmp_path / "link").symlink_to(tmp_path / "open")
        assert "other users may write" in store.why_unsafe(tmp_path / "link")

    def test_other_owner(self, tmp_path, monkeypatch):
        monkeypatch.setattr(os, "getuid", lambda: 4242)
        if tmp_path.stat().st_uid != 0:
            assert "belongs to another user" in store.why_unsafe(tmp_path)

    def test_group(self, tmp_path, monkeypatch):
        tmp_path.chmod(0o770)
        monkeypatch.setattr(store, "_is_alone_in", lambda group: False)
        assert "other users may write" in store.why_unsafe(tmp_path)
        monkeypatch.setattr(store, "_is_alone_in", lambda group: True)
        assert store.why_unsafe(tmp_path) is None

    def test_refused(self, tmp_path):
        """Nothing is read from there nor written, and a warning says why."""
        tmp_path.chmod(0o777)
        program = PROGRAM.replace("import fastbn\n", "import fastbn, warnings\nwarnings.simplefilter('error')\n")
        environment = {"NUMBA_CACHE_DIR": str(tmp_path)}
        with pytest.raises(AssertionError, match="other users may write"):
            run(PACKAGE.parent, program, **environment)
        assert run(PACKAGE.parent, warnings="ignore", **environment) == "[1. 4.]\n"
        assert not compiled(tmp_path)

    def test_without_a_home(self, tmp_path):
        """A temporary folder of the user's own."""
        (tmp_path / "file").write_text("")
        assert run(PACKAGE.parent, HOME=str(tmp_path / "file"), TMPDIR=str(tmp_path)) == "[1. 4.]\n"
        (folder,) = tmp_path.glob("fastbn-*")
        assert stat.S_IMODE(folder.stat().st_mode) & 0o022 == 0
        assert compiled(folder)


def test_nothing_writable(tmp_path):
    """No place for compiled code: kernels run all the same, compiled anew in each process."""
    file = tmp_path / "a file"
    file.write_text("")
    places = {"HOME": str(file), "TMPDIR": str(file), "XDG_CACHE_HOME": str(file)}
    program = f"import tempfile; tempfile.tempdir = {str(file)!r}\n{PROGRAM}"
    assert run(PACKAGE.parent, program, **places) == "[1. 4.]\n"


def test_old_versions_are_forgotten(tmp_path):
    for k in range(12):
        (tmp_path / str(k)).mkdir()
        os.utime(tmp_path / str(k), (k, k))
    store._forget_old_versions(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {str(k) for k in range(12 - store.VERSIONS_KEPT, 12)}


# --- a word to those who wait -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("terminal", "environment", "told"),
    [(True, {}, True), (True, {"FASTBN_COMPILE_NOTICE": "0"}, False), (False, {}, False)],
)
def test_notice(tmp_path, terminal, environment, told):
    """On a terminal alone, once, and not of what is on disk."""
    pty = pytest.importorskip("pty")
    program = PROGRAM.replace("print", "from fastbn.cpu import jit; jit.PATIENCE = 0.2\nprint")
    for cached in (False, True) if told else (False,):
        ours, theirs = pty.openpty() if terminal else os.pipe()
        assert run(PACKAGE.parent, program, stderr=theirs, NUMBA_CACHE_DIR=str(tmp_path), **environment) == "[1. 4.]\n"
        os.close(theirs)
        os.set_blocking(ours, False)
        try:
            text = os.read(ours, 10_000).decode()
        except (BlockingIOError, OSError):
            text = ""
        os.close(ours)
        assert text.count("compiling kernels") == (told and not cached), text
        assert ("warmup" in text) == (told and not cached)
