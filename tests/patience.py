"""How long tests wait for what should come: a limit is there for what hangs, never for what is slow."""

from __future__ import annotations

import time
from collections.abc import Callable

PATIENCE_S = 600.0
"""For one process, job or file. What is waited for takes up to a minute on a quiet machine, so that one ten times as
slow passes. The limit of a whole test (pyproject.toml) is longer, so that this one speaks first and says of what."""


def wait_until(true: Callable[[], bool], *, look_every_s: float = 0.01, told: Callable[[], str] = str) -> None:
    """Look again and again until it is so.

    Args:
        told: what to say when it never is.
    """
    deadline = time.monotonic() + PATIENCE_S
    while not true():
        assert time.monotonic() < deadline, told()
        time.sleep(look_every_s)
