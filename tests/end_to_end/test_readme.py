"""README.md's own recipe, copied into an empty folder with a teacher and data of its own: it runs to the report."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import sentencepiece
import torch
from transformers import T5Config, T5ForConditionalGeneration

ROOT = Path(__file__).resolve().parents[2]
CHAPTER = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Your own model and data\n")[2]
# what a test cannot wait for
FEWER = {
    "teacher.optim.num_steps": "0", "teacher.batch.micro_batches_per_step": "1",
    "distill.optim.num_steps": "2", "distill.local_steps": "1", "distill.optim.warmup_steps": "1",
    "distill.batch.micro_batches_per_step": "1", "distill.batch.tokens_per_micro_batch": "200",
    "baseline.optim.num_steps": "0", "assemble.ratios": "[2]", "launch.num_ranks": "1", "launch.num_mpi_ranks": "1",
    "evaluate.max_examples": "2", "evaluate.max_new_tokens": "4", "evaluate.latency_examples": "1",
}  # fmt: skip


def recipe_of_the_readme() -> str:
    """The lines under `# my.yaml`, without the four spaces of Markdown."""
    lines = CHAPTER.partition("    # my.yaml\n")[2].splitlines()
    end = next(number for number, line in enumerate(lines) if line and not line.startswith("    "))
    return "\n".join(line[4:] for line in lines[:end]) + "\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What a user has: texts, and a small T5 in the place of T5-large, with as many layers."""
    rows = [{"document": f"a long text about {i} and {i + 1}", "summary": f"about {i}"} for i in range(30)]
    (tmp_path / "data").mkdir()
    for split in ("train", "validation", "test"):
        with gzip.open(tmp_path / "data" / f"{split}.jsonl.gz", "wt", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    model = tmp_path / "models" / "t5-large"
    model.mkdir(parents=True)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(row["document"] + row["summary"] for row in rows), model_prefix=str(model / "spiece"),
        vocab_size=40, hard_vocab_limit=False, pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2,
    )  # fmt: skip
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=48, d_model=16, d_kv=4, d_ff=32, num_heads=4, num_layers=24, num_decoder_layers=24,
        decoder_start_token_id=0,
    )  # fmt: skip
    T5ForConditionalGeneration(config).save_pretrained(model)
    (tmp_path / "my.yaml").write_text(recipe_of_the_readme(), encoding="utf-8")
    return tmp_path


def test_the_recipe_runs_in_a_folder_of_its_own(folder: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pipeline", "run", "--config", "my.yaml"]
    command += [part for name, value in FEWER.items() for part in (f"--{name}", value)]
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    run = folder / "runs" / "summaries"
    assert (run / "report" / "report.html").is_file()
    assert (run / "assemble" / "models" / "e2x12-d2x12" / "model.safetensors").is_file()
