"""Publishing: a reader sees all of a file or nothing of it, whenever a process or a machine dies.

Temporary name, write, fsync, rename, fsync of the folder. Every byte that data preparation leaves goes through here.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import json
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_TEMPORARY = ".tmp-"
_KEPT_BY_NFS = ".nfs"  # begins the name under which a client keeps a file that was removed while somebody has it open


def fsync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def temporary_name(path: Path) -> Path:
    """A name beside `path` that no other process on any machine uses, and that is known as never published."""
    return path.with_name(f"{path.name}{_TEMPORARY}{socket.gethostname()}-{os.getpid()}")


def is_temporary(path: Path) -> bool:
    """Whether a name is that of a file or folder that was never published."""
    return _TEMPORARY in path.name


def remove_temporaries(folder: Path) -> None:
    """Remove what killed processes left under `folder`."""
    for path in [path for path in folder.rglob(f"*{_TEMPORARY}*") if is_temporary(path)]:
        discard(path)


def discard(path: Path) -> None:
    """Remove a file or folder that nothing rests on. What cannot go yet, such as a folder on NFS of which a backup has
    a file open, stays for a later start to remove: it is never a reason to end work or to refuse it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def unused_name(path: Path) -> Path:
    """`path`, or that name and a number behind it where a leftover has it that cannot be removed."""
    names = itertools.chain([path.name], (f"{path.name}-{number}" for number in itertools.count(1)))
    return next(each for name in names if not os.path.lexists(each := path.with_name(name)))


def files_in(folder: Path, pattern: str = "**/*") -> list[Path]:
    """Files under a folder in order, without those that NFS keeps until their last reader is done."""
    return sorted(path for path in folder.glob(pattern) if path.is_file() and not is_kept_by_nfs(path))


def is_kept_by_nfs(path: Path) -> bool:
    """True for what was removed and goes when its last reader is done."""
    return path.name.startswith(_KEPT_BY_NFS)


@contextlib.contextmanager
def _named(path: Path, within: Path | None = None) -> Iterator[None]:
    """Errors of the system carry the final name and what to do; with `within` not those of files that lie elsewhere."""
    fixes = {
        errno.ENOSPC: "free some space and run again",
        errno.EDQUOT: "free some space and run again",
        errno.EACCES: "give write permission, or choose another folder",
        errno.EROFS: "give write permission, or choose another folder",
    }
    try:
        yield
    except OSError as err:
        if within and err.filename and within not in (Path(err.filename), *Path(err.filename).parents):
            raise
        fix = fixes.get(err.errno or 0, "nothing was published; run again")
        raise OSError(err.errno, f"cannot write {path}: {err.strerror}; {fix}") from err


def publish_bytes(path: Path, payload: bytes) -> None:
    """Write a file at once. OSError names the file; nothing of it is left then."""
    temporary = temporary_name(path)
    with _named(path):
        try:
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
            try:
                view = memoryview(payload)
                while view:
                    view = view[os.write(descriptor, view) :]
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            os.rename(temporary, path)
            fsync_folder(path.parent)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise


def publish_json(path: Path, value: dict[str, Any]) -> None:
    """Publish a dict as JSON; the same dict gives the same bytes."""
    publish_bytes(path, (json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode())


def make_folder(folder: Path) -> None:
    """Create a folder and its parents; OSError names it."""
    with _named(folder):
        folder.mkdir(parents=True, exist_ok=True)


@contextlib.contextmanager
def publishing_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder to fill, published as `folder` at the end of the block; an older one, and what killed
    processes left of it, go. After an exception in the block everything is as it was before."""
    for leftover in folder.parent.glob(f"{folder.name}{_TEMPORARY}*"):
        discard(leftover)
    temporary = unused_name(temporary_name(folder))
    with _named(folder, within=temporary):
        temporary.mkdir(parents=True)
        try:
            yield temporary
            for path in (each for each in temporary.rglob("*") if each.is_file()):
                descriptor = os.open(path, os.O_RDONLY)
                try:
                    os.fsync(descriptor)
                finally:
                    os.close(descriptor)
            fsync_folder(temporary)
            replace_folder(temporary, folder)
        finally:
            discard(temporary)


def replace_folder(new: Path, folder: Path) -> None:
    """Give a folder that is whole its name, durably; one that has the name now goes."""
    old = unused_name(temporary_name(folder))
    if folder.exists():
        os.rename(folder, old)
    os.rename(new, folder)
    fsync_folder(folder.parent)
    discard(old)


def sha256_of(path: Path) -> str:
    """The sha256 of a file as hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
