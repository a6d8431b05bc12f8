"""T5Gemma 2, text only, on the installed transformers' own layer classes: rotary positions, attention in a sliding
window in some layers and over everything in the others, and decoder layers that look at their own text and at the
source in one softmax, with the same projections of keys and values.

The kind of a layer is the attention type that config.json lists at its place. A modular layer has that of the last
layer of its span. The vision tower is in no layer of text: it goes from the teacher's file into every other as it is.

Shapes: B examples, S source tokens, T target tokens, L tokens of a stack, D model width, H heads, K width of a head, N
tokens, V vocabulary; in cached decoding R rows and Q new tokens of each.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar, NamedTuple, Self, cast

import torch
import torch.nn.functional as F
from torch import nn
from transformers import T5Gemma2Config, T5Gemma2ForConditionalGeneration
from transformers.models.t5gemma2.modeling_t5gemma2 import apply_rotary_pos_emb, sliding_window_mask_function

from pipeline.families.attention import attend_to_both, heads
from pipeline.families.base import (
    KeysValues,
    SelfCache,
    SharedParts,
    StackInputs,
    empty_bias,
    repeated,
    set_layer_index,
    shifted,
)
from pipeline.families.capture import Projections
from pipeline.families.head import VocabularyHead
from pipeline.families.keys import Keys

FULL, SLIDING = "full_attention", "sliding_attention"
ROTARY = Keys.of(("rope_theta", "factor"), rope_type=("default", "linear"))
OF_STACK = Keys.of(
    (
        "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
        "head_dim", "hidden_activation", "max_position_embeddings", "rms_norm_eps", "attention_bias",
        "query_pre_attn_scalar", "sliding_window", "layer_types", "dropout_rate", "attention_dropout",
    ),
    harmless=("initializer_range", "_sliding_window_pattern"),
    parts={"rope_parameters": Keys.of(parts={FULL: ROTARY, SLIDING: ROTARY})},
    attn_logit_softcapping=(),
    final_logit_softcapping=(),
    use_bidirectional_attention=(False,),
    is_encoder_decoder=(False,),
    is_decoder=(True, False),
    tie_word_embeddings=(True,),
)  # fmt: skip


class Rotation(NamedTuple):
    """By what queries and keys are turned, [R or 1, Q, K]."""

    cos: torch.Tensor
    sin: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class T5Gemma2Inputs(StackInputs):
    """The bias of full attention, and what else layers receive by their attention type."""

    sliding_bias: torch.Tensor
    """As self_bias, with what is outside the window masked, too."""
    rotations: Mapping[str, Rotation]

    @property
    def self_biases(self) -> dict[str, torch.Tensor]:
        """Masks of self-attention."""
        return {FULL: self.self_bias, SLIDING: self.sliding_bias}

    @cached_property
    def merged_biases(self) -> dict[str, torch.Tensor]:
        """Masks of a decoder's attention over its own text and the source, [B, 1, T, T + S]."""
        return {kind: self._merged(bias) for kind, bias in self.self_biases.items()}

    def _merged(self, self_bias: torch.Tensor) -> torch.Tensor:
        cross_bias = self.bias("cross")
        num_queries, num_keys = self_bias.shape[-2:]
        shape = (len(cross_bias), 1, num_queries, num_keys + cross_bias.shape[-1])
        merged = empty_bias(shape, self_bias.dtype, self_bias.device)
        merged[..., :num_keys] = self_bias
        merged[..., num_keys:] = cross_bias
        return merged

    def repeated(self, count: int) -> Self:
        return replace(super().repeated(count), sliding_bias=repeated(self.sliding_bias, count))


class RotaryPositions(nn.Module):
    """T5Gemma2RotaryEmbedding without buffers, which an engine would round to bf16: far positions would be others."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.width, self.settings = config.head_dim, config.rope_parameters

    def at(self, positions_RQ: torch.Tensor, kind: str, dtype: torch.dtype) -> Rotation:
        """For layers of an attention type."""
        told = self.settings[kind]
        exponents = torch.arange(0, self.width, 2, dtype=torch.float32, device=positions_RQ.device) / self.width
        factor = told["factor"] if told["rope_type"] == "linear" else 1.0
        frequencies = 1.0 / told["rope_theta"] ** exponents / factor
        angles = positions_RQ[:, :, None].float() * frequencies
        angles = torch.cat((angles, angles), dim=-1)
        return Rotation(angles.cos().to(dtype), angles.sin().to(dtype))

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor, layer_type: str) -> Rotation:
        """As transformers calls it."""
        return self.at(position_ids, layer_type, x.dtype)


class TokenEmbedding(nn.Module):
    """T5Gemma2TextScaledWordEmbedding, whose weights these are, without an index that makes the host wait for a GPU."""

    def __init__(self, embedding: Any) -> None:
        super().__init__()
        self.weight, self.eoi_embedding = embedding.weight, embedding.eoi_embedding
        self.eoi_token_index, self.scalar_embed_scale = embedding.eoi_token_index, embedding.scalar_embed_scale

    def forward(self, ids_BL: torch.Tensor) -> torch.Tensor:
        scale = torch.tensor(self.scalar_embed_scale, dtype=self.weight.dtype)  # rounded as the weights are
        embedded_BLD = F.embedding(ids_BL, self.weight) * scale
        return torch.where((ids_BL == self.eoi_token_index)[..., None], self.eoi_embedding, embedded_BLD)


class T5Gemma2Shared(SharedParts):
    """Embedding, rotary positions, masks, final norms and head: frozen, and used by teacher and student alike."""

    def __init__(self, model: T5Gemma2ForConditionalGeneration) -> None:
        super().__init__()
        stacks: dict[str, Any] = {"encoder": model.model.encoder.text_model, "decoder": model.model.decoder}
        self.embedding = TokenEmbedding(stacks["encoder"].embed_tokens)
        self.configs: dict[str, Any] = {name: stack.config for name, stack in stacks.items()}
        self.norm = nn.ModuleDict({name: stack.norm for name, stack in stacks.items()})
        self.head = VocabularyHead(model.lm_head.out_proj)
        self.config: Any = model.config

    def embed(self, stack: str, ids_BL: torch.Tensor) -> torch.Tensor:
        return self.embedding(ids_BL)

    def embed_at(self, ids_RQ: torch.Tensor, positions_RQ: torch.Tensor) -> torch.Tensor:
        return self.embedding(ids_RQ)

    def decoder_inputs(self, labels_BT: torch.Tensor) -> torch.Tensor:
        return shifted(labels_BT, self.config.bos_token_id, self.config.pad_token_id)

    def inputs(self, stack: str, mask_BL: torch.Tensor, source_mask_BS: torch.Tensor | None = None) -> T5Gemma2Inputs:
        positions_1L = torch.arange(mask_BL.shape[1], device=mask_BL.device)[None]
        return self._inputs(stack, positions_1L, mask_BL[:, None, :], self.bias_of_source(source_mask_BS))

    def inputs_at(self, positions_RQ: torch.Tensor, num_keys: int, cross_bias: torch.Tensor) -> T5Gemma2Inputs:
        all_11T = torch.ones(1, 1, num_keys, dtype=torch.bool, device=positions_RQ.device)
        return self._inputs("decoder", positions_RQ, all_11T, cross_bias)

    def _inputs(
        self, stack: str, positions_RQ: torch.Tensor, visible_RQT: torch.Tensor, cross_bias: torch.Tensor | None
    ) -> T5Gemma2Inputs:
        """For tokens at positions [R or 1, Q], which look at some of the first positions [R or 1, Q or 1, T]."""
        config, is_causal = self.configs[stack], stack == "decoder"
        queries_RQ1 = positions_RQ[:, :, None]
        keys_T = torch.arange(visible_RQT.shape[-1], device=positions_RQ.device)
        if is_causal:
            visible_RQT = visible_RQT & (keys_T <= queries_RQ1)
        near: Any = sliding_window_mask_function(config.sliding_window, is_causal=is_causal)
        near_RQT = near(0, 0, queries_RQ1, keys_T)
        dtype, rotary = next(self.head.parameters()).dtype, RotaryPositions(config)
        return T5Gemma2Inputs(
            self_bias=self.masked(visible_RQT[:, None]),
            sliding_bias=self.masked((visible_RQT & near_RQT)[:, None]),
            cross_bias=cross_bias,
            rotations={kind: rotary.at(positions_RQ, kind, dtype) for kind in {*config.layer_types}},
        )

    def finish(self, stack: str, hidden_BLD: torch.Tensor) -> torch.Tensor:
        return self.norm[stack](hidden_BLD)


class T5Gemma2Family:
    """See pipeline.families.base.Family."""

    keys: ClassVar[Keys] = Keys.of(
        ("dropout_rate", "attention_dropout", "eoi_token_index"),
        harmless=("classifier_dropout_rate", "initializer_range", "image_token_index"),
        equal={"decoder_start_token_id": "bos_token_id"},
        parts={
            "encoder": Keys.of(
                ("dropout_rate", "eoi_token_index", "vision_config"),
                harmless=(
                    "attention_dropout", "initializer_range", "image_token_index", "boi_token_index",
                    "mm_tokens_per_image",
                ),
                parts={"text_config": OF_STACK},
                is_encoder_decoder=(False,),
            ),
            "decoder": OF_STACK,
        },
        tie_word_embeddings=(True,),
    )  # fmt: skip
    size_keys: ClassVar[tuple[str, ...]] = ("encoder", "decoder", "vocab_size")
    start_key: ClassVar[str] = "bos_token_id"
    has_attention_losses: ClassVar[bool] = False  # keys are few, normed and turned, and cross-attention is none apart
    engines: ClassVar[tuple[str, ...]] = ()  # CTranslate2 4.8.5 converts it, to log-probabilities that are 0.2 apart
    vocabulary_weights: ClassVar[tuple[str, ...]] = (
        "model.encoder.embed_tokens.weight",
        "model.decoder.embed_tokens.weight",
        "lm_head.out_proj.weight",
    )
    position_weights: ClassVar[tuple[str, ...]] = ()
    computed_weights: ClassVar[tuple[str, ...]] = ()
    ties_by_default: ClassVar[bool] = True
    scales_tied_head: ClassVar[bool | None] = None
    takes_made_mask: ClassVar[bool] = False  # of two texts, which its decoder makes one of

    def layers(self, model: nn.Module, stack: str) -> nn.ModuleList:
        return self._stack(model, stack).layers

    def _stack(self, model: nn.Module, stack: str) -> Any:
        return model.get_submodule("model.encoder.text_model" if stack == "encoder" else "model.decoder")

    def layer_prefix(self, stack: str) -> str:
        return f"model.{stack}.layers."

    def stored_name(self, name: str) -> str:
        """In files the encoder's text model has no level of its own, and in later ones the vision model neither."""
        name = name.replace("model.encoder.text_model.", "model.encoder.")
        return name.replace(".vision_tower.vision_model.", ".vision_tower.")

    def is_shared_weight(self, name_in_layer: str) -> bool:
        return False

    def depths(self, settings: Mapping[str, Any]) -> tuple[int, int]:
        return settings["encoder"]["text_config"]["num_hidden_layers"], settings["decoder"]["num_hidden_layers"]

    def with_layers(self, settings: Mapping[str, Any], layers: Mapping[str, Sequence[int]]) -> dict[str, Any]:
        """The types are written out: transformers would give them to the layers that are left by their index."""
        config: Any = T5Gemma2Config.from_dict(dict(settings))
        of_stack = {"encoder": config.encoder.text_config, "decoder": config.decoder}
        kinds = {stack: [of_stack[stack].layer_types[place] for place in places] for stack, places in layers.items()}
        changed: dict[str, Any] = copy.deepcopy(dict(settings))
        changed["encoder"]["text_config"] |= _of_layers(kinds["encoder"])
        changed["decoder"] |= _of_layers(kinds["decoder"])
        return changed

    def max_positions(self, config: Any) -> int | None:
        return min(each.max_position_embeddings for each in (config.encoder.text_config, config.decoder))

    def correct(self, model: nn.Module, settings: Mapping[str, Any]) -> None:
        """All versions make the same of it."""

    def prepare_for_training(self, model: nn.Module) -> None:
        """The vision tower has no part in texts, and would only decay."""
        for stack in ("encoder", "decoder"):
            part = self._stack(model, stack)
            part.rotary_emb, part.embed_tokens = RotaryPositions(part.config), TokenEmbedding(part.embed_tokens)
        for name in ("vision_tower", "multi_modal_projector"):
            model.get_submodule(f"model.encoder.{name}").requires_grad_(False)

    def take_shared(self, model: nn.Module) -> T5Gemma2Shared:
        return T5Gemma2Shared(cast(T5Gemma2ForConditionalGeneration, model))

    def call_layer(
        self,
        layer: nn.Module,
        hidden_BLD: torch.Tensor,
        encoded_BSD: torch.Tensor | None,
        inputs: StackInputs,
    ) -> torch.Tensor:
        own, kind = cast(T5Gemma2Inputs, inputs), cast(str, layer.attention_type)
        if encoded_BSD is None:
            return layer(hidden_BLD, own.rotations[kind], own.self_biases[kind])
        return layer(hidden_BLD, own.rotations[kind], own.merged_biases[kind], encoder_hidden_states=encoded_BSD)

    def cross_keys_values(self, layer: nn.Module, encoded_BSD: torch.Tensor) -> KeysValues:
        attention: Any = layer.self_attn
        keys_BSX, values_BSX = attention.k_proj(encoded_BSD), attention.v_proj(encoded_BSD)
        keys_BHSK, values_BHSK = (heads(each, attention.head_dim).contiguous() for each in (keys_BSX, values_BSX))
        return KeysValues(attention.k_norm(keys_BHSK), values_BHSK)

    def call_cached(
        self, layer: nn.Module, hidden_RQD: torch.Tensor, cache: SelfCache, cross: KeysValues, inputs: StackInputs
    ) -> torch.Tensor:
        block, own = cast(Any, layer), cast(T5Gemma2Inputs, inputs)
        attention, kind = block.self_attn, block.attention_type
        read_RQD = block.pre_self_attn_layernorm(hidden_RQD)
        projected = (each(read_RQD) for each in (attention.q_proj, attention.k_proj, attention.v_proj))
        queries_RHQK, keys_RHQK, values_RHQK = (heads(each, attention.head_dim) for each in projected)
        queries_RHQK, keys_RHQK = apply_rotary_pos_emb(
            attention.q_norm(queries_RHQK), attention.k_norm(keys_RHQK), *own.rotations[kind]
        )
        seen = cache.extend(KeysValues(keys_RHQK, values_RHQK))
        attended_RQX = attend_to_both(
            queries_RHQK, seen, cross, own.self_biases[kind], own.bias("cross"), attention.scaling
        )
        hidden_RQD = hidden_RQD + block.post_self_attn_layernorm(attention.o_proj(attended_RQX))
        forwarded_RQD = block.mlp(block.pre_feedforward_layernorm(hidden_RQD))
        return hidden_RQD + block.post_feedforward_layernorm(forwarded_RQD)

    def place_layer(self, layer: nn.Module, index: int, first: nn.Module) -> None:
        set_layer_index(layer, index)

    def set_layers(self, model: nn.Module, encoder: nn.ModuleList, decoder: nn.ModuleList) -> None:
        whole: Any = model
        config = copy.deepcopy(whole.config)
        whole.config = whole.model.config = config
        whole.model.encoder.config = config.encoder
        for stack, layers, own in (
            ("encoder", encoder, config.encoder.text_config),
            ("decoder", decoder, config.decoder),
        ):
            own.update(_of_layers([cast(Any, layer).attention_type for layer in layers]))
            part = self._stack(model, stack)
            part.layers, part.config = layers, own

    def attentions(self, layer: nn.Module) -> dict[str, Projections]:
        return {}

    def lr_factor(self, name: str, config: Any) -> float:
        """1 for all: scores are scaled and all weights start alike, so AdamW needs no help."""
        return 1.0


def _of_layers(kinds: Sequence[str]) -> dict[str, Any]:
    """What the config of a stack says of its layers, by their attention types."""
    return {"num_hidden_layers": len(kinds), "layer_types": [*kinds]}
