"""Learning rate as a pure function of the step."""

from __future__ import annotations

from collections.abc import Sequence


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
