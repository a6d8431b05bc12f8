"""The learning rate is a pure function of the step, with a warm-up in every phase."""

from __future__ import annotations

import pytest

from pipeline.schedule import learning_rate, phase_start, weight_at


def rates(**changes):
    settings = {"peak": 2.0, "warmup_steps": 10, "num_steps": 100, **changes}
    return [learning_rate(step, **settings) for step in range(settings["num_steps"])]


def test_it_warms_up_and_decays_to_two_percent():
    values = rates()
    assert values[0] == pytest.approx(0.2)
    assert max(values) == values[9]
    assert values[9:] == sorted(values[9:], reverse=True)
    assert values[-1] == pytest.approx(0.04)


def test_a_phase_warms_up_again_and_meets_the_same_decay():
    plain, phased = rates(), rates(restarts=(40,))
    assert phased[:40] == plain[:40]
    assert phased[40] == pytest.approx(plain[40] / 10)
    assert phased[49:] == plain[49:]


def test_no_warm_up_and_phase_starts():
    assert rates(warmup_steps=0)[0] == 2.0
    assert [phase_start(step, (3, 7)) for step in (0, 2, 3, 6, 7, 9)] == [0, 0, 3, 3, 7, 7]


def test_loss_weights_follow_their_points():
    assert weight_at(0.3, 5) == weight_at(0.3, 10**9) == 0.3
    points = ((10, 1.0), (20, 0.0), (40, 2.0))
    found = [weight_at(points, step) for step in (0, 10, 15, 20, 30, 40, 99)]
    assert found == [1.0, 1.0, 0.5, 0.0, 1.0, 2.0, 2.0]
    assert weight_at(((7, 0.5),), 0) == weight_at(((7, 0.5),), 9) == 0.5
