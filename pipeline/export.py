"""python -m pipeline export: assemblies of a run as ordinary folders, or in the format of an inference engine.

Each lies in its own folder under RUN/export, is published when it is whole and checked, and is left alone when it is
there already.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm import tqdm

from data_prep.publish import publish_json, publishing_folder
from pipeline.assemble import Parts, scores_of, write_checkpoint, write_converted
from pipeline.engines import ENGINES
from pipeline.rundir import RunDir, read_json
from pipeline.spans import Assembly

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
QUANTIZATIONS = tuple({each: None for engine in ENGINES.values() for each in engine.quantizations})
WEIGHTS = (".bin", ".safetensors", ".onnx", ".onnx_data")
MADE = "export.json"
SCORES_BEFORE = "These are the scores of the checkpoint before it was converted."


@dataclass(frozen=True)
class Form:
    """What an assembly is written as."""

    to: str
    """folder, or one of ENGINES."""
    quantization: str = "float32"
    dtype: str = "fp32"
    """Of an ordinary folder."""

    @property
    def name(self) -> str:
        return f"{self.to}-{self.quantization if self.to in ENGINES else self.dtype}"

    @property
    def versions(self) -> dict[str, str]:
        """Of what writes it."""
        names = ("transformers", *(ENGINES[self.to].packages if self.to in ENGINES else ()))
        return {name: metadata.version(name) for name in names}


def export_command(arguments: Sequence[str]) -> None:
    """Parse the command line and export.

    Raises:
        FileNotFoundError: the run has no library, or with --all no assemblies.
        ValueError: options that do not go together, an assembly that the library has not, or a result that is wrong.
    """
    parser = argparse.ArgumentParser(prog="python -m pipeline export", description=__doc__)
    parser.add_argument("--run", type=Path, default=Path("runs/demo"), help="run with a module library")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--assembly", help="one assembly, such as e2x3-d1x4.2")
    which.add_argument("--all", action="store_true", help="the teacher and every assembly of stage assemble")
    parser.add_argument("--to", choices=("folder", *ENGINES), default="folder", help="what to write")
    parser.add_argument("--quantization", choices=QUANTIZATIONS, help="of an engine (default: float32); onnx has int8")
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="of an ordinary folder (default: fp32)")
    parser.add_argument("--out", type=Path, help="folder to put the folders into (default: RUN/export)")
    parser.add_argument("--verbose", action="store_true", help="show the traceback of an error")
    options = parser.parse_args(arguments)
    form = _form(options.to, options.quantization, options.dtype)
    if form.to in ENGINES:
        ENGINES[form.to].refuse_missing(f"--to {form.to}")
    run = RunDir(options.run)
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    assemblies = assemblies_of(run) if options.all else [Assembly.parse(options.assembly)]
    for folder, num_bytes in export(run, assemblies, form, options.out or run.root / "export"):
        print(f"{folder}: {num_bytes / 1e6:.1f} MB of weights")


def _form(to: str, quantization: str | None, dtype: str | None) -> Form:
    if to == "folder" and quantization:
        engines = " or ".join(ENGINES)
        raise ValueError(f"--quantization {quantization} is for --to {engines}; an ordinary folder has --dtype bf16")
    if to != "folder" and dtype:
        raise ValueError(f"--dtype {dtype} is for --to folder; --to {to} has --quantization")
    if quantization and quantization not in ENGINES[to].quantizations:
        raise ValueError(f"--to {to} has no {quantization}: choose one of {', '.join(ENGINES[to].quantizations)}")
    return Form(to, quantization or "float32", dtype or "fp32")


def assemblies_of(run: RunDir) -> list[Assembly]:
    """The teacher and the assemblies that stage assemble has made.

    Raises:
        FileNotFoundError: it has made none.
    """
    found = read_json(run.systems)
    if found is None:
        raise FileNotFoundError(f"{run.systems} is missing: run stage assemble first, or name one with --assembly")
    return [Assembly.parse(each["assembly"]) for each in found["systems"] if each["kind"] in ("teacher", "assembly")]


def export(run: RunDir, assemblies: Sequence[Assembly], form: Form, out: Path) -> list[tuple[Path, int]]:
    """Publish OUT/FORM/ASSEMBLY for each assembly; returns each folder with the bytes of its weights.

    Raises:
        FileNotFoundError: no library.
        ValueError: an assembly that it has not, or a result that does not compute what it should.
    """
    parts = Parts.of(run, dtype=DTYPES[form.dtype])
    for assembly in assemblies:
        parts.models.stacks.refuse_misfit(assembly)
    folders = [out / form.name / str(assembly) for assembly in assemblies]
    for assembly, folder in tqdm([*zip(assemblies, folders, strict=True)], desc="export", unit="model", disable=None):
        made = {"assembly": str(assembly), "form": form.name, "versions": form.versions, "of": parts.hashes}
        if read_json(folder / MADE) != made:
            _write(parts, assembly, form, folder, made, scores_of(run, str(assembly), parts.hashes))
    return [(folder, bytes_of(folder)) for folder in folders]


def _write(
    parts: Parts, assembly: Assembly, form: Form, folder: Path, made: dict[str, Any], scores: Sequence[str]
) -> None:
    with publishing_folder(folder) as temporary:
        if form.to == "folder":
            write_checkpoint(parts, assembly, temporary, scores=scores)
        else:
            place, prefix = folder.parent, f"{folder.name}.tmp-"
            with tempfile.TemporaryDirectory(dir=place, prefix=prefix, ignore_cleanup_errors=True) as scratch:
                checkpoint = Path(scratch) / "checkpoint"
                write_checkpoint(parts, assembly, checkpoint)
                scores = [SCORES_BEFORE, "", *scores] if scores else []
                write_converted(parts, assembly, checkpoint, temporary, form.to, form.quantization, scores)
        publish_json(temporary / MADE, made)


def bytes_of(folder: Path) -> int:
    """Bytes of the weights in an exported folder."""
    return sum(path.stat().st_size for path in folder.iterdir() if path.suffix in WEIGHTS)
