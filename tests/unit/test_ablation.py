"""The ablation runner's arithmetic and recipes; its runs are those of stage distill."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.bench.ablation import (
    AS_IT_IS,
    CONFIGURATIONS,
    FURTHER,
    Outcome,
    cell,
    changes_of,
    json_lines,
    recipe_with,
    spread,
    table,
)
from pipeline.config.kinds import fields_of_kind
from pipeline.planning import forecast
from pipeline.planning.forecast import distill_flops
from pipeline.rundir.run_dir import RunDir

RUN = RunDir(Path("somewhere"))


@pytest.mark.parametrize("name", [*CONFIGURATIONS, *FURTHER])
def test_every_configuration_changes_one_thing_and_keeps_the_budget(name):
    """Everything else stays: teacher, data, steps, batches. Two loss weights are one thing where they say one thing."""
    plain = recipe_with("minute", RUN, ())
    changed = recipe_with("minute", RUN, changes_of(name, plain, seed=3, bleu_examples=7))
    before, after = (fields_of_kind(each, "identity") for each in (plain, changed))
    different = {field for field in after if before[field] != after[field]} - {"seed"}
    assert len(different) == {AS_IT_IS: 0, "task-loss-only": 2, "attention-losses": 2}.get(
        name, 1 + ("-local-" in name)
    )
    assert all(field.startswith("distill.") for field in different)
    assert fields_of_kind(plain, "schedule") == fields_of_kind(changed, "schedule")
    assert changed.seed == 3
    assert changed.distill.loop.validate_every_steps == changed.distill.optim.num_steps
    assert changed.distill.loop.validation_bleu_examples == 7
    assert changed.resolved_run_dir == "somewhere"


@pytest.mark.parametrize("name", [AS_IT_IS, "draws-one", "draws-coarsest-local-sixth", "local-only"])
def test_steps_at_equal_flops_cost_as_much(name, monkeypatch):
    """On average over many draws; as it is the recipe keeps its own."""
    monkeypatch.setattr(forecast, "NUM_DRAWS", 2000)
    plain = recipe_with("demo", RUN, ())
    changed = recipe_with("demo", RUN, changes_of(name, plain, 0, 0, equal_flops_of="demo"))
    assert distill_flops(changed) == pytest.approx(distill_flops(plain), rel=0.01)
    steps, local_steps = plain.distill.optim.num_steps, plain.distill.local_steps
    assert (changed.distill.optim.num_steps == steps) == (name == AS_IT_IS)
    assert changed.distill.local_steps == {"local-only": changed.distill.optim.num_steps}.get(
        name, steps // 6 if "sixth" in name else local_steps
    )


def test_at_most_twelve_configurations_by_default():
    assert len(CONFIGURATIONS) <= 12
    assert not CONFIGURATIONS.keys() & FURTHER.keys()


FOUND = {
    AS_IT_IS: {0: Outcome({"validation/e6-d6": 1.0}, 10.0), 1: Outcome({"validation/e6-d6": 1.2}, 20.0)},
    "near": {0: Outcome({"validation/e6-d6": 1.3}, 10.0), 1: Outcome({"validation/e6-d6": 1.2}, 10.0)},
    "far": {0: Outcome({"validation/e6-d6": 1.4}, 10.0), 1: Outcome({"validation/e6-d6": 1.5}, 10.0)},
}


def test_means_spreads_and_marks():
    assert spread(FOUND[AS_IT_IS], "validation/e6-d6") == pytest.approx((1.1, 0.1))
    assert cell(FOUND["near"], "validation/e6-d6", FOUND[AS_IT_IS]) == "1.2500 +- 0.0500"
    assert cell(FOUND["far"], "validation/e6-d6", FOUND[AS_IT_IS]) == "1.4500 +- 0.0500 *"
    alone = {0: FOUND["far"][0]}
    assert cell(alone, "validation/e6-d6", FOUND[AS_IT_IS]) == "1.4000 +- 0.0000", "one seed says nothing"
    assert table(FOUND).splitlines()[2] == "| as-it-is | 1.1000 +- 0.1000 | 15 |"
    unmeasured = {**FOUND, "later": {0: Outcome({"bleu/e6-d6": 20.0}, 10.0)}}
    assert table(unmeasured).splitlines()[2] == "| as-it-is | 1.1000 +- 0.1000 |  | 15 |"
    assert table(unmeasured).splitlines()[5] == "| later |  | 20.00 +- 0.00 | 10 |"
    records = [json.loads(line) for line in json_lines(FOUND)]
    assert [record["configuration"] for record in records] == list(FOUND)
    assert records[2]["values"] == {"0": 1.4, "1": 1.5}
