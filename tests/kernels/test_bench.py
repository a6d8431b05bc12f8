"""`python -m pipeline.bench kernels` prints a table and one line of JSON a measure, and times only a correct loss."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from pipeline.bench import Measure, kernels
from pipeline.bench.__main__ import main
from pipeline.kernels import reference

KEYS = ["bench", "measure", "ours", "baseline", "baseline_name", "ratio", "unit", "floor"]


@pytest.fixture(autouse=True)
def small_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "CPU_CASES", [kernels.Case(2, (2, 3, 16), torch.bfloat16)])


def test_prints_and_writes_every_measure(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    command = ["kernels", "--device", "cpu", "--rounds", "1", "--valid", "0.7", "--write", str(tmp_path / "results")]
    assert main(command) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    measures = [json.loads(line) for line in lines]
    assert all(list(measure) == KEYS for measure in measures)
    found = [(measure["measure"], measure["baseline_name"]) for measure in measures]
    names = [f"hidden_loss {mode} 2x2x3x16 bfloat16 time" for mode in ("mse", "span")]
    assert found == [(name, baseline) for name in names for baseline in ("eager_fp32", "eager_storage")]
    (written,) = (tmp_path / "results").iterdir()
    assert written.name.startswith("kernels_")
    assert all(name in written.read_text() for name in names)


def test_ratio_says_how_many_times_cheaper_ours_is() -> None:
    assert Measure("kernels", "time", ours=2.0, baseline=6.0, baseline_name="eager", unit="ms", floor=1.0).ratio == 3


def test_refuses_to_time_a_wrong_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "hidden_loss", lambda pairs, mode: reference.hidden_loss(pairs, mode) * 1.01)
    with pytest.raises(AssertionError, match="not close"):
        main(["kernels", "--device", "cpu", "--rounds", "1"])


@pytest.mark.parametrize("mode", ["mse", "span"])
def test_baseline_loop_computes_the_same_loss(mode: kernels.Mode) -> None:
    pairs = kernels.make_pairs(kernels.Case(3, (2, 10, 16), torch.float32), "cpu", valid=0.7)
    torch.testing.assert_close(kernels.eager_loop(pairs, mode), reference.hidden_loss(pairs, mode))
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
