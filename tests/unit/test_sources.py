"""Reading inputs: right records, and one clear line for everything that can be wrong."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from data_prep.sources import Fields, Record, count_lines, parse_line, read_lines

PLAIN = Fields("source", "target")


def parse(line: str, fields: Fields = PLAIN) -> Record | None:
    return parse_line(line.encode(), fields, "a.jsonl:7", "train/6")


def test_plain_and_gzipped_files_give_the_same_lines(tmp_path: Path) -> None:
    content = b'{"source": "a", "target": "b"}\n\n{"source": "c", "target": "d"}'
    (tmp_path / "a.jsonl").write_bytes(content)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(content))
    assert list(read_lines(tmp_path / "a.jsonl")) == list(read_lines(tmp_path / "a.jsonl.gz"))
    assert count_lines(tmp_path / "a.jsonl.gz") == 3


def test_records_have_ids_and_dotted_fields() -> None:
    assert parse('{"source": "a", "target": "b"}') == Record("train/6", "a", "b")
    line = json.dumps({"id": 9, "translation": {"en": "a", "de": "b"}})
    assert parse(line, Fields("translation.en", "translation.de")) == Record("9", "a", "b")
    assert parse("  \n") is None


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            '{"source": "a", "text": {"de": "b"}}',
            r"a.jsonl:7: no field 'target'; present: source, text.de; set data.ta",
        ),
        ("{}", "present: none"),
        ('{"source": "a", "target": null}', "field 'target' is a NoneType, not a text"),
        ('{"source": "a"', "a.jsonl:7: not a JSON object"),
        ("[1]", "a JSON list, not an object"),
    ],
)
def test_a_bad_line_is_named(line: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        parse(line)
    assert "\n" not in str(error.value)


def test_bytes_that_are_not_utf8_are_named() -> None:
    with pytest.raises(ValueError, match=r"a.jsonl:7: not UTF-8"):
        parse_line('{"source": "\u00fc"}'.encode("latin-1"), PLAIN, "a.jsonl:7", "")


def test_missing_empty_and_truncated_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such file"):
        count_lines(tmp_path / "nowhere.jsonl")
    (tmp_path / "empty.jsonl").write_bytes(b"\n \n")
    with pytest.raises(ValueError, match=r"empty.jsonl: the file holds no record"):
        count_lines(tmp_path / "empty.jsonl")
    packed = gzip.compress(b"".join(b'{"source": "%d"}\n' % number for number in range(5000)))
    for name, content in (
        ("cut", packed[:-20]),
        ("not_gzip", b"hello"),
        ("flipped", packed[:500] + b"\0\0" + packed[502:]),
    ):
        path = tmp_path / f"{name}.jsonl.gz"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"{name}.jsonl.gz: the gzip file is truncated or damaged"):
            count_lines(path)
