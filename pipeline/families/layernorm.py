"""What BART, mBART, Pegasus, M2M100 and Marian have in common, on the installed transformers' own layer classes: layer
norms before or behind each part of a layer, positions that enter with the embeddings, attention scores that are scaled.

Shapes: B examples, S source tokens, T target tokens, L tokens of a stack, D model width, H heads, K width of a head, N
tokens, V vocabulary; in cached decoding R rows and Q new tokens of each.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

import torch
from torch import nn

from pipeline.families.attention import attend, attend_across, heads
from pipeline.families.base import (
    KeysValues,
    SelfCache,
    SharedParts,
    StackInputs,
    set_layer_index,
    shifted,
    visible_at,
    visible_keys,
)
from pipeline.families.capture import Projections
from pipeline.families.head import VocabularyHead
from pipeline.families.keys import Keys


class LearnedPositions(nn.Module):
    """Positions of BART and mBART: a trained table, in which the first position has row 2."""

    def __init__(self, table: nn.Module) -> None:
        super().__init__()
        self.table: Any = table

    def forward(self, ids_RQ: torch.Tensor, positions_RQ: torch.Tensor | None) -> torch.Tensor:
        """What is added to tokens at these positions [R or 1, Q], None where they are 0, 1, ...; [R or 1, Q, D]."""
        if positions_RQ is None:
            return self.table(ids_RQ)
        # guesses may reach behind the last position; they are never kept
        positions_RQ = positions_RQ.clamp(max=self.table.num_embeddings - self.table.offset - 1)
        return self.table(ids_RQ, position_ids=positions_RQ)[0]  # the table adds a dimension in front


class LayerNormShared(SharedParts):
    """Embeddings, norms outside the layers and the head: frozen, and used by teacher and student alike.

    Positions enter here, not in the layers, so a layer can stand anywhere.

    Args:
        positions: makes what is added to tokens at positions (see LearnedPositions) of a stack's own table.
    """

    def __init__(self, model: nn.Module, positions: type[nn.Module]) -> None:
        super().__init__()
        inner: Any = model.get_submodule("model")
        stacks: dict[str, Any] = {"encoder": inner.encoder, "decoder": inner.decoder}
        self.tokens = nn.ModuleDict({name: stack.embed_tokens for name, stack in stacks.items()})
        self.positions = nn.ModuleDict({name: positions(stack.embed_positions) for name, stack in stacks.items()})
        self.norm = nn.ModuleDict(
            {name: getattr(stack, "layernorm_embedding", nn.Identity()) for name, stack in stacks.items()}
        )
        self.final_norm = nn.ModuleDict(
            {name: getattr(stack, "layer_norm", nn.Identity()) for name, stack in stacks.items()}
        )
        self.scale = getattr(inner.decoder, "embed_scale", 1.0)  # of stacks whose embeddings do not scale themselves
        self.head = VocabularyHead(cast(Any, model).lm_head, bias_1V=getattr(model, "final_logits_bias", None))
        self.config: Any = model.config

    def embed(self, stack: str, ids_BL: torch.Tensor) -> torch.Tensor:
        return self._embed(stack, ids_BL, None)

    def embed_at(self, ids_RQ: torch.Tensor, positions_RQ: torch.Tensor) -> torch.Tensor:
        return self._embed("decoder", ids_RQ, positions_RQ)

    def _embed(self, stack: str, ids_RQ: torch.Tensor, positions_RQ: torch.Tensor | None) -> torch.Tensor:
        tokens_RQD = self.tokens[stack](ids_RQ) * self.scale
        return self.norm[stack](tokens_RQD + self.positions[stack](ids_RQ, positions_RQ))

    def inputs_at(self, positions_RQ: torch.Tensor, num_keys: int, cross_bias: torch.Tensor) -> StackInputs:
        return StackInputs(self.masked(visible_at(positions_RQ, num_keys)), cross_bias)

    def decoder_inputs(self, labels_BT: torch.Tensor) -> torch.Tensor:
        return shifted(labels_BT, self.config.decoder_start_token_id, self.config.pad_token_id)

    def inputs(self, stack: str, mask_BL: torch.Tensor, source_mask_BS: torch.Tensor | None = None) -> StackInputs:
        visible = visible_keys(mask_BL, causal=stack == "decoder")
        return StackInputs(self.masked(visible), self.bias_of_source(source_mask_BS))

    def finish(self, stack: str, hidden_BLD: torch.Tensor) -> torch.Tensor:
        return self.final_norm[stack](hidden_BLD)


CARRIED = (
    "d_model", "encoder_layers", "decoder_layers", "encoder_ffn_dim", "decoder_ffn_dim", "encoder_attention_heads",
    "decoder_attention_heads", "encoder_layerdrop", "decoder_layerdrop", "activation_function", "dropout",
    "attention_dropout", "activation_dropout", "init_std", "scale_embedding", "max_position_embeddings",
    "num_attention_heads", "hidden_size",
)  # fmt: skip


def keys_of(*, norm_first: bool, embeddings_normed: bool, final_norm: bool, sinusoids: bool, **more: Any) -> Keys:
    """Keys of a family whose layers and stacks are made so; a config that says otherwise is another model's."""
    return Keys.of(
        CARRIED,
        normalize_before=(norm_first,),
        normalize_embedding=(embeddings_normed,),
        add_final_layer_norm=(final_norm,),
        static_position_embeddings=(sinusoids,),
        add_bias_logits=(False,),
        **more,
    )


class LayerNormFamily:
    """See pipeline.families.base.Family. A family of this kind says what differs by the first three."""

    keys: ClassVar[Keys]
    norm_first: ClassVar[bool]
    """Whether a layer's parts norm what they read, or the sum of what they read and write."""
    positions: ClassVar[type[nn.Module]] = LearnedPositions

    size_keys: ClassVar[tuple[str, ...]] = ("encoder_layers", "vocab_size", "d_model")
    start_key: ClassVar[str] = "decoder_start_token_id"
    has_attention_losses: ClassVar[bool] = True
    engines: ClassVar[tuple[str, ...]] = ("ctranslate2", "onnx")
    vocabulary_weights: ClassVar[tuple[str, ...]] = (
        "model.shared.weight",
        "lm_head.weight",
        "model.encoder.embed_tokens.weight",
        "model.decoder.embed_tokens.weight",
        "final_logits_bias",
    )
    position_weights: ClassVar[tuple[str, ...]] = (
        "model.encoder.embed_positions.weight",
        "model.decoder.embed_positions.weight",
    )
    computed_weights: ClassVar[tuple[str, ...]] = ()
    ties_by_default: ClassVar[bool] = True
    scales_tied_head: ClassVar[bool | None] = None
    takes_made_mask: ClassVar[bool] = True

    def layers(self, model: nn.Module, stack: str) -> nn.ModuleList:
        return cast(nn.ModuleList, model.get_submodule(f"model.{stack}.layers"))

    def layer_prefix(self, stack: str) -> str:
        return f"model.{stack}.layers."

    def is_shared_weight(self, name_in_layer: str) -> bool:
        return False

    def stored_name(self, name: str) -> str:
        return name

    def depths(self, settings: Mapping[str, Any]) -> tuple[int, int]:
        encoder = settings["encoder_layers"]
        return encoder, settings.get("decoder_layers", encoder)

    def with_layers(self, settings: Mapping[str, Any], layers: Mapping[str, Sequence[int]]) -> dict[str, Any]:
        """`num_hidden_layers` is an alias of the encoder's depth, which would win over it."""
        entries = {f"{stack}_layers": len(places) for stack, places in layers.items()}
        return {key: value for key, value in settings.items() if key != "num_hidden_layers"} | entries

    def max_positions(self, config: Any) -> int | None:
        return config.max_position_embeddings

    def correct(self, model: nn.Module, settings: Mapping[str, Any]) -> None:
        """All versions make the same of it."""

    def prepare_for_training(self, model: nn.Module) -> None:
        config: Any = model.config
        config.encoder_layerdrop = config.decoder_layerdrop = 0.0
        for stack in ("encoder", "decoder"):
            cast(Any, model.get_submodule(f"model.{stack}")).layerdrop = 0.0

    def take_shared(self, model: nn.Module) -> LayerNormShared:
        return LayerNormShared(model, self.positions)

    def call_layer(
        self,
        layer: nn.Module,
        hidden_BLD: torch.Tensor,
        encoded_BSD: torch.Tensor | None,
        inputs: StackInputs,
    ) -> torch.Tensor:
        if encoded_BSD is None:
            return layer(hidden_BLD, inputs.self_bias)
        return layer(hidden_BLD, inputs.self_bias, encoded_BSD, encoder_attention_mask=inputs.cross_bias)

    def cross_keys_values(self, layer: nn.Module, encoded_BSD: torch.Tensor) -> KeysValues:
        attention: Any = cast(Any, layer).encoder_attn
        width = attention.head_dim
        each = (attention.k_proj, attention.v_proj)
        keys_BHSK, values_BHSK = (heads(project(encoded_BSD), width).contiguous() for project in each)
        return KeysValues(keys_BHSK, values_BHSK)

    def call_cached(
        self, layer: nn.Module, hidden_RQD: torch.Tensor, cache: SelfCache, cross: KeysValues, inputs: StackInputs
    ) -> torch.Tensor:
        block = cast(Any, layer)

        attention = block.self_attn
        width, scale = attention.head_dim, attention.scaling
        read_RQD = self._before(block.self_attn_layer_norm, hidden_RQD)
        keys_RHQK, values_RHQK = (heads(each(read_RQD), width) for each in (attention.k_proj, attention.v_proj))
        seen = cache.extend(KeysValues(keys_RHQK, values_RHQK))
        attended_RQX = attend(heads(attention.q_proj(read_RQD), width), seen, inputs.self_bias, scale)
        hidden_RQD = self._behind(block.self_attn_layer_norm, hidden_RQD + attention.out_proj(attended_RQX))

        attention = block.encoder_attn
        queries_RHQK = heads(attention.q_proj(self._before(block.encoder_attn_layer_norm, hidden_RQD)), width)
        attended_RQX = attend_across(queries_RHQK, cross, inputs.bias("cross"), scale)
        hidden_RQD = self._behind(block.encoder_attn_layer_norm, hidden_RQD + attention.out_proj(attended_RQX))

        read_RQD = self._before(block.final_layer_norm, hidden_RQD)
        forwarded_RQD = block.fc2(block.activation_fn(block.fc1(read_RQD)))
        return self._behind(block.final_layer_norm, hidden_RQD + forwarded_RQD)

    def _before(self, norm: nn.Module, hidden_RQD: torch.Tensor) -> torch.Tensor:
        return norm(hidden_RQD) if self.norm_first else hidden_RQD

    def _behind(self, norm: nn.Module, hidden_RQD: torch.Tensor) -> torch.Tensor:
        return hidden_RQD if self.norm_first else norm(hidden_RQD)

    def place_layer(self, layer: nn.Module, index: int, first: nn.Module) -> None:
        set_layer_index(layer, index)

    def set_layers(self, model: nn.Module, encoder: nn.ModuleList, decoder: nn.ModuleList) -> None:
        config: Any = copy.deepcopy(model.config)
        config.update({"encoder_layers": len(encoder), "decoder_layers": len(decoder)})
        inner: Any = model.get_submodule("model")
        inner.encoder.layers, inner.decoder.layers = encoder, decoder
        for part in (model, inner, inner.encoder, inner.decoder):
            part.config = config

    def attentions(self, layer: nn.Module) -> dict[str, Projections]:
        found = {"self": cast(Any, layer).self_attn}
        if hasattr(layer, "encoder_attn"):
            found["cross"] = layer.encoder_attn
        return {
            name: Projections(each.q_proj, each.k_proj, each.num_heads, each.head_dim, each.scaling)
            for name, each in found.items()
        }

    def lr_factor(self, name: str, config: Any) -> float:
        """1 for all: scores are scaled and all weights start alike, so AdamW needs no help."""
        return 1.0
