"""The whole road through the program that people run, on the 60-second recipe: once, again, and after kills."""

from __future__ import annotations

import shutil
import time

import pytest

from pipeline.report_data import read_jsonl
from tests.faults.harness import STAGES, Road, kill_group, scores, seconds_of_stages


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


@pytest.mark.timeout(900)
def test_the_road_ends_with_every_output(finished):
    road, output = finished
    assert set(seconds_of_stages(output)) == set(STAGES)
    assert "report.html" in output
    rows = scores(road.run_dir)
    kinds = [row["kind"] for row in rows]
    assert kinds.count("teacher") == 1
    assert kinds.count("finetuned") == 1
    assert kinds.count("assembly") == kinds.count("dropped") == 4
    assert (road.run_dir / "report" / "quality.png").stat().st_size > 1000
    validations = [
        record for record in read_jsonl(road.run_dir / "distill" / "metrics.jsonl") if "validation/e6-d6" in record
    ]
    assert [record["step"] for record in validations] == [20, 40]
    # training does something: the last validation of a coarse assembly is better than the first
    assert validations[-1]["validation/e6-d6"] < validations[0]["validation/e6-d6"]


@pytest.mark.timeout(300)
def test_a_second_run_redoes_nothing_and_shows_the_same(finished):
    road, output = finished
    before = {path: path.stat().st_mtime_ns for path in road.run_dir.rglob("*.safetensors")}
    again = road.finish()
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert again.count("up to date") == len(STAGES) - 1
    assert table_of(again) == table_of(output)
    assert len(table_of(again)) > 8


@pytest.mark.timeout(900)
def test_a_kill_in_training_and_one_in_evaluation_change_no_score(finished, tmp_path):
    road, output = finished
    broken = Road(tmp_path / "broken run")
    shutil.copytree(road.run_dir, broken.run_dir)
    for stage in ("distill", "baseline", "assemble", "evaluate", "report"):
        shutil.rmtree(broken.run_dir / stage)
    seconds = seconds_of_stages(output)
    assert broken.kill_in("distill", 0.7 * seconds["distill"])
    broken.kill_in("evaluate", 0.6 * seconds["evaluate"])
    broken.finish()
    assert scores(broken.run_dir) == scores(road.run_dir)


@pytest.mark.timeout(600)
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
    output, _ = process.communicate(timeout=200)
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
