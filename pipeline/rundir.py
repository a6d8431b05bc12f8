"""Every path inside a run directory, and the stamps by which the stages after data preparation skip themselves.

Data preparation keeps its own books (data_prep/build.py): its manifest stands for its output here.

A stage that starts writes its inputs to <stage>/inputs.json; a stage that is done publishes <stage>/stage.json last:
its inputs again, and the size and sha256 of every output. A stage is done when its stamp carries the inputs that the
recipe and the stages before it now give.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.hub import local_folder
from data_prep.publish import fsync_folder, make_folder, publish_bytes, sha256_of
from pipeline.config import SEARCHED, Recipe, fields_of_kind

FORMAT_VERSION = 1

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


def write_atomic(path: Path, content: str | bytes) -> None:
    """Publish a file, and the folder that it lies in."""
    make_folder(path.parent)
    publish_bytes(path, content.encode() if isinstance(content, str) else content)


def publish_folder(temporary: Path, final: Path) -> None:
    """Make a finished folder visible under its final name, all at once; an older one of that name goes first."""
    for path in sorted(temporary.rglob("*")):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
    if final.exists():
        shutil.rmtree(final)
    temporary.rename(final)
    fsync_folder(final.parent)


def check_empty(folder: Path, option: str) -> None:
    """Refuse to publish over what a user may want to keep.

    Raises:
        ValueError: something is there already; the message names the option that says where to.
    """
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise ValueError(f"{folder} is not empty: choose another folder for {option}")


class StageConflict(ValueError):
    """The recipe no longer fits a stage that is half done."""


@dataclass(frozen=True)
class Stage:
    """One stage of one run, with the inputs that its output must have been made from."""

    run: RunDir
    name: str
    identity: dict[str, Any]
    schedule: dict[str, Any]

    @staticmethod
    def of(recipe: Recipe, run: RunDir, name: str) -> Stage:
        """The stage as the recipe describes it now; stages before it must be done.

        Raises:
            FileNotFoundError: a stage before this one has not published its output.
        """
        prefixes, upstream = STAGES[name]
        upstream = tuple(other for other in upstream if other != "search" or SEARCHED in recipe.assemble.presets)
        identity, schedule = (
            {field: value for field, value in fields_of_kind(recipe, kind).items() if field.startswith(prefixes)}
            for kind in ("identity", "schedule")
        )
        identity |= {"format": FORMAT_VERSION, "seed": recipe.seed}
        if name == "teacher" and recipe.teacher.folder:
            identity["teacher files"] = _files_of(local_folder(recipe.teacher.folder))
        for other in upstream:
            output_hash = run.output_hash(other)
            if output_hash is None:
                raise FileNotFoundError(f"stage {name} needs the output of stage {other}: run that first")
            identity[f"output of {other}"] = output_hash
        return Stage(run, name, identity, schedule)

    @property
    def folder(self) -> Path:
        return self.run.root / self.name

    @property
    def inputs(self) -> dict[str, Any]:
        return json.loads(json.dumps({"identity": self.identity, "schedule": self.schedule}))

    def stamp(self) -> dict[str, Any] | None:
        """The published stamp when it was made from these inputs and its outputs are all there, else None."""
        stamp = read_json(self.folder / "stage.json")
        if stamp is None or stamp["inputs"] != self.inputs:
            return None
        for name, entry in stamp["outputs"].items():
            path = self.folder / name
            if not path.is_file() or path.stat().st_size != entry["bytes"]:
                return None
        return stamp

    def check(self, *, extend: bool = False) -> None:
        """Refuse what cannot go on from where the stage's folder stands.

        Raises:
            StageConflict: a half-finished stage was begun with other inputs; the difference is in the message.
        """
        begun = self._begun()
        changed = difference(begun["identity"], self.inputs["identity"])
        rescheduled = difference(begun["schedule"], self.inputs["schedule"])
        if changed and not (self.folder / "stage.json").exists():
            raise StageConflict(
                f"stage {self.name} in {self.folder} is half finished with other settings ({changed}): set them "
                f"back, choose another run_dir, or remove that folder to start it again"
            )
        if rescheduled and not changed and not extend:
            raise StageConflict(
                f"stage {self.name} in {self.folder} was begun with another schedule ({rescheduled}): set it back, "
                f"or give --extend to continue with the new one"
            )

    def begin(self, *, extend: bool = False) -> None:
        """Make the folder ready for work: keep what was begun with the same inputs, set a finished other one aside.

        Raises:
            StageConflict: as `check` says.
        """
        self.check(extend=extend)
        if self._begun()["identity"] != self.inputs["identity"]:
            self._set_aside()
        (self.folder / "stage.json").unlink(missing_ok=True)
        write_atomic(self.folder / "inputs.json", json.dumps(self.inputs, indent=1))

    def _begun(self) -> dict[str, Any]:
        """The inputs that the stage's folder was begun with; a new folder has been begun with today's."""
        return read_json(self.folder / "inputs.json") or self.inputs

    def _set_aside(self) -> None:
        """Move a finished output that another recipe made out of the way."""
        digest = hashlib.sha256((self.folder / "inputs.json").read_bytes()).hexdigest()[:8]
        aside = self.folder.with_name(f"{self.name}~{digest}")
        if aside.exists():
            shutil.rmtree(aside)
        self.folder.rename(aside)

    def publish(self, outputs: Iterable[Path], *, started_s: float, extra: dict[str, Any] | None = None) -> None:
        """Stamp the stage as done. `outputs` are files or folders below the stage's folder."""
        files: dict[str, dict[str, Any]] = {}
        for output in outputs:
            for path in sorted(output.rglob("*")) if output.is_dir() else [output]:
                if path.is_file():
                    name = str(path.relative_to(self.folder))
                    files[name] = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
        stamp = {
            "stage": self.name,
            "inputs": self.inputs,
            "outputs": files,
            # of the inputs too: what a stage only refers to, as a list of models does, is not among its files
            "outputs_hash": hashlib.sha256(json.dumps([self.inputs, files], sort_keys=True).encode()).hexdigest(),
            "seconds": round(time.time() - started_s, 1),
            **(extra or {}),
        }
        write_atomic(self.folder / "stage.json", json.dumps(stamp, indent=1))


def read_json(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file, or None when there is no such file.

    Raises:
        ValueError: it is no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): copy it again, or run the stage that wrote it again") from None


def _files_of(folder: Path) -> dict[str, Any]:
    """What tells a model folder from another of the same name without reading gigabytes: sizes, small files' hashes.

    Raises:
        ValueError: no such folder.
    """
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} is not a Hugging Face model folder: it has no config.json")
    files = sorted(path for path in folder.iterdir() if path.is_file())
    return {path.name: sha256_of(path) if path.stat().st_size < 2**20 else path.stat().st_size for path in files}


def difference(old: dict[str, Any], new: dict[str, Any]) -> str:
    """What differs between two settings, as `name: old -> new`; names inside of objects are joined by dots."""
    old, new = _flat(old), _flat(new)
    names = [name for name in sorted(old.keys() | new.keys()) if old.get(name) != new.get(name)]
    return ", ".join(f"{name}: {old.get(name)} -> {new.get(name)}" for name in names)


def _flat(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, each in value.items():
        flat |= _flat(each, f"{prefix}{key}.") if isinstance(each, dict) else {prefix + key: each}
    return flat
