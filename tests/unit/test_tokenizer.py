"""Tokenizer folders that the pipeline makes and refuses, and output ids as texts."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from sentencepiece import SentencePieceProcessor
from transformers import T5Config

from data_prep.config import DataConfig
from data_prep.encode import SPIECE, write_plain_t5
from data_prep.tokenizer import check_tokenizer, copy_tokenizer, load_tokenizer, tokenizer_files, write_tokenizer
from pipeline.planning.checks import _check_tokenizer
from pipeline.tokenizer import Wording
from tests.unit.test_encode_alike import as_json_only, byte_pairs, model_settings, piece_model, settings_of, with_added


@pytest.fixture(scope="module")
def marked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """T5's pieces, four sentinels, and <hl> and <sep>."""
    folder = tmp_path_factory.mktemp("marked")
    with_added(folder, ["<hl>", "<sep>"])
    return folder


def test_outputs_hold_the_special_tokens_that_references_hold(marked: Path) -> None:
    tokenizer = load_tokenizer(marked)
    texts = ["the garden <sep> and the end", "<sep> and<hl>the<hl>garden<hl>", "<sep><sep>", "garden <sep>"]
    ids = tokenizer(texts).input_ids
    assert Wording(tokenizer, [*texts, "<sep> "])(ids) == [*texts[:2], "<sep> <sep>", texts[3]]
    assert Wording(tokenizer, ["garden"])(ids) == tokenizer.batch_decode(ids, skip_special_tokens=True)
    sentinel, pad = tokenizer.convert_tokens_to_ids(["<extra_id_0>", "<pad>"])
    assert Wording(tokenizer, texts)([[pad, sentinel, *ids[0]], []]) == [texts[0], ""]


def test_where_references_are_ids_outputs_that_are_the_same_ids_are_the_same_text(marked: Path) -> None:
    """Also those whose special tokens no other example has; and what is written out has these ids again."""
    tokenizer = load_tokenizer(marked)
    wording = Wording(tokenizer)
    ids = tokenizer(["the<hl>garden<hl>", "<extra_id_0> end <extra_id_1>", "garden"]).input_ids
    assert wording(ids) == ["the <hl> garden <hl>", "<extra_id_0> end <extra_id_1>", "garden"]
    assert tokenizer(wording(ids)).input_ids == ids
    assert wording(ids[2:]) == wording(ids)[2:]


def test_spaces_that_ids_tell_are_kept_as_they_are(tmp_path: Path) -> None:
    byte_pairs(tmp_path, single_file=False)
    tokenizer = load_tokenizer(tmp_path)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<sep>"]})
    texts = ["a<sep>b", "a <sep>b", "a<sep> b  c ", " <sep> a"]
    ids = tokenizer(texts).input_ids
    assert Wording(tokenizer)(ids) == Wording(tokenizer, texts)(ids) == texts


def test_a_plain_model_is_written_as_transformers_reads_it(tmp_path: Path) -> None:
    """What is written without transformers is what it makes of the same file, and of what was written."""
    given, ours, theirs = (tmp_path / name for name in ("given", "ours", "theirs"))
    for folder in (given, ours, theirs):
        folder.mkdir()
    piece_model(given)
    assert write_plain_t5(given, ours)
    write_tokenizer(given, theirs)
    read = [json.loads(load_tokenizer(folder).backend_tokenizer.to_str()) for folder in (given, ours, theirs)]
    assert read[0] == read[1] == read[2] == json.loads((ours / "tokenizer.json").read_text(encoding="utf-8"))
    assert (ours / SPIECE).read_bytes() == (given / SPIECE).read_bytes() == (theirs / SPIECE).read_bytes()


def test_pieces_are_written_beside_the_settings_of_any_model(tmp_path: Path) -> None:
    """Those of a umT5 have transformers read tokenizer.json by `tokenizers` alone, which rounds scores."""
    given, out = tmp_path / "given", tmp_path / "out"
    for folder in (given, out):
        folder.mkdir()
        model_settings(folder, "umt5", piece_model(given))
    write_tokenizer(given, out)
    scores = [
        [score for _, score in json.loads(load_tokenizer(folder).backend_tokenizer.to_str())["model"]["vocab"]]
        for folder in (given, out)
    ]
    assert scores[0] != scores[1]
    assert np.array_equal(*np.array(scores, dtype=np.float32))


@pytest.mark.parametrize("make", [as_json_only, with_added], ids=["tokenizer.json", "added tokens"])
def test_written_files_name_no_machine_and_load_in_older_readers(tmp_path: Path, make: object) -> None:
    """Special tokens are a list under the name that transformers 4 takes a list from, and the class is one it has."""
    given, out = tmp_path / "given", tmp_path / "out"
    given.mkdir()
    out.mkdir()
    make(given) if make is as_json_only else with_added(given, ["<hl>"])
    write_tokenizer(given, out)
    told = json.loads((out / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert told["tokenizer_class"] in ("T5Tokenizer", "PreTrainedTokenizerFast")
    assert "extra_special_tokens" not in told
    assert isinstance(told["additional_special_tokens"], list)
    assert str(tmp_path) not in json.dumps(told)
    assert told["pad_token"] == "<pad>"
    assert told["eos_token"] == "</s>"
    (out / "made_from.json").write_text("{}")
    (tmp_path / "copy").mkdir()
    copy_tokenizer(out, tmp_path / "copy")
    assert tokenizer_files(tmp_path / "copy") == tokenizer_files(out)
    assert not (tmp_path / "copy/made_from.json").exists()


def test_sentinels_that_nothing_speaks_of_are_there_where_embeddings_are(tmp_path: Path) -> None:
    num_pieces = piece_model(tmp_path)
    for vocab_size, wanted in ((num_pieces, num_pieces), (num_pieces + 128, num_pieces + 100)):
        model_settings(tmp_path, "t5", vocab_size)
        assert len(load_tokenizer(tmp_path)) == wanted
    settings_of(tmp_path, extra_ids=7)
    assert len(load_tokenizer(tmp_path)) == num_pieces + 7


@pytest.mark.parametrize("kind", ["T5Tokenizer", "T5TokenizerFast", "MT5Tokenizer", "MT5TokenizerFast", None])
def test_pieces_of_every_model_of_t5s_kin_are_read_as_t5s(tmp_path: Path, kind: str | None) -> None:
    """transformers 5 has no class for umT5, nor mT5's own any more."""
    num_pieces = piece_model(tmp_path)
    model_settings(tmp_path, "umt5", num_pieces)
    if kind:
        settings_of(tmp_path, tokenizer_class=kind, extra_ids=0)
    pieces, text = SentencePieceProcessor(model_file=str(tmp_path / SPIECE)), "the two of them, 1995 of 3"
    assert load_tokenizer(tmp_path)(text)["input_ids"] == [*pieces.encode(text), 1]


def test_settings_of_a_model_do_not_keep_its_tokenizer_from_being_read(tmp_path: Path) -> None:
    """A number of another kind in config.json is the model's affair."""
    num_pieces = piece_model(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5", "d_kv": 8.0, "vocab_size": num_pieces}))
    assert len(check_tokenizer(tmp_path)) == num_pieces


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({"eos_token": "</s>"}, "the tokenizer has no pad token: name it in tokenizer_config.json"),
        ({"eos_token": "</s>", "pad_token": "[PAD]"}, r"does not end a text with its end-of-sequence token '</s>'"),
    ],
)
def test_a_tokenizer_that_is_none_of_a_seq2seq_model_is_refused(tmp_path: Path, told: dict, message: str) -> None:
    special = ["[PAD]", "</s>", "a", "<unk>"]
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: i for i, word in enumerate(special)}, "<unk>"))
    words.save(str(tmp_path / "tokenizer.json"))
    settings_of(tmp_path, tokenizer_class="PreTrainedTokenizerFast", **told)
    with pytest.raises(ValueError, match=message):
        check_tokenizer(tmp_path)


def test_the_vocabulary_of_data_must_be_the_teachers_in_every_layout(tmp_path: Path) -> None:
    """Also where the teacher has neither spiece.model nor tokenizer.json."""
    teacher, same, other = (tmp_path / name for name in ("teacher", "same", "other"))
    for folder in (teacher, same, other):
        folder.mkdir()
    byte_pairs(teacher, single_file=False)
    write_tokenizer(teacher, same)
    byte_pairs(other, single_file=False)
    numbers = json.loads((other / "vocab.json").read_text(encoding="utf-8"))
    numbers["a"], numbers["b"] = numbers["b"], numbers["a"]
    (other / "vocab.json").write_text(json.dumps(numbers), encoding="utf-8")
    own = check_tokenizer(same)
    config = T5Config(vocab_size=len(numbers), pad_token_id=own.pad_token_id, eos_token_id=own.eos_token_id)
    _check_tokenizer(teacher, DataConfig(tokenizer=str(same)), config)
    with pytest.raises(ValueError, match=r"other has no token '[ab]' of id \d+ as the teacher's in .*teacher does"):
        _check_tokenizer(teacher, DataConfig(tokenizer=str(other)), config)
