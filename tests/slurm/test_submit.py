"""`python -m slurm submit | status | logs | cancel | sweep` on a real controller, as a user types them; the stages are
the stand-in."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from slurm.__main__ import main
from slurm.controller import ENDED
from tests.forks import run_forked
from tests.slurm.cluster import SlurmCluster, require_slurm
from tests.slurm.standin import StandIn

STAGES = ("data", "teacher", "distill", "baseline", "assemble", "evaluate", "report")


@pytest.fixture(scope="module")
def slurm() -> Iterator[SlurmCluster]:
    require_slurm()
    with SlurmCluster() as cluster:
        yield cluster


def command(stand_in: StandIn, *words: object) -> subprocess.CompletedProcess[str]:
    """python -m slurm WORDS, without the seconds of starting Python."""
    return run_forked(main, [*map(str, words)], environment=stand_in.slurm.env)


def submit(stand_in: StandIn, *options: object, name: str = "submit") -> subprocess.CompletedProcess[str]:
    plan = ("--config", "minute", "--cluster", stand_in.cluster_file(), "--run-dir", stand_in.run)
    return command(stand_in, name, *plan, "--code-dir", stand_in.code, *options)


def numbers(printed: str) -> dict[str, int]:
    """Job numbers by stage, from what `submit` prints."""
    pairs = (line.split() for line in printed.splitlines())
    return {words[0]: int(words[1]) for words in pairs if len(words) == 2 and words[1].isdigit()}


def in_queue(stand_in: StandIn) -> int:
    shown = stand_in.slurm.run("squeue", "-h", "--states=all", "-o", "%T %Z").stdout.splitlines()
    return sum(line.split()[0] not in ENDED for line in shown if line.endswith(f"{stand_in.run}/slurm"))


def wait_end(stand_in: StandIn) -> None:
    stand_in.wait(lambda: in_queue(stand_in) == 0)


def test_chain_is_submitted_once_and_runs_to_its_end(slurm: SlurmCluster, tmp_path: Path) -> None:
    stand_in = StandIn(slurm, tmp_path)
    stand_in.behave(num_steps=10_000)
    dry = submit(stand_in, "--dry-run")
    assert dry.returncode == 0, dry.stderr
    assert dry.stdout.count("#SBATCH --job-name=minute-") == len(STAGES)
    assert "sbatch --parsable --dependency=afterok:JOB_OF_DATA --kill-on-invalid-dep=yes" in dry.stdout
    assert "# evaluate  2 tasks of 1 node of debug, 1 process a node, 00:10:00" in dry.stdout
    assert "the controller accepts all scripts" in dry.stdout
    assert in_queue(stand_in) == 0

    first = submit(stand_in)
    assert first.returncode == 0, first.stderr
    jobs = numbers(first.stdout)
    assert tuple(jobs) == STAGES
    stand_in.wait_running()
    again = submit(stand_in)
    assert (again.returncode, numbers(again.stdout)) == (0, {}), again.stderr
    assert f"teacher   in the queue as {jobs['teacher']}\n" in again.stdout
    assert "search    left out: assemble.presets does not name 'searched'\n" in again.stdout
    other = submit(stand_in, "--nodes", "1", "--config", "demo")
    assert other.returncode == 2
    assert "are in the queue with another recipe" in other.stderr

    shown = command(stand_in, "status", stand_in.run)
    assert shown.returncode == 0, shown.stderr
    lines = {line.split()[0]: line for line in shown.stdout.splitlines() if line.strip()}
    assert f"{jobs['teacher']}" in lines["teacher"]
    assert "running" in lines["teacher"]
    assert "of 40" in lines["teacher"]
    assert "waiting" in lines["distill"]
    assert "GiB free" in lines["disk:"]

    slurm.run("scancel", jobs["evaluate"])  # a stage in the middle is lost
    stand_in.behave(num_steps=1)
    slurm.run("scancel", "--batch", "--signal=USR1", jobs["teacher"])
    stand_in.wait_requeued(jobs["teacher"])
    slurm.wait_job(jobs["assemble"])
    wait_end(stand_in)
    assert slurm.job(jobs["assemble"])["JobState"] == "COMPLETED", stand_in.log()
    assert slurm.job(jobs["report"])["JobState"] == "CANCELLED"
    shown = command(stand_in, "status", stand_in.run)
    assert "start 0 (node" in shown.stdout
    assert "told to stop (preemption, or a signal by hand)" in shown.stdout
    logs = command(stand_in, "logs", stand_in.run, "--stage", "teacher", "--rank", "1")
    assert "rank 1 of 2 starts at step" in logs.stdout
    logs = command(stand_in, "logs", stand_in.run, "--stage", "teacher", "--rank", "2")
    assert logs.returncode == 2
    assert "start-1 has launch.log, rank-0.log, rank-1.log" in logs.stderr


def test_recipe_that_searches_has_a_job_for_it(slurm: SlurmCluster, tmp_path: Path) -> None:
    stand_in = StandIn(slurm, tmp_path)
    dry = submit(stand_in, "--dry-run", "--assemble.presets", '["size-first", "searched"]')
    commands = [line.split() for line in dry.stdout.splitlines() if line.startswith("# sbatch")]
    after = {Path(words[-1].strip("'")).stem: words[3] for words in commands}
    assert after["search"] == "--dependency=afterok:JOB_OF_BASELINE", dry.stderr
    assert after["assemble"] == "--dependency=afterok:JOB_OF_SEARCH"
    assert "the controller accepts all scripts" in dry.stdout


def test_failure_stops_the_chain_and_status_says_why(slurm: SlurmCluster, tmp_path: Path) -> None:
    stand_in = StandIn(slurm, tmp_path)
    stand_in.behave(crash_at=0)
    jobs = numbers(submit(stand_in).stdout)
    stand_in.wait_requeued(jobs["teacher"])
    wait_end(stand_in)
    states = [slurm.job(job)["JobState"] for stage, job in jobs.items() if stage != "evaluate"]
    assert states == ["COMPLETED", "FAILED", *["CANCELLED"] * 4], stand_in.log()
    shown = " ".join(command(stand_in, "status", stand_in.run).stdout.split())
    assert "rank 1 failed first (exit status 1): RuntimeError: boom at step 0; not requeued: 2 starts" in shown


def test_from_only_and_cancel(slurm: SlurmCluster, tmp_path: Path) -> None:
    stand_in = StandIn(slurm, tmp_path)
    stand_in.behave(num_steps=10_000)
    lacking = submit(stand_in, "--from", "distill")
    assert lacking.returncode == 2
    assert "stage distill needs data, teacher first: submit with --from data" in lacking.stderr
    assert tuple(numbers(submit(stand_in, "--only", "data").stdout)) == ("data",)
    rest = numbers(submit(stand_in, "--from", "teacher", "--nodes", "1-2").stdout)
    assert tuple(rest) == STAGES[1:]
    stand_in.wait_running()
    cancelled = command(stand_in, "cancel", stand_in.run)
    assert "7 job(s) cancelled" in cancelled.stdout, cancelled.stderr
    wait_end(stand_in)
    assert command(stand_in, "cancel", stand_in.run).stdout == f"no job of {stand_in.run} is in the queue\n"
    nowhere = command(stand_in, "cancel", tmp_path / "no run")
    assert (nowhere.returncode, nowhere.stderr.count("\n")) == (2, 1)
    assert "no run is no run directory: it has no recipe.yaml" in nowhere.stderr


def test_a_chain_that_calls_stage_data_by_its_former_name_goes_on(slurm: SlurmCluster, tmp_path: Path) -> None:
    """As after an update of the code while jobs of it are in the queue."""
    stand_in = StandIn(slurm, tmp_path)
    submit(stand_in, "--only", "prepare")
    wait_end(stand_in)
    shutil.rmtree(stand_in.run / "data")
    written = stand_in.run / "slurm" / "cluster.toml"
    written.write_text(written.read_text().replace("jobs.data", "jobs.prepare").replace("\ndata = ", "\nprepare = "))
    script = stand_in.run / "slurm" / "data.sbatch"
    former = script.read_text()
    for new, old in (("-data\n", "-prepare\n"), ("/logs/data-", "/logs/prepare-"), ('"$run" data', '"$run" prepare')):
        assert new in former
        former = former.replace(new, old)
    script.rename(script.with_stem("prepare")).write_text(former)
    job = slurm.sbatch("--hold", script.with_stem("prepare"))

    rest = submit(stand_in)
    assert tuple(numbers(rest.stdout)) == STAGES[1:], rest.stderr
    assert f"data      in the queue as {job}\n" in rest.stdout
    slurm.run("scontrol", "release", job)
    wait_end(stand_in)
    assert slurm.job(job)["JobState"] == "COMPLETED", stand_in.log()
    assert (stand_in.run / "logs" / f"prepare-{job}" / "starts.jsonl").is_file()
    shown = command(stand_in, "status", stand_in.run).stdout
    assert re.search(rf"^data +{job} +completed ", shown, re.MULTILINE), shown
    assert submit(stand_in, "--only", "data").stdout.startswith("data      done\n")


def test_refused_scripts_submit_nothing(slurm: SlurmCluster, tmp_path: Path) -> None:
    stand_in = StandIn(slurm, tmp_path)
    refused = submit(stand_in, "--nodes", "1", "--cluster", "example")
    assert refused.returncode == 2
    assert "error: stage teacher has 2 micro-batches a step, which 8 ranks" in refused.stderr
    path = tmp_path / "nowhere.toml"
    path.write_text(stand_in.cluster_file().read_text().replace('partition = "debug"', 'partition = "nowhere"'))
    refused = submit(stand_in, "--cluster", path)
    assert refused.returncode == 2
    assert "error: stage data: sbatch refuses: " in refused.stderr
    assert "invalid partition specified: nowhere" in refused.stderr
    assert in_queue(stand_in) == 0
    assert not list((stand_in.run / "slurm").glob("*.sbatch"))


def test_sweep_shares_data_and_teacher(slurm: SlurmCluster, tmp_path: Path) -> None:
    stand_in = StandIn(slurm, tmp_path)
    sweep = submit(stand_in, "--vary", "seed=0,1", "--vary", "distill.optim.learning_rate=0.004,0.002", name="sweep")
    assert sweep.returncode == 0, sweep.stderr
    jobs = numbers(sweep.stdout)
    assert tuple(jobs) == ("data", "teacher", "baseline", "distill", "assemble", "evaluate", "report")
    folder = stand_in.run / "sweep"
    names = [f"seed={seed},learning_rate={rate}" for seed in (0, 1) for rate in ("0.004", "0.002")]
    for name in names:  # the stand-in looks for it there
        (folder / name / "behave.json").write_text("{}")
    again = submit(stand_in, "--vary", "seed=0,1", name="sweep")
    assert again.returncode == 2
    assert "of this sweep are in the queue" in again.stderr
    stand_in.wait(lambda: slurm.run("squeue", "-h", "-j", jobs["report"]).stdout == "")
    shown = slurm.run("squeue", "-h", "-r", "--states=all", "-o", "%T", "-j", jobs["report"]).stdout
    assert shown.split() == ["COMPLETED"] * 4, stand_in.log()
    for name in names:
        assert (folder / name / "teacher" / "running-0").exists()
        assert list((folder / name / "distill" / "checkpoints").glob("step_*"))
        assert f"seed: {name[5]}\n" in (folder / name / "recipe.yaml").read_text()
    shown = command(stand_in, "status", folder)
    assert all(name in shown.stdout for name in names), shown.stderr + shown.stdout
