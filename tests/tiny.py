"""Tiny models and batches that tests share."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    CONFIG_MAPPING,
    AutoModelForSeq2SeqLM,
    MT5Config,
    MT5ForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
    T5Gemma2Config,
    T5Gemma2ForConditionalGeneration,
    UMT5Config,
    UMT5ForConditionalGeneration,
)

from pipeline.data import MicroBatch
from pipeline.families import decoder_inputs
from pipeline.spans import Assembly

OWN_TOKENIZER = ["v1.0", "v1.1", "mt5", "umt5", "bart", "bart-scaled"]  # kinds for which tests make one
KINDS = ["v1.0", "v1.1", "mt5", "umt5", "bart", "bart-scaled", "mbart", "pegasus", "m2m_100", "marian", "t5gemma2"]
NORM_FIRST = ("mbart", "pegasus", "m2m_100")
SPECIAL = {  # ids as their public models order them, with padding 0 where the batches here have it
    "mbart": {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1, "forced_eos_token_id": 1},
    "m2m_100": {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1, "activation_function": "relu"},
    "pegasus": {"activation_function": "relu"},
    "marian": {"activation_function": "swish"},
}
FULL, SLIDING = "full_attention", "sliding_attention"
ATTENTION_TYPES = ((SLIDING, FULL, SLIDING) * 2, (SLIDING, SLIDING, FULL) * 2)  # of a T5Gemma 2's encoder and decoder
SIZES = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_heads": 4, "vocab_size": 64, "decoder_start_token_id": 0}


def tiny_t5(kind: str = "v1.1", num_layers: int = 6, num_decoder_layers: int = 6, seed: int = 0, vocab_size: int = 64):
    """A random model: "v1.0" (tied, scaled head), "v1.1", "mt5" and "umt5" (untied head, not scaled)."""
    torch.manual_seed(seed)
    sizes = {**SIZES, "vocab_size": vocab_size}
    depth = {"num_layers": num_layers, "num_decoder_layers": num_decoder_layers, "dropout_rate": 0.0}
    if kind == "mt5":
        model = MT5ForConditionalGeneration(MT5Config(**sizes, **depth))
    elif kind == "umt5":
        model = _as_other_versions(UMT5ForConditionalGeneration(UMT5Config(**sizes, **depth)), tied=False)
    elif kind == "v1.0":
        model = T5ForConditionalGeneration(T5Config(**sizes, **depth))
    else:
        config = T5Config(**sizes, **depth, feed_forward_proj="gated-gelu", tie_word_embeddings=False)
        model = T5ForConditionalGeneration(config)
    if kind != "v1.0":
        model.lm_head.weight = torch.nn.Parameter(torch.randn(vocab_size, 32) * 0.1)
    for parameter in model.parameters():  # norms and biases away from their constant start
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model.eval()


def _as_other_versions(model: Any, *, tied: bool) -> Any:
    """A umT5 as transformers 4.57 and 5.24 make it: 5.17 scales the outputs of every one, and where no target is padded
    lets each see those behind it."""
    model.config.update({"tie_word_embeddings": tied, "scale_decoder_outputs": tied})  # 5.17 goes by the first
    for block in model.decoder.block:
        block.layer[0].SelfAttention.is_causal = True
    return model


def tiny_bart(
    kind: str = "bart", num_layers: int = 6, num_decoder_layers: int = 6, seed: int = 0, vocab_size: int = 64,
    **ids: int,
):  # fmt: skip
    """A random model with layer norms: "bart" (tied head), "bart-scaled" (embeddings scaled, every head and embedding
    its own), or one of SPECIAL.

    Args:
        ids: of special tokens, where they are not as SPECIAL has them.
    """
    torch.manual_seed(seed)
    stacks = {
        f"{stack}_{name}": value
        for stack in ("encoder", "decoder")
        for name, value in {"ffn_dim": 48, "attention_heads": 4, "layerdrop": 0.9}.items()
    }
    special = dict(SPECIAL.get(kind, {}))
    if kind in ("mbart", "m2m_100"):
        special["decoder_start_token_id"] = special["eos_token_id"]
    if kind == "marian":
        special |= {"pad_token_id": vocab_size - 1, "decoder_start_token_id": vocab_size - 1}
    special |= ids
    config = CONFIG_MAPPING[kind.removesuffix("-scaled")](
        vocab_size=vocab_size,
        d_model=32,
        dropout=0.0,
        attention_dropout=0.0,
        max_position_embeddings=40,
        encoder_layers=num_layers,
        decoder_layers=num_decoder_layers,
        scale_embedding=kind != "bart",
        tie_word_embeddings=kind != "bart-scaled",
        **stacks,
        **special,
    )
    model = AutoModelForSeq2SeqLM.from_config(config)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:  # sinusoids stay what they are
            parameter.data += 0.1 * torch.randn_like(parameter)
            # so strong that what is written depends on what is read
            parameter.data *= 3 if kind in NORM_FIRST and ".layers." in name and parameter.dim() == 2 else 1
    if hasattr(model, "final_logits_bias"):
        model.final_logits_bias += torch.randn_like(model.final_logits_bias) * (0.2 if kind in SPECIAL else 1)
    if kind in ("marian", "m2m_100"):  # padding within an M2M100's text counts as a position only with a cache
        model.generation_config.bad_words_ids = [[config.pad_token_id]]
    return model.eval()


def tiny_t5gemma2(
    num_layers: int = 6, num_decoder_layers: int = 6, seed: int = 0, vocab_size: int = 64,
    kinds: tuple[Sequence[str], Sequence[str]] = ATTENTION_TYPES, **ids: int,
):  # fmt: skip
    """A random model with windows shorter than texts; the token that would end an image is among those of texts.

    Args:
        kinds: attention types of the layers of each stack; those behind its depth are left out.
        ids: of special tokens.
    """
    torch.manual_seed(seed)
    sizes = {
        "vocab_size": vocab_size, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "query_pre_attn_scalar": 8, "max_position_embeddings": 40,
        "sliding_window": 4, **ids,
    }  # fmt: skip
    depths = {"encoder": num_layers, "decoder": num_decoder_layers}
    stacks = {
        name: {
            **sizes,
            "num_hidden_layers": depth,
            "layer_types": [*of_stack[:depth]],
            "rope_parameters": {
                FULL: {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                SLIDING: {"rope_type": "default", "rope_theta": 1e4},
            },
        }
        for (name, depth), of_stack in zip(depths.items(), kinds, strict=True)
    }
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = T5Gemma2Config(
        encoder={
            "text_config": stacks["encoder"],
            "vision_config": {**vision, "image_size": 4, "patch_size": 2, "vision_use_head": False},
            "mm_tokens_per_image": 4,
            "eoi_token_index": 5,
        },
        decoder=stacks["decoder"],
        image_token_index=6,
    )
    model = T5Gemma2ForConditionalGeneration(config)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


def tiny_model(
    kind: str, num_layers: int = 6, num_decoder_layers: int = 6, seed: int = 0, vocab_size: int = 64, **ids: int
):
    """A random model of one of KINDS; `ids` as tiny_bart takes them."""
    if kind in ("v1.0", "v1.1", "mt5", "umt5"):
        return tiny_t5(kind, num_layers, num_decoder_layers, seed, vocab_size)
    if kind == "t5gemma2":
        return tiny_t5gemma2(num_layers, num_decoder_layers, seed, vocab_size, **ids)
    return tiny_bart(kind, num_layers, num_decoder_layers, seed, vocab_size, **ids)


def tiny_assembled(kind: str, assembly: Assembly):
    """A random model of an assembly's depths, whose layers are of the kind of the last that they stand for."""
    depths = assembly.encoder.num_layers, assembly.decoder.num_layers
    if kind != "t5gemma2":
        return tiny_model(kind, *depths)
    stacks = zip(ATTENTION_TYPES, (assembly.encoder, assembly.decoder), strict=True)
    encoder, decoder = ([kinds[span.last] for span in tiling.spans] for kinds, tiling in stacks)
    return tiny_t5gemma2(*depths, kinds=(encoder, decoder))


def read_plainly(folder: Path):
    """What plain transformers makes of a folder. The project's own reader is held against this, and has no part in
    it."""
    model = AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
    if model.config.model_type == "umt5":
        settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        _as_other_versions(model, tied=settings["tie_word_embeddings"])
    return model


def hf_logits(model, batch: MicroBatch) -> torch.Tensor:
    """Logits [N, V] of an ordinary Hugging Face model at the target tokens. With a mask in which there is padding every
    one is causal, a umT5 of transformers 5.17 too."""
    with torch.no_grad():
        return model(
            input_ids=batch.source_BS,
            attention_mask=batch.source_mask_BS,
            decoder_input_ids=decoder_inputs(model.config, batch.labels_BT),
            decoder_attention_mask=batch.labels_BT != -100,
        ).logits[batch.labels_BT != -100]


def random_batch(seed: int, index: int = 0, num_examples: int = 5, longest: int = 9) -> MicroBatch:
    """Examples of different lengths; id 0 is padding, id 1 ends a text."""
    generator = np.random.default_rng((seed, index))
    source = torch.zeros(num_examples, longest, dtype=torch.long)
    labels = torch.full((num_examples, longest - 2), -100, dtype=torch.long)
    for row in range(num_examples):
        lengths = generator.integers(2, longest + 1), generator.integers(2, longest - 1)
        source[row, : lengths[0]] = torch.from_numpy(generator.integers(2, 64, lengths[0]))
        labels[row, : lengths[1]] = torch.from_numpy(generator.integers(2, 64, lengths[1]))
    source[0, :] = source[0, :].clamp(min=2)  # one example fills the width
    return MicroBatch(
        index=index,
        example_ids=np.arange(num_examples),
        source_BS=source,
        source_mask_BS=source != 0,
        labels_BT=labels,
    )


def on_device(batch: MicroBatch, device: torch.device) -> MicroBatch:
    tensors = {k: v.to(device) for k, v in vars(batch).items() if isinstance(v, torch.Tensor)}
    return dataclasses.replace(batch, **tensors)
