"""The training loop on real ranks: stopped, killed and resumed, on the same ranks and on others."""

from __future__ import annotations

import functools
import json
import os
import re
import signal

import pytest
import torch
from safetensors.torch import load

from pipeline.checkpoints.format import checkpoints
from pipeline.spans.paths import students_of
from pipeline.spans.spans import Assembly
from tests.distributed import training
from tests.forks import run_ranks, wait_for
from tests.patience import wait_until

LOSSES = ("hidden", "logit", "task", "hidden/granularity_2", "hidden/granularity_3", "replaced_share")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return training.prepare(tmp_path_factory.mktemp("prepared") / "run")


@pytest.fixture(scope="module")
def whole(prepared, tmp_path_factory):
    """An uninterrupted run on two ranks."""
    run_dir = training.copy_of(prepared, tmp_path_factory.mktemp("whole") / "run")
    wanted = ("--distill.compile_layers", "true")
    assert training.run("distill", 2, run_dir, *wanted, log=run_dir) == [0, 0], (run_dir / "rank_0").read_text()[-3000:]
    return run_dir


def test_the_run_says_first_what_it_trains(whole):
    said = (whole / "rank_0").read_text()
    weights = load(training.library(whole))
    trained = sum(weight.numel() for weight in weights.values())
    assert f"{trained:,} parameters in 10 layers are trained" in said
    assert "DeepSpeed configuration zero3_cpu, as the recipe says" in said
    assert "2 ranks: each needs" in said
    assert "distill: layers are not compiled: not under ZeRO-3, where weights come and go" in said
    assert said.index("are trained") < said.index("validation loss")


def losses_of(run_dir):
    return [{name: record[name] for name in LOSSES if name in record} for record in training.records(run_dir)]


def stop_after(run_dir, num_ranks, step, *options):
    """Train until the record of a step is there, ask to stop, and see that all ranks leave with 85."""
    (run_dir / "STOP").unlink(missing_ok=True)
    processes = training.start("distill", num_ranks, run_dir, *options, log=run_dir)
    metrics = run_dir / "distill" / "metrics.jsonl"

    def has_come_so_far():
        assert processes[0].is_alive(), (run_dir / "rank_0").read_text()[-3000:]
        return metrics.exists() and f'"step": {step},' in metrics.read_text()

    wait_until(has_come_so_far)
    os.kill(processes[-1].pid, signal.SIGUSR1)
    codes = wait_for(processes)
    stopped = int((run_dir / "distill" / "REQUEUE").read_text().split()[1])
    assert codes == [85] * num_ranks
    assert step <= stopped <= step + 3
    return stopped


@pytest.fixture(scope="module")
def stopped(prepared, tmp_path_factory):
    """Runs that were stopped in the local phase, by the number of their ranks."""

    @functools.cache
    def on(num_ranks):
        run_dir = training.copy_of(prepared, tmp_path_factory.mktemp("stopped") / "run")
        stop_after(run_dir, num_ranks, 1)
        return run_dir

    return on


def test_a_record_a_step_with_all_that_should_be_in_it(whole):
    records = training.records(whole)
    assert [record["step"] for record in records] == list(range(1, 9))
    local, replacing, validated = records[1], records[-2], records[3]
    assert {"hidden/encoder.0-1", "hidden/granularity_2", "hidden/granularity_3"} <= local.keys()
    assert "replaced_share" not in local
    assert set(LOSSES) <= replacing.keys()
    assert 0 < replacing["replaced_share"] <= 1
    assert {f"validation/{name}" for name in ("teacher", "e2x3-d2x3", "e3x2-d3x2")} <= validated.keys()
    for record in records:
        assert {"learning_rate", "tokens_per_s", "memory_gib/host", "grad_norm/encoder.0-1"} <= record.keys()
        times = {name for name in record if name.startswith("seconds_per_step/")}
        assert {f"seconds_per_step/{phase}" for phase in ("data", "forward", "backward", "optimizer")} <= times
    assert "seconds_per_step/save" in records[2]  # the record after a save holds what it cost
    assert list((whole / "tensorboard" / "distill").glob("events*"))


def test_the_longest_micro_batches_come_first_in_each_phase(prepared, tmp_path):
    run_dir = training.copy_of(prepared, tmp_path / "run")
    options = ("--distill.optim.num_steps=5", "--distill.draws=[sampled,coarsest]")
    (code,) = run_ranks(1, training.stage_step_by_step, "distill", str(run_dir), options)
    assert code == 0
    steps = [json.loads(line) for line in (run_dir / "steps.jsonl").read_text().splitlines()]
    assert [step for step, *_ in steps] == [0, 3, 0, 1, 2, 3, 4]
    longest = [max(side) for side in zip(*(each for _, _, lengths, _ in steps for each in lengths), strict=True)]
    assert [rest for _, *rest, _ in steps[:2]] == [[0.0, [longest] * 4]] * 2
    assert all(rate > 0 for _, rate, *_ in steps[2:])
    assert [longest] * 4 not in [lengths for _, _, lengths, _ in steps[2:]]
    assert [draws for *_, draws in steps[2:5]] == [["the local phase"] * 4] * 3 == [steps[0][-1]] * 3
    drawn = [draws for *_, step_draws in steps[5:] for draws in step_draws]
    assert steps[1][-1] == [max(drawn, key=computed)] * 4


def computed(text: str) -> int:
    """Layers that are computed for the students of these draws."""
    return len(students_of([Assembly.parse(each) for each in text.split(" + ")]))


def test_a_loss_that_is_not_finite_stops_the_run_and_says_where(prepared, tmp_path):
    """A learning rate without bound: the first step goes well, the second does not."""
    run_dir = training.copy_of(prepared, tmp_path / "run")
    options = ("--distill.local_steps=0", "--distill.optim.learning_rate=1e30", "--distill.loop.save_every_steps=1")
    assert training.run("distill", 2, run_dir, *options, log=run_dir) == [2, 2]
    assert [path.name for path in checkpoints(run_dir / "distill" / "checkpoints")] == ["step_00000001"]
    for rank in (0, 1):
        said = (run_dir / f"rank_{rank}").read_text().splitlines()[-1]
        assert "error: step 1 stopped before the optimizer moved: gradients are not finite in encoder." in said
        drawn = " \\+ ".join([r"e[\dx.]+-d[\dx.]+"] * 4)  # sampled, both granularities crossed, coarsest
        for micro_batch in range(4):  # of all ranks
            assert re.search(rf"micro-batch {micro_batch}: loss (nan|inf) of {drawn}, examples \d+", said)


def test_resumed_on_the_same_ranks_it_is_the_same_run(stopped, whole, tmp_path):
    """Stopped in the local phase and again in the other; bit for bit the same losses and weights, each step once."""
    run_dir = training.copy_of(stopped(2), tmp_path / "run")
    stop_after(run_dir, 2, 5)
    assert training.run("distill", 2, run_dir) == [0, 0]
    assert losses_of(run_dir) == losses_of(whole)
    assert training.library(run_dir) == training.library(whole)
    assert [record["step"] for record in training.records(run_dir)] == list(range(1, 9))


@pytest.mark.parametrize("ranks", [(2, 1), (1, 2), (2, 4)])
def test_resumed_on_other_ranks_it_is_the_same_run_but_for_rounding(stopped, whole, tmp_path, ranks):
    run_dir = training.copy_of(stopped(ranks[0]), tmp_path / "run")
    assert training.run("distill", ranks[1], run_dir) == [0] * ranks[1]
    for ours, reference in zip(losses_of(run_dir), losses_of(whole), strict=True):
        assert ours == pytest.approx(reference, rel=1e-5)
    weights, expected = load(training.library(run_dir)), load(training.library(whole))
    errors = torch.cat([(weights[name] - expected[name]).abs().flatten() for name in expected])
    assert errors.mean() < 1e-6


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_that_is_lost_ends_the_run_and_the_next_start_continues(prepared, whole, tmp_path, number):
    run_dir = training.copy_of(prepared, tmp_path / "run")
    processes = training.start("distill", 2, run_dir, log=tmp_path)
    checkpoint = run_dir / "distill" / "checkpoints" / "step_00000002" / "manifest.json"
    wait_until(checkpoint.exists, look_every_s=0.005)
    os.kill(processes[1].pid, number)
    assert wait_for(processes[:1]) == [1]
    wait_for(processes, timeout_s=0)
    said = (tmp_path / "rank_0").read_text()
    assert re.search(r"rank 1 \(process \d+ on .*\) has (died|not been heard of)", said)
    assert training.run("distill", 2, run_dir) == [0, 0]
    assert training.library(run_dir) == training.library(whole)
    assert [record["step"] for record in training.records(run_dir)] == list(range(1, 9))


def test_another_schedule_goes_on_only_when_told_to(whole, tmp_path):
    run_dir = training.copy_of(whole, tmp_path / "run")
    longer = ("--distill.optim.num_steps=10",)
    assert training.run("distill", 2, run_dir, *longer, log=tmp_path) == [2, 2]
    assert "num_steps: 8 -> 10" in (tmp_path / "rank_0").read_text()
    assert training.run("distill", 2, run_dir, *longer, "--extend") == [0, 0]
    assert [record["step"] for record in training.records(run_dir)] == list(range(1, 11))
    assert training.library(run_dir) != training.library(whole)


def test_another_identity_is_refused_with_the_difference(stopped, tmp_path):
    run_dir = training.copy_of(stopped(1), tmp_path / "run")
    assert training.run("distill", 1, run_dir, "--distill.coarse_weight=0.25", log=tmp_path) == [2]
    assert "distill.coarse_weight: " in (tmp_path / "rank_0").read_text()
    assert " -> 0.25" in (tmp_path / "rank_0").read_text()
