"""A process that dies at a chosen operation on the disk, and a disk that forgets what was not made durable.

The operations are those that a publish protocol is made of: write, fsync, rename, mkdir, unlink, rmdir. With `lossy`
the power fails too: contents that were not fsynced are cut to a random length, entries of folders that were not fsynced
vanish, and renames whose folder was not fsynced are undone.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

OPERATIONS = ("write", "fsync", "rename", "mkdir", "unlink", "rmdir")


class FailingDisk:
    """Counts the operations of this process from now on, and kills it around the chosen one.

    Args:
        die_at: number of the operation, from 0; one that never comes kills nothing.
        after: die after the operation instead of before it; a write is cut in the middle if not.
    """

    def __init__(self, root: Path, die_at: int, *, after: bool, lossy: bool) -> None:
        self.root, self.die_at, self.after, self.lossy = root, die_at, after, lossy
        self.count = 0
        self._synced = {each.stat().st_ino: _version(each) for each in self._files()}
        self._entries = {each.lstat().st_ino for each in root.rglob("*")}
        self._renames: list[tuple[str, str]] = []
        for name in OPERATIONS:
            setattr(os, name, self._around(name, getattr(os, name)))

    def _around(self, name: str, operation: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            number, self.count = self.count, self.count + 1
            if number == self.die_at and not self.after:
                if name == "write":
                    operation(args[0], args[1][: len(args[1]) // 2])
                self._die()
            try:
                result = operation(*args, **kwargs)
                self._remember(name, args)
                return result
            finally:  # an operation that fails, such as mkdir of a folder that is there, is one, too
                if number == self.die_at:
                    self._die()

        return counted

    def _remember(self, name: str, args: tuple[Any, ...]) -> None:
        if name == "rename":
            self._renames.append((str(args[0]), str(args[1])))
        elif name == "fsync":
            status = os.fstat(args[0])
            path = Path(os.readlink(f"/proc/self/fd/{args[0]}"))
            if stat.S_ISDIR(status.st_mode):
                self._entries |= {each.lstat().st_ino for each in path.iterdir()}
                self._renames = [pair for pair in self._renames if Path(pair[1]).parent != path]
            else:
                self._synced[status.st_ino] = _version(path)

    def _die(self) -> None:
        if self.lossy:
            self._forget()
        os.kill(os.getpid(), signal.SIGKILL)

    def _forget(self) -> None:
        self.die_at = -1  # from here on operations are the disk's own
        chance = random.Random(f"{self.count}/{self.after}")
        for path in self._files():
            if self._synced.get(path.stat().st_ino) != _version(path):
                os.truncate(path, chance.randrange(path.stat().st_size + 1))
        for path in sorted(self.root.rglob("*"), reverse=True):
            if path.lstat().st_ino not in self._entries:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        for source, target in reversed(self._renames):
            with contextlib.suppress(OSError):
                os.rename(target, source)

    def _files(self) -> list[Path]:
        return [path for path in self.root.rglob("*") if path.is_file()]


def _version(path: Path) -> tuple[int, int]:
    return path.stat().st_size, path.stat().st_mtime_ns
