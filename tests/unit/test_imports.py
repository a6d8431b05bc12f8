"""The house rules that the source itself shows: rooms in one order, one door each, one importer for a heavy library.

A room is a package of pipeline/, or a single file of pipeline/, data_prep/ or slurm/. As a program, this file counts
them: python -m tests.unit.test_imports [ROOT].
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from pipeline.__main__ import PROGRAMS, TOOLS, TRAINING

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("data_prep", "pipeline", "slurm")

ORDER = (  # a room imports only rooms that stand before it
    # text -> shards
    "data_prep.processes", "data_prep.config", "data_prep.batching", "data_prep.partition", "data_prep.hub",
    "data_prep.publish", "data_prep.shards", "data_prep.reader", "data_prep.corruption", "data_prep.words",
    "data_prep.languages", "data_prep.tokenizer", "data_prep.served", "data_prep.encode", "data_prep.quotes",
    "data_prep.textfile", "data_prep.saved", "data_prep.sources", "data_prep.demo", "data_prep.plan", "data_prep.units",
    "data_prep.testpart", "data_prep.build", "data_prep.verify", "data_prep.stats", "data_prep.__main__",
    # what is told, counted and kept, without a model
    "pipeline.exits", "pipeline.weights", "pipeline.schedule", "pipeline.spans", "pipeline.config", "pipeline.rundir",
    "pipeline.world", "pipeline.data", "pipeline.tokenizer", "pipeline.scripts", "pipeline.scoring", "pipeline.curves",
    "pipeline.pictures",
    # teacher and modular layers, trained
    "pipeline.kernels", "pipeline.families", "pipeline.beside", "pipeline.ordinary", "pipeline.pretrained",
    "pipeline.model",
    "pipeline.checkpoints", "pipeline.footprint", "pipeline.training",
    # the product and what is made of it
    "pipeline.library", "pipeline.engines", "pipeline.assemble", "pipeline.decoding", "pipeline.evaluation",
    "pipeline.search", "pipeline.report",
    # commands
    "pipeline.teacher", "pipeline.distill", "pipeline.baselines", "pipeline.recover", "pipeline.label", "pipeline.trim",
    "pipeline.export", "pipeline.draft", "pipeline.planning", "pipeline.launch", "pipeline.run", "pipeline.study",
    "pipeline.doctor", "pipeline.bench", "pipeline.__main__",
    # the same on a cluster
    "slurm.stages", "slurm.cluster", "slurm.controller", "slurm.render", "slurm.discover", "slurm.cause",
    "slurm.starts", "slurm.check", "slurm.doctor", "slurm.submit", "slurm.status", "slurm.sweep", "slurm.__main__",
)  # fmt: skip

ONE_IMPORTER = {  # library -> the file (a package for triton: kernels are one idea in several files)
    "deepspeed": "pipeline.training.engine",
    "triton": "pipeline.kernels",
    "huggingface_hub": "data_prep.hub",
    "mpi4py": "data_prep.build",
    "datasets": "data_prep.saved",
    "webdataset": "data_prep.shards",
    "torch.utils.tensorboard": "pipeline.curves",
    "sacrebleu": "pipeline.scoring",
    "sentencepiece": "data_prep.encode",
    "matplotlib": "pipeline.pictures",
    "ctranslate2": "pipeline.engines.ctranslate",
    "onnx": "pipeline.engines.onnx",
    "onnxruntime": "pipeline.engines.onnx",
}

PIPELINE_MAY_IMPORT = {  # of data_prep: formats, plan and arithmetic, the tokenizer of record, another test
    # part, the prefix of a record
    "data_prep.batching", "data_prep.config", "data_prep.hub", "data_prep.languages", "data_prep.partition",
    "data_prep.plan", "data_prep.processes", "data_prep.publish", "data_prep.reader", "data_prep.shards",
    "data_prep.sources", "data_prep.testpart", "data_prep.tokenizer",
}  # fmt: skip
BENCHES = "pipeline.bench"  # compares with other packages, and looks into all of ours
DATA_PREP_MAY_NOT_IMPORT = ("pipeline", "torch", "transformers", "deepspeed")
ARITHMETIC = (  # needs the standard library alone (and numpy in batching and partition)
    "data_prep.batching", "data_prep.config", "data_prep.partition", "data_prep.processes", "pipeline.exits",
    "pipeline.schedule", "pipeline.spans", "pipeline.weights",
)  # fmt: skip
READS_TOKENIZERS = "data_prep.tokenizer"  # through transformers, which the others start in a process of its own


def modules(root: Path = ROOT) -> dict[str, Path]:
    """Every module of the product by its dotted name."""
    found = {}
    for package in PACKAGES:
        for path in (root / package).rglob("*.py"):
            name = ".".join(path.relative_to(root).with_suffix("").parts)
            found[name.removesuffix(".__init__")] = path
    return found


@cache
def imports_of(path: Path) -> set[tuple[str, str]]:
    """(module, name) of everything a file imports, at any depth of its code; the name is "" for a whole module."""
    found: set[tuple[str, str]] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {(alias.name, "") for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {(node.module or "", alias.name) for alias in node.names}
    return found


def own_imports(path: Path, known: dict[str, Path]) -> set[str]:
    """Modules of the product that a file imports."""
    found = set()
    for module, name in imports_of(path):
        whole = f"{module}.{name}" if name and f"{module}.{name}" in known else module
        if whole in known and whole not in PACKAGES:
            found.add(whole)
    return found


def room_of(module: str) -> str:
    """The room that a module stands in."""
    return ".".join(module.split(".")[:2])


MODULES = modules()
IN_ROOMS = sorted(set(MODULES) - set(PACKAGES))


def test_every_room_has_its_place():
    assert {room_of(name) for name in IN_ROOMS} == set(ORDER)
    assert len(ORDER) == len(set(ORDER))


@pytest.mark.parametrize("name", IN_ROOMS)
def test_rooms_are_in_order(name):
    for imported in own_imports(MODULES[name], MODULES):
        own, other = ORDER.index(room_of(name)), ORDER.index(room_of(imported))
        assert other <= own, f"{name} imports {imported}, whose room stands behind its own"


@pytest.mark.parametrize("name", IN_ROOMS)
def test_nobody_reaches_past_a_door(name):
    """Other rooms take what a package's __init__ hands out; a package's own files import each other."""
    if room_of(name) == BENCHES:
        return
    for imported in own_imports(MODULES[name], MODULES):
        inside = room_of(imported) == room_of(name)
        is_door = imported == room_of(imported) or imported.endswith(".__main__")
        assert inside or is_door, f"{name} imports {imported}: take it from {room_of(imported)}"


@pytest.mark.parametrize("package", sorted({room_of(name) for name in IN_ROOMS if name.count(".") > 1} - {BENCHES}))
def test_a_door_hands_out_what_others_use(package):
    """Nothing more: a name that only the package itself uses stays inside."""
    listed = re.search(r"__all__ = (\[.*?\])", MODULES[package].read_text(encoding="utf-8"), re.DOTALL)
    imported = {name for module, name in imports_of(MODULES[package]) if module.startswith(f"{package}.")}
    handed_out = set(ast.literal_eval(listed[1])) if listed else imported  # a door with code of its own says which
    others = [path for other, path in MODULES.items() if room_of(other) != package]
    used = {name for path in others for module, name in imports_of(path) if module == package}
    whole = package.partition(".")[2]  # as in `from pipeline import kernels`, then kernels.attach
    for path in others:
        if ("pipeline", whole) in imports_of(path):
            used |= set(re.findall(rf"\b{whole}\.(\w+)", path.read_text(encoding="utf-8")))
    by_name = {place.partition(":")[2] for place in (*TRAINING.values(), *PROGRAMS.values(), *TOOLS.values())}
    assert handed_out - used <= by_name


@pytest.mark.parametrize("library", sorted(ONE_IMPORTER))
def test_one_importer_each(library):
    importers = set()
    for name, path in MODULES.items():
        if room_of(name) != BENCHES and any(
            module == library or module.startswith(library + ".") for module, _ in imports_of(path)
        ):
            importers.add(room_of(name) if library == "triton" else name)
    assert importers == {ONE_IMPORTER[library]}


def test_one_reader_of_models():
    """`read_model` corrects what transformers 5.17 makes of a umT5; one benchmark times plain loading, of a T5."""
    readers = {
        name
        for name, path in MODULES.items()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("AutoModelForSeq2SeqLM.from_pretrained")
    }
    assert readers == {"pipeline.ordinary", "pipeline.bench.switch"}


def test_the_packages_keep_apart():
    for name, path in MODULES.items():
        for imported, _ in imports_of(path):
            if name.startswith("data_prep"):
                forbidden = imported.split(".")[0] in DATA_PREP_MAY_NOT_IMPORT
                allowed = name == READS_TOKENIZERS and imported.split(".")[0] == "transformers"
                assert allowed or not forbidden, f"{name} imports {imported}"
            elif name.startswith("pipeline") and imported.startswith("data_prep.") and not name.startswith(BENCHES):
                assert room_of(imported) in PIPELINE_MAY_IMPORT, f"{name} imports {imported}"


@pytest.mark.parametrize("name", [name for name in IN_ROOMS if room_of(name) in ARITHMETIC])
def test_arithmetic_needs_only_the_standard_library(name):
    for imported, _ in imports_of(MODULES[name]):
        top = imported.split(".")[0]
        allowed = top in sys.stdlib_module_names or top in PACKAGES
        assert allowed or (top == "numpy" and name in ("data_prep.batching", "data_prep.partition")), (
            f"{name} imports {imported}"
        )


def test_files_stay_short():
    assert not {name: count for name, path in MODULES.items() if (count := path.read_text().count("\n")) > 400}


def test_torch_finds_huge_pages_allowed():
    """It looks once, at its first tensor: before it is imported the package says so."""
    program = "import os, sys, pipeline; print(os.environ['THP_MEM_ALLOC_ENABLE'], 'torch' in sys.modules)"
    environment = {name: value for name, value in os.environ.items() if name != "THP_MEM_ALLOC_ENABLE"}
    found = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert found.stdout.split() == ["1", "False"], found.stderr


@pytest.mark.parametrize(
    ("own", "told"),
    [
        ({}, "expandable_segments:True"),
        ({"PYTORCH_ALLOC_CONF": "backend:native"}, "backend:native"),
        ({"PYTORCH_CUDA_ALLOC_CONF": "backend:native"}, ""),
    ],
)
def test_segments_of_a_gpus_memory_may_grow_unless_the_user_says_otherwise(own, told):
    environment = {name: value for name, value in os.environ.items() if not name.endswith("ALLOC_CONF")}
    program = "import os, pipeline; print(os.environ.get('PYTORCH_ALLOC_CONF', ''))"
    found = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environment | own, capture_output=True, text=True
    )
    assert found.stdout.strip() == told, found.stderr


COMMANDS = tuple(f"pipeline.{each}" for each in (
    "teacher", "distill", "baselines", "recover", "label", "trim", "run", "doctor", "launch"
))  # fmt: skip


def house(root: Path) -> str:
    """The size of a house: files by folder, rooms of pipeline/, and the arrows between them (benchmarks left out)."""
    known = modules(root)
    packages = {room_of(name) for name in known if name.count(".") > 1}
    files = {name: path for name, path in known.items() if name.startswith("pipeline.") and room_of(name) != BENCHES}
    arrows = {
        (name, other)
        for name, path in files.items()
        for other in own_imports(path, known)
        if other.startswith("pipeline.") and room_of(other) not in (room_of(name), BENCHES)
    }
    pairs = {(room_of(name), room_of(other)) for name, other in arrows}
    into_commands = {(name, other) for name, other in arrows if other in COMMANDS and not name.endswith(".__main__")}
    folders = [path.parent.relative_to(root) for path in known.values()]
    lines = sum(path.read_text(encoding="utf-8").count("\n") for path in known.values())
    return "\n".join([
        *(f"{folder}: {folders.count(folder)} files" for folder in sorted(set(folders))),
        f"{len({room_of(name) for name in files})} rooms of pipeline/, {len(packages)} of them packages",
        f"{len(arrows)} arrows between rooms, {len(pairs)} pairs of rooms, {len(into_commands)} arrows into commands",
        f"{len(known)} files, {lines} lines",
    ])  # fmt: skip


if __name__ == "__main__":
    print(house(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT))
