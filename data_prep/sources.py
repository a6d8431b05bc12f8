"""Input files -> rows -> records. A row is one object of the file, a record one text pair (or text) with an id.

Text files (JSONL, CSV, TSV, plain text; each also .gz or .zst) are cut into units by bytes of the decompressed text,
Parquet files and folders that Hugging Face `datasets` saved by row numbers. A row is counted even if it is blank.
"""

from __future__ import annotations

import contextlib
import csv
import gzip
import hashlib
import io
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import IO, Any, cast

import orjson
from backports import zstd

from data_prep.publish import sha256_of

Row = dict[str, Any]
_MAX_UNIT_BYTES = 16 << 20  # a unit of long texts ends here, so that ranks share a file of few records
_COMPRESSED: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".zst": zstd.open}
_BUFFER_BYTES = 1 << 20
_TEXT_FORMATS = (".jsonl", ".json", ".csv", ".tsv", ".txt")
csv.field_size_limit(1 << 30)  # max_line_bytes is the limit


@dataclass(frozen=True)
class Piece:
    """Rows start..stop-1 of a file; of a text file also where they lie in the decompressed text, and its sha256."""

    start: int
    stop: int
    offset: int = 0
    bytes: int = 0
    sha256: str = ""


def open_input(path: Path, name: str) -> TextFile | ArrowFile:
    """An input by what its name ends in. FileNotFoundError if it is missing, ValueError if its format is not known."""
    if path.is_dir() and (path / "state.json").is_file():
        return ArrowFile(path, name)
    if path.is_dir() and (path / "dataset_dict.json").is_file():
        parts = ", ".join(json.loads((path / "dataset_dict.json").read_text())["splits"])
        raise ValueError(f"{name}: a folder of several splits; name one of them: {name}/ and {parts}")
    if not path.is_file():
        raise FileNotFoundError(f"{name}: no such file; check the data.train, data.validation and data.test paths")
    if path.suffix == ".parquet":
        return ArrowFile(path, name)
    if _text_suffix(path) not in _TEXT_FORMATS:
        raise ValueError(f"{name}: unknown format; known are {', '.join((*_TEXT_FORMATS, '.parquet'))}, .gz and .zst")
    return TextFile(path, name)


def _text_suffix(path: Path) -> str:
    return Path(path.stem).suffix if path.suffix in _COMPRESSED else path.suffix


# ---- text files


class TextFile:
    """A JSONL, CSV, TSV or plain text file. Damage of the compression raises ValueError."""

    def __init__(self, path: Path, name: str) -> None:
        self._path, self._name = path, name
        self._stream: IO[bytes] | None = None
        self._header: bytes | None = None
        suffix = _text_suffix(path)
        self._delimiter = {".csv": ",", ".tsv": "\t"}.get(suffix)
        self._parse: Callable[[bytes, str], Row | None] = _text_row if suffix == ".txt" else _json_row

    def identity(self) -> tuple[int, str]:
        """Size in bytes and sha256."""
        return self._path.stat().st_size, sha256_of(self._path)

    def has_changed(self, size: int, sha256: str) -> bool:
        """Compare with the plan by size; what is read later is compared by the sha256 of its piece."""
        return self._path.stat().st_size != size

    def scan(self, rows_per_piece: int, max_line_bytes: int) -> list[Piece]:
        """Read the file once and cut it. A file without a record and a too long line raise ValueError."""
        pieces: list[Piece] = []
        digests: list[Future[str]] = []
        rows: list[bytes] = []
        stop = size = offset = num_blank = 0

        def cut() -> None:
            pieces.append(Piece(stop - len(rows), stop, offset, size))
            digests.append(hasher.submit(_sha256_of_rows, tuple(rows)))
            rows.clear()

        with ThreadPoolExecutor(1) as hasher:  # hashing takes half as long as reading, and both leave the lock
            for row in self._raw_rows(max_line_bytes):
                if offset == 0 and self._delimiter:
                    offset = len(row)  # the header belongs to no piece
                    continue
                rows.append(row)
                stop += 1
                size += len(row)
                num_blank += row.isspace()
                if len(rows) == rows_per_piece or size >= _MAX_UNIT_BYTES:
                    cut()
                    offset, size = offset + size, 0
            if rows:
                cut()
        if stop == num_blank:
            raise ValueError(f"{self._name}: the file holds no record; remove it from the recipe or fill it")
        return [replace(piece, sha256=digest.result()) for piece, digest in zip(pieces, digests, strict=True)]

    def rows(self, piece: Piece) -> Iterator[tuple[str, Row | None]]:
        """(file:line for messages, row) of a piece; None for a blank line. ValueError if the text has changed."""
        content = self._content(piece)
        if hashlib.sha256(content).hexdigest() != piece.sha256:
            raise ValueError(f"{self._name}: changed since the plan was made; choose another --out")
        if self._delimiter:
            yield from self._csv_rows(content, piece.start)
            return
        # Not splitlines(): that cuts at other characters too.
        lines = content.split(b"\n")
        for number, line in zip(range(piece.start, piece.stop), lines, strict=False):
            place = f"{self._name}:{number + 1}"
            yield place, (self._parse(line, place) if line and not line.isspace() else None)

    def _open(self) -> IO[bytes]:
        opener = _COMPRESSED.get(self._path.suffix)
        if opener is None:
            return self._path.open("rb")
        # lines of a large buffer: Python's gzip reads 8 KiB at a time
        return cast(IO[bytes], io.BufferedReader(opener(self._path, "rb"), _BUFFER_BYTES))

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[None]:
        try:
            yield
        except (EOFError, zlib.error, gzip.BadGzipFile, zstd.ZstdError) as err:
            raise ValueError(f"{self._name}: the file is truncated or damaged ({err}); fetch it again") from err

    def _raw_rows(self, max_line_bytes: int) -> Iterator[bytes]:
        """The lines of the file, those of one CSV row together."""
        number = 0

        def lines() -> Iterator[bytes]:
            nonlocal number
            for number, line in enumerate(stream, start=1):
                if len(line) > max_line_bytes:
                    raise ValueError(
                        f"{self._name}:{number}: a line of {len(line):,} bytes, more than data.max_line_bytes "
                        f"{max_line_bytes:,}: raise that or remove the record"
                    )
                yield line

        with self._open() as stream, self._guarded():
            if not self._delimiter:
                yield from lines()
                return
            pending: list[bytes] = []

            def text_lines() -> Iterator[str]:
                for line in lines():
                    pending.append(line)
                    yield _decode(line, f"{self._name}:{number}")

            try:
                for _ in csv.reader(text_lines(), delimiter=self._delimiter, strict=True):
                    yield b"".join(pending)
                    pending.clear()
            except csv.Error as err:
                raise ValueError(f"{self._name}:{number}: not a row of cells ({err}); check the quoting") from err

    def _content(self, piece: Piece) -> bytes:
        # A rank reads its pieces in order, so the stream of a compressed file goes forward only.
        if self._stream is None or self._stream.tell() > piece.offset:
            self._stream = self._open()
        stream = self._stream
        with self._guarded():
            stream.seek(piece.offset)
            return stream.read(piece.bytes)

    def _csv_rows(self, content: bytes, start: int) -> Iterator[tuple[str, Row | None]]:
        assert self._delimiter
        if self._header is None:
            self._header = next(self._raw_rows(1 << 40))
        head = next(csv.reader([_decode(self._header, self._name).lstrip("\ufeff")], delimiter=self._delimiter))
        text = _decode(content, f"{self._name}: rows from {start + 1}")
        lines = (line + "\n" for line in text.removesuffix("\n").split("\n"))
        for number, cells in enumerate(csv.reader(lines, delimiter=self._delimiter), start=start):
            place = f"{self._name}: row {number + 1}"
            if cells and len(cells) != len(head):
                raise ValueError(f"{place}: {len(cells)} cells where the header has {len(head)}; check the quoting")
            yield place, (dict(zip(head, cells, strict=True)) if cells else None)


def _sha256_of_rows(rows: Sequence[bytes]) -> str:
    return hashlib.sha256(b"".join(rows)).hexdigest()


def _decode(line: bytes, place: str) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as err:
        raise ValueError(f"{place}: not UTF-8 (byte {err.start}); convert the file to UTF-8") from err


def _json_row(line: bytes, place: str) -> Row:
    try:
        row = orjson.loads(line)
    except orjson.JSONDecodeError as err:
        _decode(line, place)
        raise ValueError(f"{place}: not a JSON object ({err.msg} at column {err.colno}); one object a line") from err
    if not isinstance(row, dict):
        raise ValueError(f"{place}: a JSON {type(row).__name__}, not an object; write one object a line")
    return row


def _text_row(line: bytes, place: str) -> Row:
    return {"text": _decode(line, place).rstrip("\r")}


# ---- Parquet and saved datasets


class ArrowFile:
    """A Parquet file, or a folder that `datasets.Dataset.save_to_disk` wrote."""

    def __init__(self, path: Path, name: str) -> None:
        self._path, self._name = path, name
        self._groups: Sequence[int] = ()
        self._read_group: Callable[[int], Any] | None = None
        self._cached: tuple[int, Any] = (-1, None)

    def identity(self) -> tuple[int, str]:
        """Size in bytes and sha256 (of a folder: of its files)."""
        if self._path.is_file():
            return self._path.stat().st_size, sha256_of(self._path)
        files = self._files()
        digests = "".join(sha256_of(file) for file in files)
        return sum(file.stat().st_size for file in files), hashlib.sha256(digests.encode()).hexdigest()

    def has_changed(self, size: int, sha256: str) -> bool:
        """Compare with the plan."""
        return self.identity() != (size, sha256)

    def scan(self, rows_per_piece: int, max_line_bytes: int) -> list[Piece]:
        """Cut by row numbers. A file without a row raises ValueError."""
        num_rows = sum(self._open())
        if not num_rows:
            raise ValueError(f"{self._name}: the file holds no record; remove it from the recipe or fill it")
        return [Piece(first, min(first + rows_per_piece, num_rows)) for first in range(0, num_rows, rows_per_piece)]

    def rows(self, piece: Piece) -> Iterator[tuple[str, Row | None]]:
        """(file: row for messages, row) of a piece."""
        import pyarrow

        sizes = self._open()
        assert self._read_group is not None
        first = 0
        for group, size in enumerate(sizes):
            begin, end = max(piece.start, first), min(piece.stop, first + size)
            if begin < end:
                if self._cached[0] != group:
                    try:
                        self._cached = (group, self._read_group(group))
                    except (pyarrow.ArrowException, OSError) as err:
                        raise ValueError(f"{self._name}: damaged ({err}); fetch it again") from err
                for number, row in enumerate(self._cached[1].slice(begin - first, end - begin).to_pylist(), begin):
                    yield f"{self._name}: row {number + 1}", row
            first += size

    def _files(self) -> list[Path]:
        state = json.loads((self._path / "state.json").read_text(encoding="utf-8"))
        return [self._path / item["filename"] for item in state["_data_files"]]

    def _open(self) -> Sequence[int]:
        """Rows of each group, opening the file at first. pyarrow is imported by those who need it only."""
        if self._read_group is not None:
            return self._groups
        import pyarrow
        from pyarrow import ipc, parquet

        try:
            if self._path.is_file():
                file = parquet.ParquetFile(self._path)
                self._groups = [file.metadata.row_group(i).num_rows for i in range(file.metadata.num_row_groups)]
                self._read_group = file.read_row_group
            else:
                tables = [ipc.open_stream(pyarrow.memory_map(str(path))).read_all() for path in self._files()]
                self._groups = [len(table) for table in tables]
                self._read_group = tables.__getitem__
        except (pyarrow.ArrowException, OSError) as err:
            raise ValueError(f"{self._name}: not a whole file of this format ({err}); fetch it again") from err
        return self._groups


# ---- records


@dataclass(frozen=True)
class Record:
    """One text pair as it is encoded, the prefix added; the target of raw text is empty."""

    id: str
    source: str
    target: str


class Fields:
    """Where the texts are in a row; dotted paths go into nested objects. `target` is None for raw text."""

    def __init__(self, source: str, target: str | None, prefix: str = "") -> None:
        self._source, self._target = source, target
        self._prefix = _template(prefix)

    def record(self, row: Row, place: str, default_id: str) -> Record:
        """A row as a record. ValueError begins with `place`.

        An empty source stays empty, so that a prefix alone is not taken for a text.
        """
        source = _text(self._source, "source_field", row, place)
        target = "" if self._target is None else _text(self._target, "target_field", row, place)
        if source.strip():
            source = "".join(part if isinstance(part, str) else part(row, place) for part in self._prefix) + source
        given_id = row.get("id", default_id)
        if isinstance(given_id, float):  # also what JSON's whole numbers of more than 64 bits are read as
            raise ValueError(f"{place}: field 'id' is the number {given_id!r}; write it as a text")
        return Record(str(given_id), source, target)


def _template(prefix: str) -> list[str | Callable[[Row, str], str]]:
    """A prefix as fixed parts and fields in braces."""
    parts: list[str | Callable[[Row, str], str]] = []
    while "{" in prefix:
        before, _, rest = prefix.partition("{")
        field, brace, prefix = rest.partition("}")
        if not brace or not field:
            raise ValueError(f"data.prefix has a brace without a field: {before}{{{rest!r}; write {{field}}")
        parts += [before, partial(_text, field, "prefix")]
    return [*parts, prefix]


def _text(dotted: str, setting: str, row: Row, place: str) -> str:
    value: Any = row
    for name in dotted.split("."):
        if not isinstance(value, dict) or name not in value:
            present = ", ".join(_leaves(row)) or "none"
            raise ValueError(f"{place}: no field {dotted!r}; present: {present}; set data.{setting}")
        value = value[name]
    if not isinstance(value, str):
        raise ValueError(f"{place}: field {dotted!r} is a {type(value).__name__}, not a text; set data.{setting}")
    if "\0" in value:
        raise ValueError(f"{place}: field {dotted!r} holds a NUL character; remove it")
    return value


def _leaves(row: Row, before: str = "") -> list[str]:
    names: list[str] = []
    for name, value in row.items():
        names += _leaves(value, f"{before}{name}.") if isinstance(value, dict) else [f"{before}{name}"]
    return names
