"""What a report says, before how it looks: rows, table lines, headline numbers, differing outputs, provenance."""

from __future__ import annotations

import csv
import difflib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.publish import sha256_of
from pipeline.config import SEARCHED, Recipe
from pipeline.rundir import STAGES, RunDir, read_json
from pipeline.scoring import METRICS
from pipeline.spans import PRESETS

KEEP_PERCENTS = (99, 98, 95, 90)
NUM_DIFFERING = 5
SERIES = {  # how a system is drawn: what it is called
    "teacher": "teacher",
    "size-first": "size-first",
    "speed-first": "speed-first",
    "searched": "searched",
    "named": "asked for by name",
    "dropped": "layers dropped, no training",
    "finetuned": "small model fine-tuned directly",
    "engine": "by CTranslate2",
    "peer": "other models",
}
CHOICES = ("assembly",)  # kinds that headlines choose from


@dataclass(frozen=True, kw_only=True)
class Row:
    """One system of scores.csv. `percent` is the share of the teacher's BLEU, None when the teacher has none; what was
    not measured is None."""

    name: str
    kind: str
    assembly: str
    requests: tuple[tuple[str, float], ...]
    encoder_layers: int
    decoder_layers: int
    ratio_layers: float
    ratio_non_embedding: float
    ratio_bytes: float
    parameters: int
    non_embedding_parameters: int
    bytes: int
    scores: Mapping[str, float]
    """By column: every metric, and its _low and _high."""
    percent: float | None
    p_value: float | None
    examples: int
    latency_ms: float | None
    latency_ms_low: float | None
    latency_ms_high: float | None
    speedup: float | None
    tokens_per_s: float | None
    peak_memory_bytes: float | None
    layer_flops: float | None
    note: str = ""
    """What must be known beside the scores."""

    @property
    def bleu(self) -> float:
        return self.scores["bleu"]

    @property
    def bleu_low(self) -> float:
        return self.scores["bleu_low"]

    @property
    def bleu_high(self) -> float:
        return self.scores["bleu_high"]

    @property
    def label(self) -> str:
        """What it is called in tables."""
        return self.name if self.kind in ("peer", "engine") else self.assembly

    @property
    def layers(self) -> str:
        return f"{self.encoder_layers}+{self.decoder_layers}"


@dataclass(frozen=True)
class Line:
    """One line of the table: a system under the request that asked for it, and layer dropping at the same size."""

    group: str
    asked: float | None
    row: Row
    dropped: Row | None


@dataclass(frozen=True)
class Differing:
    """One example whose outputs differ: [(system, output as (text, whether the teacher says otherwise) pieces)]."""

    source: str
    reference: str
    outputs: list[tuple[str, list[tuple[str, bool]]]]


@dataclass(frozen=True)
class Report:
    """All that the table, the page and the pictures show."""

    name: str
    rows: list[Row]
    failed: list[tuple[str, str]]
    """(system, why it could not be scored)."""
    languages: dict[str, dict[str, dict[str, float]]]
    """Scores by language and system; empty where the test part has one language."""
    differing: list[Differing]
    losses: dict[str, list[tuple[int, float]]]
    provenance: list[tuple[str, str]]
    weights: list[tuple[str, str]]
    seconds: list[tuple[str, float]]

    @property
    def teacher(self) -> Row:
        return next(row for row in self.rows if row.kind == "teacher")

    @property
    def lines(self) -> list[Line]:
        return table_lines(self.rows)

    @property
    def headlines(self) -> list[tuple[int, Row | None]]:
        return headlines(self.rows)


def load_report(recipe: Recipe, run: RunDir) -> Report:
    """Read what the stages before have left.

    Raises:
        FileNotFoundError: nothing has been evaluated.
    """
    if not run.scores.is_file():
        raise FileNotFoundError(f"{run.scores} is missing: run stage evaluate first")
    rows, failed = read_rows(run.scores)
    folder = run.stage("evaluate")
    scores = {row.name: read_json(folder / "scores" / f"{row.name}.json") or {} for row in rows}
    teacher = next(row for row in rows if row.kind == "teacher")
    chosen = notable(rows)
    outputs = {row.name: read_jsonl(folder / "outputs" / f"{row.name}.jsonl") for row in (teacher, *chosen)}
    stamps = [(name, read_json(run.root / name / "stage.json")) for name in STAGES]
    return Report(
        name=recipe.name,
        rows=rows,
        failed=failed,
        languages=by_language(scores),
        differing=differing(outputs, teacher.name),
        losses=validation_losses(run.stage("distill") / "metrics.jsonl"),
        provenance=provenance(recipe, run, scores[teacher.name]),
        weights=weight_hashes(run),
        seconds=[(name, stamp["seconds"]) for name, stamp in stamps if stamp and "seconds" in stamp],
    )


def read_rows(path: Path) -> tuple[list[Row], list[tuple[str, str]]]:
    """Rows of scores.csv in its order, and (name, reason) of the systems that failed."""
    with open(path, encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    failed = [(values["name"], values["failed"]) for values in lines if values["failed"]]
    return [_row(values) for values in lines if not values["failed"]], failed


def _row(values: Mapping[str, str]) -> Row:
    requests = [each.rsplit(" ", 1) for each in values["requests"].split("; ") if each]
    integers = ("encoder_layers", "decoder_layers", "parameters", "non_embedding_parameters", "bytes", "examples")
    numbers: dict[str, Any] = {name: int(values[name]) for name in integers}
    numbers |= {name: float(values[name]) for name in ("ratio_layers", "ratio_non_embedding", "ratio_bytes")}
    times = ("latency_ms", "latency_ms_low", "latency_ms_high", "speedup", "tokens_per_s", "peak_memory_bytes")
    numbers |= {name: _number(values[f"time_{name}"]) for name in times}
    columns = [metric + end for metric in METRICS for end in ("", "_low", "_high") if values.get(metric)]
    return Row(
        name=values["name"],
        kind=values["kind"],
        assembly=values["assembly"],
        requests=tuple((preset, float(ratio)) for preset, ratio in requests),
        scores={column: float(values[column]) for column in columns},
        percent=_number(values["percent_of_teacher"]),
        p_value=_number(values["p_value"]),
        layer_flops=_number(values["layer_flops"]),
        note=values.get("note", ""),  # older runs have none
        **numbers,
    )


def _number(text: str) -> float | None:
    return float(text) if text else None


def by_language(scores: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, dict[str, float]]]:
    """{language: {system: {metric: score}}}."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for system, score in scores.items():
        for language, quality in score["quality"].get("languages", {}).items():
            found.setdefault(language, {})[system] = {name: quality[name] for name in METRICS if name in quality}
    return found


def weight_hashes(run: RunDir) -> list[tuple[str, str]]:
    """(file, sha256) of every checkpoint that the assemble stage has published."""
    stamp = read_json(run.stage("assemble") / "stage.json") or {}
    files = stamp.get("outputs", {})
    return [(name, entry["sha256"]) for name, entry in files.items() if name.endswith(".safetensors")]


def table_lines(rows: Sequence[Row]) -> list[Line]:
    """The teacher, then each preset's assemblies by ratio, then those asked for by name, then what was fine-tuned."""
    dropped = {row.assembly: row for row in rows if row.kind == "dropped"}
    lines = [Line("teacher", None, row, None) for row in rows if row.kind == "teacher"]
    for preset in (*PRESETS, SEARCHED):
        asked = [(ratio, row) for row in rows for each, ratio in row.requests if each == preset]
        lines += [
            Line(preset, ratio, row, dropped.get(row.assembly))
            for ratio, row in sorted(asked, key=lambda each: each[0])
        ]
    for group, rows_of_group in series(rows).items():
        if group not in ("teacher", "dropped", *PRESETS, SEARCHED):
            for row in rows_of_group[::-1]:
                beside = dropped.get(row.assembly) if row.kind in CHOICES else None
                lines.append(Line(group, None, row, beside))
    return lines


def series(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Systems by how they are drawn; an assembly that several presets ask for is in the series of each."""
    found: dict[str, list[Row]] = {name: [] for name in SERIES}
    for row in rows:
        presets = {preset for preset, _ in row.requests} & {*PRESETS, SEARCHED}
        if row.kind == "assembly":
            for name in presets or {"named"}:
                found[name].append(row)
        else:
            found[row.kind if row.kind in SERIES else "peer"].append(row)
    return {name: sorted(each, key=lambda row: row.non_embedding_parameters) for name, each in found.items() if each}


def size_of(rows: Sequence[Row]) -> tuple[str, Callable[[Row], float]]:
    """(name, quantity) by which systems are drawn as large or small: that by which an engine's model is smaller than
    its checkpoint, where there is one."""
    if any(row.kind == "engine" for row in rows):
        return "MB of weights", lambda row: row.bytes / 1e6
    return "non-embedding parameters", lambda row: row.non_embedding_parameters


def frontier(rows: Sequence[Row], quantity: Callable[[Row], float | None]) -> list[Row]:
    """Teacher and assemblies that no other of them beats in BLEU at the same quantity or less, smallest first."""
    measured = [(quantity(row), row) for row in rows if row.kind in ("teacher", *CHOICES)]
    best: list[Row] = []
    for _, row in sorted(((q, row) for q, row in measured if q is not None), key=lambda each: (each[0], -each[1].bleu)):
        if not best or row.bleu > best[-1].bleu:
            best.append(row)
    return best


def headlines(rows: Sequence[Row]) -> list[tuple[int, Row | None]]:
    """For each share of the teacher's BLEU, the smallest assembly that keeps it, by non-embedding parameters."""
    assemblies = sorted(
        (row for row in rows if row.kind in CHOICES and row.percent is not None),
        key=lambda row: (row.non_embedding_parameters, -row.bleu),
    )
    return [
        (keep, next((row for row in assemblies if row.percent is not None and row.percent >= keep), None))
        for keep in KEEP_PERCENTS
    ]


def notable(rows: Sequence[Row]) -> list[Row]:
    """Assemblies worth reading: those of the headlines and the coarsest, each once, larger first."""
    found = {row.name: row for _, row in headlines(rows) if row is not None}
    assemblies = [row for row in rows if row.kind in CHOICES]
    if assemblies:
        coarsest = min(assemblies, key=lambda row: row.non_embedding_parameters)
        found[coarsest.name] = coarsest
    return sorted(found.values(), key=lambda row: -row.non_embedding_parameters)


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Objects of a JSON-lines file; none when there is no such file. An unfinished last line is left out."""
    if not path.is_file():
        return []
    # not splitlines(): a text may hold other line separators than the one that ends a record
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def differing(outputs: Mapping[str, list[dict[str, Any]]], teacher: str) -> list[Differing]:
    """The examples where the other systems' words differ most from the teacher's, in the mean over the systems."""
    words = {name: [record["output"].split() for record in records] for name, records in outputs.items()}
    others = [name for name in outputs if name != teacher]

    def difference(i: int) -> float:
        mine = words[teacher][i]
        return sum(1 - _match(mine, words[name][i]).ratio() for name in others if words[name][i] != mine)

    ranked = sorted(((difference(i), -i) for i in range(len(words[teacher]))), reverse=True)
    found = []
    for amount, negative in ranked[:NUM_DIFFERING]:
        if amount > 0:
            i = -negative
            record = outputs[teacher][i]
            pieces = [(name, _pieces(words[teacher][i], words[name][i])) for name in (teacher, *others)]
            found.append(Differing(record["source"], record["reference"], pieces))
    return found


def _match(left: list[str], right: list[str]) -> difflib.SequenceMatcher[str]:
    return difflib.SequenceMatcher(None, left, right, autojunk=False)


def _pieces(mine: list[str], other: list[str]) -> list[tuple[str, bool]]:
    """The other's words in runs, each with whether it departs from mine; words that are missing show as a dash."""
    pieces = []
    for tag, _, _, first, last in _match(mine, other).get_opcodes():
        pieces.append((" ".join(other[first:last]) or "\u2013", tag != "equal"))
    return pieces


def validation_losses(path: Path) -> dict[str, list[tuple[int, float]]]:
    """(step, loss) by assembly, from the validation records of a training run."""
    losses: dict[str, list[tuple[int, float]]] = {}
    for record in read_jsonl(path):
        for name, value in record.items():
            if name.startswith("validation/"):
                losses.setdefault(name.removeprefix("validation/"), []).append((record["step"], float(value)))
    return losses


def provenance(recipe: Recipe, run: RunDir, teacher_score: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What one needs to know to get the same numbers again, as (what, value)."""
    quality, key = teacher_score["quality"], teacher_score["key"]
    manifest = run.data / "manifest.json"
    plan_hash = (read_json(manifest) or {}).get("plan_hash")
    library, test = run.library / "library.json", ", ".join(recipe.evaluate.test) or "test.jsonl"
    entries = [
        ("Recipe", recipe.name),
        ("Seed", f"{recipe.seed} (training), {recipe.data.seed} (built-in corpus)"),
        ("Data plan", plan_hash or (f"sha256 {sha256_of(manifest)} of manifest.json" if manifest.is_file() else "")),
        ("Module library", f"sha256 {sha256_of(library)} of library.json" if library.is_file() else ""),
        ("Test", f"{quality['num_examples']} examples, {test}, sha256 {key['test']}"),
        *((METRICS.get(name, "ROUGE"), signature) for name, signature in quality["signatures"].items()),
        ("Decoding", ", ".join(f"{name} {value}" for name, value in key["decoding"].items())),
        ("Computed on", teacher_score["device"]),
        ("Versions", ", ".join(f"{name} {version}" for name, version in teacher_score["versions"].items())),
        ("The same again", f"python -m pipeline run --config {run.recipe}"),
        ("Only this page", f"python -m pipeline report --config {run.recipe}"),
    ]
    return [(what, value) for what, value in entries if value]


def count_text(count: float) -> str:
    """A number of parameters for people: 830 K, 12.3 M, 1.20 B."""
    for limit, unit in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if count >= limit:
            return f"{count / limit:.3g} {unit}"
    return f"{count:g}"
