"""Variants of a study: what each changes, what it costs, and when it counts as different."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.config.kinds import fields_of_kind
from pipeline.planning import distill_flops
from pipeline.study import cells as study_cells
from pipeline.study.cells import AS_IT_IS, Cell, Cells
from pipeline.study.run import study_config
from pipeline.study.settings import VariantConfig
from pipeline.study.table import write_results
from pipeline.study.variants import Spread

READY = {name: study_config(["--config", f"studies/{name}"])[0] for name in ("ablation", "draws")}


@pytest.mark.parametrize(
    ("study", "variant"),
    [pytest.param(name, each, id=each.name) for name, study in READY.items() for each in study.variants],
)
def test_every_ready_variant_changes_one_thing_of_the_method(study, variant):
    """Two loss weights are one thing where they say one thing."""
    cells = Cells(READY[study].recipes, Path("somewhere"))
    before, after = (fields_of_kind(cells.recipe("some", {}, change), "identity") for change in ((), variant.arguments))
    different = {field for field in after if before[field] != after[field]}
    assert different == {argument.removeprefix("--") for argument in variant.arguments[::2]}
    assert all(field.startswith("distill.") for field in different)
    assert len(different) == {"task-loss-only": 2, "attention-losses": 2, "one-longer-local": 2}.get(variant.name, 1)


@pytest.mark.parametrize("change", ["--distill.draws [sampled]", "--distill.sampler sandwich", "--distill.init last"])
def test_a_variant_costs_what_the_run_as_it_is_costs(change):
    cells = Cells(["demo"], Path("somewhere"))
    plain, changed = (cells.modular(600, 1.0, 3, each) for each in (AS_IT_IS, VariantConfig(name="v", change=change)))
    assert distill_flops(changed.recipe, 5000) == pytest.approx(distill_flops(plain.recipe, 5000), rel=0.02)
    assert (changed.recipe.distill.optim.num_steps == 600) == ("init" in change)
    assert changed.recipe.distill.local_steps == plain.recipe.distill.local_steps == 150
    assert changed.recipe.seed == 3


def test_local_steps_are_those_of_the_recipes_own_number_of_steps(monkeypatch):
    """A variant with a quarter of the steps of `minute` local has a quarter of any budget so."""
    monkeypatch.setattr(study_cells, "MANY_DRAWS", 10)
    cells = Cells(["minute"], Path("somewhere"))
    recipe = cells.recipe("base", {}).distill
    quarter = VariantConfig(name="quarter", change=f"--distill.local_steps {recipe.optim.num_steps // 4}")
    assert cells.modular(400, 1.0, 0, quarter).recipe.distill.local_steps == 100
    whole = VariantConfig(name="whole", change=f"--distill.local_steps {recipe.optim.num_steps}")
    distill = cells.modular(400, 1.0, 0, whole).recipe.distill
    assert distill.local_steps == distill.optim.num_steps


def cell_of(cells: Cells, variant: VariantConfig, seed: int, losses: list[float]) -> Cell:
    """A modular run whose validations found these losses at 6x."""
    cell = cells.modular(20, 1.0, seed, variant)
    cell.run.stage("distill").mkdir(parents=True)
    records = [{"validation/e6-d6": loss, "validation/teacher": 0.1, "bleu/e6-d6": 50 + loss} for loss in losses]
    lines = [json.dumps({"step": 10, "hidden": 0.5}), *map(json.dumps, records)]
    (cell.run.stage("distill") / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return cell


def test_a_variant_differs_where_both_spreads_do_not_reach(tmp_path, monkeypatch):
    """The weights of the end count, which are what is scored: 1.0 of (0.5, 1.0)."""
    monkeypatch.setattr(study_cells, "MANY_DRAWS", 10)
    cells = Cells(["minute"], tmp_path)
    found = [
        cell_of(cells, variant, seed, losses)
        for variant, *of_seeds in (
            (AS_IT_IS, [0.5, 1.0], [1.2]),
            (VariantConfig(name="near", change="--distill.init last"), [1.3], [1.16]),
            (VariantConfig(name="far", change="--distill.init average"), [1.4], [1.5]),
        )
        for seed, losses in enumerate(of_seeds)
    ]
    text = write_results("ours", [], {20: found}, tmp_path)
    assert "| as it is | 20 | 8 | 1.1000 ± 0.1000 | 51.10 ± 0.10 |" in text
    assert "| near | 20 | 8 | 1.2300 ± 0.0700 | 51.23 ± 0.07 |" in text
    assert "| far | 20 | 8 | 1.4500 ± 0.0500 * | 51.45 ± 0.05 * |" in text
    figures = json.loads((tmp_path / "study.json").read_text())
    assert figures["sizes"] == []
    assert [each["name"] for each in figures["variants"]] == ["as it is", "near", "far"]
    assert figures["variants"][2]["measures"]["validation/e6-d6"]["mean"] == pytest.approx(1.45)
    assert not (tmp_path / "study.png").exists()


def test_one_seed_has_no_spread_to_compare_with():
    assert not Spread.of([1.0]).differs_from(Spread.of([2.0, 2.0]))
    assert Spread.of([1.0, 1.0]).differs_from(Spread.of([2.0, 2.0]))
