"""What an evaluation is of: systems, test examples, settings; and the key that a result must carry to count."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import transformers

from data_prep.publish import sha256_of
from pipeline.assemble import System
from pipeline.config import Recipe
from pipeline.decoding import Member
from pipeline.library import check_library
from pipeline.rundir import RunDir, digest_of, read_json
from pipeline.scoring import References
from pipeline.spans import Assembly, Span, kept_layers
from pipeline.weights import shapes_of

VIEWS = ("teacher", "assembly", "dropped")  # kinds that are paths through teacher and library
LAYER_KEYS = (("num_layers", "encoder_layers"), ("num_decoder_layers", "decoder_layers"))
TOKENIZER_FILES = ("tokenizer", "spiece", "sentencepiece", "vocab")  # what their names begin with
VOCABULARY = ("shared.weight", "embed_tokens.weight", "lm_head.weight")


@dataclass(frozen=True)
class Subject:
    """What is scored, on what, how."""

    recipe: Recipe
    run: RunDir
    systems: list[System]
    examples: list[dict[str, Any]]
    test_sha256: str

    @staticmethod
    def load(recipe: Recipe, run: RunDir) -> Subject:
        """Read systems.json, the folders of peers and the test part.

        Raises:
            FileNotFoundError: a stage before this one has not published, or a peer's folder is missing.
            ValueError: an empty test part, an example without a reference, two systems of one name, an assembly that
                does not parse.
        """
        test, manifest = run.data / "test.jsonl", run.data / "manifest.json"
        for path, stage in ((manifest, "data"), (test, "data"), (run.systems, "assemble")):
            if not path.is_file():
                raise FileNotFoundError(f"{path} is missing: run stage {stage} first")
        systems = [System(**each) for each in (read_json(run.systems) or {})["systems"]]
        systems += [peer(text) for text in recipe.evaluate.folders]
        _check_systems(systems, run)
        with open(test, encoding="utf-8") as file:
            lines = [line for line, _ in zip(file, range(recipe.evaluate.max_examples), strict=False)]
        examples = [_example(line, f"line {place} of {test}") for place, line in enumerate(lines, start=1)]
        if not examples:
            raise ValueError(f"no test examples in {test}: give a test part (data.test) and evaluate.max_examples >= 1")
        return Subject(recipe, run, systems, examples, sha256_of(test))

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
        return References(texts, [each.get("language", "") for each in self.examples])

    def result_paths(self, system: System) -> tuple[Path, Path]:
        """(outputs, score) of a system; the score is published last."""
        return self.folder / "outputs" / f"{system.name}.jsonl", self.folder / "scores" / f"{system.name}.json"

    def folder_of(self, system: System) -> Path:
        return self.run.root / system.folder

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
        return check_library(self.run.teacher_model, self.run.library)

    def key(self, system: System) -> dict[str, Any]:
        """All that a quality result depends on; a result with another key is not this system's."""
        settings = self.recipe.evaluate
        decoding: dict[str, Any] = {
            "num_beams": settings.num_beams,
            "max_new_tokens": settings.max_new_tokens,
            "max_source_tokens": self.recipe.data.max_source_tokens,
            "max_target_tokens": self.recipe.data.max_target_tokens,
            "num_examples": len(self.examples),
        }
        if settings.dtype != "checkpoint":  # what it was before it could be chosen
            decoding["dtype"] = settings.dtype
        if system.kind in VIEWS:
            member = self.member(system)
            has_modular = any(span.num_layers > 1 for span in (*member.encoder, *member.decoder))
            weights = {"kind": system.kind, "assembly": system.assembly, "teacher": self._weights["teacher_sha256"]}
            weights |= {"modular": self._weights["modular_sha256"]} if has_modular else {}
        else:
            weights = {"folder": digest_of(folder_hashes(self.folder_of(system)))}
        return {"weights": weights, "test": self.test_sha256, "decoding": decoding}


def _check_systems(systems: list[System], run: RunDir) -> None:
    twice = [name for name, count in Counter(system.name for system in systems).items() if count > 1]
    if twice:
        raise ValueError(f"two systems are called {twice[0]}: give a peer another name (evaluate.folders: NAME=FOLDER)")
    if sum(system.kind == "teacher" for system in systems) != 1:
        raise ValueError(f"{run.systems} must hold exactly one teacher: run stage assemble again")
    for system in systems:
        if system.kind in VIEWS:
            Assembly.parse(system.assembly)


def _example(line: str, where: str) -> dict[str, Any]:
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


@cache
def folder_hashes(folder: Path) -> dict[str, str]:
    """sha256 of each file of a checkpoint folder, by name; read once in a process.

    Raises:
        FileNotFoundError: it is no checkpoint folder.
        ValueError: its weights are damaged.
    """
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} is not a checkpoint (no config.json): run stage assemble again")
    for weights in folder.glob("*.safetensors"):
        shapes_of(weights)  # refuses what is cut off
    return {path.name: sha256_of(path) for path in sorted(folder.iterdir()) if path.is_file()}


def peer(text: str) -> System:
    """A Hugging Face folder, given as FOLDER or NAME=FOLDER, as a system of the table.

    Raises:
        FileNotFoundError: it is no checkpoint folder with safetensors and a tokenizer.
        ValueError: the name cannot be one of a file.
    """
    name, _, path = text.rpartition("=")
    folder = Path(path).resolve()
    weights = sorted(folder.glob("*.safetensors"))
    if not (folder / "config.json").is_file() or not weights:
        raise FileNotFoundError(f"{folder} is not a Hugging Face folder: it needs config.json and *.safetensors")
    if not any(path.name.startswith(TOKENIZER_FILES) for path in folder.iterdir()):
        raise FileNotFoundError(f"{folder} has no tokenizer: save one beside the model (tokenizer.save_pretrained)")
    if not re.fullmatch(r"\w[\w.+-]*", name := name or folder.name):
        raise ValueError(f"evaluate.folders calls a system {name!r}: use letters, digits, and . _ + - behind the first")
    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    encoder, decoder = (next((getattr(config, k) for k in keys if hasattr(config, k)), 0) for keys in LAYER_KEYS)
    counts = {tensor: math.prod(shape) for file in weights for tensor, shape in shapes_of(file).items()}
    total, embeddings = sum(counts.values()), sum(n for tensor, n in counts.items() if tensor.endswith(VOCABULARY))
    return System(
        name=name,
        kind="peer",
        folder=str(folder),
        assembly="",
        requests=(),
        num_encoder_layers=encoder,
        num_decoder_layers=decoder,
        ratio_layers=0.0,
        num_parameters=total,
        num_non_embedding_parameters=total - embeddings,
        bytes=sum(file.stat().st_size for file in weights),
    )
