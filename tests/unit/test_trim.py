"""Vocabulary trimming: the same tokens, logits and outputs on what is kept, and a refusal where they are not."""

from __future__ import annotations

import json
import os
import shutil
import threading

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer
from tokenizers.models import BPE
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, PreTrainedTokenizerFast, T5Tokenizer

from data_prep.demo import make_corpus
from data_prep.encode import Encoder, train_sentencepiece
from data_prep.tokenizer import load_tokenizer
from pipeline import trim as trimming
from pipeline.__main__ import main as pipeline_main
from pipeline.trim import read_texts, trim
from tests.languages import m2m_100, mbart_50
from tests.tiny import tiny_bart, tiny_t5

SIZES = {"v1.0": 640, "v1.1": 640, "mt5": 513}  # v1.x: 100 extra ids and rows that no token has
BEHIND = "<hl>"  # a token that was added behind the pieces


@pytest.fixture(scope="module")
def german():
    pairs = make_corpus(seed=0, num_pairs=2000, num_validation=1, num_test=1)["train"]
    return [pair.target for pair in pairs], [pair.source for pair in pairs]


@pytest.fixture(scope="module", params=SIZES)
def original(request, german, tmp_path_factory):
    """A folder whose vocabulary serves English and German."""
    folder = tmp_path_factory.mktemp(request.param)
    train_sentencepiece([*german[0], *german[1]], 512, False, folder / "spiece.model")
    num_extra = 0 if request.param == "mt5" else 100
    tokenizer = T5Tokenizer.from_pretrained(folder, extra_ids=num_extra)
    tokenizer.add_tokens([BEHIND])
    tokenizer.save_pretrained(folder)
    model = tiny_t5(request.param)
    model.resize_token_embeddings(SIZES[request.param])
    if request.param != "v1.0":
        model.lm_head.weight.data = torch.randn_like(model.lm_head.weight)
    model.generation_config.eos_token_id = [1]
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def trimmed(original, german, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "trimmed"
    return out, trim(original, german[0], out)


def models(original, trimmed):
    return [AutoModelForSeq2SeqLM.from_pretrained(folder).eval() for folder in (original, trimmed[0])]


def test_only_what_the_language_uses_is_kept(original, trimmed, german):
    folder, summary = trimmed
    kept = json.loads((folder / "kept_ids.json").read_text())["original_id_of"]
    old, new = AutoTokenizer.from_pretrained(original), AutoTokenizer.from_pretrained(folder)
    assert len(new) == len(kept) == summary["vocabulary_size"] <= len(old) - 30
    assert len(kept) % 64 == 0
    assert [new.convert_ids_to_tokens(i) for i in range(len(kept))] == old.convert_ids_to_tokens(kept)
    assert (new.pad_token_id, new.eos_token_id, new.unk_token_id) == (0, 1, 2)
    assert new.all_special_tokens == old.all_special_tokens
    assert f"{len(kept):,} of its {summary['original_vocabulary_size']:,} tokens" in (folder / "README.md").read_text()
    saved = summary["original_bytes"] - summary["bytes"]
    rows = summary["original_vocabulary_size"] - len(kept)
    num_tables = len({*VOCABULARY} & load_file(folder / "model.safetensors").keys())
    assert abs(saved - 4 * 32 * rows * num_tables) < 2000  # headers
    for batch in (german[0], german[0][:1]):
        rows = old(batch).input_ids
        assert [[kept[i] for i in row] for row in new(batch).input_ids] == rows
        assert new.batch_decode(new(batch).input_ids, skip_special_tokens=True) == batch


VOCABULARY = ("shared.weight", "lm_head.weight")


def test_sentencepiece_reads_the_same_ids(trimmed, german):
    """Shards and evaluation read tokenizer.json, other programs spiece.model."""
    folder, _ = trimmed
    pieces, hf = SentencePieceProcessor(model_file=str(folder / "spiece.model")), AutoTokenizer.from_pretrained(folder)
    texts = german[0][:300]
    block = Encoder(folder, 512, 512).encode(texts, texts).block
    ends = np.cumsum(block.source_lengths, dtype=np.int64)
    assert [ids.tolist() for ids in np.split(block.source_ids, ends[:-1])] == hf(texts).input_ids
    assert [[*ids, hf.eos_token_id] for ids in pieces.encode(texts)] == hf(texts).input_ids


def test_a_token_behind_the_pieces_is_kept(original, trimmed):
    old, new = (AutoTokenizer.from_pretrained(folder) for folder in (original, trimmed[0]))
    assert old.convert_tokens_to_ids(BEHIND) == len(old) - 1
    assert new.convert_tokens_to_ids(BEHIND) == len(new) - 1
    text = f"eins {BEHIND} zwei"
    kept = json.loads((trimmed[0] / "kept_ids.json").read_text())["original_id_of"]
    ids = new(text).input_ids
    assert len(new) - 1 in ids
    assert [kept[i] for i in ids] == old(text).input_ids
    assert new.decode(ids) == old.decode(old(text).input_ids)


def test_new_words_of_the_language_can_still_be_spelt(trimmed):
    tokenizer = AutoTokenizer.from_pretrained(trimmed[0])
    ids = tokenizer("nie gesehen").input_ids
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == "nie gesehen"


def test_outputs_are_those_of_the_original_that_may_not_leave_the_language(original, trimmed, german):
    """Random models write anything, so the original is kept from tokens that the trimmed one has not."""
    kept = json.loads((trimmed[0] / "kept_ids.json").read_text())["original_id_of"]
    old_model, new_model = models(original, trimmed)
    assert new_model.config.vocab_size == len(kept)
    assert new_model.generation_config.eos_token_id == [1]
    old, new = (AutoTokenizer.from_pretrained(folder) for folder in (original, trimmed[0]))
    removed = sorted(set(range(old_model.config.vocab_size)) - set(kept))
    settings = {"max_new_tokens": 12, "renormalize_logits": True, "do_sample": False}
    for num_beams in (1, 4):
        theirs = old_model.generate(
            **old(german[0][:16], return_tensors="pt", padding=True),
            suppress_tokens=removed, num_beams=num_beams, **settings,
        )  # fmt: skip
        inputs = new(german[0][:16], return_tensors="pt", padding=True)
        ours = new_model.generate(**inputs, num_beams=num_beams, **settings)
        assert torch.equal(torch.tensor(kept)[ours], theirs)


def damage_rows(monkeypatch):
    real = trimming._trim_weights
    monkeypatch.setattr(trimming, "_trim_weights", lambda folder, kept: real(folder, [*kept[1:], kept[0]]))


def damage_pieces(monkeypatch):
    real = trimming._trim_tokenizer

    def swapped(folder, tokenizer, kept):
        real(folder, tokenizer, kept)
        saved = json.loads((folder / "tokenizer.json").read_text())
        vocabulary = saved["model"]["vocab"]
        vocabulary[5], vocabulary[6] = vocabulary[6], vocabulary[5]
        (folder / "tokenizer.json").write_text(json.dumps(saved))

    monkeypatch.setattr(trimming, "_trim_tokenizer", swapped)


def lose_a_piece(monkeypatch):
    real = trimming.kept_ids
    monkeypatch.setattr(trimming, "kept_ids", lambda *args: [i for i in real(*args) if i != 40])


@pytest.mark.parametrize("damage", [damage_rows, damage_pieces, lose_a_piece])
def test_what_does_something_else_is_never_published(original, german, tmp_path, monkeypatch, damage):
    damage(monkeypatch)
    with pytest.raises(ValueError, match=r"not published|which is token 0, but config\.json"):
        trim(original, german[0] + german[1], tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def name_an_id(path):
    settings = json.loads((path / "generation_config.json").read_text()) | {"suppress_tokens": [7]}
    (path / "generation_config.json").write_text(json.dumps(settings))


def number_otherwise(path):
    train_sentencepiece(["other text, other pieces"] * 9, 80, False, path / "spiece.model")


def lose_a_weight(path):
    weights = load_file(path / "model.safetensors")
    del weights["encoder.block.1.layer.0.SelfAttention.q.weight"]
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (name_an_id, "suppress_tokens"),
        (number_otherwise, "number their pieces in different ways"),
        (lose_a_weight, r"lacks 1 weights that its config.json asks for, such as encoder\.block\.1\.layer\.0"),
    ],
)
def test_what_cannot_be_trimmed_is_said_and_leaves_nothing(original, german, tmp_path, spoil, message):
    path = tmp_path / "model"
    shutil.copytree(original, path)
    spoil(path)
    with pytest.raises(ValueError, match=message):
        trim(path, german[0], tmp_path / "out")
    assert list(tmp_path.iterdir()) == [path]


def test_another_kind_of_tokenizer_is_refused_and_leaves_nothing(tmp_path):
    tiny_bart().save_pretrained(tmp_path / "model")
    vocabulary = {token: index for index, token in enumerate(["<pad>", "<s>", "</s>", "<unk>", "a", "b"])}
    pieces = Tokenizer(BPE(vocabulary, [], unk_token="<unk>"))
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=pieces, **names).save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="BPE tokenizer: only SentencePiece unigram is trimmed"):
        trim(tmp_path / "model", ["a b"], tmp_path / "out")
    assert list(tmp_path.iterdir()) == [tmp_path / "model"]


def test_a_tokenizer_of_python_alone_is_refused_in_one_line(german, tmp_path):
    tiny_bart("m2m_100").save_pretrained(tmp_path)
    m2m_100(tmp_path, german[0], 300)
    with pytest.raises(ValueError, match="has a Python tokenizer: only SentencePiece unigram is trimmed"):
        trim(tmp_path, ["a b"], tmp_path / "out")


def test_languages_and_the_bias_of_the_logits_go_along(german, tmp_path):
    """The model's settings name a token that no text has."""
    folder, out = tmp_path / "model", tmp_path / "out"
    folder.mkdir()
    mbart_50(folder, [*german[0], *german[1]], 300)
    original = AutoTokenizer.from_pretrained(folder)
    unused = original.convert_tokens_to_ids("▁the")
    model = tiny_bart("mbart", 2, 2, vocab_size=len(original))
    for config in (model.config, model.generation_config):
        config.bos_token_id, config.pad_token_id, config.eos_token_id, config.decoder_start_token_id = 0, 1, 2, 2
        config.forced_eos_token_id = None
    model.generation_config.eos_token_id = [2, unused]
    model.save_pretrained(folder)
    saved = trim(folder, german[0][:50], out)
    assert saved["vocabulary_size"] < saved["original_vocabulary_size"]
    kept = json.loads((out / "kept_ids.json").read_text(encoding="utf-8"))["original_id_of"]
    trimmed = AutoTokenizer.from_pretrained(out)
    for language in ("de_DE", "fr_XX"):
        original.src_lang = trimmed.src_lang = language
        assert [kept[number] for number in trimmed("ein Garten").input_ids] == original("ein Garten").input_ids
    ends = AutoModelForSeq2SeqLM.from_pretrained(out).generation_config.eos_token_id
    assert [kept[number] for number in ends] == [2, unused]


@pytest.mark.parametrize("layout", ["spiece.model", "tokenizer.json"])
def test_a_umt5_is_trimmed_in_either_layout(german, tmp_path, layout):
    folder, out = tmp_path / "model", tmp_path / "out"
    folder.mkdir()
    train_sentencepiece([*german[0], *german[1]], 512, False, folder / "spiece.model")
    if layout == "tokenizer.json":
        T5Tokenizer.from_pretrained(folder, extra_ids=0).save_pretrained(folder)
        (folder / "spiece.model").unlink()
    tiny_t5("umt5", 2, 2, vocab_size=512).save_pretrained(folder)
    original = load_tokenizer(folder)
    assert trim(folder, german[0], out)["vocabulary_size"] <= 512 - 30
    kept = json.loads((out / "kept_ids.json").read_text())["original_id_of"]
    rows = AutoTokenizer.from_pretrained(out)(german[0]).input_ids
    assert [[kept[number] for number in row] for row in rows] == original(german[0]).input_ids
    assert (out / layout).is_file()


def test_what_is_there_already_is_never_replaced(tmp_path):
    """Nothing is read: neither the model nor the texts are what they should be."""
    model = tmp_path / "models/mt5"
    model.mkdir(parents=True)
    (model / "config.json").write_text("{}")
    for out in (model, model.parent, model / "config.json"):
        with pytest.raises(ValueError, match=f"{out} is not empty: choose another folder for --out"):
            trimming.trim_command(["--model", str(model), "--texts", str(tmp_path / "none.txt"), "--out", str(out)])
        with pytest.raises(ValueError, match="is not empty"):
            trim(model, [], out)
    assert [path.name for path in model.iterdir()] == ["config.json"]


def test_texts_are_read_from_fields_and_lines(tmp_path):
    records, lines = tmp_path / "a.jsonl", tmp_path / "b.txt"
    records.write_text('{"translation": {"en": "one", "de": "eins"}}\n{"translation": {"en": "two", "de": "zwei"}}\n')
    lines.write_text("drei\nvier\n")
    fields = ["translation.en", "translation.de"]
    found = list(read_texts([records, lines], fields, "say: "))
    assert found == ["say: one", "eins", "say: two", "zwei", "drei", "vier"]
    assert next(read_texts([records], fields, "to {translation.de}: ")) == "to eins: one", "as data.prefix is filled"
    with pytest.raises(ValueError, match="no field 'target'"):
        list(read_texts([records], ["target"]))
    for value in (["b"], None, 3):
        records.write_text(json.dumps({"target": value}) + "\n")
        with pytest.raises(ValueError, match=r"a\.jsonl: field 'target' of a record is no text but "):
            list(read_texts([records], ["target"], "say: "))


def test_the_command_says_what_it_saved(original, german, tmp_path, capsys):
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"source": text, "target": text}) + "\n" for text in german[0][:50]))
    pipeline_main(["trim", "--model", str(original), "--texts", str(texts), "--out", str(tmp_path / "out")])
    assert "tokens kept" in capsys.readouterr().out
    assert AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out").config.vocab_size % 64 == 0
    os.mkfifo(tmp_path / "pipe")  # as of `--texts <(zcat texts.gz)`
    threading.Thread(target=(tmp_path / "pipe").write_bytes, args=(b"",), daemon=True).start()
    for model, name, told in (
        (original, "pipe", "error: --texts hold no text: nothing says which tokens are in use\n"),
        (original, "no.txt", f"error: --texts {tmp_path / 'no.txt'}: no such file\n"),
        (
            tmp_path / "no",
            "texts.jsonl",
            f"error: --model {tmp_path / 'no'} is not a model folder: it has no config.json\n",
        ),
    ):
        with pytest.raises(SystemExit, match="2"):
            pipeline_main(["trim", "--model", str(model), "--texts", str(tmp_path / name), "--out", "x"])
        assert capsys.readouterr().err == told
