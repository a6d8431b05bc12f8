"""The plan of a build: inputs with their hashes, tokenizer and units, fixed by content before any rank starts to work.

Everything here runs on one rank. Each step is published at once and skipped when it already stands for the same inputs.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from data_prep.config import DataConfig, SetConfig, identity_settings
from data_prep.corruption import segment_tokens, span_counts
from data_prep.encode import SPIECE, TOKENIZER_CONFIG, TOKENIZER_JSON, Encoder, train_sentencepiece, write_plain_t5
from data_prep.hub import data_files, local_folder, names_data
from data_prep.partition import Unit
from data_prep.publish import files_in, make_folder, publish_json, publishing_folder, remove_temporaries, sha256_of
from data_prep.served import Served
from data_prep.shards import FORMAT_VERSION
from data_prep.sources import ArrowFile, Fields, Record, open_input
from data_prep.textfile import Piece, TextFile

PLAN = "plan.json"
CORPUS, TOKENIZER = "corpus", "tokenizer"
SPLITS = ("train", "validation", "test")
_MADE_FROM = "made_from.json"
_OF_A_TOKENIZER = (".json", ".model", ".txt", ".spm")  # files that it may be made of, and no weights


@dataclass(frozen=True)
class Input:
    """One file of a set and split; `path` as the recipe names it, or relative to the output for the built-in corpus."""

    set: str
    split: str
    path: str
    bytes: int
    sha256: str
    records: int
    quotes: str = ""
    """What quotes mean in CSV and TSV: "cells" or "text"."""


@dataclass(frozen=True)
class Plan:
    """What a build will do."""

    settings: dict[str, Any]
    inputs: tuple[Input, ...]
    tokenizer: dict[str, Any]
    units: tuple[Unit, ...]
    duplicates: dict[str, list[int]]
    """Records to leave out, by unit name, as places within the unit."""
    format_version: int = FORMAT_VERSION

    @cached_property
    def hash(self) -> str:
        """Identity of the plan: the sha256 of its canonical JSON."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

    @cached_property
    def config(self) -> DataConfig:
        """The settings as they were given."""
        return config_of(self.settings)

    def set_of(self, unit: Unit) -> SetConfig:
        """The set that a unit belongs to."""
        name = self.inputs[unit.input].set
        return next(each for each in self.config.all_sets if each.name == name)

    def encoder(self, out: Path) -> Encoder:
        """The encoder of this plan."""
        return Encoder(out / TOKENIZER, self.config.max_source_tokens, self.config.max_target_tokens)


def config_of(settings: dict[str, Any]) -> DataConfig:
    """Identity settings as read from JSON, as a config again."""
    values: dict[str, Any] = {n: tuple(value) if isinstance(value, list) else value for n, value in settings.items()}
    values["sets"] = tuple(_set_of(each) for each in settings["sets"])
    return DataConfig(**values)


def _set_of(settings: dict[str, Any]) -> SetConfig:
    values: dict[str, Any] = {n: tuple(value) if isinstance(value, list) else value for n, value in settings.items()}
    return SetConfig(**values)


def unit_name(unit: Unit) -> str:
    """Name of a unit in the plan and on disk, without extension."""
    return f"{unit.split}/{unit.index:06d}"


class RecordReader:
    """Reads the records of units; one input stays open, so that neighbouring units go forward through a file."""

    def __init__(self, out: Path, plan: Plan) -> None:
        self._out, self._plan = out, plan
        self._open: tuple[int, Any] = (-1, None)

    def records(self, unit: Unit) -> Iterator[Record | None]:
        """The records of a unit in order; None for a blank line."""
        config = self._plan.set_of(unit)
        fields = _fields(config)
        if self._open[0] != unit.input:
            self._open = (unit.input, _opened(self._out, self._plan, self._plan.inputs[unit.input]))
        piece = Piece(unit.start, unit.stop, unit.offset, unit.bytes, unit.sha256)
        before = f"{config.name}/{unit.split}" if len(self._plan.config.all_sets) > 1 else unit.split
        count = 0
        for place, row in self._open[1].rows(piece):
            default_id = f"{before}/{unit.first + count}"
            record = None if row is None else fields.record(row, place, default_id)
            if record is not None and record.others and unit.split == "train":
                raise ValueError(
                    f"{place}: field {config.target_field!r} holds {1 + len(record.others)} texts; training takes one "
                    f"target a record: write a record for each"
                )
            yield record
            count += 1
        if count != unit.stop - unit.start:
            raise ValueError(f"{self._plan.inputs[unit.input].path}: changed since the plan was made")


def read_plan(out: Path) -> Plan | None:
    """The published plan, or None. ValueError if another version of this code made it."""
    path = out / PLAN
    if not path.is_file():
        return None
    raw = json.loads(path.read_text(encoding="utf-8"))
    if raw.get("format_version") != FORMAT_VERSION:
        raise ValueError(f"{path}: planned by another version of this program; choose another --out, or remove {out}")
    inputs = tuple(Input(**item) for item in raw.pop("inputs"))
    units = tuple(Unit(**item) for item in raw.pop("units"))
    return Plan(**raw, inputs=inputs, units=units)


def refuse_difference(out: Path, planned: dict[str, Any], wanted: dict[str, Any], what: str = "data settings") -> None:
    """ValueError that shows what differs between a published plan and what is wanted now."""
    names = sorted(name for name in planned.keys() | wanted.keys() if planned.get(name) != wanted.get(name))
    if names:
        shown = ", ".join(f"{name} {planned.get(name)!r} -> {wanted.get(name)!r}" for name in names)
        raise ValueError(f"{out}: begun with other {what} ({shown}); go back to those, or choose another --out")


def make_plan(out: Path, config: DataConfig, served: Served) -> Plan:
    """Corpus, tokenizer and plan.json under `out`, each made only where it is not there yet.

    Args:
        served: has transformers, which writes the tokenizer.

    Raises ValueError where `out` was begun with other settings or inputs, naming the difference.
    """
    make_folder(out)
    settings = identity_settings(config)
    published = read_plan(out)
    if published is not None:
        refuse_difference(out, published.settings, settings)
    remove_temporaries(out)
    if config.corpus == "demo":
        _make_corpus_folder(out, config)
    if published is not None:
        _refuse_changed_inputs(out, published)
        made_anew = make_tokenizer_folder(out, published, served)
        refuse_difference(out, published.tokenizer, made_anew, "tokenizer")
        return published
    plan = plan_of_inputs(out, config, settings)
    if config.drop_duplicates:
        plan = Plan(settings, plan.inputs, {}, plan.units, _find_duplicates(out, plan))
    plan = Plan(settings, plan.inputs, make_tokenizer_folder(out, plan, served), plan.units, plan.duplicates)
    _check_sentinels(out, plan)
    _check_languages(out, plan)
    publish_json(out / PLAN, asdict(plan))
    return plan


def _opened(out: Path, plan: Plan, item: Input) -> TextFile | ArrowFile:
    return open_input(_location(out, plan.config, item.path), item.path, item.split, item.quotes)


def _location(out: Path, config: DataConfig, name: str) -> Path:
    if names_data(name):
        return data_files(name)[0][1]
    return out / name if config.corpus == "demo" else Path(name.partition("#")[0])


def _fields(config: SetConfig) -> Fields:
    target = config.target_field if config.task == "pairs" else None
    return Fields(config.source_field, target, config.prefix, config.source_language, config.target_language)


def plan_of_inputs(out: Path, config: DataConfig, settings: dict[str, Any], splits: Sequence[str] = SPLITS) -> Plan:
    """Inputs and units. The first record of every file is parsed, so that a wrong field is told before any work."""
    inputs: list[Input] = []
    units: list[Unit] = []
    for split in splits:
        index = 0
        for each in config.all_sets:
            first = 0
            names = []
            for name in getattr(each, split):
                names += [found for found, _ in data_files(name)] if names_data(name) else [name]
            for name in names:
                source = open_input(_location(out, config, name), name, split, each.quotes)
                pieces = source.scan(config.examples_per_block * config.blocks_per_shard, config.max_line_bytes)
                place, row = next(
                    (place, row) for piece in pieces for place, row in source.rows(piece) if row is not None
                )
                _fields(each).record(row, place, "")
                for piece in pieces:
                    units.append(Unit(split, index, len(inputs), first=first + piece.start, **asdict(piece)))
                    index += 1
                inputs.append(Input(each.name, split, name, *source.identity(), pieces[-1].stop, source.quotes))
                first += pieces[-1].stop
    return Plan(settings, tuple(inputs), {}, tuple(units), {})


def _refuse_changed_inputs(out: Path, plan: Plan) -> None:
    """Compare the inputs with the plan: text files by size (their units carry a sha256), the others whole."""
    for item in plan.inputs:
        source = _opened(out, plan, item)
        if source.has_changed(item.bytes, item.sha256):
            raise ValueError(f"{item.path}: changed since {out} was planned; choose another --out")


def _find_duplicates(out: Path, plan: Plan) -> dict[str, list[int]]:
    seen: dict[str, set[bytes]] = {split: set() for split in SPLITS}
    found: dict[str, list[int]] = {}
    reader = RecordReader(out, plan)
    for unit in plan.units:
        for position, record in enumerate(reader.records(unit)):
            if record is None:
                continue
            languages = "".join(f"\0{each}" for each in record.languages if each)
            digest = hashlib.blake2b(f"{record.source}\0{record.target}{languages}".encode(), digest_size=16).digest()
            if digest in seen[unit.split]:
                found.setdefault(unit_name(unit), []).append(position)
            seen[unit.split].add(digest)
    return found


def _publish_folder(folder: Path, made_from: dict[str, Any], fill: Callable[[Path], None]) -> None:
    """Publish a folder made by `fill`, unless it already stands and was made from the same."""
    stamp = folder / _MADE_FROM
    if stamp.is_file() and json.loads(stamp.read_text(encoding="utf-8")) == made_from:
        return
    with publishing_folder(folder) as temporary:
        fill(temporary)
        publish_json(temporary / _MADE_FROM, made_from)


def _make_corpus_folder(out: Path, config: DataConfig) -> None:
    sizes = (config.seed, config.num_demo_pairs, config.num_validation, config.num_test)

    def fill(folder: Path) -> None:
        from data_prep.demo import make_corpus  # what it is made with takes longer to import than all the rest

        for split, pairs in make_corpus(*sizes).items():
            with (folder / f"{split}.jsonl").open("w", encoding="utf-8") as file:
                for number, pair in enumerate(pairs):
                    row = {"id": f"{split}/{number}", **asdict(pair)}
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")

    _publish_folder(out / CORPUS, {"seed_and_sizes": list(sizes)}, fill)


def make_tokenizer_folder(out: Path, plan: Plan, served: Served, anew: bool = False) -> dict[str, Any]:
    """Train the tokenizer or take the given one, unless it stands; returns what plan and manifest say of it."""
    folder = out / TOKENIZER
    if anew:
        (folder / _MADE_FROM).unlink(missing_ok=True)
    made_from, make = _given_tokenizer(plan.config) if plan.config.tokenizer else _trained_tokenizer(out, plan)

    def fill(into: Path) -> None:
        with tempfile.TemporaryDirectory() as scratch:
            source = make(Path(scratch))
            if not write_plain_t5(source, into):
                served.write(source, into)

    _publish_folder(folder, made_from, fill)
    encoder = Encoder(folder, plan.config.max_source_tokens, plan.config.max_target_tokens)
    used = TOKENIZER_JSON if encoder.info.kind == "tokenizers" else TOKENIZER_CONFIG
    files = {path.name: sha256_of(path) for path in files_in(folder, "*") if path.name != _MADE_FROM}
    return {**asdict(encoder.info), "file": f"{TOKENIZER}/{used}", "files": files}


def _given_tokenizer(config: DataConfig) -> tuple[dict[str, Any], Callable[[Path], Path]]:
    """What the tokenizer that data.tokenizer names is made from, and its folder."""
    given = local_folder(config.tokenizer, "data.tokenizer")
    names = [path.name for path in sorted(given.glob("*")) if path.is_file() and path.suffix in _OF_A_TOKENIZER]
    if not set(names) - {"config.json"}:
        raise FileNotFoundError(f"{given}: neither {SPIECE} nor {TOKENIZER_JSON} here; check data.tokenizer")
    return {"copied": {name: sha256_of(given / name) for name in names}}, lambda _: given


def _trained_tokenizer(out: Path, plan: Plan) -> tuple[dict[str, Any], Callable[[Path], Path]]:
    """What a tokenizer that is trained is made from, and what trains it in a folder."""
    config, num_sentinels = plan.config, _num_sentinels(plan.config)
    made_from = {
        "trained_on": [item.sha256 for item in plan.inputs if item.split == "train"],
        "texts": [[each.task, each.source_field, each.target_field, each.prefix] for each in config.all_sets],
        **{name: getattr(config, name) for name in ("vocab_size", "split_digits")},
        "num_sentinels": num_sentinels,
    }

    def train(scratch: Path) -> Path:
        texts = _training_texts(out, plan)
        train_sentencepiece(texts, config.vocab_size, config.split_digits, scratch / SPIECE, num_sentinels)
        return scratch

    return made_from, train


def _num_sentinels(config: DataConfig) -> int:
    """Sentinels that span corruption needs; 0 where no set asks for it."""
    if all(each.task == "pairs" for each in config.all_sets):
        return 0
    shape = (config.noise_density, config.mean_span_tokens)
    return span_counts(segment_tokens(config.max_source_tokens, *shape), *shape)[1]


def _check_sentinels(out: Path, plan: Plan) -> None:
    if count := _num_sentinels(plan.config):
        plan.encoder(out).sentinels(count)


def _check_languages(out: Path, plan: Plan) -> None:
    if plan.encoder(out).languages:
        for each in plan.config.all_sets:
            each.refuse_unsaid_languages()


def _training_texts(out: Path, plan: Plan) -> Iterator[str]:
    reader = RecordReader(out, plan)
    for unit in plan.units:
        if unit.split != "train":
            continue
        for record in reader.records(unit):
            if record is not None:
                yield record.source
                if record.target:
                    yield record.target
