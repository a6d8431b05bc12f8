"""The ready recipes say what they cost, as `estimate` computes it."""

from __future__ import annotations

import re
import shlex

import pytest

from pipeline.__main__ import main
from pipeline.config.cli import RECIPES

COSTLY = ["t5_base", "t5_large", "mt5_large", "t5_11b", "nllb_600m", "mbart_large_50", "madlad_3b", "opus_mt",
          "pegasus_large", "t5gemma2_270m"]  # fmt: skip


@pytest.mark.parametrize("name", COSTLY)
def test_the_costs_in_the_header_are_those_of_estimate(name, capsys):
    lines = (RECIPES / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    header = " ".join(line.removeprefix("#").strip() for line in lines if line.startswith("#"))
    command = re.search(r"`python -m pipeline (estimate --config \w+ [^`]*)`", header)[1]
    assert command.split()[2] == name
    main(shlex.split(command))
    said = capsys.readouterr().out
    rows = [line.split() for line in said.splitlines() if re.match(r"(teacher|distill|finetune\S*) ", line)]
    memory = max(float(row[4]) for row in rows if len(row) > 8)
    hours = re.search(r"^all +([\d.]+)$", said, re.MULTILINE)[1]
    disk = re.search(r"^disk +([\d.]+) GiB", said, re.MULTILINE)[1]
    assert f"{memory:.1f} GiB a GPU, {hours} hours of training, {disk} GiB of disk" in header


def test_one_recipe_is_for_a_teacher_that_no_gpu_holds_whole(capsys):
    """Where auto takes ZeRO-3; the others fit, and take what sends least."""
    taken = {}
    for name in COSTLY:
        main(["estimate", "--config", name, "--config", "summarisation", "--nodes", "1", "--gpus", "8", "--gib", "80"])
        (row,) = (line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("distill "))
        taken[name] = row[3]
    assert taken == {**dict.fromkeys(COSTLY, "zero2_replicated"), "t5_11b": "zero3"}
