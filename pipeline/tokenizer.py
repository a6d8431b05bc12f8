"""Tokenizer files beside a model, so that AutoTokenizer loads them from every folder that the pipeline makes."""

from __future__ import annotations

import shutil
from pathlib import Path

import transformers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, T5Tokenizer

from data_prep.tokenizer import write_tokenizer

LFS = b"version https://git-lfs"
FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "spiece.model")


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder: Hugging Face files, or only a SentencePiece model with T5's special tokens.

    Raises:
        ValueError: neither is there, or it cannot be read.
    """
    files = [name for name in FILES if (folder / name).is_file()]
    if not {"tokenizer.json", "tokenizer_config.json", "spiece.model"} & set(files):
        raise ValueError(f"{folder} holds no tokenizer: it needs tokenizer.json or spiece.model")
    for name in files:
        refuse_pointer(folder / name)
    verbosity = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()  # what it tries before it fails
    try:
        if {"tokenizer.json", "tokenizer_config.json"} & set(files):
            return AutoTokenizer.from_pretrained(folder, local_files_only=True)
        return T5Tokenizer.from_pretrained(folder, extra_ids=0, local_files_only=True)
    except Exception as error:  # the tokenizers' own libraries raise any kind
        text = " ".join(str(error).split())
        raise ValueError(
            f"the tokenizer in {folder} ({', '.join(files)}) cannot be read ({text}): fetch it again"
        ) from error
    finally:
        transformers.utils.logging.set_verbosity(verbosity)


def refuse_pointer(path: Path) -> None:
    """Tell a file of a repository that was cloned without its large files.

    Raises:
        ValueError: the file only says where the real one is.
    """
    with open(path, "rb") as file:
        if file.read(len(LFS)) == LFS:
            raise ValueError(f"{path} is a pointer of Git LFS, not the file: run `git lfs pull` in its repository")


def vocabulary_size(folder: Path) -> int:
    return len(load_tokenizer(folder))


def save_tokenizer(source: Path, target: Path) -> None:
    """Write the tokenizer of one folder into another, in files that transformers 4 and 5 read alike.

    Raises:
        ValueError: it cannot be read, or is not fit for text to text.
    """
    write_tokenizer(source, target)
    if (source / "spiece.model").is_file():
        shutil.copy2(source / "spiece.model", target / "spiece.model")


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy tokenizer files as they are."""
    for name in FILES:
        if (source / name).is_file():
            shutil.copy2(source / name, target / name)
