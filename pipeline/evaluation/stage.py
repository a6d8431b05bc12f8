"""Decode and score every system of a run in one batch that any number of workers share and any kill only pauses.

Work is claimed as units through files: first (group, slice) units decode (slices.py), then one unit a system
scores it and publishes outputs/<name>.jsonl and scores/<name>.json with the key that the result was made from. A result
counts only when key, checksum and outputs agree, so whatever a kill or a bad disk leaves behind is done again.
When all scores are there, worker 0 alone measures costs, in one go for all systems, and writes scores.csv.

Outputs are those of a plain `AutoModelForSeq2SeqLM.from_pretrained(folder).generate(...)` in evaluate.dtype.
Padding is masked exactly, so the company an example is decoded in changes logits only by the order of summation: about
1e-6 in float32, where another output needs a near-tie (tests/end_to_end/test_evaluate.py compares 200 outputs with
other batches); in bfloat16 the same noise is about 1e-2 and an output may change.
"""

from __future__ import annotations

import csv
import hashlib
import importlib.metadata
import io
import json
import logging
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm import tqdm

from data_prep.publish import sha256_of
from pipeline.assemble import System
from pipeline.config import Recipe
from pipeline.evaluation.cost import Sample, costs, full_batch
from pipeline.evaluation.metricx import MetricX
from pipeline.evaluation.slices import DecodingPlan, Workshop, agree_on_plan, merge, read_unit, tokenize
from pipeline.evaluation.subject import Subject
from pipeline.rundir import RunDir, Stage, publish_sealed, read_sealed, work_off, write_atomic
from pipeline.scoring import METRICS, p_values, quality_of
from pipeline.tokenizer import load_tokenizer
from pipeline.world import World, device_name

TIMES = ("latency_ms", "latency_ms_low", "latency_ms_high", "ms_per_token", "tokens_per_s", "tokens_per_s_low",
         "tokens_per_s_high", "peak_memory_bytes")  # fmt: skip


def evaluate(recipe: Recipe, run: RunDir, world: World | None = None) -> None:
    """Score all systems of a run; worker 0 also measures what they cost and writes scores.csv.

    Workers need no connection to each other, only the run directory: start as many as there are devices, on as many
    machines, at any time. Workers other than 0 return when nothing is left to claim; worker 0 returns when all is done
    and takes over what dead workers leave.

    Raises:
        FileNotFoundError: a stage before this one has not published.
        ValueError: an empty test part, a damaged library, an example without a reference; and, after all else is
            scored, a folder of evaluate.folders that cannot be.
    """
    started_at, world = time.time(), world or World.from_environment()
    for library in ("sacrebleu", "transformers", "absl"):
        logging.getLogger(library).setLevel(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()
    subject = Subject.load(recipe, run)
    stage = Stage.of(recipe, run, "evaluate")
    if world.is_main:
        stage.reopen()
    scores = score_systems(subject, world)
    if not world.is_main:
        return
    _warn(scores, subject.references.warning)
    measured = measure_costs(subject, scores, world)
    for leftover in ("claims", "units"):
        shutil.rmtree(subject.folder / leftover, ignore_errors=True)
    for system in subject.systems:
        if "failed" in scores[system.name]:  # tried again when evaluation is started again
            subject.result_paths(system)[1].unlink(missing_ok=True)
    rows = table_of(subject, scores, measured)
    write_atomic(run.scores, csv_text(rows))
    if subject.refused:
        raise ValueError(f"{'; '.join(subject.refused)} (the scores of all others are in {run.scores})")
    results = [path for system in subject.systems for path in subject.result_paths(system) if path.is_file()]
    stage.publish([run.scores, subject.folder / "costs.json", *results], started_at=started_at)
    teacher = next(row for row in rows if row["kind"] == "teacher")
    print(
        f"evaluate: {len(subject.systems)} systems x {_of(len(subject.examples), subject.num_of_part)} examples, "
        f"teacher {float(teacher['bleu']):.1f} BLEU, {time.time() - started_at:.1f} s -> {run.scores}"
    )


def score_systems(subject: Subject, world: World) -> dict[str, dict[str, Any]]:
    """Decode and score whatever no other worker has; on worker 0, return only when every system has a valid result."""
    scores = {system.name: score for system in subject.systems if (score := read_score(subject, system))}
    missing = [system for system in subject.systems if system.name not in scores]
    if not missing:
        return scores
    plan, workshop = agree_on_plan(subject, missing), Workshop(subject, world.device)
    with tqdm(total=len(plan.units), desc="evaluate", unit="unit", disable=None if world.is_main else True) as bar:
        work_off(
            subject.folder / "claims",
            plan.units,
            name=lambda unit: f"{plan.folder.name}.{unit[0]}.{unit[1]}",
            is_done=lambda unit: read_unit(plan, *unit) is not None,
            do=lambda unit, beat: workshop.do(plan, unit, beat),
            wait=world.is_main,
            progress=bar.update,
        )
    if not all(read_unit(plan, *unit) for unit in plan.units):
        return scores  # others still decode, and will score
    with tqdm(total=len(missing), desc="score", unit="system", disable=None if world.is_main else True) as bar:
        work_off(
            subject.folder / "claims",
            missing,
            name=lambda system: f"score.{system.name}",
            is_done=lambda system: read_score(subject, system) is not None,
            do=lambda system, beat: score_system(subject, system, plan, world.device, beat),
            wait=world.is_main,
            progress=bar.update,
        )
    return {system.name: score for system in subject.systems if (score := read_score(subject, system))}


def read_score(subject: Subject, system: System) -> dict[str, Any] | None:
    """The published result of a system when it is whole and was made from today's inputs, else None."""
    outputs_path, score_path = subject.result_paths(system)
    score = read_sealed(score_path)
    if score is None or score["key"] != subject.key(system):
        return None
    if "failed" in score:
        return score
    return score if outputs_path.is_file() and sha256_of(outputs_path) == score["outputs_sha256"] else None


def score_system(
    subject: Subject, system: System, plan: DecodingPlan, device: torch.device, beat: Callable[[], None]
) -> None:
    """Put a system's slices together, score it and publish the result, outputs first."""
    merged = merge(plan, system.name, len(subject.examples))
    outputs_path, score_path = subject.result_paths(system)
    score: dict[str, Any] = {
        "name": system.name,
        "kind": system.kind,
        "assembly": system.assembly,
        "device": device_name(device),
        "versions": {
            name: importlib.metadata.version(name)
            for name in ("torch", "transformers", "sacrebleu", "rouge-score", "ctranslate2")
            if name != "ctranslate2" or system.kind == "engine"
        },
        "key": subject.key(system),
    }
    if isinstance(merged, str):
        publish_sealed(score_path, {**score, "failed": merged})
        return
    outputs, losses, num_tokens = merged
    errors = _errors_of(subject, outputs, device, beat)
    lines = [
        {"id": example["id"], "source": example["source"], "reference": texts[0], "output": output, "loss": loss}
        | ({"references": list(texts)} if len(texts) > 1 else {})
        | ({"metricx": errors[i]} if errors else {})
        for i, (example, texts, output, (loss, _)) in enumerate(
            zip(subject.examples, subject.references.texts, outputs, losses, strict=True)
        )
    ]
    content = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    score |= {
        "quality": quality_of(subject.references, outputs, losses, beat, errors),
        "num_tokens": num_tokens,
        "note": subject.note(system),
        "num_empty": sum(not output.strip() for output in outputs),
        "outputs_sha256": hashlib.sha256(content.encode()).hexdigest(),
    }
    write_atomic(outputs_path, content)
    publish_sealed(score_path, score)


def _errors_of(subject: Subject, outputs: list[str], device: torch.device, beat: Callable[[], None]) -> list[float]:
    """What the recipe's MetricX model says of each output; nothing where it names none."""
    settings = subject.recipe.evaluate
    if not settings.metricx:
        return []
    from data_prep.testpart import without_prefixes  # late: what reads and encodes texts takes a while

    model = MetricX.of(Path(settings.metricx), device, settings.dtype)
    sources = without_prefixes(subject.recipe.data, [example["source"] for example in subject.examples])
    return model.errors(sources, outputs, subject.references.texts, settings.tokens_per_batch, beat)


def _warn(scores: dict[str, dict[str, Any]], of_all: str) -> None:
    """One line on standard error for each system whose scores mean nothing, or for all of them."""
    if of_all:
        print(f"warning: {of_all}", file=sys.stderr)
    for name, score in scores.items():
        if "failed" in score:
            print(f"warning: {name} is left out: {score['failed']}", file=sys.stderr)
        elif score["num_empty"] == score["quality"]["num_examples"]:
            print(f"warning: all outputs of {name} are empty: its scores say only that", file=sys.stderr)
        if score.get("note"):
            print(f"warning: {name} {score['note']}", file=sys.stderr)


def measure_costs(subject: Subject, scores: dict[str, dict[str, Any]], world: World) -> dict[str, dict[str, float]]:
    """Costs of all systems that were scored, by name, published as one file: they compare only when measured in one
    go. Systems of one shape cost the same and are measured once."""
    count = min(subject.recipe.evaluate.latency_examples, len(subject.examples))
    picks = [i * len(subject.examples) // count for i in range(count)]
    systems = [system for system in subject.systems if "failed" not in scores[system.name]]
    key = {
        "systems": {system.name: subject.key(system) for system in systems},
        "examples": [subject.examples[i]["id"] for i in picks],
        "device": device_name(world.device),
        "throughput": "of as many tokens as the middle reference has",
    }
    path = subject.folder / "costs.json"
    published = read_sealed(path)
    if published is not None and published["key"] == key:
        return published["costs"]
    settings = subject.recipe.evaluate
    tokenizer = load_tokenizer(subject.run.teacher_model)
    sources, targets = (tokenize(tokenizer, subject, side) for side in ("source", "target"))
    middle = sorted(range(len(sources)), key=lambda i: (len(sources[i]), i))[len(sources) // 2]
    sample = Sample(
        pairs=[(sources[i], min(len(targets[i]), settings.max_new_tokens)) for i in picks],
        batch=full_batch(sources, settings.tokens_per_batch),
        batch_tokens=max(1, min(statistics.median_low(map(len, targets)), settings.max_new_tokens)),
        typical=(sources[middle], targets[middle]),
        num_beams=settings.num_beams,
    )
    folders = {system.name: subject.folder_of(system) for system in systems}
    peers, engines = ({each.name for each in systems if each.kind == kind} for kind in ("peer", "engine"))
    # one config.json is one shape, whatever was trained; a peer's weights may be of another type than its file says
    shapes = {name: name if name in peers | engines else _config_text(folder) for name, folder in folders.items()}
    first = {shape: name for name, shape in reversed(shapes.items())}
    measured = {name: folder for name, folder in folders.items() if first[shapes[name]] == name}
    taken = costs(measured, sample, world.device, settings.dtype, peers | engines, engines)
    found = {name: taken[first[shape]] for name, shape in shapes.items() if first[shape] in taken}
    publish_sealed(path, {"key": key, "num_threads": torch.get_num_threads(), "costs": found})
    return found


def _config_text(folder: Path) -> str:
    return json.dumps(json.loads((folder / "config.json").read_text(encoding="utf-8")), sort_keys=True)


def table_of(
    subject: Subject, scores: dict[str, dict[str, Any]], measured: dict[str, dict[str, float]]
) -> list[dict[str, str]]:
    """Rows of scores.csv in the order of systems.json; columns whose names start with time_ differ from run to run."""
    teacher = subject.teacher
    if "failed" in scores[teacher.name]:
        reason = scores[teacher.name]["failed"]
        raise ValueError(f"the teacher could not be decoded ({reason}): there is nothing to compare with")
    significance = _significance(subject, scores)
    teacher_bleu = scores[teacher.name]["quality"]["bleu"]
    rows = []
    for system in subject.systems:
        score, cost = scores[system.name], measured.get(system.name, {})
        quality = score.get("quality", {})
        latency = cost.get("latency_ms")
        teacher_latency = measured.get(teacher.name, {}).get("latency_ms")
        values: dict[str, Any] = {
            "name": system.name,
            "kind": system.kind,
            "assembly": system.assembly,
            "requests": "; ".join(f"{preset} {ratio:g}" for preset, ratio in system.requests),
            "failed": score.get("failed", ""),
            "note": score.get("note", ""),
            "encoder_layers": system.num_encoder_layers,
            "decoder_layers": system.num_decoder_layers,
            "ratio_layers": float(system.ratio_layers),
            "ratio_non_embedding": teacher.num_non_embedding_parameters / max(1, system.num_non_embedding_parameters),
            "ratio_bytes": teacher.bytes / system.bytes,
            "parameters": system.num_parameters,
            "non_embedding_parameters": system.num_non_embedding_parameters,
            "bytes": system.bytes,
            "layer_flops": int(cost["layer_flops"]) if "layer_flops" in cost else "",
            **{f"{name}{end}": quality.get(name + end, "") for name in METRICS for end in ("", "_low", "_high")},
            "percent_of_teacher": 100 * quality["bleu"] / teacher_bleu if quality and teacher_bleu else "",
            "p_value": significance.get(system.name, ""),
            "examples": quality.get("num_examples", 0),
            **{f"time_{name}": cost.get(name, "") for name in TIMES},
            "time_speedup": teacher_latency / latency if latency and teacher_latency else "",
        }
        rows.append({name: f"{v:.4f}" if isinstance(v, float) else str(v) for name, v in values.items()})
    return rows


def _significance(subject: Subject, scores: dict[str, dict[str, Any]]) -> dict[str, float]:
    """p-values of the BLEU difference from the teacher."""
    scored = [system for system in subject.systems if "failed" not in scores[system.name]]
    outputs = {system.name: read_outputs(subject, system) for system in scored}
    baseline = outputs.pop(subject.teacher.name)
    return p_values(subject.references, baseline, outputs)


def read_outputs(subject: Subject, system: System) -> list[str]:
    content = subject.result_paths(system)[0].read_text(encoding="utf-8")
    return [json.loads(line)["output"] for line in content.split("\n") if line]


def _of(count: int, total: int) -> str:
    return f"{count:,} of {total:,}" if count < total else f"{count:,}"


def csv_text(rows: list[dict[str, str]]) -> str:
    """A table as CSV with a header and Unix line ends."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()
