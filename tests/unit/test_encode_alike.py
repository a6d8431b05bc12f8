"""One text, one list of ids: what shards hold is what the written folder's own AutoTokenizer gives, for any text.

Twelve tokenizers of every layout are made here; the other side runs in one process that cannot import this project.
"""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import tokenizers
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_prep.demo import make_corpus
from data_prep.encode import Encoder, write_plain_t5
from data_prep.served import Served
from tests.languages import MADE

SERVE = """
import json, sys
for name in ("torch", "data_prep", "pipeline"):  # an installation in place is on every path
    sys.modules[name] = None  # then importing it raises
from transformers import AutoTokenizer
loaded = {}
for line in sys.stdin:
    folder, texts = json.loads(line)
    tokenizer = loaded.get(folder) or loaded.setdefault(folder, AutoTokenizer.from_pretrained(folder))
    print(json.dumps([tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer(texts).input_ids]), flush=True)
"""
SPECIALS = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
PLAIN = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False, "special": True}
PARTS = [
    *"abcdeinorst", *" " * 12, *"0159.,;!?'\"()-<>{}", "the", " and", "garden", "ung", "\n", "\t", "\r", "\u0085",
    "\u00a0", "\u3000", "\u200b", "\u200d", "\ufeff", "\u00ad", "\u2028", "\u2581", "\u0301", "\u0303\u0304", "\u0308",
    "\ufb01", "\ufb01\u0301", "\uff21", "\uff21\u0301", "\uac00", "\u1100\u1161\u11a8", "\u1100", "\u4e2d\u6587",
    "\u3041\u3099", "\u0e19\u0e49\u0e33", "\u0e33", "\u093f", "\u0928\u092e\u0938\u094d\u0924\u0947", "\u05e9\u05c1",
    "\u0601", "\u0d4e", "\u00bd", "\u2167", "\u2026", "\u1e9b\u0323", "\U0001f44d\U0001f3fd", "\u00fc",
    "\U0001f469\u200d\U0001f467", "\U0001f1e9\U0001f1ea", "u\u0308", "\u0130", "Stra\u00dfe", "5\u2033", "\u20ac",
    "</s>", "<pad>", "<unk>",
    "<extra_id_0>", "<extra_id_3>", " <extra_id_1> ", "<hl>", " <hl> ", "<sep>", "\uff1chl\uff1e", "<mask>", "<s>",
]  # fmt: skip


def corpus() -> list[str]:
    pairs = make_corpus(seed=0, num_pairs=800, num_validation=1, num_test=1)["train"]
    return [text for pair in pairs for text in (pair.source, pair.target)] + [" ".join(PARTS)] * 3


def piece_model(folder: Path, **options: Any) -> int:
    """Train spiece.model with T5's special ids; the number of its pieces."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus()), model_writer=model, hard_vocab_limit=False, pad_id=0, eos_id=1, unk_id=2,
        bos_id=-1, minloglevel=2, character_coverage=0.999, **{"vocab_size": 400, **options},
    )  # fmt: skip
    (folder / "spiece.model").write_bytes(model.getvalue())
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue()).get_piece_size()


def settings_of(folder: Path, **values: Any) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps(values), encoding="utf-8")


def model_settings(folder: Path, model_type: str, vocab_size: int = 4000) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": model_type, "vocab_size": vocab_size}))


def with_added(folder: Path, names: list[str], decoder: bool = True, **flags: bool) -> None:
    """spiece.model and tokens beside it, as transformers wrote them since 4.34 (decoder) or before."""
    first, all_names = piece_model(folder), [f"<extra_id_{3 - k}>" for k in range(4)] + names
    values: dict[str, Any] = {"tokenizer_class": "T5Tokenizer", "extra_ids": 4, **SPECIALS}
    values["additional_special_tokens"] = [f"<extra_id_{k}>" for k in range(4)] + names
    numbered = {name: first + place for place, name in enumerate(all_names)}
    if decoder:
        values["added_tokens_decoder"] = {str(i): {"content": n, **PLAIN, **flags} for n, i in numbered.items()}
    else:
        (folder / "added_tokens.json").write_text(json.dumps(numbered))
    settings_of(folder, **values)


def as_json_only(folder: Path, **values: Any) -> None:
    """tokenizer.json of a T5 by itself, with what `values` says beside it."""
    piece_model(folder)
    made = transformers.T5Tokenizer.from_pretrained(folder, extra_ids=0)
    made.backend_tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "spiece.model").unlink()
    if values:
        settings_of(folder, **values)


def byte_pairs(folder: Path, single_file: bool) -> None:
    bpe = tokenizers.ByteLevelBPETokenizer()
    bpe.train_from_iterator(
        corpus(), 500, special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"], show_progress=False
    )
    bpe.save_model(str(folder))
    model_settings(folder, "bart")
    if single_file:
        transformers.BartTokenizer.from_pretrained(str(folder)).save_pretrained(str(folder))


def metaspace(folder: Path) -> None:
    """A tokenizer.json of another make: two normalizers, a mark before the first word only, added words."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.Strip(left=False), tokenizers.normalizers.Replace(tokenizers.Regex(" {2,}"), "\u2581")]
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="first")
    special = ["<pad>", "</s>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=700, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(corpus(), trainer)
    tokenizer.add_tokens(
        [tokenizers.AddedToken("garden", single_word=True), tokenizers.AddedToken("<hl>", lstrip=True)]
    )
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", tokenizer.token_to_id("</s>"))]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    settings_of(folder, tokenizer_class="PreTrainedTokenizerFast", **SPECIALS)


def teacher_of_old(folder: Path) -> None:
    """An mT5 as it was saved in 2020: only config.json says what it is."""
    piece_model(folder)
    settings_of(folder, **SPECIALS, extra_ids=0, additional_special_tokens=None)
    (folder / "special_tokens_map.json").write_text(json.dumps(SPECIALS))
    model_settings(folder, "mt5")


def unclassed(folder: Path) -> None:
    piece_model(folder)
    settings_of(folder, model_max_length=512)
    model_settings(folder, "t5")


def classed(folder: Path, **options: Any) -> None:
    piece_model(folder, **options)
    settings_of(folder, tokenizer_class="T5Tokenizer", extra_ids=0)


MARKED = [f"\u2581<extra_id_{k}>" for k in range(3, -1, -1)]
TOKENIZERS: dict[str, Callable[[Path], Any]] = {
    "pieces alone, nmt_nfkc": piece_model,
    "pieces alone, identity": lambda folder: piece_model(folder, normalization_rule_name="identity"),
    "pieces with bytes": lambda folder: piece_model(folder, byte_fallback=True, vocab_size=700),
    "byte-pair pieces": lambda folder: classed(folder, model_type="bpe"),
    "sentinels as pieces with a mark": lambda folder: classed(folder, user_defined_symbols=MARKED),
    "added tokens": lambda folder: with_added(folder, ["<hl>", "<sep>", "{", "\n"]),
    "added tokens before 4.34": lambda folder: with_added(folder, ["<hl>", "<sep>", "{", "\n"], decoder=False),
    "added tokens that are normalized": lambda folder: with_added(
        folder, ["<hl>", "garden", "\u00bd"], normalized=True, special=False
    ),
    "no class, pieces and config.json": unclassed,
    "mT5 of 2020": teacher_of_old,
    "tokenizer.json alone": as_json_only,
    "tokenizer.json of another make": metaspace,
    "BART in two files": lambda folder: byte_pairs(folder, single_file=False),
    "BART in one file": lambda folder: byte_pairs(folder, single_file=True),
    **{name: lambda folder, make=make: make(folder, corpus(), 400) for name, (make, _) in MADE.items()},
    "ByT5, Python alone": lambda folder: settings_of(folder, tokenizer_class="ByT5Tokenizer", extra_ids=10, **SPECIALS),
}  # fmt: skip


class Server:
    """AutoTokenizer in a process of its own."""

    def __init__(self, folder: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-c", SERVE], cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, folder: Path, texts: list[str]) -> tuple[int, int, list[list[int]]]:
        """(pad id, end-of-sequence id, ids of each text)."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin
        assert stdout
        stdin.write(json.dumps([str(folder), texts]) + "\n")
        stdin.flush()
        return tuple(json.loads(stdout.readline()))

    def end(self) -> None:
        self._process.communicate()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    made = Server(tmp_path_factory.mktemp("elsewhere"))
    yield made
    made.end()


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """Folder that a build writes, and an export of it: the same files beside a model's config.json."""
    folders = {}
    for name, make in TOKENIZERS.items():
        given, out, export = (tmp_path_factory.mktemp(kind) for kind in ("given", "out", "export"))
        make(given)
        if not write_plain_t5(given, out):
            with Served() as served:
                served.write(given, out)
        for path in out.iterdir():
            (export / path.name).write_bytes(path.read_bytes())
        model_settings(export, "bart" if "BART" in name else "m2m_100" if name in MADE else "t5")
        folders[name] = out, export
    return folders


texts = st.lists(st.lists(st.sampled_from(PARTS), min_size=1, max_size=14).map("".join), min_size=1, max_size=12)


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(batch=texts)
def test_shards_hold_what_the_export_gives(
    written: dict[str, tuple[Path, Path]], server: Server, name: str, batch: list[str]
) -> None:
    folder, export = written[name]
    encoder = encoders.setdefault(name, Encoder(folder, 500, 500))
    first = MADE[name][1][0] if name in MADE else ""  # which AutoTokenizer takes where it is not told another
    encoded = encoder.encode(batch, ["a"] * len(batch), [(first, first)] * len(batch))
    left_out = set(encoded.dropped.get("empty source", []))
    kept = [text for place, text in enumerate(batch) if place not in left_out]
    stops = encoded.block.source_lengths.astype(int).cumsum()
    mine = [ids.tolist() for ids in np.split(encoded.block.source_ids, stops[:-1])] if kept else []
    pad_id, eos_id, theirs = server.ask(export, [*kept, "end"])
    assert (pad_id, eos_id) == (encoder.info.pad_id, encoder.info.eos_id)
    assert list(zip(kept, mine, strict=True)) == list(zip(kept, theirs[:-1], strict=True))


encoders: dict[str, Encoder] = {}


def test_a_process_of_transformers_that_dies_is_told_in_one_line(tmp_path: Path) -> None:
    with Served() as served:
        served.start().kill()
        with pytest.raises(ValueError, match=r"^transformers ended with status -9$"):
            served.write(tmp_path, tmp_path / "out")
