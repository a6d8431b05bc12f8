"""What an evaluation is of: systems, test examples, settings; and the key that a result must carry to count."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from data_prep.publish import files_in, sha256_of
from pipeline.assemble import System
from pipeline.config import Recipe
from pipeline.decoding import Member
from pipeline.evaluation.metricx import check_metricx
from pipeline.evaluation.peers import most_positions, read_peers
from pipeline.library import check_library
from pipeline.pretrained import config_of
from pipeline.rundir import RunDir, digest_of, read_json, shared_hashes
from pipeline.scoring import References
from pipeline.spans import Assembly, Span, kept_layers
from pipeline.weights import shapes_of

VIEWS = ("teacher", "assembly", "dropped")  # kinds that are paths through teacher and library


@dataclass(frozen=True)
class Subject:
    """What is scored, on what, how."""

    recipe: Recipe
    run: RunDir
    systems: list[System]
    examples: list[dict[str, Any]]
    test_sha256: str
    refused: tuple[str, ...] = ()
    """Why folders of evaluate.folders are not among the systems."""
    num_of_part: int = 0
    """Examples of the test part, from which those that are scored are taken evenly."""

    @staticmethod
    def load(recipe: Recipe, run: RunDir) -> Subject:
        """Read systems.json, the folders of peers and the test part. Peers that cannot be scored stand in `refused`.

        Raises:
            FileNotFoundError: a stage before this one has not published.
            ValueError: an empty test part, an example without a reference, an assembly that does not parse.
        """
        test, manifest = run.data / "test.jsonl", run.data / "manifest.json"
        for path, stage in ((manifest, "data"), (test, "data"), (run.systems, "assemble")):
            if not path.is_file():
                raise FileNotFoundError(f"{path} is missing: run stage {stage} first")
        systems = [System(**each) for each in (read_json(run.systems) or {})["systems"]]
        _check_systems(systems, run)
        if recipe.evaluate.metricx:
            check_metricx(Path(recipe.evaluate.metricx))
        peers, refused = read_peers(recipe.evaluate.folders)
        if others := recipe.evaluate.test:
            from data_prep.testpart import lines_of_other_test_part  # late: what reads and encodes texts takes a while

            name, content = ", ".join(others), lines_of_other_test_part(run.data, recipe.data, others)
        else:
            name, content = str(test), test.read_bytes()
        found = [_example(line, f"line {place} of {name}") for place, line in enumerate(io.BytesIO(content), start=1)]
        if recipe.evaluate.same_source == "references":
            found = _by_source(found)
        if not found:
            raise ValueError(f"no test examples in {name}: give a test part (data.test)")
        count = min(len(found), recipe.evaluate.max_examples)
        examples = [found[i * len(found) // count] for i in range(count)]
        sha256 = hashlib.sha256(content).hexdigest()
        return Subject(recipe, run, [*systems, *peers], examples, sha256, tuple(refused), len(found))

    @property
    def folder(self) -> Path:
        return self.run.stage("evaluate")

    @property
    def teacher(self) -> System:
        return next(system for system in self.systems if system.kind == "teacher")

    def system(self, name: str) -> System:
        return next(system for system in self.systems if system.name == name)

    @cached_property
    def references(self) -> References:
        texts = [each.get("references") or [each["target"]] for each in self.examples]
        languages = [each.get("language", "") for each in self.examples]
        return References(texts, languages, self.recipe.evaluate.bleu_tokenizer)

    @property
    def reference_texts(self) -> Iterator[str]:
        return itertools.chain.from_iterable(self.references.texts)

    def result_paths(self, system: System) -> tuple[Path, Path]:
        """(outputs, score) of a system; the score is published last."""
        return self.folder / "outputs" / f"{system.name}.jsonl", self.folder / "scores" / f"{system.name}.json"

    def folder_of(self, system: System) -> Path:
        return self.run.root / system.folder

    def longest(self, system: System) -> tuple[int, int, int]:
        """Tokens of the longest (source, reference, output) of a system: the recipe's, or as many as a peer has
        positions for."""
        data, settings = self.recipe.data, self.recipe.evaluate
        source, target = None, None
        if system.kind == "peer":
            source, target = most_positions(config_of(self.folder_of(system)))
        return (
            min(data.max_source_tokens, source or data.max_source_tokens),
            min(data.max_target_tokens, target or data.max_target_tokens),
            min(settings.max_new_tokens, target or settings.max_new_tokens),
        )

    def note(self, system: System) -> str:
        """What must be known beside the scores of a system: texts that it cannot take whole."""
        data, settings = self.recipe.data, self.recipe.evaluate
        wanted = (data.max_source_tokens, data.max_target_tokens, settings.max_new_tokens)
        named = zip(("sources", "references", "outputs"), self.longest(system), wanted, strict=True)
        cut = [f"{name} to {longest}" for name, longest, asked in named if longest < asked]
        return f"cuts {', '.join(cut)} tokens, for which it has positions" if cut else ""

    def member(self, system: System) -> Member:
        """The paths of a view."""
        assembly = Assembly.parse(system.assembly)
        paths = []
        for tiling in (assembly.encoder, assembly.decoder):
            kept = system.kind == "dropped"
            paths.append(tuple(Span(i, i) for i in kept_layers(tiling)) if kept else tiling.spans)
        return Member(system.name, *paths)

    @cached_property
    def _weights(self) -> dict[str, str]:
        return check_library(self.run.teacher_model, self.run.library, self._hashes)

    @cached_property
    def _other_files(self) -> str:
        """Of the teacher, which its assemblies have, too: how outputs are generated, and the tokenizer."""
        hashes = folder_hashes(self.run.teacher_model, self.folder / "hashes")
        return digest_of({name: each for name, each in hashes.items() if not name.endswith(".safetensors")})

    def _hashes(self, files: Sequence[Path]) -> dict[Path, str]:
        return shared_hashes(files, self.folder / "hashes")

    def key(self, system: System) -> dict[str, Any]:
        """All that a quality result depends on; a result with another key is not this system's."""
        settings = self.recipe.evaluate
        decoding: dict[str, Any] = {
            "num_beams": settings.num_beams,
            "max_new_tokens": settings.max_new_tokens,
            "max_source_tokens": self.recipe.data.max_source_tokens,
            "max_target_tokens": self.recipe.data.max_target_tokens,
            "num_examples": len(self.examples),
            "same_source": settings.same_source,
            "special_tokens": "kept where references hold them",
        }
        if len(self.examples) < self.num_of_part:
            decoding["examples"] = f"taken evenly from {self.num_of_part}"
        if settings.dtype != "checkpoint":  # what it was before it could be chosen
            decoding["dtype"] = settings.dtype
        if system.kind in VIEWS:
            member = self.member(system)
            has_modular = any(span.num_layers > 1 for span in (*member.encoder, *member.decoder))
            weights = {"kind": system.kind, "assembly": system.assembly, "teacher": self._weights["teacher_sha256"]}
            weights["teacher's other files"] = self._other_files
            weights |= {"modular": self._weights["modular_sha256"]} if has_modular else {}
        else:
            weights = {"folder": digest_of(folder_hashes(self.folder_of(system), self.folder / "hashes"))}
        scoring = dict(self.references.how)
        if settings.metricx:
            scoring["metricx"] = digest_of(folder_hashes(Path(settings.metricx), self.folder / "hashes"))
        return {"weights": weights, "test": self.test_sha256, "decoding": decoding, "scoring": scoring}


def _check_systems(systems: list[System], run: RunDir) -> None:
    twice = [name for name, count in Counter(system.name for system in systems).items() if count > 1]
    if twice:
        raise ValueError(f"two systems of {run.systems} are called {twice[0]}: run stage assemble again")
    if sum(system.kind == "teacher" for system in systems) != 1:
        raise ValueError(f"{run.systems} must hold exactly one teacher: run stage assemble again")
    for system in systems:
        if system.kind in VIEWS:
            Assembly.parse(system.assembly)


def _example(line: bytes, where: str) -> dict[str, Any]:
    """The test example of a line of JSON."""
    try:
        example = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where} is no JSON ({error}): run stage data again") from None
    if not isinstance(example, dict) or not all(isinstance(example.get(key), str) for key in ("id", "source")):
        raise ValueError(f'{where} is no example: it must be an object with the texts "id" and "source"')
    texts = example.get("references") or [example.get("target")]
    if not isinstance(texts, list) or not all(isinstance(text, str) and text.strip() for text in texts):
        raise ValueError(
            f'{where} ({example["id"]}) has no reference: give a "target", or "references" as a list of texts'
        )
    return example


def _by_source(examples: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """One example for each source (and language), with the references of all that have it."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for each in examples:
        texts = each.get("references") or [each["target"]]
        first = found.setdefault((each["source"], each.get("language", "")), {**each, "references": []})
        first["references"] += [text for text in texts if text not in first["references"]]
    return list(found.values())


@cache
def folder_hashes(folder: Path, shared: Path | None = None) -> dict[str, str]:
    """sha256 of each file of a checkpoint folder, by name; read once in a process.

    Args:
        shared: where workers that need the same hashes find each other's; None reads all files here.

    Raises:
        FileNotFoundError: it is no checkpoint folder.
        ValueError: its weights are damaged.
    """
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} is not a checkpoint (no config.json): run stage assemble again")
    for weights in folder.glob("*.safetensors"):
        shapes_of(weights)  # refuses what is cut off
    files = files_in(folder, "*")
    hashes = shared_hashes(files, shared) if shared else {path: sha256_of(path) for path in files}
    return {path.name: hashes[path] for path in files}
