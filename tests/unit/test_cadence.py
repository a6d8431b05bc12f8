"""When checkpoints and validations are due."""

from __future__ import annotations

from pipeline.training.cadence import Cadence


def due_at(cadence: Cadence, seconds_per_step: float, num_steps: int, clock: list[float]) -> list[int]:
    """Steps at which it is due, where what ranks agree on comes a step later, as in training."""
    found, agreed = [], False
    for step in range(1, num_steps + 1):
        clock[0] += seconds_per_step
        raised = cadence.is_late()
        if cadence.is_due(step, agreed):
            found.append(step)
        agreed = raised
    return found


def test_steps_decide_where_they_are_fast_and_the_clock_where_they_are_slow():
    clock = [0.0]
    assert due_at(Cadence(100, 600.0, lambda: clock[0]), 0.5, 250, clock) == [100, 200]
    clock = [0.0]
    assert due_at(Cadence(100, 600.0, lambda: clock[0]), 200.0, 12, clock) == [4, 8, 12]


def test_either_may_be_left_out():
    clock = [0.0]
    assert due_at(Cadence(0, 10.0, lambda: clock[0]), 4.0, 9, clock) == [4, 8]
    clock = [0.0]
    assert due_at(Cadence(3, 0.0, lambda: clock[0]), 1e9, 7, clock) == [3, 6]
