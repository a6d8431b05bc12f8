"""The plan of a build: inputs with their hashes, tokenizer and units, fixed by content before any rank starts to work.

Everything here runs on one rank. Each step is published at once and skipped when it already stands for the same inputs.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_prep.config import DataConfig, identity_settings
from data_prep.demo import make_corpus
from data_prep.encode import SPIECE, TOKENIZER_FILES, TOKENIZER_JSON, Encoder, train_sentencepiece
from data_prep.partition import Unit, units_of_split
from data_prep.shards import fsync_folder, is_temporary, publish_json, sha256_of
from data_prep.sources import Fields, Record, count_lines, parse_line, read_lines

PLAN = "plan.json"
CORPUS, TOKENIZER = "corpus", "tokenizer"
SPLITS = ("train", "validation", "test")
_MADE_FROM = "made_from.json"


@dataclass(frozen=True)
class Input:
    """One file of a split; `path` as the recipe names it, or relative to the output for the built-in corpus."""

    split: str
    path: str
    bytes: int
    sha256: str
    lines: int


@dataclass(frozen=True)
class Line:
    """One line of an input, not yet parsed; `place` is file:line for messages."""

    content: bytes
    place: str
    default_id: str

    def record(self, fields: Fields) -> Record | None:
        """Parse the line; None if it is blank."""
        return parse_line(self.content, fields, self.place, self.default_id)


@dataclass(frozen=True)
class Plan:
    """What a build will do."""

    settings: dict[str, Any]
    inputs: tuple[Input, ...]
    tokenizer: dict[str, Any]

    @property
    def hash(self) -> str:
        """Identity of the plan: the sha256 of its canonical JSON."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

    @property
    def fields(self) -> Fields:
        """Where the texts are in a line."""
        return Fields(self.settings["source_field"], self.settings["target_field"])

    def units(self) -> list[Unit]:
        """All units of all splits in order."""
        records_per_unit = self.settings["examples_per_block"] * self.settings["blocks_per_shard"]
        return [
            unit
            for split in SPLITS
            for unit in units_of_split(split, sum(i.lines for i in self.inputs if i.split == split), records_per_unit)
        ]

    def lines(self, out: Path, split: str) -> Iterator[Line]:
        """All lines of a split, in the order of its inputs."""
        index = 0
        for item in self.inputs:
            if item.split != split:
                continue
            for number, content in enumerate(read_lines(_location(out, self.settings["corpus"], item.path)), start=1):
                yield Line(content, f"{item.path}:{number}", f"{split}/{index}")
                index += 1

    def encoder(self, out: Path) -> Encoder:
        """The encoder of this plan."""
        settings = self.settings
        return Encoder(out / TOKENIZER, settings["max_source_tokens"], settings["max_target_tokens"])


def read_plan(out: Path) -> Plan | None:
    """The published plan, or None."""
    path = out / PLAN
    if not path.is_file():
        return None
    raw = json.loads(path.read_text(encoding="utf-8"))
    return Plan(raw["settings"], tuple(Input(**item) for item in raw["inputs"]), raw["tokenizer"])


def refuse_difference(out: Path, planned: dict[str, Any], wanted: dict[str, Any], what: str = "data settings") -> None:
    """ValueError that shows what differs between a published plan and what is wanted now."""
    names = sorted(name for name in planned.keys() | wanted.keys() if planned.get(name) != wanted.get(name))
    if names:
        shown = ", ".join(f"{name} {planned.get(name)!r} -> {wanted.get(name)!r}" for name in names)
        raise ValueError(f"{out}: begun with other {what} ({shown}); go back to those, or choose another --out")


def make_plan(out: Path, config: DataConfig) -> Plan:
    """Corpus, tokenizer and plan.json under `out`, each made only where it is not there yet.

    Raises ValueError where `out` was begun with other settings or inputs, naming the difference.
    """
    out.mkdir(parents=True, exist_ok=True)
    settings = identity_settings(config)
    published = read_plan(out)
    if published is not None:
        refuse_difference(out, published.settings, settings)
    _remove_temporaries(out)
    if config.corpus == "demo":
        _make_corpus_folder(out, config)
    inputs = _scan_inputs(out, config)
    if published is not None:
        before, now = ({i.path: i.sha256 for i in some} for some in (published.inputs, inputs))
        refuse_difference(out, before, now, "inputs (sha256)")
    tokenizer = _make_tokenizer_folder(out, config, inputs)
    plan = Plan(settings, inputs, tokenizer)
    if published is None:
        publish_json(out / PLAN, asdict(plan))
    else:
        refuse_difference(out, published.tokenizer, tokenizer, "tokenizer")
    return plan


def _remove_temporaries(out: Path) -> None:
    for path in [path for path in out.rglob("*.tmp-*") if is_temporary(path)]:
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _location(out: Path, corpus: str, name: str) -> Path:
    return out / name if corpus == "demo" else Path(name)


def _scan_inputs(out: Path, config: DataConfig) -> tuple[Input, ...]:
    fields = Fields(config.source_field, config.target_field)
    inputs = []
    for split in SPLITS:
        names = (f"{CORPUS}/{split}.jsonl",) if config.corpus == "demo" else getattr(config, split)
        for name in names:
            path = _location(out, config.corpus, name)
            num_lines = count_lines(path)
            first = next(pair for pair in enumerate(read_lines(path), start=1) if not pair[1].isspace())
            parse_line(first[1], fields, f"{name}:{first[0]}", "")  # a wrong field fails before the tokenizer is made
            inputs.append(Input(split, name, path.stat().st_size, sha256_of(path), num_lines))
    return tuple(inputs)


def _publish_folder(folder: Path, made_from: dict[str, Any], fill: Callable[[Path], None]) -> None:
    """Publish a folder made by `fill`, unless it already stands and was made from the same."""
    stamp = folder / _MADE_FROM
    if stamp.is_file() and json.loads(stamp.read_text(encoding="utf-8")) == made_from:
        return
    temporary = folder.with_name(f"{folder.name}.tmp-{os.getpid()}")
    temporary.mkdir()
    fill(temporary)
    for path in temporary.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    publish_json(temporary / _MADE_FROM, made_from)
    if folder.exists():
        folder.rename(folder.with_name(f"{folder.name}.tmp-old-{os.getpid()}"))
    temporary.rename(folder)
    fsync_folder(folder.parent)
    _remove_temporaries(folder.parent)


def _make_corpus_folder(out: Path, config: DataConfig) -> None:
    sizes = (config.seed, config.num_demo_pairs, config.num_validation, config.num_test)

    def fill(folder: Path) -> None:
        for split, pairs in make_corpus(*sizes).items():
            with (folder / f"{split}.jsonl").open("w", encoding="utf-8") as file:
                for number, pair in enumerate(pairs):
                    row = {"id": f"{split}/{number}", **asdict(pair)}
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")

    _publish_folder(out / CORPUS, {"seed_and_sizes": list(sizes)}, fill)


def _make_tokenizer_folder(out: Path, config: DataConfig, inputs: tuple[Input, ...]) -> dict[str, Any]:
    """Train or copy the tokenizer; returns what plan and manifest say of it."""
    if config.tokenizer:
        given = Path(config.tokenizer)
        names = [name for name in TOKENIZER_FILES if (given / name).is_file()]
        if not {SPIECE, TOKENIZER_JSON} & set(names):
            raise FileNotFoundError(f"{given}: neither {SPIECE} nor {TOKENIZER_JSON} here; check data.tokenizer")
        made_from: dict[str, Any] = {"copied": {name: sha256_of(given / name) for name in names}}

        def fill(folder: Path) -> None:
            for name in names:
                shutil.copyfile(given / name, folder / name)
    else:
        made_from = {
            "trained_on": [item.sha256 for item in inputs if item.split == "train"],
            **{name: getattr(config, name) for name in ("source_field", "target_field", "prefix", "vocab_size")},
            "split_digits": config.split_digits,
        }

        def fill(folder: Path) -> None:
            train_sentencepiece(
                _training_texts(out, config, inputs), config.vocab_size, config.split_digits, folder / SPIECE
            )

    folder = out / TOKENIZER
    _publish_folder(folder, made_from, fill)
    encoder = Encoder(folder, config.max_source_tokens, config.max_target_tokens)
    used = SPIECE if encoder.info.kind == "sentencepiece" else TOKENIZER_JSON
    return {**asdict(encoder.info), "file": f"{TOKENIZER}/{used}", "sha256": sha256_of(folder / used)}


def _training_texts(out: Path, config: DataConfig, inputs: tuple[Input, ...]) -> Iterator[str]:
    plan = Plan(identity_settings(config), inputs, {})
    for line in plan.lines(out, "train"):
        record = line.record(plan.fields)
        if record is not None:
            yield config.prefix + record.source
            yield record.target
