"""Which starts of a job are followed by another, and the line that names the cause."""

from __future__ import annotations

import shutil
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipeline import exits
from slurm import starts
from slurm.cause import first_failure
from slurm.starts import LOST, Job, begin, end, progress, read_starts

TORCHRUN = """\
0: W1123 09:16:35.100000 100 torch/distributed/run.py:1] something else
1: E1123 09:16:40.900000 200 torch/distributed/elastic/multiprocessing/api.py:9] failed (exitcode: 1) local_rank: 0 (pid: 7) of binary: bash
0: E1123 09:16:40.300000 100 torch/distributed/elastic/multiprocessing/api.py:9] failed (exitcode: -9) local_rank: 1 (pid: 8) of binary: bash
srun: error: node2: task 1: Exited with exit code 1
"""  # noqa: E501
SRUN = """\
srun: error: node2: task 3: Exited with exit code 7
srun: Terminating StepId=5.0
srun: error: node1: tasks 0-1: Terminated
"""


def logs_with(folder: Path, **files: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / f"{name.replace('_', '-')}.log").write_text(text)
    return folder


def test_torchrun_names_the_rank_that_was_first_over_all_nodes(tmp_path: Path) -> None:
    failure = first_failure(logs_with(tmp_path, launch=TORCHRUN, rank_1="step 3\n"), 1, processes_per_node=2)
    assert failure.exit_status == -9
    assert failure.text == "rank 1 failed first (killed by SIGKILL, perhaps for want of memory): step 3"


def test_srun_names_the_task_that_was_first(tmp_path: Path) -> None:
    log = (
        "Traceback (most recent call last):\n  File x\nzipfile.BadZipFile: no\n[rank3]: ValueError: 3 is odd\n[W] bye\n"
    )
    failure = first_failure(logs_with(tmp_path, launch=SRUN, rank_3=log), 7, processes_per_node=2)
    assert failure.text == "rank 3 failed first (exit status 7): ValueError: 3 is odd"


def test_a_step_that_says_nothing_is_told_by_its_exit_status(tmp_path: Path) -> None:
    failure = first_failure(logs_with(tmp_path, launch="bash: line 1: nope: command not found\n"), 127, 1)
    assert failure.text == "failed with exit status 127: bash: line 1: nope: command not found"
    assert first_failure(tmp_path / "nothing", 3, 1).text == "failed with exit status 3: launch.log is empty"


def test_a_program_that_cannot_be_started_is_named(tmp_path: Path) -> None:
    launch = (
        "srun: error: node1: task 0: Exited with exit code 2\n"
        "0: slurmstepd-node1: error: execve(): bash: No such file or directory\n"
    )
    failure = first_failure(logs_with(tmp_path, launch=launch), 2, 1)
    assert failure.text == "not started: execve(): bash: No such file or directory"


def test_a_disk_without_room_for_the_logs_is_the_cause(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for free, told in ((4096, "; No space left on device, for logs either: make room there"), (1 << 30, "")):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: SimpleNamespace(free=free))
        failure = first_failure(logs_with(tmp_path, launch=""), 143, 1)
        assert failure.text == f"failed with exit status 143: launch.log is empty{told}"
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=4096))
    launch = "OSError: [Errno 28] No space left on device\n"
    assert first_failure(logs_with(tmp_path, launch=launch), 1, 1).text.count("No space left") == 1


def test_a_lost_node_is_no_failure_of_the_program(tmp_path: Path) -> None:
    launch = "srun: error: Node failure on node2\n" + SRUN
    failure = first_failure(logs_with(tmp_path, launch=launch), 1, 1)
    assert failure.text == "lost node node2"
    assert failure.lost_node


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(tmp_path, "distill", "77", start=0, nodes="node[1-2]", end_time_s=None)


def save(job: Job, step: int) -> None:
    folder = job.run / "distill" / "checkpoints" / f"step_{step:08d}"
    folder.mkdir(parents=True)
    (folder / "manifest.json").touch()


def run_start(job: Job, status: int, *, save_step: int | None = None, marked: bool = False, state: str = "RUNNING"):
    """Verdict over one start."""
    assert begin(job, max_requeues=20) == 0
    if save_step is not None:
        save(job, save_step)
    if marked:
        job.requeue_file.parent.mkdir(exist_ok=True)
        job.requeue_file.touch()
    return end(job, status, state=state, max_requeues=20, signal_lead_s=60, processes_per_node=1)


def test_every_training_of_a_stage_counts_as_progress(job: Job) -> None:
    assert progress(job.run, "baseline") == "no checkpoint"
    for method, step in (("logits", 10), ("shrink", 20), ("logits", 30)):
        folder = job.run / "baseline" / method / "checkpoints" / f"step_{step:08d}"
        folder.mkdir(parents=True)
        (folder / "manifest.json").touch()
    assert progress(job.run, "baseline") == "step_00000030, step_00000020"


def test_two_crashes_without_progress_are_enough(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_start(job, 1, save_step=10) == 85
    assert run_start(replace(job, start=1), 1) == 85
    assert run_start(replace(job, start=2), 1, save_step=20) == 85
    assert run_start(replace(job, start=3), 1) == 85
    assert run_start(replace(job, start=4), 1) == 1
    assert "not requeued: 2 starts without progress (step_00000020)" in capsys.readouterr().out
    assert [start.by_itself for start in read_starts(job.folder)] == [True] * 5


@pytest.mark.parametrize(
    ("rank_0", "verdict"),
    [
        ("error: no recipe 'x'\n", 1),
        ("data_prep: no such file\n", 1),
        ("python: can't open file 'x.py'\n", 85),
        ("", 85),
    ],
)
def test_only_what_a_rank_says_is_a_mistake_is_one(job: Job, rank_0: str, verdict: int) -> None:
    """Other programs leave with that exit status too; of ours, one rank says the mistake for all."""
    logs_with(job.logs, launch="srun: error: node2: task 1: Exited with exit code 2\n", rank_0=rank_0, rank_1="")
    assert run_start(job, 2) == verdict


def test_what_comes_from_outside_may_come_often(job: Job) -> None:
    for number in range(5):
        assert run_start(replace(job, start=number), 1, marked=True) == 85
    for number in range(5, 9):  # a dead node: nobody is left to call `end`
        assert begin(replace(job, start=number), max_requeues=20) == 0
    assert run_start(replace(job, start=9), 0) == 0
    assert [start.why for start in read_starts(job.folder)[5:]] == [LOST] * 4 + ["finished"]


def test_time_limits_without_progress_are_enough(job: Job) -> None:
    near = replace(job, end_time_s=time.time() + 100)
    assert run_start(near, 1, marked=True, save_step=1) == 85
    assert run_start(replace(near, start=1), 1, marked=True) == 85
    assert run_start(replace(near, start=2), 1, marked=True) == 1
    assert {start.why.partition(";")[0] for start in read_starts(job.folder)} == {"time limit"}


def test_workers_that_are_killed_while_they_were_told_to_stop_are_no_failure(job: Job) -> None:
    for number in range(3):
        assert begin(replace(job, start=number), max_requeues=20) == 0
        assert end(replace(job, start=number), 137, told=True, max_requeues=20) == 85
    assert {start.by_itself for start in read_starts(job.folder)} == {False}


@pytest.mark.parametrize("status", [0, 1])
def test_a_job_that_slurm_ends_neither_requeues_itself_nor_is_done(job: Job, status: int) -> None:
    assert run_start(job, status, marked=True, state="COMPLETING") == 1
    assert read_starts(job.folder)[0].why.startswith("ended by SLURM (COMPLETING)")


def test_stop_by_hand_ends_the_job(job: Job) -> None:
    assert begin(job, max_requeues=20) == 0
    (job.run / "STOP").touch()
    job.requeue_file.parent.mkdir(exist_ok=True)
    job.requeue_file.touch()
    assert end(job, 1, state="RUNNING", max_requeues=20, signal_lead_s=60, processes_per_node=1) == 1
    assert begin(replace(job, start=1), max_requeues=20) == 1


def test_own_stop_file_does_not_stop_the_next_start(job: Job) -> None:
    (job.run / "STOP").write_text("77\n")
    assert begin(job, max_requeues=20) == 0
    assert not (job.run / "STOP").exists()


def test_a_script_that_calls_stage_data_by_its_former_name_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was rendered before the change, and starts after it; its ranks write into logs/prepare-77."""
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    (tmp_path / "data" / "train").mkdir(parents=True)
    (tmp_path / "data" / "train" / "000000.tar").touch()
    assert starts.main(["begin", str(tmp_path), "prepare", "--max-requeues", "9"]) == 0
    logs_with(tmp_path / "logs" / "prepare-77" / "start-0", launch=SRUN, rank_3="ValueError: 3 is odd\n")
    assert starts.main(["end", str(tmp_path), "prepare", "--status", "7", "--max-requeues", "9"]) == 85
    (start,) = read_starts(tmp_path / "logs" / "prepare-77")
    assert (start.progress_before, start.progress_after) == ("1 shards", "1 shards")
    assert start.why == "rank 3 failed first (exit status 7): ValueError: 3 is odd"


def test_a_history_that_cannot_be_written_ends_the_job(
    job: Job, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    (job.run / "logs").touch()  # a file where the folder should be
    assert starts.main(["end", str(job.run), "distill", "--status", "1", "--max-requeues", "9"]) == 1
    assert "its history cannot be written" in capsys.readouterr().out


def test_exit_codes_are_those_of_the_pipeline():
    assert (starts.EXIT_MISTAKE, starts.EXIT_REQUEUE) == (exits.EXIT_MISTAKE, exits.EXIT_REQUEUE)
