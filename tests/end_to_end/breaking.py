"""How to make a mistake in a copy of a sound folder, and what must be said of it."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import sentencepiece
import torch
from safetensors.torch import load_file, save_file
from transformers import MT5Config, MT5ForConditionalGeneration

from pipeline.config.cli import parse_recipe, recipe_parser
from pipeline.rundir.run_dir import STAGES, RunDir
from pipeline.rundir.stage import Stage

ROOT = Path(__file__).resolve().parents[2]
LINES = [{"source": f"word {i} and word {i + 1}", "target": f"Wort {i} und Wort {i + 1}"} for i in range(60)]
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


def write_jsonl(path: Path, rows: list) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def train_tokenizer(folder: Path, num_pieces: int) -> None:
    folder.mkdir()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(row["source"] + row["target"] for row in LINES), model_prefix=str(folder / "spiece"),
        vocab_size=num_pieces, hard_vocab_limit=False, pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2,
    )  # fmt: skip
    (folder / "spiece.vocab").unlink()


@dataclass(frozen=True)
class Mistake:
    """How to make one mistake in a copy of the template, and what the line must say."""

    says: str
    options: str = ""
    break_it: Callable[[], object] = lambda: None
    """Runs in the copy."""
    stage: str = "run"


def edit(path: str, **values: object) -> Callable[[], object]:
    """Change top-level values of a JSON file."""
    return lambda: Path(path).write_text(json.dumps({**json.loads(Path(path).read_text()), **values}))


def text(path: str, content: str | bytes) -> Callable[[], object]:
    data = content.encode() if isinstance(content, str) else content
    return lambda: Path(path).write_bytes(data)


def begun(stage: str, *options: str) -> None:
    """Begin a stage with other settings, as a run that was killed leaves it; the stages before it are done."""
    recipe = parse_recipe(recipe_parser("test", ""), ["--config", "recipe.yaml", *options])[0]
    run = RunDir(Path("run"))
    (run.data).mkdir(parents=True)
    (run.data / "manifest.json").write_text("{}")
    for before in STAGES[stage][1]:
        if before != "data":
            done = Stage.of(recipe, run, before)
            done.begin()
            done.publish([], started_at=0)
    Stage.of(recipe, run, stage).begin()


def peer(break_it: Callable[[Path], object] = lambda folder: None) -> Callable[[], object]:
    """Put a copy of the teacher at peer/, and break it."""
    return lambda: break_it(Path(shutil.copytree("teacher", "peer")))


def weights(change: Callable[[torch.Tensor], torch.Tensor], end: str, prefix: str = "") -> Callable[[], object]:
    """Change the teacher's weights whose names end so."""

    def do() -> None:
        for path in Path("teacher").glob("*.safetensors"):
            found = {
                prefix + name: change(each) if name.endswith(end) else each.clone()
                for name, each in load_file(path).items()
            }
            save_file(found, path, metadata={"format": "pt"})

    return do


def renamed(name: str, other: str) -> Callable[[], object]:
    """Give one of the teacher's weights another name."""

    def do() -> None:
        for path in Path("teacher").glob("*.safetensors"):
            found = {other if each == name else each: weight.clone() for each, weight in load_file(path).items()}
            save_file(found, path, metadata={"format": "pt"})

    return do


def pickled(content: object) -> Callable[[], object]:
    """Put pytorch_model.bin in the place of the teacher's safetensors files."""

    def do() -> None:
        for path in Path("teacher").glob("model*"):
            path.unlink()
        path = Path("teacher/pytorch_model.bin")
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)

    return do


def metricx_alone() -> None:
    """Put a model of MetricX's kind at peer/, without a tokenizer."""
    config = MT5Config(vocab_size=250112, d_model=2, d_kv=1, d_ff=2, num_layers=1, num_decoder_layers=1, num_heads=1)
    MT5ForConditionalGeneration(config).save_pretrained("peer")


def cut_gzip() -> None:
    packed = gzip.compress(Path("train.jsonl").read_bytes())
    Path("train.jsonl.gz").write_bytes(packed[:-30])
