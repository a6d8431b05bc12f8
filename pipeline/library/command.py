"""python -m pipeline checkpoint list|verify|export: on one CPU, without the teacher, the ranks or DeepSpeed."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from pipeline.checkpoints import checkpoints, damage, read_manifest
from pipeline.library.export import export_library
from pipeline.rundir import STAGES

EXIT_DAMAGED = 1


def checkpoint_command(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m pipeline checkpoint", description=__doc__)
    parser.add_argument("--verbose", action="store_true", help="Show the traceback of an error.")
    actions = parser.add_subparsers(dest="action", required=True)
    for name, text in (
        ("list", "Step, size and losses of each."),
        ("verify", "Read all bytes; exit code 1 on damage."),
    ):
        action = actions.add_parser(name, help=text, description=text)
        action.add_argument("folder", type=Path, help="A run directory, or a checkpoint, or any folder between them.")
    about = "Make the module library of a distill checkpoint."
    export = actions.add_parser("export", help=about, description=about)
    export.add_argument("folder", type=Path, metavar="checkpoint", help="A checkpoint, such as .../step_00000400.")
    export.add_argument("--out", type=Path, required=True, help="Folder of the library; replaced when it exists.")
    options = parser.parse_args(arguments)
    if options.action == "export":
        _export(options.folder, options.out)
        return
    found = find(options.folder)
    for checkpoint in found:
        print(_line(checkpoint))
    if options.action == "verify":
        broken = [(checkpoint, what) for checkpoint in found if (what := damage(checkpoint)) is not None]
        for checkpoint, what in broken:
            print(f"damaged: {checkpoint}: {what}")
        print(f"{len(found) - len(broken)} of {len(found)} checkpoints verify")
        if broken:
            raise SystemExit(EXIT_DAMAGED)


def find(folder: Path) -> list[Path]:
    """Checkpoints at or below a folder of a run, by stage and step.

    Raises:
        FileNotFoundError: there are none.
    """
    if (folder / "manifest.json").is_file() and folder.name.startswith("step_"):
        return [folder]
    stages = [folder / name / "checkpoints" for name in STAGES]
    found = [each for place in (folder, folder / "checkpoints", *stages) for each in checkpoints(place)]
    if not found:
        raise FileNotFoundError(f"no checkpoints in {folder}: give a run directory, a stage's folder or a checkpoint")
    return found


def _line(checkpoint: Path) -> str:
    try:
        manifest = read_manifest(checkpoint)
    except (ValueError, OSError) as error:
        return f"{checkpoint}  damaged: {error}"
    num_mib = sum(entry["bytes"] for entry in manifest["files"].values()) / 2**20
    losses = "  ".join(f"{name} {loss:.3f}" for name, loss in manifest["validation"].items())
    return f"{checkpoint}  {num_mib:.1f} MiB  {manifest['num_ranks']} ranks  {losses}".rstrip()


def _export(checkpoint: Path, library: Path) -> None:
    if not (checkpoint / "manifest.json").is_file():
        raise FileNotFoundError(f"{checkpoint} is not a checkpoint: it has no manifest.json")
    broken = damage(checkpoint)
    if broken is not None:
        raise ValueError(f"checkpoint {checkpoint} is damaged: {broken}")
    export_library(checkpoint, library)
    print(f"{library}: the module library of {checkpoint}")
