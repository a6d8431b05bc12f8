"""Encoding: the ids the model will see, equal to those of the Hugging Face tokenizer made from the same file."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from data_prep.demo import make_corpus
from data_prep.encode import EOS_ID, UNK_ID, Encoded, Encoder, train_sentencepiece


def sources(encoded: Encoded) -> list[np.ndarray]:
    """Ids of every source."""
    return np.split(encoded.block.source_ids, np.cumsum(encoded.block.source_lengths, dtype=int)[:-1])


@pytest.fixture(scope="module")
def texts() -> list[str]:
    pairs = make_corpus(seed=0, num_pairs=3000, num_validation=1, num_test=1)["train"]
    return [text for pair in pairs for text in (pair.source, pair.target)]


@pytest.fixture(scope="module")
def folder(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    train_sentencepiece(texts, 512, True, path / "spiece.model")
    return path


def test_training_is_repeatable(texts: list[str], folder: Path, tmp_path: Path) -> None:
    train_sentencepiece(iter(texts), 512, True, tmp_path / "again.model")
    assert (tmp_path / "again.model").read_bytes() == (folder / "spiece.model").read_bytes()


def test_a_vocabulary_that_cannot_be_trained_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no vocabulary of 64.*change data.vocab_size") as error:
        train_sentencepiece(["".join(map(chr, range(200, 400)))] * 3, 64, True, tmp_path / "spiece.model")
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_special_ids_are_those_of_t5(folder: Path) -> None:
    info = Encoder(folder, 9, 9).info
    assert (info.kind, info.pad_id, info.eos_id, info.unk_id) == ("tokenizers", 0, EOS_ID, UNK_ID)
    assert info.vocab_size <= 512


def test_text_comes_back(texts: list[str], folder: Path) -> None:
    encoder = Encoder(folder, 512, 512)
    encoded = encoder.encode(texts, texts)
    assert [encoder.decode(ids) for ids in sources(encoded)] == texts
    assert all(ids[-1] == EOS_ID and ids.dtype == np.uint16 for ids in sources(encoded))
    assert np.array_equal(encoded.block.source_ids, encoded.block.target_ids)
    assert not encoded.dropped
    assert not encoded.num_truncated_sources


def test_hugging_face_reads_the_same_ids(texts: list[str], folder: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    hf = transformers.T5Tokenizer.from_pretrained(str(folder), extra_ids=0)
    assert len(hf) == Encoder(folder, 9, 9).info.vocab_size
    awkward = [*texts[:2000], "  two  spaces ", "unknown \u4e2d\u6587 signs", "no\u00a0break", "\uff21 wide"]
    mine = sources(Encoder(folder, 512, 512).encode(awkward, awkward))
    assert hf(awkward)["input_ids"] == [ids.tolist() for ids in mine]
    assert hf.batch_decode([ids.tolist() for ids in mine[:2000]], skip_special_tokens=True) == texts[:2000]
    hf.save_pretrained(tmp_path)
    other = Encoder(tmp_path, 512, 512)  # through tokenizer.json and the tokenizers library
    assert other.info.kind == "tokenizers"
    assert [i.tolist() for i in sources(other.encode(awkward, awkward))] == [ids.tolist() for ids in mine]


@pytest.mark.parametrize("num_sentinels", [0, 100])
def test_special_tokens_in_a_text_are_those_of_hugging_face(
    texts: list[str], folder: Path, tmp_path: Path, num_sentinels: int
) -> None:
    transformers = pytest.importorskip("transformers")
    (tmp_path / "spiece.model").write_bytes((folder / "spiece.model").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"extra_ids": num_sentinels}))
    hf = transformers.T5Tokenizer.from_pretrained(str(tmp_path), extra_ids=num_sentinels)
    encoder = Encoder(tmp_path, 512, 512)
    assert encoder.info.vocab_size == len(hf)
    one = texts[0]
    awkward = [f"{one}</s>{one}", f"<pad> {one} ", "<unk>", f"<extra_id_0> {one}<extra_id_99>.", "</ s> <extra_id_x>"]
    mine = [ids.tolist() for ids in sources(encoder.encode(awkward, awkward))]
    assert mine == hf(awkward)["input_ids"]
    if num_sentinels:
        assert encoder.sentinels(100).tolist() == hf.convert_tokens_to_ids([f"<extra_id_{k}>" for k in range(100)])
        assert encoder.decode(encoder.sentinels(2)) == hf.decode(encoder.sentinels(2))
    else:
        with pytest.raises(ValueError, match="span corruption needs 3 tokens <extra_id_0>"):
            encoder.sentinels(3)


def test_a_trained_model_can_hold_sentinels(texts: list[str], tmp_path: Path) -> None:
    train_sentencepiece(texts, 512, True, tmp_path / "spiece.model", num_sentinels=28)
    encoder = Encoder(tmp_path, 512, 512)
    assert len(set(encoder.sentinels(28).tolist())) == 28
    with pytest.raises(ValueError, match="has 28"):
        encoder.sentinels(29)


def test_a_bart_tokenizer_gives_the_ids_of_hugging_face(texts: list[str], tmp_path: Path) -> None:
    """Byte-level BPE in <s> ... </s>, with the special ids in BART's order, and truncation as transformers does it."""
    transformers = pytest.importorskip("transformers")
    bpe = tokenizers.ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, 600, special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"], show_progress=False)
    bpe.save_model(str(tmp_path))
    hf = transformers.BartTokenizer.from_pretrained(str(tmp_path))
    hf.save_pretrained(str(tmp_path))
    awkward = [*texts[:500], "  two  spaces ", "unknown \u4e2d\u6587 signs", "<mask> and </s> inside"]
    for longest in (512, 6):
        encoder = Encoder(tmp_path, longest, longest)
        info = encoder.info
        assert (info.kind, info.vocab_size) == ("tokenizers", len(hf))
        assert (info.pad_id, info.eos_id, info.unk_id) == (1, 2, 3)
        mine = [ids.tolist() for ids in sources(encoder.encode(awkward, awkward))]
        assert mine == hf(awkward, truncation=True, max_length=longest)["input_ids"]
        assert all(ids[0] == 0 and ids[-1] == 2 for ids in mine)
    ids = sources(Encoder(tmp_path, 512, 512).encode(texts[:50], texts[:50]))
    assert [encoder.decode(each) for each in ids] == texts[:50]
    assert encoder.encode(["", "a"], ["a", ""]).dropped == {"empty source": [0], "empty target": [1]}


@pytest.mark.parametrize("max_tokens", [2, 5, 6, 7])
def test_truncation_keeps_end_of_sequence_and_is_counted(folder: Path, max_tokens: int) -> None:
    text = "1 2 3"
    full = sources(Encoder(folder, 512, 512).encode([text], [text]))[0].tolist()
    encoded = Encoder(folder, max_tokens, 512).encode([text], [text])
    ids = sources(encoded)[0].tolist()
    assert ids == (full if len(full) <= max_tokens else [*full[: max_tokens - 1], EOS_ID])
    assert encoded.num_truncated_sources == (len(full) > max_tokens)
    assert encoded.num_truncated_targets == 0


def test_empty_texts_are_dropped_with_their_place(folder: Path) -> None:
    encoded = Encoder(folder, 9, 9).encode(["1", "", "1", "  "], ["1", "1", " ", ""])
    assert encoded.dropped == {"empty source": [1, 3], "empty target": [2]}
    assert len(encoded.block.source_lengths) == len(encoded.block.target_lengths) == 1


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"neither spiece.model nor tokenizer.json"):
        Encoder(tmp_path, 9, 9)
