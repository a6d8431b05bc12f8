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
        (b'{"source": "a", "target": 5}', "field 'target' is of type int, not a text"),
        (b'{"source": "a"', "a.jsonl:1: not a JSON object"),
        (b"[1]", "a JSON list, not an object"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "a.jsonl is a pointer of Git LFS, not the file"),
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


@pytest.mark.parametrize(
    ("name", "header", "other"),
    [("a.csv", "source;target", ";"), ("a.tsv", "source,target", ","), ("a.csv", "a\tb", "\t")],
)
def test_a_table_whose_cells_something_else_separates_is_told(
    tmp_path: Path, name: str, header: str, other: str
) -> None:
    (tmp_path / name).write_text(f'{header}\n"a"{other}"b"\n')
    with pytest.raises(ValueError, match=r"the header is one cell, .* not with ") as error:
        read(tmp_path / name)
    assert repr(header) in str(error.value)


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


def records(path: Path, split: str = "train", quotes: str = "auto") -> list[dict[str, Any]]:
    source = open_input(path, path.name, split, quotes)
    return [row for piece in source.scan(7, 1_000_000) for _, row in source.rows(piece)]


# Quotes: what people and programs write in TSV. `...` is many plain lines.
PLAIN_LINES = [f"line {number}, plain\tZeile {number}, schlicht" for number in range(40)]


def table(path: Path, lines: list[str], header: str = "source\ttarget") -> Path:
    path.write_text("\n".join([header, *PLAIN_LINES[:20], *lines, *PLAIN_LINES[20:]]) + "\n", encoding="utf-8")
    return path


@pytest.mark.parametrize(
    "lines",
    [
        ['"Yes."\t"Ja."', '"No," he said\tNein'],
        ['"Yes."\t"Ja."'],
        ['5" disk\t5-Zoll-Diskette', 'a 3" nail\tein Nagel'],
        ['"Stop!\tHalt!', "and then\tund dann"],
        ['say ""no""\tsag ""nein""'],
        ['"Well, yes."\tNun ja.', "a, b\tc"],
        ['"Well\tTja', "so\tso", 'that is it"\tdas war es', '"Yes."\t"Ja."'],
    ],
)
def test_quotes_that_people_wrote_in_tsv_are_text(tmp_path: Path, lines: list[str]) -> None:
    rows = records(table(tmp_path / "a.tsv", lines))
    assert [list(row.values()) for row in rows] == [
        line.split("\t") for line in [*PLAIN_LINES[:20], *lines, *PLAIN_LINES[20:]]
    ]


@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC])
def test_quotes_that_a_program_wrote_in_tsv_are_none_of_the_text(tmp_path: Path, quoting: Any) -> None:
    cells = [["a\tb", "c"], ["two\nlines", 'he said "no"'], ["plain", '"'], ["x", "y, z"]]
    with (tmp_path / "a.tsv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, delimiter="\t", quoting=quoting).writerows([["source", "target"], *cells])
    assert [list(row.values()) for row in records(tmp_path / "a.tsv")] == cells


def test_quotes_that_may_be_either_are_refused_until_it_is_said(tmp_path: Path) -> None:
    """Three lines that are rows, in which a quote opens at the first and closes at the third."""
    path = table(tmp_path / "a.tsv", ['"Well\tTja', "so\tso", 'that is it"\tdas war es'])
    with pytest.raises(
        ValueError, match=r"a.tsv:22: quotes that may be text or stand around cells: set data.quotes to"
    ):
        records(path)
    assert len(records(path, quotes="text")) == 43
    assert len(records(path, quotes="cells")) == 41
    with pytest.raises(ValueError, match=r"a.tsv:22: not a row of 2 cells, nor with cells in quotes \(line 23\)"):
        records(table(tmp_path / "a.tsv", ["a\tb\tc", 'd "e"\tf']))


def test_a_csv_record_over_lines_that_are_rows_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.csv"
    path.write_text('source,target\n"Well,Tja\nso,so\nthat is it",das war es\nlast,Letzte\n')
    assert len(records(path)) == 2
    assert "a.csv:2: a cell in quotes goes on over lines that are rows by themselves" in capsys.readouterr().err
    assert len(records(path, quotes="text")) == 4


@pytest.mark.parametrize("kind", ["jsonl", "csv", "tsv", "csv.gz", "txt"])
def test_a_mark_of_byte_order_is_none_of_the_text(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"a.{kind}"
    if kind == "txt":
        path.write_text("\ufeffone\ntwo\n", encoding="utf-8")
        assert read(path) == [{"text": "one"}, {"text": "two"}]
        return
    write(path, ROWS)
    unpack, pack = (gzip.decompress, gzip.compress) if kind.endswith("gz") else (bytes, bytes)
    once = b"\xef\xbb\xbf" + unpack(path.read_bytes())
    path.write_bytes(pack(once))
    assert read(path) == ROWS
    if kind == "jsonl":  # files put one after another
        path.write_bytes(once * 2)
        assert read(path) == ROWS * 2


def test_zstd_of_the_longest_window_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.zst"
    options = {zstd.CompressionParameter.window_log: 31, zstd.CompressionParameter.content_size_flag: 0}
    packer = zstd.ZstdCompressor(options=options)
    text = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    path.write_bytes(packer.compress(text) + packer.flush())
    assert read(path) == ROWS


def test_null_is_neither_empty_nor_missing() -> None:
    assert record({"source": "a", "target": None}) == Record("train/6", "a", "", "target")
    assert record({"source": None, "target": "b"}) == Record("train/6", "", "b", "source")
    assert record({"source": "a", "target": ""}) == Record("train/6", "a", "")


def test_a_list_in_the_target_field_is_several_references():
    assert record({"source": "a", "target": ["b", " ", None, "c", "d"]}) == Record(
        "train/6", "a", "b", others=("c", "d")
    )
    assert record({"source": "a", "target": ["b"]}) == Record("train/6", "a", "b")
    assert record({"source": "a", "target": []}) == Record("train/6", "a", "", "target")
    with pytest.raises(ValueError, match="field 'target' is of type int, not a text"):
        record({"source": "a", "target": ["b", 3]})
    dotted = Fields("translation.en", "translation.de", "to {tgt}: ")
    assert record({"translation": None, "tgt": "de"}, dotted).null == "source"
    assert record({"translation": {"en": "a", "de": None}, "tgt": None}, dotted).null == "target"
    with pytest.raises(ValueError, match=r"field 'tgt' is null, and data.prefix needs it"):
        record({"translation": {"en": "a", "de": "b"}, "tgt": None}, dotted)
    with pytest.raises(ValueError, match="no field 'target'; present: source"):
        record({"source": "a"})


def test_ids_of_a_column_that_lacks_some() -> None:
    ids = [record({"id": given, "source": "a", "target": "b"}).id for given in (None, float("nan"), 7.0, 0, "x")]
    assert ids == ["train/6", "train/6", "7", "0", "x"]


def saved() -> Any:
    """A table with features of every kind, and what its rows are once read."""
    import datasets

    features = datasets.Features(
        {
            "translation": datasets.Translation(["de", "en"]),
            "label": datasets.ClassLabel(names=["no", "yes"]),
            "labels": datasets.List(datasets.ClassLabel(names=["a", "b"])),
            "nested": {"kind": datasets.ClassLabel(names=["x", "y"]), "text": datasets.Value("string")},
        }
    )
    rows, named = [], []
    for number in range(30):
        texts = {"translation": {"de": f"Zeile {number}", "en": f"line {number}"}}
        rows.append({**texts, "label": number % 2, "labels": [0, 1], "nested": {"kind": 1, "text": "t"}})
        label = ["no", "yes"][number % 2]
        named.append({**texts, "label": label, "labels": ["a", "b"], "nested": {"kind": "y", "text": "t"}})
    return datasets.Dataset.from_list(rows, features=features), named


def test_folders_of_datasets_are_read_as_it_reads_them(tmp_path: Path) -> None:
    """Saved after select and filter, in several files, as a dictionary of parts; and files in the layout of the hub."""
    import datasets

    data, named = saved()
    data.select(range(29, -1, -2)).save_to_disk(tmp_path / "selected", num_shards=3)
    assert records(tmp_path / "selected") == named[::-2]
    data.filter(lambda row: row["label"]).save_to_disk(tmp_path / "filtered")
    assert records(tmp_path / "filtered") == named[1::2]
    parts = datasets.DatasetDict({"train": data.select(range(20)), "dev": data.select(range(20, 30))})
    parts.save_to_disk(tmp_path / "parts")
    assert records(tmp_path / "parts") == records(tmp_path / "parts/train") == named[:20]
    assert records(tmp_path / "parts", "validation") == named[20:]
    with pytest.raises(
        ValueError, match=r"parts: a folder of the parts train, dev; name the one for test, such as parts#tr"
    ):
        records(tmp_path / "parts", "test")
    source = open_input(tmp_path / "parts", "parts#dev", "test")
    (piece,) = source.scan(99, 1)
    assert [row for _, row in source.rows(piece)] == named[20:]
    size, sha256 = source.identity()
    assert not source.has_changed(size, sha256)
    assert source.has_changed(size, "other")


def test_a_data_set_in_the_layout_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    data, named = saved()
    folder = tmp_path / "set"
    for part, first, stop in (
        ("train-00000-of-00002", 0, 10),
        ("train-00001-of-00002", 10, 20),
        ("test-00000-of-00001", 20, 30),
    ):
        (folder / "data").mkdir(parents=True, exist_ok=True)
        data.select(range(first, stop)).to_parquet(folder / f"data/{part}.parquet")
    assert records(folder) == named[:20]
    assert records(folder, "test") == named[20:]
    with pytest.raises(ValueError, match="set: a folder of the parts train, test; name the one for validation"):
        records(folder, "validation")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty: `datasets` cannot read this folder") as error:
        records(tmp_path / "empty")
    assert "\n" not in str(error.value)


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
