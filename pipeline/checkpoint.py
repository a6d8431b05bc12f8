"""Sharded checkpoints: each rank writes its slices of the trainable parameters; the manifest is published last.

A checkpoint holds no teacher and is never unpickled: safetensors slices (name, offset; fp32 weight and AdamW moments)
and JSON. Loading puts slices together by name and offset, so another number of ranks is the same code path.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from pipeline.data import Cursor
from pipeline.engine import Engine
from pipeline.rundir import read_json, sha256_file, sync_folder, write_atomic
from pipeline.schedule import phase_start
from pipeline.world import World, logger_of


@dataclass(frozen=True)
class TrainState:
    """Where a training run stands, apart from the tensors."""

    step: int
    """Optimizer steps made."""
    cursor: Cursor
    """Position in the data after them."""


class Checkpointer:
    """Checkpoints of one training run, in one folder that all ranks see.

    Args:
        inputs: what the run was started with; kept in the manifest for people who read it.
    """

    def __init__(self, folder: Path, world: World, *, keep: int, inputs: dict[str, Any]) -> None:
        self.folder = folder
        self.world = world
        self.keep = keep
        self.inputs = inputs
        self.restored_inputs = inputs
        """What the run was started with that the restored checkpoint comes from."""
        if world.is_main:
            folder.mkdir(parents=True, exist_ok=True)
            for abandoned in folder.glob(".*.tmp"):
                shutil.rmtree(abandoned)
        world.barrier()

    def save(self, engine: Engine, state: TrainState) -> Path:
        """Write and publish the state of all ranks. Collective."""
        final = self.folder / f"step_{state.step:08d}"
        temporary = self.folder / f".{final.name}.tmp"
        if self.world.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
        self.world.barrier()
        _write_rank(temporary, self.world.rank, engine)
        self.world.barrier()
        if self.world.is_main:
            self._publish(temporary, final, state)
        self.world.barrier()
        return final

    def _publish(self, temporary: Path, final: Path, state: TrainState) -> None:
        entries = [
            json.loads((temporary / f"rank_{rank}.json").read_text(encoding="utf-8")) for rank in range(self.world.size)
        ]
        manifest = {
            "step": state.step,
            "cursor": state.cursor.to_dict(),
            "num_ranks": self.world.size,
            "files": {entry["file"]: entry for entry in entries},
            "inputs": self.inputs,
        }
        write_atomic(temporary / "manifest.json", json.dumps(manifest))
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)
        sync_folder(self.folder)
        for old in checkpoints(self.folder)[: -self.keep]:
            shutil.rmtree(old)

    def restore(self, engine: Engine, restarts: Sequence[int] = ()) -> TrainState | None:
        """Load the newest checkpoint that verifies into the engine; None when there is none. Collective.

        Args:
            restarts: steps at which the optimizer's moments started anew.
        """
        for folder in reversed(checkpoints(self.folder)):
            broken = damage(folder) if self.world.is_main else None
            if self.world.any(broken is not None):
                logger_of(self.world).warning("checkpoint %s is damaged (%s): trying the one before", folder, broken)
                continue
            self.restored_inputs = (read_json(folder / "manifest.json") or {})["inputs"]
            return _load(folder, engine, restarts)
        return None


def checkpoints(folder: Path) -> list[Path]:
    """Published checkpoints, oldest first."""
    return sorted(path.parent for path in folder.glob("step_*/manifest.json"))


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a published checkpoint, or None when every file has its size and sha256."""
    try:
        manifest = json.loads((checkpoint / "manifest.json").read_text(encoding="utf-8"))
    except ValueError as error:
        return f"manifest.json is not JSON: {error}"
    for name, entry in manifest["files"].items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != entry["bytes"] or sha256_file(path) != entry["sha256"]:
            return f"{name} has changed since it was written"
    return None


def full_weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """All trained weights of a checkpoint in fp32, put together from every rank's slices."""
    weights: dict[str, torch.Tensor] = {}
    missing: dict[str, int] = {}
    for stored in _stored_slices(checkpoint):
        flat = weights.setdefault(stored.name, torch.empty(stored.shape, dtype=torch.float32)).view(-1)
        flat[stored.start : stored.stop] = stored.read("weight", stored.start, stored.stop)
        missing[stored.name] = missing.get(stored.name, flat.numel()) - (stored.stop - stored.start)
    assert not any(missing.values()), (
        f"{checkpoint} lacks parts of {[name for name, count in missing.items() if count]}"
    )
    return weights


def _write_rank(folder: Path, rank: int, engine: Engine) -> None:
    tensors: dict[str, torch.Tensor] = {}
    index: dict[str, Any] = {}
    for part in engine.slices():
        stop = part.offset + part.tensors["weight"].numel()
        index[part.name] = {"shape": part.shape, "start": part.offset, "stop": stop}
        for key, tensor in part.tensors.items():
            tensors[f"{key}/{part.name}"] = tensor.detach().cpu().clone()
    path = folder / f"rank_{rank}.safetensors"
    save_file(tensors, path, metadata={"index": json.dumps(index)})
    with open(path, "rb") as file:
        os.fsync(file.fileno())
    entry = {"file": path.name, "bytes": path.stat().st_size, "sha256": sha256_file(path)}
    write_atomic(folder / f"rank_{rank}.json", json.dumps(entry))


@dataclass(frozen=True)
class _StoredSlice:
    """Elements start..stop of a flattened parameter, as one rank wrote them."""

    name: str
    shape: tuple[int, ...]
    start: int
    stop: int
    file: Any

    def read(self, key: str, start: int, stop: int) -> torch.Tensor:
        """Elements start..stop of the weight or a moment; both within this slice."""
        return self.file.get_slice(f"{key}/{self.name}")[start - self.start : stop - self.start]


def _stored_slices(checkpoint: Path) -> Iterator[_StoredSlice]:
    for path in sorted(checkpoint.glob("rank_*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name, entry in json.loads(file.metadata()["index"]).items():
                yield _StoredSlice(name, tuple(entry["shape"]), entry["start"], entry["stop"], file)


@torch.no_grad()
def _load(checkpoint: Path, engine: Engine, restarts: Sequence[int]) -> TrainState:
    wanted = {part.name: part for part in engine.slices()}
    missing = {name: part.tensors["weight"].numel() for name, part in wanted.items()}
    for stored in _stored_slices(checkpoint):
        part = wanted.get(stored.name)
        if part is None:
            continue
        assert stored.shape == part.shape, f"{part.name} is {stored.shape} in the checkpoint, {part.shape} in the model"
        start = max(stored.start, part.offset)
        stop = min(stored.stop, part.offset + part.tensors["weight"].numel())
        if start >= stop:
            continue
        for key, target in part.tensors.items():
            target[start - part.offset : stop - part.offset] = stored.read(key, start, stop).to(target.device)
        missing[part.name] -= stop - start
    assert not any(missing.values()), (
        f"{checkpoint} lacks parts of {[name for name, count in missing.items() if count]}"
    )
    manifest = json.loads((checkpoint / "manifest.json").read_text(encoding="utf-8"))
    step = manifest["step"]
    engine.restored(step - phase_start(step, restarts))
    return TrainState(step, Cursor.from_dict(manifest["cursor"]))
