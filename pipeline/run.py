"""All stages in order, each in processes of its own: the same commands that a cluster job runs."""

from __future__ import annotations

import dataclasses
import fcntl
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import IO

from data_prep.processes import die_with_parent, mpiexec, on_this_machine
from pipeline.config import Recipe, recipe_yaml
from pipeline.exits import EXIT_REQUEUE
from pipeline.rundir import RunDir, Stage, left_out, write_atomic

TRAINING = ("teacher", "distill", "baseline")
ORDER = ("data", *TRAINING, "search", "assemble", "evaluate", "report")
SKIP_THEMSELVES = ("data", "report")  # units of data that are there stay; a report is drawn in seconds


def run_all(recipe: Recipe, run: RunDir, *, extend: bool = False, dry_run: bool = False, verbose: bool = False) -> None:
    """Run every stage of the recipe that is not done yet; a dry run only checks the recipe and says what it would do.

    Raises:
        ValueError, FileNotFoundError, PermissionError: a mistake in the recipe, or another process works in this run.
        SystemExit: a stage failed, with its exit code.
    """
    order = [name for name in ORDER if name not in left_out(recipe)]
    all_done = all(_is_done(recipe, run, name) for name in order if name not in SKIP_THEMSELVES)
    if dry_run or not all_done:
        from pipeline.planning import preflight, ranks_here  # late: with everything done nothing needs torch

        recipe = dataclasses.replace(recipe, launch=ranks_here(recipe))
        preflight(recipe, run, extend=extend)
    if dry_run:
        from pipeline.planning import preview_of

        print("\n".join(preview_of(recipe, run)))
        for name in order:
            command = shlex.join(stage_command(name, recipe, run))
            print(f"{name:<9} {'up to date' if _is_done(recipe, run, name) else command}")
        return
    run.root.mkdir(parents=True, exist_ok=True)
    started_at = time.monotonic()
    with lock(run):
        stop_file(run).unlink(missing_ok=True)
        write_recipe(recipe, run)
        for name in order:
            _bring_up_to_date(name, recipe, run, extend=extend, verbose=verbose)
            if name == "data" and not all_done:
                from pipeline.planning import check_micro_batches

                check_micro_batches(recipe, run)
    print(f"all done in {time.monotonic() - started_at:.1f} s")
    print(
        f"Look at {run.stage('report') / 'report.html'}; every checkpoint lies in {run.stage('assemble') / 'models'}."
    )
    print(
        "Next: AutoModelForSeq2SeqLM.from_pretrained(...) on one of them, or `python -m pipeline run --config my.yaml` "
        "with your own model and data (README.md)."
    )


def _bring_up_to_date(name: str, recipe: Recipe, run: RunDir, *, extend: bool, verbose: bool) -> None:
    """Run a stage that is not done, and say how long it took."""
    if _is_done(recipe, run, name):
        print(f"{name:<9} up to date", flush=True)
        return
    started_at = time.monotonic()
    options = ["--extend"] * (extend and name in TRAINING) + ["--verbose"] * (verbose and name != "data")
    run_stage(name, recipe, run, options)
    print(f"{name:<9} {time.monotonic() - started_at:6.1f} s", flush=True)


def _is_done(recipe: Recipe, run: RunDir, name: str) -> bool:
    """Whether a stage's stamp says so; never of those that decide by themselves when they are started."""
    if name in SKIP_THEMSELVES:
        return False
    try:
        return Stage.of(recipe, run, name).stamp() is not None
    except FileNotFoundError:  # of a stage before it
        return False


def stage_command(name: str, recipe: Recipe, run: RunDir) -> list[str]:
    """The command of one stage on this machine."""
    launch = recipe.launch
    if name == "data":
        build = [sys.executable, "-m", "data_prep", "build", "--config", str(run.recipe), "--out", str(run.data)]
        return [mpiexec(), "-n", str(launch.num_mpi_ranks), *build] if launch.num_mpi_ranks > 1 else build
    program = ["-m", "pipeline", name, "--config", str(run.recipe)]
    if name in (*TRAINING, "evaluate") and launch.num_ranks > 1:
        torchrun = ["-m", "pipeline.launch", "--standalone", "--nproc-per-node", str(launch.num_ranks)]
        return [sys.executable, *torchrun, *program]
    return [sys.executable, *program]


def write_recipe(recipe: Recipe, run: RunDir) -> None:
    """Put the whole recipe where the stages of a run read it."""
    write_atomic(run.recipe, recipe_yaml(recipe))


def run_stage(name: str, recipe: Recipe, run: RunDir, options: list[str]) -> None:
    """Run one stage in processes of its own, on the recipe that `write_recipe` has put there.

    Raises:
        SystemExit: the stage failed, with its exit code, or was asked to stop (85), or this process was told to end and
            the stage had nothing to save (128 and the signal).
    """
    if stop_file(run).exists():
        print(f"stopped before {name}, because {stop_file(run)} exists: run the same command again to continue")
        raise SystemExit(EXIT_REQUEUE)
    command = stage_command(name, recipe, run) + options
    requeue = run.root / name / "REQUEUE"
    requeue.unlink(missing_ok=True)
    threads = str(recipe.launch.threads_per_rank)
    environment = {
        **on_this_machine(os.environ), "OMP_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "false",
    }  # fmt: skip
    code, told = _ended(command, environment)
    if requeue.exists():
        print(f"{name} was asked to stop and saved its state: run the same command again to continue")
        raise SystemExit(EXIT_REQUEUE)
    if told is not None:
        what = f"{name} was ended" if code else f"{name} is done, and the run was ended"
        print(f"{what} by {told.name}: run the same command again to continue", file=sys.stderr)
        raise SystemExit(128 + told)
    if code < 0:
        memory = ", perhaps for want of memory" if -code == signal.SIGKILL else ""
        print(f"{name} was ended by {signal.Signals(-code).name}{memory}", file=sys.stderr)
        raise SystemExit(1)
    if code:
        raise SystemExit(code)


def _ended(command: Sequence[str], environment: Mapping[str, str]) -> tuple[int, signal.Signals | None]:
    """(exit code of a command that has ended, the signal that this process was told to end by meanwhile).

    The command hears of that signal too, as SIGTERM. It is in a session of its own, so that it does not hear Ctrl-C,
    which this process answers, and it dies with this process.
    """
    told: list[signal.Signals] = []
    process: subprocess.Popen[bytes] | None = None

    def pass_on(number: int, frame: FrameType | None) -> None:
        told.append(signal.Signals(number))
        if process is not None:
            process.terminate()

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, preexec_fn=die_with_parent, start_new_session=True
        )
        if told:
            process.terminate()
        return process.wait(), told[0] if told else None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def stop_file(run: RunDir) -> Path:
    """What asks a run to stop in good order, while it is there."""
    return run.root / "STOP"


def lock(run: RunDir, *, wait: bool = False) -> IO[str]:
    """Hold the run directory against a second `run`; the lock goes with this process, and its children do too.

    Args:
        wait: until another process has left it, in place of an error.

    Raises:
        ValueError: another process holds it.
    """
    file = open(run.root / ".lock", "w", encoding="utf-8")  # noqa: SIM115 held while the run lasts
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        if wait:
            print(f"another process works in {run.root}: waiting for it", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
            return file
        raise ValueError(f"another process works in {run.root}: wait for it or choose another run_dir") from None
    return file
