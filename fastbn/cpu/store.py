"""Where compiled code is kept on disk: found by what it was made from, and never a stranger's.

Files lie in a folder of the user's, one sub-folder for each version of the sources and of the compiler, so that every
environment with the same versions shares them. Code from a file is executed, so the rules are those of ssh for keys:
files are used only from folders that nobody else can write to, and a file only if it is whole.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
import sys
import tempfile
import threading
import warnings
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

VERSIONS_KEPT = 8  # of the sources and compilers, 5 to 30 MB each; developers change the sources often
_SUM = hashlib.sha256().digest_size


class Store:
    """Files by name in one folder, written whole or not at all, and refused when damaged."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def read(self, name: str) -> bytes | None:
        """What was written under this name, or None."""
        try:
            data = (self.folder / name).read_bytes()
        except OSError:
            return None
        content = data[_SUM:]
        return content if _sum(name, content) == data[:_SUM] else None

    def write(self, name: str, content: bytes) -> None:
        """Write it where no process sees a part; on a disk that is full or read-only it is left."""
        temporary = self.folder / f"{name}.{os.getpid()}-{threading.get_ident()}"
        try:
            temporary.write_bytes(_sum(name, content) + content)
            os.replace(temporary, self.folder / name)
        except OSError:
            with suppress(OSError):  # a read-only disk says so even of a file that is not there
                temporary.unlink()


def _sum(name: str, content: bytes) -> bytes:
    return hashlib.sha256(name.encode() + b"\0" + content).digest()


@lru_cache
def store_of(version: str) -> Store | None:
    """The store of a version of the sources; None, and a warning if one was asked for, where none is safe.

    One that others have filled, and that cannot be written to, is read where there is no better one.
    """
    asked, found = os.environ.get("NUMBA_CACHE_DIR"), None
    for root in [Path(asked)] if asked else _roots():
        folder = root / "fastbn" / version
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            reason = why_unsafe(folder)
        except OSError:
            continue
        if reason is None:
            try:
                tempfile.TemporaryFile(dir=folder).close()
                os.utime(folder)
            except OSError:
                found = found or Store(folder)
                continue
            _forget_old_versions(folder.parent)
            return Store(folder)
        if asked:
            warnings.warn(
                f"fastbn keeps no compiled kernels in NUMBA_CACHE_DIR: {reason}", RuntimeWarning, stacklevel=2
            )
    return found


def _roots() -> list[Path]:
    """The user's own folder for such files, as each system has it, and where there is no home a temporary one."""
    roots = []
    try:
        home = Path.home()
    except RuntimeError:
        home = None
    if sys.platform == "win32":
        roots.append(Path(os.environ.get("LOCALAPPDATA", tempfile.gettempdir())))
    elif os.environ.get("XDG_CACHE_HOME"):
        roots.append(Path(os.environ["XDG_CACHE_HOME"]))
    elif home is not None:
        roots.append(home / "Library" / "Caches" if sys.platform == "darwin" else home / ".cache")
    if hasattr(os, "getuid"):
        roots.append(Path(tempfile.gettempdir()) / f"fastbn-{os.getuid()}")
    return roots


def why_unsafe(folder: Path) -> str | None:
    """Who else could put a file there, in words; None if nobody can.

    The folder and all above it belong to this user or root, and others write to none of them; into one above they may
    where its sticky bit keeps them from renaming what is not theirs, as in /tmp.
    """
    if not hasattr(os, "getuid"):
        return None  # Windows: folders inherit their access lists, and LOCALAPPDATA's names the user alone
    for place in (path := folder.resolve(), *path.parents):
        found = place.stat()
        if found.st_uid not in (0, os.getuid()):
            return f"{place} belongs to another user"
        others = stat.S_IWOTH if _is_alone_in(found.st_gid) else stat.S_IWOTH | stat.S_IWGRP
        if found.st_mode & others and (place == path or not found.st_mode & stat.S_ISVTX):
            return f"other users may write to {place}"
    return None


def _is_alone_in(group: int) -> bool:
    """Whether a group is this user's private one, as many systems give each user, or root's."""
    import grp
    import pwd

    try:
        return group == 0 or grp.getgrgid(group).gr_name == pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return False


def _forget_old_versions(root: Path) -> None:
    """All but the last that were used."""
    try:
        versions = sorted(root.iterdir(), key=lambda folder: folder.stat().st_mtime, reverse=True)
    except OSError:  # another process is at it
        return
    for folder in versions[VERSIONS_KEPT:]:
        shutil.rmtree(folder, ignore_errors=True)
