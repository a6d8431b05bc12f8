"""When something that takes a while is due: by steps, and by the clock where steps are fast or slow."""

from __future__ import annotations

import time
from collections.abc import Callable


class Cadence:
    """Every so many steps, and at the first step after so many seconds.

    Args:
        every_steps: 0: steps say nothing.
        every_s: 0: the clock says nothing.
    """

    def __init__(self, every_steps: int, every_s: float, now_s: Callable[[], float] = time.monotonic) -> None:
        self._every_steps, self._every_s, self._now_s = every_steps, every_s, now_s
        self._last_s, self._last_step = now_s(), 0

    def is_late(self) -> bool:
        """Whether this process' clock says so. Ranks must agree on it before they act."""
        return self._every_s > 0 and self._now_s() - self._last_s >= self._every_s

    def is_due(self, step: int, late: bool) -> bool:
        """Whether it is time after so many steps; then the clock starts anew.

        Args:
            late: what the ranks have agreed on.
        """
        # what the ranks have agreed on was raised at the step before, when this step's may not have been seen yet
        due = (late and step > self._last_step + 1) or (self._every_steps > 0 and step % self._every_steps == 0)
        if due:
            self._last_s, self._last_step = self._now_s(), step
        return due
