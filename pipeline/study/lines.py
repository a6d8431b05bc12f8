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
class AtBothCosts:
    """BLEU of the seeds with which a rival was trained for its part of the cost and for all of it."""

    modular: float
    equal: float
    full: float


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
    both: AtBothCosts | None = None

    @property
    def break_even(self) -> str:
        """From how many sizes on one modular run is cheaper than a rival as good for each: by a line through the
        rival's BLEU over the logarithm of its cost, where both its costs are there."""
        if self.both is None:
            return ""
        most = self.flops["modular"] / self.flops[EQUAL]
        if self.both.modular <= self.both.equal:
            return f"> {most:.0f}"
        if self.both.modular >= self.both.full:
            return "1"
        return f"{most ** ((self.both.full - self.both.modular) / (self.both.full - self.both.equal)):.1f}"

    def share(self, bleu: float) -> float:
        """A BLEU as a share of the teacher's, in %."""
        return 100 * bleu / max(self.teacher, LEAST_BLEU)
