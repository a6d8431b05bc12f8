"""The engine against plain PyTorch, at length: a pairwise cover of configurations, ranks, accumulation and activation
checkpointing; hundreds of random draws; and every trap of ZeRO, shown to bite where its fix is taken out."""

from __future__ import annotations

import json
import re
import subprocess

import pytest

from pipeline.bench import step
from pipeline.bench.__main__ import main as bench
from pipeline.doctor import CHECKS
from tests.distributed.engine_ranks import ONE, SEVERAL
from tests.ranks import run_ranks

pytestmark = [pytest.mark.faults, pytest.mark.timeout(2400)]

# (configuration, accumulated micro-batches, activation checkpointing) by number of ranks: every pair of values meets
COVER = {
    1: [("zero3", 1, False), ("zero3_hpz", 3, True), ("zero3_offload", 1, True), ("zero2_replicated", 3, False)],
    2: [("zero3", 3, True), ("zero3_hpz", 1, False), ("zero3_offload", 3, False), ("zero2_replicated", 1, True)],
    4: [("zero3", 1, True), ("zero3_hpz", 3, False), ("zero3_offload", 3, True), ("zero2_replicated", 1, False)],
}


@pytest.mark.parametrize("draws", [ONE, SEVERAL], ids=len)
@pytest.mark.parametrize("num_ranks", sorted(COVER))
def test_the_cover_equals_plain_pytorch(num_ranks, draws, tmp_path, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(min(2, num_ranks)))  # two nodes for hpZ where there are four ranks
    found = run_ranks(
        num_ranks,
        "tests.distributed.cover_ranks:cells",
        timeout_s=2400,
        folder=str(tmp_path),
        cells=COVER[num_ranks],
        draws=draws,
    )[0]
    for cell in found:
        print(cell)
    for cell in found:
        assert cell["loss"] <= 1e-5, cell
        if cell["optimizer"] == "sgd":
            assert cell["weight"] <= 1e-5, cell
        else:
            assert cell["distance"] <= 1e-3, cell


@pytest.mark.parametrize("draws", [ONE, SEVERAL], ids=len)
def test_200_random_draws_never_invalidate_the_trace(draws):
    kwargs = {"num_steps": 200, "draws": draws}
    first, second = run_ranks(2, "tests.distributed.cover_ranks:random_draws", timeout_s=900, **kwargs)
    assert first["invalidated"] == second["invalidated"] == 0
    assert first["prefetches"]
    assert second["prefetches"]
    assert sum(a != b for a, b in zip(first["draws"], second["draws"], strict=True)) > 150
    assert len(set(first["draws"])) > 50
    assert first["losses"] == pytest.approx(first["expected"], rel=1e-4)


OF_THE_TRAP = re.compile("(Type|Attribute|Name|Import|Key)Error")
"""Errors that a trap makes which no longer fits the code that it is set in: then it shows nothing."""


def trained(trap, tmp_path, ds_config="zero3_cpu"):
    kwargs = {"folder": str(tmp_path), "trap": trap, "ds_config": ds_config}
    return run_ranks(2, "tests.distributed.trap_ranks:trained", timeout_s=240, **kwargs)[0]


def in_the_trap(trap, tmp_path, ds_config="zero3_cpu"):
    """What was trained; None where that failed or hung."""
    found, failure = None, ""
    try:
        found = trained(trap, tmp_path, ds_config)
    except (AssertionError, subprocess.TimeoutExpired) as error:
        failure = str(error)
    print(trap, "->", found or failure.strip().splitlines()[-1])
    assert not OF_THE_TRAP.search(failure), failure
    return found


@pytest.mark.parametrize("ds_config", ["zero3_cpu", "zero2_replicated"])
def test_without_traps_the_training_is_exact(tmp_path, ds_config):
    found = trained("none", tmp_path, ds_config)
    assert found["error"] < 1e-4
    assert found["invalidated"] == (1 if ds_config == "zero3_cpu" else 0)  # where the local phase ends


@pytest.mark.parametrize(
    ("trap", "ds_config"),
    [
        ("leaves are no leaves", "zero3_cpu"),
        ("DeepSpeed clips by default", "zero3_cpu"),
        ("gradients accumulate in bf16", "zero3"),
        ("states are keywords", "zero3_cpu"),
        ("states require no grad", "zero3_cpu"),
        ("ranks are averaged", "zero3_cpu"),
        ("gradients come in any order", "zero2_replicated"),
    ],
)
def test_each_trap_bites_without_its_fix(tmp_path, trap, ds_config):
    """It fails, hangs, or trains something else."""
    found = in_the_trap(trap, tmp_path, ds_config)
    assert found is None or found["error"] > 1e-3


def test_leaves_called_only_when_used_break_the_order_of_gathers(tmp_path):
    found = in_the_trap("unused leaves are not called", tmp_path)
    assert found is None or found["invalidated"] > 1


def test_the_doctor_trains_with_layers_that_a_step_does_not_use(tmp_path):
    assert "equals plain PyTorch" in CHECKS["collectives"](tmp_path)


def test_the_benchmark_of_gpus_runs_at_toy_size(monkeypatch):
    """Every row but the Trainer's, which needs a package that only `make bench-gpu` installs."""
    monkeypatch.setattr(step, "find_spec", lambda name: None)
    measures, note = step.on_devices(1, steps=1, num_layers=6, d_model=64, d_ff=64, shape_BST=(2, 8, 4))
    assert {measure.baseline_name for measure in measures} == {"with eager losses", "task loss alone", "estimate"}
    assert all(measure.ours > 0 and measure.baseline > 0 for measure in measures)
    assert "pip install accelerate" in note


def test_the_benchmark_of_host_time_prints_both_sides(capsys):
    assert bench(["step", "--part", "host", "--steps", "1"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert len(lines) == 8  # ZeRO-2 and ZeRO-3, a micro-batch and an optimizer step, one draw and the default
    assert all(0 < line["floor"] < line["baseline"] and line["floor"] < line["ours"] for line in lines)
