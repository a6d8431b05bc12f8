"""The maps in the README files name every file and folder beside them once, and nothing that is not there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MAPPED = ("data_prep", "pipeline", "slurm")
NEED_NO_LINE = {"__init__.py", "README.md", "__pycache__"}


def map_of(folder: Path) -> list[str]:
    """Names at the start of the lines under `## Map`; a line that begins further in goes on with the one above it."""
    chapter = (folder / "README.md").read_text(encoding="utf-8").partition("\n## Map\n")[2].partition("\n## ")[0]
    return re.findall(r"^ {4}(\S+) {2,}\S", chapter, re.MULTILINE)


def name_in_map(path: Path) -> str:
    return path.name + "/" * path.is_dir()


@pytest.mark.parametrize("name", MAPPED)
def test_a_map_names_every_file_and_package_once(name: str) -> None:
    names = map_of(ROOT / name)
    there = [path for path in (ROOT / name).iterdir() if path.name not in NEED_NO_LINE]
    assert {*names} == {*map(name_in_map, there)}
    assert len(names) == len({*names})


def test_the_first_map_names_the_folders_at_the_top() -> None:
    names = map_of(ROOT)
    assert len(names) == len({*names})
    assert [name for name in names if name_in_map(ROOT / name) != name] == []
    folders = {name_in_map(path.parent) for file in ("README.md", "__init__.py") for path in ROOT.glob(f"[!.]*/{file}")}
    assert {name for name in names if name.endswith("/")} == folders
