"""What people get wrong: how to make each mistake in a copy of a sound folder, and what must be said of it."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import sentencepiece
import torch
from safetensors.torch import load_file, save_file

from pipeline.config.cli import parse_recipe, recipe_parser
from pipeline.rundir.run_dir import STAGES, RunDir
from pipeline.rundir.stage import Stage

ROOT = Path(__file__).resolve().parents[2]
LINES = [{"source": f"word {i} and word {i + 1}", "target": f"Wort {i} und Wort {i + 1}"} for i in range(60)]
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


def write_jsonl(path: Path, rows: list) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def train_tokenizer(folder: Path, num_pieces: int) -> None:
    folder.mkdir()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(row["source"] + row["target"] for row in LINES), model_prefix=str(folder / "spiece"),
        vocab_size=num_pieces, hard_vocab_limit=False, pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2,
    )  # fmt: skip
    (folder / "spiece.vocab").unlink()


@dataclass(frozen=True)
class Mistake:
    """How to make one mistake in a copy of the template, and what the line must say."""

    says: str
    options: str = ""
    break_it: Callable[[], object] = lambda: None
    """Runs in the copy."""
    stage: str = "run"


def edit(path: str, **values: object) -> Callable[[], object]:
    """Change top-level values of a JSON file."""
    return lambda: Path(path).write_text(json.dumps({**json.loads(Path(path).read_text()), **values}))


def text(path: str, content: str | bytes) -> Callable[[], object]:
    data = content.encode() if isinstance(content, str) else content
    return lambda: Path(path).write_bytes(data)


def begun(stage: str, *options: str) -> None:
    """Begin a stage with other settings, as a run that was killed leaves it; the stages before it are done."""
    recipe = parse_recipe(recipe_parser("test", ""), ["--config", "recipe.yaml", *options])[0]
    run = RunDir(Path("run"))
    (run.data).mkdir(parents=True)
    (run.data / "manifest.json").write_text("{}")
    for before in STAGES[stage][1]:
        if before != "data":
            done = Stage.of(recipe, run, before)
            done.begin()
            done.publish([], started_at=0)
    Stage.of(recipe, run, stage).begin()


def peer(break_it: Callable[[Path], object] = lambda folder: None) -> Callable[[], object]:
    """Put a copy of the teacher at peer/, and break it."""
    return lambda: break_it(Path(shutil.copytree("teacher", "peer")))


def weights(change: Callable[[torch.Tensor], torch.Tensor], end: str, prefix: str = "") -> Callable[[], object]:
    """Change the teacher's weights whose names end so."""

    def do() -> None:
        for path in Path("teacher").glob("*.safetensors"):
            found = {
                prefix + name: change(each) if name.endswith(end) else each.clone()
                for name, each in load_file(path).items()
            }
            save_file(found, path, metadata={"format": "pt"})

    return do


def renamed(name: str, other: str) -> Callable[[], object]:
    """Give one of the teacher's weights another name."""

    def do() -> None:
        for path in Path("teacher").glob("*.safetensors"):
            found = {other if each == name else each: weight.clone() for each, weight in load_file(path).items()}
            save_file(found, path, metadata={"format": "pt"})

    return do


def pickled(content: object) -> Callable[[], object]:
    """Put pytorch_model.bin in the place of the teacher's safetensors files."""

    def do() -> None:
        for path in Path("teacher").glob("model*"):
            path.unlink()
        path = Path("teacher/pytorch_model.bin")
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)

    return do


def cut_gzip() -> None:
    packed = gzip.compress(Path("train.jsonl").read_bytes())
    Path("train.jsonl.gz").write_bytes(packed[:-30])


RECIPE = {
    "stage": Mistake("unknown stage 'distil'", stage="distil"),
    "no recipe": Mistake("no recipe 'nosuch'", "--config nosuch"),
    "not yaml": Mistake("recipe.yaml", break_it=text("recipe.yaml", "name: [")),
    "a list": Mistake("recipe.yaml", break_it=text("recipe.yaml", "- name\n")),
    "unknown key": Mistake("did you mean distill.losses.hidden?", "--distill.lossses.hidden 3"),
    "unknown key in the file": Mistake(
        "did you mean distill.optim.num_steps?", break_it=text("recipe.yaml", "distill: {optim: {num_step: 1}}")
    ),
    "wrong type": Mistake("num_steps", "--distill.optim.num_steps many"),
    "negative steps": Mistake("distill.optim.num_steps is -1: choose at least 0", "--distill.optim.num_steps -1"),
    "no steps": Mistake("there would be no modular layers", "--distill.optim.num_steps 0 --distill.local_steps 0"),
    "learning rate": Mistake("optim.learning_rate is 0.0: choose more than 0", "--distill.optim.learning_rate 0"),
    "init": Mistake("distill.init is 'sideways': choose one of first, middle, last", "--distill.init sideways"),
    "granularity 1": Mistake("distill.granularities is 1: choose at least 2", "--distill.granularities [1,2]"),
    "no granularity": Mistake("at least one granularity", "--distill.granularities []"),
    "local steps": Mistake("choose at most distill.optim.num_steps, which is 4", "--distill.local_steps 5"),
    "temperature": Mistake("temperature is 0.0: choose more than 0", "--distill.losses.temperature 0"),
    "loss weight": Mistake("task has a weight below 0: -1.0", "--distill.losses.task -1"),
    "preset": Mistake("assemble.presets is 'fast': choose one of size-first, speed-first", "--assemble.presets [fast]"),
    "ratio under 1": Mistake("assemble.ratios is 0.5: choose at least 1", "--assemble.ratios [0.5]"),
    "no checkpoint kept": Mistake("keep_checkpoints is 0: choose at least 1", "--distill.loop.keep_checkpoints 0"),
    "no tokenizer": Mistake("data.tokenizer is empty", "--data.tokenizer="),
    "no teacher": Mistake("give one of the two", "--teacher.folder="),
    "vocabulary size": Mistake("data.vocab_size is 3: choose at least 64 and at most 1000000", "--data.vocab_size 3"),
    "one file where a list goes": Mistake("data.train is train.jsonl: it must be a list, such as [train.jsonl]",
                                          "--data.train train.jsonl"),
    "steps as 1e3": Mistake("num_steps is 1000.0: it must be a whole number", "--distill.optim.num_steps 1e3"),
    "no ranks": Mistake("launch.num_ranks is 0: choose at least 1", "--launch.num_ranks 0"),
    "no beams": Mistake("evaluate.num_beams is 0: choose at least 1", "--evaluate.num_beams 0"),
    "decay of a moment": Mistake("distill.optim.beta1 is 1.5: choose at least 0 and less", "--distill.optim.beta1 1.5"),
    "no heads": Mistake("architecture.num_heads is 0", "--teacher.architecture.num_heads 0"),
    "name of a folder": Mistake("name is '../x'", "--name ../x"),
    "a key twice": Mistake("'name' is there twice", break_it=text("recipe.yaml", "name: a\nname: b\n")),
    "an empty section": Mistake("section data holds no fields", break_it=text("recipe.yaml", "name: a\ndata:\n")),
    "an open quote": Mistake("not valid YAML", break_it=text("recipe.yaml", 'name: "a\n')),
    "source and target mixed up": Mistake("target_field are both 'source'", "--data.target_field source"),
    "corpus": Mistake("data.corpus is 'web': choose one of demo, files", "--data.corpus web"),
}  # fmt: skip

BEFORE_ANY_WORK = {
    "granularity": Mistake("has 8, but the teacher has 6+6 layers", "--distill.granularities [2,8]"),
    "nothing to train": Mistake(
        "leave all of 1+6 layers as they are",
        "--teacher.folder= --teacher.optim.num_steps 1 --teacher.architecture.num_layers 1 "
        "--distill.decoder_granularities []",
    ),
    "granularity of a stack": Mistake(
        "distill.decoder_granularities has 7, but the teacher has 6+6 layers", "--distill.decoder_granularities [7]"
    ),
    "budget": Mistake("layers=1 is beyond the coarsest assembly, which takes 2", "--search.budgets [layers=1]"),
    "bytes": Mistake("bytes=1k is beyond the coarsest assembly", "--search.budgets [bytes=1k]"),
    "ratio": Mistake("ratio 12 asks for 1 of 12 layers", "--assemble.ratios [12]"),
    "assembly text": Mistake("'e2-x' is not an assembly", "--assemble.assemblies [e2-x]"),
    "assembly": Mistake("e5.1-d6 does not fit", "--assemble.assemblies [e5.1-d6]"),
    "teacher missing": Mistake("nowhere is not a Hugging Face model folder", "--teacher.folder nowhere"),
    "teacher settings": Mistake("config.json is no JSON", break_it=text("teacher/config.json", "{")),
    "teacher not encoder-decoder": Mistake(
        "model type 'gpt2' is not supported", break_it=edit("teacher/config.json", model_type="gpt2")
    ),
    "teacher without weights": Mistake(
        "holds no weights", break_it=lambda: [path.unlink() for path in Path("teacher").glob("model*")]
    ),
    "teacher without a shard": Mistake(
        "which model.safetensors.index.json names", break_it=lambda: next(Path("teacher").glob("model-*")).unlink()
    ),
    "more layers than weights": Mistake(
        "lack decoder.block.6.", break_it=edit("teacher/config.json", num_layers=7, num_decoder_layers=7)
    ),
    "fewer layers than weights": Mistake(
        "says nothing of layer encoder.block.5 ", break_it=edit("teacher/config.json", num_layers=5)
    ),
    "weights of another width": Mistake("but config.json says", break_it=edit("teacher/config.json", d_model=32)),
    "settings that nobody has looked at": Mistake(
        "config.json has attention_type 'sparse', which is not known to be carried",
        break_it=edit("teacher/config.json", attention_type="sparse"),
    ),
    "stacks that share weights": Mistake(
        "config.json has tie_encoder_decoder True, which is not carried for t5: only False is",
        break_it=edit("teacher/config.json", tie_encoder_decoder=True),
    ),
    "no start token": Mistake(
        "names no decoder_start_token_id", break_it=edit("teacher/config.json", decoder_start_token_id=None)
    ),
    "settings cut": Mistake("lacks num_layers, d_model", break_it=text("teacher/config.json",
                                                                   '{"model_type": "t5", "vocab_size": 48}')),
    "settings with a word for a number": Mistake(
        "teacher/config.json does not fit its model type (Validation error for field 'd_kv'",
        break_it=edit("teacher/config.json", d_kv="4"),
    ),
    "settings of no activation": Mistake(
        "config.json does not describe a model (KeyError: 'foo')",
        break_it=edit("teacher/config.json", feed_forward_proj="gated-foo"),
    ),
    "settings that contradict each other": Mistake(
        "config.json has dense_act_fn nope, but its feed_forward_proj means",
        break_it=edit("teacher/config.json", dense_act_fn="nope"),
    ),
    "settings of a classifier": Mistake(
        "config.json has architectures ['T5ForSequenceClassification']",
        break_it=edit("teacher/config.json", architectures=["T5ForSequenceClassification"]),
    ),
    "settings of another tool": Mistake(
        "config.json is not the settings of a Hugging Face model: it names no model_type",
        break_it=text("teacher/config.json", '{"add_source_bos": false, "bos_token": "<s>"}'),
    ),
    "settings of a list": Mistake(
        "config.json is no JSON object, but a list", break_it=text("teacher/config.json", "[]")
    ),
    "settings that readers pass over": Mistake(
        "config.json has tie_encoder_decoder True", break_it=edit("teacher/config.json", tie_encoder_decoder=True)
    ),
    "settings of two names": Mistake(
        "config.json has hidden_size 64 and d_model 16", break_it=edit("teacher/config.json", hidden_size=64)
    ),
    "settings of no dtype": Mistake(
        "config.json has torch_dtype float8", break_it=edit("teacher/config.json", torch_dtype="float8")
    ),
    "quantised settings": Mistake(
        "config.json has quantization_config",
        break_it=edit("teacher/config.json", quantization_config={"quant_method": "gptq", "bits": 4}),
    ),
    "quantised weights": Mistake("in I8: quantised", break_it=weights(lambda each: each.to(torch.int8), "wi.weight")),
    "weights with an adapter": Mistake(
        "has an adapter (adapter_config.json)", break_it=text("teacher/adapter_config.json", "{}")
    ),
    "an adapter alone": Mistake(
        "but an adapter (adapter_config.json): merge it", break_it=lambda: (
            text("teacher/adapter_config.json", "{}")(), Path("teacher/config.json").unlink()
        ),
    ),
    "weights of an adapter": Mistake("of an adapter", break_it=renamed("encoder.block.0.layer.0.SelfAttention.q.weight",
                                     "encoder.block.0.layer.0.SelfAttention.q.lora_A.default.weight")),
    "weights without the last norm": Mistake(
        "lack encoder.final_layer_norm.weight", break_it=renamed("encoder.final_layer_norm.weight", "other")
    ),
    "weights without an embedding": Mistake(
        "lacks shared.weight", break_it=lambda: (
            renamed("shared.weight", "lm_head.weight")(), edit("teacher/config.json", tie_word_embeddings=False)()
        ),
    ),
    "weights without a head": Mistake(
        "lacks lm_head.weight", break_it=lambda: (
            renamed("lm_head.weight", "other")(), edit("teacher/config.json", tie_word_embeddings=False)()
        ),
    ),
    "weights with a prefix": Mistake(
        "lack decoder.block.0.", break_it=weights(lambda each: each, "", prefix="model.")
    ),
    "weights of PyTorch damaged": Mistake(
        "pytorch_model.bin is damaged or no weights of PyTorch", break_it=pickled(b"hello")
    ),
    "a training checkpoint": Mistake(
        "pytorch_model.bin has state_dict, which is no weight", break_it=pickled({"state_dict": {}})
    ),
    "weights of PyTorch of another model": Mistake(
        "lack decoder.block.0.", break_it=pickled({"shared.weight": torch.zeros(48, 16)})
    ),
    "index of weights": Mistake(
        "is damaged or no index of weights",
        break_it=text("teacher/model.safetensors.index.json", '{"weight_map": [1]}')
    ),
    "weights cut": Mistake("fetch it again", break_it=lambda: os.truncate(next(Path("teacher").glob("model-*")), 9000)),
    "tokenizer with another padding": Mistake(
        "has pad_token_id 0, but the teacher's config.json 3", break_it=edit("teacher/config.json", pad_token_id=3)
    ),
    "tokenizer of git lfs": Mistake("is a pointer of Git LFS", break_it=text("teacher/spiece.model", LFS)),
    "settings of a tokenizer": Mistake(
        "tokenizer_config.json has extra_ids '4': it must be a whole number",
        break_it=text("teacher/tokenizer_config.json", '{"extra_ids": "4"}'),
    ),
    "limit of a tokenizer": Mistake(
        "tokenizer_config.json has model_max_length '512': it must be a number",
        break_it=text("teacher/tokenizer_config.json", '{"model_max_length": "512"}'),
    ),
    "settings of a tokenizer damaged": Mistake(
        "tokenizer_config.json is no JSON", break_it=text("teacher/tokenizer_config.json", "{")
    ),
    "tokenizer damaged": Mistake("(spiece.model) cannot be read", break_it=text("teacher/spiece.model", "hello")),
    "no validation texts": Mistake("data.validation is empty", "--data.validation []"),
    "no test texts": Mistake("data.test is empty", "--data.test []"),
    "home": Mistake("~ is not expanded", "--run_dir ~/run"),
    "recover a misfit": Mistake("e5.1-d6 does not fit", "--recover.assembly e5.1-d6"),
    "recover no assembly": Mistake("'e2-x' is not an assembly", "--recover.assembly e2-x"),
    "recover without steps": Mistake(
        "recover.optim.num_steps is 0", "--recover.assembly e2x3-d6 --recover.optim.num_steps 0"
    ),
    "baseline of two granularities": Mistake(
        "baseline theseus has one granularity",
        "--baseline.methods [theseus] --baseline.optim.num_steps 2 --baseline.ratios [1.2]",
    ),
    "settings of generation": Mistake(
        "generation_config.json has guidance_scale, max_time, which decoding here does not carry: give a copy",
        break_it=edit("teacher/generation_config.json", guidance_scale=2.0, max_time=3.0, temperature=0.3),
    ),
    "settings of generation in config.json": Mistake(
        "config.json has suppress_tokens, which decoding here does not carry",
        break_it=lambda: (
            Path("teacher/generation_config.json").unlink(), edit("teacher/config.json", suppress_tokens=[5])()
        ),
    ),
    "number of generation": Mistake(
        "generation_config.json has min_length '5': it must be a whole number of 0 or more",
        break_it=edit("teacher/generation_config.json", min_length="5"),
    ),
    "token of generation beyond the vocabulary": Mistake(
        "generation_config.json has forced_bos_token_id 99999 beyond its 48 tokens",
        break_it=edit("teacher/generation_config.json", forced_bos_token_id=99999),
    ),
    "teacher without a start": Mistake(
        "config.json names no decoder_start_token_id", break_it=edit("teacher/config.json", decoder_start_token_id=None)
    ),
    "settings of generation damaged": Mistake(
        "generation_config.json is no JSON", break_it=text("teacher/generation_config.json", "{")
    ),
    "peer without a tokenizer": Mistake(
        "has no tokenizer", "--evaluate.folders [p=peer]", peer(lambda folder: (folder / "spiece.model").unlink())
    ),
    "peer with too many tokens": Mistake(
        "peer has 60 tokens, its model's embedding only 48", "--evaluate.folders [p=peer]",
        peer(lambda folder: shutil.copy("large_tokenizer/spiece.model", folder / "spiece.model")),
    ),
    "peer with a damaged tokenizer": Mistake(
        "(spiece.model) cannot be read", "--evaluate.folders [p=peer]",
        peer(lambda folder: text(str(folder / "spiece.model"), "hello")()),
    ),
    "peer that is a decoder": Mistake(
        "its model type is none that AutoModelForSeq2SeqLM knows", "--evaluate.folders [p=peer]",
        peer(lambda folder: edit(str(folder / "config.json"), model_type="gpt2")()),
    ),
    "peer with settings that do not fit": Mistake(
        "config.json does not fit its model type (Validation error for field 'd_kv'", "--evaluate.folders [p=peer]",
        peer(lambda folder: edit(str(folder / "config.json"), d_kv="four")()),
    ),
    "peer without a layer's weights": Mistake(
        "lack decoder.block.6.", "--evaluate.folders [p=peer]",
        peer(lambda folder: edit(str(folder / "config.json"), num_decoder_layers=7)()),
    ),
    "peer with cut weights": Mistake(
        "fetch it again", "--evaluate.folders [p=peer]",
        peer(lambda folder: os.truncate(next(folder.glob("model-*")), 9000)),
    ),
    "peer called as an assembly": Mistake(
        "a system drop-e2x3-d6, as systems of this run are called", "--evaluate.folders [drop-e2x3-d6=peer]", peer()
    ),
    "peer called as no file": Mistake("calls a system 'a/b'", "--evaluate.folders [a/b=peer]", peer()),
    "peers of one name": Mistake("two systems are called p", "--evaluate.folders [p=peer,p=teacher]", peer()),
    "peer without a start": Mistake(
        "names no decoder_start_token_id", "--evaluate.folders [p=peer]",
        peer(lambda folder: (
            (folder / "generation_config.json").unlink(),
            edit(str(folder / "config.json"), decoder_start_token_id=None)(),
        )),
    ),
    "tokenizer of BLEU": Mistake(
        "evaluate.bleu_tokenizer is ko-mecab, which cannot be made here", "--evaluate.bleu_tokenizer ko-mecab",
        lambda: sys.modules.update({"mecab_ko": None}),
    ),
    "other model": Mistake("nowhere is not a Hugging Face folder", "--evaluate.folders [nowhere]"),
    "ds_config not json": Mistake(
        "ds.json is not valid JSON", "--distill.loop.ds_config ds.json", text("ds.json", "{")
    ),
    "tokenizer missing": Mistake("nowhere holds no tokenizer", "--data.tokenizer nowhere"),
    "tokenizer of another model": Mistake("is not the teacher's", "--data.tokenizer other_tokenizer"),
    "tokenizer too large": Mistake("the teacher's embedding only 48", "--data.tokenizer large_tokenizer"),
    "not fetched": Mistake("run `python -m pipeline fetch`", "--teacher.folder hub:nobody/nothing"),
    "not a repository": Mistake("write hub:owner/name", "--teacher.folder hub:nothing"),
    "ranks": Mistake("launch.num_ranks 3 does not divide", "--launch.num_ranks 3"),
    "run_dir is a file": Mistake("is a file", "--run_dir recipe.yaml"),
    "run_dir not writable": Mistake("cannot write to /proc", "--run_dir /proc/run"),
    "ds_config": Mistake("no DeepSpeed configuration 'zero9'", "--distill.loop.ds_config zero9"),
    "ds_config decides": Mistake(
        "sets gradient_clipping", "--distill.loop.ds_config ds.json",
        text("ds.json", '{"gradient_clipping": 1.0, "zero_optimization": {"stage": 3}}'),
    ),
    "begun with another teacher": Mistake(
        "is half finished with other settings (teacher.optim.weight_decay: 0.5 -> 0.0)",
        break_it=lambda: begun("teacher", "--teacher.optim.weight_decay", "0.5"),
    ),
    "begun with another schedule": Mistake(
        "give --extend to continue", break_it=lambda: begun("teacher", "--teacher.optim.num_steps", "7")
    ),
}  # fmt: skip

DATA = {
    "file missing": Mistake("nowhere.jsonl: no such file", "--data.train [nowhere.jsonl]"),
    "no file": Mistake("data.train is empty", "--data.train []"),
    "field": Mistake("present: source, target; set data.source_field", "--data.source_field text"),
    "empty": Mistake("train.jsonl: the file holds no record", break_it=text("train.jsonl", "\n")),
    "not utf-8": Mistake("train.jsonl:1: not UTF-8", break_it=text("train.jsonl", b'{"source": "\xfc"}\n')),
    "not json": Mistake("train.jsonl:1: not a JSON object", break_it=text("train.jsonl", "hello\n")),
    "a list a line": Mistake("a JSON list, not an object", break_it=text("train.jsonl", "[1]\n")),
    "no target": Mistake(
        "test.jsonl:61: no field 'target'",
        break_it=lambda: write_jsonl(Path("test.jsonl"), [*LINES, {"source": "lonely"}]),
    ),
    "cut gzip": Mistake("truncated or damaged", "--data.train [train.jsonl.gz]", cut_gzip),
    "not gzip": Mistake(
        "truncated or damaged", "--data.train [train.jsonl.gz]", lambda: shutil.copy("train.jsonl", "train.jsonl.gz")
    ),
    "sheet with semicolons": Mistake(
        "present: source;target", "--data.train [a.csv]", text("a.csv", "source;target\na;b\n")
    ),
    "utf-16": Mistake("not UTF-8", "--data.train [a.jsonl]", text("a.jsonl", "\ufeff{}".encode("utf-16"))),
    "other settings": Mistake(
        "begun with other data settings (max_source_tokens 9 -> 512)",
        break_it=lambda: subprocess.run(
            [sys.executable, "-m", "data_prep", "build", "--config", "recipe.yaml", "--out", "run/data",
             "--data.max_source_tokens", "9"],
            check=True, capture_output=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
        ),
    ),
}  # fmt: skip

TOO_EARLY = {
    "assemble first": Mistake("stage assemble needs the output of stage teacher", stage="assemble"),
    "evaluate first": Mistake("run stage data first", stage="evaluate"),
    "report first": Mistake("stage evaluate", stage="report"),
}

MISTAKES = {**RECIPE, **BEFORE_ANY_WORK, **DATA, **TOO_EARLY}
