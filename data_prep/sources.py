"""Input files -> records. A record is one text pair with an id; a line is counted even if it is blank."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast


@dataclass(frozen=True)
class Record:
    """One text pair as it is encoded, the prefix not yet added."""

    id: str
    source: str
    target: str


@dataclass(frozen=True)
class Fields:
    """Where the texts are in a JSON object; dotted paths go into nested objects."""

    source: str
    target: str


def open_lines(path: Path) -> IO[bytes]:
    """Open a JSONL file, plain or gzipped, for reading lines as bytes. A missing file raises FileNotFoundError."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; check the data.train, data.validation and data.test paths")
    return cast(IO[bytes], gzip.open(path, "rb")) if path.suffix == ".gz" else path.open("rb")


def read_lines(path: Path) -> Iterator[bytes]:
    """The lines of a JSONL file as bytes. A truncated or damaged gzip file raises ValueError."""
    try:
        with open_lines(path) as lines:
            yield from lines
    except (EOFError, zlib.error, gzip.BadGzipFile) as err:
        raise ValueError(f"{path}: the gzip file is truncated or damaged ({err}); fetch it again") from err


def count_lines(path: Path) -> int:
    """Number of lines of a JSONL file (blank ones too). A file with no record raises ValueError."""
    num_lines = num_blank = 0
    for line in read_lines(path):
        num_lines += 1
        num_blank += line.isspace()
    if num_lines == num_blank:
        raise ValueError(f"{path}: the file holds no record; remove it from the recipe or fill it")
    return num_lines


def parse_line(line: bytes, fields: Fields, place: str, default_id: str) -> Record | None:
    """One line as a record; None for a blank line. `place` (file:line) begins every error."""
    if line.isspace() or not line:
        return None
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as err:
        raise ValueError(f"{place}: not UTF-8 (byte {err.start} of the line); convert the file to UTF-8") from err
    except json.JSONDecodeError as err:
        raise ValueError(f"{place}: not a JSON object ({err.msg} at column {err.colno}); one object a line") from err
    if not isinstance(row, dict):
        raise ValueError(f"{place}: a JSON {type(row).__name__}, not an object; write one object a line")
    source = _text(row, fields.source, "source", place)
    target = _text(row, fields.target, "target", place)
    return Record(str(row.get("id", default_id)), source, target)


def _text(row: dict[str, Any], dotted: str, role: str, place: str) -> str:
    value: Any = row
    for name in dotted.split("."):
        if not isinstance(value, dict) or name not in value:
            present = ", ".join(_leaves(row)) or "none"
            raise ValueError(f"{place}: no field {dotted!r}; present: {present}; set data.{role}_field")
        value = value[name]
    if not isinstance(value, str):
        raise ValueError(f"{place}: field {dotted!r} is a {type(value).__name__}, not a text; set data.{role}_field")
    return value


def _leaves(row: dict[str, Any], before: str = "") -> list[str]:
    names: list[str] = []
    for name, value in row.items():
        names += _leaves(value, f"{before}{name}.") if isinstance(value, dict) else [f"{before}{name}"]
    return names
