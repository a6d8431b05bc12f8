"""python -m pipeline compare A B: differences of two systems or two runs, with significance, and what changed.

A and B are each a system of --run, or RUN:SYSTEM, or two run directories, whose systems of the same name are compared.
"""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from pipeline.report.data import Row, read_jsonl, read_rows
from pipeline.rundir import RunDir, read_json
from pipeline.scoring import METRICS, References, p_values


@dataclass(frozen=True)
class Scored:
    """One system of one run: its row and its outputs."""

    row: Row
    records: list[dict[str, Any]]
    test_sha256: str
    bleu_tokenizer: str = "13a"

    @property
    def outputs(self) -> list[str]:
        return [record["output"] for record in self.records]

    @property
    def references(self) -> References:
        texts = [each.get("references") or [each["reference"]] for each in self.records]
        return References(texts, [], self.bleu_tokenizer)


def compare_command(arguments: Sequence[str]) -> None:
    """Parse the command line and print the comparison.

    Raises:
        ValueError: a system that is not there, or two that were not scored on the same examples.
        FileNotFoundError: a run has not been evaluated.
    """
    parser = argparse.ArgumentParser(prog="python -m pipeline compare", description=__doc__)
    parser.add_argument("a", metavar="A", help="a system, RUN:SYSTEM, or a run directory")
    parser.add_argument("b", metavar="B", help="what to compare it with, of the same kind")
    parser.add_argument("--run", type=Path, default=Path("runs/demo"), help="run of plain names (default: runs/demo)")
    parser.add_argument("--examples", type=int, default=5, help="how many changed outputs to show (default: 5)")
    parser.add_argument("--verbose", action="store_true", help="show the traceback of an error")
    options = parser.parse_args(arguments)
    console = Console(width=None if Console().is_terminal else 160, highlight=False)
    if all(RunDir(Path(text)).scores.is_file() for text in (options.a, options.b)):
        compare_runs(Path(options.a), Path(options.b), console)
        return
    a, b = (_system(text, options.run) for text in (options.a, options.b))
    compare_systems(a, b, options.examples, console)


def _system(text: str, default: Path) -> Scored:
    folder, _, name = text.rpartition(":")
    return scored(RunDir(Path(folder) if folder else default), name)


def scored(run: RunDir, name: str) -> Scored:
    """A system of a run that has been evaluated.

    Raises:
        FileNotFoundError: the run has not been.
        ValueError: it has no such system.
    """
    rows = systems_of(run)
    if name == "teacher":
        name = next((each for each, row in rows.items() if row.kind == "teacher"), name)
    if name not in rows:
        near = difflib.get_close_matches(name, rows, n=3)
        raise ValueError(f"{run.root} has no system {name}: " + (f"did you mean {', '.join(near)}?" if near else
                         f"it has {', '.join(rows)}"))  # fmt: skip
    folder = run.stage("evaluate")
    score = read_json(folder / "scores" / f"{name}.json") or {"key": {"test": ""}}
    tokenizer = score.get("quality", {}).get("bleu_tokenizer", "13a")  # older runs had no other
    return Scored(rows[name], read_jsonl(folder / "outputs" / f"{name}.jsonl"), score["key"]["test"], tokenizer)


def systems_of(run: RunDir) -> dict[str, Row]:
    """What a run has scored, by name."""
    if not run.scores.is_file():
        raise FileNotFoundError(f"{run.scores} is missing: run stage evaluate first")
    return {row.name: row for row in read_rows(run.scores)[0]}


def significance(a: Scored, b: Scored) -> float:
    """p-value of the BLEU difference, by sacreBLEU's paired bootstrap.

    Raises:
        ValueError: they were not scored on the same examples.
    """
    ids = [[record["id"] for record in each.records] for each in (a, b)]
    if a.test_sha256 != b.test_sha256 or ids[0] != ids[1]:
        raise ValueError(f"{a.row.name} and {b.row.name} were not scored on the same examples: evaluate them again")
    return p_values(a.references, a.outputs, {"b": b.outputs})["b"]


def compare_systems(a: Scored, b: Scored, num_examples: int, console: Console) -> None:
    """Scores and costs side by side, then the examples that changed most."""
    p = significance(a, b)
    table = Table(title=f"A {a.row.name}, B {b.row.name}, {len(a.records)} test examples")
    for column in ("", "A", "B", "B - A"):
        table.add_column(column, justify="left" if not column else "right")
    for name, label in METRICS.items():
        if name in a.row.scores and name in b.row.scores:
            x, y = a.row.scores[name], b.row.scores[name]
            digits = 3 if name in ("loss", "metricx") else 1
            extra = f"  (p = {p:.3f})" if name == "bleu" else ""
            table.add_row(label, f"{x:.{digits}f}", f"{y:.{digits}f}", f"{y - x:+.{digits}f}{extra}")
    for label, quantity in (("MB", lambda row: row.bytes / 1e6), ("ms", lambda row: row.latency_ms)):
        x, y = quantity(a.row), quantity(b.row)
        if x and y:
            table.add_row(label, f"{x:.1f}", f"{y:.1f}", f"{y - x:+.1f}  ({x / y:.2f}x)")
    console.print(table)
    changed = changes(a, b)
    console.print(f"{len(changed)} of {len(a.records)} outputs changed; those that changed most:", markup=False)
    for i in changed[:num_examples]:
        record = a.records[i]
        for label, text in (
            ("source", record["source"]), ("reference", record["reference"]),
            ("A", record["output"]), ("B", b.records[i]["output"]),
        ):  # fmt: skip
            console.print(f"  {label:<9} {text}", markup=False, soft_wrap=True)
        console.print()


def changes(a: Scored, b: Scored) -> list[int]:
    """Places of the examples whose outputs differ, those that differ most first."""

    def likeness(i: int) -> float:
        left, right = (each.records[i]["output"].split() for each in (a, b))
        return difflib.SequenceMatcher(None, left, right, autojunk=False).ratio()

    places = [i for i in range(len(a.records)) if a.records[i]["output"] != b.records[i]["output"]]
    return sorted(places, key=lambda i: (likeness(i), i))


def compare_runs(a: Path, b: Path, console: Console) -> None:
    """BLEU of every system that both runs have."""
    rows = [systems_of(RunDir(folder)) for folder in (a, b)]
    common = [name for name in rows[0] if name in rows[1]]
    if not common:
        raise ValueError(f"{a} and {b} have no system of the same name")
    table = Table(title=f"A {a}, B {b}")
    for column in ("system", "BLEU A", "BLEU B", "B - A", "p", "changed", "ms A", "ms B"):
        table.add_column(column, justify="left" if column == "system" else "right")
    for name in common:
        x, y = (scored(RunDir(folder), name) for folder in (a, b))
        table.add_row(
            name, f"{x.row.bleu:.1f}", f"{y.row.bleu:.1f}", f"{y.row.bleu - x.row.bleu:+.1f}",
            f"{significance(x, y):.3f}", str(len(changes(x, y))),
            *("" if each.row.latency_ms is None else f"{each.row.latency_ms:.1f}" for each in (x, y)),
        )  # fmt: skip
    console.print(table)
    for folder, own, other in ((a, rows[0], rows[1]), (b, rows[1], rows[0])):
        alone = [name for name in own if name not in other]
        if alone:
            console.print(f"only in {folder}: {', '.join(alone)}", markup=False)
