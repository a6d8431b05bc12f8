"""The stamps by which the stages after data preparation skip themselves.

A stage that starts writes its inputs to <stage>/inputs.json; a stage that is done publishes <stage>/stage.json last:
its inputs again, and the size and sha256 of every output. A stage is done when its stamp carries the inputs that the
recipe and the stages before it now give.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.hub import local_folder
from data_prep.publish import discard, files_in, sha256_of, unused_name
from pipeline.config import SEARCHED, Recipe, fields_of_kind, identity_of
from pipeline.rundir.files import difference, read_json, write_atomic
from pipeline.rundir.run_dir import STAGES, RunDir

FORMAT_VERSION = 1
TEACHER_FILES, FOLDER_FILES, TEST_FILES = "teacher files", "files of evaluate's folders", "files of evaluate's test"
NUM_PIECES, PIECE_BYTES = 64, 2**14  # of a large file that are read to know it


def left_out(recipe: Recipe) -> dict[str, str]:
    """Stages that a recipe has no use for, and why."""
    why = {}
    if recipe.baseline.optim.num_steps == 0:
        why["baseline"] = "baseline.optim.num_steps is 0"
    if SEARCHED not in recipe.assemble.presets:
        why["search"] = f"assemble.presets does not name {SEARCHED!r}"
    return why


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
        identity, schedule = (
            {field: value for field, value in found.items() if field.startswith(prefixes)}
            for found in (identity_of(recipe), fields_of_kind(recipe, "schedule"))
        )
        identity |= {"format": FORMAT_VERSION, "seed": recipe.seed}
        identity |= _files_used(recipe, run, name)
        unused = left_out(recipe)
        for other in upstream:
            if other not in unused:
                output_hash = run.output_hash(other)
                if output_hash is None:
                    raise FileNotFoundError(f"stage {name} needs the output of stage {other}: run that first")
                identity[f"output of {other}"] = output_hash
            elif other == "baseline":
                # what the stage publishes when it is run all the same, as every run once did: their stamps still hold
                identity[f"output of {other}"] = Stage.of(recipe, run, other).outputs_hash({})
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
        self.reopen()

    def reopen(self) -> None:
        """Make the folder ready for work whose results carry keys of their own: what is there stays good as far as its
        keys are today's, so nothing is refused or moved from under another worker."""
        (self.folder / "stage.json").unlink(missing_ok=True)
        write_atomic(self.folder / "inputs.json", json.dumps(self.inputs, indent=1))

    def _begun(self) -> dict[str, Any]:
        """The inputs that the stage's folder was begun with; a new folder has been begun with today's."""
        return read_json(self.folder / "inputs.json") or self.inputs

    def _set_aside(self) -> None:
        """Move a finished output that another recipe made out of the way."""
        digest = hashlib.sha256((self.folder / "inputs.json").read_bytes()).hexdigest()[:8]
        aside = self.folder.with_name(f"{self.name}~{digest}")
        discard(aside)
        self.folder.rename(unused_name(aside))

    def publish(self, outputs: Iterable[Path], *, started_at: float, extra: dict[str, Any] | None = None) -> None:
        """Stamp the stage as done. `outputs` are files or folders below the stage's folder."""
        files: dict[str, dict[str, Any]] = {}
        for output in outputs:
            for path in files_in(output) if output.is_dir() else [output]:
                name = str(path.relative_to(self.folder))
                files[name] = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
        stamp = {
            "stage": self.name,
            "inputs": self.inputs,
            "outputs": files,
            "outputs_hash": self.outputs_hash(files),
            "seconds": round(time.time() - started_at, 1),
            **(extra or {}),
        }
        write_atomic(self.folder / "stage.json", json.dumps(stamp, indent=1))

    def outputs_hash(self, files: dict[str, dict[str, Any]]) -> str:
        """Hash of outputs, and of the inputs too: what a stage only refers to, as a list of models does, is not among
        its files."""
        return hashlib.sha256(json.dumps([self.inputs, files], sort_keys=True).encode()).hexdigest()


def _files_used(recipe: Recipe, run: RunDir, name: str) -> dict[str, Any]:
    """What the model folders hold that a stage is given by path; as it was begun with of one that is not to be seen."""
    if name not in ("teacher", "evaluate"):
        return {}
    begun = (read_json(run.stage(name) / "inputs.json") or {"identity": {}})["identity"]
    if name == "teacher":
        folder = recipe.teacher.folder
        return {TEACHER_FILES: _files_of(local_folder(folder), begun.get(TEACHER_FILES))} if folder else {}
    given = [text.rpartition("=")[2] for text in recipe.evaluate.folders]
    given += [recipe.evaluate.metricx] if recipe.evaluate.metricx else []
    found = {folder: each for folder, each in begun.get(FOLDER_FILES, {}).items() if folder in given}
    found |= {folder: _files_of(Path(folder)) for folder in given if (Path(folder) / "config.json").is_file()}
    tests = {name: sha256_of(Path(name)) for name in recipe.evaluate.test if Path(name).is_file()}
    tests = {name: each for name, each in begun.get(TEST_FILES, {}).items() if name in recipe.evaluate.test} | tests
    return ({FOLDER_FILES: found} if given else {}) | ({TEST_FILES: tests} if tests else {})


def _files_of(folder: Path, begun: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What tells a model folder from another of the same name without reading gigabytes, by file.

    Args:
        begun: what a run was begun with. Sizes were once all that was taken of large files: such a run goes on.

    Raises:
        ValueError: no such folder.
    """
    if not (folder / "config.json").is_file():
        adapter = folder / "adapter_config.json"
        instead = f", but an adapter ({adapter.name}): merge it into its model" if adapter.is_file() else ""
        raise ValueError(f"{folder} is not a Hugging Face model folder: it has no config.json{instead}")
    files = {path.name: path for path in files_in(folder, "*")}
    sizes = {name: path.stat().st_size for name, path in files.items()}
    return {
        name: sizes[name] if (begun or {}).get(name) == sizes[name] else _fingerprint(path)
        for name, path in files.items()
    }


def _fingerprint(path: Path) -> str:
    """The sha256 of a small file; of a large one, of its size and of pieces that lie evenly in it: training changes
    every matrix of a model, so some of them."""
    size = path.stat().st_size
    if size < 2**20:
        return sha256_of(path)
    digest = hashlib.sha256(str(size).encode())
    with open(path, "rb") as file:
        for piece in range(NUM_PIECES):
            file.seek(piece * (size - PIECE_BYTES) // (NUM_PIECES - 1))
            digest.update(file.read(PIECE_BYTES))
    return digest.hexdigest()
