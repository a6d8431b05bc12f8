"""Settings of the data stage, and the three kinds of settings of the whole pipeline (standard library only)."""

from __future__ import annotations

import dataclasses
import operator
from typing import Any, ClassVar, TypedDict, TypeVar, Unpack, cast

MAX_LENGTH = 65_535  # shards.py stores lengths as uint16

MAX_SUM_OF_WEIGHTS = 10_000

T = TypeVar("T")

NEVER: Any = object()


class Limits(TypedDict, total=False):
    """What a field may hold; of a tuple, each of its values."""

    low: float
    above: float
    high: float
    below: float
    choices: tuple[str, ...]


LIMITS = {
    "low": (operator.ge, "at least {}"),
    "above": (operator.gt, "more than {}"),
    "high": (operator.le, "at most {}"),
    "below": (operator.lt, "less than {}"),
    "choices": (lambda value, choices: value in choices, "one of {}"),
}
"""(whether a value keeps to the limit, the limit in words)"""


def identity(default: T, *, before: Any = NEVER, **limits: Unpack[Limits]) -> T:
    """A field that says WHAT is made: another value makes another output and is refused in a half-finished one.

    Args:
        before: what was done when there was no such field. With that value the field is left out of what outputs are
            known by, so that those from then still count.
    """
    return _field(default, "identity", limits, before)


def schedule(default: T, **limits: Unpack[Limits]) -> T:
    """A field that says HOW LONG: a finished stage may be continued with another value."""
    return _field(default, "schedule", limits)


def operational(default: T, **limits: Unpack[Limits]) -> T:
    """A field that says HOW it is run: another value changes no output."""
    return _field(default, "operational", limits)


def _field(default: T, kind: str, limits: Limits, before: Any = NEVER) -> T:
    return cast(T, dataclasses.field(default=default, metadata={"kind": kind, "limits": limits, "before": before}))


def check_limits(config_class: type[Any], values: Any, place: str = "") -> None:
    """Hold every field of a settings dataclass, at any depth, against its limits.

    Args:
        values: has the dataclass's fields as attributes.
        place: what stands before a field's name in messages.

    Raises:
        ValueError: names the field, its value and what to choose.
    """
    for field in dataclasses.fields(config_class):
        value, name = getattr(values, field.name), f"{place}{field.name}"
        if field.default_factory is not dataclasses.MISSING:
            check_limits(type(field.default_factory()), value, f"{name}.")
        else:
            for each in value if isinstance(value, tuple) else (value,):
                _check(name, each, field.metadata["limits"])


def _check(name: str, value: Any, limits: dict[str, Any]) -> None:
    if value is not None and not all(LIMITS[limit][0](value, bound) for limit, bound in limits.items()):
        bounds = {limit: ", ".join(bound) if limit == "choices" else bound for limit, bound in limits.items()}
        words = [LIMITS[limit][1].format(bound) for limit, bound in bounds.items()]
        raise ValueError(f"{name} is {value!r}: choose {' and '.join(words)}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """A section of a recipe: all its fields keep to their limits."""

    place: ClassVar[str] = ""
    """What stands before a field's name in messages."""

    def __post_init__(self) -> None:
        check_limits(type(self), self, self.place)


def identity_settings(config: Any) -> dict[str, Any]:
    """The identity fields of a settings dataclass as a JSON-able dict (tuples become lists), without those that have a
    default which is what was done when there was no such field."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.metadata["kind"] == "identity" and not value == field.default == field.metadata["before"]:
            found[field.name] = value
            if isinstance(value, tuple):
                found[field.name] = [identity_settings(each) if isinstance(each, Settings) else each for each in value]
    return found


TASKS = ("pairs", "span_corruption")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SetConfig(Settings):
    """One set of a mixture. Its files are of the same kinds as data.train."""

    place: ClassVar[str] = "data.sets: "

    name: str = identity("data")
    """Name of the set in messages and statistics."""

    train: tuple[str, ...] = identity(())
    """Files of the training part, in order."""

    validation: tuple[str, ...] = identity(())
    """Files of the validation part."""

    test: tuple[str, ...] = identity(())
    """Files of the test part."""

    task: str = identity("pairs", choices=TASKS)
    """"pairs" reads a source and a target; "span_corruption" makes T5's denoising task of the texts in source_field."""

    source_field: str = identity("source")
    """Field with the input text; a dotted path reads nested objects (translation.en)."""

    target_field: str = identity("target")
    """Field with the output text; a dotted path reads nested objects (translation.de). In validation and test it may
    hold a list of texts: they are references of one example, the first of which is the target."""

    quotes: str = identity("auto", before="cells", choices=("auto", "cells", "text"))
    """What quotes mean in CSV and TSV: "cells", a program put cells in them; "text", they are characters of the texts;
    "auto", cells in CSV, and in TSV what the whole file speaks for (refused where it could be either)."""

    prefix: str = identity("")
    """Text put before every source. Fields of the record in braces are filled in, which makes a language tag:
    "translate {src_lang} to {tgt_lang}: "."""

    source_language: str = identity("", before="")
    """Language of the sources, for a tokenizer that begins every text with the token of one (NLLB's eng_Latn, M2M100's
    en, mBART-50's en_XX). Fields of the record in braces are filled in: {src_lang}."""

    target_language: str = identity("", before="")
    """Language of the targets, likewise; the test part's scores are told by it, too."""

    licence: str = identity("")
    """Where the files come from and under what terms; kept in the manifest."""

    weight: int = identity(0, low=0)
    """Share in the mixture: of every sum-of-weights examples, this many are of this set, exactly. 0 in all sets: by
    size."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_set(self, self.place)
        if not self.train:
            raise ValueError(f"data.sets: set {self.name!r} has no train files; name at least one")

    def refuse_unsaid_languages(self) -> None:
        """ValueError where the languages, which a tokenizer with tokens of languages needs, are not told."""
        for name in ("source_language", "target_language"):
            if not getattr(self, name):
                raise ValueError(
                    f"data.{name} is empty, but the tokenizer begins every text with the token of its language: give "
                    f"one, such as eng_Latn, or the field of the records that tells it, such as {{src_lang}}"
                )


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig(Settings):
    """The `data:` section of a recipe. Files of a single set are named here; those of a mixture in `sets`."""

    place: ClassVar[str] = "data."

    corpus: str = identity("demo", choices=("demo", "files"))
    """"demo" generates the built-in English-German corpus; "files" reads the files named below."""

    num_demo_pairs: int = identity(34_000, low=1, high=10_000_000)
    """Distinct pairs of the built-in corpus, all parts together."""

    num_validation: int = identity(500, low=1, high=1_000_000)
    """Pairs of the built-in corpus kept for validation."""

    num_test: int = identity(500, low=1, high=1_000_000)
    """Pairs of the built-in corpus kept for the test; 40 % of them combine kinds that training never combines."""

    seed: int = identity(0, low=0, high=2**63 - 1)
    """Seed of the built-in corpus and of span corruption."""

    train: tuple[str, ...] = identity(())
    """Files of the training part, in order: JSONL, CSV, TSV or plain text (each also .gz or .zst), Parquet, folders
    that Hugging Face `datasets` reads (what it saved, or the layout of data sets of the hub; FOLDER#PART or
    FOLDER#CONFIGURATION/PART names another part than this one's), a hub data set at a commit, or files of it:
    hub:datasets/OWNER/NAME@COMMIT/data/*.parquet."""

    validation: tuple[str, ...] = identity(())
    """Files of the validation part."""

    test: tuple[str, ...] = identity(())
    """Files of the test part."""

    task: str = identity("pairs", choices=TASKS)
    """"pairs" reads a source and a target; "span_corruption" makes T5's denoising task of the texts in source_field."""

    source_field: str = identity("source")
    """Field with the input text; a dotted path reads nested objects (translation.en)."""

    target_field: str = identity("target")
    """Field with the output text; a dotted path reads nested objects (translation.de). In validation and test it may
    hold a list of texts: they are references of one example, the first of which is the target."""

    quotes: str = identity("auto", before="cells", choices=("auto", "cells", "text"))
    """What quotes mean in CSV and TSV: "cells", a program put cells in them; "text", they are characters of the texts;
    "auto", cells in CSV, and in TSV what the whole file speaks for (refused where it could be either)."""

    prefix: str = identity("")
    """Text put before every source, for example "summarize: ". Fields of the record in braces are filled in, which
    makes a language tag: "translate {src_lang} to {tgt_lang}: "."""

    source_language: str = identity("", before="")
    """Language of the sources, for a tokenizer that begins every text with the token of one (NLLB's eng_Latn, M2M100's
    en, mBART-50's en_XX). Fields of the record in braces are filled in: {src_lang}."""

    target_language: str = identity("", before="")
    """Language of the targets, likewise; the test part's scores are told by it, too."""

    licence: str = identity("")
    """Where the files come from and under what terms; kept in the manifest."""

    sets: tuple[SetConfig, ...] = identity(())
    """The sets of a mixture, each with its own files, fields, prefix and weight, instead of the ones above."""

    drop_empty: bool = identity(False)
    """Leave out records with an empty source or target and count them; otherwise they are refused."""

    drop_duplicates: bool = identity(False)
    """Leave out records whose source and target have occurred in the same part before, and count them."""

    max_line_bytes: int = identity(1_000_000, low=1, high=2**40)
    """Longest line of a text file; a longer one is refused, because it is rarely what it should be."""

    tokenizer: str = identity("")
    """Folder with spiece.model or tokenizer.json, or hub:owner/name[@revision]; empty trains SentencePiece on the
    training part."""

    vocab_size: int = identity(512, low=64, high=1_000_000)
    """Pieces of a trained SentencePiece model (an upper limit: a small corpus may give fewer)."""

    split_digits: bool = identity(True)
    """Whether a trained SentencePiece model makes every digit its own piece."""

    max_source_tokens: int = identity(512, low=2, high=MAX_LENGTH)
    """Longer sources are truncated to this many tokens, end-of-sequence included, and counted. Span corruption makes
    every source this long."""

    max_target_tokens: int = identity(128, low=2, high=MAX_LENGTH)
    """Longer targets are truncated to this many tokens, end-of-sequence included, and counted."""

    noise_density: float = identity(0.15, low=0.001, high=0.999)
    """Span corruption: share of the tokens that are masked."""

    mean_span_tokens: float = identity(3.0, low=1, high=1000)
    """Span corruption: mean length of a masked span."""

    examples_per_block: int = identity(256, low=1, high=65_536)
    """Examples in one block (one tar member)."""

    blocks_per_shard: int = identity(16, low=1, high=65_536)
    """Blocks in one shard (one tar file, the unit of work of a rank)."""

    compress: bool = identity(False)
    """Compress blocks with zstd: smaller files, slower reading."""

    patience_s: float = operational(300.0, low=0)
    """Seconds without a new shard after which rank 0 takes the missing ranks for dead."""

    def __post_init__(self) -> None:
        """Check every range, so that a bad recipe fails before any work."""
        super().__post_init__()
        if self.corpus == "files" and not self.train and not self.sets:
            raise ValueError('data.train is empty: name at least one file, or set data.corpus to "demo"')
        if self.sets and (self.train or self.validation or self.test):
            raise ValueError("data.sets and data.train are both given: move all files into data.sets")
        given = next((name for name in ("sets", "train", "validation", "test") if getattr(self, name)), None)
        if given and self.corpus == "demo":
            raise ValueError(f'data.{given} is given but data.corpus is "demo": set data.corpus to "files"')
        _check_set(self, self.place)
        self._check_mixture()
        num_held_back = self.num_validation + self.num_test
        if self.corpus == "demo" and self.num_demo_pairs <= num_held_back:
            raise ValueError(
                f"data.num_demo_pairs is {self.num_demo_pairs}, but validation and test take {num_held_back}: "
                f"raise it above {num_held_back}"
            )

    def _check_mixture(self) -> None:
        names = [each.name for each in self.sets]
        if len(set(names)) < len(names):
            raise ValueError(f"data.sets has two sets of one name ({', '.join(names)}): name each differently")
        weights = [each.weight for each in self.sets]
        if any(weights) and not all(weights):
            raise ValueError(f"data.sets has weights {weights}: give every set a weight of 1 or more, or none a weight")
        if sum(weights) > MAX_SUM_OF_WEIGHTS:
            raise ValueError(f"data.sets has weights {weights}: their sum may be {MAX_SUM_OF_WEIGHTS} at most")

    @property
    def all_sets(self) -> tuple[SetConfig, ...]:
        """The sets of the mixture; one set where the files are named directly."""
        if self.sets:
            return self.sets
        files = {split: getattr(self, split) for split in ("train", "validation", "test")}
        if self.corpus == "demo":
            files = {split: (f"corpus/{split}.jsonl",) for split in files}
        shared = {field.name for field in dataclasses.fields(SetConfig)} & vars(self).keys()
        return (SetConfig(**{name: getattr(self, name) for name in shared} | files),)


def _check_set(config: SetConfig | DataConfig, place: str) -> None:
    for name in ("source_field", "target_field"):
        if not all(getattr(config, name).split(".")):
            raise ValueError(f"{place}{name} is {getattr(config, name)!r}: give a field name such as translation.en")
    if config.task == "span_corruption" and (
        config.test or config.prefix or config.source_language or config.target_language
    ):
        raise ValueError(
            f"{place}task is span_corruption, which has no test texts, prefix or languages: leave them empty"
        )
    if config.task == "pairs" and config.source_field == config.target_field:
        raise ValueError(f"{place}source_field and target_field are both {config.source_field!r}: name two fields")
