"""One screen that tells how a run stands: jobs, progress, time left, checkpoints, restarts and why, disk."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table

from pipeline.config import Recipe, parse_recipe, recipe_parser
from pipeline.rundir import RunDir
from slurm.controller import Job, jobs_of_run
from slurm.stages import words_for
from slurm.starts import TRAINING, Start, progress, read_starts, stage_folder
from slurm.submit import CHAIN, chain_of, is_done, written_jobs

NUM_STARTS_SHOWN = 4
SHARED_STAGES = ("data", "teacher", "baseline")  # of a sweep: its points share them


@dataclass(frozen=True)
class Row:
    """One stage as the screen shows it."""

    stage: str
    job: str
    state: str
    progress: str = ""
    loss: str = ""
    tokens_per_s: str = ""
    left: str = ""
    checkpoint: str = ""


def screen(run_dir: Path) -> RenderableType:
    """Everything about a run, for a terminal.

    Raises:
        ValueError: this is no run directory that `submit` made.
        FileNotFoundError: no SLURM on this machine.
    """
    if points_of_sweep(run_dir):
        return _sweep_screen(run_dir)
    recipe = recipe_of(run_dir)
    jobs = jobs_of_run(run_dir)
    table = Table(box=None, pad_edge=False, title=f"{recipe.name}  {run_dir}", title_justify="left")
    for heading in ("stage", "job", "state", "progress", "loss", "tokens/s", "time left", "checkpoint"):
        table.add_column(heading)
    for row in rows(recipe, run_dir, jobs):
        table.add_row(*vars(row).values())
    lines = [*_history(run_dir), _disk(run_dir)]
    return Group(table, *(["", *lines]))


def points_of_sweep(folder: Path) -> list[Path]:
    """Run directories of the points of a sweep, in the order of its tasks; none when this is no sweep."""
    file = folder / "slurm" / "points.txt"
    return [Path(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.is_file() else []


def _sweep_screen(folder: Path) -> RenderableType:
    """One line for each point: the stage that it stands at."""
    jobs = jobs_of_run(folder)
    table = Table(box=None, pad_edge=False, title=f"sweep  {folder}", title_justify="left")
    for heading in ("point", "stage", "job", "state", "progress", "loss", "tokens/s", "time left", "checkpoint"):
        table.add_column(heading)
    history = []
    for task, root in enumerate(points_of_sweep(folder)):
        mine = [job for job in jobs if job.label.endswith(f"_{task}")]
        own = [row for row in rows(recipe_of(root), root, mine) if row.stage not in SHARED_STAGES]
        current = next((row for row in own if row.state not in ("done", "completed")), own[-1])
        table.add_row(root.name, *vars(current).values())
        history += [f"{root.name}: {line}" for line in _history(root)]
    return Group(table, "", *history, _disk(folder))


def check_run(run_dir: Path) -> None:
    """Refuse what is neither the run directory of a run nor that of a sweep."""
    if not (run_dir / "recipe.yaml").is_file() and not points_of_sweep(run_dir):
        raise ValueError(f"{run_dir} is no run directory: it has no recipe.yaml, which `submit` writes")


def recipe_of(run_dir: Path) -> Recipe:
    """The recipe that a run was submitted with."""
    check_run(run_dir)
    path = run_dir / "recipe.yaml"
    recipe, _ = parse_recipe(recipe_parser("python -m slurm", ""), ["--config", str(path)])
    return recipe


def rows(recipe: Recipe, run_dir: Path, jobs: list[Job]) -> list[Row]:
    """One row for each stage."""
    run = RunDir(run_dir)
    written = written_jobs(run_dir)
    found = []
    done = True
    for stage in chain_of(recipe):
        done = done and is_done(stage, recipe, run)
        mine = [job for job in jobs if job.stage == stage]
        newest = max((job.number for job in mine), default=written.get(stage, 0))
        tasks = [job for job in mine if job.number == newest]
        state = state_of(tasks, done, last_words(run_dir, stage, newest) if newest else "")
        running = any(job.state == "RUNNING" for job in tasks)
        figures = training_figures(recipe, run_dir, stage, newest, running) if stage in TRAINING else {}
        text = progress(run_dir, stage) if stage_folder(run_dir, stage).is_dir() else ""
        found.append(Row(stage, str(newest or ""), state, **{"progress": text, **figures}))
    return found


def state_of(tasks: list[Job], done: bool, words: str) -> str:
    """A job's state in a few words; of an array, how many of its tasks are in which."""
    if not tasks:
        return "done" if done else words or "not submitted"
    counts: dict[str, int] = {}
    for job in tasks:
        state = job.state.lower()
        if state == "pending" and job.reason == "Dependency":
            state = "waiting"  # for the stage before
        elif state == "pending" and job.reason not in ("None", ""):
            state += f" ({job.reason}{f', expected {clock(job.start)}' if job.start != 'N/A' else ''})"
        counts[state] = counts.get(state, 0) + 1
    if len(tasks) == 1:
        return next(iter(counts))
    return ", ".join(f"{count} {state}" for state, count in counts.items())


def clock(moment: str) -> str:
    """A moment as SLURM writes it, to the minute."""
    return time.strftime("%a %H:%M", time.strptime(moment, "%Y-%m-%dT%H:%M:%S"))


def last_words(run_dir: Path, stage: str, number: int) -> str:
    """How the newest start of a job ended, for when SLURM has forgotten it."""
    ended = [starts[-1].why for _, starts in histories(run_dir, stage, number) if starts]
    return ended[-1] if ended else "not in the queue"


def histories(run_dir: Path, stage: str, number: int | str = "") -> list[tuple[str, list[Start]]]:
    """(label of a job, its starts) for the jobs of a stage, oldest first."""
    folders = _by_age(path for word in words_for(stage) for path in run_dir.glob(f"logs/{word}-{number}*/"))
    return [(folder.name.partition("-")[2], read_starts(folder)) for folder in folders]


def _by_age(paths: Iterable[Path]) -> list[Path]:
    """Paths, what was written last at the end."""
    return sorted(paths, key=lambda path: path.stat().st_mtime)


def training_figures(recipe: Recipe, run_dir: Path, stage: str, number: int, running: bool) -> dict[str, str]:
    """Step, loss, speed, time left and checkpoint of a training stage; of its newest training, where it has several."""
    whole = stage_folder(run_dir, stage)
    files = _by_age([*whole.glob("metrics.jsonl"), *whole.glob("*/metrics.jsonl")])
    folder = files[-1].parent if files else whole
    optim = getattr(recipe, stage).optim
    figures = {"progress": "", "checkpoint": checkpoint_age(folder)}
    record = last_record(folder / "metrics.jsonl")
    if record is None:
        return figures
    figures["progress"] = f"step {record['step']} of {optim.num_steps}{'' if folder == whole else f', {folder.name}'}"
    figures["loss"] = loss_of(record)
    figures["tokens_per_s"] = f"{record['tokens_per_s']:,.0f}"
    starts = [start for _, starts in histories(run_dir, stage, number) for start in starts]
    if running and starts and folder == whole:
        written_s = (folder / "metrics.jsonl").stat().st_mtime
        begun = starts[-1].progress_before.removeprefix("step_")
        num_made = record["step"] - (int(begun) if begun.isdigit() else 0)
        if num_made > 0:
            left_s = (optim.num_steps - record["step"]) * (written_s - starts[-1].begin_s) / num_made
            ends = time.strftime("%a %H:%M", time.localtime(written_s + left_s))
            figures["left"] = f"{duration(left_s)} ({ends})"
    return figures


def loss_of(record: dict[str, Any]) -> str:
    if "task" in record:
        return f"task {record['task']:.3f}"
    local = [value for name, value in record.items() if name.startswith("hidden")]
    return f"hidden {sum(local) / len(local):.3f}" if local else ""


def last_record(path: Path) -> dict[str, Any] | None:
    """The newest record of losses in a metrics.jsonl."""
    if not path.is_file():
        return None
    for line in reversed(path.read_text(encoding="utf-8").splitlines()):
        try:
            record = json.loads(line)
        except json.JSONDecodeError:  # it is being written
            continue
        if "tokens_per_s" in record:
            return record
    return None


def checkpoint_age(folder: Path) -> str:
    published = sorted(folder.glob("checkpoints/step_*/manifest.json"))
    if not published:
        return ""
    try:
        age_s = time.time() - published[-1].stat().st_mtime
    except FileNotFoundError:  # pruned between the two looks
        return ""
    return f"step {int(published[-1].parent.name.removeprefix('step_'))}, {duration(age_s)} ago"


def duration(seconds: float) -> str:
    minutes = round(seconds) // 60
    if minutes == 0:
        return f"{round(seconds)} s"
    if minutes >= 24 * 60:
        return f"{minutes // 1440} d {minutes // 60 % 24} h"
    return f"{minutes // 60} h {minutes % 60:02} min" if minutes >= 60 else f"{minutes} min {round(seconds) % 60:02} s"


def _history(run_dir: Path) -> list[str]:
    """Starts that ended otherwise than well, and why; the newest of each stage."""
    lines = []
    for stage in CHAIN:
        told = [
            f"{stage} {label} start {start.number} ({start.nodes}): {start.why}"
            for label, starts in histories(run_dir, stage)
            for start in starts
            if start.why not in ("", "finished")
        ]
        lines += [f"... {len(told) - NUM_STARTS_SHOWN} more"] if len(told) > NUM_STARTS_SHOWN else []
        lines += told[-NUM_STARTS_SHOWN:]
    return lines


def _disk(run_dir: Path) -> str:
    used = sum(
        os.lstat(os.path.join(folder, name)).st_size
        for folder, _, names in os.walk(run_dir)
        for name in names
        if os.path.lexists(os.path.join(folder, name))
    )
    free = shutil.disk_usage(run_dir).free
    return f"disk: {used / 2**30:.2f} GiB in this run, {free / 2**30:.1f} GiB free"


def newest_log(run_dir: Path, stage: str | None, rank: int | None) -> Path:
    """The log of a rank (or launch.log) in the newest start of a stage, by default of the stage that wrote last.

    Raises:
        ValueError: this is no run directory, or that of a sweep.
        FileNotFoundError: no such log; names those there are.
    """
    check_run(run_dir)
    if points_of_sweep(run_dir):
        raise ValueError(f"{run_dir} is a sweep: name the folder of a point, such as {points_of_sweep(run_dir)[0]}")
    words = words_for(stage) if stage else ("*",)
    folders = _by_age(path for word in words for path in run_dir.glob(f"logs/{word}-*/start-*"))
    if not folders:
        raise FileNotFoundError(f"no job of {stage or run_dir} has started yet: `python -m slurm status {run_dir}`")
    name = "launch.log" if rank is None else f"rank-{rank}.log"
    with_log = [folder for folder in folders if (folder / name).is_file()]
    if not with_log:
        others = ", ".join(sorted(path.name for path in folders[-1].glob("*.log"))) or "no log"
        raise FileNotFoundError(f"no {name}: {folders[-1]} has {others}")
    return with_log[-1] / name
