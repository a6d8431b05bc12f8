"""Input files -> rows -> records. A row is one object of the file, a record one text pair (or text) with an id.

Text files are cut into units by bytes of the decompressed text, Parquet files and folders that Hugging Face `datasets`
reads by row numbers. A row is counted even if it is blank.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow
from pyarrow import parquet

from data_prep.hub import refuse_pointer
from data_prep.publish import sha256_of
from data_prep.textfile import TEXT_FORMATS, Piece, Row, TextFile, text_suffix

if TYPE_CHECKING:
    from data_prep.saved import Tables

_LARGEST_WHOLE = 1 << 53  # of which a float holds every whole number


def open_input(path: Path, name: str, split: str = "train", quotes: str = "auto") -> TextFile | ArrowFile:
    """An input by what its name ends in; of a folder the part that `name` says after #, or the one for `split`.

    Raises:
        FileNotFoundError: it is missing.
        ValueError: its format is not known, or which part of a folder is meant.
    """
    if path.is_dir():
        return ArrowFile(path, name, split)
    if not path.is_file():
        raise FileNotFoundError(f"{name}: no such file; check the data.train, data.validation and data.test paths")
    refuse_pointer(path)
    if path.suffix == ".parquet":
        return ArrowFile(path, name)
    if text_suffix(path) not in TEXT_FORMATS:
        raise ValueError(f"{name}: unknown format; known are {', '.join((*TEXT_FORMATS, '.parquet'))}, .gz and .zst")
    return TextFile(path, name, quotes)


# ---- Parquet, and folders of tables


class ArrowFile:
    """A Parquet file, or a part of a folder that `datasets` reads."""

    quotes = ""

    def __init__(self, path: Path, name: str, split: str = "train") -> None:
        self._path, self._name, self._split = path, name, split
        self._opened: Tables | _Parquet | None = None

    def identity(self) -> tuple[int, str]:
        """Size in bytes and sha256 (of a part of a folder: of its files)."""
        return self._open().identity()

    def has_changed(self, size: int, sha256: str) -> bool:
        """Compare with the plan."""
        return self.identity() != (size, sha256)

    def scan(self, rows_per_piece: int, max_line_bytes: int) -> list[Piece]:
        """Cut by row numbers. A file without a row raises ValueError."""
        num_rows = self._open().num_rows()
        if not num_rows:
            raise ValueError(f"{self._name}: the file holds no record; remove it from the recipe or fill it")
        return [Piece(first, min(first + rows_per_piece, num_rows)) for first in range(0, num_rows, rows_per_piece)]

    def rows(self, piece: Piece) -> Iterator[tuple[str, Row | None]]:
        """(file: row for messages, row) of a piece."""
        stop = min(piece.stop, self._open().num_rows())
        for number, row in enumerate(self._open().rows(piece.start, stop), start=piece.start):
            yield f"{self._name}: row {number + 1}", row

    def _open(self) -> Tables | _Parquet:
        if self._opened is None:
            if self._path.is_file():
                self._opened = _Parquet(self._path, self._name)
            else:
                from data_prep.saved import Tables  # `datasets` is loaded by those who need it only

                self._opened = Tables(self._path, self._name, self._split, self._name.partition("#")[2])
        return self._opened


class _Parquet:
    def __init__(self, path: Path, name: str) -> None:
        self._path, self._name = path, name
        try:
            self._file = parquet.ParquetFile(path)
        except (pyarrow.ArrowException, OSError) as err:
            raise ValueError(f"{name}: not a whole file of this format ({err}); fetch it again") from err
        metadata = self._file.metadata
        self._sizes = [metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)]
        self._group: tuple[int, Any] = (-1, None)

    def identity(self) -> tuple[int, str]:
        return self._path.stat().st_size, sha256_of(self._path)

    def num_rows(self) -> int:
        return sum(self._sizes)

    def rows(self, start: int, stop: int) -> Iterator[Row]:
        first = 0
        for group, size in enumerate(self._sizes):
            begin, end = max(start, first), min(stop, first + size)
            if begin < end:
                if self._group[0] != group:
                    try:
                        self._group = (group, self._file.read_row_group(group))
                    except (pyarrow.ArrowException, OSError) as err:
                        raise ValueError(f"{self._name}: damaged ({err}); fetch it again") from err
                yield from self._group[1].slice(begin - first, end - begin).to_pylist()
            first += size


# ---- records


@dataclass(frozen=True)
class Record:
    """One text pair as it is encoded, the prefix added; the target of raw text is empty."""

    id: str
    source: str
    target: str
    null: str = ""
    """The side that is null instead of a text, if one is."""
    others: tuple[str, ...] = ()
    """Further references, where the target field holds a list."""
    languages: tuple[str, str] = ("", "")
    """Of source and target, where they are told."""


class Fields:
    """Where the texts are in a row; dotted paths go into nested objects. `target` is None for raw text."""

    def __init__(
        self, source: str, target: str | None, prefix: str = "", source_language: str = "", target_language: str = ""
    ) -> None:
        self._source, self._target = source, target
        self._prefix = Template("prefix", prefix)
        self._languages = Template("source_language", source_language), Template("target_language", target_language)

    def record(self, row: Row, place: str, default_id: str) -> Record:
        """A row as a record. ValueError begins with `place`.

        An empty source stays empty, so that a prefix alone is not taken for a text.
        """
        source = _text(self._source, "source_field", row, place)
        target: str | None = ""
        others: tuple[str, ...] = ()
        if self._target is not None:
            target, others = _references(self._target, row, place)
        name, languages = _id(row, place, default_id), self._languages_of(row, place)
        if source is None or target is None:
            return Record(name, source or "", target or "", "target" if source else "source", languages=languages)
        if source.strip():
            source = self._prefix.fill(row, place) + source
        return Record(name, source, target, others=others, languages=languages)

    def _languages_of(self, row: Row, place: str) -> tuple[str, str]:
        source, target = self._languages
        return source.fill(row, place), target.fill(row, place)


class Template:
    """The text of a setting in which fields of the record stand in braces."""

    def __init__(self, setting: str, text: str) -> None:
        self._setting, self._fixed = setting, "{" not in text
        self._parts: list[tuple[str, str]] = []
        """(text, the field that follows it); the last one is followed by none."""
        while "{" in text:
            before, _, rest = text.partition("{")
            field, brace, text = rest.partition("}")
            if not brace or not field:
                raise ValueError(f"data.{setting} has a brace without a field: {before}{{{rest!r}; write {{field}}")
            self._parts.append((before, field))
        self._parts.append((text, ""))

    def fill(self, row: Row, place: str) -> str:
        """The text for a row. ValueError begins with `place`."""
        if self._fixed:
            return self._parts[0][0]
        return "".join(text + (self._field(name, row, place) if name else "") for text, name in self._parts)

    def cut(self, text: str) -> str:
        """A text without what `fill` has put before it. A field ends where the text behind it comes first."""
        pattern = "".join(re.escape(fixed) + (".*?" if name else "") for fixed, name in self._parts)
        return text[found.end() :] if (found := re.match(pattern, text, re.DOTALL)) else text

    def _field(self, name: str, row: Row, place: str) -> str:
        text = _text(name, self._setting, row, place)
        if text is None:
            raise ValueError(f"{place}: field {name!r} is null, and data.{self._setting} needs it")
        return text


def _id(row: Row, place: str, default_id: str) -> str:
    given = row.get("id")
    if given is None or given != given:  # a table that lacks some ids has null or not-a-number there
        return default_id
    if isinstance(given, float):  # also what JSON's whole numbers of more than 64 bits are read as
        if not given.is_integer() or abs(given) > _LARGEST_WHOLE:
            raise ValueError(f"{place}: field 'id' is the number {given!r}; write it as a text")
        given = int(given)
    return str(given)


def _references(dotted: str, row: Row, place: str) -> tuple[str | None, tuple[str, ...]]:
    """(text of the target field, the others where it holds a list of texts); blank ones of a list do not count."""
    value = _value(dotted, "target_field", row, place)
    if not isinstance(value, list | tuple):
        return _checked(value, dotted, "target_field", place), ()
    texts = [text for each in value if (text := _checked(each, dotted, "target_field", place)) and text.strip()]
    return (texts[0], tuple(texts[1:])) if texts else (None, ())


def _text(dotted: str, setting: str, row: Row, place: str) -> str | None:
    """The text of a field; None where it or what holds it is null."""
    return _checked(_value(dotted, setting, row, place), dotted, setting, place)


def _value(dotted: str, setting: str, row: Row, place: str) -> Any:
    """What a field holds; None where it or what holds it is null."""
    value: Any = row
    for name in dotted.split("."):
        if value is None:
            return None
        if not isinstance(value, dict) or name not in value:
            present = ", ".join(_leaves(row)) or "none"
            raise ValueError(f"{place}: no field {dotted!r}; present: {present}; set data.{setting}")
        value = value[name]
    return value


def _checked(value: Any, dotted: str, setting: str, place: str) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str):
        raise ValueError(f"{place}: field {dotted!r} is of type {type(value).__name__}, not a text; set data.{setting}")
    if "\0" in value:
        raise ValueError(f"{place}: field {dotted!r} holds a NUL character; remove it")
    return value


def _leaves(row: Row, before: str = "") -> list[str]:
    names: list[str] = []
    for name, value in row.items():
        names += _leaves(value, f"{before}{name}.") if isinstance(value, dict) else [f"{before}{name}"]
    return names
