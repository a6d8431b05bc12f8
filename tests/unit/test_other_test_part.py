"""Another test part for a run that is done: its texts are read as the run's own, by settings and tokenizer."""

from __future__ import annotations

import dataclasses
import json

import pytest

from data_prep.config import DataConfig, SetConfig
from data_prep.sources import Template
from data_prep.testpart import TEST_TEXT, lines_of_other_test_part, without_prefixes
from pipeline.assemble.systems import System
from pipeline.config.recipe import EvaluateConfig, Recipe
from pipeline.evaluation.subject import Subject
from pipeline.rundir.run_dir import RunDir
from pipeline.rundir.stage import _files_used
from tests.builds import build, write_recipe

ROWS = [{"text": f"one {i}", "answers": [f"two {i}", f"zwei {i}"][: 1 + i % 2], "topic": "sums"} for i in range(70)]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """(run directory with data, their settings): fields, prefix and references are not the default ones."""
    folder = tmp_path_factory.mktemp("built")
    settings = {
        "corpus": "files", "source_field": "text", "target_field": "answers", "prefix": "{topic}: ",
        "vocab_size": 64, "max_source_tokens": 32, "max_target_tokens": 16, "examples_per_block": 4,
        "blocks_per_shard": 2,
    }  # fmt: skip
    for part, rows in (("train", [{**row, "answers": row["answers"][0]} for row in ROWS]), ("test", ROWS[:20])):
        (folder / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + "\n")
        settings[part] = [str(folder / f"{part}.jsonl")]
    settings["validation"] = settings["test"]
    done = build(write_recipe(folder / "recipe.yaml", settings), folder / "run/data")
    assert done.returncode == 0, done.stderr
    (folder / "run/assemble").mkdir()
    texts = {"name": "teacher", "kind": "teacher", "folder": "teacher/model", "assembly": "e1x2-d1x2", "requests": ()}
    names = {each.name for each in dataclasses.fields(System)}
    teacher = System(**texts, **dict.fromkeys(names - texts.keys(), 1))
    (folder / "run/assemble/systems.json").write_text(json.dumps({"systems": [dataclasses.asdict(teacher)]}))
    config = DataConfig(**{name: tuple(each) if isinstance(each, list) else each for name, each in settings.items()})
    return RunDir(folder / "run"), config


def test_the_same_files_give_the_texts_of_the_build(built):
    run, config = built
    assert lines_of_other_test_part(run.data, config, config.test) == (run.data / TEST_TEXT).read_bytes()


def test_other_files_are_read_as_the_runs_own(built, tmp_path):
    run, config = built
    other = tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps(row) + "\n" for row in reversed(ROWS[-5:])))
    recipe = dataclasses.replace(Recipe(), data=config)
    own = Subject.load(recipe, run)
    taken = Subject.load(dataclasses.replace(recipe, evaluate=EvaluateConfig(test=(str(other),))), run)
    assert [each["source"] for each in taken.examples] == [f"sums: one {i}" for i in range(69, 64, -1)]
    assert taken.references.texts[0] == ["two 69", "zwei 69"]
    assert taken.test_sha256 != own.test_sha256, "a score of one part would count for the other"
    again = Subject.load(dataclasses.replace(recipe, evaluate=EvaluateConfig(test=config.test)), run)
    assert again.test_sha256 == own.test_sha256


def test_a_record_that_cannot_be_used_is_named(built, tmp_path):
    run, config = built
    other = tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps(row) + "\n" for row in (ROWS[0], {**ROWS[1], "answers": None})))
    with pytest.raises(ValueError, match=r"other.jsonl: record 2 .*null target"):
        lines_of_other_test_part(run.data, config, [str(other)])
    kept = lines_of_other_test_part(run.data, dataclasses.replace(config, drop_empty=True), [str(other)])
    assert kept.count(b"\n") == 1


def test_a_judge_reads_sources_without_the_prefixes_of_their_sets():
    sets = tuple(SetConfig(name=name, train=("x",), prefix=f"{name} {{kind}}: ") for name in ("ask", "sum"))
    assert without_prefixes(DataConfig(corpus="files", sets=sets), ["ask a: sum of", "sum b: ask: me", "plain"]) == [
        "sum of", "ask: me", "plain",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("prefix", "row"),
    [("", {}), ("sum (all): ", {}), ("from {src} to {tgt}: ", {"src": "German (de)", "tgt": "Czech"})],
)
def test_a_prefix_is_cut_as_it_was_filled_in(prefix, row):
    template = Template("prefix", prefix)
    assert template.cut(template.fill(row, "here") + "a: b to c: d") == "a: b to c: d"
    assert template.cut("another text") == "another text"


def test_a_field_of_several_lines_is_cut_whole():
    template = Template("prefix", "{task}\n\n")
    assert template.cut(template.fill({"task": "answer\nin short"}, "here") + "who?") == "who?"


def test_an_edit_anywhere_in_a_large_file_is_another_test_part(built, tmp_path):
    run, config = built
    part = tmp_path / "large.jsonl"
    content = bytearray(b"".join(b'{"text": "one %06d", "answers": "two"}\n' % i for i in range(60_000)))
    recipe = dataclasses.replace(Recipe(), data=config, evaluate=EvaluateConfig(test=(str(part),)))

    def used() -> dict:
        part.write_bytes(content)
        return _files_used(recipe, run, "evaluate")

    before = used()
    content[content.index(b"030017")] ^= 1  # a digit between the pieces that tell a model's weights from others
    assert used() != before
