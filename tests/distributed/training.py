"""Stages of a small recipe in forked ranks: the program that people run, without the seconds of starting Python."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any
from unittest import mock

from pipeline.__main__ import main
from pipeline.config import parse_recipe, recipe_parser, recipe_yaml
from pipeline.data import StepBatch
from pipeline.model.draws import text_of
from pipeline.training.loop import Trainer
from tests.forks import run_ranks, start_ranks

ROOT = Path(__file__).resolve().parents[2]
SMALL = (
    "--data.num_demo_pairs=600",
    "--teacher.optim.num_steps=4",
    "--teacher.loop.validate_every_steps=100",
    "--distill.granularities=[2,3]",
    "--distill.local_steps=3",
    "--distill.optim.num_steps=8",
    "--distill.optim.warmup_steps=3",
    "--distill.batch.micro_batches_per_step=4",
    "--distill.loop.log_every_steps=1",
    "--distill.loop.validate_every_steps=4",
    "--distill.loop.save_every_steps=2",
)


def stage(name: str, run_dir: str, options: tuple[str, ...]) -> None:
    """What a rank does: `python -m pipeline NAME ...`."""
    main([name, "--config", "minute", "--run_dir", run_dir, *SMALL, *options])


def stage_step_by_step(name: str, run_dir: str, options: tuple[str, ...]) -> None:
    """The same, and a line for every step that the loop makes: its number, its learning rate, the lengths of source and
    target of each micro-batch, and the draws that it takes."""

    def told(self: Trainer, step: int, batch: StepBatch, draws: Any, sums: Any, learning_rate: float) -> None:
        lengths = [(each.source_BS.shape[1], each.labels_BT.shape[1]) for each in batch.micro_batches]
        with open(Path(run_dir) / "steps.jsonl", "a") as file:
            file.write(json.dumps([step, learning_rate, lengths, list(map(text_of, draws))]) + "\n")
        untold(self, step, batch, draws, sums, learning_rate)

    untold = Trainer._step
    with mock.patch.object(Trainer, "_step", told):
        stage(name, run_dir, options)


def start(name: str, num_ranks: int, run_dir: Path, *options: str, log: Path | None = None) -> list[ForkServerProcess]:
    return start_ranks(num_ranks, stage, name, str(run_dir), options, log=log)


def run(name: str, num_ranks: int, run_dir: Path, *options: str, log: Path | None = None) -> list[int | None]:
    """Exit codes of the ranks."""
    return run_ranks(num_ranks, stage, name, str(run_dir), options, log=log)


def prepare(run_dir: Path) -> Path:
    """A run directory with data and a teacher of four steps, ready to distil."""
    run_dir.mkdir(parents=True)
    recipe = run_dir / "recipe.yaml"
    recipe.write_text(recipe_yaml(parse_recipe(recipe_parser("test", ""), ["--config", "minute", *SMALL])[0]))
    build = [sys.executable, "-m", "data_prep", "build", "--config", str(recipe), "--out", str(run_dir / "data")]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    assert run("teacher", 1, run_dir) == [0]
    return run_dir


def copy_of(prepared: Path, run_dir: Path) -> Path:
    """The same start for another run."""
    return shutil.copytree(prepared, run_dir)


def records(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "distill" / "metrics.jsonl").read_text().splitlines()]


def library(run_dir: Path) -> bytes:
    return (run_dir / "distill" / "library" / "modular.safetensors").read_bytes()
