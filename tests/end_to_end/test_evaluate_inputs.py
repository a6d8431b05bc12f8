"""What an evaluation is given: broken inputs are one line, and which examples of a test part are scored."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.recipe import EvaluateConfig, Recipe
from pipeline.evaluation.subject import Subject
from pipeline.rundir.run_dir import RunDir
from pipeline.scoring import quality_of
from tests.evaluated import (
    evaluate_here,
    inputs,
)

__all__ = ["inputs"]  # a fixture


def edit_systems(root: Path, change: Callable[[list[dict[str, Any]]], None]) -> None:
    systems = json.loads(RunDir(root).systems.read_text())["systems"]
    change(systems)
    RunDir(root).systems.write_text(json.dumps({"systems": systems}))


def edit_examples(root: Path, change: Callable[[list[dict[str, Any]]], list[dict[str, Any]]]) -> None:
    path = root / "data/test.jsonl"
    records = change([json.loads(line) for line in path.read_text().split("\n") if line])
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def damage_library(root: Path) -> None:
    path = RunDir(root).library / "modular.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def cut(name: str) -> Callable[[Path], None]:
    def damage(root: Path) -> None:
        path = root / name
        path.write_bytes(path.read_bytes()[:-40])

    return damage


@pytest.mark.parametrize(
    ("damage", "settings", "message"),
    [
        (lambda root: edit_examples(root, lambda records: []), {}, "no test examples in .*test.jsonl"),
        (
            lambda root: edit_examples(root, lambda records: [*records[:3], {**records[3], "target": None}]),
            {},
            r"line 4 of .*test.jsonl \(3\) has no reference",
        ),
        (
            lambda root: edit_examples(root, lambda records: [{**records[0], "references": "one text"}]),
            {},
            '"references" as a list of texts',
        ),
        (
            lambda root: edit_examples(root, lambda records: [{"source": "a", "target": "b"}]),
            {},
            'line 1 of .*test.jsonl is no example: it must be an object with the texts "id"',
        ),
        (lambda root: (root / "data/test.jsonl").write_text('{"id": 1\n'), {}, "line 1 of .*test.jsonl is no JSON"),
        (cut("assemble/systems.json"), {}, "systems.json is damaged .*run the stage that wrote it again"),
        (cut("distill/library/library.json"), {}, "library.json is damaged"),
        (cut("baseline/model/model.safetensors"), {}, "model.safetensors has .* bytes of .*: fetch it again"),
        (
            lambda root: edit_systems(root, lambda systems: systems[1].update(assembly="e3-d3")),
            {},
            "system e2-d2 does not fit: the encoder has 2 layers and modular layers for 0-1",
        ),
        (
            lambda root: edit_systems(root, lambda systems: systems[1].update(assembly="e2-x")),
            {},
            "'e2-x' is not an assembly",
        ),
        (damage_library, {}, "modular.safetensors does not match .*library.json: it is damaged"),
        (lambda root: None, {"metricx": "nowhere"}, "evaluate.metricx: nowhere holds no model"),
    ],
)
def test_bad_input_is_one_clear_line(
    inputs: Path, tmp_path: Path, damage: Callable[[Path], None], settings: dict[str, Any], message: str
) -> None:
    root = tmp_path / "run"
    shutil.copytree(inputs, root)
    damage(root)
    folders = tuple(text.format(root=root) for text in settings.get("folders", ()))
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        evaluate_here(root, **{**settings, "folders": folders})
    assert "\n" not in str(caught.value)


def test_rows_of_one_source_are_references_of_one_example(inputs: Path, tmp_path: Path) -> None:
    """Where the recipe says so; the limit counts examples, and results know one from the other."""
    root = tmp_path / "run"
    shutil.copytree(inputs, root)
    edit_examples(
        root,
        lambda records: [
            {"id": f"{i}.{k}", "source": f"one {i}", "target": f"two {i} {k % 2}"} for i in range(6) for k in range(3)
        ],
    )
    loaded = [
        Subject.load(Recipe(evaluate=EvaluateConfig(max_examples=4, same_source=each)), RunDir(root))
        for each in ("examples", "references")
    ]
    apart, together = loaded
    assert [each["id"] for each in apart.examples] == ["0.0", "1.1", "3.0", "4.1"], "evenly, as parts are in order"
    assert [each["id"] for each in together.examples] == ["0.0", "1.0", "3.0", "4.0"]
    assert together.references.texts == [[f"two {i} 0", f"two {i} 1"] for i in (0, 1, 3, 4)]
    assert quality_of(together.references, [f"two {i} 1" for i in (0, 1, 3, 4)], [])["exact_match"] == 100.0
    decoding = [each.key(each.teacher)["decoding"] for each in loaded]
    assert [each["examples"] for each in decoding] == ["taken evenly from 18", "taken evenly from 6"]
    assert [each["same_source"] for each in decoding] == ["examples", "references"]


def test_missing_stages_are_named(inputs: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="run stage data first"):
        evaluate_here(tmp_path)
    shutil.copytree(inputs / "data", tmp_path / "data")
    with pytest.raises(FileNotFoundError, match="run stage assemble first"):
        evaluate_here(tmp_path)
