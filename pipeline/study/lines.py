"""What a study found at one ratio and one budget."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

EQUAL, FULL, RECOVERED = "equal", "full", "recovered"
"""Whom a modular checkpoint is held against: the rival for its ratio's part of the cost, the one for all of it, and
itself, trained further."""
LEAST_BLEU = 1e-9
"""In place of a teacher's 0, of which there are no shares."""


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95 % bootstrap interval, paired: every resample takes the same examples of all systems."""

    value: float
    low: float
    high: float

    @staticmethod
    def of(value: float, resampled_R: np.ndarray) -> Estimate:
        low, high = np.percentile(resampled_R, [2.5, 97.5])
        return Estimate(value, float(low), float(high))

    def text(self, digits: int) -> str:
        return f"{self.value:.{digits}f} [{self.low:.{digits}f}, {self.high:.{digits}f}]"


@dataclass(frozen=True)
class Line:
    """One ratio at one budget, seeds pooled."""

    ratio: float
    teacher: float
    modular: float
    """BLEU, as that of the teacher and of rivals."""
    kept: Estimate
    """Share of the teacher's BLEU, in %."""
    rivals: Mapping[str, tuple[str, float, Estimate]]
    """By side: its method, its BLEU, and how much BLEU the modular checkpoint has more."""
    flops: Mapping[str, float]
    """By side, and of the modular run: what one seed costs."""

    @property
    def break_even(self) -> str:
        """From how many sizes on one modular run is cheaper than a rival as good for each: by a line through the
        rival's BLEU over the logarithm of its cost, where both its costs are there."""
        if EQUAL not in self.rivals or FULL not in self.rivals:
            return ""
        whole, part = self.flops["modular"], self.flops[EQUAL]
        (_, low, _), (_, high, _) = self.rivals[EQUAL], self.rivals[FULL]
        if self.modular <= low:
            return f"> {whole / part:.0f}"
        if self.modular >= high:
            return "1"
        return f"{(whole / part) ** ((high - self.modular) / (high - low)):.1f}"

    def share(self, side: str) -> float:
        """Of the teacher's BLEU, in %, that a side's rival has."""
        return 100 * self.rivals[side][1] / max(self.teacher, LEAST_BLEU)
