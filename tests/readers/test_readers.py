"""Every reader makes the same model of an exported folder: ids, logits, greedy and beam outputs, and what the folder's
own generation settings give.

The readers are transformers 4.57.6, 5.17.0 and the installed version (see environments.py). A sample is in `make
test`. `make test-readers` fetches them, once, and compares everything.
"""

from __future__ import annotations

import io
import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers
import torch
import transformers

from data_prep.tokenizer import load_tokenizer, write_tokenizer
from pipeline.assemble import Parts, write_checkpoint
from pipeline.bench.families import save_library
from pipeline.rundir import RunDir
from pipeline.spans import Assembly
from pipeline.tokenizer import vocabulary_size
from pipeline.training import save_model
from pipeline.trim import trim
from tests.languages import m2m_100, marian, mbart_50, nllb, pegasus, t5gemma2
from tests.readers.environments import PACKAGES, place_of
from tests.tiny import OWN_TOKENIZER, read_plainly, tiny_model
from tests.unit.test_modular import modular_of, perturb

ASSEMBLIES = ("e1x4-d1x4", "e2x2-d4", "e4-d1x4")  # the teacher's own, both stacks changed, the decoder deeper
TEXTS = ["the garden is green", "a house stands in the old garden", "green", "the old house is a house"]
READ = Path(__file__).with_name("read.py")
MAX_NEW_TOKENS = 10
WITH_PIECES = {
    "mBART-50": ("mbart", mbart_50), "NLLB": ("m2m_100", nllb), "M2M100": ("m2m_100", m2m_100),
    "OPUS-MT": ("marian", marian), "Pegasus": ("pegasus", pegasus),
}  # fmt: skip
"""Kind of a model, and what makes its tokenizer."""
UNKNOWN = {("t5gemma2", "4.57.6")}
"""Families that a version of transformers does not have."""
GENERATION = {"num_beams": 3, "length_penalty": 0.5, "no_repeat_ngram_size": 2, "min_length": 4, "max_length": 9}


def make_tokenizer(kind: str, folder: Path) -> None:
    """A tokenizer of the family's kind with at most 300 tokens, as data preparation writes it."""
    raw, corpus = folder / "raw", TEXTS * 8 + ["".join(word) for word in itertools.permutations("abcdef", 4)]
    raw.mkdir(parents=True)
    if kind in WITH_PIECES:
        WITH_PIECES[kind][1](raw, corpus, 120)
    elif kind == "t5gemma2":
        t5gemma2(raw, corpus, 200)
    elif kind.startswith("bart"):
        pieces = tokenizers.ByteLevelBPETokenizer()
        special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
        pieces.train_from_iterator(corpus, 290, special_tokens=special, show_progress=False)
        pieces.save_model(str(raw))
        (raw / "config.json").write_text(json.dumps({"model_type": "bart", "vocab_size": 300}))
    else:
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(corpus), model_writer=model, vocab_size=200, hard_vocab_limit=False, pad_id=0,
            eos_id=1, unk_id=2, bos_id=-1, minloglevel=2,
        )  # fmt: skip
        (raw / "spiece.model").write_bytes(model.getvalue())
        transformers.T5Tokenizer.from_pretrained(raw, extra_ids=20).save_pretrained(raw)
        if kind == "umt5":  # of which transformers takes tokenizer.json as it is
            (raw / "config.json").write_text(json.dumps({"model_type": "umt5", "vocab_size": 300}))
    (folder / "tokenizer").mkdir()
    write_tokenizer(raw, folder / "tokenizer")


def exported(root: Path, kind: str, texts: tuple[str, ...], strength: float = 1.0) -> tuple[dict[str, Any], Path]:
    """({folder: the model that it must be}, tokenizer) of assemblies of a random teacher, by the real writers.

    Args:
        strength: factor of its matrices; with stronger ones what it writes depends on what it reads.
    """
    make_tokenizer(kind, root)
    run = RunDir(root / "run")
    if kind in WITH_PIECES:
        ids = ids_of(load_tokenizer(root / "tokenizer"), kind)
        teacher = tiny_model(WITH_PIECES[kind][0], 4, 4, vocab_size=vocabulary_size(root / "tokenizer"), **ids)
    else:
        teacher = tiny_model(kind, 4, 4, vocab_size=300)
    if kind == "OPUS-MT":  # as its makers have it, and engines take for granted
        teacher.get_input_embeddings().weight.data[teacher.config.pad_token_id] = 0.0
    for parameter in teacher.parameters():
        parameter.data *= strength if parameter.dim() == 2 else 1
    for name, value in GENERATION.items():
        setattr(teacher.generation_config, name, value)
    if kind.startswith("bart"):  # config.json has it, too, and transformers 4 may then go by config.json alone
        teacher.config.forced_eos_token_id = teacher.generation_config.forced_eos_token_id = 3
    save_model(teacher, run.teacher_model, root / "tokenizer")
    modular = modular_of(teacher, granularities=((2, 4), (2, 4)))
    perturb(modular)
    save_library(modular, run)
    parts = Parts.of(run)
    models = {}
    for text in texts:
        write_checkpoint(parts, Assembly.parse(text), root / text)
        models[str(root / text)] = parts.models.assembly(Assembly.parse(text))
    return models, root / "tokenizer"


def ids_of(tokenizer: Any, kind: str) -> dict[str, int]:
    """Special tokens of a model as its tokenizer has them."""
    pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id
    start = pad if kind in ("OPUS-MT", "Pegasus") else eos
    return {"pad_token_id": pad, "eos_token_id": eos, "forced_eos_token_id": eos, "decoder_start_token_id": start}


def trimmed(root: Path, kind: str, text: str) -> tuple[dict[str, Any], Path]:
    """The same of an assembly without the tokens that TEXTS never use."""
    models, _ = exported(root, kind, (text,))
    (folder,) = map(Path, models)
    trim(folder, TEXTS, root / "trimmed")
    assert vocabulary_of(root / "trimmed") < vocabulary_of(folder)
    return {str(root / "trimmed"): read_plainly(root / "trimmed")}, root / "trimmed"


def vocabulary_of(folder: Path) -> int:
    return json.loads((folder / "config.json").read_text())["vocab_size"]


def started(root: Path, version: str, folders: list[str]) -> tuple[subprocess.CompletedProcess[str], Path]:
    """A reader's process, which cannot import the project, at its end, and where its answer lies."""
    place = place_of(f"transformers-{version}") if version else None
    if version and place is None:
        pytest.skip(f"transformers {version} is not here: make test-readers fetches it once")
    request, answer = root / f"request-{version}.json", root / f"answer-{version}.pt"
    request.write_text(json.dumps({"texts": TEXTS, "folders": folders, "max_new_tokens": MAX_NEW_TOKENS}))
    command = [sys.executable, "-I", str(READ), str(request), str(answer), *filter(None, [place and str(place)])]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=600), answer


def read(root: Path, version: str, folders: list[str]) -> dict[str, Any]:
    """What a reader makes of folders."""
    done, answer = started(root, version, folders)
    assert done.returncode == 0, done.stderr
    found = torch.load(answer)
    assert found["version"] == (version or transformers.__version__)
    return found


def check(root: Path, version: str, models: dict[str, Any], tokenizer_folder: Path) -> None:
    """Hold what a reader makes of folders against these models and this tokenizer."""
    found = read(root, version, list(models))
    tokenizer = load_tokenizer(tokenizer_folder)
    batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    vocabulary_size = next(iter(models.values())).config.vocab_size
    target_BT = torch.randint(vocabulary_size, (len(TEXTS), 9), generator=torch.Generator().manual_seed(0))
    mask_BT = torch.ones_like(target_BT)
    mask_BT[0, -1] = 0
    for folder, model in models.items():
        theirs = found[folder]
        assert theirs["ids"] == [tokenizer(text).input_ids for text in TEXTS]
        with torch.no_grad():
            logits = model.eval()(**inputs, decoder_input_ids=target_BT, decoder_attention_mask=mask_BT).logits
        torch.testing.assert_close(theirs["logits"], logits, atol=1e-5, rtol=1e-5)
        outputs = [
            model.generate(**inputs, num_beams=num_beams, do_sample=False, max_new_tokens=MAX_NEW_TOKENS)
            for num_beams in (1, 4)
        ]
        assert torch.equal(theirs["told"], model.generate(**inputs))
        assert torch.equal(theirs["greedy"], outputs[0])
        assert torch.equal(theirs["beams"], outputs[1])
        assert theirs["words"] == [tokenizer.batch_decode(each, skip_special_tokens=True) for each in outputs]


def check_refused(root: Path, version: str, folder: str) -> None:
    """Hold that a version that does not have a family says so by its name."""
    done, _ = started(root, version, [folder])
    told = json.loads((Path(folder) / "config.json").read_text())
    assert done.returncode == 1
    assert f"has model type `{told['model_type']}` but Transformers does not recognize" in done.stderr


def skip_scaled(kind: str, version: str) -> None:
    if kind == "umt5" and (version or transformers.__version__) == "5.17.0":
        pytest.skip("transformers 5.17 scales the outputs of every umT5, whatever its config.json says")


@pytest.mark.parametrize("version", PACKAGES)
@pytest.mark.parametrize("kind", ["v1.1", "bart"])
def test_a_sample_is_read_alike(tmp_path, kind, version):
    check(tmp_path, version, *exported(tmp_path, kind, ASSEMBLIES[1:2]))


@pytest.mark.readers
@pytest.mark.parametrize("version", PACKAGES)
@pytest.mark.parametrize("kind", [*OWN_TOKENIZER, *WITH_PIECES, "t5gemma2"])
def test_every_family_is_read_alike(tmp_path, kind, version):
    skip_scaled(kind, version)
    models, tokenizer = exported(tmp_path, kind, ASSEMBLIES)
    if (kind, version) not in UNKNOWN:
        check(tmp_path, version, models, tokenizer)
        return
    for folder in models:
        check_refused(tmp_path, version, folder)


@pytest.mark.readers
@pytest.mark.parametrize("version", PACKAGES)
@pytest.mark.parametrize("kind", [kind for kind in OWN_TOKENIZER if not kind.startswith("bart")])
def test_a_trimmed_folder_is_read_alike(tmp_path, kind, version):
    """trim takes SentencePiece unigrams, which BARTs do not have."""
    skip_scaled(kind, version)
    check(tmp_path, version, *trimmed(tmp_path, kind, ASSEMBLIES[1]))
