"""The whole road through the program that people run, on the 60-second recipe: once, again, and after kills."""

from __future__ import annotations

import json
import os
import re
import shutil
import time

import pytest

from pipeline.__main__ import main
from pipeline.checkpoints.format import checkpoints
from pipeline.library.command import checkpoint_command as checkpoint_command
from pipeline.recover import Score
from pipeline.report.data import read_jsonl
from tests.faults.harness import STAGES, Road, kill_group, scores, seconds_of_stages
from tests.forks import run_forked
from tests.patience import PATIENCE_S


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    road = Road(tmp_path_factory.mktemp("road") / "minute run")
    return road, road.finish()


def table_of(output: str) -> list[str]:
    """The lines of the printed table, from its title to where the report lies."""
    lines = output.splitlines()
    (first,) = (number for number, line in enumerate(lines) if "systems on" in line)
    (last,) = (number for number, line in enumerate(lines) if line.startswith("report:"))
    return lines[first:last]


def test_the_road_ends_with_every_output(finished):
    road, output = finished
    assert set(seconds_of_stages(output)) == set(STAGES)
    assert "report.html" in output
    rows = scores(road.run_dir)
    kinds = [row["kind"] for row in rows]
    assert kinds.count("teacher") == 1
    assert kinds.count("finetuned") == 1
    assert kinds.count("assembly") == kinds.count("dropped") == kinds.count("engine") - 1 == 4
    assert (road.run_dir / "report" / "quality.png").stat().st_size > 1000
    validations = [
        record for record in read_jsonl(road.run_dir / "distill" / "metrics.jsonl") if "validation/e6-d6" in record
    ]
    assert [record["step"] for record in validations] == [20, 40]
    # training does something: the last validation of a coarse assembly is better than the first
    assert validations[-1]["validation/e6-d6"] < validations[0]["validation/e6-d6"]


def test_a_library_comes_out_of_any_checkpoint_on_one_cpu(finished, tmp_path, capsys):
    """The newest gives the bytes that the run made; nothing but the checkpoint's folder is read."""
    run_dir = finished[0].run_dir
    checkpoint_command(["verify", str(run_dir)])
    assert re.search(r"^(\d+) of \1 checkpoints verify", capsys.readouterr().out, re.MULTILINE)
    older, *_, newest = checkpoints(run_dir / "distill" / "checkpoints")
    for checkpoint in (older, newest):
        alone = shutil.copytree(checkpoint, tmp_path / checkpoint.name)
        checkpoint_command(["export", str(alone), "--out", str(tmp_path / "out" / checkpoint.name)])
    library = run_dir / "distill" / "library"
    for name in ("modular.safetensors", "library.json"):
        assert (tmp_path / "out" / newest.name / name).read_bytes() == (library / name).read_bytes()
    changed = (tmp_path / "out" / older.name / "modular.safetensors").read_bytes()
    assert changed != (library / "modular.safetensors").read_bytes()
    with pytest.raises(ValueError, match="holds no modular layers"):
        checkpoint_command(
            ["export", str(checkpoints(run_dir / "teacher" / "checkpoints")[-1]), "--out", str(tmp_path)]
        )
    (tmp_path / newest.name / "rank_00001.safetensors").write_bytes(b"")
    with pytest.raises(SystemExit, match="1"):
        checkpoint_command(["verify", str(tmp_path / newest.name)])
    assert f"damaged: {tmp_path / newest.name}: rank_00001.safetensors has 0 bytes" in capsys.readouterr().out


def test_a_second_run_redoes_nothing_and_shows_the_same(finished):
    road, output = finished
    before = {path: path.stat().st_mtime_ns for path in road.run_dir.rglob("*.safetensors")}
    again = road.finish()
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert again.count("up to date") == len(STAGES) - 1
    assert table_of(again) == table_of(output)
    assert len(table_of(again)) > 8


def test_recovery_tuning_never_publishes_a_worse_model(finished, tmp_path):
    road, _ = finished
    run_dir = tmp_path / "recovered run"
    for part in ("data", "teacher", "distill"):
        shutil.copytree(road.run_dir / part, run_dir / part)
    for learning_rate in ("1e-3", "30"):
        command = ["recover", "--config", "minute", "--run_dir", str(run_dir)]
        options = {"assembly": "e3x2-d3x2", "optim.num_steps": "20", "optim.learning_rate": learning_rate}
        command += [text for name, value in options.items() for text in (f"--recover.{name}", value)]
        done = run_forked(main, command, environment=os.environ)
        assert done.returncode == 0, done.stderr[-3000:]
        stamp = json.loads((run_dir / "recover" / "stage.json").read_text())
        before, after = Score(**stamp["before"]), Score(**stamp["after"])
        assert (after.loss < before.loss) == (learning_rate == "1e-3"), (before, after)
        published = not after.is_worse_than(before)
        assert (run_dir / "recover" / "model" / "model.safetensors").exists() == published
        assert ("worse, so nothing is published" in done.stdout) != published
        assert not (run_dir / "recover" / "tuned").exists()
        shutil.rmtree(run_dir / "recover")


def test_a_kill_in_training_and_one_in_evaluation_change_no_score(finished, tmp_path):
    road, _ = finished
    broken = Road(tmp_path / "broken run")
    shutil.copytree(road.run_dir, broken.run_dir)
    for stage in ("distill", "assemble", "evaluate", "report"):
        shutil.rmtree(broken.run_dir / stage)
    for stage, found in (("distill", "checkpoints/step_*/manifest.json"), ("evaluate", "units/*/*.json")):
        broken.kill_when_there_is(f"{stage}/{found}")
        assert not (broken.run_dir / stage / "stage.json").exists(), "killed in the middle"
    broken.finish()
    assert scores(broken.run_dir) == scores(road.run_dir)


def test_a_stop_file_saves_and_the_same_command_goes_on(finished, tmp_path):
    """Asked to stop in the middle, where saving and logging fall on the same step too, then run again."""
    road, _ = finished
    stopped = Road(
        tmp_path / "stopped run", ("--teacher.loop.log_every_steps", "5", "--teacher.loop.save_every_steps", "5")
    )
    shutil.copytree(road.run_dir / "data", stopped.run_dir / "data")
    process = stopped.start()
    while not (stopped.run_dir / "teacher" / "metrics.jsonl").exists():
        assert process.poll() is None
        time.sleep(0.1)
    (stopped.run_dir / "STOP").touch()
    output, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 85, output[-2000:]
    assert (stopped.run_dir / "teacher" / "REQUEUE").read_text().startswith("step ")
    assert not (stopped.run_dir / "teacher" / "stage.json").exists()
    process = stopped.start()
    while not (stopped.run_dir / "teacher" / "stage.json").exists():
        assert process.poll() is None
        time.sleep(0.1)
    kill_group(process)
    weights = "teacher/model/model.safetensors"
    assert (stopped.run_dir / weights).read_bytes() == (road.run_dir / weights).read_bytes()
