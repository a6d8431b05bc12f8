"""Tokenizer files beside a model, so that AutoTokenizer loads them from every folder that the pipeline makes."""

from __future__ import annotations

import shutil
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase, T5Tokenizer

FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "spiece.model")


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder: Hugging Face files, or only a SentencePiece model with T5's special tokens.

    Raises:
        ValueError: neither is there.
    """
    if (folder / "tokenizer.json").is_file() or (folder / "tokenizer_config.json").is_file():
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    if (folder / "spiece.model").is_file():
        return T5Tokenizer.from_pretrained(folder, extra_ids=0, local_files_only=True)
    raise ValueError(f"{folder} holds no tokenizer: it needs tokenizer.json or spiece.model")


def vocabulary_size(folder: Path) -> int:
    return len(load_tokenizer(folder))


def save_tokenizer(source: Path, target: Path) -> None:
    """Write the tokenizer of one folder into another."""
    load_tokenizer(source).save_pretrained(target)
    if (source / "spiece.model").is_file():
        shutil.copy2(source / "spiece.model", target / "spiece.model")


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy tokenizer files as they are."""
    for name in FILES:
        if (source / name).is_file():
            shutil.copy2(source / name, target / name)
