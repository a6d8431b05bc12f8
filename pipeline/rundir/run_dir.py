"""The stages of a run, and every path inside its directory.

Data preparation keeps its own books (data_prep/build.py): its manifest stands for its output here.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from data_prep.publish import sha256_of
from pipeline.rundir.files import read_json

# stage -> (what of the recipe describes it, by prefix; stages whose outputs it reads)
STAGES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "teacher": (("teacher.",), ("data",)),
    "distill": (("distill.",), ("data", "teacher")),
    "baseline": (
        (
            "baseline.",
            "distill.granularities",
            "distill.encoder_granularities",
            "distill.decoder_granularities",
            "distill.batch.",
            "distill.losses.",
            "distill.replace_rate",
            "distill.ramp",
        ),
        ("data", "teacher"),
    ),
    "search": (
        (
            "search.",
            "assemble.ratios",
            "distill.granularities",
            "distill.encoder_granularities",
            "distill.decoder_granularities",
            "evaluate.dtype",
            "evaluate.max_new_tokens",
            "evaluate.num_beams",
        ),
        ("data", "teacher", "distill"),
    ),
    "recover": (
        ("recover.", "distill.batch.", "evaluate.max_new_tokens", "evaluate.num_beams"),
        ("data", "teacher", "distill"),
    ),
    "assemble": (("assemble.",), ("teacher", "distill", "baseline", "search")),
    "evaluate": (("evaluate.",), ("data", "assemble")),
    "report": ((), ("evaluate",)),
}


@dataclass(frozen=True)
class RunDir:
    """Paths of one run."""

    root: Path

    def stage(self, name: str) -> Path:
        assert name in STAGES
        return self.root / name

    @property
    def recipe(self) -> Path:
        return self.root / "recipe.yaml"

    @property
    def data(self) -> Path:
        return self.root / "data"

    @property
    def tokenizer(self) -> Path:
        return self.data / "tokenizer"

    @property
    def teacher_model(self) -> Path:
        return self.stage("teacher") / "model"

    @property
    def recovered_model(self) -> Path:
        return self.stage("recover") / "model"

    @property
    def library(self) -> Path:
        return self.stage("distill") / "library"

    @property
    def choices(self) -> Path:
        return self.stage("search") / "choices.json"

    @property
    def systems(self) -> Path:
        return self.stage("assemble") / "systems.json"

    @property
    def scores(self) -> Path:
        return self.stage("evaluate") / "scores.csv"

    @property
    def tensorboard(self) -> Path:
        return self.root / "tensorboard"

    def output_hash(self, stage: str) -> str | None:
        """Hash of what a stage has published, or None when it has not."""
        if stage == "data":
            manifest = self.data / "manifest.json"
            return sha256_of(manifest) if manifest.is_file() else None
        stamp = read_json(self.stage(stage) / "stage.json")
        return stamp["outputs_hash"] if stamp else None
