"""Mistakes in the folders of teachers, tokenizers and peers."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch

from tests.end_to_end.breaking import (
    LFS,
    Mistake,
    edit,
    peer,
    pickled,
    renamed,
    text,
    weights,
)

BROKEN_FOLDERS = {
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
        "a system ct2-int8-e2x3-d6, as systems of this run are called",
        "--evaluate.folders [ct2-int8-e2x3-d6=peer]", peer(),
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
}  # fmt: skip
