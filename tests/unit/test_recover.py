"""Which of two models is worse."""

from __future__ import annotations

import json
import math

import pytest

from pipeline.config.recipe import OptimConfig, Recipe, RecoverConfig
from pipeline.recover import Score, recover
from pipeline.rundir.stage import Stage
from pipeline.training.watchdog import Watchdog
from pipeline.world import World
from tests.patience import PATIENCE_S
from tests.unit.test_assemble import make_run


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


def test_what_cannot_be_tuned_is_refused_before_an_older_model_is_set_aside(tmp_path):
    run, _ = make_run(tmp_path, "v1.1")
    run.data.mkdir()
    (run.data / "manifest.json").write_text("{}")
    for name in ("teacher", "distill"):
        (run.stage(name) / "stage.json").write_text(json.dumps({"outputs_hash": name}))

    def stage_of(assembly: str) -> tuple[Recipe, Stage]:
        recipe = Recipe(recover=RecoverConfig(assembly=assembly, optim=OptimConfig(num_steps=3)))
        return recipe, Stage.of(recipe, run, "recover")

    _, tuned = stage_of("e3x2-d3x2")
    tuned.begin()
    tuned.publish([], started_at=0)
    mistaken, stage = stage_of("e3x2-d3x3")
    world = World.from_environment()
    with pytest.raises(ValueError, match="assembly e3x2-d3x3 does not fit: the decoder has 6 layers"):
        recover(mistaken, stage, world, Watchdog(run.root / "heartbeat", world, hang_timeout_s=PATIENCE_S))
    assert tuned.stamp() is not None
