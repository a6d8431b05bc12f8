"""A first cluster file from what a controller says, the points of a sweep, and what a status line is made of."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.config.cli import parse_recipe, recipe_parser
from pipeline.config.recipe import Recipe
from slurm.cluster import STAGE_JOBS, load_cluster
from slurm.controller import Job, run_command
from slurm.discover import choose_mpi, cluster_file, parse_partitions
from slurm.render import Script, render
from slurm.status import duration, histories, last_record, loss_of, newest_log, rows, state_of, training_figures
from slurm.submit import write_jobs
from slurm.sweep import points_of

# sinfo -h -o "%P|%l|%D|%c|%m|%G" of a site with several kinds of nodes in one partition
SINFO = """\
cpu*|2-00:00:00|120|64|256000+|(null)
gpu|12:00:00|4|128+|1000000|gpu:a100:4(S:0-1)
gpu|12:00:00|20|128|1000000|gpu:h100:8(S:0-7),nvme:1
debug|30:00|2|64|256000|gpu:2
long|infinite|1|16|64000|(null)
"""


def test_partitions_are_read() -> None:
    cpu, small, large, debug, long = parse_partitions(SINFO)
    assert (cpu.name, cpu.is_default, cpu.limit_s, cpu.gpus) == ("cpu", True, 2 * 86400, 0)
    assert (small.gpus, small.gpu_type, small.cpus) == (4, "a100", 128)
    assert (large.gpus, large.gpu_type, large.num_nodes, large.limit_s) == (8, "h100", 20, 12 * 3600)
    assert (debug.gpus, debug.gpu_type, debug.limit_s) == (2, "", 1800)
    assert long.limit_s is None


@pytest.mark.parametrize("sinfo", [SINFO, "debug*|infinite|2|8|64000|(null)\n", "all*|10:00|1|4|8000|gpu:1\n"])
def test_cluster_file_of_a_site_is_whole(sinfo: str, tmp_path: Path) -> None:
    file = tmp_path / "site.toml"
    file.write_text(cluster_file(parse_partitions(sinfo), mpi="pmi2", account="abc", python="/v/bin/python"))
    cluster = load_cluster(file)
    for stage in STAGE_JOBS:
        render(Script(stage=stage, cluster=cluster, name="r", run_dir=Path("/r"), code_dir=Path("/c")))
    assert cluster.account == "abc"


def test_a_cluster_file_in_other_letters_is_read_or_told(tmp_path: Path) -> None:
    file = tmp_path / "site.toml"
    text = cluster_file(parse_partitions(SINFO), mpi="pmi2", account="abc", python="/v/bin/python")
    file.write_text(text, encoding="utf-8-sig")  # as some editors write it
    assert load_cluster(file).account == "abc"
    file.write_text(text, encoding="utf-16")
    with pytest.raises(ValueError, match=r"site.toml: not a TOML file: 'utf-8' codec"):
        load_cluster(file)


def test_training_goes_where_the_gpus_are(tmp_path: Path) -> None:
    file = tmp_path / "site.toml"
    file.write_text(cluster_file(parse_partitions(SINFO), mpi="pmi2", account="", python="/v/bin/python"))
    cluster = load_cluster(file)
    assert cluster.gpu_flag == "gres"
    train, single = cluster.jobs["train"], cluster.jobs["single"]
    assert (train.partition, train.gpus_per_node, train.processes_per_node, train.cpus_per_process) == ("gpu", 8, 8, 16)
    assert (single.partition, single.gpus_per_node) == ("cpu", 0)
    search = cluster.jobs["search"]
    assert (search.partition, search.gpus_per_node, search.processes_per_node) == ("gpu", 1, 1), "it measures times"
    assert cluster.time_limits["distill"] == "12:00:00"


def test_mpi_is_what_fits_the_one_that_pip_installed() -> None:
    assert choose_mpi("MPI plugin types are...\n\tnone\n\tpmi2\n\tpmix\n") == "pmi2"
    assert choose_mpi("MPI plugin types are...\n\tnone\n\tpmix\n") == "mpiexec"


def minute() -> Recipe:
    return parse_recipe(recipe_parser("test", ""), ["--config", "minute"])[0]


def test_a_sweep_is_every_combination() -> None:
    points = points_of(["--config", "minute"], minute(), ["seed=0,1", "distill.granularities=[2,3],[2]"])
    assert [point.name for point in points] == [
        "seed=0,granularities=2-3",
        "seed=0,granularities=2",
        "seed=1,granularities=2-3",
        "seed=1,granularities=2",
    ]
    assert [(point.recipe.seed, point.recipe.distill.granularities) for point in points] == [
        (0, (2, 3)), (0, (2,)), (1, (2, 3)), (1, (2,)),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("variations", "message"),
    [
        (["teacher.optim.num_steps=3"], "points share data and teacher"),
        (["seed=0", "seed=1"], "a field is varied twice"),
        (["seed=0,0"], "two points of the sweep have one name"),
        (["seed="], "give values"),
        (["distill.optim.learning_rat=0.1"], "unknown field .*did you mean"),
    ],
)
def test_mistakes_in_a_sweep_are_named(variations: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        points_of(["--config", "minute"], minute(), variations)


def job(state: str, reason: str = "None", label: str = "5") -> Job:
    return Job(label, 5, state, reason, "N/A", "", "distill", Path("/r"))


def test_states_in_words() -> None:
    assert state_of([], True, "") == "done"
    assert state_of([], False, "") == "not submitted"
    assert state_of([job("PENDING", "Dependency")], False, "") == "waiting"
    assert state_of([job("PENDING", "Resources")], False, "") == "pending (Resources)"
    expected = replace(job("PENDING", "Priority"), start="2026-11-25T09:05:00")
    assert state_of([expected], False, "") == "pending (Priority, expected Wed 09:05)"
    tasks = [job("RUNNING", label=f"5_{k}") for k in range(3)] + [job("COMPLETED", label="5_3")]
    assert state_of(tasks, False, "") == "3 running, 1 completed"


def test_figures_in_words(tmp_path: Path) -> None:
    assert [duration(s) for s in (7, 125, 3 * 3600 + 61, 30 * 3600)] == [
        "7 s",
        "2 min 05 s",
        "3 h 01 min",
        "1 d 6 h",
    ]
    assert loss_of({"step": 1, "task": 0.5, "hidden": 0.1}) == "task 0.500"
    assert loss_of({"step": 1, "hidden/a": 0.2, "hidden/b": 0.4}) == "hidden 0.300"
    file = tmp_path / "metrics.jsonl"
    assert last_record(file) is None
    file.write_text('{"step": 5, "tokens_per_s": 9}\n{"step": 10, "validation/a": 1}\n{"step": 15, "tok')
    assert last_record(file) == {"step": 5, "tokens_per_s": 9}


def test_figures_of_the_baseline_are_those_of_its_newest_training(tmp_path: Path) -> None:
    for name, step in (("logit-e1x6", 10), ("finetune-e1x6", 5)):
        folder = tmp_path / "baseline" / name
        (folder / "checkpoints" / f"step_{step:08d}").mkdir(parents=True)
        (folder / "checkpoints" / f"step_{step:08d}" / "manifest.json").touch()
        (folder / "metrics.jsonl").write_text(f'{{"step": {step}, "task": 0.5, "tokens_per_s": 9}}\n')
    os.utime(tmp_path / "baseline" / "logit-e1x6" / "metrics.jsonl", (1, 1))
    figures = training_figures(minute(), tmp_path, "baseline", 5, running=True)
    assert figures.pop("checkpoint").startswith("step 5, ")
    assert figures == {"progress": "step 5 of 10, finetune-e1x6", "loss": "task 0.500", "tokens_per_s": "9"}


def test_a_run_that_calls_stage_data_by_its_former_name_is_shown_and_continued(tmp_path: Path) -> None:
    """A run directory as `submit` and its jobs left it before the change."""
    logs = tmp_path / "logs" / "prepare-812"
    (logs / "start-0").mkdir(parents=True)
    (logs / "start-0" / "rank-0.log").write_text("shard 3\n")
    (logs / "starts.jsonl").write_text(
        '{"number": 0, "begin_s": 1.0, "nodes": "n1", "progress_before": "0 shards"}\n'
        '{"number": 0, "end_s": 2.0, "progress_after": "1 shards", "why": "lost", "by_itself": false}\n'
    )
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm" / "jobs.json").write_text('{"prepare": 812, "teacher": 813}')
    (tmp_path / "recipe.yaml").touch()

    data, teacher, *_ = rows(minute(), tmp_path, [])
    assert (data.stage, data.job, data.state) == ("data", "812", "lost")
    assert teacher.job == "813"
    assert newest_log(tmp_path, "data", 0) == logs / "start-0" / "rank-0.log"

    write_jobs(tmp_path, {"data": 900})  # submitted again
    (tmp_path / "logs" / "data-900").mkdir()
    assert rows(minute(), tmp_path, [])[0].job == "900"
    assert [label for label, _ in histories(tmp_path, "data")] == ["812", "900"]


def test_commands_of_slurm_see_nothing_of_the_job_whose_shell_asks_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Jobs submitted from it would be bound to its cores, and start as their 49th time."""
    leaked = {
        "SLURM_CPU_BIND": "quiet,mask_cpu:0x1", "SLURM_MEM_PER_CPU": "100", "SLURM_MEM_PER_NODE": "200",
        "SLURM_TRES_PER_TASK": "cpu=7", "SLURM_GPUS_PER_TASK": "1", "SLURM_HOSTFILE": "/nonexistent",
        "SLURM_RESTART_COUNT": "49", "SLURM_STEP_ID": "0", "SRUN_CPUS_PER_TASK": "3", "PMI_RANK": "1", "RANK": "1",
        "PMIX_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "node1", "LOCAL_RANK": "1", "SLURMD_NODENAME": "node1",
    }  # fmt: skip
    kept = {"SLURM_CONF": "/etc/slurm.conf", "SBATCH_ACCOUNT": "mine", "SLURM_CLUSTERS": "big", "RANKING": "x"}
    for name, value in (leaked | kept).items():
        monkeypatch.setenv(name, value)
    seen = dict(line.partition("=")[::2] for line in run_command(["env"]).splitlines())
    assert not leaked.keys() & seen.keys()
    assert kept.items() <= seen.items()
    assert seen["PATH"]
