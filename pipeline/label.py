"""Targets of the teacher's own for the training sources (pseudo-labels), as one more source of a mixture of data.

Sequence-level distillation (Kim and Rush 2016): the teacher decodes every training source with beams, and what passes
the rule becomes RUN/labels/train.jsonl.gz, a file like any other: {"id", "source", "target", "chrf"}, the prefix within
the source, with "source_language" and "language" where texts begin with the token of one. The rule leaves out an output
that is empty, that did not end within data.max_target_tokens, or whose chrF with the reference is below a bound; and a
source that does not come back from its ids, as with unknown characters.

Workers need only the run directory, as in the evaluation: units of UNIT_EXAMPLES examples are claimed through files and
published whole, so any number of workers share them and any kill only pauses.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import shutil
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm
from transformers.utils.logging import disable_progress_bar

from data_prep.publish import publish_bytes, sha256_of
from data_prep.reader import Examples, SplitReader
from data_prep.shards import read_manifest
from pipeline.config import Recipe
from pipeline.decoding import Member, Pool, Rules, batches_of, load_pool, rules_of
from pipeline.evaluation import decode_in_memory, folder_hashes
from pipeline.rundir import RunDir, digest_of, publish_sealed, read_sealed, work_off
from pipeline.scoring import chrf
from pipeline.spans import STACKS
from pipeline.tokenizer import Wording, forced_bos_ids, language_ids, with_languages
from pipeline.world import World

UNIT_EXAMPLES = 1024
TEACHER = "teacher"
LABELS, SUMMARY = "train.jsonl.gz", "labels.json"


@dataclass(frozen=True)
class Rule:
    """How the teacher decodes, and what of it is kept."""

    num_beams: int = 4
    min_chrf: float = 40.0

    def __post_init__(self) -> None:
        if self.num_beams < 1:
            raise ValueError(f"--num_beams is {self.num_beams}: choose at least 1")
        if not 0 <= self.min_chrf <= 100:
            raise ValueError(f"--min_chrf is {self.min_chrf}: choose a value from 0 to 100")


def label(recipe: Recipe, run: RunDir, rule: Rule, world: World) -> None:
    """Make RUN/labels; worker 0 returns when all is done, the others when nothing is left to claim.

    Raises:
        FileNotFoundError: the data or the teacher is not there yet.
        ValueError: no set of pairs to label, damaged data, or an output kept nowhere.
    """
    started_at = time.time()
    if not (run.teacher_model / "config.json").is_file():
        raise FileNotFoundError(f"{run.teacher_model} is missing: run stage teacher first")
    work = _Labelling(recipe, run, rule, world)
    if work.is_finished():
        print(f"label: up to date: {work.folder / LABELS}")
        return
    with tqdm(total=len(work.units), desc="label", unit="unit", disable=None if world.is_main else True) as bar:
        work_off(
            work.folder / "claims",
            work.units,
            name=lambda unit: f"{work.key[:12]}.{unit:06d}",
            is_done=lambda unit: read_sealed(work.path(unit)) is not None,
            do=work.do,
            wait=world.is_main,
            progress=bar.update,
        )
    if world.is_main:
        summary = work.publish()
        kept, dropped = summary["kept"], ", ".join(f"{n} {reason}" for reason, n in summary["dropped"].items())
        print(
            f"label: {kept} targets kept ({dropped or 'none left out'}), {time.time() - started_at:.1f} s -> {LABELS}"
        )


class _Labelling:
    """The examples to label, in units, and what decodes them."""

    def __init__(self, recipe: Recipe, run: RunDir, rule: Rule, world: World) -> None:
        self._recipe, self._run, self._rule, self._device = recipe, run, rule, world.device
        self.folder = run.root / "labels"
        manifest = read_manifest(run.data)
        self._reader = SplitReader(run.data, manifest, "train")
        self._places = self._places_of_pairs()
        self.units = list(range(-(-len(self._places) // UNIT_EXAMPLES)))
        self._made_from = {
            "teacher": folder_hashes(run.teacher_model),
            "data": manifest.plan_hash,
            "rule": asdict(rule),
            "max_new_tokens": recipe.data.max_target_tokens,
        }
        self.key = digest_of(self._made_from)

    def _places_of_pairs(self) -> np.ndarray:
        sets = zip(self._recipe.data.all_sets, self._reader.blocks_of_sets, strict=True)
        blocks = [block for each, numbers in sets if each.task == "pairs" for block in numbers.tolist()]
        if not blocks:
            raise ValueError(f"{self._run.data} has no pairs: the rule compares with references (data.task: pairs)")
        return np.concatenate([np.arange(*self._reader.starts[block : block + 2]) for block in blocks])

    def path(self, unit: int) -> Path:
        """Where the result of a unit is."""
        return self.folder / f"units-{self.key[:12]}" / f"{unit:06d}.json"

    def is_finished(self) -> bool:
        summary, labels = read_sealed(self.folder / SUMMARY), self.folder / LABELS
        if summary is None or digest_of(summary["made_from"]) != self.key:
            return False
        return labels.is_file() and sha256_of(labels) == summary["sha256"]

    @cached_property
    def _pool(self) -> Pool:
        disable_progress_bar()
        pool = load_pool(self._run.teacher_model, self._device)
        pool.model.generation_config.forced_eos_token_id = None  # BART's would give a cut output an end
        return pool

    @cached_property
    def _wording(self) -> Wording:
        return Wording(self._pool.tokenizer)

    @cached_property
    def _rules(self) -> Rules:
        return rules_of(self._pool.model, self._recipe.data.max_target_tokens, self._rule.num_beams)

    def do(self, unit: int, beat: Callable[[], None]) -> None:
        """Decode one unit, filter and publish it."""
        places = self._places[unit * UNIT_EXAMPLES : (unit + 1) * UNIT_EXAMPLES]
        sources, references = _ids(self._reader.read(places))  # references are for the rule alone
        member = Member(TEACHER, *(tuple(self._pool.layers[stack]) for stack in STACKS))
        all_forced = forced_bos_ids(self._pool.tokenizer, references)
        outputs: list[list[int] | None] = [None] * len(places)
        for batch in batches_of([len(ids) for ids in sources], self._recipe.evaluate.tokens_per_batch):
            source, forced = [sources[i] for i in batch], all_forced and [all_forced[i] for i in batch]
            found = decode_in_memory(self._pool, [member], source, None, self._rules, beat, forced).get(TEACHER)
            for position, tokens in zip(batch, found.tokens if found else [], strict=False):
                outputs[position] = tokens
            beat()
        publish_sealed(self.path(unit), self._filtered(places.tolist(), sources, references, outputs))

    def _filtered(
        self,
        places: list[int],
        sources: Sequence[list[int]],
        references: Sequence[list[int]],
        outputs: Sequence[list[int] | None],
    ) -> dict[str, Any]:
        """What is kept of a unit as rows of the file, and how much is left out for which reason."""
        tokenizer, eos_ids = self._pool.tokenizer, self._rules.eos_ids
        source_texts, texts, reference_texts = map(
            self._wording, (sources, [tokens or [] for tokens in outputs], references)
        )
        ids = language_ids(tokenizer)
        language_of = {number: language for language, number in ids.items()}
        languages = [[language_of.get(row[0], "") for row in side] for side in (sources, references)]
        again = with_languages(tokenizer(source_texts).input_ids, ids, languages[0])
        rows, dropped = [], Counter[str]()
        for i, (place, tokens) in enumerate(zip(places, outputs, strict=True)):
            score = chrf(texts[i], reference_texts[i])
            if tokens is None:
                dropped["out of memory"] += 1
            elif again[i] != sources[i]:
                dropped["source does not come back"] += 1
            elif not texts[i].strip():
                dropped["empty"] += 1
            elif tokens[-1] not in eos_ids:
                dropped["cut"] += 1
            elif score < self._rule.min_chrf:
                dropped["below chrF"] += 1
            else:
                row = {"id": f"{TEACHER}/{place}", "source": source_texts[i], "target": texts[i]}
                named = zip(("source_language", "language"), languages, strict=True)
                row |= {name: side[i] for name, side in named if side[i]}
                rows.append({**row, "chrf": round(score, 2)})
        return {"rows": rows, "dropped": dict(dropped)}

    def publish(self) -> dict[str, Any]:
        """Put the units together: the file, then the summary, which says that it is whole."""
        buffer, kept, dropped = io.BytesIO(), 0, Counter[str]()
        with gzip.GzipFile(fileobj=buffer, mode="wb", filename="", mtime=0) as file:
            for unit in self.units:
                record = read_sealed(self.path(unit))
                assert record is not None
                file.writelines((json.dumps(row, ensure_ascii=False) + "\n").encode() for row in record["rows"])
                kept += len(record["rows"])
                dropped.update(record["dropped"])
        if not kept:
            reasons = ", ".join(f"{count} {reason}" for reason, count in dropped.most_common())
            fix = "lower --min_chrf" if dropped["below chrF"] else "look at the teacher and its tokenizer"
            raise ValueError(f"no output of the teacher passes the rule ({reasons}): {fix}")
        payload = buffer.getvalue()
        publish_bytes(self.folder / LABELS, payload)
        summary = {"kept": kept, "dropped": dict(sorted(dropped.items())), "made_from": self._made_from}
        summary["sha256"] = hashlib.sha256(payload).hexdigest()
        publish_sealed(self.folder / SUMMARY, summary)
        for leftover in [*self.folder.glob("units-*"), self.folder / "claims"]:
            shutil.rmtree(leftover, ignore_errors=True)
        return summary


def _ids(examples: Examples) -> tuple[Sequence[list[int]], Sequence[list[int]]]:
    """Ids of sources and targets, end-of-sequence included."""
    sides = ((examples.source_ids, examples.source_offsets), (examples.target_ids, examples.target_offsets))
    sources, targets = ([ids.tolist() for ids in np.split(each, offsets[1:-1])] for each, offsets in sides)
    return sources, targets
