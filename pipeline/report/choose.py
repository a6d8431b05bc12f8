"""python -m pipeline choose: name the assembly that fits a budget, and export it.

With a budget of latency or size, the best BLEU (or --metric) within it; with only a share of the teacher's to keep, the
smallest assembly that keeps it. Where models of CTranslate2 were scored beside the checkpoints, one of them may fit
best. Scores have intervals, so what is chosen by the test part does not always come first on other texts.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from data_prep.publish import publishing_folder
from pipeline.report.data import CHOICES, Row, count_text, read_rows
from pipeline.rundir import RunDir, check_empty, read_json
from pipeline.scoring import METRICS
from pipeline.spans import Assembly

MORE_IS_BETTER = tuple(name for name in METRICS if name not in ("ter", "metricx", "loss"))
UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 2**10, "MI": 2**20, "GI": 2**30}


def choose_command(arguments: Sequence[str]) -> None:
    """Parse the command line, print the choice, export it when asked to.

    Raises:
        ValueError: no budget, nothing fits, the scores are not of this run's models, or the folder to export to is not
            empty.
        FileNotFoundError: the run has not been evaluated.
    """
    parser = argparse.ArgumentParser(prog="python -m pipeline choose", description=__doc__)
    parser.add_argument("--run", type=Path, default=Path("runs/demo"), help="evaluated run (default: runs/demo)")
    parser.add_argument("--latency-ms", type=float, help="at most so many milliseconds for one example at batch 1")
    parser.add_argument("--bytes", type=str, help="at most so many bytes of weights: 300M, 1.5G, 200Mi")
    parser.add_argument("--keep", type=float, help="at least this share of the teacher's score: 0.98")
    parser.add_argument("--metric", choices=MORE_IS_BETTER, default="bleu", help="the score to go by (default: bleu)")
    parser.add_argument("--export", type=Path, help="folder to put the checkpoint into")
    parser.add_argument("--verbose", action="store_true", help="show the traceback of an error")
    options = parser.parse_args(arguments)
    run = RunDir(options.run)
    if not run.scores.is_file():
        raise FileNotFoundError(f"{run.scores} is missing: run stage evaluate first, or give another run with --run")
    check_scores(run)
    rows, _ = read_rows(run.scores)
    num_bytes = None if options.bytes is None else bytes_of(options.bytes)
    row = choose(
        rows, latency_ms=options.latency_ms, num_bytes=num_bytes, keep=options.keep, metric=options.metric
    )  # fmt: skip
    print(describe(row, options.metric, shares_of(rows, options.metric).get(row.name)))
    if options.export is not None:
        export(run, row, options.export)
        print(f"exported to {options.export}")


def check_scores(run: RunDir) -> None:
    """Refuse scores of other models than the run makes now, as after another distillation.

    Raises:
        ValueError: a stage that the scores come from was done again after them, or is being done again.
    """
    for later, earlier in (("evaluate", "assemble"), ("assemble", "teacher"), ("assemble", "distill")):
        stamp = read_json(run.stage(later) / "stage.json")
        if stamp is None or stamp["inputs"]["identity"][f"output of {earlier}"] != run.output_hash(earlier):
            raise ValueError(
                f"{run.scores} is not of what stage {earlier} holds now: run stages assemble and evaluate again"
            )


def choose(
    rows: Sequence[Row],
    *,
    latency_ms: float | None = None,
    num_bytes: float | None = None,
    keep: float | None = None,
    metric: str = "bleu",
) -> Row:
    """The teacher or the assembly that fits, as a checkpoint or as a model of CTranslate2.

    Args:
        metric: one of MORE_IS_BETTER.

    Raises:
        ValueError: no budget is given, or nothing fits; the message names what comes nearest.
    """
    if latency_ms is None and num_bytes is None and keep is None:
        raise ValueError("give a budget: --latency-ms, --bytes or --keep")
    if keep is not None and not 0 < keep <= 1.5:
        raise ValueError(f"--keep {keep:g} is a share of the teacher's {METRICS[metric]}: write 0.98 for 98 %")
    if not all(metric in row.scores for row in rows):
        raise ValueError(f"the scores have no {METRICS[metric]}: run stage evaluate again")
    candidates = [row for row in rows if row.kind in ("teacher", "engine", *CHOICES)]
    shares = shares_of(rows, metric)
    fitting = [
        row
        for row in candidates
        if (latency_ms is None or (row.latency_ms is not None and row.latency_ms <= latency_ms))
        and (num_bytes is None or row.bytes <= num_bytes)
        and (keep is None or shares.get(row.name, 0.0) >= 100 * keep)
    ]
    if not fitting:
        near = _nearest(candidates, latency_ms, num_bytes, None if keep is None else shares)
        raise ValueError(f"no assembly of this run fits; {near}")
    if latency_ms is None and num_bytes is None:
        return min(fitting, key=lambda row: (row.bytes, -row.scores[metric]))
    return max(fitting, key=lambda row: (row.scores[metric], -row.bytes))


def shares_of(rows: Sequence[Row], metric: str) -> dict[str, float]:
    """By system, how much of the teacher's score it has, in %; nothing where the teacher has none."""
    teacher = next((row.scores[metric] for row in rows if row.kind == "teacher"), 0.0)
    # rounded, so that the teacher has 100 and not 99.99999999999999
    return {row.name: round(100 * row.scores[metric] / teacher, 4) for row in rows} if teacher else {}


def _nearest(
    rows: Sequence[Row], latency_ms: float | None, num_bytes: float | None, shares: Mapping[str, float] | None
) -> str:
    """What each budget comes up against."""
    parts = []
    if latency_ms is not None:
        timed = [row for row in rows if row.latency_ms is not None]
        fastest = min(timed, key=lambda row: row.latency_ms or 0.0, default=None)
        text = (
            "no latency was measured"
            if fastest is None
            else f"the fastest is {fastest.name} with {fastest.latency_ms:.1f} ms"
        )
        parts.append(text)
    if num_bytes is not None:
        smallest = min(rows, key=lambda row: row.bytes)
        parts.append(f"the smallest is {smallest.name} with {smallest.bytes} bytes")
    if shares is not None:
        best = max((row.name for row in rows), key=lambda name: shares.get(name, 0.0))
        parts.append(f"{best} keeps most, {shares[best]:.1f} %" if shares else "the teacher has no score to keep")
    return ", ".join(parts)


def bytes_of(text: str) -> float:
    """300M -> 3e8; K, M, G are powers of 1000, Ki, Mi, Gi of 1024, with or without a B behind."""
    match = re.fullmatch(r"(\d+\.?\d*|\.\d+)\s*([KMG]?I?)B?", text.strip().upper())
    if not match or match[2] not in UNITS:
        raise ValueError(f"{text!r} is not a size: write 300M, 1.5G or 200Mi")
    return float(match[1]) * UNITS[match[2]]


def describe(row: Row, metric: str, share: float | None) -> str:
    """A line for people on a system, its score with the 95 % interval."""
    score, low, high = (row.scores[metric + end] for end in ("", "_low", "_high"))
    of_teacher = f", {share:.1f} % of the teacher's" if share is not None else ""
    speed = f", {row.latency_ms:.1f} ms" if row.latency_ms is not None else ""
    faster = f" ({row.speedup:.2f}x faster)" if row.speedup is not None else ""
    return (
        f"{row.name}: {score:.1f} {METRICS[metric]} ({low:.1f} to {high:.1f}{of_teacher}), "
        f"{row.layers} layers ({row.ratio_layers:.2f}x fewer), {count_text(row.parameters)} parameters, "
        f"{row.bytes / 1e6:.1f} MB{speed}{faster}"
    )


def export(run: RunDir, row: Row, folder: Path) -> None:
    """Put a system into a folder: its checkpoint, from the teacher and the library, or its model of CTranslate2.

    Raises:
        ValueError: the folder is not empty.
    """
    from pipeline.assemble import (  # late: only an export needs torch
        ENGINE_PREFIX,
        Parts,
        scores_of,
        write_checkpoint,
        write_converted,
    )

    check_empty(folder, "--export")
    parts, assembly = Parts.of(run), Assembly.parse(row.assembly)
    scores = scores_of(run, row.name, parts.hashes)
    if row.kind != "engine":
        write_checkpoint(parts, assembly, folder, scores=scores)
        return
    checkpoint = run.stage("assemble") / "models" / row.assembly
    quantization = row.name.removeprefix(ENGINE_PREFIX).partition("-")[0]
    with publishing_folder(folder) as temporary:
        write_converted(parts, assembly, checkpoint, temporary, "ctranslate2", quantization, scores)
