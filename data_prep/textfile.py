"""Text files (JSONL, CSV, TSV, plain text; each also .gz or .zst), cut into units by bytes of the decompressed text."""

from __future__ import annotations

import contextlib
import csv
import gzip
import hashlib
import io
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import IO, Any, cast

import orjson
from backports import zstd

from data_prep.publish import sha256_of
from data_prep.quotes import settle

Row = dict[str, Any]
_MAX_UNIT_BYTES = 16 << 20  # a unit of long texts ends here, so that ranks share a file of few records
_LONGEST_WINDOW = {
    zstd.DecompressionParameter.window_log_max: 31
}  # of `zstd --long=31`; needs that memory if it is used
_COMPRESSED: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".zst": partial(zstd.open, options=_LONGEST_WINDOW)}
_MARK = "\ufeff".encode()  # of byte order: some programs begin files with it, and `cat` leaves it inside
_BUFFER_BYTES = 1 << 20
_SEPARATORS = ",;\t|"
TEXT_FORMATS = (".jsonl", ".json", ".csv", ".tsv", ".txt")
csv.field_size_limit(1 << 30)  # max_line_bytes is the limit


@dataclass(frozen=True)
class Piece:
    """Rows start..stop-1 of a file; of a text file also where they lie in the decompressed text, and its sha256."""

    start: int
    stop: int
    offset: int = 0
    bytes: int = 0
    sha256: str = ""


def text_suffix(path: Path) -> str:
    """What the name of a text file ends in, compression left out."""
    return Path(path.stem).suffix if path.suffix in _COMPRESSED else path.suffix


class TextFile:
    """A JSONL, CSV, TSV or plain text file. Damage of the compression raises ValueError."""

    def __init__(self, path: Path, name: str, quotes: str = "auto") -> None:
        self._path, self._name = path, name
        self.quotes = quotes
        """What quotes mean in CSV and TSV; once scanned "cells" or "text"."""
        self._stream: IO[bytes] | None = None
        self._header: bytes | None = None
        suffix = text_suffix(path)
        self._delimiter = {".csv": ",", ".tsv": "\t"}.get(suffix)
        self._parse: Callable[[bytes, str], Row | None] = _text_row if suffix == ".txt" else _json_row

    def identity(self) -> tuple[int, str]:
        """Size in bytes and sha256."""
        return self._path.stat().st_size, sha256_of(self._path)

    def has_changed(self, size: int, sha256: str) -> bool:
        """Compare with the plan by size; what is read later is compared by the sha256 of its piece."""
        return self._path.stat().st_size != size

    def scan(self, rows_per_piece: int, max_line_bytes: int) -> list[Piece]:
        """Read the file and cut it. A file without a record and a too long line raise ValueError."""
        self._settle_quotes(max_line_bytes)
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
                    self._check_header(row)
                    continue
                rows.append(row)
                stop += 1
                size += len(row)
                num_blank += not row.removeprefix(_MARK).strip()
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
            yield place, (self._parse(line, place) if line and not line.removeprefix(_MARK).isspace() else None)

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

    def _settle_quotes(self, max_line_bytes: int) -> None:
        if not self._delimiter:
            return
        if self.quotes == "auto":
            lines = (line.decode("utf-8", errors="replace") for line in self._lines(max_line_bytes))
            self.quotes, warning = settle(lines, self._delimiter, self._name)
            if warning:
                print(f"data_prep: warning: {warning}", file=sys.stderr)

    def _check_header(self, row: bytes) -> None:
        """Tell a table whose cells something else separates: its header is one cell then."""
        text = _decode(row.removeprefix(_MARK), f"{self._name}:1").strip()
        other = next((kind for kind in _SEPARATORS if kind in text), None)
        if other and self._delimiter and self._delimiter not in text:
            raise ValueError(
                f"{self._name}:1: the header is one cell, {text!r}: cells of a .csv end with a comma, and those of a "
                f".tsv with a tab, not with {other!r}; write the table so"
            )

    def _lines(self, max_line_bytes: int) -> Iterator[bytes]:
        with self._open() as stream, self._guarded():
            for number, line in enumerate(stream, start=1):
                if len(line) > max_line_bytes:
                    raise ValueError(
                        f"{self._name}:{number}: a line of {len(line):,} bytes, more than data.max_line_bytes "
                        f"{max_line_bytes:,}: raise that or remove the record"
                    )
                yield line

    def _raw_rows(self, max_line_bytes: int) -> Iterator[bytes]:
        """The lines of the file, those of one CSV row together."""
        lines = self._lines(max_line_bytes)
        if not self._delimiter or self.quotes == "text":
            yield from lines
            return
        pending: list[bytes] = []
        number = 0

        def text_lines() -> Iterator[str]:
            nonlocal number
            for number, line in enumerate(lines, start=1):
                pending.append(line)
                yield _decode(line.removeprefix(_MARK) if number == 1 else line, f"{self._name}:{number}")

        try:
            for _ in csv.reader(text_lines(), delimiter=self._delimiter, strict=True):
                yield b"".join(pending)
                pending.clear()
        except csv.Error as err:
            first = number - len(pending) + 1
            raise ValueError(
                f"{self._name}:{first}: not a row of cells ({err}); check the quoting, or set data.quotes to "
                f'"text" where quotes are characters of the texts'
            ) from err

    def _content(self, piece: Piece) -> bytes:
        # A rank reads its pieces in order, so the stream of a compressed file goes forward only.
        if self._stream is None or self._stream.tell() > piece.offset:
            self._stream = self._open()
        stream = self._stream
        with self._guarded():
            stream.seek(piece.offset)
            return stream.read(piece.bytes)

    def _csv_rows(self, content: bytes, start: int) -> Iterator[tuple[str, Row | None]]:
        if self._header is None:
            self._header = next(self._raw_rows(1 << 40))
        head = next(self._cells([_decode(self._header.removeprefix(_MARK), self._name)]))
        text = _decode(content, f"{self._name}: rows from {start + 1}")
        lines = (line + "\n" for line in text.removesuffix("\n").split("\n"))
        for number, cells in enumerate(self._cells(lines), start=start):
            place = f"{self._name}: row {number + 1}"
            if cells and len(cells) != len(head):
                raise ValueError(f"{place}: {len(cells)} cells where the header has {len(head)}; check the quoting")
            yield place, (dict(zip(head, cells, strict=True)) if cells else None)

    def _cells(self, lines: Iterable[str]) -> Iterator[list[str]]:
        delimiter = self._delimiter
        assert delimiter
        if self.quotes != "text":
            return csv.reader(lines, delimiter=delimiter)
        texts = (line.removesuffix("\n").removesuffix("\r") for line in lines)
        return (text.split(delimiter) if text else [] for text in texts)


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
        if line.startswith(_MARK):
            return _json_row(line.removeprefix(_MARK), place)
        _decode(line, place)
        raise ValueError(f"{place}: not a JSON object ({err.msg} at column {err.colno}); one object a line") from err
    if not isinstance(row, dict):
        raise ValueError(f"{place}: a JSON {type(row).__name__}, not an object; write one object a line")
    return row


def _text_row(line: bytes, place: str) -> Row:
    return {"text": _decode(line.removeprefix(_MARK), place).rstrip("\r")}
