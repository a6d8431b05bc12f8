"""Decoding as units of work, (group, slice), that any number of workers share and any kill only pauses.

A group is systems that are decoded together: all assemblies of the run are one, every other folder is one by itself. A
slice is one batch of test examples of like length. Workers agree on a plan by creating its file exclusively; a unit's
result is published whole under the unit's own name, so it counts once, whoever made it and however often.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from pipeline.assemble import System
from pipeline.decoding import (
    Member,
    Outputs,
    Pool,
    Rules,
    batches_of,
    decode_together,
    generate,
    load,
    load_pool,
    losses_of,
    rules_of,
)
from pipeline.engines import Translator
from pipeline.evaluation.subject import VIEWS, Subject
from pipeline.families import FAMILIES
from pipeline.rundir import create_once, digest_of, publish_sealed, read_json, read_sealed
from pipeline.spans import STACKS, Assembly
from pipeline.tokenizer import Wording, forced_bos_ids, language_ids, load_tokenizer, with_languages
from pipeline.world import is_out_of_memory, release_memory

TOGETHER = "assemblies"
"""The group of the systems that are paths through teacher and library."""
OUT_OF_MEMORY = "out of memory"


@dataclass(frozen=True)
class DecodingPlan:
    """Which systems are decoded, in which groups and slices."""

    folder: Path
    """Where the units' results go."""
    groups: dict[str, list[str]]
    """Names of systems by group."""
    slices: list[list[int]]
    """Places of examples."""

    @property
    def systems(self) -> list[str]:
        return [name for names in self.groups.values() for name in names]

    @property
    def units(self) -> list[tuple[str, int]]:
        return [(group, i) for group in self.groups for i in range(len(self.slices))]

    def path(self, group: str, index: int) -> Path:
        return self.folder / f"{group}.{index:05d}.json"


def agree_on_plan(subject: Subject, missing: Sequence[System]) -> DecodingPlan:
    """The newest plan for today's inputs that holds all systems whose scores are missing; made where there is none."""
    inputs = {system.name: subject.key(system) for system in subject.systems}
    key = digest_of([inputs, subject.recipe.evaluate.tokens_per_batch])[:12]
    number = 0
    while True:
        path = subject.folder / "units" / f"plan-{key}.{number}.json"
        content = read_json(path)
        if content is None:
            create_once(path, _new_plan(subject, missing))
            continue
        plan = DecodingPlan(path.with_suffix(""), content["groups"], content["slices"])
        if {system.name for system in missing} <= set(plan.systems):
            return plan
        number += 1


def _new_plan(subject: Subject, missing: Sequence[System]) -> dict[str, Any]:
    groups: dict[str, list[str]] = {}
    for system in missing:
        groups.setdefault(TOGETHER if system.kind in VIEWS else system.name, []).append(system.name)
    lengths = [len(ids) for ids in tokenize(load_tokenizer(subject.run.teacher_model), subject, "source")]
    return {"groups": groups, "slices": batches_of(lengths, subject.recipe.evaluate.tokens_per_batch)}


def tokenize(tokenizer: Any, subject: Subject, side: str, system: System | None = None) -> list[list[int]]:
    """Ids of all sources, or of all (first) references, for a system (None: the teacher)."""
    longest_source, longest_target, _ = subject.longest(system or subject.teacher)
    ids = language_ids(tokenizer)
    if side == "source":
        texts = {"text": [each["source"] for each in subject.examples]}
        languages, longest = [each.get("source_language", "") for each in subject.examples], longest_source
    else:
        texts = {"text" if ids else "text_target": [each[0] for each in subject.references.texts]}
        languages, longest = list(subject.references.languages), longest_target
    return with_languages(tokenizer(**texts, truncation=True, max_length=longest).input_ids, ids, languages)


class Workshop:
    """Decodes units; holds one group's weights at a time."""

    def __init__(self, subject: Subject, device: torch.device) -> None:
        self.subject, self.device = subject, device
        self._group = ""
        self._decode: Callable[..., dict[str, Any]] | None = None

    def do(self, plan: DecodingPlan, unit: tuple[str, int], beat: Callable[[], None]) -> None:
        """Decode one unit and publish its result."""
        started_at = time.perf_counter()
        group, index = unit
        names, places = plan.groups[group], plan.slices[index]
        if self._group != group:
            self._decode, self._group = None, ""  # let go of the other group's weights first
            gc.collect()
            self._decode, self._group = self._decoder_of(group), group
        assert self._decode is not None
        record: dict[str, Any] = {"places": places, "outputs": {}, "losses": {}, "num_tokens": {}, "failed": {}}
        for name in names:
            record["failed"][name] = OUT_OF_MEMORY
        try:
            decoded = self._decode(names, places, beat)
        except Exception as error:
            if not self._may_fail(group):
                raise
            decoded, record["failed"][group] = {}, reason_of(error)
        for name, each in decoded.items():
            del record["failed"][name]
            record["outputs"][name], record["losses"][name], record["num_tokens"][name] = each
        record["seconds"] = time.perf_counter() - started_at
        publish_sealed(plan.path(group, index), record)

    def _may_fail(self, group: str) -> bool:
        """Whether what goes wrong is this one system's affair, and no reason to score none."""
        return group != TOGETHER and self.subject.system(group).kind in ("peer", "engine")

    def _decoder_of(self, group: str) -> Callable[..., dict[str, Any]]:
        try:
            return self._load(group)
        except Exception as error:
            if is_out_of_memory(error):
                return lambda names, places, beat: {}
            if not self._may_fail(group):
                raise
            reason = reason_of(error)

            def fail(names: list[str], places: list[int], beat: Callable[[], None]) -> dict[str, Any]:
                raise ValueError(reason)

            return fail

    def _load(self, group: str) -> Callable[..., dict[str, Any]]:
        run, subject, dtype = self.subject.run, self.subject, self.subject.recipe.evaluate.dtype
        if group == TOGETHER:
            # the plan that names this group carries the hashes: both files were held against the manifest for it
            return _Views(subject, subject.teacher, load_pool(run.teacher_model, self.device, run.library, dtype))
        system = subject.system(group)
        folder = subject.folder_of(system)
        if system.kind == "engine":
            engine = Translator(folder, self.device)
            return _Plain(subject, system, engine.generate, engine.losses_of, load_tokenizer(folder), self.device)
        config = read_json(folder / "config.json") or {}
        if config.get("model_type") in FAMILIES:
            pool = load_pool(folder, self.device, dtype=dtype)
            try:
                return _Views(subject, system, pool)
            except ValueError:  # its generation config asks for more than Rules carry
                del pool
        model, tokenizer = load(folder, self.device, dtype)
        search, losses = partial(generate, model), partial(losses_of, model)
        return _Plain(subject, system, search, losses, tokenizer, self.device)


class _Views:
    """Decodes systems that are paths through one pool."""

    def __init__(self, subject: Subject, system: System, pool: Pool) -> None:
        self.rules = rules_of(pool.model, subject.longest(system)[2], subject.recipe.evaluate.num_beams)
        self.subject, self.system, self.pool = subject, system, pool

    @cached_property
    def sources(self) -> list[list[int]]:
        return tokenize(self.pool.tokenizer, self.subject, "source", self.system)

    @cached_property
    def references(self) -> list[list[int]]:
        return tokenize(self.pool.tokenizer, self.subject, "target", self.system)

    @cached_property
    def wording(self) -> Wording:
        return Wording(self.pool.tokenizer, self.subject.reference_texts)

    def __call__(self, names: list[str], places: list[int], beat: Callable[[], None]) -> dict[str, Any]:
        members = [self._member(name) for name in names]
        sources, references = ([side[i] for i in places] for side in (self.sources, self.references))
        forced = forced_bos_ids(self.pool.tokenizer, references)
        found = decode_in_memory(self.pool, members, sources, references, self.rules, beat, forced)
        counts = [len(self.references[i]) for i in places]
        return {
            name: (
                self.wording(each.tokens),
                list(zip(each.losses, counts, strict=True)),
                sum(map(len, each.tokens)),
            )
            for name, each in found.items()
        }

    def _check_fits(self, system: System) -> None:
        assembly = Assembly.parse(system.assembly)
        for stack in STACKS:
            tiling, layers = assembly.tiling(stack), self.pool.layers[stack]
            num_layers = sum(span.num_layers == 1 for span in layers)
            if tiling.num_teacher_layers != num_layers or any(span not in layers for span in tiling.spans):
                raise ValueError(
                    f"system {system.name} does not fit: the {stack} has {num_layers} layers and modular layers for "
                    f"{', '.join(str(span) for span in layers if span.num_layers > 1)}: run stage assemble again"
                )

    def _member(self, name: str) -> Member:
        system = self.subject.system(name)
        if system.kind in VIEWS:
            self._check_fits(system)
            return self.subject.member(system)
        encoder, decoder = (tuple(self.pool.layers[stack]) for stack in STACKS)
        return Member(name, encoder, decoder)


def decode_in_memory(
    pool: Pool,
    members: Sequence[Member],
    sources: Sequence[Sequence[int]],
    references: Sequence[Sequence[int]] | None,
    rules: Rules,
    beat: Callable[[], None],
    forced_bos_ids: Sequence[int] | None = None,
) -> dict[str, Outputs]:
    """decode_together of all members that fit into memory, if need be one by one and in smaller batches."""
    try:
        return decode_together(pool, members, sources, references, rules, beat=beat, forced_bos_ids=forced_bos_ids)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
    release_memory(pool.device)
    if len(members) > 1:
        alone = [
            decode_in_memory(pool, [member], sources, references, rules, beat, forced_bos_ids) for member in members
        ]
        return {name: outputs for each in alone for name, outputs in each.items()}
    if len(sources) == 1:
        return {}
    (member,), half = members, len(sources) // 2
    halves = [
        decode_in_memory(
            pool,
            members,
            sources[part],
            references and references[part],
            rules,
            beat,
            forced_bos_ids and forced_bos_ids[part],
        ).get(member.name)
        for part in (slice(half), slice(half, None))
    ]
    if None in halves:
        return {}
    tokens, losses = ([x for each in halves if each for x in getattr(each, side)] for side in ("tokens", "losses"))
    return {member.name: Outputs(tokens, losses)}


class _Plain:
    """Decodes one folder with transformers' own generate or with its engine.

    Args:
        search: as `generate` of decoding, for this folder.
        losses: as `losses_of` of decoding, for this folder.
    """

    def __init__(
        self, subject: Subject, system: System, search: Callable[..., list[list[int]]],
        losses: Callable[..., list[float]], tokenizer: Any, device: torch.device,
    ) -> None:  # fmt: skip
        self.search, self.losses, self.device = search, losses, device
        self.num_beams = subject.recipe.evaluate.num_beams
        self.max_new_tokens = subject.longest(system)[2]
        self.sources, self.references = (tokenize(tokenizer, subject, side, system) for side in ("source", "target"))
        self.forced_bos_ids = forced_bos_ids(tokenizer, self.references)
        self.wording = Wording(tokenizer, subject.reference_texts)

    def __call__(self, names: list[str], places: list[int], beat: Callable[[], None]) -> dict[str, Any]:
        sources, references = ([ids[i] for i in places] for ids in (self.sources, self.references))
        forced = self.forced_bos_ids and [self.forced_bos_ids[i] for i in places]
        size = len(places)
        while size:
            parts = [slice(first, first + size) for first in range(0, len(places), size)]
            try:
                tokens, losses = [], []
                for part in parts:
                    tokens += self.search(sources[part], self.max_new_tokens, self.num_beams, forced and forced[part])
                    losses += self.losses(sources[part], references[part])
                    beat()
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                release_memory(self.device)
                size //= 2
                continue
            counts = [len(ids) for ids in references]
            return {names[0]: (self.wording(tokens), list(zip(losses, counts, strict=True)), sum(map(len, tokens)))}
        return {}


def reason_of(error: Exception) -> str:
    """What went wrong, in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


def read_unit(plan: DecodingPlan, group: str, index: int) -> dict[str, Any] | None:
    """The published result of a unit when it is whole, else None."""
    return read_sealed(plan.path(group, index))


def merge(plan: DecodingPlan, system: str, num_examples: int) -> tuple[list[str], list[tuple[float, int]], int] | str:
    """(outputs, losses, output tokens) of one system over all slices, each example once; or why it failed."""
    group = next(group for group, names in plan.groups.items() if system in names)
    outputs: list[str | None] = [None] * num_examples
    losses: list[tuple[float, int]] = [(0.0, 0)] * num_examples
    num_tokens = 0
    for index in range(len(plan.slices)):
        record = read_unit(plan, group, index)
        assert record is not None
        if system in record["failed"]:
            return record["failed"][system]
        num_tokens += record["num_tokens"][system]
        for place, output, loss in zip(
            record["places"], record["outputs"][system], record["losses"][system], strict=True
        ):
            assert outputs[place] is None, "an example is in one slice"
            outputs[place], losses[place] = output, (loss[0], loss[1])
    assert None not in outputs
    return [output or "" for output in outputs], losses, num_tokens
