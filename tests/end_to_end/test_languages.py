"""Models whose texts begin with the token of a language: from records that name theirs to scores by language, each
output begun with the token that its example asks for, as transformers' generate does it."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from data_prep.config import DataConfig
from data_prep.demo import make_corpus
from data_prep.plan import Plan, make_plan
from data_prep.reader import SplitReader
from data_prep.served import Served
from data_prep.shards import read_manifest
from data_prep.units import UnitMaker
from pipeline import draft
from pipeline.__main__ import main
from pipeline.config.cli import parse_recipe, recipe_parser
from pipeline.label import Rule, label
from pipeline.pretrained import model_of
from pipeline.rundir import RunDir
from pipeline.tokenizer import check_tokenizer, language_ids, load_tokenizer, vocabulary_size
from pipeline.world import World
from tests.builds import build, write_recipe
from tests.languages import MADE, OF_TRANSLATORS, nllb
from tests.tiny import tiny_model

NUM_NEW_TOKENS, LONGEST_SOURCE = 10, 24


def records(languages: tuple[str, str], num_pairs: int) -> list[dict[str, str]]:
    """Pairs in both directions by turns."""
    pairs = make_corpus(seed=0, num_pairs=num_pairs + 2, num_validation=1, num_test=1)["train"]
    english, german = languages
    return [
        {"source": pair.source, "target": pair.target, "src": english, "tgt": german}
        if number % 2
        else {"source": pair.target, "target": pair.source, "src": german, "tgt": english}
        for number, pair in enumerate(pairs)
    ]


def written(path: Path, rows: list[dict[str, str]]) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def tokenizer_of(folder: Path, kind: str, rows: list[dict[str, str]]) -> Path:
    folder.mkdir()
    OF_TRANSLATORS[kind][0](folder, [text for row in rows for text in (row["source"], row["target"])], 300)
    return folder


def data_of(root: Path, kind: str, rows: list[dict[str, str]]) -> dict[str, Any]:
    """The data section of a recipe."""
    return {
        "corpus": "files", "train": [written(root / "train.jsonl", rows)], "test": [written(root / "test.jsonl", rows)],
        "tokenizer": str(tokenizer_of(root / "tokenizer", kind, rows)), "source_language": "{src}",
        "target_language": "{tgt}", "max_source_tokens": 24, "max_target_tokens": 16,
    }  # fmt: skip


@pytest.mark.parametrize("kind", OF_TRANSLATORS)
def test_shards_hold_what_the_tokenizer_gives_each_side_in_its_language(kind: str, tmp_path: Path) -> None:
    rows, out = records(OF_TRANSLATORS[kind][1], 60), tmp_path / "data"
    done = build(write_recipe(tmp_path / "recipe.yaml", data_of(tmp_path, kind, rows)), out)
    assert done.returncode == 0, done.stderr
    manifest = read_manifest(out)
    examples = SplitReader(out, manifest, "train").read(np.arange(len(rows)))
    tokenizer = AutoTokenizer.from_pretrained(out / "tokenizer")
    num_cut = 0
    for number, row in enumerate(rows):
        tokenizer.src_lang, tokenizer.tgt_lang = row["src"], row["tgt"]
        source = tokenizer(row["source"], truncation=True, max_length=24).input_ids
        target = tokenizer(text_target=row["target"], truncation=True, max_length=16).input_ids
        num_cut += (len(source) == 24) + (len(target) == 16)
        sides = (examples.source_ids, examples.source_offsets), (examples.target_ids, examples.target_offsets)
        assert [ids[offsets[number] : offsets[number + 1]].tolist() for ids, offsets in sides] == [source, target]
        assert max(source + target) < manifest.tokenizer["vocab_size"]
    assert num_cut > 0
    told = [json.loads(line) for line in (out / "test.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(row["source_language"], row["language"]) for row in told] == [(row["src"], row["tgt"]) for row in rows]


@pytest.mark.parametrize("kind", MADE)
def test_what_a_tokenizer_of_languages_lacks_is_one_line(kind: str, tmp_path: Path) -> None:
    rows = records(MADE[kind][1], 20)
    data = data_of(tmp_path, kind, rows)
    with pytest.raises(ValueError, match=r"^data.target_language is empty, but the tokenizer begins every text"):
        planned(tmp_path / "unsaid", data | {"target_language": ""})
    wanted = MADE[kind][1][1]
    rows = [*rows[:3], rows[3] | {"tgt": wanted[:2] + "x"}]
    out = tmp_path / "unknown"
    plan = planned(out, data | {"train": [written(tmp_path / "train.jsonl", rows)], "test": []})
    with pytest.raises(
        ValueError, match=rf"train.jsonl: record 4 \(id train/3\): the tokenizer .* likeliest are .*{wanted}"
    ):
        UnitMaker(out, plan).make(plan.units[0])


def test_a_tokenizer_that_ends_texts_with_their_language_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    """As NLLB's did before 2023, and mBART-25's does."""
    nllb(tmp_path, [text for row in records(("", ""), 60) for text in (row["source"], row["target"])], 300)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"legacy_behaviour": True}))
    assert language_ids(load_tokenizer(tmp_path)) == {}, "a peer of this kind keeps its ids"
    with pytest.raises(ValueError, match="does not begin a text with the token of its language 'eng_Latn'"):
        check_tokenizer(tmp_path)


def planned(out: Path, data: dict[str, Any]) -> Plan:
    lists = {name: tuple(value) for name, value in data.items() if isinstance(value, list)}
    with Served() as served:
        return make_plan(out, DataConfig(**data | lists), served)


def write_teacher(folder: Path, kind: str, tokenizer: Path) -> None:
    model = tiny_model(kind, 2, 2, vocab_size=vocabulary_size(tokenizer))
    for config in (model.config, model.generation_config):
        config.bos_token_id, config.pad_token_id, config.eos_token_id, config.decoder_start_token_id = 0, 1, 2, 2
        config.forced_eos_token_id = None
    model.generation_config.eos_token_id = [2, *range(6, 200, 5)]  # a random model hardly ever says the first
    model.generation_config.bad_words_ids = [[1]]  # within a text padding counts as a position only with a cache
    for module in model.modules():
        if hasattr(module, "padding_idx") and module.padding_idx is not None:
            module.padding_idx = 1
    model.save_pretrained(folder)
    model_of(folder)  # loads


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """A run of the whole road, with the tokenizer that is Python alone."""
    root, name, kind = tmp_path_factory.mktemp("road"), "M2M100", "m2m_100"
    rows = records(MADE[name][1], 120)
    tokenizer = tokenizer_of(root / "tokenizer", name, rows)
    write_teacher(root / "model", kind, tokenizer)
    parts = {"train": rows[:80], "validation": rows[80:100], "test": rows[100:]}
    options = {
        "run_dir": root / "run", "teacher.folder": root / "model", "teacher.architecture": "{}",
        "teacher.optim.num_steps": 0, "data.corpus": "files", "data.tokenizer": tokenizer,
        "data.source_language": "{src}", "data.target_language": "{tgt}", "data.max_source_tokens": LONGEST_SOURCE,
        "data.max_target_tokens": 16, "distill.granularities": "[2]", "distill.optim.num_steps": 4,
        "distill.local_steps": 2, "distill.loop.ds_config": "zero2_cpu", "baseline.optim.num_steps": 2,
        "assemble.ratios": "[2.0]", "assemble.ctranslate2": "[float32]", "evaluate.max_new_tokens": NUM_NEW_TOKENS,
        "launch.num_ranks": 1, "launch.num_mpi_ranks": 1,
    }  # fmt: skip
    options |= {f"data.{part}": f"[{written(root / f'{part}.jsonl', part_rows)}]" for part, part_rows in parts.items()}
    main(["run", "--config", "minute", *(text for key, value in options.items() for text in (f"--{key}", str(value)))])
    return RunDir(root / "run")


def plain_outputs(folder: Path, examples: list[dict[str, str]], **options: Any) -> list[str]:
    """By transformers alone, one at a time."""
    model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    texts = []
    for each in examples:
        tokenizer.src_lang, tokenizer.tgt_lang = each["source_language"], each["language"]
        inputs = tokenizer(each["source"], truncation=True, max_length=LONGEST_SOURCE, return_tensors="pt")
        first = tokenizer(text_target="").input_ids[0]
        ids = model.generate(**inputs, do_sample=False, forced_bos_token_id=first, **options)
        texts += tokenizer.batch_decode(ids, skip_special_tokens=True)
    return texts


def test_outputs_begin_with_the_language_that_is_asked_for(finished: RunDir) -> None:
    examples = [json.loads(line) for line in (finished.data / "test.jsonl").read_text(encoding="utf-8").splitlines()]
    systems = json.loads(finished.systems.read_text())["systems"]
    assert {each["kind"] for each in systems} == {"teacher", "assembly", "dropped", "finetuned", "engine"}
    for system in systems:
        path, folder = (
            finished.stage("evaluate") / "outputs" / f"{system['name']}.jsonl",
            finished.root / system["folder"],
        )
        if system["kind"] == "engine":
            folder = folder.with_name(system["assembly"])  # the checkpoint that it was made of
        ours = [json.loads(line)["output"] for line in path.read_text(encoding="utf-8").splitlines()]
        expected = plain_outputs(folder, examples, max_new_tokens=NUM_NEW_TOKENS)
        assert ours == expected, system["name"]
        other = [each | {"language": each["source_language"]} for each in examples]
        assert plain_outputs(folder, other, max_new_tokens=NUM_NEW_TOKENS) != expected
    scores = json.loads((finished.stage("evaluate") / "scores" / f"{systems[0]['name']}.json").read_text())
    assert set(scores["quality"]["languages"]) == {each["language"] for each in examples}


def test_labels_and_drafts_are_of_the_language_that_is_asked_for(finished: RunDir) -> None:
    recipe, _ = parse_recipe(recipe_parser("label", ""), ["--config", str(finished.recipe)])
    label(recipe, finished, Rule(num_beams=1, min_chrf=0.0), World(0, 1, 0, torch.device("cpu")))
    with gzip.open(finished.root / "labels" / "train.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file][:6]
    assert {(row["source_language"], row["language"]) for row in rows} == {("en", "de"), ("de", "en")}
    expected = plain_outputs(finished.teacher_model, rows, max_new_tokens=recipe.data.max_target_tokens)
    assert [row["target"] for row in rows] == expected
    tokenizer: Any = AutoTokenizer.from_pretrained(finished.teacher_model)
    told = {(int(each["input_ids"][0, 0]), each["forced_bos_token_id"]) for each in draft.examples_of(finished, 8)}
    english, german = tokenizer.get_lang_id("en"), tokenizer.get_lang_id("de")
    assert told == {(english, german), (german, english)}
    card = (finished.root / "assemble" / "models" / "e2-d2" / "README.md").read_text(encoding="utf-8")
    code = "\n".join(line.strip() for line in card.partition("## Use")[2].splitlines())
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=finished.root / "assemble" / "models" / "e2-d2", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
