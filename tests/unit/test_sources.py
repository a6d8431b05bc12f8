"""Reading inputs: the same records from every format, and one clear line for everything that can be wrong."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from backports import zstd
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.sources import Fields, Piece, Record, open_input

ROWS = [{"id": str(n), "source": f'line {n},\twith "quotes"\u00fc', "target": f"Zeile\r\n{n}"} for n in range(50)]


def read(path: Path, rows_per_piece: int = 7) -> list[Any]:
    """All rows, piece by piece, in the order of a rank that has them all."""
    source = open_input(path, path.name)
    pieces = source.scan(rows_per_piece, 1_000_000)
    assert [piece.start for piece in pieces] == [0, *(piece.stop for piece in pieces[:-1])]
    assert all(piece.stop - piece.start == rows_per_piece for piece in pieces[:-1])
    return [row for piece in pieces for _, row in source.rows(piece)]


def write(path: Path, rows: list[dict[str, str]]) -> Path:
    kind = path.name.split(".", 1)[1]
    if kind == "parquet":
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=11)
    elif kind == "saved":
        import datasets

        datasets.Dataset.from_list(rows).save_to_disk(path, num_shards=3)
    else:
        if kind.startswith("jsonl"):
            text = "".join(json.dumps(row) + "\n" for row in rows)
        else:
            lines: list[str] = []
            writer = csv.writer(type("Lines", (), {"write": lines.append}), delimiter="," if "csv" in kind else "\t")
            writer.writerows([list(rows[0]), *([*row.values()] for row in rows)])
            text = "".join(lines)
        pack = gzip.compress if kind.endswith(".gz") else zstd.compress if kind.endswith(".zst") else bytes
        path.write_bytes(pack(text.encode()))
    return path


@pytest.mark.parametrize(
    "kind", ["jsonl", "jsonl.gz", "jsonl.zst", "csv", "csv.gz", "tsv", "tsv.zst", "parquet", "saved"]
)
def test_every_format_gives_the_same_rows(tmp_path: Path, kind: str) -> None:
    assert read(write(tmp_path / f"a.{kind}", ROWS)) == ROWS


@pytest.mark.parametrize("kind", ["jsonl.gz", "csv", "parquet", "saved"])
def test_any_piece_can_be_read_at_first(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path / f"a.{kind}", ROWS)
    for piece in reversed(open_input(path, "a").scan(7, 1_000_000)):
        rows = [row for _, row in open_input(path, "a").rows(piece)]
        assert rows == ROWS[piece.start : piece.stop]


cells = st.text(st.characters(codec="utf-8", exclude_characters="\0\r"), max_size=8)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(cells, cells), min_size=1, max_size=20), st.integers(1, 9))
def test_any_csv_comes_back(tmp_path_factory: pytest.TempPathFactory, pairs: list[tuple[str, str]], size: int) -> None:
    rows = [{"source": source, "target": target} for source, target in pairs]
    path = write(tmp_path_factory.mktemp("csv") / "a.csv", rows)
    assert read(path, size) == rows


def test_long_texts_end_a_piece_early(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": "x" * 900_000}) + "\n" for _ in range(40)))
    pieces = open_input(path, "a").scan(4096, 1_000_000)
    assert [piece.stop - piece.start for piece in pieces] == [19, 19, 2]


def test_plain_text_and_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one\n\ntwo \u2028 still two\n")
    assert read(path) == [{"text": "one"}, None, {"text": "two \u2028 still two"}]


def record(row: dict[str, Any], fields: Fields | None = None) -> Record:
    return (fields or Fields("source", "target")).record(row, "a.jsonl:7", "train/6")


def test_records_have_ids_dotted_fields_prefixes_and_language_tags() -> None:
    assert record({"source": "a", "target": "b"}) == Record("train/6", "a", "b")
    row = {"id": 9, "translation": {"en": "a", "de": "b"}, "tgt": "de"}
    fields = Fields("translation.en", "translation.de", "to {tgt}: ")
    assert record(row, fields) == Record("9", "to de: a", "b")
    assert record({"source": " "}, Fields("source", None, "prefix ")) == Record("train/6", " ", "")
    with pytest.raises(ValueError, match=r"no field 'tgt'; present: source, target; set data.prefix"):
        record({"source": "a", "target": "b"}, Fields("source", "target", "to {tgt}: "))
    with pytest.raises(ValueError, match="brace"):
        Fields("source", "target", "to {tgt: ")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            b'{"source": "a", "text": {"de": "b"}}',
            r"a.jsonl:1: no field 'target'; present: source, text.de; set data.ta",
        ),
        (b"{}", "present: none"),
        (b'{"source": "a", "target": null}', "field 'target' is a NoneType, not a text"),
        (b'{"source": "a"', "a.jsonl:1: not a JSON object"),
        (b"[1]", "a JSON list, not an object"),
        (b'{"source": "a\\u0000", "target": "b"}', "a.jsonl:1: field 'source' holds a NUL character"),
        (
            b'{"source": "\\ud800", "target": "b"}',
            r"a.jsonl:1: not a JSON object \(no low surrogate in string at column 13\)",
        ),
        (b'{"source": "a", "target": "b", "id": %d}' % (1 << 70), "a.jsonl:1: field 'id' is the number 1.18"),
        ('{"source": "\u00fc"}'.encode("latin-1"), r"a.jsonl:1: not UTF-8 \(byte 12\)"),
        (b"\0\0\0", "a.jsonl:1: not a JSON object"),
        (b"[" * 100_000, "a.jsonl:1: not a JSON object"),
        (b"1" * 5_000, "a.jsonl:1: not a JSON object"),
        (b"\n \n", r"a.jsonl: the file holds no record"),
        (b"", r"a.jsonl: the file holds no record"),
        (b'{"source": "%s"}' % (b"x" * 1_000_000), r"a.jsonl:1: a line of 1,000,014 bytes, more than data.max_line_b"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: bytes, message: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(line)

    def read_records() -> None:
        for row in read(tmp_path / "a.jsonl"):
            Fields("source", "target").record(row, "a.jsonl:1", "")

    with pytest.raises(ValueError, match=message) as error:
        read_records()
    assert "\n" not in str(error.value)


def test_a_ragged_csv_row_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("source,target\na,b\na,b,c\n")
    with pytest.raises(ValueError, match=r"a.csv: row 2: 3 cells where the header has 2; check the quoting"):
        read(tmp_path / "a.csv")


def test_a_quote_that_does_not_end_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('source,target\n"a,b\n')
    with pytest.raises(ValueError, match=r"a.csv:2: not a row of cells \(unexpected end of data\); check the quoting"):
        read(tmp_path / "a.csv")


def test_unknown_missing_and_half_named_inputs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such file"):
        open_input(tmp_path / "nowhere.jsonl", "nowhere.jsonl")
    (tmp_path / "a.xml").write_text("<a/>")
    with pytest.raises(ValueError, match=r"a.xml: unknown format; known are .jsonl"):
        open_input(tmp_path / "a.xml", "a.xml")
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(ValueError, match=r"set: a folder of several splits; name one of them: set/ and train, test"):
        open_input(tmp_path, "set")


def checked_zstd(content: bytes) -> bytes:
    """As the zstd program packs, with a checksum."""
    return zstd.compress(content, options={zstd.CompressionParameter.checksum_flag: 1})


@pytest.mark.parametrize(("suffix", "pack"), [(".gz", gzip.compress), (".zst", checked_zstd)])
def test_truncated_and_damaged_files_are_named(tmp_path: Path, suffix: str, pack: Any) -> None:
    packed = pack(b"".join(b'{"source": "%d"}\n' % (number * 7919) for number in range(5000)))
    half = len(packed) // 2
    for name, content in (
        ("cut", packed[:-20]),
        ("foreign", b"hello"),
        ("flipped", packed[:half] + bytes([packed[half] ^ 255]) + packed[half + 1 :]),
    ):
        path = tmp_path / f"{name}.jsonl{suffix}"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"{name}.jsonl{suffix}: the file is truncated or damaged"):
            read(path)


def test_damaged_parquet_and_a_changed_text_are_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", ROWS)
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(ValueError, match=r"a.parquet: not a whole file of this format .*; fetch it again"):
        read(path)
    text = write(tmp_path / "a.jsonl", ROWS)
    source = open_input(text, "a.jsonl")
    (piece,) = source.scan(99, 1_000_000)
    text.write_bytes(text.read_bytes().replace(b"line 3", b"line 8"))
    with pytest.raises(ValueError, match=r"a.jsonl: changed since the plan was made"):
        list(source.rows(Piece(piece.start, piece.stop, piece.offset, piece.bytes, piece.sha256)))
