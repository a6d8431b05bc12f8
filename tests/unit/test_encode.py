"""Encoding: the ids the model will see, equal to those of the Hugging Face tokenizer made from the same file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from data_prep.demo import make_corpus
from data_prep.encode import EOS_ID, UNK_ID, Encoder, train_sentencepiece


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
    assert (info.kind, info.pad_id, info.eos_id, info.unk_id) == ("sentencepiece", 0, EOS_ID, UNK_ID)
    assert info.vocab_size <= 512


def test_text_comes_back(texts: list[str], folder: Path) -> None:
    encoder = Encoder(folder, 512, 512)
    encoded = encoder.encode(texts, texts)
    assert [encoder.decode(ids) for ids in encoded.source_ids] == texts
    assert all(ids[-1] == EOS_ID and ids.dtype == np.uint16 for ids in encoded.target_ids)
    assert not encoded.dropped
    assert not encoded.num_truncated_sources


def test_hugging_face_reads_the_same_ids(texts: list[str], folder: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    hf = transformers.T5Tokenizer.from_pretrained(str(folder), extra_ids=0)
    assert len(hf) == Encoder(folder, 9, 9).info.vocab_size
    awkward = [*texts[:2000], "  two  spaces ", "unknown \u4e2d\u6587 signs", "no\u00a0break", "\uff21 wide"]
    mine = Encoder(folder, 512, 512).encode(awkward, awkward).source_ids
    assert hf(awkward)["input_ids"] == [ids.tolist() for ids in mine]
    assert hf.batch_decode([ids.tolist() for ids in mine[:2000]], skip_special_tokens=True) == texts[:2000]
    hf.save_pretrained(tmp_path)
    other = Encoder(tmp_path, 512, 512)  # through tokenizer.json and the tokenizers library
    assert other.info.kind == "tokenizers"
    assert [i.tolist() for i in other.encode(awkward, awkward).source_ids] == [ids.tolist() for ids in mine]


@pytest.mark.parametrize("max_tokens", [2, 5, 6, 7])
def test_truncation_keeps_end_of_sequence_and_is_counted(folder: Path, max_tokens: int) -> None:
    text = "1 2 3"
    full = Encoder(folder, 512, 512).encode([text], [text]).source_ids[0].tolist()
    encoded = Encoder(folder, max_tokens, 512).encode([text], [text])
    ids = encoded.source_ids[0].tolist()
    assert ids == (full if len(full) <= max_tokens else [*full[: max_tokens - 1], EOS_ID])
    assert encoded.num_truncated_sources == (len(full) > max_tokens)
    assert encoded.num_truncated_targets == 0


def test_empty_texts_are_dropped_with_their_place(folder: Path) -> None:
    encoded = Encoder(folder, 9, 9).encode(["1", "", "1", "  "], ["1", "1", " ", ""])
    assert encoded.dropped == {"empty source": [1, 3], "empty target": [2]}
    assert len(encoded.source_ids) == len(encoded.target_ids) == 1


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"neither spiece.model nor tokenizer.json"):
        Encoder(tmp_path, 9, 9)
