"""CTranslate2 on a run's assemblies, in fp32 and int8, against generate: outputs, BLEU, seconds, bytes."""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoTokenizer

from pipeline.bench import Measure, report
from pipeline.engines import Translator
from pipeline.export import Form, assemblies_of, bytes_of, export
from pipeline.ordinary import read_model
from pipeline.rundir import RunDir
from pipeline.scoring import References, bleu, p_values

FORMS = (Form("folder"), Form("ctranslate2"), Form("ctranslate2", "int8"))
BEAMS = (1, 4)
BATCH = 64


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run", type=Path, default=Path("runs/demo"), help="run with assemblies and a test part")
    parser.add_argument("--examples", type=int, default=500, help="test examples (default 500)")
    parser.add_argument("--max-new-tokens", type=int, default=80, help="of an output (default 80)")
    parser.add_argument("--write", type=Path, metavar="DIR", help="write the table to DIR as Markdown, too")


@dataclass(frozen=True)
class Outputs:
    """What one form of an assembly writes."""

    texts: list[str]
    ids: list[list[int]]
    """Without special tokens at the ends."""
    seconds: float
    """CPU time of this process, with loading."""


def main(arguments: argparse.Namespace) -> None:
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(1)
    run = RunDir(arguments.run)
    with open(run.data / "test.jsonl", encoding="utf-8") as file:
        examples = [json.loads(line) for line, _ in zip(file, range(arguments.examples), strict=False)]
    sources, targets = ([each[name] for each in examples] for name in ("source", "target"))
    assemblies = assemblies_of(run)
    with tempfile.TemporaryDirectory() as scratch:
        folders = [export(run, assemblies, form, Path(scratch)) for form in FORMS]
        rows = []
        for index, assembly in enumerate(assemblies):
            paths = [each[index][0] for each in folders]
            rows.append(_row(str(assembly), paths, sources, targets, arguments.max_new_tokens))
            print(rows[-1]["line"], flush=True)
    _report(rows, len(sources), arguments.write)


def _row(name: str, folders: Sequence[Path], sources: list[str], targets: list[str], longest: int) -> dict[str, Any]:
    """Everything measured of one assembly; folders are those of FORMS."""
    found: dict[tuple[int, int], Outputs] = {}
    for num_beams in BEAMS:
        found[0, num_beams] = generated(folders[0], sources, num_beams, longest)
        for place in (1, 2):
            found[place, num_beams] = translated(folders[place], sources, num_beams, longest)
    greedy = [found[place, 1] for place in range(3)]
    references = References([[target] for target in targets], [""] * len(targets))
    p_value = p_values(references, greedy[1].texts, {"int8": greedy[2].texts})["int8"]
    equal = [sum(a == b for a, b in zip(found[0, n].ids, found[1, n].ids, strict=True)) for n in BEAMS]
    lower = num_lower(folders[0], sources, found[1, 4], found[0, 4])
    scores = {key: bleu(outputs.texts, targets) for key, outputs in found.items()}
    sizes = [bytes_of(folder) for folder in folders]
    cells = [
        name, *map(str, (*equal, lower)), f"{scores[0, 1]:.2f}", f"{scores[1, 1]:.2f}", f"{scores[2, 1]:.2f}",
        f"{p_value:.2f}", f"{scores[0, 4]:.2f}", f"{scores[1, 4]:.2f}", *(f"{size / 1e6:.2f}" for size in sizes),
        *(f"{outputs.seconds:.2f}" for outputs in greedy),
    ]  # fmt: skip
    return {"line": f"| {' | '.join(cells)} |", "sizes": sizes, "seconds": [each.seconds for each in greedy]}


@torch.no_grad()
def generated(folder: Path, sources: Sequence[str], num_beams: int, longest: int) -> Outputs:
    """By transformers' generate, sources of similar length together."""
    started_at = time.process_time()
    (model, _), tokenizer = read_model(folder), AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(list(sources)).input_ids
    found: list[list[int]] = [[]] * len(ids)
    for places in _batches(ids):
        batch = tokenizer.pad({"input_ids": [ids[place] for place in places]}, return_tensors="pt")
        rows = model.generate(**batch, num_beams=num_beams, do_sample=False, max_new_tokens=longest)
        for place, row in zip(places, rows[:, 1:].tolist(), strict=True):
            found[place] = row[: row.index(model.config.eos_token_id)] if model.config.eos_token_id in row else row
    texts = tokenizer.batch_decode(found, skip_special_tokens=True)
    return Outputs(texts, found, time.process_time() - started_at)


@torch.no_grad()
def num_lower(folder: Path, sources: Sequence[str], ours: Outputs, theirs: Outputs) -> int:
    """Examples whose output `ours` the checkpoint finds less likely, a token, than `theirs`."""
    (model, _), tokenizer = read_model(folder), AutoTokenizer.from_pretrained(folder)

    def score(source: str, ids: list[int]) -> float:
        labels = torch.tensor([[*ids, model.config.eos_token_id]])
        return -model(**tokenizer(source, return_tensors="pt"), labels=labels).loss.item()

    pairs = zip(sources, ours.ids, theirs.ids, strict=True)
    return sum(score(text, mine) < score(text, other) - 1e-3 for text, mine, other in pairs if mine != other)


def translated(folder: Path, sources: Sequence[str], num_beams: int, longest: int) -> Outputs:
    """By CTranslate2, the same batches."""
    started_at = time.process_time()
    translator, tokenizer = Translator(folder, torch.device("cpu")), AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(list(sources)).input_ids
    found: list[list[int]] = [[]] * len(ids)
    for places in _batches(ids):
        rows = translator.generate([ids[place] for place in places], longest, num_beams)
        for place, row in zip(places, rows, strict=True):
            found[place] = row[:-1] if row[-1] == tokenizer.eos_token_id else row
    texts = tokenizer.batch_decode(found, skip_special_tokens=True)
    return Outputs(texts, found, time.process_time() - started_at)


def _batches(ids: Sequence[Sequence[int]]) -> list[list[int]]:
    """Places of BATCH texts of similar length."""
    order = sorted(range(len(ids)), key=lambda index: len(ids[index]))
    return [order[begin : begin + BATCH] for begin in range(0, len(order), BATCH)]


def _report(rows: Sequence[dict[str, Any]], num_examples: int, write_dir: Path | None) -> None:
    names = [
        "assembly", f"greedy equal of {num_examples}", "beam 4 equal", "beam 4 lower", "BLEU generate", "BLEU fp32",
        "BLEU int8",
        "p of int8 and fp32", "beam 4 BLEU generate", "beam 4 BLEU fp32", "MB folder", "MB fp32", "MB int8",
        "s generate", "s fp32", "s int8",
    ]  # fmt: skip
    table = "\n".join([f"| {' | '.join(names)} |", "|" + "---|" * len(names), *(row["line"] for row in rows)])
    seconds = [sum(row["seconds"][place] for row in rows) for place in range(3)]
    size = statistics.mean(row["sizes"][2] / row["sizes"][0] for row in rows)
    measures = [
        Measure("engines", "greedy, fp32", seconds[1], seconds[0], "generate, batches of 64", "CPU s", 0.0),
        Measure("engines", "greedy, int8", seconds[2], seconds[0], "generate, batches of 64", "CPU s", 0.0),
        Measure("engines", "bytes of int8 a byte of the folder, mean", size, 1.0, "folder in fp32", "bytes", 0.0),
    ]
    notes = (
        f"{len(rows)} assemblies x {num_examples} test examples, one thread, CPU time of the process with loading; "
        f"CTranslate2 {metadata.version('ctranslate2')}, transformers {transformers.__version__}; fp32 and int8 "
        "are CTranslate2's; beam 4 lower: outputs whose log-probability a token is below generate's by more than 1e-3"
    )
    report("engines", measures, f"{notes}\n\n{table}", write_dir)
