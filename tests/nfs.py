"""An NFS client some process of whose machine has files open: what is removed stays under a name that starts with .nfs
until the last reader is done, and so does the folder that it lies in."""

from __future__ import annotations

import errno
import itertools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest


@contextmanager
def kept_open(root: Path) -> Iterator[None]:
    """Every file that is there, or comes there, is open; afterwards what was removed goes, as a client lets it."""
    unlink, numbers = os.unlink, itertools.count()

    def keep(path: Any, *, dir_fd: int | None = None) -> None:
        name = os.path.basename(os.fspath(path))
        if name.startswith(".nfs"):
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), name)
        kept = os.path.join(os.path.dirname(os.fspath(path)), f".nfs{next(numbers):024x}")
        os.rename(path, kept, src_dir_fd=dir_fd, dst_dir_fd=dir_fd)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "unlink", keep)
        yield
    for path in root.rglob(".nfs*"):
        unlink(path)
