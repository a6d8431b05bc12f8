"""What a study found: a table for each budget, its figures as JSON, and a picture.

Shapes: E test examples, K statistics of an example that BLEU is made of, R resamples.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from pipeline.report import scored
from pipeline.study.cells import Cell
from pipeline.study.lines import EQUAL, FULL, LEAST_BLEU, RECOVERED, AtBothCosts, Estimate, Line
from pipeline.study.picture import picture_of
from pipeline.study.variants import figures_of, text_of, variants_of

NUM_RESAMPLES = 1000
SEED = 12345


@dataclass(frozen=True)
class Entry:
    """One modular run and its rivals, all scored on the same examples."""

    budget: int
    modular: Cell
    teacher: str
    """Its system."""
    assemblies: Mapping[float, str]
    """Systems of the modular run, by ratio."""
    rivals: Mapping[str, Mapping[float, Cell]]
    """By EQUAL, FULL or RECOVERED, and ratio."""

    def rival_system(self, side: str, ratio: float) -> str:
        """Further training that made nothing better leaves the checkpoint as it was."""
        has_model = self.rivals[side][ratio].model is not None
        return f"{side}-{ratio:g}x" if has_model else self.assemblies[ratio]


def write_results(name: str, entries: Sequence[Entry], variants: Mapping[int, Sequence[Cell]], out: Path) -> str:
    """Write OUT/study.md, study.json and, where sizes were scored, study.png; the text of the first.

    Args:
        variants: by budget modular runs, those as they are first.
    """
    budgets = list(dict.fromkeys(entry.budget for entry in entries))
    tables = {budget: _lines([each for each in entries if each.budget == budget]) for budget in budgets}
    seeds = {budget: [each.modular.recipe.seed for each in entries if each.budget == budget] for budget in budgets}
    changed = {budget: variants_of(cells) for budget, cells in variants.items()}
    text = "\n".join(
        [
            f"# {name}: one run against a run for every size",
            *map(_text, tables, seeds.values(), tables.values()),
            *map(text_of, changed, changed.values()),
        ]
    )
    sizes = [
        {"budget": budget, "seeds": seeds[budget], **asdict(line), "break_even": line.break_even}
        for budget, lines in tables.items() for line in lines
    ]  # fmt: skip
    found = [figures for budget, of in changed.items() for figures in figures_of(budget, of)]
    (out / "study.md").write_text(text, encoding="utf-8")
    (out / "study.json").write_text(json.dumps({"sizes": sizes, "variants": found}, indent=1), encoding="utf-8")
    if tables:
        (out / "study.png").write_bytes(picture_of(tables))
    return text


def _lines(entries: Sequence[Entry]) -> list[Line]:
    """Of one budget, whose entries differ by their seeds."""
    pool = _Pool(entries)
    lines = []
    for ratio in entries[0].assemblies:
        teacher_R, modular_R = (
            pool.bleu([e.teacher for e in entries]),
            pool.bleu([e.assemblies[ratio] for e in entries]),
        )
        rivals, both = {}, None
        for side in (EQUAL, FULL, RECOVERED):
            having = [entry for entry in entries if ratio in entry.rivals[side]]
            if having:
                alike = pool if having == list(entries) else _Pool(having)
                rival_R = alike.bleu([entry.rival_system(side, ratio) for entry in having])
                own_R = alike.bleu([entry.assemblies[ratio] for entry in having])
                methods = "/".join(dict.fromkeys(entry.rivals[side][ratio].method or side for entry in having))
                rivals[side] = (methods, float(rival_R[0]), Estimate.of(float(own_R[0] - rival_R[0]), own_R - rival_R))
                if side == FULL:
                    equal_R = alike.bleu([entry.rival_system(EQUAL, ratio) for entry in having])
                    both = AtBothCosts(*(float(each_R[0]) for each_R in (own_R, equal_R, rival_R)))
        kept_R = 100 * modular_R / np.maximum(teacher_R, LEAST_BLEU)
        first = entries[0]
        flops = {side: of[ratio].flops for side, of in first.rivals.items() if ratio in of}
        lines.append(
            Line(
                ratio, float(teacher_R[0]), float(modular_R[0]), Estimate.of(float(kept_R[0]), kept_R[1:]), rivals,
                {"modular": first.modular.flops, **flops}, both,
            )
        )  # fmt: skip
    return lines


class _Pool:
    """BLEU of systems over the seeds of some entries: one corpus of all outputs, of which examples are resampled."""

    def __init__(self, entries: Sequence[Entry]) -> None:
        self._entries = entries
        first = scored(entries[0].modular.run, entries[0].teacher)
        self._ids = [record["id"] for record in first.records]
        self._metric = first.references.corpus_metrics["bleu"]
        picks_RE = np.random.default_rng(SEED).integers(0, len(self._ids), (NUM_RESAMPLES, len(self._ids)))
        self._weights_RE = np.stack([np.bincount(picks_E, minlength=len(self._ids)) for picks_E in picks_RE])

    def bleu(self, systems: Sequence[str]) -> np.ndarray:
        """BLEU [1 + R] of one system of each entry together: of all examples, then of each resample.

        Raises:
            ValueError: they were not scored on the same examples.
        """
        found = [scored(entry.modular.run, name) for entry, name in zip(self._entries, systems, strict=True)]
        if any([record["id"] for record in each.records] != self._ids for each in found):
            raise ValueError(f"{', '.join(systems)} were not scored on the same examples: evaluate them again")
        stats_EK = np.sum([self._metric._extract_corpus_statistics(each.outputs, None) for each in found], axis=0)
        sums_RK = np.concatenate([stats_EK.sum(0, keepdims=True), self._weights_RE @ stats_EK])
        return np.array([self._metric._compute_score_from_stats(list(sums_K)).score for sums_K in sums_RK])


def _text(budget: int, seeds: Sequence[int], lines: Sequence[Line]) -> str:
    """One budget as Markdown."""
    modular = lines[0].flops["modular"]
    equal = sum(line.flops[EQUAL] for line in lines)
    head = ["ratio", "teacher", "modular", "% kept", "rival, equal cost", "modular - rival", "rival, full cost",
            "modular - rival", "trained further", "modular - that", "break-even"]  # fmt: skip
    rows = [head, [":--"] + ["--:"] * (len(head) - 1)]
    for line in lines:
        row = [f"{line.ratio:g}", f"{line.teacher:.2f}", f"{line.modular:.2f}", line.kept.text(1)]
        for side in (EQUAL, FULL, RECOVERED):
            method, bleu, more = line.rivals.get(side, ("", 0.0, None))
            row += [f"{bleu:.2f} ({method})" if more else "", more.text(2) if more else ""]
        rows.append([*row, line.break_even])
    table = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    of_first = "Rivals at full cost have the first seed alone, and so has what is held against them. "
    has_full = any(FULL in line.rivals for line in lines)
    return (
        f"\n## {budget:,} steps, seeds {', '.join(map(str, seeds))}\n\nThe modular run costs {modular:.3g} FLOPs for "
        f"all ratios, the rivals of equal cost {equal:.3g} together. BLEU with paired 95 % intervals, seeds pooled. "
        f"{of_first if has_full and len(seeds) > 1 else ''}Break-even: from how many sizes on the modular run is "
        f"cheaper than as good a rival for each.\n\n{table}\n"
    )
