"""T5 v1.0, T5 v1.1, Flan-T5 and mT5, on the installed transformers' own layer classes.

Shapes: B examples, S source tokens, T target tokens, L tokens of a stack, D model width, H heads, K width of a head, N
tokens, V vocabulary; in cached decoding R rows and Q new tokens of each.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GenerationConfig, T5Config, T5ForConditionalGeneration
from transformers.models.t5.modeling_t5 import T5Attention, T5LayerNorm

from pipeline.families.attention import attend, attend_across, heads
from pipeline.families.base import (
    Distances,
    KeysValues,
    SelfCache,
    SharedParts,
    StackInputs,
    empty_bias,
    set_layer_index,
    shifted,
    visible_at,
    visible_keys,
)
from pipeline.families.capture import Projections
from pipeline.families.head import VocabularyHead
from pipeline.families.keys import Keys


class RelativePositions(nn.Module):
    """Which keys a query of one stack sees, and the buckets in which a table of position biases has their distances."""

    def __init__(self, attention: T5Attention) -> None:
        super().__init__()
        self.bidirectional = not attention.is_decoder
        self.num_buckets = attention.relative_attention_num_buckets
        self.max_distance = attention.relative_attention_max_distance

    def distances(self, num_tokens: int, device: torch.device) -> Distances:
        """Among L tokens: buckets of the distances from 1 - L to L - 1."""
        positions_L = torch.arange(num_tokens, device=device)
        places_LL = positions_L[None, :] - positions_L[:, None] + num_tokens - 1
        return Distances(self._buckets(torch.arange(1 - num_tokens, num_tokens, device=device)), places_LL[None])

    def distances_at(self, positions_RQ: torch.Tensor, num_keys: int) -> Distances:
        """From tokens at these positions to keys 0..T-1: buckets of the distances from 1 - T to 0; later keys, which
        are not seen, have the place of 0."""
        assert not self.bidirectional
        keys_T = torch.arange(num_keys, device=positions_RQ.device)
        places_RQT = (keys_T - positions_RQ[:, :, None]).clamp(max=0) + num_keys - 1
        return Distances(self._buckets(keys_T + 1 - num_keys), places_RQT)

    def visible(self, mask_BL: torch.Tensor) -> torch.Tensor:
        """Bool [B, 1, L or 1, L]."""
        return visible_keys(mask_BL, causal=not self.bidirectional)

    def _buckets(self, distance_R: torch.Tensor) -> torch.Tensor:
        return T5Attention._relative_position_bucket(
            distance_R, self.bidirectional, self.num_buckets, self.max_distance
        )


class PositionBias(RelativePositions):
    """T5's relative position bias of one stack, with the mask put in."""

    def __init__(self, attention: T5Attention) -> None:
        super().__init__(attention)
        self.table = attention.relative_attention_bias

    def forward(self, mask_BL: torch.Tensor, cross_bias: torch.Tensor | None) -> StackInputs:
        """Inputs with a self-attention bias [B, H, L, L], also by distance."""
        distances = self.distances(mask_BL.shape[1], mask_BL.device)
        by_distance_RH = self.table(distances.buckets_R)
        bias_BHLL = biased(by_distance_RH, distances, self.visible(mask_BL))
        return StackInputs(bias_BHLL, cross_bias, by_distance_RH.T)

    def at(self, positions_RQ: torch.Tensor, num_keys: int, cross_bias: torch.Tensor) -> StackInputs:
        """Inputs with the rows of the bias that belong to these positions, [R or 1, H, Q, num_keys]."""
        distances = self.distances_at(positions_RQ, num_keys)
        by_distance_RH = self.table(distances.buckets_R)
        return StackInputs(biased(by_distance_RH, distances, visible_at(positions_RQ, num_keys)), cross_bias)


def biased(by_distance_RH: torch.Tensor, distances: Distances, visible: torch.Tensor) -> torch.Tensor:
    """Additive self-attention bias [B or 1, H, Q, L] from one by distance; keys that are not visible, bool
    [B or 1, 1, Q or 1, L], are masked."""
    bias_HQL = F.embedding(distances.places_QL, by_distance_RH).permute(0, 3, 1, 2)
    shape = torch.broadcast_shapes(bias_HQL.shape, visible.shape)
    bias_BHQL = empty_bias(shape, bias_HQL.dtype, bias_HQL.device)
    return bias_BHQL.copy_(bias_HQL).masked_fill_(~visible, torch.finfo(bias_HQL.dtype).min)


class T5Shared(SharedParts):
    """Embedding, position biases, final norms and head: frozen, and used by teacher and student alike.

    Args:
        positions: made for each stack from its first layer's self-attention, see PositionBias.
        scaled: the head takes states times d_model^-0.5.
    """

    def __init__(self, model: nn.Module, positions: type[nn.Module], *, scaled: bool) -> None:
        super().__init__()
        inner = cast(Any, model)
        self.embedding = inner.shared
        stacks: dict[str, Any] = {"encoder": inner.encoder, "decoder": inner.decoder}
        self.bias = nn.ModuleDict(
            {name: positions(stack.block[0].layer[0].SelfAttention) for name, stack in stacks.items()}
        )
        self.norm = nn.ModuleDict({name: stack.final_layer_norm for name, stack in stacks.items()})
        self.config: Any = inner.config
        self.head = VocabularyHead(inner.lm_head, self.config.d_model**-0.5 if scaled else 1.0)

    def embed(self, stack: str, ids_BL: torch.Tensor) -> torch.Tensor:
        return self.embedding(ids_BL)

    def decoder_inputs(self, labels_BT: torch.Tensor) -> torch.Tensor:
        return shifted(labels_BT, self.config.decoder_start_token_id, self.config.pad_token_id)

    def inputs(self, stack: str, mask_BL: torch.Tensor, source_mask_BS: torch.Tensor | None = None) -> StackInputs:
        return self.bias[stack](mask_BL, self.bias_of_source(source_mask_BS))

    def embed_at(self, ids_RQ: torch.Tensor, positions_RQ: torch.Tensor) -> torch.Tensor:
        return self.embedding(ids_RQ)

    def inputs_at(self, positions_RQ: torch.Tensor, num_keys: int, cross_bias: torch.Tensor) -> StackInputs:
        bias: Any = self.bias["decoder"]
        return bias.at(positions_RQ, num_keys, cross_bias)

    def finish(self, stack: str, hidden_BLD: torch.Tensor) -> torch.Tensor:
        return self.norm[stack](hidden_BLD)


CARRIED = (
    "d_model", "d_kv", "d_ff", "num_heads", "num_layers", "num_decoder_layers", "decoder_layers", "feed_forward_proj",
    "is_gated_act", "dense_act_fn", "dropout_rate", "layer_norm_epsilon", "initializer_factor",
    "relative_attention_num_buckets", "relative_attention_max_distance", "hidden_size", "num_attention_heads",
    "head_dim", "scale_decoder_outputs",
)  # fmt: skip


class T5Family:
    """See pipeline.families.base.Family."""

    keys: ClassVar[Keys] = Keys.of(CARRIED, harmless=("n_positions",))
    size_keys: ClassVar[tuple[str, ...]] = ("num_layers", "vocab_size", "d_model")
    start_key: ClassVar[str] = "decoder_start_token_id"
    has_attention_losses: ClassVar[bool] = True
    engines: ClassVar[tuple[str, ...]] = ("ctranslate2", "onnx")
    vocabulary_weights: ClassVar[tuple[str, ...]] = (
        "shared.weight",
        "lm_head.weight",
        "encoder.embed_tokens.weight",
        "decoder.embed_tokens.weight",
    )

    position_weights: ClassVar[tuple[str, ...]] = ()
    computed_weights: ClassVar[tuple[str, ...]] = ()
    ties_by_default: ClassVar[bool] = True
    scales_tied_head: ClassVar[bool | None] = True
    takes_made_mask: ClassVar[bool] = True
    norm: ClassVar[type[nn.Module]] = T5LayerNorm
    """Class of the norms."""

    def layers(self, model: nn.Module, stack: str) -> nn.ModuleList:
        return getattr(model, stack).block

    def layer_prefix(self, stack: str) -> str:
        return f"{stack}.block."

    def is_shared_weight(self, name_in_layer: str) -> bool:
        return name_in_layer == "layer.0.SelfAttention.relative_attention_bias.weight"

    def stored_name(self, name: str) -> str:
        return name

    def depths(self, settings: Mapping[str, Any]) -> tuple[int, int]:
        encoder = settings["num_layers"]
        return encoder, settings.get("num_decoder_layers", encoder)

    def with_layers(self, settings: Mapping[str, Any], layers: Mapping[str, Sequence[int]]) -> dict[str, Any]:
        """`decoder_layers` is no key of T5's, but what transformers' `get_text_config(decoder=True)` goes by where it
        is there; without it `generate` makes a cache of as many layers as the ENCODER has, which is too short for a
        decoder that is deeper (transformers 5.17 and 5.24: IndexError). `num_hidden_layers` is an alias of the
        encoder's depth, which would win over it."""
        encoder, decoder = len(layers["encoder"]), len(layers["decoder"])
        entries = {"num_layers": encoder, "num_decoder_layers": decoder, "decoder_layers": decoder}
        return {key: value for key, value in settings.items() if key != "num_hidden_layers"} | entries

    def max_positions(self, config: Any) -> int | None:
        return None  # relative positions: far ones share a bucket

    def correct(self, model: nn.Module, settings: Mapping[str, Any]) -> None:
        """All versions make the same of it."""

    def prepare_for_training(self, model: nn.Module) -> None:
        """T5 has no layer drop. Its norm is eight operations in transformers, and torch's own is one on a GPU."""
        for owner in list(model.modules()):
            for name, norm in owner.named_children():
                if isinstance(norm, self.norm):
                    setattr(owner, name, _fused(norm))

    def take_shared(self, model: nn.Module) -> T5Shared:
        config: Any = model.config
        shared = T5Shared(model, PositionBias, scaled=getattr(config, "scale_decoder_outputs", False))
        for stack in ("encoder", "decoder"):
            attention: Any = self.layers(model, stack)[0].get_submodule("layer.0.SelfAttention")
            del attention.relative_attention_bias
            attention.has_relative_attention_bias = False
        return shared

    def call_layer(
        self,
        layer: nn.Module,
        hidden_BLD: torch.Tensor,
        encoded_BSD: torch.Tensor | None,
        inputs: StackInputs,
    ) -> torch.Tensor:
        """The block's own call would copy the bias in every attention (T5's of transformers 5.24, to have it without
        gaps between rows), or make biases of zeros (umT5's)."""
        if encoded_BSD is not None:
            cross = self.cross_keys_values(layer, encoded_BSD)
            return self._decode(layer, hidden_BLD, None, cross, inputs)
        self_block, feed_forward = cast(Any, layer).layer
        return within_fp16(feed_forward(self._attend_to_itself(self_block, hidden_BLD, None, inputs)))

    def cross_keys_values(self, layer: nn.Module, encoded_BSD: torch.Tensor) -> KeysValues:
        attention: Any = layer.get_submodule("layer.1.EncDecAttention")
        width = attention.key_value_proj_dim
        keys_BHSK, values_BHSK = (heads(each(encoded_BSD), width).contiguous() for each in (attention.k, attention.v))
        return KeysValues(keys_BHSK, values_BHSK)

    def call_cached(
        self, layer: nn.Module, hidden_RQD: torch.Tensor, cache: SelfCache, cross: KeysValues, inputs: StackInputs
    ) -> torch.Tensor:
        return self._decode(layer, hidden_RQD, cache, cross, inputs)

    def _decode(
        self,
        layer: nn.Module,
        hidden_RQD: torch.Tensor,
        cache: SelfCache | None,
        cross: KeysValues,
        inputs: StackInputs,
    ) -> torch.Tensor:
        self_block, cross_block, feed_forward = cast(Any, layer).layer
        hidden_RQD = self._attend_to_itself(self_block, hidden_RQD, cache, inputs)

        attention = cross_block.EncDecAttention
        queries_RHQK = heads(attention.q(cross_block.layer_norm(hidden_RQD)), attention.key_value_proj_dim)
        attended_RQX = attend_across(queries_RHQK, cross, inputs.bias("cross"), scale=1.0, fused=cache is None)
        hidden_RQD = within_fp16(hidden_RQD + attention.o(attended_RQX))
        return within_fp16(feed_forward(hidden_RQD))

    def _attend_to_itself(
        self, block: Any, hidden_RQD: torch.Tensor, cache: SelfCache | None, inputs: StackInputs
    ) -> torch.Tensor:
        """States after the self-attention of a layer; without a cache all tokens are there, and look at each other."""
        attention, normed_RQD = block.SelfAttention, block.layer_norm(hidden_RQD)
        width, bias = attention.key_value_proj_dim, self.self_bias(attention, inputs)
        new = KeysValues(heads(attention.k(normed_RQD), width), heads(attention.v(normed_RQD), width))
        seen = new if cache is None else cache.extend(new)
        attended_RQX = attend(heads(attention.q(normed_RQD), width), seen, bias, scale=1.0, fused=cache is None)
        return within_fp16(hidden_RQD + attention.o(attended_RQX))

    def self_bias(self, attention: Any, inputs: StackInputs) -> torch.Tensor:
        """Additive bias of a self-attention."""
        return inputs.self_bias

    def place_layer(self, layer: nn.Module, index: int, first: nn.Module) -> None:
        set_layer_index(layer, index)
        attention, kept = (cast(Any, each.get_submodule("layer.0.SelfAttention")) for each in (layer, first))
        attention.has_relative_attention_bias = index == 0
        if index == 0:
            attention.relative_attention_bias = kept.relative_attention_bias
        elif hasattr(attention, "relative_attention_bias"):
            del attention.relative_attention_bias

    def set_layers(self, model: nn.Module, encoder: nn.ModuleList, decoder: nn.ModuleList) -> None:
        entries = self.with_layers({}, {"encoder": range(len(encoder)), "decoder": range(len(decoder))})
        config: Any = copy.deepcopy(model.config)
        config.update(entries)
        cast(Any, model).config = config
        for stack, layers in (("encoder", encoder), ("decoder", decoder)):
            part: Any = model.get_submodule(stack)
            part.block = layers
            part.config = copy.deepcopy(part.config)
            part.config.update({**entries, "num_layers": len(layers)})

    def attentions(self, layer: nn.Module) -> dict[str, Projections]:
        blocks = cast(Any, layer).layer
        found = {"self": blocks[0].SelfAttention}
        if len(blocks) == 3:
            found["cross"] = blocks[1].EncDecAttention
        return {
            name: Projections(each.q, each.k, each.n_heads, each.key_value_proj_dim, 1.0)
            for name, each in found.items()
        }

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


class MT5Family(T5Family):
    """mT5: T5 v1.1 in everything but what a head means whose settings are silent, or that is the embedding."""

    ties_by_default: ClassVar[bool] = False
    scales_tied_head: ClassVar[bool | None] = False


def _fused(norm: Any) -> nn.RMSNorm:
    """The same norm over the same weight. In bf16 it is rounded once, at the end, where T5LayerNorm rounds twice."""
    fused = nn.RMSNorm(norm.weight.shape, norm.variance_epsilon, device="meta")
    fused.weight = norm.weight
    return fused


def within_fp16(hidden_RQD: torch.Tensor) -> torch.Tensor:
    """What T5Block does in float16 alone: infinities become large numbers."""
    if hidden_RQD.dtype != torch.float16:
        return hidden_RQD
    limit = torch.finfo(torch.float16).max
    limits = torch.where(torch.isinf(hidden_RQD).any(), limit - 1000, limit)
    return torch.clamp(hidden_RQD, min=-limits, max=limits)


def t5_config(vocab_size: int, sizes: dict[str, Any]) -> T5Config:
    """Configuration of a T5 v1.1, from sizes by the names of a recipe's teacher.architecture."""
    return T5Config(
        vocab_size=vocab_size,
        feed_forward_proj="gated-gelu_pytorch_tanh",  # gelu_new, as T5 v1.1 has it, in one fused call
        **{"decoder_start_token_id": 0, "dropout_rate": sizes.pop("dropout"), **sizes},
    )


def new_t5(vocab_size: int, sizes: dict[str, Any], seed: int) -> T5ForConditionalGeneration:
    """A T5 v1.1 with fresh weights and a structured start of its relative position bias.

    One head prefers near tokens, one the token before, one the token after (in the decoder: itself), the rest start at
    zero: position is otherwise only learnt through a table that starts near nothing, and training crawls.
    """
    torch.manual_seed(seed)
    model = T5ForConditionalGeneration(t5_config(vocab_size, sizes))
    for stack in (model.encoder, model.decoder):
        attention = cast(Any, stack).block[0].layer[0].SelfAttention
        _structure_position_bias(attention)
    model.generation_config = GenerationConfig.from_model_config(model.config)
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
