"""Which of two models is worse."""

from __future__ import annotations

import math

import pytest

from pipeline.recover import Score


@pytest.mark.parametrize(
    ("after", "is_worse"),
    [
        (Score(20.0, 2.0), False),
        (Score(20.1, 1.9), False),
        (Score(19.9, 1.9), True),
        (Score(20.1, 2.1), True),
        (Score(20.1, math.nan), True),
    ],
)
def test_a_model_is_worse_that_lost_bleu_or_loss(after: Score, is_worse: bool) -> None:
    assert after.is_worse_than(Score(20.0, 2.0)) == is_worse
