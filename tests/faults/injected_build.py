"""A data build in which one call to the file system goes wrong: python injected_build.py WHICH MODE ARGUMENTS...

WHICH counts calls of os.write, os.fsync and os.rename from 1. MODE: `before` and `after` kill the process around that
call, `error` has it fail with a full disk, `count` prints how many calls there are.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

CALLS = ("write", "fsync", "rename")


def install(which: int, mode: str) -> list[str]:
    """Replace the calls; returns the list of those made, which grows."""
    made: list[str] = []

    def wrapped(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **options: Any) -> Any:
            made.append(name)
            hit = len(made) == which
            if hit and mode == "before":
                os.kill(os.getpid(), signal.SIGKILL)
            if hit and mode == "error":
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            result = call(*arguments, **options)
            if hit and mode == "after":
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return run

    for name in CALLS:
        setattr(os, name, wrapped(name, getattr(os, name)))
    return made


if __name__ == "__main__":
    sys.path.insert(0, os.getcwd())
    made = install(int(sys.argv[1]), sys.argv[2])
    from data_prep.__main__ import main

    code = main(sys.argv[3:])
    if sys.argv[2] == "count":
        print(len(made))
    sys.exit(code)
