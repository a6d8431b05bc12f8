"""Readers in environments of their own: python -m tests.readers.environments [NAME ...] fetches those that are not here
yet.

A reader is a folder under .readers/ with what it needs in other versions than ours, or what nothing else needs; torch,
numpy and the rest are those of this environment, behind it on the path.
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
    "5.17.0": ("transformers==5.17.0", "huggingface-hub>=1.5,<2", "httpx>=0.28,<1", "httpcore>=1,<2", "certifi"),
    "": (),
}  # fmt: skip


FOLDERS = {f"transformers-{version}": packages for version, packages in PACKAGES.items() if version} | {
    "onnx": ("onnx==1.23.2", "onnxruntime==1.32.0", "ml_dtypes>=0.5.4", "flatbuffers"),
}  # fmt: skip


def place_of(name: str) -> Path | None:
    """Folder of a reader, which goes first on the path; None where it has not been fetched."""
    folder = READERS / name
    return folder if folder.is_dir() else None


def fetch(name: str) -> None:
    """Install a reader; under its name is only what is whole."""
    folder = READERS / name
    temporary = READERS / f"{name}.part"
    shutil.rmtree(temporary, ignore_errors=True)
    pip = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-deps", "--target"]
    subprocess.run([*pip, str(temporary), *FOLDERS[name]], check=True)
    temporary.rename(folder)


if __name__ == "__main__":
    for each in sys.argv[1:] or FOLDERS:
        if place_of(each) is None:
            fetch(each)
