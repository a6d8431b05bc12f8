"""test.jsonl, the test part as evaluation reads it: that of a build, or of other files for the same models."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_prep.config import DataConfig, identity_settings
from data_prep.plan import Plan, RecordReader, plan_of_inputs
from data_prep.sources import Template
from data_prep.units import UnitMaker

TEST_TEXT = "test.jsonl"


def lines_of_test_part(out: Path, plan: Plan, sidecars: Sequence[dict[str, Any]]) -> bytes:
    """test.jsonl: line k is the text of example k of the test shards, the source exactly as it was encoded."""
    reader = RecordReader(out, plan)
    rows = []
    for unit, sidecar in zip((unit for unit in plan.units if unit.split == "test"), sidecars, strict=True):
        dropped = {number for numbers in sidecar["dropped"].values() for number in numbers}
        for number, record in enumerate(reader.records(unit)):
            if number not in dropped and record is not None:
                row: dict[str, Any] = {"id": record.id, "source": record.source, "target": record.target}
                languages = zip(("source_language", "language"), record.languages, strict=True)
                row |= {name: language for name, language in languages if language}
                rows.append(row | ({"references": [record.target, *record.others]} if record.others else {}))
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def without_prefixes(config: DataConfig, sources: Sequence[str]) -> list[str]:
    """Sources of a test part without what data.prefix has put before them, for who was not trained with it."""
    prefixes = [Template("prefix", each.prefix) for each in config.all_sets]
    return [min((each.cut(source) for each in prefixes), key=len) for source in sources]


def plan_of_other_test_part(config: DataConfig, files: Sequence[str]) -> Plan:
    """What is read of files that a build with these settings knows nothing of.

    Args:
        files: as data.test names them.

    Raises:
        ValueError: the build is of a mixture, whose fields differ, or a first record that cannot be used.
        OSError: no such file.
    """
    if config.sets:
        raise ValueError("evaluate.test cannot go with data.sets, each of which has fields of its own: leave it empty")
    test = dataclasses.replace(config, corpus="files", train=tuple(files), validation=(), test=tuple(files))
    return plan_of_inputs(Path(), test, identity_settings(test), ["test"])


def lines_of_other_test_part(data: Path, config: DataConfig, files: Sequence[str]) -> bytes:
    """The same of such files.

    Args:
        data: the folder of the build, whose tokenizer says what is too long.

    Raises:
        ValueError: any record that cannot be used, and as above.
    """
    plan = plan_of_other_test_part(config, files)
    maker = UnitMaker(data, plan)
    return lines_of_test_part(data, plan, [maker.make(unit)[1] for unit in plan.units])
