"""Folders of tables, read by `datasets` itself: what it saved (one table, or a dictionary of parts), and the layout of
data sets of the hub (files by part and configuration). The only file that imports it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets

from data_prep.publish import sha256_of

_AT_ONCE = 1000  # rows
_NAMES = {"train": ("train",), "validation": ("validation", "valid", "val", "dev"), "test": ("test",)}


class Tables:
    """The rows of one part of a folder, features decoded: class labels by name, translations by language."""

    def __init__(self, path: Path, name: str, split: str, part: str) -> None:
        datasets.disable_progress_bars()
        datasets.logging.set_verbosity_error()
        self._name = name
        try:
            table, self._files = _open(path, name, split, part)
        except _NotNamedError:
            raise
        except Exception as err:  # the library and Arrow raise many kinds
            text = " ".join(str(err).split())
            raise ValueError(
                f"{name}: `datasets` cannot read this folder ({text}); check it or fetch it again"
            ) from err
        self._decode = {column: decoder for column, each in table.features.items() if (decoder := _decoder(each))}
        self._table = table.with_format("arrow")  # rows of a selection or filter in their order, no media decoded

    def identity(self) -> tuple[int, str]:
        """Size in bytes and sha256 of the files of this part."""
        digests = "".join(sha256_of(file) for file in self._files)
        return sum(file.stat().st_size for file in self._files), hashlib.sha256(digests.encode()).hexdigest()

    def num_rows(self) -> int:
        """Rows of the part."""
        return len(self._table)

    def rows(self, start: int, stop: int) -> Iterator[dict[str, Any]]:
        """Rows start..stop-1."""
        for first in range(start, stop, _AT_ONCE):
            for row in self._table[first : min(first + _AT_ONCE, stop)].to_pylist():
                yield {**row, **{column: decoder(row[column]) for column, decoder in self._decode.items()}}


class _NotNamedError(ValueError):
    """Which part of a folder is meant is not said."""


def _open(path: Path, name: str, split: str, part: str) -> tuple[datasets.Dataset, list[Path]]:
    """A part and the files it is made of."""
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        saved = datasets.load_from_disk(str(path))
        if isinstance(saved, datasets.DatasetDict):
            saved = saved[_part(list(saved), name, split, part)]
        elif part:
            raise _NotNamedError(f"{name}: one table, without parts; leave out #{part}")
        return saved, [Path(file["filename"]) for file in saved.cache_files]
    configuration, _, part = part.rpartition("/")
    builder = datasets.load_dataset_builder(str(path), configuration or None)
    chosen = _part(list(builder.config.data_files or {}), name, split, part)
    builder.download_and_prepare(verification_mode="no_checks")  # what a README promises of files that were left out
    return builder.as_dataset(split=chosen), [Path(file) for file in builder.config.data_files[chosen]]


def _part(names: list[str], name: str, split: str, part: str) -> str:
    """The part that is named, or the one that has the name of our split."""
    for each in (part,) if part else _NAMES[split]:
        if each in names:
            return each
    wanted = f"{name.partition('#')[0]}#{(names or [split])[0]}"
    raise _NotNamedError(
        f"{name}: a folder of the parts {', '.join(names) or 'none'}; name the one for {split}, such as {wanted}"
    )


Decoder = Callable[[Any], Any]


def _decoder(feature: Any) -> Decoder | None:
    """What makes a stored value what its feature says; None where it is that already."""
    if isinstance(feature, datasets.ClassLabel):
        return lambda value: None if value is None or value < 0 else feature.int2str(value)
    if isinstance(feature, datasets.TranslationVariableLanguages):
        return lambda value: value and dict(zip(value["language"], value["translation"], strict=True))
    if isinstance(feature, (datasets.List, datasets.LargeList, list)):
        inner = _decoder(feature[0] if isinstance(feature, list) else feature.feature)
        return inner and (lambda values: values and [inner(value) for value in values])
    if isinstance(feature, dict):
        inside = {key: decoder for key, each in feature.items() if (decoder := _decoder(each))}
        if inside:
            return lambda value: value and {**value, **{key: decoder(value[key]) for key, decoder in inside.items()}}
    return None
