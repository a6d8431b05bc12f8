"""Decode and score every system of a run in one batch that any number of workers share and any kill only pauses.

The unit of work is (system, quality): decode the test part, score it. A worker takes a unit with a claim file and
publishes outputs/<name>.jsonl, then scores/<name>.json, which carries the key that the result was made from; a result
counts only when key, checksum and outputs agree, so whatever a kill or a bad disk leaves behind is simply done again.
When all units are there, worker 0 alone measures latency, in one go for all systems, and writes scores.csv.

Outputs are those of a plain `AutoModelForSeq2SeqLM.from_pretrained(folder).generate(...)` in the dtype of the
checkpoint. Padding is masked exactly, so the company an example is decoded in changes logits only by the order of
summation: about 1e-6 in float32, where another greedy output needs a near-tie (tests/end_to_end/test_evaluate.py
compares 200 outputs with other batches); in bfloat16 the same noise is about 1e-2 and an output may change.
"""

from __future__ import annotations

import csv
import hashlib
import importlib.metadata
import io
import json
import logging
import shutil
import time
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from sacrebleu.metrics import BLEU, CHRF
from tqdm import tqdm

from pipeline.assemble import System
from pipeline.config import Recipe
from pipeline.decode import decode, device_name, latencies, load
from pipeline.rundir import RunDir, Stage, sha256_file, write_atomic
from pipeline.units import digest_of, publish_sealed, read_sealed, take_claim, touch
from pipeline.world import World

NUM_BOOTSTRAP = 200
POLL_S = 0.2


@dataclass(frozen=True)
class Evaluation:
    """What is scored, on what, how."""

    recipe: Recipe
    run: RunDir
    systems: list[System]
    examples: list[dict[str, Any]]
    test_sha256: str

    @staticmethod
    def load(recipe: Recipe, run: RunDir) -> Evaluation:
        """Read systems.json and the test part.

        Raises:
            FileNotFoundError: a stage before this one has not published.
            ValueError: an empty test part.
        """
        test, manifest = run.data / "test.jsonl", run.data / "manifest.json"
        for path, stage in ((manifest, "data"), (test, "data"), (run.systems, "assemble")):
            if not path.is_file():
                raise FileNotFoundError(f"{path} is missing: run stage {stage} first")
        systems = [System(**each) for each in json.loads(run.systems.read_text(encoding="utf-8"))["systems"]]
        assert len({system.name for system in systems}) == len(systems)
        assert sum(system.kind == "teacher" for system in systems) == 1
        with open(test, encoding="utf-8") as file:
            examples = [json.loads(line) for line, _ in zip(file, range(recipe.evaluate.max_examples), strict=False)]
        if not examples:
            raise ValueError(f"no test examples in {test}: give a test part (data.test) and evaluate.max_examples >= 1")
        return Evaluation(recipe, run, systems, examples, sha256_file(test))

    @property
    def folder(self) -> Path:
        return self.run.stage("evaluate")

    def texts(self, side: str) -> list[str]:
        return [example[side] for example in self.examples]

    @cached_property
    def metrics(self) -> tuple[BLEU, CHRF]:
        """Metric objects that hold the n-grams of the references, counted once for all systems."""
        references = [self.texts("target")]
        return BLEU(references=references), CHRF(references=references)

    def result_paths(self, system: System) -> tuple[Path, Path]:
        """(outputs, score) of a system; the score is published last."""
        return self.folder / "outputs" / f"{system.name}.jsonl", self.folder / "scores" / f"{system.name}.json"

    def latency_picks(self) -> list[dict[str, Any]]:
        """Examples to time, spread evenly over the test part."""
        count = min(self.recipe.evaluate.latency_examples, len(self.examples))
        return [self.examples[i * len(self.examples) // count] for i in range(count)]

    def key(self, system: System) -> dict[str, Any]:
        """All that a quality result depends on; a result with another key is not this system's."""
        files = folder_hashes(self.run.root / system.folder)
        weights = {name: digest for name, digest in files.items() if name.endswith(".safetensors")}
        settings = self.recipe.evaluate
        decoding = {
            "num_beams": settings.num_beams,
            "max_new_tokens": settings.max_new_tokens,
            "max_source_tokens": self.recipe.data.max_source_tokens,
            "num_examples": len(self.examples),
        }
        return {"weights": weights, "folder": digest_of(files), "test": self.test_sha256, "decoding": decoding}


@cache
def folder_hashes(folder: Path) -> dict[str, str]:
    """sha256 of each file of a checkpoint folder, by name; read once in a process."""
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} is not a checkpoint (no config.json): run stage assemble again")
    return {path.name: sha256_file(path) for path in sorted(folder.iterdir()) if path.is_file()}


def evaluate(recipe: Recipe, run: RunDir, world: World) -> None:
    """Score all systems of a run; worker 0 also times them and writes scores.csv.

    Workers need no connection to each other, only the run directory: start as many as there are devices, on as many
    machines, at any time. Workers other than 0 return when nothing is left to claim; worker 0 returns when all is done
    and takes over what dead workers leave.

    Raises:
        FileNotFoundError: a stage before this one has not published.
        ValueError: an empty test part.
    """
    started_s = time.time()
    for library in ("sacrebleu", "transformers"):
        logging.getLogger(library).setLevel(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()
    work = Evaluation.load(recipe, run)
    stage = Stage.of(recipe, run, "evaluate")
    if world.is_main:
        # Not stage.begin(): results carry their own keys, so those of unchanged systems stay good, whatever has changed
        # around them, and nothing needs to be refused or moved from under another worker.
        (stage.folder / "stage.json").unlink(missing_ok=True)
        write_atomic(stage.folder / "inputs.json", json.dumps(stage.inputs, indent=1))
    scores = score_systems(work, world)
    if not world.is_main:
        return
    times = measure_times(work, world)
    rows = table_of(work, scores, times)
    write_atomic(run.scores, csv_text(rows))
    shutil.rmtree(work.folder / "claims", ignore_errors=True)
    results = [path for system in work.systems for path in work.result_paths(system)]
    stage.publish([run.scores, work.folder / "times.json", *results], started_s=started_s)
    teacher = next(row for row in rows if row["kind"] == "teacher")
    print(
        f"evaluate: {len(work.systems)} systems x {len(work.examples)} examples, "
        f"teacher {float(teacher['bleu']):.1f} BLEU, {time.time() - started_s:.1f} s -> {run.scores}"
    )


def score_systems(work: Evaluation, world: World) -> dict[str, dict[str, Any]]:
    """Score whatever no other worker has scored; on worker 0, return only when every system has a valid result."""
    queue = sorted(work.systems, key=lambda system: (-system.bytes, system.name))  # long work first: even finish
    scores: dict[str, dict[str, Any]] = {}
    with tqdm(total=len(queue), desc="evaluate", unit="system", disable=None if world.is_main else True) as bar:
        while True:
            for system in queue:
                if system.name in scores:
                    continue
                score = read_score(work, system)
                if score is None and (claim := take_claim(work.folder / "claims", system.name)):
                    # Another worker may have published and released between the look and the claim.
                    score = read_score(work, system) or score_system(work, system, world.device, claim)
                    claim.unlink(missing_ok=True)
                if score is not None:
                    scores[system.name] = score
                    bar.update()
            if len(scores) == len(queue) or not world.is_main:
                return scores
            time.sleep(POLL_S)


def read_score(work: Evaluation, system: System) -> dict[str, Any] | None:
    """The published result of a system when it is whole and was made from today's inputs, else None."""
    outputs_path, score_path = work.result_paths(system)
    score = read_sealed(score_path)
    if score is None or score["key"] != work.key(system) or not outputs_path.is_file():
        return None
    return score if sha256_file(outputs_path) == score["outputs_sha256"] else None


def score_system(work: Evaluation, system: System, device: torch.device, claim: Path) -> dict[str, Any]:
    """Decode and score one system and publish the result, outputs first."""
    key = work.key(system)
    model, tokenizer = load(work.run.root / system.folder, device)
    decoded = decode(model, tokenizer, work.texts("source"), work.recipe, beat=lambda: touch(claim))
    lines = [
        {"id": example["id"], "source": example["source"], "reference": example["target"], "output": output}
        for example, output in zip(work.examples, decoded.outputs, strict=True)
    ]
    content = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    score: dict[str, Any] = {
        "name": system.name,
        "kind": system.kind,
        "assembly": system.assembly,
        "quality": quality_of(work, decoded.outputs),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": device_name(device),
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers", "sacrebleu")},
        "times": {"batch_pass_s": decoded.seconds, "tokens_per_s": decoded.num_tokens / decoded.seconds},
        "outputs_sha256": hashlib.sha256(content.encode()).hexdigest(),
        "key": key,
    }
    outputs_path, score_path = work.result_paths(system)
    write_atomic(outputs_path, content)
    publish_sealed(score_path, score)
    return score


def quality_of(work: Evaluation, outputs: list[str]) -> dict[str, Any]:
    """BLEU with a 95 % bootstrap interval, chrF, and exact matches in percent."""
    bleu, chrf = work.metrics
    result: Any = bleu.corpus_score(outputs, None, n_bootstrap=NUM_BOOTSTRAP)
    pairs = zip(outputs, work.texts("target"), strict=True)
    num_exact = sum(output.strip() == target.strip() for output, target in pairs)
    return {
        "bleu": result.score,
        "bleu_low": max(0.0, result._mean - result._ci),
        "bleu_high": min(100.0, result._mean + result._ci),
        "bleu_signature": str(bleu.get_signature()),
        "chrf": chrf.corpus_score(outputs, None).score,
        "chrf_signature": str(chrf.get_signature()),
        "exact_match": 100 * num_exact / len(outputs),
        "num_examples": len(outputs),
    }


def measure_times(work: Evaluation, world: World) -> dict[str, dict[str, float]]:
    """Latencies of all systems, by name, published as one file: they compare only when measured in one go."""
    picks = work.latency_picks()
    key = {
        "systems": {system.name: work.key(system) for system in work.systems},
        "examples": [each["id"] for each in picks],
        "device": device_name(world.device),
    }
    path = work.folder / "times.json"
    published = read_sealed(path)
    if published is not None and published["key"] == key:
        return published["times"]
    folders = {system.name: work.run.root / system.folder for system in work.systems}
    pairs = [(each["source"], each["target"]) for each in picks]
    times = latencies(folders, pairs, work.recipe, world.device)
    publish_sealed(path, {"key": key, "num_threads": torch.get_num_threads(), "times": times})
    return times


def table_of(
    work: Evaluation, scores: dict[str, dict[str, Any]], times: dict[str, dict[str, float]]
) -> list[dict[str, str]]:
    """Rows of scores.csv in the order of systems.json; columns whose names start with time_ differ from run to run."""
    teacher = next(system for system in work.systems if system.kind == "teacher")
    teacher_bleu = scores[teacher.name]["quality"]["bleu"]
    rows = []
    for system in work.systems:
        quality, measured = scores[system.name]["quality"], times[system.name]
        values: dict[str, Any] = {
            "name": system.name,
            "kind": system.kind,
            "assembly": system.assembly,
            "requests": "; ".join(f"{preset} {ratio:g}" for preset, ratio in system.requests),
            "encoder_layers": system.num_encoder_layers,
            "decoder_layers": system.num_decoder_layers,
            "ratio_layers": float(system.ratio_layers),
            "ratio_non_embedding": teacher.num_non_embedding_parameters / system.num_non_embedding_parameters,
            "ratio_bytes": teacher.bytes / system.bytes,
            "parameters": system.num_parameters,
            "non_embedding_parameters": system.num_non_embedding_parameters,
            "bytes": system.bytes,
            "bleu": quality["bleu"],
            "bleu_low": quality["bleu_low"],
            "bleu_high": quality["bleu_high"],
            "chrf": quality["chrf"],
            "exact_match": quality["exact_match"],
            "percent_of_teacher": 100 * quality["bleu"] / teacher_bleu if teacher_bleu else "",
            "examples": quality["num_examples"],
            "time_latency_ms": measured["latency_ms"],
            "time_ms_per_token": measured["ms_per_token"],
            "time_speedup": times[teacher.name]["latency_ms"] / measured["latency_ms"],
            "time_tokens_per_s": scores[system.name]["times"]["tokens_per_s"],
            "time_batch_pass_s": scores[system.name]["times"]["batch_pass_s"],
        }
        rows.append({name: f"{v:.4f}" if isinstance(v, float) else str(v) for name, v in values.items()})
    return rows


def csv_text(rows: list[dict[str, str]]) -> str:
    """A table as CSV with a header and Unix line ends."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()
