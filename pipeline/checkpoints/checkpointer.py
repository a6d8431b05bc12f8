"""Saving beside training, and resuming from the newest checkpoint that verifies, on any number of ranks.

A save copies this rank's slices to host memory, which is all that training waits for, and hands them to a thread. The
threads of all ranks write, exchange checksums over a process group of their own, and rank 0's publishes by a rename.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from data_prep.publish import discard, fsync_folder, publish_bytes
from pipeline.checkpoints.format import (
    FORMAT_VERSION,
    Slice,
    Snapshot,
    checkpoint_name,
    checkpoints,
    damage,
    fill,
    rank_file,
    read_manifest,
    remove_checkpoint,
    seal,
    step_of,
)
from pipeline.data import Cursor
from pipeline.rundir import difference
from pipeline.schedule import phase_start
from pipeline.world import World, logger_of


class Sharded(Protocol):
    """What a checkpointer needs of an engine; see pipeline.training.engine.Engine."""

    def slices(self) -> Iterable[Slice]: ...

    def restored(self, num_steps: int) -> None: ...


@dataclass(frozen=True)
class TrainState:
    """Where a training run stands, apart from the tensors."""

    step: int
    """Optimizer steps made."""
    cursor: Cursor
    """Position in the data after them."""


@dataclass(frozen=True)
class Keep:
    """Which checkpoints stay."""

    last: int
    """The newest ones."""
    every_steps: int = 0
    """Those of every so many steps, too; 0 for none."""
    best: bool = False
    """The one with the lowest mean validation loss, too."""

    def chosen(self, losses: Mapping[int, float | None]) -> set[int]:
        """Steps to keep of the published ones, whose validation losses (where there are any) are given."""
        steps = sorted(losses)
        kept = set(steps[-self.last :])
        if self.every_steps:
            kept |= {step for step in steps if step % self.every_steps == 0}
        validated = {step: loss for step, loss in losses.items() if loss is not None}
        if self.best and validated:
            kept.add(min(validated, key=lambda step: (validated[step], -step)))
        return kept


class Checkpointer:
    """Checkpoints of one training run, in one folder that all ranks see.

    Args:
        inputs: what the run was started with; a checkpoint of other identity is refused.
        product: JSON that the export of a checkpoint needs to know, such as spans and the teacher's hash.
        beside: copy what is saved and write it while training goes on; False takes no memory for a copy, and a save
            returns when it is published.
    """

    def __init__(
        self,
        folder: Path,
        world: World,
        *,
        keep: Keep,
        inputs: dict[str, Any],
        product: Mapping[str, Any] | None = None,
        beside: bool = True,
    ) -> None:
        self.folder = folder
        self.beside = beside
        self.world = world
        self.keep = keep
        self.inputs = inputs
        self.product = dict(product or {})
        self.restored_inputs = inputs
        """What the run was started with that the restored checkpoint comes from."""
        self._group = world.side_group()
        self._snapshot: Snapshot | None = None
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        if world.is_main:
            folder.mkdir(parents=True, exist_ok=True)
            for abandoned in folder.glob(".*.tmp*"):
                discard(abandoned)
        world.barrier()

    def save(self, engine: Sharded, state: TrainState, validation: Mapping[str, float] | None = None) -> None:
        """Take a snapshot and have it written, beside training if so; first waits for the save before. Collective.

        Args:
            validation: validation losses at this step, where they were computed.

        Raises:
            RuntimeError: the save before failed, on this rank or another; or this one, where it is waited for.
        """
        self.finish()
        slices = list(engine.slices())
        self._snapshot = self._snapshot or Snapshot(slices, copied=self.beside)
        self._snapshot.take(slices)
        manifest = {
            "format": FORMAT_VERSION,
            "step": state.step,
            "cursor": state.cursor.to_dict(),
            "num_ranks": self.world.size,
            "validation": dict(validation or {}),
            "inputs": self.inputs,
            "product": self.product,
        }
        self._thread = threading.Thread(
            target=self._write, args=(self._snapshot, manifest), name="checkpoint", daemon=True
        )
        self._thread.start()
        if not self.beside:
            self.finish()

    @property
    def failed(self) -> bool:
        """The save that was begun last has ended with an error, which finish() raises."""
        return self._error is not None

    def finish(self) -> None:
        """Wait until the save that was begun last is published.

        Raises:
            RuntimeError: it was not, on this rank or another; its cause is the error, where this rank has it.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            raise RuntimeError(f"saving to {self.folder} failed: {self._error}") from self._error

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        """Whatever ends training, the save that was begun is waited for."""
        try:
            self.finish()
        except RuntimeError as unsaved:
            if error is None:
                raise
            logger_of(self.world).warning("%s", unsaved)

    def _write(self, snapshot: Snapshot, manifest: dict[str, Any]) -> None:
        """What the thread does. Every rank takes part in both exchanges, whatever happens to it in between."""
        try:
            final = self.folder / checkpoint_name(manifest["step"])
            temporary = self.folder / f".{final.name}.tmp"
            entries = self._together(partial(self._write_rank, snapshot, temporary))
            manifest["files"] = {rank_file(rank): entry for rank, entry in enumerate(entries)}
            self._together(partial(self._publish, temporary, final, manifest))
        except BaseException as error:
            self._error = error

    def _write_rank(self, snapshot: Snapshot, temporary: Path) -> dict[str, Any]:
        temporary.mkdir(exist_ok=True)
        return snapshot.write(temporary / rank_file(self.world.rank))

    def _publish(self, temporary: Path, final: Path, manifest: dict[str, Any]) -> None:
        if not self.world.is_main:
            return
        publish_bytes(temporary / "manifest.json", seal(manifest))  # where the folder is gone it stays so
        if final.exists():  # one that did not verify
            remove_checkpoint(final)
        temporary.rename(final)
        fsync_folder(self.folder)
        if lost := [name for name in manifest["files"] if not (final / name).is_file()]:
            raise FileNotFoundError(f"{final / lost[0]} is gone: does another process train in this run?")
        # those of later steps were passed over as damaged: they are replaced when their step is saved again
        published = {step_of(path): path for path in checkpoints(self.folder) if step_of(path) <= manifest["step"]}
        kept = self.keep.chosen({step: _mean_loss(path) for step, path in published.items()})
        for step in published.keys() - kept:
            remove_checkpoint(published[step])

    def _together(self, work: Callable[[], Any]) -> list[Any]:
        """Results of `work` of all ranks; an error on one is an error on all, which names the rank.

        Only for the thread, or while there is none.
        """
        result, failure, cause = None, None, None
        try:
            result = work()
        except Exception as error:
            failure, cause = f"{type(error).__name__}: {error}", error
        outcomes = self.world.gather((result, failure), self._group)
        failures = [f"rank {rank}: {text}" for rank, (_, text) in enumerate(outcomes) if text is not None]
        if failures:
            raise RuntimeError("; ".join(failures)) from cause
        return [value for value, _ in outcomes]

    def restore(self, engine: Sharded, restarts: Sequence[int] = ()) -> TrainState | None:
        """Load the newest checkpoint that verifies into the engine; None when none was published. Collective.

        Args:
            restarts: steps at which the optimizer's moments started anew.

        Raises:
            ValueError: the checkpoint is of a run with another identity, or none of the published ones verifies.
        """
        names = self._together(lambda: [path.name for path in checkpoints(self.folder)])[0]
        for name in reversed(names):
            folder = self.folder / name
            found = self._together(partial(damage, folder, self.world.rank, self.world.size))
            broken = next((text for text in found if text is not None), None)
            if broken is not None:
                logger_of(self.world).warning("checkpoint %s is damaged (%s): trying the one before", folder, broken)
                continue
            return self._load(folder, engine, restarts)
        if names:
            raise ValueError(
                f"no checkpoint in {self.folder} verifies ({', '.join(names)}): remove that folder to start again"
            )
        return None

    def _load(self, folder: Path, engine: Sharded, restarts: Sequence[int]) -> TrainState:
        manifest = read_manifest(folder)
        identity = self.inputs.get("identity", {})
        if manifest["inputs"].get("identity", {}) != identity:
            changed = difference(manifest["inputs"].get("identity", {}), identity)
            raise ValueError(f"checkpoint {folder} is of another run ({changed}): set these back, or choose a run_dir")
        fill(engine.slices(), folder)
        engine.restored(manifest["step"] - phase_start(manifest["step"], restarts))
        self.restored_inputs = manifest["inputs"]
        return TrainState(manifest["step"], Cursor.from_dict(manifest["cursor"]))


def _mean_loss(checkpoint: Path) -> float | None:
    """Mean of the validation losses at a checkpoint's step; None where there are none, or it is damaged."""
    try:
        losses = read_manifest(checkpoint)["validation"]
    except (ValueError, OSError):
        return None
    return sum(losses.values()) / len(losses) if losses else None
