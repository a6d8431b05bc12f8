"""What people get wrong: each mistake is one line that names the value and the fix, exit code 2, and costs nothing."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml
from transformers import T5Config, T5ForConditionalGeneration

from pipeline.__main__ import main
from tests.end_to_end.breaking import LINES, ROOT, train_tokenizer, write_jsonl
from tests.end_to_end.mistakes import MISTAKES

FOLDERS = {
    "settings",
    "weights",
    "quantised",
    "peer",
    "number",
    "token",
    "index",
    "MetricX",
    "ds_config",
}  # first words of mistakes in models
SIZES = {"d_model": 16, "d_kv": 4, "d_ff": 32, "num_heads": 4, "num_layers": 6, "num_decoder_layers": 6}


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a teacher, data and a recipe in which nothing is wrong."""
    folder = tmp_path_factory.mktemp("template")
    train_tokenizer(folder / "teacher", 40)
    train_tokenizer(folder / "other_tokenizer", 36)
    train_tokenizer(folder / "large_tokenizer", 60)
    torch.manual_seed(0)
    config = T5Config(vocab_size=48, decoder_start_token_id=0, tie_word_embeddings=False, **SIZES)
    T5ForConditionalGeneration(config).save_pretrained(folder / "teacher", max_shard_size="20KB")
    for split in ("train", "validation", "test"):
        write_jsonl(folder / f"{split}.jsonl", LINES)
    recipe = {
        "name": "mine",
        "run_dir": "run",
        "data": {"corpus": "files", **{split: [f"{split}.jsonl"] for split in ("train", "validation", "test")}},
        "teacher": {"folder": "teacher", "optim": {"num_steps": 0}, "loop": {"ds_config": "zero3_cpu"}},
        "distill": {"local_steps": 2, "optim": {"num_steps": 4}, "loop": {"ds_config": "zero3_cpu"}},
        "launch": {"num_mpi_ranks": 1},
    }
    recipe["data"]["tokenizer"] = "teacher"
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder


@pytest.fixture
def place(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the template as the working folder."""
    shutil.copytree(template, tmp_path / "place")
    monkeypatch.chdir(tmp_path / "place")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return tmp_path / "place"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", sorted(MISTAKES))
def test_a_mistake_is_one_line_and_costs_nothing(name: str, place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    mistake = MISTAKES[name]
    mistake.break_it()
    before = contents(place)
    config = [] if "--config" in mistake.options else ["--config", "recipe.yaml"]
    capfd.readouterr()
    with pytest.raises(SystemExit) as raised:
        main([mistake.stage, *config, *mistake.options.split()])
    error = capfd.readouterr().err
    assert raised.value.code == 2, error
    assert re.fullmatch(r"(error|data_prep): [^\n]+\n", error), error
    assert mistake.says in error
    after = contents(place)
    assert {path: after.get(path) for path in before} == before
    made = {Path(path).name for path in after.keys() - before.keys()}
    assert not made & {"manifest.json", "stage.json", "model.safetensors"}, "something was published"


def test_a_micro_batch_below_the_longest_example_is_found_before_training(
    place: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["run", "--config", "recipe.yaml", "--distill.batch.tokens_per_micro_batch", "5"])
    assert "distill.batch.tokens_per_micro_batch is 5, but the longest example has" in capfd.readouterr().err
    assert Path("run/data/manifest.json").is_file()
    assert not Path("run/teacher").exists()


def test_there_are_at_least_forty_mistakes() -> None:
    assert len(MISTAKES) >= 40


def test_the_template_has_no_mistake(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Else the mistakes above would show nothing."""
    main(["run", "--config", "recipe.yaml", "--dry-run"])
    output = capfd.readouterr().out
    assert [line.split()[0] for line in output.splitlines()] == [
        "teacher:", "data:", "ranks:", "data", "teacher", "distill", "baseline", "assemble", "evaluate", "report",
    ]  # fmt: skip
    assert "-m pipeline distill --config" in output
    assert not Path("run").exists()


def test_a_second_run_in_the_same_folder_is_refused(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    Path("run").mkdir()
    with open("run/.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(SystemExit) as raised:
            main(["run", "--config", "recipe.yaml"])
    assert raised.value.code == 2
    assert "another process works in run" in capfd.readouterr().err


def test_a_disk_that_will_not_suffice_is_one_line(place: Path, capfd: pytest.CaptureFixture[str], monkeypatch) -> None:
    """What a run has written already is not asked for again."""
    main(["estimate", "--config", "recipe.yaml"])
    (needed,) = re.findall(r"disk +([\d.]+) MiB at most", capfd.readouterr().out)
    usage = shutil.disk_usage(place)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=float(needed) * 2**20 * 0.9))
    with pytest.raises(SystemExit) as raised:
        main(["run", "--config", "recipe.yaml"])
    error = capfd.readouterr().err
    assert raised.value.code == 2
    assert re.fullmatch(rf"error: run_dir run will take up to [^\n]+the disk of {place} has [^\n]+\n", error), error
    assert not Path("run").exists()
    for stage in ("teacher", "distill"):
        weights = Path("run", stage, "weights")
        weights.parent.mkdir(parents=True)
        weights.touch()
        os.truncate(weights, 2**30)
    main(["run", "--config", "recipe.yaml", "--dry-run"])


def test_a_missing_mpiexec_is_one_line(place: Path, capfd: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(SystemExit) as raised:
        main(["run", "--config", "recipe.yaml", "--launch.num_mpi_ranks", "2"])
    assert raised.value.code == 2
    assert capfd.readouterr().err.startswith("error: no mpiexec found: pip install mpich")


def test_verbose_shows_the_traceback(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["run", "--config", "recipe.yaml", "--teacher.folder", "nowhere", "--verbose"])
    assert "Traceback" in capfd.readouterr().err


@pytest.mark.parametrize(
    "name", [each for each in MISTAKES if each.split()[0] in FOLDERS and MISTAKES[each].stage == "run"]
)
def test_estimate_refuses_model_folders_as_the_dry_run_does(
    name: str, place: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    mistake = MISTAKES[name]
    mistake.break_it()
    capfd.readouterr()
    with pytest.raises(SystemExit) as raised:
        main(["estimate", "--config", "recipe.yaml", *mistake.options.split()])
    error = capfd.readouterr().err
    assert raised.value.code == 2, error
    assert mistake.says in error
