"""Evaluation by real worker processes: kills, several workers, damage, and outputs that need none of this project."""

from __future__ import annotations

import csv
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, T5Config, T5ForConditionalGeneration, T5Tokenizer

from pipeline import units
from pipeline.config import EvaluateConfig, Recipe
from pipeline.decode import MAX_EXAMPLES_PER_BATCH, batches_of
from pipeline.evaluate import evaluate, folder_hashes
from pipeline.rundir import RunDir
from pipeline.world import World

REPOSITORY = Path(__file__).resolve().parents[2]
NUM_EXAMPLES = 200
NUM_NEW_TOKENS = 12
SETTINGS = {"max_examples": NUM_EXAMPLES, "max_new_tokens": NUM_NEW_TOKENS, "tokens_per_batch": 500}
SYSTEMS = (  # name, kind, assembly, requests, layers of a stack
    ("e1x2-d1x2", "teacher", "e1x2-d1x2", [], 2),
    ("e2-d2", "assembly", "e2-d2", [["size-first", 2.0], ["speed-first", 2.0]], 1),
    ("drop-e2-d2", "dropped", "e2-d2", [], 1),
    ("e1x2-d2", "assembly", "e1x2-d2", [["speed-first", 1.33]], 2),
    ("finetuned-e2-d2", "finetuned", "e2-d2", [], 1),
)
PLAIN_PROCESS = """
import importlib.util, json, sys
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer
assert importlib.util.find_spec("pipeline") is None and importlib.util.find_spec("data_prep") is None
folder, num_new_tokens = sys.argv[1], int(sys.argv[2])
model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
sources, outputs = json.load(sys.stdin), []
for first in range(0, len(sources), 16):
    inputs = tokenizer(sources[first : first + 16], return_tensors="pt", padding=True)
    ids = model.generate(**inputs, max_new_tokens=num_new_tokens)
    outputs += tokenizer.batch_decode(ids, skip_special_tokens=True)
print(json.dumps(outputs))
"""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory up to the assemble stage; the references are the teacher's own outputs."""
    root = tmp_path_factory.mktemp("inputs")
    generator = random.Random(0)
    words = ("one", "two", "three", "monday", "march", "euro", "metre", "clock", "half", "past", "quarter", "to")
    sources = [" ".join(generator.choices(words, k=generator.randrange(1, 9))) for _ in range(NUM_EXAMPLES + 10)]
    tokenizer = train_tokenizer(root / "tokenizer", sources)
    systems = [write_system(root, tokenizer, seed, *system) for seed, system in enumerate(SYSTEMS)]
    (root / "assemble/systems.json").write_text(json.dumps({"systems": systems}))
    (root / "assemble/stage.json").write_text(json.dumps({"outputs_hash": "of the systems"}))
    references = plain_outputs(root / systems[0]["folder"], sources)
    records = [
        {"id": f"{i}", "source": s, "target": r} for i, (s, r) in enumerate(zip(sources, references, strict=True))
    ]
    (root / "data").mkdir()
    (root / "data/test.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (root / "data/manifest.json").write_text(json.dumps({"plan_hash": "of the data"}))
    return root


@pytest.fixture(scope="module")
def finished(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same after one worker has evaluated it without interruption."""
    root = tmp_path_factory.mktemp("finished") / "run"
    shutil.copytree(inputs, root)
    assert start_worker(root).wait() == 0
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


def write_system(
    root: Path, tokenizer: T5Tokenizer, seed: int, name: str, kind: str, assembly: str, requests: list[Any], depth: int
) -> dict[str, Any]:
    """A random T5 whose outputs depend on its inputs, and its entry in systems.json."""
    torch.manual_seed(seed)
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_heads": 4, "num_layers": depth, "num_decoder_layers": depth}
    model = T5ForConditionalGeneration(
        T5Config(**sizes, vocab_size=len(tokenizer), decoder_start_token_id=0, tie_word_embeddings=False)
    )
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=1.5 * parameter.shape[1] ** -0.5)
    torch.nn.init.normal_(model.lm_head.weight)
    folder = root / "assemble/models" / name
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    return {
        "name": name,
        "kind": kind,
        "folder": f"assemble/models/{name}",
        "assembly": assembly,
        "requests": requests,
        "num_encoder_layers": depth,
        "num_decoder_layers": depth,
        "ratio_layers": 2 / depth,
        "num_parameters": num_parameters,
        "num_non_embedding_parameters": num_parameters - 2 * 32 * len(tokenizer),
        "bytes": (folder / "model.safetensors").stat().st_size,
    }


def plain_outputs(folder: Path, sources: list[str]) -> list[str]:
    model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    encoded = tokenizer(sources, return_tensors="pt", padding=True)
    ids = model.generate(**encoded, max_new_tokens=NUM_NEW_TOKENS)
    return tokenizer.batch_decode(ids, skip_special_tokens=True)


def start_worker(root: Path, rank: int = 0, size: int = 1) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "pipeline", "evaluate", f"--run_dir={root}", "--evaluate.latency_examples=3"]
    command += [f"--evaluate.{name}={value}" for name, value in SETTINGS.items()]
    environment = {**os.environ, "RANK": str(rank), "WORLD_SIZE": str(size), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=REPOSITORY, env=environment, start_new_session=True)


def evaluate_here(root: Path, **settings: int) -> None:
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


def kill_when(worker: subprocess.Popen[bytes], root: Path, num_scores: int) -> None:
    """SIGKILL a worker's process group when so many systems are scored and, if any is left, the next one is begun."""
    deadline_s = time.monotonic() + 60
    while True:
        scored = set(when_published(root))
        claimed = {path.name.rpartition(".")[0] for path in (root / "evaluate/claims").glob("[!.]*")}
        if len(scored) >= num_scores and (claimed - scored or len(scored) == len(SYSTEMS)):
            break
        assert worker.poll() is None, "the worker ended before it could be killed"
        assert time.monotonic() < deadline_s
        time.sleep(0.002)
    os.killpg(worker.pid, signal.SIGKILL)
    assert worker.wait() == -signal.SIGKILL


def test_scores(finished: Path) -> None:
    rows = table(finished)
    assert [row["name"] for row in rows] == [name for name, *_ in SYSTEMS]
    assert rows[0]["bleu"] == rows[0]["exact_match"] == rows[0]["percent_of_teacher"] == "100.0000"
    assert all(float(row["bleu"]) < 50 for row in rows[1:])
    assert {row["examples"] for row in rows} == {str(NUM_EXAMPLES)}
    assert rows[1]["requests"] == "size-first 2; speed-first 2"
    assert rows[1]["ratio_layers"] == "2.0000"
    assert not (finished / "evaluate/claims").exists()
    stamp = json.loads((finished / "evaluate/stage.json").read_text())
    assert len(stamp["outputs"]) == 2 + 2 * len(SYSTEMS)


def test_killed_and_resumed_equals_uninterrupted(inputs: Path, finished: Path, tmp_path: Path) -> None:
    root = tmp_path / "run"
    shutil.copytree(inputs, root)
    for num_scores in (2, len(SYSTEMS)):  # while systems are scored, and while they are timed
        kill_when(start_worker(root), root, num_scores)
        assert not (root / "evaluate/scores.csv").exists()
    kept = when_published(root)
    assert start_worker(root).wait() == 0
    assert table(root) == table(finished)
    assert outputs(root) == outputs(finished)
    assert when_published(root) == kept


def test_two_workers_equal_one(inputs: Path, finished: Path, tmp_path: Path) -> None:
    root = tmp_path / "run"
    shutil.copytree(inputs, root)
    workers = [start_worker(root, rank, 2) for rank in range(2)]
    assert [worker.wait() for worker in workers] == [0, 0]
    assert table(root) == table(finished)
    assert outputs(root) == outputs(finished)


def test_worker_0_takes_over_from_a_killed_worker(inputs: Path, finished: Path, tmp_path: Path) -> None:
    root = tmp_path / "run"
    shutil.copytree(inputs, root)
    kill_when(start_worker(root, rank=1, size=2), root, num_scores=2)
    evaluate_here(root)
    assert table(root) == table(finished)


def test_what_is_damaged_is_done_again(finished: Path, tmp_path: Path) -> None:
    root = tmp_path / "run"
    shutil.copytree(finished, root)
    before = when_published(root)
    score = root / "evaluate/scores/e2-d2.json"
    score.write_text(score.read_text().replace('"bleu": ', '"bleu": 9'))  # still JSON
    (root / "evaluate/scores/e1x2-d2.json").write_text('{"name": "e1x')
    with open(root / "evaluate/outputs/drop-e2-d2.jsonl", "a", encoding="utf-8") as file:
        file.write("{}\n")
    (root / "evaluate/times.json").write_text("[]")
    evaluate_here(root)
    assert table(root) == table(finished)
    assert outputs(root) == outputs(finished)
    again = {name for name, instant in when_published(root).items() if before[name] != instant}
    assert again == {"e2-d2", "e1x2-d2", "drop-e2-d2"}


def test_nothing_changed_nothing_done(finished: Path, tmp_path: Path) -> None:
    root = tmp_path / "run"
    shutil.copytree(finished, root)
    before = when_published(root), (root / "evaluate/scores.csv").read_bytes()
    evaluate_here(root)
    assert (when_published(root), (root / "evaluate/scores.csv").read_bytes()) == before


def test_other_weights_or_settings_are_scored_anew(finished: Path, tmp_path: Path) -> None:
    root = tmp_path / "run"
    shutil.copytree(finished, root)
    before = when_published(root)
    models = root / "assemble/models"
    shutil.copy2(models / "drop-e2-d2/model.safetensors", models / "e2-d2/model.safetensors")
    evaluate_here(root)
    assert {name for name, instant in when_published(root).items() if before[name] != instant} == {"e2-d2"}
    rows = {row["name"]: row for row in table(root)}
    assert rows["e2-d2"]["bleu"] == rows["drop-e2-d2"]["bleu"]
    evaluate_here(root, max_new_tokens=5)
    assert all(before[name] != instant for name, instant in when_published(root).items())


@pytest.mark.parametrize("name", ["e1x2-d1x2", "e1x2-d2"])
def test_a_process_without_this_project_decodes_the_same(finished: Path, tmp_path: Path, name: str) -> None:
    scored = [json.loads(line) for line in outputs(finished)[f"{name}.jsonl"].decode().splitlines()]
    assert len(scored) == 200
    assert len({record["output"] for record in scored}) > 30, "outputs that hardly differ prove nothing"
    folder = finished / "assemble/models" / name
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    plain = subprocess.run(
        [sys.executable, "-I", "-c", PLAIN_PROCESS, str(folder), str(NUM_NEW_TOKENS)],
        input=json.dumps([record["source"] for record in scored]),
        capture_output=True, text=True, check=True, cwd=tmp_path, env=environment,
    )  # fmt: skip
    assert json.loads(plain.stdout) == [record["output"] for record in scored]


def test_missing_stages_are_named(inputs: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="run stage data first"):
        evaluate_here(tmp_path)
    shutil.copytree(inputs / "data", tmp_path / "data")
    with pytest.raises(FileNotFoundError, match="run stage assemble first"):
        evaluate_here(tmp_path)


def test_batches_hold_every_example_once_and_no_more_tokens_than_allowed() -> None:
    lengths = [random.Random(1).randrange(1, 40) for _ in range(500)]
    batches = batches_of(lengths, tokens_per_batch=300)
    assert sorted(i for batch in batches for i in batch) == list(range(500))
    assert all(len(batch) * max(lengths[i] for i in batch) <= 300 for batch in batches)
    assert batches == batches_of(lengths, tokens_per_batch=300)
    assert batches_of([9, 9], tokens_per_batch=4) == [[0], [1]]
    assert max(map(len, batches_of([1] * 1000, tokens_per_batch=10**6))) == MAX_EXAMPLES_PER_BATCH


def test_claims(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    holder = subprocess.Popen([sys.executable, "-c", f"import sys; sys.path.insert(0, {str(REPOSITORY)!r})\n"
        f"from pathlib import Path; from pipeline.units import take_claim\n"
        f"print(take_claim(Path({str(tmp_path)!r}), 'unit'), flush=True); sys.stdin.read()"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE)  # fmt: skip
    assert holder.stdout is not None
    claim = Path(holder.stdout.readline().decode().strip())
    assert claim == tmp_path / "unit.0"
    assert units.take_claim(tmp_path, "unit") is None, "its holder lives"
    assert units.take_claim(tmp_path, "other") == tmp_path / "other.0"
    os.utime(claim, (0, 0))
    assert not units.is_held(claim), "silent for too long"
    units.touch(claim)
    assert units.is_held(claim)
    monkeypatch.setattr(units.socket, "gethostname", lambda: "elsewhere")
    assert units.is_held(claim), "nothing can be known of a process on another host"
    monkeypatch.undo()
    holder.kill()  # not waited for: a zombie is dead too
    deadline_s = time.monotonic() + 10
    while units.is_held(claim) and time.monotonic() < deadline_s:
        time.sleep(0.01)
    assert units.take_claim(tmp_path, "unit") == tmp_path / "unit.1"
    holder.wait()
