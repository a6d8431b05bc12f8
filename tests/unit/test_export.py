"""What export writes computes what the checkpoint computes: outputs of CTranslate2 and of ONNX Runtime."""

from __future__ import annotations

import itertools
import json
import os
import random
import re
import sys
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from pipeline import export as exporting
from pipeline.__main__ import main
from pipeline.bench import __main__ as bench
from pipeline.bench import engines
from pipeline.decoding import generate, losses_of
from pipeline.engines import ENGINES, ctranslate, onnx, refuse_kind
from pipeline.ordinary import check_ordinary
from tests.readers import test_readers
from tests.readers.environments import place_of
from tests.readers.test_readers import MAX_NEW_TOKENS, TEXTS, WITH_PIECES, exported
from tests.tiny import OWN_TOKENIZER, read_plainly

ASSEMBLIES = ("e2x2-d4", "e4-d1x4")  # both stacks changed, the decoder deeper
STRONGER = {"bart": 3.0, "bart-scaled": 3.0, "Pegasus": 2.0, "OPUS-MT": 3.0}
"""By what factor matrices are larger, so that outputs are not all the same."""
SAMPLE = [("v1.0", "e4-d1x4"), *((kind, "e2x2-d4") for kind in ("v1.0", "v1.1", "bart", "M2M100"))]
"""Of what is tried with ONNX Runtime; make test-readers tries everything."""
LANGUAGES = {"NLLB": ("deu_Latn", "fra_Latn"), "M2M100": ("de", "fr"), "mBART-50": ("de_DE", "fr_XX")}
CTRANSLATE = ENGINES["ctranslate2"]
NEEDS_ENGINE = pytest.mark.skipif(CTRANSLATE.is_missing, reason=f"no CTranslate2 here: {CTRANSLATE.install}")


@pytest.fixture
def onnx_here(monkeypatch):
    """The packages of ONNX Runtime, which nothing else needs; skips the test where they are not, except in CI."""
    if place := place_of("onnx"):
        monkeypatch.syspath_prepend(place)
    if ENGINES["onnx"].is_missing:
        assert "CI" not in os.environ, "CI tests exports for ONNX Runtime: make onnx-here"
        pytest.skip("ONNX is not here: make onnx-here fetches it once")
    assert {name: metadata.version(name) for name in ENGINES["onnx"].packages} == ENGINES["onnx"].packages


def run_export(root, *arguments):
    main(["export", "--run", str(root / "run"), *arguments])


def code_of(folder):
    """The code in a README, as lines."""
    code = (folder / "README.md").read_text().partition("## Use")[2]
    return [line.removeprefix("    ") for line in code.splitlines() if line.startswith("    ")]


def engine_outputs(folder, num_beams):
    """Outputs as ids without special tokens, by CTranslate2."""
    import ctranslate2

    translator, tokenizer = ctranslate2.Translator(str(folder)), AutoTokenizer.from_pretrained(folder)
    pieces = [tokenizer.convert_ids_to_tokens(ids) for ids in tokenizer(TEXTS).input_ids]
    results = translator.translate_batch(
        pieces, beam_size=num_beams, patience=ctranslate.PATIENCE, max_decoding_length=MAX_NEW_TOKENS
    )
    vocabulary = {
        piece: index for index, piece in enumerate(json.loads((folder / "shared_vocabulary.json").read_text()))
    }
    return [[vocabulary[piece] for piece in result.hypotheses[0]] for result in results]


def plain_outputs(folder, num_beams):
    model, tokenizer = read_plainly(Path(folder)), AutoTokenizer.from_pretrained(folder)
    batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    model.generation_config = type(model.generation_config)(
        decoder_start_token_id=model.config.decoder_start_token_id, eos_token_id=model.config.eos_token_id,
        pad_token_id=model.config.pad_token_id,
    )  # fmt: skip
    rows = model.generate(**inputs, num_beams=num_beams, do_sample=False, max_new_tokens=MAX_NEW_TOKENS)[:, 1:].tolist()
    ended = [row[: row.index(model.config.eos_token_id)] if model.config.eos_token_id in row else row for row in rows]
    return ended


@NEEDS_ENGINE
@pytest.mark.parametrize("kind", [*OWN_TOKENIZER, *WITH_PIECES])
def test_ctranslate2_writes_what_generate_writes(tmp_path, kind):
    models, _ = exported(tmp_path, kind, ASSEMBLIES, strength=STRONGER.get(kind, 1.0))
    for folder, text in zip(models, ASSEMBLIES, strict=True):
        run_export(tmp_path, "--assembly", text, "--to", "ctranslate2")
        converted = tmp_path / "run" / "export" / "ctranslate2-float32" / text
        for num_beams in (1, 4):
            assert engine_outputs(converted, num_beams) == plain_outputs(folder, num_beams)
        assert len({tuple(row) for row in plain_outputs(folder, 1)}) > 1
        assert f"`{text}`" in (told := (converted / "README.md").read_text())
        assert f"'patience': {ctranslate.PATIENCE}" in told, "the settings of generation have 3 beams"


@NEEDS_ENGINE
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"min_length": 5},
        {"forced_bos_token_id": 9, "forced_eos_token_id": 7, "no_repeat_ngram_size": 2},
        {"eos_token_id": [1, 198, 231], "bad_words_ids": [[37], [14, 276]]},
    ],
)
def test_a_converted_model_takes_and_gives_ids_as_generate_does(tmp_path, settings):
    models, _ = exported(tmp_path, "v1.1", ASSEMBLIES[:1])
    checkpoint, folder = Path(next(iter(models))), tmp_path / "converted"
    weights = load_file(checkpoint / "model.safetensors")
    weights["lm_head.weight"][1] *= 10  # then some outputs end, some of them at once
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})
    told = {"decoder_start_token_id": 0, "eos_token_id": 1, "pad_token_id": 0, **settings}
    (checkpoint / "generation_config.json").write_text(json.dumps(told))
    folder.mkdir()
    ctranslate.to_ctranslate2(checkpoint, folder, "float32")
    engine = ctranslate.Translator(folder, torch.device("cpu"))
    model = AutoModelForSeq2SeqLM.from_pretrained(checkpoint).eval()
    generator = torch.Generator().manual_seed(0)
    sources, references = (
        [[*torch.randint(3, 180, (length,), generator=generator).tolist(), 1] for length in range(1, 25)]
        for _ in range(2)
    )
    expected = generate(model, sources, 8, 1)
    assert engine.generate(sources, 8, 1) == expected
    lengths = {len(ids) for ids in expected}
    assert (min(lengths), max(lengths)) == (settings.get("min_length", 1 + ("forced_bos_token_id" in settings)), 8)
    assert engine.losses_of(sources, references) == pytest.approx(losses_of(model, sources, references), rel=1e-4)
    assert {len(ids) for ids in engine.generate(sources, 6, 1, min_new_tokens=6)} == {6}
    other = engine.generate(sources, 8, 1, forced_bos_ids=[11] * 12 + [12] * 12)
    assert other == generate(model, sources, 8, 1, forced_bos_ids=[11] * 12 + [12] * 12)


@NEEDS_ENGINE
@pytest.mark.parametrize("kind", ["NLLB", "M2M100", "mBART-50"])
def test_the_code_beside_an_engines_model_asks_for_a_language(tmp_path, monkeypatch, capsys, kind):
    """As generate is asked: the text begins with the token of its language, the output with that of its own."""
    models, _ = exported(tmp_path, kind, ASSEMBLIES[:1])
    run_export(tmp_path, "--assembly", ASSEMBLIES[0], "--to", "ctranslate2")
    converted = tmp_path / "run" / "export" / "ctranslate2-float32" / ASSEMBLIES[0]
    folder = next(iter(models))
    model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    source, target = LANGUAGES[kind]
    tokenizer.src_lang, tokenizer.tgt_lang = source, target
    first = tokenizer(text_target="").input_ids[0]
    model.generation_config = type(model.generation_config)(decoder_start_token_id=2, eos_token_id=2, pad_token_id=1)
    inputs = tokenizer(TEXTS[0], return_tensors="pt")
    ids_1T = model.generate(**inputs, forced_bos_token_id=first, do_sample=False, max_new_tokens=MAX_NEW_TOKENS)
    lines = code_of(converted)
    changes = {
        "tokenizer.src_lang = ": f"tokenizer.src_lang, tokenizer.tgt_lang = {LANGUAGES[kind]}",
        "options = ": f"options = {{'beam_size': 1, 'max_decoding_length': {MAX_NEW_TOKENS}}}",
    }
    asked = [next((new for old, new in changes.items() if line.startswith(old)), line) for line in lines]
    assert sum(a != b for a, b in zip(asked, lines, strict=True)) == 2
    monkeypatch.chdir(converted)
    capsys.readouterr()
    exec("\n".join(asked).replace('"a text"', repr(TEXTS[0])), {})
    assert capsys.readouterr().out == tokenizer.decode(ids_1T[0], skip_special_tokens=True) + "\n"


@NEEDS_ENGINE
@pytest.mark.parametrize(("kind", "setting"), [("v1.1", "scale_decoder_outputs"), ("mt5", "tie_word_embeddings")])
def test_a_converted_model_that_scales_what_it_should_not_is_never_published(tmp_path, monkeypatch, kind, setting):
    exported(tmp_path, kind, ASSEMBLIES[:1])

    def misled(checkpoint):
        converter = real(checkpoint)
        load = converter.load_model

        def load_model(*arguments, **options):
            model = load(*arguments, **options)
            model.config.tie_word_embeddings = True  # as transformers 5 has it, whatever the file says
            return model

        converter.load_model = load_model
        return converter

    real = ctranslate._converter
    monkeypatch.setattr(ctranslate, "_converter", misled)
    with pytest.raises(ValueError, match=r"gives log-probabilities up to .* apart: not published"):
        exporting.export_command(["--run", str(tmp_path / "run"), "--assembly", ASSEMBLIES[0], "--to", "ctranslate2"])
    assert list((tmp_path / "run" / "export" / "ctranslate2-float32").iterdir()) == []


def run_graphs(folder, texts):
    """What the code beside graphs writes for these texts, at most MAX_NEW_TOKENS: ids."""
    changed, num_changed = re.subn(
        r"'max_new_tokens': \d+", f"'max_new_tokens': {MAX_NEW_TOKENS}", "\n".join(code_of(folder))
    )
    assert num_changed == 1
    known = {"TEXTS": texts}
    exec(changed.replace('folder, texts = ".", ["a text"]', f"folder, texts = {str(folder)!r}, TEXTS"), known)
    return known["ids"]


def greedy_settings(model, tokenizer):
    """What holds of greedy decoding in a folder's settings."""
    told = model.generation_config
    first = told.forced_bos_token_id
    if getattr(tokenizer, "src_lang", None):
        tokenizer.tgt_lang = tokenizer.src_lang
        first = tokenizer(text_target="").input_ids[0]
    return type(told)(
        decoder_start_token_id=model.config.decoder_start_token_id, eos_token_id=model.config.eos_token_id,
        pad_token_id=model.config.pad_token_id, bad_words_ids=told.bad_words_ids, forced_bos_token_id=first,
        max_new_tokens=MAX_NEW_TOKENS, do_sample=False,
    )  # fmt: skip


def some_texts(num_texts):
    """Texts of the words of TEXTS, with one word to five."""
    words, draw = " ".join(TEXTS).split(), random.Random(0)
    return [" ".join(draw.choices(words, k=draw.randint(1, 5))) for _ in range(num_texts)]


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        pytest.param(*each, marks=[] if each in SAMPLE else pytest.mark.readers)
        for each in itertools.product((*OWN_TOKENIZER, *WITH_PIECES), ASSEMBLIES)
    ],
)
def test_graphs_write_what_generate_writes(tmp_path, onnx_here, kind, text):
    """200 texts in one batch with padding, by the code in the README."""
    models, _ = exported(tmp_path, kind, (text,), strength=STRONGER.get(kind, 1.0))
    run_export(tmp_path, "--assembly", text, "--to", "onnx")
    texts, (folder,) = some_texts(200), models
    graphs = tmp_path / "run" / "export" / "onnx-float32" / text
    ids = run_graphs(graphs, texts)
    model, tokenizer = read_plainly(Path(folder)), AutoTokenizer.from_pretrained(folder)
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    model.generation_config = greedy_settings(model, tokenizer)
    outputs = model.generate(**inputs)
    assert ids.tolist() == outputs.tolist()
    assert len({tuple(row) for row in outputs.tolist()}) > 2, "outputs depend on inputs"
    with torch.no_grad():
        hidden = model.get_encoder()(**inputs).last_hidden_state
        logits = model(**inputs, decoder_input_ids=outputs[:, :1]).logits
    encoder, first, _ = onnx.sessions(graphs)
    given = {name: each.numpy() for name, each in inputs.items()}
    (found,) = encoder.run(None, given)
    mask = given["attention_mask"] == 1
    np.testing.assert_allclose(found[mask], hidden.numpy()[mask], atol=1e-4)
    (begun, _) = onnx.advance(first, given["attention_mask"], outputs[:, :1].numpy(), {"encoder_hidden_states": found})
    np.testing.assert_allclose(begun, logits.numpy(), atol=1e-4)


def test_the_graphs_of_a_decoder_share_their_weights_and_are_named_as_optimum_names_them(tmp_path, onnx_here):
    models, _ = exported(tmp_path, "v1.0", ASSEMBLIES[1:])
    run_export(tmp_path, "--assembly", ASSEMBLIES[1], "--to", "onnx")
    folder = tmp_path / "run" / "export" / "onnx-float32" / ASSEMBLIES[1]
    weights = load_file(f"{next(iter(models))}/model.safetensors")
    stored = sum(path.stat().st_size for path in folder.glob("*.onnx_data"))
    whole = sum(weight.nbytes for weight in weights.values()) + weights["shared.weight"].nbytes  # encoder and decoder
    assert 0.97 * whole < stored < 1.01 * whole
    assert (folder / "config.json").is_file()
    assert (folder / "generation_config.json").is_file()
    encoder, first, later = onnx.sessions(folder)
    own, cross = ([f"{layer}.{stack}.{kind}" for layer in range(4) for kind in ("key", "value")]
                  for stack in ("decoder", "encoder"))  # fmt: skip
    given, made = ([{each.name for each in getter()} for getter in getters] for getters in (
        (encoder.get_inputs, first.get_inputs, later.get_inputs),
        (encoder.get_outputs, first.get_outputs, later.get_outputs),
    ))  # fmt: skip
    mask = "encoder_attention_mask"
    assert given[:2] == [{"input_ids", "attention_mask"}, {"input_ids", mask, "encoder_hidden_states"}]
    assert given[2] == {"input_ids", mask, *(f"past_key_values.{name}" for name in (*own, *cross))}
    assert made[:2] == [{"last_hidden_state"}, {"logits", *(f"present.{name}" for name in (*own, *cross))}]
    assert made[2] == {"logits", *(f"present.{name}" for name in own)}


def test_graphs_that_compute_something_else_are_never_published(tmp_path, monkeypatch, onnx_here):
    exported(tmp_path, "v1.1", ASSEMBLIES[:1])
    step = onnx._Next.step
    monkeypatch.setattr(
        onnx._Next, "step", lambda self, mask, *arguments: step(self, torch.ones_like(mask), *arguments)
    )
    with pytest.raises(ValueError, match=r"gives log-probabilities up to .* apart: not published"):
        exporting.export_command(["--run", str(tmp_path / "run"), "--assembly", ASSEMBLIES[0], "--to", "onnx"])
    assert list((tmp_path / "run" / "export" / "onnx-float32").iterdir()) == []


def test_graphs_in_int8_write_nearly_the_same_in_fewer_bytes(tmp_path, onnx_here):
    exported(tmp_path, "v1.0", ASSEMBLIES[:1])
    ids, sizes = {}, {}
    for quantization in ("float32", "int8"):
        run_export(tmp_path, "--assembly", ASSEMBLIES[0], "--to", "onnx", "--quantization", quantization)
        folder = tmp_path / "run" / "export" / f"onnx-{quantization}" / ASSEMBLIES[0]
        ids[quantization] = run_graphs(folder, some_texts(50))
        sizes[quantization] = sum(path.stat().st_size for path in folder.glob("*.onnx_data"))
    assert sizes["int8"] < 0.32 * sizes["float32"]
    assert np.mean(ids["int8"][:, 1] == ids["float32"][:, 1]) > 0.8, "the first tokens"


def test_the_benchmark_of_engines_reads_a_umt5_as_it_was_written(tmp_path):
    ((folder, model),) = exported(tmp_path, "umt5", ASSEMBLIES[:1], strength=2.0)[0].items()
    found = engines.written(engines.load_transformers, Path(folder), TEXTS, 4, MAX_NEW_TOKENS).ids
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = generate(model, tokenizer(TEXTS).input_ids, MAX_NEW_TOKENS, 4)
    assert found == [[each for each in row if each != model.config.eos_token_id] for row in rows]


def test_the_benchmark_of_engines_measures_graphs_against_generate(tmp_path, monkeypatch, capsys, onnx_here):
    monkeypatch.setattr(test_readers, "GENERATION", {})  # greedy decoding of graphs has no other rules
    exported(tmp_path, "v1.1", ASSEMBLIES)
    write_systems(tmp_path / "run")
    examples = [json.dumps({"source": text, "target": text}) for text in TEXTS]
    (tmp_path / "run" / "data").mkdir()
    (tmp_path / "run" / "data" / "test.jsonl").write_text("\n".join(examples))
    command = ["engines", "--run", str(tmp_path / "run"), "--to", "onnx", "--max-new-tokens", str(MAX_NEW_TOKENS)]
    assert bench.main(command) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("| assembly", "| e"))]
    names, *rows = (line.split(" | ") for line in lines[-3:])
    assert [row[0] for row in rows] == ["| e1x4-d1x4", "| e2x2-d4"]
    for row in (dict(zip(names, cells, strict=True)) for cells in rows):
        assert row["greedy equal"] == str(len(TEXTS))
        assert row["BLEU fp32"] == row["BLEU generate"]
        assert float(row["MB int8"]) < float(row["MB fp32"])


def write_systems(run):
    """What stage assemble says it has made: the teacher and an assembly."""
    systems = [{"assembly": text, "kind": kind} for text, kind in
               (("e1x4-d1x4", "teacher"), ("e2x2-d4", "assembly"), ("e2x2-d4", "dropped"))]  # fmt: skip
    (run / "assemble").mkdir()
    (run / "assemble" / "systems.json").write_text(json.dumps({"systems": systems}))


@NEEDS_ENGINE
def test_all_assemblies_are_exported_once_in_fewer_bytes(tmp_path, capsys):
    exported(tmp_path, "v1.1", ASSEMBLIES)
    run = tmp_path / "run"
    write_systems(run)
    run_export(tmp_path, "--all", "--to", "ctranslate2", "--quantization", "int8")
    folders = sorted((run / "export" / "ctranslate2-int8").iterdir())
    assert [folder.name for folder in folders] == ["e1x4-d1x4", "e2x2-d4"]
    made = {folder: (folder / "model.bin").stat().st_mtime_ns for folder in folders}
    (folders[1] / "export.json").unlink()  # as if it had not been made
    capsys.readouterr()
    run_export(tmp_path, "--all", "--to", "ctranslate2", "--quantization", "int8")
    assert len(capsys.readouterr().out.splitlines()) == 2
    again = {folder: (folder / "model.bin").stat().st_mtime_ns for folder in folders}
    assert (made[folders[0]] == again[folders[0]], made[folders[1]] == again[folders[1]]) == (True, False)
    assert [path.name for path in (run / "export" / "ctranslate2-int8").iterdir() if "tmp" in path.name] == []


def test_a_folder_in_half_the_bytes_is_ordinary(tmp_path):
    models, _ = exported(tmp_path, "v1.1", ASSEMBLIES[:1])
    run_export(tmp_path, "--assembly", ASSEMBLIES[0], "--dtype", "bf16", "--out", str(tmp_path / "out"))
    folder = tmp_path / "out" / "folder-bf16" / ASSEMBLIES[0]
    assert "2+1 layers" in check_ordinary(folder)
    weights, whole = load_file(folder / "model.safetensors"), load_file(f"{next(iter(models))}/model.safetensors")
    assert all(torch.equal(weights[name], whole[name].to(torch.bfloat16)) for name in whole)
    assert (folder / "model.safetensors").stat().st_size < 0.6 * sum(weight.nbytes for weight in whole.values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--quantization", "int8"], "--quantization int8 is for --to ctranslate2"),
        (["--to", "ctranslate2", "--dtype", "bf16"], "--to ctranslate2 has --quantization"),
        (["--to", "onnx", "--quantization", "float16"], "--to onnx has no float16: choose one of float32, int8"),
        (["--run", "nowhere"], "is no model folder"),
    ],
)
def test_options_that_do_not_go_together_are_refused(arguments, message):
    with pytest.raises((ValueError, OSError), match=message):
        exporting.export_command(["--assembly", "e1x2-d1x2", *arguments])


@pytest.mark.parametrize("to", ENGINES)
def test_an_engine_is_refused_for_a_model_type_of_which_it_computes_something_else(to):
    refuse_kind(to, "umt5")
    with pytest.raises(ValueError, match=f"{to} does not compute what transformers does for t5gemma2: leave it out"):
        refuse_kind(to, "t5gemma2")


@pytest.mark.parametrize("to", ENGINES)
def test_an_engine_that_is_not_installed_is_named(tmp_path, monkeypatch, capsys, to):
    exported(tmp_path, "v1.0", ASSEMBLIES[:1])
    name = next(iter(ENGINES[to].packages))
    monkeypatch.setitem(sys.modules, name, None)  # then importing it raises
    with pytest.raises(SystemExit, match="2"):
        run_export(tmp_path, "--assembly", ASSEMBLIES[0], "--to", to)
    told = f"needs the package {name}, which is not installed: pip install {name}=="
    assert told in capsys.readouterr().err


def test_an_engine_is_told_to_read_all_of_a_source():
    assert ctranslate.options_of({}, [], 1, 5)["max_input_length"] == 0, "by itself it cuts at 1,024 tokens"
