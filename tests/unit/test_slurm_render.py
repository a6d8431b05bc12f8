"""Batch scripts, compared line by line with tests/golden/, and the strictness of cluster files.

After a wanted change: python tests/unit/test_slurm_render.py writes the golden files again; read their difference.
"""

from __future__ import annotations

import re
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.config import BatchConfig, DistillConfig, Recipe
from slurm.__main__ import check_ranks, main
from slurm.cluster import STAGE_JOBS, find_cluster, load_cluster, seconds_of
from slurm.render import _TEMPLATES, render

GOLDEN = Path(__file__).parents[1] / "golden"
CLUSTERS = ("example", "local")
ONE_OF_EACH_SHAPE = ("prepare", "distill", "evaluate", "report")
EXAMPLE = find_cluster("example").read_text()


def golden_script(cluster_name: str, stage: str) -> str:
    return render(
        stage,
        load_cluster(find_cluster(cluster_name)),
        name="flan",
        run_dir=Path("/scratch/me/runs/flan"),
        code_dir=Path("/home/me/modular"),
    )


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
    script = render(stage, cluster, name="it's a run", run_dir=Path("/runs/a b's $x"), code_dir=Path("/c o;d e"))
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
    assert '#SBATCH --output="/runs/a b\'s $x/logs/%x-%j.out"' in script


def test_percent_in_a_path_is_no_pattern_of_slurm() -> None:
    cluster = load_cluster(find_cluster("local"))
    script = render("report", cluster, name="r", run_dir=Path("/runs/50%j"), code_dir=Path("/code"))
    assert "--output=/runs/50%%j/logs/%x-%j.out\n" in script
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
    script = render("teacher", cluster, name="r", run_dir=Path("/r"), code_dir=Path("/c"))
    assert [line for line in script.splitlines() if "gpu:" in line or "--gpus" in line] == expected


def test_nodes_replace_the_cluster_files_number() -> None:
    cluster = load_cluster(find_cluster("example"))
    script = render("distill", cluster, name="r", run_dir=Path("/r"), code_dir=Path("/c"), nodes=5)
    assert "#SBATCH --nodes=5\n" in script
    with pytest.raises(ValueError, match="one process: it cannot use 2 nodes"):
        render("report", cluster, name="r", run_dir=Path("/r"), code_dir=Path("/c"), nodes=2)
    with pytest.raises(ValueError, match="must be 1 or more, not 0"):
        render("distill", cluster, name="r", run_dir=Path("/r"), code_dir=Path("/c"), nodes=0)


def test_without_mpi_only_one_process_prepares() -> None:
    cluster = replace(load_cluster(find_cluster("local")), mpi="none")
    with pytest.raises(ValueError, match="would start 2 MPI ranks"):
        render("prepare", cluster, name="r", run_dir=Path("/r"), code_dir=Path("/c"))
    render("prepare", cluster, name="r", run_dir=Path("/r"), code_dir=Path("/c"), nodes=1)


@pytest.mark.parametrize(
    ("name", "run_dir", "message"),
    [
        ('a "run"', "/r", "--job-name"),
        ("run", "/a\\b", "--output"),
        ("run", "runs/a", "run_dir must be an absolute path, not runs/a"),
    ],
)
def test_what_cannot_be_written_is_refused(name: str, run_dir: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        render("report", load_cluster(find_cluster("local")), name=name, run_dir=Path(run_dir), code_dir=Path("/code"))


def test_templates_refuse_undefined_names() -> None:
    with pytest.raises(Exception, match="'no_such_fact' is undefined"):
        _TEMPLATES.from_string("{{ no_such_fact }}").render()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('account = "my-project"\n', "", "the key 'account' is missing"),
        ("cpus_per_process = 1\n", "", r"\[jobs.prepare\]: the key 'cpus_per_process' is missing"),
        ('report = "00:30:00"\n', "", r"\[time_limits\]: the key 'report' is missing"),
        ('qos = ""', 'qos = ""\nacount = "x"', "unknown key 'acount'; did you mean 'account'"),
        ("[jobs.single]", "[jobs.one]", r"\[jobs\]: unknown key 'one'"),
        ('report = "00:30:00"', 'report = "00:30:00"\nreports = "1"', "unknown key 'reports'; did you mean 'report'"),
        ("signal_lead_s = 600", 'signal_lead_s = "600"', "signal_lead_s must be a whole number, not '600'"),
        ("setup = []", "setup = [1]", "setup must be a text in quotes, not 1"),
        ('HF_HUB_OFFLINE = "1"', "HF_HUB_OFFLINE = 1", "environment.HF_HUB_OFFLINE must be a text in quotes, not 1"),
        ('HF_HUB_OFFLINE = "1"', '"A B" = "1"', "'A B' cannot be a variable's name"),
        ('gpu_flag = "gres"', 'gpu_flag = "gpus"', "gpu_flag must be one of gres, gpus-per-node, none, not 'gpus'"),
        ('mpi = "pmi2"', 'mpi = "mpich"', "mpi must be one of pmi2, pmix, none, not 'mpich'"),
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


@pytest.mark.parametrize(
    ("limit", "seconds"), [("00:30:00", 1800), ("36:00:00", 129_600), ("1-12:00:00", 129_600), ("2-00:00:01", 172_801)]
)
def test_time_limits_in_seconds(limit: str, seconds: int) -> None:
    assert seconds_of(limit) == seconds


def test_ranks_must_share_the_micro_batches() -> None:
    recipe = Recipe(distill=DistillConfig(batch=BatchConfig(micro_batches_per_step=24)))
    cluster = load_cluster(find_cluster("example"))
    for stage in ("distill", "baseline"):
        check_ranks(stage, recipe, cluster, 3)
        with pytest.raises(ValueError, match="24 micro-batches a step, which 16 ranks"):
            check_ranks(stage, recipe, cluster, None)
    check_ranks("evaluate", recipe, cluster, None)


def test_command_prints_the_script(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(f"name: mine\nrun_dir: '{tmp_path}/my run'\n")
    main(["render", "teacher", "--cluster", "local", "--config", str(recipe), "--nodes", "1"])
    script = capsys.readouterr().out
    assert "#SBATCH --job-name=mine-teacher\n" in script
    assert "#SBATCH --nodes=1\n" in script
    assert f"run='{tmp_path}/my run'\n" in script


def test_mistakes_end_the_command_with_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(EXAMPLE.replace("account", "acount", 1))
    for cluster, message in (("nowhere", "or one of the names example, local"), (str(file), f"{file}: unknown key")):
        with pytest.raises(SystemExit) as left:
            main(["render", "prepare", "--cluster", cluster, "--config", "demo"])
        assert left.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line


def write_golden_files() -> None:
    for cluster_name in CLUSTERS:
        for stage in ONE_OF_EACH_SHAPE:
            (GOLDEN / f"{cluster_name}-{stage}.sbatch").write_text(golden_script(cluster_name, stage))


if __name__ == "__main__":
    write_golden_files()
