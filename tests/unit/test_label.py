"""Targets of the teacher's own: those of transformers' beam search, filtered by the rule, and a source of data."""

from __future__ import annotations

import gzip
import json
import random
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from transformers import T5ForConditionalGeneration

from data_prep.config import DataConfig
from data_prep.shards import read_manifest
from pipeline import label as label_module
from pipeline.config.recipe import EvaluateConfig, Recipe
from pipeline.label import Rule, label
from pipeline.rundir.run_dir import RunDir
from pipeline.scoring import chrf
from pipeline.world import World
from tests.builds import build, write_recipe
from tests.evaluated import train_tokenizer, write_model

ALONE = World(0, 1, 0, torch.device("cpu"))
WORDS = ("one", "two", "three", "monday", "march", "euro", "metre", "clock", "half", "past", "quarter", "to")
NUM_EXAMPLES, MAX_TARGET_TOKENS = 60, 8
RULE = Rule(num_beams=3, min_chrf=60.0)


@pytest.fixture(scope="module")
def run_and_outputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunDir, list[tuple[str, str, str, bool]]]:
    """A run with data and teacher; (source, reference, output, ended) by transformers. Half of the references are what
    the teacher says."""
    root = tmp_path_factory.mktemp("label")
    run, generator = RunDir(root / "run"), random.Random(0)
    sources = [" ".join(generator.choices(WORDS, k=generator.randrange(1, 9))) for _ in range(NUM_EXAMPLES)]
    tokenizer = train_tokenizer(root / "tokenizer", sources)
    write_model(run.teacher_model, tokenizer, seed=0, depth=2)
    model = T5ForConditionalGeneration.from_pretrained(run.teacher_model).eval()
    inputs = tokenizer(sources, return_tensors="pt", padding=True)
    decoding = {"max_new_tokens": MAX_TARGET_TOKENS, "num_beams": RULE.num_beams, "do_sample": False}
    ends = [1, *range(4, len(tokenizer), 5)]  # a random model hardly ever says end-of-sequence
    model.generation_config.eos_token_id, model.generation_config.no_repeat_ngram_size = ends, 1
    model.generation_config.save_pretrained(run.teacher_model)
    ids = model.generate(**inputs, **decoding)[:, 1:]
    outputs = tokenizer.batch_decode(ids, skip_special_tokens=True)
    references = [text if i % 2 and text.strip() else "half past one" for i, text in enumerate(outputs)]
    rows = [{"source": s, "target": t} for s, t in zip(sources, references, strict=True)]
    (root / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"corpus": "files", "train": [str(root / "train.jsonl")], "tokenizer": str(root / "tokenizer")}
    recipe = write_recipe(root / "recipe.yaml", data | {"max_target_tokens": 32})
    assert build(recipe, run.data).returncode == 0
    ended = [bool(set(ends) & set(row)) for row in ids.tolist()]
    return run, list(zip(sources, references, outputs, ended, strict=True))


def recipe_of(run: RunDir) -> Recipe:
    data = DataConfig(corpus="files", train=("x.jsonl",), max_target_tokens=MAX_TARGET_TOKENS)
    return Recipe(run_dir=str(run.root), data=data, evaluate=EvaluateConfig(tokens_per_batch=64))


def labels_of(run: RunDir) -> list[dict[str, str]]:
    with gzip.open(run.root / "labels/train.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def after_the_rule(outputs) -> tuple[list[tuple[str, str]], Counter[str]]:
    """(source, target) of what is kept; how much is left out for which reason."""
    kept, dropped = [], Counter[str]()
    for source, reference, output, ended in outputs:
        if not output.strip() or not ended or chrf(output, reference) < RULE.min_chrf:
            dropped["empty" if not output.strip() else "below chrF" if ended else "cut"] += 1
        else:
            kept.append((source, output))
    return kept, dropped


def copy_with(run: RunDir, root: Path, **settings) -> RunDir:
    """The same run, not labelled, with other generation settings of the teacher."""
    shutil.copytree(run.root, root, ignore=shutil.ignore_patterns("labels"))
    path = RunDir(root).teacher_model / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    return RunDir(root)


def test_labels_are_those_of_transformers_after_the_rule_and_a_source_of_data(run_and_outputs, tmp_path, capsys):
    run, expected = run_and_outputs
    label(recipe_of(run), run, RULE, ALONE)
    kept, dropped = after_the_rule(expected)
    assert [(row["source"], row["target"]) for row in labels_of(run)] == kept
    summary = json.loads((run.root / "labels/labels.json").read_text())
    assert (summary["kept"], summary["dropped"]) == (len(kept), dropped)
    assert min(dropped["cut"], dropped["below chrF"], len(kept)) > 2, "the test shows something"
    assert sorted(path.name for path in (run.root / "labels").iterdir()) == ["labels.json", "train.jsonl.gz"]

    data = {"corpus": "files", "tokenizer": str(run.tokenizer), "vocab_size": 64}
    sets = [{"name": "data", "train": [str(run.root.parent / "train.jsonl")], "weight": 1}]
    sets += [{"name": "teacher", "train": [str(run.root / "labels/train.jsonl.gz")], "weight": 1}]
    assert build(write_recipe(tmp_path / "recipe.yaml", data | {"sets": sets}), tmp_path / "data").returncode == 0
    assert read_manifest(tmp_path / "data").splits["train"].num_examples == NUM_EXAMPLES + len(kept)

    capsys.readouterr()
    before = (run.root / "labels/train.jsonl.gz").stat().st_mtime_ns
    label(recipe_of(run), run, RULE, ALONE)
    assert "up to date" in capsys.readouterr().out
    assert (run.root / "labels/train.jsonl.gz").stat().st_mtime_ns == before


def test_what_is_cut_is_told_also_where_the_model_forces_an_end_upon_it(run_and_outputs, tmp_path):
    """As the settings of BART do."""
    run, expected = run_and_outputs
    run = copy_with(run, tmp_path / "run", forced_eos_token_id=1)
    label(recipe_of(run), run, RULE, ALONE)
    kept, dropped = after_the_rule(expected)
    assert [(row["source"], row["target"]) for row in labels_of(run)] == kept
    assert json.loads((run.root / "labels/labels.json").read_text())["dropped"] == dropped


def test_a_killed_labelling_goes_on_where_it_was(run_and_outputs, tmp_path, monkeypatch):
    run, _ = run_and_outputs
    monkeypatch.setattr(label_module, "UNIT_EXAMPLES", 16)
    whole, killed = RunDir(tmp_path / "whole"), RunDir(tmp_path / "killed")
    for each in (whole, killed):
        shutil.copytree(run.root, each.root, ignore=shutil.ignore_patterns("labels"))
    label(recipe_of(whole), whole, RULE, ALONE)
    publish, published = label_module.publish_sealed, []

    def dying(path: Path, record: dict) -> None:
        if len(published) == 2:
            raise KeyboardInterrupt
        publish(path, record)
        published.append((path, path.stat().st_mtime_ns))

    monkeypatch.setattr(label_module, "publish_sealed", dying)
    with pytest.raises(KeyboardInterrupt):
        label(recipe_of(killed), killed, RULE, ALONE)
    monkeypatch.setattr(
        label_module, "publish_sealed", lambda path, record: again.append(path) or publish(path, record)
    )
    again: list[Path] = []
    label(recipe_of(killed), killed, RULE, ALONE)
    assert [path.name for path in again] == ["000002.json", "000003.json", "labels.json"]
    for name in ("train.jsonl.gz", "labels.json"):
        assert (killed.root / "labels" / name).read_bytes() == (whole.root / "labels" / name).read_bytes()


@pytest.mark.parametrize(
    ("values", "message"), [((0, 40.0), "--num_beams is 0"), ((1, 101.0), "--min_chrf is 101.0: choose a value from 0")]
)
def test_an_impossible_rule_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        Rule(*values)


def test_a_run_without_a_teacher_and_a_rule_that_keeps_nothing_are_refused(run_and_outputs, tmp_path):
    run, _ = run_and_outputs
    with pytest.raises(FileNotFoundError, match="run stage teacher first"):
        label(recipe_of(run), RunDir(tmp_path), RULE, ALONE)
    endless = copy_with(run, tmp_path / "endless", eos_token_id=0, min_length=99)
    with pytest.raises(ValueError, match=r"passes the rule \(\d+ cut\): look at the teacher"):
        label(recipe_of(run), endless, Rule(1, 100.0), ALONE)


def test_a_generation_setting_that_is_not_carried_is_named_with_its_file(run_and_outputs, tmp_path):
    run = copy_with(run_and_outputs[0], tmp_path / "run", encoder_no_repeat_ngram_size=3)
    message = "teacher/model/generation_config.json has encoder_no_repeat_ngram_size, which .*: give a copy of the mod"
    with pytest.raises(ValueError, match=message):
        label(recipe_of(run), run, RULE, ALONE)
