"""A tiny run up to the assemble stage, workers that evaluate it, and what they publish."""

from __future__ import annotations

import csv
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, T5Config, T5ForConditionalGeneration, T5Tokenizer

from data_prep.publish import sha256_of
from pipeline.__main__ import main
from pipeline.assemble.systems import System, describe
from pipeline.assemble.write import Parts, write_checkpoint
from pipeline.config.recipe import EvaluateConfig, Recipe
from pipeline.evaluation.stage import evaluate
from pipeline.evaluation.subject import folder_hashes
from pipeline.ordinary import save_ordinary
from pipeline.rundir.run_dir import RunDir
from pipeline.spans.spans import Assembly
from pipeline.world import World
from tests.forks import context
from tests.patience import PATIENCE_S, wait_until

REPOSITORY = Path(__file__).resolve().parents[1]
NUM_EXAMPLES = 200
NUM_NEW_TOKENS = 12
SETTINGS = {"max_examples": NUM_EXAMPLES, "max_new_tokens": NUM_NEW_TOKENS, "tokens_per_batch": 500}
SYSTEMS = (  # name, kind, assembly, requests
    ("e1x2-d1x2", "teacher", "e1x2-d1x2", []),
    ("e2-d2", "assembly", "e2-d2", [["size-first", 2.0], ["speed-first", 2.0]]),
    ("drop-e2-d2", "dropped", "e2-d2", []),
    ("e1x2-d2", "assembly", "e1x2-d2", [["speed-first", 1.33]]),
    ("finetuned-e2-d2", "finetuned", "e2-d2", []),
)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory up to the assemble stage; the references are the teacher's own outputs."""
    root = tmp_path_factory.mktemp("inputs")
    run = RunDir(root)
    generator = random.Random(0)
    words = ("one", "two", "three", "monday", "march", "euro", "metre", "clock", "half", "past", "quarter", "to")
    sources = [" ".join(generator.choices(words, k=generator.randrange(1, 9))) for _ in range(2 * NUM_EXAMPLES)]
    tokenizer = train_tokenizer(root / "tokenizer", sources)
    write_model(run.teacher_model, tokenizer, seed=0, depth=2)
    write_model(run.stage("baseline") / "model", tokenizer, seed=1, depth=1)
    write_library(run, seed=2)
    systems = [write_system(run, *system) for system in SYSTEMS]
    run.systems.write_text(json.dumps({"systems": [asdict(system) for system in systems]}))
    (root / "assemble/stage.json").write_text(json.dumps({"outputs_hash": "of the systems"}))
    references = plain_outputs(run.teacher_model, sources)
    pairs = [(source, text) for source, text in zip(sources, references, strict=True) if text.strip()][
        : NUM_EXAMPLES + 10
    ]
    records = [{"id": f"{i}", "source": source, "target": text} for i, (source, text) in enumerate(pairs)]
    (root / "data").mkdir()
    (root / "data/test.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (root / "data/manifest.json").write_text(json.dumps({"plan_hash": "of the data"}))
    return root


@pytest.fixture(scope="module")
def finished(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same after one worker has evaluated it without interruption."""
    root = tmp_path_factory.mktemp("finished") / "run"
    shutil.copytree(inputs, root)
    command = [sys.executable, "-m", "pipeline", "evaluate", *options_of(root)]
    subprocess.run(command, cwd=REPOSITORY, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True)
    return root


def train_tokenizer(folder: Path, sentences: list[str]) -> T5Tokenizer:
    folder.mkdir()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_prefix=str(folder / "spiece"),
        vocab_size=64,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    return T5Tokenizer.from_pretrained(folder, extra_ids=0)


def write_model(folder: Path, tokenizer: T5Tokenizer, seed: int, depth: int, d_ff: int = 64) -> None:
    """A random T5 whose outputs depend on its inputs."""
    torch.manual_seed(seed)
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": d_ff, "num_heads": 4, "num_layers": depth, "num_decoder_layers": depth}
    model = T5ForConditionalGeneration(
        T5Config(**sizes, vocab_size=len(tokenizer), decoder_start_token_id=0, tie_word_embeddings=False)
    )
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=1.5 * parameter.shape[1] ** -0.5)
    torch.nn.init.normal_(model.lm_head.weight)
    save_ordinary(model, folder)
    tokenizer.save_pretrained(folder)


def write_library(run: RunDir, seed: int) -> None:
    """A module library of one random modular layer a stack, of granularity 2."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, weight in load_file(run.teacher_model / "model.safetensors").items():
        stack, _, rest = name.partition(".block.1.")
        if rest:
            noise = torch.randn(weight.shape, generator=generator)
            weights[f"{stack}.0-1.{rest}"] = weight + noise * weight.std() if weight.dim() == 2 else weight.clone()
    run.library.mkdir(parents=True)
    save_file(weights, run.library / "modular.safetensors")
    manifest = {
        "spans": {"encoder": ["0-1"], "decoder": ["0-1"]},
        "teacher_sha256": sha256_of(run.teacher_model / "model.safetensors"),
        "modular_sha256": sha256_of(run.library / "modular.safetensors"),
    }
    (run.library / "library.json").write_text(json.dumps(manifest))


def write_system(run: RunDir, name: str, kind: str, assembly: str, requests: list[Any]) -> System:
    folder = run.stage("baseline") / "model" if kind == "finetuned" else run.stage("assemble") / "models" / name
    if kind != "finetuned":
        write_checkpoint(Parts.of(run), Assembly.parse(assembly), folder, dropped=kind == "dropped")
    return replace(describe(run, folder, kind, name, Assembly.parse(assembly)), requests=requests)


def plain_outputs(folder: Path, sources: list[str]) -> list[str]:
    model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    encoded = tokenizer(sources, return_tensors="pt", padding=True)
    ids = model.generate(**encoded, max_new_tokens=NUM_NEW_TOKENS)
    return tokenizer.batch_decode(ids, skip_special_tokens=True)


def start_worker(root: Path, rank: int = 0, size: int = 1) -> ForkServerProcess:
    """A worker of a session of its own, forked from a process that has imported what it needs."""
    worker = context().Process(target=_work, args=(root, rank, size), daemon=True)
    worker.start()
    return worker


def _work(root: Path, rank: int, size: int) -> None:
    os.setsid()
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size))
    main(["evaluate", *options_of(root)])


def options_of(root: Path) -> list[str]:
    settings = {**SETTINGS, "latency_examples": 3}
    return [f"--run_dir={root}", *(f"--evaluate.{name}={value}" for name, value in settings.items())]


def exit_code(worker: ForkServerProcess) -> int | None:
    """Once it has ended."""
    worker.join(PATIENCE_S)
    return worker.exitcode


def evaluate_here(root: Path, **settings: Any) -> None:
    """Evaluate in this process."""
    folder_hashes.cache_clear()
    config = EvaluateConfig(**{**SETTINGS, "latency_examples": 3, **settings})
    evaluate(Recipe(evaluate=config), RunDir(root), World(0, 1, 0, torch.device("cpu")))


def table(root: Path) -> list[dict[str, str]]:
    """scores.csv without its measured times."""
    with open(root / "evaluate/scores.csv", encoding="utf-8", newline="") as file:
        return [{k: v for k, v in row.items() if not k.startswith("time_")} for row in csv.DictReader(file)]


def outputs(root: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (root / "evaluate/outputs").glob("*.jsonl")}


def when_published(root: Path) -> dict[str, int]:
    return {path.stem: path.stat().st_mtime_ns for path in (root / "evaluate/scores").glob("*.json")}


def kill_when(worker: ForkServerProcess, root: Path, num_units: int, num_scores: int) -> None:
    """SIGKILL a worker's process group when so many units are decoded and so many systems are scored."""

    def has_come_so_far() -> bool:
        assert worker.is_alive(), "the worker ended before it could be killed"
        return len(units_done(root)) >= num_units and len(when_published(root)) >= num_scores

    wait_until(has_come_so_far, look_every_s=0.002)
    os.killpg(worker.pid, signal.SIGKILL)
    assert exit_code(worker) == -signal.SIGKILL


def units_done(root: Path) -> list[str]:
    return [path.name for path in (root / "evaluate/units").glob("plan-*/[!.]*.json")]
