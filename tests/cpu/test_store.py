"""Compiled code on disk: shared, whole, safe, and never stale."""

import os
import platform
import shutil
import stat
import tempfile
import textwrap
from pathlib import Path

import pytest

import fastbn
from fastbn.cpu import store, team
from tests import interpreters

PACKAGE = Path(fastbn.__file__).parent
PROGRAM = textwrap.dedent("""
    import sys
    sys.path.insert(0, sys.argv[1])
    import numpy as np
    import fastbn
    assert fastbn.__file__.startswith(sys.argv[1])
    print(fastbn.moments(np.arange(6.0).reshape(1, 2, 3)).mean)
""")


def run(installed, program=PROGRAM, warnings="error::RuntimeWarning", **how):
    """What a program prints that has the package from this folder, and no cache but one that is given."""
    command = interpreters.python(program, installed, options=["-W", warnings])
    return interpreters.run(command, without=["NUMBA_CACHE_DIR", "XDG_CACHE_HOME"], **how)


def install(folder):
    shutil.copytree(PACKAGE, folder / "fastbn", ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def compiled(cache):
    return {path.name: path.stat().st_mtime_ns for path in cache.rglob("*.o")}


def test_shared_and_never_stale(tmp_path):
    """Two environments compile once; a changed helper in another file than the kernel gives the new answer."""
    first, second, cache = install(tmp_path / "a"), install(tmp_path / "b"), tmp_path / "cache"
    shared = {"NUMBA_CACHE_DIR": str(cache), "PYTHONDONTWRITEBYTECODE": "1"}
    installed = sorted((first / "fastbn").rglob("*"))
    assert run(first, **shared) == "[1. 4.]\n"
    found = compiled(cache)
    assert found
    assert sorted((first / "fastbn").rglob("*")) == installed, "it may be read-only"
    assert run(second, **shared) == "[1. 4.]\n"
    assert compiled(cache) == found
    helper = second / "fastbn" / "cpu" / "kernels" / "common.py"
    changed = helper.read_text().replace("return n, origin + mean, m2", "return n, origin + mean + 10.0, m2")
    assert changed != helper.read_text()
    helper.write_text(changed)
    assert run(second, **shared) == "[11. 14.]\n"
    assert run(first, **shared) == "[1. 4.]\n"
    assert len(compiled(cache)) == len(found), "of the same names, in two folders"
    assert len(list((cache / "fastbn").iterdir())) == 2


@pytest.mark.slow
def test_damaged_files(tmp_path):
    """Refused and written again: one cut off, one changed."""
    cache = tmp_path / "cache"
    assert run(PACKAGE.parent, NUMBA_CACHE_DIR=str(cache)) == "[1. 4.]\n"
    whole = {path: path.read_bytes() for path in cache.rglob("*.o")}
    cut, changed, *_ = whole
    cut.write_bytes(whole[cut][: len(whole[cut]) // 2])
    changed.write_bytes(whole[changed][:-9] + b"?" + whole[changed][-8:])
    assert run(PACKAGE.parent, NUMBA_CACHE_DIR=str(cache)) == "[1. 4.]\n"
    assert len(cut.read_bytes()) > len(whole[cut]) // 2 + 1
    assert changed.read_bytes()[-9:-8] != b"?"


def test_a_file_is_of_its_name_and_whole(tmp_path):
    files = store.Store(tmp_path)
    files.write("name", b"content")
    assert files.read("name") == b"content"
    assert files.read("other") is None
    written = (tmp_path / "name").read_bytes()
    (tmp_path / "other").write_bytes(written)
    assert files.read("other") is None
    for size in range(len(written)):
        (tmp_path / "name").write_bytes(written[:size])
        assert files.read("name") is None
    assert all(stat.S_IMODE(path.stat().st_mode) & 0o022 == 0 for path in tmp_path.iterdir())


def test_a_full_disk(tmp_path, monkeypatch):
    """Code that cannot be kept is used all the same."""
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    store.Store(tmp_path).write("name", b"content")
    assert store.Store(tmp_path).read("name") is None
    assert not list(tmp_path.iterdir())


def test_a_read_only_disk(tmp_path, monkeypatch):
    """What an administrator has compiled is read; nothing is written."""

    def refuse(*_, **__):
        raise OSError(30, "Read-only file system")

    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    store.store_of.__wrapped__("version").write("name", b"content")
    for owner, name in ((tempfile, "TemporaryFile"), (os, "utime"), (Path, "write_bytes"), (Path, "unlink")):
        monkeypatch.setattr(owner, name, refuse)
    files = store.store_of.__wrapped__("version")
    assert files.read("name") == b"content"
    files.write("more", b"content")
    assert files.read("more") is None


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

    @pytest.mark.slow
    def test_refused(self, tmp_path):
        """Nothing is read from there nor written, and a warning says why."""
        tmp_path.chmod(0o777)
        program = PROGRAM.replace("import fastbn\n", "import fastbn, warnings\nwarnings.simplefilter('error')\n")
        environment = {"NUMBA_CACHE_DIR": str(tmp_path)}
        with pytest.raises(AssertionError, match="other users may write"):
            run(PACKAGE.parent, program, **environment)
        assert run(PACKAGE.parent, warnings="ignore", **environment) == "[1. 4.]\n"
        assert not compiled(tmp_path)

    @pytest.mark.slow
    def test_without_a_home(self, tmp_path):
        """A temporary folder of the user's own."""
        (tmp_path / "file").write_text("")
        assert run(PACKAGE.parent, HOME=str(tmp_path / "file"), TMPDIR=str(tmp_path)) == "[1. 4.]\n"
        (folder,) = tmp_path.glob("fastbn-*")
        assert stat.S_IMODE(folder.stat().st_mode) & 0o022 == 0
        assert compiled(folder)


@pytest.mark.slow
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


# --- what a process loads ---------------------------------------------------------------------------------------------

EVERYTHING = """
import sys
sys.path.insert(0, sys.argv[1])
import numpy as np
import fastbn
from fastbn.cpu import code, team

fastbn.threads.set_num_threads(2)
for shape, axis in ((6, 5, 40), 1), ((300, 20), 1), ((6, 40, 5), -1), ((8, 32, 40, 40), 1), ((8, 40, 40, 32), -1):
    x = np.ones(shape, np.float32)
    y, saved = fastbn.batch_norm(x, channel_axis=axis)
    fastbn.batch_norm_backward(x, saved)
    fastbn.batch_norm_inference(x, saved.mean, saved.moments.var(), channel_axis=axis)
    fastbn.moments(x, channel_axis=axis)
    others = tuple(i for i in range(x.ndim) if i != axis % x.ndim)
    fastbn.mean(x, axis=others), fastbn.var(x, axis=others), fastbn.var(x), fastbn.mean(x, axis=0)
print(code.loaded, code.compiled, team._hired, *(sorted({"numba", "scipy"} & set(sys.modules))))
"""


def test_a_warm_process_never_imports_numba():
    """Nor SciPy, which Numba would bring: not for any function or layout, nor for threads."""
    warm = {name: os.environ[name] for name in ("NUMBA_CACHE_DIR", "XDG_CACHE_HOME") if name in os.environ}
    run(PACKAGE.parent, EVERYTHING, **warm)
    loaded, compiled, hired, *imported = run(PACKAGE.parent, EVERYTHING, **warm).split()
    assert int(loaded) > 10, (loaded, compiled, hired, imported)
    assert (compiled, imported) == ("0", [])
    assert hired == ("1" if team.here else "0")


@pytest.mark.slow
def test_another_processor(tmp_path):
    """Home folders are shared among machines: each finds what was made for it."""
    if platform.machine() != "x86_64":
        pytest.skip("levels are named as on x86-64")
    for name, folders in (("x86-64-v2", 1), ("x86-64", 2), ("x86-64-v2", 2)):
        environment = {"NUMBA_CACHE_DIR": str(tmp_path), "NUMBA_CPU_NAME": name, "NUMBA_CPU_FEATURES": ""}
        assert run(PACKAGE.parent, **environment) == "[1. 4.]\n"
        assert len(list((tmp_path / "fastbn").iterdir())) == folders


HALVES = """
import numpy as np
import fastbn
bits = np.arange(1 << 16, dtype=np.uint16)
x = bits.view(np.float16).reshape(-1, 4)
finite = np.isfinite(x)
one, none = np.ones(4, np.float16), np.zeros(4, np.float16)
y = fastbn.batch_norm_inference(x, none, one, eps=0)
assert (y == x)[finite].all() and np.isnan(y[np.isnan(x)]).all() and (np.abs(y[np.isinf(x)]) == np.inf).all()
for scale in (0.37, 3.1, 1 / 3, 2.0**-12 * 1.0001, 31.9):
    gamma = np.full(4, scale, np.float16)
    with np.errstate(over="ignore", invalid="ignore"):
        wanted = (x.astype(np.float32) * gamma.astype(np.float32)).astype(np.float16)
    y = fastbn.batch_norm_inference(x, none, one, gamma, eps=0)
    assert (y == wanted)[finite].all(), scale
y, saved = fastbn.batch_norm(x[:7000:7] * 0 + np.arange(4, dtype=np.float16), one, none)
grads = fastbn.batch_norm_backward(y, saved)
print(y.dtype, saved.mean)
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="others have instructions for halves")
def test_float16_on_processors_without_instructions_for_it(tmp_path):
    """Every half is read and rounded as F16C does; twice, since what is compiled is then loaded without Numba."""
    environment = {"NUMBA_CACHE_DIR": str(tmp_path), "NUMBA_CPU_NAME": "x86-64-v2", "NUMBA_CPU_FEATURES": ""}
    for _ in range(2):
        assert run(PACKAGE.parent, HALVES, **environment) == "float16 [0. 1. 2. 3.]\n"


# --- a word to those who wait -----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("terminal", "environment", "told"),
    [(True, {}, True), (True, {"FASTBN_COMPILE_NOTICE": "0"}, False), (False, {}, False)],
)
def test_notice(tmp_path, terminal, environment, told):
    """On a terminal alone, once, and not of what is on disk."""
    pty = pytest.importorskip("pty")
    program = PROGRAM.replace("print", "from fastbn.cpu import code; code.NOTICE_AFTER = 0.2\nprint")
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


@pytest.mark.slow
@pytest.mark.parametrize(
    "stream",
    ["sys.stderr = types.SimpleNamespace(write=len, flush=list)", "sys.stderr.close()", "sys.stderr = None"],
)
def test_notice_without_a_stream(tmp_path, stream):
    """Where standard error is a program's own object, closed or gone, nothing is said and nothing fails."""
    program = PROGRAM.replace("import numpy", f"import types\n{stream}\nimport numpy")
    assert run(PACKAGE.parent, program, NUMBA_CACHE_DIR=str(tmp_path)) == "[1. 4.]\n"
