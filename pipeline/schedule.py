"""Learning rate and loss weights as pure functions of the step."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise


def phase_start(step: int, restarts: Sequence[int]) -> int:
    """First step of the phase that a step lies in; `restarts` are the first steps of the phases after the first."""
    return max((start for start in restarts if start <= step), default=0)


def learning_rate(
    step: int,
    *,
    peak: float,
    warmup_steps: int,
    num_steps: int,
    restarts: Sequence[int] = (),
    final_fraction: float = 0.02,
) -> float:
    """Linear decay from `peak` to `final_fraction` of it at the last step, with a linear warm-up at the start of every
    phase: a new objective has gradients of another size, and the optimizer's moments start anew with it.

    Args:
        step: steps already made, 0 .. num_steps - 1.
    """
    warmup = min(1.0, (step - phase_start(step, restarts) + 1) / max(1, warmup_steps))
    progress = step / max(1, num_steps - 1)
    return peak * warmup * (1 - (1 - final_fraction) * progress)


def weight_at(weight: float | Sequence[Sequence[float]], step: int) -> float:
    """Weight of an objective at a step: constant, or points (step, weight) with straight lines between them and
    constant before the first and after the last."""
    if isinstance(weight, (int, float)):
        return float(weight)
    for (start, low), (end, high) in pairwise(weight):
        if start <= step < end:
            return low + (high - low) * (step - start) / (end - start)
    return weight[0][1] if step < weight[0][0] else weight[-1][1]
