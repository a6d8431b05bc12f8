"""What happens between the starts of a job: python -m slurm.starts begin|end RUN STAGE, called by the batch scripts.

A job may start many times: the time limit, a preemption, a dead node, a crash. Each start is two lines of
RUN/logs/<stage>-<job>/starts.jsonl, from which `end` decides whether there is a next one and `status` tells why there
was. Standard library only: it runs before anything heavy is imported.

Exit status of `begin`: 0 go on, 1 do not start. Of `end`: 0 the stage is done, 85 start again, anything else give up.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slurm.cause import Failure, first_failure, tells_mistake
from slurm.stages import stage_of

EXIT_MISTAKE, EXIT_REQUEUE = 2, 85  # as in pipeline/exits.py, which the Python of a batch host may be too old for
MAX_STUCK_STARTS = 2
TRAINING = ("teacher", "distill", "baseline")
LOST = "lost: its node died, or it was preempted or requeued without time to say so"
# slurmctld looks every half minute and signals up to a minute early
EARLY_S = 90


def stage_folder(run: Path, stage: str) -> Path:
    return run / stage_of(stage)


def progress(run: Path, stage: str) -> str:
    """How far a stage has come, as a text that changes when it comes further."""
    stage = stage_of(stage)
    folder = stage_folder(run, stage)
    if stage in TRAINING:
        published = (folder.glob(f"{inside}checkpoints/step_*/manifest.json") for inside in ("", "*/"))
        newest = {path.parents[2]: path.parent.name for path in sorted(path for found in published for path in found)}
        return ", ".join(newest.values()) or "no checkpoint"  # a baseline's methods have a folder each
    patterns, unit = {
        "data": (["*/*.tar"], "shards"),
        "search": (["*"], "files"),
        "assemble": (["models/*/config.json"], "models"),
        "evaluate": (["units/*", "scores/*.json"], "units and scores"),
        "report": (["*"], "files"),
    }[stage]
    return f"{sum(1 for pattern in patterns for _ in folder.glob(pattern))} {unit}"


@dataclass(frozen=True)
class Job:
    """The job that this process runs in, and the stage it works on."""

    run: Path
    stage: str
    """As its script calls it: the logs of the script lie under that name."""
    label: str
    """Its number; of a task of an array, as <array>_<index>."""
    start: int
    """How often it was started before."""
    nodes: str
    end_time_s: float | None
    """When its time limit comes, in seconds since 1970."""
    first_rank: int = 0
    """Of a task of an array of evaluation."""

    @staticmethod
    def of_environment(run: Path, stage: str, environment: Mapping[str, str]) -> Job:
        label = environment["SLURM_JOB_ID"]
        if "SLURM_ARRAY_JOB_ID" in environment:
            label = f"{environment['SLURM_ARRAY_JOB_ID']}_{environment['SLURM_ARRAY_TASK_ID']}"
        end = environment.get("SLURM_JOB_END_TIME", "")
        return Job(
            run,
            stage,
            label,
            start=int(environment.get("SLURM_RESTART_COUNT") or 0),
            nodes=environment.get("SLURM_JOB_NODELIST", ""),
            end_time_s=float(end) if end.isdigit() else None,
            first_rank=int(environment.get("first_rank") or 0),
        )

    @property
    def folder(self) -> Path:
        return self.run / "logs" / f"{self.stage}-{self.label}"

    @property
    def logs(self) -> Path:
        return self.folder / f"start-{self.start}"

    @property
    def stop_file(self) -> Path:
        return self.run / "STOP"

    @property
    def requeue_file(self) -> Path:
        """What workers that saved leave behind to ask for another start."""
        return stage_folder(self.run, self.stage) / "REQUEUE"

    def asked_by_hand(self) -> bool:
        """Whether somebody else than this job's own script made RUN/STOP."""
        with contextlib.suppress(FileNotFoundError):
            return self.stop_file.read_text(encoding="utf-8").strip() != self.label
        return False

    def clear_marks(self) -> None:
        if self.stop_file.exists() and not self.asked_by_hand():
            self.stop_file.unlink(missing_ok=True)
        self.requeue_file.unlink(missing_ok=True)


@dataclass(frozen=True)
class Start:
    """One start of a job, as its history tells it."""

    number: int
    begin_s: float
    nodes: str
    progress_before: str
    end_s: float | None = None
    progress_after: str = ""
    why: str = ""
    """Why it ended; empty while it runs."""
    by_itself: bool = False
    """It ended by a crash, by hanging or at its time limit: the next start would end the same way unless this one
    made progress. False for what came from outside: a dead node, a preemption, a person."""


def read_starts(folder: Path) -> list[Start]:
    """The history of a job, oldest start first."""
    starts: dict[int, Start] = {}
    for record in _records(folder / "starts.jsonl"):
        known = starts.get(record["number"])
        starts[record["number"]] = Start(**{**(vars(known) if known else {}), **record})
    return [starts[number] for number in sorted(starts)]


def _records(path: Path) -> Iterator[dict[str, Any]]:
    with contextlib.suppress(FileNotFoundError):
        for line in path.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(json.JSONDecodeError):  # half a line of a killed writer
                yield json.loads(line)


def _append(folder: Path, record: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "starts.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
        file.flush()
        os.fsync(file.fileno())


def begin(job: Job, *, max_requeues: int) -> int:
    """Note that a start begins; 1 when it should not."""
    for earlier in read_starts(job.folder):
        if earlier.end_s is None:
            _append(job.folder, {"number": earlier.number, "end_s": time.time(), "why": LOST})
            _say(job, f"start {earlier.number} was {LOST}")
    job.clear_marks()
    now = progress(job.run, job.stage)
    record = {"number": job.start, "begin_s": time.time(), "nodes": job.nodes, "progress_before": now}
    _append(job.folder, record)
    if job.asked_by_hand():
        return _give_up(job, f"not started, because {job.stop_file} exists: `python -m slurm submit` removes it")
    if job.start > max_requeues:
        return _give_up(job, f"not started: max_requeues of the cluster file is {max_requeues}")
    return 0


def end(
    job: Job,
    status: int,
    *,
    told: bool = False,
    state: str = "RUNNING",
    max_requeues: int,
    signal_lead_s: int = 0,
    processes_per_node: int = 1,
) -> int:
    """Note how this start ended and say what comes next: 0 done, 85 start again, else give up.

    Args:
        status: exit status of the step; 85 when this shell ended it to start again.
        told: the batch script told the workers to stop.
        state: of the job, as squeue says it; only a running job may requeue itself.
    """
    saved = job.requeue_file.exists() or status == EXIT_REQUEUE
    failure = None
    if state != "RUNNING":  # whatever the status: an srun that SLURM ends may leave with 0
        return _give_up(job, f"ended by SLURM ({state}): cancelled, preempted, a node lost, or past its time limit")
    if status == 0:
        why, by_itself = "finished", False
    elif saved and job.asked_by_hand():
        return _give_up(job, f"saved and stopped, because {job.stop_file} exists: `python -m slurm submit` continues")
    elif saved:
        by_itself = job.end_time_s is not None and job.end_time_s - time.time() < signal_lead_s + EARLY_S
        why = "time limit" if by_itself else "told to stop (preemption, or a signal by hand)"
    else:
        failure = first_failure(job.logs, status, processes_per_node, job.first_rank)
        why, by_itself = failure.text, not failure.lost_node and not told
        if told:
            why = f"told to stop, and ended before it had saved: {why}"
    job.clear_marks()
    after = progress(job.run, job.stage)
    record = {"number": job.start, "end_s": time.time(), "progress_after": after, "why": why, "by_itself": by_itself}
    _append(job.folder, record)
    if status == 0:
        _say(job, f"done after {job.start + 1} start(s)")
        return 0
    refusal = _refusal(job, failure, after, max_requeues)
    if refusal:
        return _give_up(job, f"{why}; not requeued: {refusal}")
    _say(job, f"{why}; at {after}; back into the queue")
    return EXIT_REQUEUE


def _refusal(job: Job, failure: Failure | None, after: str, max_requeues: int) -> str:
    """Why there should be no further start; empty when there should be one."""
    if failure is not None and failure.exit_status == EXIT_MISTAKE and tells_mistake(job.logs):
        return "a mistake in recipe or data, which another start would not change"
    stuck = [start for start in read_starts(job.folder) if start.by_itself and start.progress_after == after]
    stuck = [start for start in stuck if start.progress_before == after]
    if len(stuck) >= MAX_STUCK_STARTS:
        return f"{len(stuck)} starts without progress ({after})"
    if job.start >= max_requeues:
        return f"max_requeues of the cluster file is {max_requeues}"
    return ""


def _give_up(job: Job, why: str) -> int:
    record = {"number": job.start, "end_s": time.time(), "progress_after": progress(job.run, job.stage), "why": why}
    _append(job.folder, record)
    _say(job, why)
    return 1


def _say(job: Job, text: str) -> None:
    print(f"{job.stage}: {text}", flush=True)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m slurm.starts", description=__doc__, allow_abbrev=False)
    parser.add_argument("moment", choices=("begin", "end"))
    parser.add_argument("run", type=Path)
    parser.add_argument("stage")
    parser.add_argument("--status", type=int, default=0)
    parser.add_argument("--max-requeues", type=int, required=True)
    parser.add_argument("--told", action="store_true")
    parser.add_argument("--state", default="RUNNING")
    parser.add_argument("--signal-lead-s", type=int, default=0)
    parser.add_argument("--processes-per-node", type=int, default=1)
    args = parser.parse_args(arguments)
    job = Job.of_environment(args.run, args.stage, os.environ)
    try:
        if args.moment == "begin":
            return begin(job, max_requeues=args.max_requeues)
        return end(
            job,
            args.status,
            told=args.told,
            state=args.state,
            max_requeues=args.max_requeues,
            signal_lead_s=args.signal_lead_s,
            processes_per_node=args.processes_per_node,
        )
    except OSError as error:  # a full disk: without its history a job could go round for ever
        _say(job, f"not (re)started: its history cannot be written: {error}")
        return 1


if __name__ == "__main__":
    sys.exit(main())
