"""T5 v1.0, T5 v1.1, Flan-T5 and mT5, on the installed transformers' own layer classes.

Shapes: B examples, S source tokens, T target tokens, L tokens of a stack, D model width, H heads, N tokens, V
vocabulary.
"""

from __future__ import annotations

import re
from typing import Any, ClassVar, cast

import torch
from torch import nn
from transformers import GenerationConfig, T5Config, T5ForConditionalGeneration
from transformers.models.t5.modeling_t5 import T5Attention

from pipeline.families.base import StackInputs


class PositionBias(nn.Module):
    """T5's relative position bias of one stack, with the mask put in."""

    def __init__(self, attention: T5Attention) -> None:
        super().__init__()
        self.table = attention.relative_attention_bias
        self.bidirectional = not attention.is_decoder
        self.num_buckets = attention.relative_attention_num_buckets
        self.max_distance = attention.relative_attention_max_distance

    def forward(self, mask_BL: torch.Tensor) -> torch.Tensor:
        """Additive self-attention bias [B, H, L, L]; keys that are padding (or later, in a decoder) are masked."""
        positions_L = torch.arange(mask_BL.shape[1], device=mask_BL.device)
        distance_LL = positions_L[None, :] - positions_L[:, None]
        buckets_LL = T5Attention._relative_position_bucket(
            distance_LL, self.bidirectional, self.num_buckets, self.max_distance
        )
        bias_HLL = self.table(buckets_LL).permute(2, 0, 1)
        visible = mask_BL[:, None, None, :]
        if not self.bidirectional:
            visible = visible & (distance_LL <= 0)
        return torch.where(visible, bias_HLL, torch.finfo(bias_HLL.dtype).min)


class T5Shared(nn.Module):
    """Embedding, position biases, final norms and head: frozen, and used by teacher and student alike."""

    def __init__(self, model: T5ForConditionalGeneration) -> None:
        super().__init__()
        self.embedding = model.shared
        self.bias = nn.ModuleDict(
            {
                "encoder": PositionBias(model.encoder.block[0].layer[0].SelfAttention),
                "decoder": PositionBias(model.decoder.block[0].layer[0].SelfAttention),
            }
        )
        self.norm = nn.ModuleDict(
            {"encoder": model.encoder.final_layer_norm, "decoder": model.decoder.final_layer_norm}
        )
        self.head = model.lm_head
        config = model.config
        scaled = getattr(config, "scale_decoder_outputs", False)
        self.head_scale = config.d_model**-0.5 if scaled else 1.0
        self.pad_id = int(config.pad_token_id or 0)
        self.start_id = int(config.decoder_start_token_id)

    def embed(self, stack: str, ids_BL: torch.Tensor) -> torch.Tensor:
        return self.embedding(ids_BL)

    def decoder_inputs(self, labels_BT: torch.Tensor) -> torch.Tensor:
        """Labels moved one to the right behind the start token; padding labels (-100) become the pad token."""
        shifted_BT = torch.roll(labels_BT, 1, dims=1).masked_fill(torch.roll(labels_BT, 1, dims=1) == -100, self.pad_id)
        shifted_BT[:, 0] = self.start_id
        return shifted_BT

    def self_bias(self, stack: str, mask_BL: torch.Tensor) -> torch.Tensor:
        return self.bias[stack](mask_BL)

    def cross_bias(self, mask_BS: torch.Tensor) -> torch.Tensor:
        dtype = self.embedding.weight.dtype
        bias_BS = torch.zeros(mask_BS.shape, dtype=dtype, device=mask_BS.device)
        return bias_BS.masked_fill(~mask_BS, torch.finfo(dtype).min)[:, None, None, :]

    def finish(self, stack: str, hidden_BLD: torch.Tensor) -> torch.Tensor:
        return self.norm[stack](hidden_BLD)

    def logits(self, normed_ND: torch.Tensor) -> torch.Tensor:
        """Logits [N, V] of final-normed decoder states [N, D]."""
        return self.head(normed_ND * self.head_scale)


class T5Family:
    """See pipeline.families.base.Family."""

    depth_keys: ClassVar[dict[str, str]] = {"encoder": "num_layers", "decoder": "num_decoder_layers"}
    vocabulary_weights: ClassVar[tuple[str, ...]] = (
        "shared.weight",
        "lm_head.weight",
        "encoder.embed_tokens.weight",
        "decoder.embed_tokens.weight",
    )

    def layers(self, model: nn.Module, stack: str) -> nn.ModuleList:
        return getattr(model, stack).block

    def layer_prefix(self, stack: str) -> str:
        return f"{stack}.block."

    def is_shared_weight(self, name_in_layer: str) -> bool:
        return name_in_layer == "layer.0.SelfAttention.relative_attention_bias.weight"

    def take_shared(self, model: nn.Module) -> T5Shared:
        shared = T5Shared(cast(T5ForConditionalGeneration, model))
        for stack in ("encoder", "decoder"):
            attention: Any = self.layers(model, stack)[0].get_submodule("layer.0.SelfAttention")
            del attention.relative_attention_bias
            attention.has_relative_attention_bias = False
        return shared

    def call_layer(
        self, layer: nn.Module, hidden_BLD: torch.Tensor, encoded_BSD: torch.Tensor | None, inputs: StackInputs
    ) -> torch.Tensor:
        outputs: tuple[Any, ...] = layer(
            hidden_BLD,
            position_bias=inputs.self_bias,
            encoder_hidden_states=encoded_BSD,
            encoder_decoder_position_bias=inputs.cross_bias,
        )
        return outputs[0]

    def lr_factor(self, name: str, config: Any) -> float:
        """Factors that let AdamW train T5's parametrisation, whose initial scales differ by group.

        Queries start smaller by d_kv^-0.5, because T5 does not scale its scores; relative position bias and embeddings
        start far from where they must go. The values were measured on a small T5 trained from scratch.
        """
        if name.endswith(".q.weight"):
            return config.d_kv**-0.5
        if "relative_attention_bias" in name:
            return 10.0
        if re.search(r"(^|\.)(shared|embed_tokens|embedding)\.weight$", name):
            return 4.0
        if "layer_norm" in name:
            return 2.0
        return 1.0


def new_t5(vocab_size: int, sizes: dict[str, Any], seed: int) -> T5ForConditionalGeneration:
    """A T5 v1.1 with fresh weights and a structured start of its relative position bias.

    One head prefers near tokens, one the token before, one the token after (in the decoder: itself), the rest start at
    zero: position is otherwise only learnt through a table that starts near nothing, and training crawls.
    """
    torch.manual_seed(seed)
    config = T5Config(
        vocab_size=vocab_size,
        feed_forward_proj="gated-gelu_pytorch_tanh",  # gelu_new, as T5 v1.1 has it, in one fused call
        **{"decoder_start_token_id": 0, "dropout_rate": sizes.pop("dropout"), **sizes},
    )
    model = T5ForConditionalGeneration(config)
    for stack in (model.encoder, model.decoder):
        attention = stack.block[0].layer[0].SelfAttention
        _structure_position_bias(attention)
    model.generation_config = GenerationConfig.from_model_config(config)
    return model


@torch.no_grad()
def _structure_position_bias(attention: T5Attention) -> None:
    table = attention.relative_attention_bias.weight  # [buckets, H]
    distance = torch.arange(-attention.relative_attention_max_distance, attention.relative_attention_max_distance + 1)
    buckets = T5Attention._relative_position_bucket(
        distance,
        not attention.is_decoder,
        attention.relative_attention_num_buckets,
        attention.relative_attention_max_distance,
    )
    table.zero_()
    nearest = torch.full((table.shape[0],), 20.0)
    nearest.scatter_reduce_(0, buckets, distance.abs().float().clamp(max=20), "amin")
    table[:, 0] = -0.3 * nearest
    if table.shape[1] > 2:
        table[buckets[distance == -1], 1] = 4.0
        table[buckets[distance == (0 if attention.is_decoder else 1)], 2] = 4.0
