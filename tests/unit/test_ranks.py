"""How many ranks a machine runs of those that a recipe asks for."""

from __future__ import annotations

import pytest
import torch

from pipeline.config.cli import parse_recipe, recipe_parser
from pipeline.planning.ranks import ranks_here
from pipeline.rundir import RunDir
from pipeline.study import run as study_run


@pytest.mark.parametrize(("num_gpus", "expected"), [(0, 8), (1, 1), (3, 2), (7, 4), (8, 8), (16, 8)])
def test_a_machine_with_fewer_gpus_shares_the_same_batches(num_gpus, expected, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: num_gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
    recipe, *_ = parse_recipe(recipe_parser("test", ""), ["--config", "t5_large"])
    assert (recipe.launch.num_ranks, ranks_here(recipe).num_ranks) == (8, expected)
    assert ("8, and this machine has" in capsys.readouterr().out) == (expected < 8)


def test_trainings_of_a_study_share_them_too(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    started = []
    monkeypatch.setattr(study_run, "run_stage", lambda name, recipe, *_: started.append(recipe.launch.num_ranks))
    recipe, *_ = parse_recipe(recipe_parser("test", ""), ["--config", "demo"])
    study_run._run(recipe, RunDir(tmp_path), ("teacher",))
    assert (recipe.launch.num_ranks, started) == (2, [1])
