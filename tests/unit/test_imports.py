"""The house rules that the source itself shows: imports go one way, and some packages have one importer each."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("data_prep", "pipeline", "slurm")

LADDER: list[set[str]] = [
    # arithmetic: the standard library (and numpy in batching and partition)
    {
        "data_prep.batching", "data_prep.config", "data_prep.parent", "data_prep.partition",
        "pipeline.config", "pipeline.limits", "pipeline.modes", "pipeline.prefixes", "pipeline.spans",
        "pipeline.public_models", "pipeline.schedule", "pipeline.sizes", "pipeline.search_config", "pipeline.solve",
    },
    # formats
    {
        "data_prep.hub", "data_prep.publish", "data_prep.reader", "data_prep.shards",
        "pipeline.rundir", "pipeline.world", "pipeline.checkpoint_format",
    },
    # pieces
    {
        "data_prep.corruption", "data_prep.demo", "data_prep.encode", "data_prep.plan", "data_prep.sources",
        "data_prep.units", "pipeline.data",
        "pipeline.estimate", "pipeline.families", "pipeline.kernels", "pipeline.losses", "pipeline.metrics",
        "pipeline.leaves", "pipeline.modular",
        "pipeline.preempt", "pipeline.sampler", "pipeline.tokenizer", "pipeline.units", "pipeline.report_data",
        "pipeline.library", "pipeline.records", "pipeline.watchdog",
        "pipeline.decoding", "pipeline.scoring", "pipeline.switching",
        "pipeline.assembly_losses", "pipeline.report_front",
    },
    # machinery
    {
        "pipeline.engine", "pipeline.partitions", "pipeline.checkpoint", "pipeline.validation", "pipeline.loop",
        "pipeline.cli",
    },
    # programs
    {
        "data_prep.stats",
        "data_prep.build", "data_prep.verify", "data_prep.__main__", "pipeline.teacher", "pipeline.distill",
        "pipeline.search", "pipeline.search_costs",
        "pipeline.assemble", "pipeline.baselines", "pipeline.evaluate", "pipeline.evaluation",
        "pipeline.slices", "pipeline.label", "pipeline.cost", "pipeline.compare", "pipeline.choose", "pipeline.report",
        "pipeline.report_page",
        "pipeline.disk", "pipeline.forecast", "pipeline.planned",
        "pipeline.launch", "pipeline.preflight", "pipeline.run", "pipeline.doctor", "pipeline.bench",
        "pipeline.checkpoints", "pipeline.recover", "pipeline.trim",
        "pipeline.__main__", "slurm",
    },
]  # fmt: skip

ONE_IMPORTER = {
    "deepspeed": "pipeline.engine",
    "triton": "pipeline.kernels",
    "huggingface_hub": "data_prep.hub",
    "mpi4py": "data_prep.build",
    "webdataset": "data_prep.shards",
    "tensorboard": "pipeline.metrics",
    "torch.utils.tensorboard": "pipeline.metrics",
    "sacrebleu": "pipeline.scoring",
    "sentencepiece": "data_prep.encode",
    "matplotlib": "pipeline.report",
}

PIPELINE_MAY_IMPORT = {
    "data_prep.batching", "data_prep.config", "data_prep.hub", "data_prep.parent", "data_prep.partition",
    "data_prep.publish", "data_prep.reader", "data_prep.shards",
}  # fmt: skip
BENCHES = "pipeline.bench"  # compares with other packages, and looks into all of ours
DATA_PREP_MAY_NOT_IMPORT = ("pipeline", "torch", "transformers", "deepspeed")


def modules() -> dict[str, Path]:
    found = {}
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            found[name.removesuffix(".__init__")] = path
    return found


def imports_of(path: Path) -> set[str]:
    """Dotted names of everything a file imports, at any depth of its code."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def level_of(module: str) -> int | None:
    """Step of the ladder of the longest listed prefix of a dotted name."""
    while module:
        for level, members in enumerate(LADDER):
            if module in members:
                return level
        module = module.rpartition(".")[0]
    return None


MODULES = modules()


def test_every_module_stands_on_the_ladder():
    lost = [name for name in MODULES if name not in PACKAGES and level_of(name) is None]
    assert not lost, f"give these a place in LADDER: {lost}"


@pytest.mark.parametrize("name", sorted(set(MODULES) - set(PACKAGES)))
def test_imports_go_one_way(name):
    own = level_of(name)
    for imported in imports_of(MODULES[name]):
        if imported.split(".")[0] not in PACKAGES or imported in PACKAGES:
            continue
        level = level_of(imported)
        assert level is None or level <= own, f"{name} imports {imported}, which stands above it"


@pytest.mark.parametrize("package", sorted(ONE_IMPORTER))
def test_one_importer_each(package):
    for name, path in MODULES.items():
        if any(each == package or each.startswith(package + ".") for each in imports_of(path)):
            assert name.startswith((ONE_IMPORTER[package], BENCHES)), f"{name} imports {package}"


def test_the_packages_keep_apart():
    for name, path in MODULES.items():
        for imported in imports_of(path):
            if name.startswith("data_prep"):
                assert imported.split(".")[0] not in DATA_PREP_MAY_NOT_IMPORT, f"{name} imports {imported}"
            elif name.startswith("pipeline") and imported.startswith("data_prep.") and not name.startswith(BENCHES):
                module = ".".join(imported.split(".")[:2])
                assert module in PIPELINE_MAY_IMPORT, f"{name} imports {imported}"


def test_arithmetic_needs_only_the_standard_library():
    import sys

    for name in LADDER[0]:
        for imported in imports_of(MODULES[name]):
            top = imported.split(".")[0]
            allowed = top in sys.stdlib_module_names or top in PACKAGES or top == "__future__"
            assert allowed or (top == "numpy" and name in ("data_prep.batching", "data_prep.partition")), (
                f"{name} imports {imported}"
            )


def test_files_stay_short():
    long = {name: count for name, path in MODULES.items() if (count := path.read_text().count("\n")) > 400}
    assert not long


def test_torch_finds_huge_pages_allowed():
    """It looks once, at its first tensor: before it is imported the package says so."""
    program = "import os, sys, pipeline; print(os.environ['THP_MEM_ALLOC_ENABLE'], 'torch' in sys.modules)"
    environment = {name: value for name, value in os.environ.items() if name != "THP_MEM_ALLOC_ENABLE"}
    found = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert found.stdout.split() == ["1", "False"], found.stderr
