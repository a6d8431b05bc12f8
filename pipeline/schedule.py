"""Learning rate as a pure function of the step."""

from __future__ import annotations


def learning_rate(step: int, *, peak: float, warmup_steps: int, num_steps: int, final_fraction: float = 0.02) -> float:
    """Linear warm-up to `peak`, then linear decay to `final_fraction` of it at the last step.

    Args:
        step: steps already made, 0 .. num_steps - 1.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, num_steps - 1 - warmup_steps)
    return peak * (1 - (1 - final_fraction) * min(1.0, progress))
