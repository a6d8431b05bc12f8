"""Readers in environments of their own: python -m tests.readers.environments fetches those that are not here yet.

A reader is a folder under .readers/ with transformers and what it needs in other versions than ours; torch, numpy and
the rest are those of this environment, behind it on the path.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

READERS = Path(__file__).resolve().parents[2] / ".readers"
PACKAGES = {  # version of transformers -> what its folder holds; "": the one that is installed
    "4.57.6": (
        "transformers==4.57.6", "huggingface-hub>=0.34,<1", "tokenizers>=0.22,<0.23", "requests", "urllib3", "idna",
        "certifi", "charset-normalizer",
    ),
    "5.24.0": ("transformers==5.24.0",),
    "": (),
}  # fmt: skip


def place_of(version: str) -> Path | None:
    """Folder that goes first on the path of a reader; None where it has not been fetched."""
    folder = READERS / f"transformers-{version}"
    return folder if folder.is_dir() else None


def fetch(version: str) -> None:
    """Install a reader; under its name is only what is whole."""
    folder = READERS / f"transformers-{version}"
    temporary = folder.with_suffix(".part")
    shutil.rmtree(temporary, ignore_errors=True)
    pip = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-deps", "--target"]
    subprocess.run([*pip, str(temporary), *PACKAGES[version]], check=True)
    temporary.rename(folder)


if __name__ == "__main__":
    for each in filter(None, PACKAGES):
        if place_of(each) is None:
            fetch(each)
