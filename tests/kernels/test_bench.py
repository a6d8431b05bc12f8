"""`python -m pipeline.bench kernels` prints a table and one line of JSON a measure, and times only a correct loss."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import pytest
import torch

from pipeline.bench import Measure, kernels, kernels_attention, kernels_head
from pipeline.bench.__main__ import main
from pipeline.bench.timing import peak_mib
from pipeline.kernels import attention_loss, hidden_loss

ATTENTION = kernels_attention.Case("cross", 2, (2, 5, 7, 2, 4), torch.float32)
KEYS = ["bench", "measure", "ours", "baseline", "baseline_name", "ratio", "unit", "floor"]


@pytest.fixture(autouse=True)
def small_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "CPU_CASES", [kernels.Case(2, (2, 3, 16), torch.bfloat16)])
    monkeypatch.setattr(kernels_head, "CPU_CASES", [kernels_head.Case(300, 8, 50, torch.float32)])
    monkeypatch.setattr(kernels_attention, "CPU_CASES", [ATTENTION])


def test_prints_and_writes_every_measure(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    command = ["kernels", "--device", "cpu", "--rounds", "1", "--valid", "0.7", "--write", str(tmp_path / "results")]
    assert main(command) == 0
    output = capsys.readouterr().out.splitlines()
    assert sum(", ms: ours" in line or ", ms: plain" in line for line in output) == 6  # with their spread
    lines = [line for line in output if line.startswith("{")]
    measures = [json.loads(line) for line in lines]
    assert all(list(measure) == KEYS for measure in measures)
    found = [(measure["measure"], measure["baseline_name"]) for measure in measures]
    names = [f"hidden_loss {mode} 2x2x3x16 bfloat16" for mode in ("mse", "span", "cosine")]
    losses = [*product(names, ("eager_fp32", "eager_storage"))]
    others = [*product(["head_loss 300x8x50 float32"], ("eager_fp32", "trl_chunked"))]
    others.append(("attention_loss cross 2x2x5x7x2x4 float32", "eager"))
    ours = [(f"hidden_loss {name} 2x2x3x16 bfloat16 time", "ours") for name in ("cosine", "half the tokens, mse")]
    both = [
        [(f"{name} {what}", baseline) for name, baseline in each for what in ("time", "memory")]
        for each in (losses, others)
    ]
    assert found == both[0] + ours + both[1]
    (written,) = (tmp_path / "results").iterdir()
    assert written.name.startswith("kernels_")
    assert all(name in written.read_text() for name in names)


def test_one_loss_has_a_file_of_its_own(tmp_path: Path) -> None:
    command = ["kernels", "--device", "cpu", "--rounds", "1", "--only", "attention", "--write", str(tmp_path)]
    assert main(command) == 0
    (written,) = tmp_path.iterdir()
    assert written.name.startswith("kernels_attention_")


def test_ratio_says_how_many_times_cheaper_ours_is() -> None:
    assert Measure("kernels", "time", ours=2.0, baseline=6.0, baseline_name="eager", unit="ms", floor=1.0).ratio == 3


def test_refuses_to_time_a_wrong_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "fused", lambda pairs, mode: kernels.eager_loop(pairs, mode) * 1.01)
    with pytest.raises(AssertionError, match="not close"):
        main(["kernels", "--device", "cpu", "--rounds", "1"])


@pytest.mark.parametrize("mode", ["mse", "span", "cosine"])
def test_baseline_loop_computes_the_same_loss(mode: kernels.HiddenMode) -> None:
    pairs = kernels.make_pairs(kernels.Case(3, (2, 10, 16), torch.float32), "cpu", valid=0.7)
    torch.testing.assert_close(
        kernels.eager_loop(pairs, mode), hidden_loss(pairs, mode, kernels.WEIGHT, eager=True).share_P.sum()
    )
    assert pairs[1].start_BTD is pairs[0].teacher_BTD
    assert pairs[0].mask_BT.sum() == 14


@pytest.mark.parametrize(
    ("options", "words"),
    [(["--valid", "0"], "--valid is 0.0"), (["--rounds", "0"], "--rounds is 0")],
)
def test_bad_option_is_one_line(options: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["kernels", *options]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


def test_baselines_of_the_head_compute_the_same_loss():
    inputs = kernels_head.make_inputs(kernels_head.Case(300, 8, 50, torch.float32), "cpu")
    expected = kernels_head.ours(inputs)
    (gradient_ND,) = torch.autograd.grad(expected, inputs.student_ND)
    for loss in (kernels_head.eager, kernels_head.chunked):
        torch.testing.assert_close(loss(inputs), expected)
        torch.testing.assert_close(torch.autograd.grad(loss(inputs), inputs.student_ND)[0], gradient_ND)


@pytest.mark.parametrize("kind", ["encoder", "decoder", "cross"])
def test_baseline_of_attention_computes_the_same_loss(kind: str) -> None:
    pairs = kernels_attention.make_pairs(ATTENTION._replace(kind=kind), "cpu", valid=0.7)
    states = [state for pair in pairs for state in pair[:2]]
    eager = kernels_attention.eager(pairs, kernels_attention.whole_bias(pairs[0]))
    expected = kernels_attention.WEIGHT * attention_loss(pairs, eager=True).share_P.sum()
    torch.testing.assert_close(eager, expected)
    gradients = torch.autograd.grad(eager, states)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected, states), rtol=1e-4, atol=1e-7)


def test_peak_memory_counts_what_lives_at_once() -> None:
    def run() -> object:
        first = torch.empty(2**20, dtype=torch.uint8)
        second = torch.empty(3 * 2**20, dtype=torch.uint8)
        del first
        return second, torch.empty(2**20, dtype=torch.uint8), torch.empty(2**20, dtype=torch.uint8)

    assert peak_mib(run, torch.device("cpu")) == 5
