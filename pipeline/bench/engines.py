"""An engine on a run's assemblies, in fp32 and int8, against generate: outputs, BLEU, seconds, bytes."""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoTokenizer

from pipeline.bench import Measure, report
from pipeline.engines import ENGINES, Translator, onnx
from pipeline.export import Form, assemblies_of, bytes_of, export
from pipeline.ordinary import read_model
from pipeline.rundir import RunDir
from pipeline.scoring import References, bleu, p_values

BATCH = 64
Writer = Callable[[list[list[int]], int, int], list[list[int]]]
"""(source ids, beams, the most new tokens) -> output ids, perhaps with special tokens behind the end."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run", type=Path, default=Path("runs/demo"), help="run with assemblies and a test part")
    parser.add_argument("--to", choices=tuple(ENGINES), default="ctranslate2", help="engine (default ctranslate2)")
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
    ENGINES[arguments.to].refuse_missing(f"--to {arguments.to}")
    run = RunDir(arguments.run)
    forms = Form("folder"), Form(arguments.to), Form(arguments.to, "int8")
    with open(run.data / "test.jsonl", encoding="utf-8") as file:
        examples = [json.loads(line) for line, _ in zip(file, range(arguments.examples), strict=False)]
    sources, targets = ([each[name] for each in examples] for name in ("source", "target"))
    assemblies = assemblies_of(run)
    with tempfile.TemporaryDirectory() as scratch:
        folders = [export(run, assemblies, form, Path(scratch)) for form in forms]
        rows = []
        for assembly, *paths in zip(assemblies, *([path for path, _ in each] for each in folders), strict=True):
            rows.append(_row(str(assembly), arguments.to, paths, sources, targets, arguments.max_new_tokens))
            print(_line(rows[-1]), flush=True)
    _report(rows, arguments.to, len(sources), arguments.write)


def _row(
    name: str, to: str, folders: Sequence[Path], sources: list[str], targets: list[str], longest: int
) -> dict[str, str | int | float]:
    """Name of a column -> what was measured of one assembly; folders: an ordinary one, the engine's fp32 and int8."""
    loads = load_transformers, LOADS[to], LOADS[to]
    generated, fp32, int8 = (
        written(load, folder, sources, 1, longest) for load, folder in zip(loads, folders, strict=True)
    )
    ways = {"generate": generated, "fp32": fp32, "int8": int8}
    references = References([[target] for target in targets], [""] * len(targets))
    row: dict[str, str | int | float] = {"assembly": name, "greedy equal": num_equal(generated, fp32)}
    row |= {f"BLEU {way}": bleu(outputs.texts, targets) for way, outputs in ways.items()}
    row["p of int8 and fp32"] = p_values(references, fp32.texts, {"int8": int8.texts})["int8"]
    row |= {f"MB {way}": bytes_of(folder) / 1e6 for way, folder in zip(ways, folders, strict=True)}
    row |= {f"s {way}": outputs.seconds for way, outputs in ways.items()}
    if to == "ctranslate2":  # it has beams
        generated, fp32 = (written(loads[place], folders[place], sources, 4, longest) for place in range(2))
        row |= {"beam 4 equal": num_equal(generated, fp32)}
        row |= {"beam 4 lower": num_lower(folders[0], sources, fp32, generated)}
        row |= {"beam 4 BLEU generate": bleu(generated.texts, targets), "beam 4 BLEU fp32": bleu(fp32.texts, targets)}
    return row


def _line(row: dict[str, str | int | float]) -> str:
    cells = (f"{cell:.2f}" if isinstance(cell, float) else str(cell) for cell in row.values())
    return f"| {' | '.join(cells)} |"


def num_equal(ours: Outputs, theirs: Outputs) -> int:
    """Examples with the same output ids."""
    return sum(a == b for a, b in zip(ours.ids, theirs.ids, strict=True))


def written(
    load: Callable[[Path], Writer], folder: Path, sources: Sequence[str], num_beams: int, longest: int
) -> Outputs:
    """What a folder's model writes, sources of similar length together."""
    started_at = time.process_time()
    write, tokenizer = load(folder), AutoTokenizer.from_pretrained(folder)
    ids, end = tokenizer(list(sources)).input_ids, tokenizer.eos_token_id
    found: list[list[int]] = [[]] * len(ids)
    order = sorted(range(len(ids)), key=lambda index: len(ids[index]))
    for places in (order[begin : begin + BATCH] for begin in range(0, len(order), BATCH)):
        rows = write([ids[place] for place in places], num_beams, longest)
        for place, row in zip(places, rows, strict=True):
            found[place] = row[: row.index(end)] if end in row else row
    texts = tokenizer.batch_decode(found, skip_special_tokens=True)
    return Outputs(texts, found, time.process_time() - started_at)


def load_transformers(folder: Path) -> Writer:
    """generate of transformers."""
    (model, _), tokenizer = read_model(folder), AutoTokenizer.from_pretrained(folder)

    def write(ids: list[list[int]], num_beams: int, longest: int) -> list[list[int]]:
        batch = tokenizer.pad({"input_ids": ids}, return_tensors="pt")
        rows = model.generate(**batch, num_beams=num_beams, do_sample=False, max_new_tokens=longest)
        return rows[:, 1:].tolist()

    return write


def load_ctranslate2(folder: Path) -> Writer:
    """CTranslate2."""
    translator = Translator(folder, torch.device("cpu"))
    return lambda ids, num_beams, longest: translator.generate(ids, longest, num_beams)


def load_onnx(folder: Path) -> Writer:
    """ONNX Runtime, with the loop that is in the folder's README; greedy alone."""
    graphs, tokenizer = onnx.sessions(folder), AutoTokenizer.from_pretrained(folder)
    settings = onnx.settings_of(folder)

    def write(ids: list[list[int]], _: int, longest: int) -> list[list[int]]:
        batch = tokenizer.pad({"input_ids": ids}, return_tensors="np")
        told = settings | {"max_new_tokens": longest}
        return onnx.greedy(graphs, batch["input_ids"], batch["attention_mask"], **told)[:, 1:].tolist()

    return write


LOADS = {"ctranslate2": load_ctranslate2, "onnx": load_onnx}


@torch.no_grad()
def num_lower(folder: Path, sources: Sequence[str], ours: Outputs, theirs: Outputs) -> int:
    """Examples whose output `ours` the checkpoint finds less likely, a token, than `theirs`."""
    (model, _), tokenizer = read_model(folder), AutoTokenizer.from_pretrained(folder)

    def score(source: str, ids: list[int]) -> float:
        labels = torch.tensor([[*ids, model.config.eos_token_id]])
        return -model(**tokenizer(source, return_tensors="pt"), labels=labels).loss.item()

    pairs = zip(sources, ours.ids, theirs.ids, strict=True)
    return sum(score(text, mine) < score(text, other) - 1e-3 for text, mine, other in pairs if mine != other)


def _report(rows: Sequence[dict[str, Any]], to: str, num_examples: int, write_dir: Path | None) -> None:
    head = [f"| {' | '.join(rows[0])} |", "|" + "---|" * len(rows[0])]
    table = "\n".join([*head, *map(_line, rows)])
    seconds = {way: sum(row[f"s {way}"] for row in rows) for way in ("generate", "fp32", "int8")}
    size = statistics.mean(row["MB int8"] / row["MB generate"] for row in rows)
    measures = [
        Measure(
            "engines", f"greedy, {to} {way}", seconds[way], seconds["generate"], "generate, batches of 64", "CPU s", 0.0
        )
        for way in ("fp32", "int8")
    ]
    measures.append(
        Measure("engines", "bytes of int8 a byte of the folder, mean", size, 1.0, "folder in fp32", "bytes", 0.0)
    )
    versions = (f"{name} {metadata.version(name)}" for name in (*ENGINES[to].packages, "transformers"))
    notes = (
        f"{len(rows)} assemblies x {num_examples} test examples, one thread, CPU time of the process with loading; "
        f"{', '.join(versions)}; fp32 and int8 are the engine's; lower: outputs whose log-probability a token is below "
        "generate's by more than 1e-3"
    )
    report("engines", measures, f"{notes}\n\n{table}", write_dir)
