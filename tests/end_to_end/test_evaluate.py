"""Evaluation by real worker processes: kills, several workers, damage, and outputs that need none of this project."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import subprocess
import sys
import traceback
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BartForConditionalGeneration, PegasusForConditionalGeneration, T5Tokenizer

from data_prep.publish import sha256_of
from pipeline.assemble.stage import convert
from pipeline.assemble.systems import System
from pipeline.assemble.write import Parts
from pipeline.config.recipe import Recipe
from pipeline.engines import ENGINES, Translator
from pipeline.evaluation import stage
from pipeline.evaluation.cost import costs
from pipeline.report.choose import choose, export
from pipeline.report.data import read_rows
from pipeline.report.stage import report
from pipeline.rundir import hashes, write_atomic
from pipeline.rundir.run_dir import RunDir
from tests.evaluated import (
    NUM_EXAMPLES,
    NUM_NEW_TOKENS,
    SYSTEMS,
    evaluate_here,
    exit_code,
    finished,
    inputs,
    kill_when,
    outputs,
    start_worker,
    table,
    when_published,
    write_library,
    write_model,
)

__all__ = ["finished", "inputs"]  # fixtures

PLAIN_PROCESS = """
import json, sys
sys.modules["pipeline"] = sys.modules["data_prep"] = None  # installed or not, they cannot be imported here
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer
folder, num_new_tokens = sys.argv[1], int(sys.argv[2])
model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
sources, outputs = json.load(sys.stdin), []
for first in range(0, len(sources), 16):
    inputs = tokenizer(sources[first : first + 16], return_tensors="pt", padding=True)
    ids = model.generate(**inputs, max_new_tokens=num_new_tokens)
    outputs += tokenizer.batch_decode(ids, skip_special_tokens=True)
print(json.dumps(outputs))
"""


def test_scores(finished: Path) -> None:
    rows = table(finished)
    assert [row["name"] for row in rows] == [name for name, *_ in SYSTEMS]
    assert rows[0]["bleu"] == rows[0]["exact_match"] == rows[0]["percent_of_teacher"] == "100.0000"
    assert all(float(row["bleu"]) < 50 for row in rows[1:])
    assert {row["examples"] for row in rows} == {str(NUM_EXAMPLES)}
    assert rows[1]["requests"] == "size-first 2; speed-first 2"
    assert rows[1]["ratio_layers"] == "2.0000"
    assert not (finished / "evaluate/claims").exists()
    stamp = json.loads((finished / "evaluate/stage.json").read_text())
    assert len(stamp["outputs"]) == 2 + 2 * len(SYSTEMS)


def test_killed_and_resumed_equals_uninterrupted(inputs: Path, finished: Path, tmp_path: Path) -> None:
    root = tmp_path / "run"
    shutil.copytree(inputs, root)
    for progress in ((1, 0), (3, 2), (4, len(SYSTEMS))):  # while decoding, while scoring, while costs are measured
        kill_when(start_worker(root), root, *progress)
        assert not (root / "evaluate/scores.csv").exists()
    kept = when_published(root)
    assert exit_code(start_worker(root)) == 0
    assert table(root) == table(finished)
    assert outputs(root) == outputs(finished)
    assert when_published(root) == kept


def test_two_workers_equal_one(inputs: Path, finished: Path, tmp_path: Path) -> None:
    root = tmp_path / "run"
    shutil.copytree(inputs, root)
    workers = [start_worker(root, rank, 2) for rank in range(2)]
    assert [exit_code(worker) for worker in workers] == [0, 0]
    assert table(root) == table(finished)
    assert outputs(root) == outputs(finished)


def test_worker_0_takes_over_from_a_killed_worker(
    inputs: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "run"
    shutil.copytree(inputs, root)
    kill_when(start_worker(root, rank=1, size=2), root, num_units=1, num_scores=0)
    assert not when_published(root)
    read: list[Path] = []
    monkeypatch.setattr(hashes, "SMALL", 0)
    monkeypatch.setattr(hashes, "sha256_of", lambda path: read.append(path) or sha256_of(path))
    evaluate_here(root)
    assert table(root) == table(finished)
    assert {"model.safetensors", "modular.safetensors"} <= {path.name for path in read}
    assert len(read) == len(set(read)), "large files are read once to be checked"
    read.clear()
    evaluate_here(root)
    assert not read, "and not again while they are the same"


def test_what_is_damaged_is_done_again(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "run"
    shutil.copytree(finished, root)
    before = when_published(root)
    score = root / "evaluate/scores/e2-d2.json"
    score.write_text(score.read_text().replace('"chrf_low": ', '"chrf_low": 9'))  # still JSON
    (root / "evaluate/scores/e1x2-d2.json").write_text('{"name": "e1x')
    with open(root / "evaluate/outputs/drop-e2-d2.jsonl", "a", encoding="utf-8") as file:
        file.write("{}\n")
    (root / "evaluate/costs.json").write_text("[]")
    measured: list[str] = []
    monkeypatch.setattr(stage, "costs", lambda folders, *rest: measured.extend(folders) or costs(folders, *rest))
    evaluate_here(root)
    assert measured == [name for name, *_ in SYSTEMS if name != "drop-e2-d2"], "one shape is measured once"
    found = json.loads((root / "evaluate/costs.json").read_text())["costs"]
    assert found["e2-d2"] == found["drop-e2-d2"]
    assert table(root) == table(finished)
    assert outputs(root) == outputs(finished)
    again = {name for name, instant in when_published(root).items() if before[name] != instant}
    assert again == {"e2-d2", "e1x2-d2", "drop-e2-d2"}


def test_nothing_changed_nothing_done(finished: Path, tmp_path: Path) -> None:
    root = tmp_path / "run"
    shutil.copytree(finished, root)
    before = when_published(root), (root / "evaluate/scores.csv").read_bytes()
    evaluate_here(root)
    assert (when_published(root), (root / "evaluate/scores.csv").read_bytes()) == before


def test_other_weights_or_settings_are_scored_anew(finished: Path, tmp_path: Path) -> None:
    root = tmp_path / "run"
    shutil.copytree(finished, root)
    before = when_published(root)
    shutil.copy2(root / "teacher/model/tokenizer.json", root / "baseline/model/another.json")
    run = RunDir(root)
    shutil.rmtree(run.library)
    write_library(run, seed=7)
    evaluate_here(root)
    changed = {name for name, instant in when_published(root).items() if before[name] != instant}
    assert changed == {"e2-d2", "e1x2-d2", "finetuned-e2-d2"}, "not the teacher, nor what has only its layers"
    rows, old = ({row["name"]: row for row in table(each)} for each in (root, finished))
    assert rows["e2-d2"]["chrf"] != old["e2-d2"]["chrf"]
    assert rows["finetuned-e2-d2"] == old["finetuned-e2-d2"]
    before = when_published(root)
    generation = run.teacher_model / "generation_config.json"
    write_atomic(generation, json.dumps({**json.loads(generation.read_text()), "min_length": 3}))
    evaluate_here(root)
    changed = {name for name, instant in when_published(root).items() if before[name] != instant}
    assert changed == {"e1x2-d1x2", "e2-d2", "e1x2-d2", "drop-e2-d2"}, "what is generated as the teacher says"
    evaluate_here(root, max_new_tokens=5)
    assert all(before[name] != instant for name, instant in when_published(root).items())


@pytest.mark.parametrize("name", ["e1x2-d1x2", "e1x2-d2"])
def test_a_process_without_this_project_decodes_the_same(finished: Path, tmp_path: Path, name: str) -> None:
    scored = [json.loads(line) for line in outputs(finished)[f"{name}.jsonl"].decode().split("\n") if line]
    assert len(scored) == 200
    assert len({record["output"] for record in scored}) > 20, "outputs that hardly differ prove nothing"
    folder = finished / "assemble/models" / name
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    plain = subprocess.run(
        [sys.executable, "-I", "-c", PLAIN_PROCESS, str(folder), str(NUM_NEW_TOKENS)],
        input=json.dumps([record["source"] for record in scored]),
        capture_output=True, text=True, check=True, cwd=tmp_path, env=environment,
    )  # fmt: skip
    assert json.loads(plain.stdout) == [record["output"] for record in scored]


def test_peers_that_cannot_be_scored_keep_nothing_else_from_it(inputs: Path, finished: Path, tmp_path: Path) -> None:
    """All that can be known of their folders is in one line, which comes last."""
    root = tmp_path / "run"
    shutil.copytree(inputs, root)
    mute, large = tmp_path / "mute", tmp_path / "large"
    for folder in (mute, large):
        shutil.copytree(root / "baseline/model", folder)
    for path in (*mute.glob("*token*"), *mute.glob("spiece*")):
        path.unlink()
    tokenizer = T5Tokenizer.from_pretrained(large)
    tokenizer.add_tokens([f"word{i}" for i in range(200)])
    tokenizer.save_pretrained(large)
    folders = ("{0}/nowhere", "e2-d2={1}", "a/b={1}", "good={1}", "good={1}", str(mute), str(large))
    folders = tuple(text.format(tmp_path, root / "baseline/model") for text in folders)
    with pytest.raises(ValueError, match="nowhere is not a Hugging Face folder") as caught:
        evaluate_here(root, folders=folders)
    for said in (
        "a system e2-d2, as systems of this run are called", "calls a system 'a/b'", "two systems are called good",
        "mute has no tokenizer: save one", "large has 2.. tokens, its model's embedding only", "scores of all others",
    ):  # fmt: skip
        assert re.search(said, str(caught.value)), said
    assert "\n" not in str(caught.value)
    assert [row for row in table(root) if row["name"] != "good"] == table(finished)
    assert not (root / "evaluate/stage.json").exists()


def test_a_peer_that_fails_or_has_few_positions_is_told_and_the_others_go_on(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "run"
    shutil.copytree(finished, root)
    failing, half, short = (tmp_path / name for name in ("failing", "half", "short"))
    for folder in (failing, half):
        shutil.copytree(RunDir(root).teacher_model, folder)
    settings = json.loads((failing / "generation_config.json").read_text())
    (failing / "generation_config.json").write_text(json.dumps({**settings, "sequence_bias": [[[1], "much"]]}))
    weights = load_file(half / "model.safetensors")
    del weights["encoder.final_layer_norm.weight"]
    save_file(weights, half / "model.safetensors", metadata={"format": "pt"})
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2}
    sizes |= {"decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "vocab_size": 64}
    sizes |= {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0, "max_position_embeddings": 6}
    for folder, made in ((short, PegasusForConditionalGeneration), (tmp_path / "bart", BartForConditionalGeneration)):
        made(made.config_class(**sizes)).save_pretrained(folder)
        T5Tokenizer.from_pretrained(RunDir(root).teacher_model).save_pretrained(folder)
    with pytest.raises(ValueError, match=r"half: its weights lack encoder.final_layer_norm.weight"):
        evaluate_here(root, folders=(str(failing), str(half), str(short), str(tmp_path / "bart")))
    rows = {row["name"]: row for row in table(root)}
    assert "much" in rows["failing"]["failed"]
    assert "half" not in rows
    warnings = capsys.readouterr().err
    costs = json.loads((root / "evaluate/costs.json").read_text())["costs"]
    for name in ("short", "bart"):
        assert rows[name]["bleu"]
        assert costs[name]["latency_ms"] > 0
        assert rows[name]["note"] == (
            "cuts sources to 6, references to 6, outputs to 6 tokens, for which it has positions"
        )
        assert f"warning: {name} cuts sources to 6" in warnings
    assert [row for name, row in rows.items() if row["kind"] != "peer"] == table(finished)
    report(Recipe(), RunDir(root))
    assert "<code>short</code> cuts sources to 6" in (root / "report/report.html").read_text()
    assert "bart cuts sources to 6" in capsys.readouterr().out


def test_peers_enter_the_table_and_empty_outputs_are_told(
    inputs: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "run"
    shutil.copytree(finished, root)
    mute = tmp_path / "mute"
    shutil.copytree(root / "baseline/model", mute)
    weights = load_file(mute / "model.safetensors")
    silent = {**weights, "shared.weight": torch.zeros_like(weights["shared.weight"])}  # all logits 0: padding wins
    save_file(silent, mute / "model.safetensors", metadata={"format": "pt"})
    unlike = tmp_path / "unlike"  # what Rules do not carry goes through transformers' own generate
    shutil.copytree(RunDir(root).teacher_model, unlike)
    config = json.loads((unlike / "generation_config.json").read_text())
    (unlike / "generation_config.json").write_text(json.dumps({**config, "encoder_no_repeat_ngram_size": 30}))
    evaluate_here(root, folders=(str(mute), f"by-generate={unlike}"))
    rows = {row["name"]: row for row in table(root)}
    assert rows["mute"]["kind"] == rows["by-generate"]["kind"] == "peer"
    assert rows["mute"]["bleu"] == "0.0000"
    for column in ("bleu", "chrf", "rougeL", "parameters", "encoder_layers"):
        assert rows["by-generate"][column] == rows["e1x2-d1x2"][column], column
    assert float(rows["by-generate"]["loss"]) == pytest.approx(float(rows["e1x2-d1x2"]["loss"]), abs=2e-4)
    assert [line for line in capsys.readouterr().err.split("\n") if "empty" in line] == [
        "warning: all outputs of mute are empty: its scores say only that"
    ]


@pytest.mark.skipif((engine := ENGINES["ctranslate2"]).is_missing, reason=f"no CTranslate2 here: {engine.install}")
def test_models_of_an_engine_are_scored_timed_chosen_and_exported(finished: Path, tmp_path: Path) -> None:
    root = tmp_path / "run"
    shutil.copytree(finished, root)
    run, before = RunDir(root), when_published(root)
    systems = [System(**each) for each in json.loads(run.systems.read_text())["systems"]]
    parts, checkpoint = Parts.of(run), next(each for each in systems if each.name == "e1x2-d2")
    engines = [convert(run, parts, checkpoint, quantization) for quantization in ("float32", "int8")]
    run.systems.write_text(json.dumps({"systems": [asdict(each) for each in (*systems, *engines)]}))
    evaluate_here(root)
    assert {name: when_published(root)[name] for name in before} == before
    rows = {row.name: row for row in read_rows(run.scores)[0]}
    plain, whole, small = rows["e1x2-d2"], rows["ct2-float32-e1x2-d2"], rows["ct2-int8-e1x2-d2"]
    assert [row.kind for row in (plain, whole, small)] == ["assembly", "engine", "engine"]
    assert texts_of(root, whole.name) == texts_of(root, plain.name)
    assert texts_of(root, small.name) != texts_of(root, plain.name)
    for name, score in plain.scores.items():
        assert whole.scores[name] == pytest.approx(score, abs=2e-4), name
    assert 0 < small.scores["loss"] != plain.scores["loss"]
    assert small.bytes == (root / "assemble/models/ct2-int8-e1x2-d2/model.bin").stat().st_size < 0.6 * plain.bytes
    assert all(row.latency_ms and row.tokens_per_s and row.peak_memory_bytes for row in (whole, small))
    assert (small.layer_flops, small.parameters, small.layers) == (None, plain.parameters, plain.layers)
    assert choose(list(rows.values()), num_bytes=small.bytes) == small
    export(run, small, tmp_path / "out")
    assert "ctranslate2.Translator" in (card := (tmp_path / "out" / "README.md").read_text())
    assert f"{small.bleu:.4g} (" in card
    exported = Translator(tmp_path / "out", torch.device("cpu"))
    assert exported.num_bytes == small.bytes


def texts_of(root: Path, name: str) -> list[str]:
    lines = (root / f"evaluate/outputs/{name}.jsonl").read_text().splitlines()
    return [json.loads(line)["output"] for line in lines]


def test_what_runs_out_of_memory_is_marked_and_the_others_go_on(finished: Path, tmp_path: Path) -> None:
    """The memory is really short: the process may take no more than what one peer's weights need."""
    root = tmp_path / "run"
    shutil.copytree(finished, root)
    large = tmp_path / "large"
    tokenizer = T5Tokenizer.from_pretrained(RunDir(root).teacher_model)
    write_model(large, tokenizer, seed=3, depth=1, d_ff=300_000)
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            in_use = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
            resource.setrlimit(resource.RLIMIT_AS, (in_use + 100 * 2**20,) * 2)
            evaluate_here(root, folders=(str(large),))
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    rows = {row["name"]: row for row in table(root)}
    assert rows["large"]["failed"] == "out of memory"
    assert rows["large"]["bleu"] == rows["large"]["percent_of_teacher"] == ""
    assert [row for name, row in rows.items() if name != "large"] == table(finished)
    before = when_published(root)
    evaluate_here(root, folders=(str(large),))  # with memory again
    assert {row["name"]: row for row in table(root)}["large"]["failed"] == ""
    assert {name: instant for name, instant in when_published(root).items() if name != "large"} == before
