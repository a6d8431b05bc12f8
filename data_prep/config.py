"""Settings of the data stage, and the three kinds of settings of the whole pipeline (standard library only)."""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar, cast

MAX_LENGTH = 65_535  # shards.py stores lengths as uint16

T = TypeVar("T")


def identity(default: T) -> T:
    """A field that says WHAT is made: another value makes another output and is refused in a half-finished one."""
    return _field(default, "identity")


def schedule(default: T) -> T:
    """A field that says HOW LONG: a finished stage may be continued with another value."""
    return _field(default, "schedule")


def operational(default: T) -> T:
    """A field that says HOW it is run: another value changes no output."""
    return _field(default, "operational")


def _field(default: T, kind: str) -> T:
    return cast(T, dataclasses.field(default=default, metadata={"kind": kind}))


def identity_settings(config: Any) -> dict[str, Any]:
    """The identity fields of a settings dataclass as a JSON-able dict (tuples become lists)."""
    values = {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.metadata["kind"] == "identity"}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The `data:` section of a recipe."""

    corpus: str = identity("demo")
    """"demo" generates the built-in English-German corpus; "files" reads the JSONL files named below."""

    num_demo_pairs: int = identity(34_000)
    """Distinct pairs of the built-in corpus, all parts together."""

    num_validation: int = identity(500)
    """Pairs of the built-in corpus kept for validation."""

    num_test: int = identity(500)
    """Pairs of the built-in corpus kept for the test; 40 % of them combine kinds that training never combines."""

    seed: int = identity(0)
    """Seed of the built-in corpus."""

    train: tuple[str, ...] = identity(())
    """JSONL files (plain or .gz) of the training part, in order."""

    validation: tuple[str, ...] = identity(())
    """JSONL files of the validation part."""

    test: tuple[str, ...] = identity(())
    """JSONL files of the test part."""

    source_field: str = identity("source")
    """Field with the input text; a dotted path reads nested objects (translation.en)."""

    target_field: str = identity("target")
    """Field with the output text; a dotted path reads nested objects (translation.de)."""

    prefix: str = identity("")
    """Text put before every source, for example "summarize: "."""

    tokenizer: str = identity("")
    """Folder with spiece.model or tokenizer.json; empty trains SentencePiece on the training part."""

    vocab_size: int = identity(512)
    """Pieces of a trained SentencePiece model (an upper limit: a small corpus may give fewer)."""

    split_digits: bool = identity(True)
    """Whether a trained SentencePiece model makes every digit its own piece."""

    max_source_tokens: int = identity(512)
    """Longer sources are truncated to this many tokens, end-of-sequence included, and counted."""

    max_target_tokens: int = identity(128)
    """Longer targets are truncated to this many tokens, end-of-sequence included, and counted."""

    examples_per_block: int = identity(256)
    """Examples in one block (one tar member)."""

    blocks_per_shard: int = identity(16)
    """Blocks in one shard (one tar file, the unit of work of a rank)."""

    def __post_init__(self) -> None:
        """Check every range, so that a bad recipe fails before any work."""
        if self.corpus not in ("demo", "files"):
            raise ValueError(f'data.corpus is {self.corpus!r}: choose "demo" or "files"')
        if self.corpus == "files" and not self.train:
            raise ValueError('data.train is empty: name at least one JSONL file, or set data.corpus to "demo"')
        for name, low, high in (
            ("num_demo_pairs", 1, 10_000_000),
            ("num_validation", 1, 1_000_000),
            ("num_test", 1, 1_000_000),
            ("seed", 0, 2**63 - 1),
            ("vocab_size", 64, 1_000_000),
            ("max_source_tokens", 2, MAX_LENGTH),
            ("max_target_tokens", 2, MAX_LENGTH),
            ("examples_per_block", 1, 65_536),
            ("blocks_per_shard", 1, 65_536),
        ):
            value = getattr(self, name)
            if not low <= value <= high:
                raise ValueError(f"data.{name} is {value}: choose a value from {low} to {high}")
        for name in ("source_field", "target_field"):
            if not all(getattr(self, name).split(".")):
                raise ValueError(f"data.{name} is {getattr(self, name)!r}: give a field name such as translation.en")
        num_held_back = self.num_validation + self.num_test
        if self.corpus == "demo" and self.num_demo_pairs <= num_held_back:
            raise ValueError(
                f"data.num_demo_pairs is {self.num_demo_pairs}, but validation and test take {num_held_back}: "
                f"raise it above {num_held_back}"
            )
