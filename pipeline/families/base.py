"""What the pipeline needs to know of a model family.

Shapes: B examples, S source tokens, T target tokens, L tokens of a stack (S or T), D model width, H heads, K width of a
head, N tokens; in cached decoding R rows (examples, or examples x beams) and Q new tokens of each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol, Self, cast

import torch
from torch import nn

from pipeline.data import IGNORED_LABEL
from pipeline.families.capture import Projections
from pipeline.families.head import VocabularyHead
from pipeline.families.keys import Keys
from pipeline.spans import STACKS, ModelSizes

ROW_ALIGNMENT = 16
"""Elements."""


@dataclass(frozen=True)
class Distances:
    """Distances key - query among the tokens of a stack, for layers that have a position bias each."""

    buckets_R: torch.Tensor
    """Bucket of each distance, in rising order; long [2L - 1], in cached decoding [T]."""
    places_QL: torch.Tensor
    """Which of them each query and key have; long [1, L, L], in cached decoding [R or 1, Q, T]."""


@dataclass(frozen=True)
class StackInputs:
    """What every layer of one stack receives besides its states: additive attention biases."""

    self_bias: torch.Tensor
    """Position bias of the stack, where it has one, and mask of self-attention, [B or 1, H or 1, L or 1, L]; masked
    entries hold the dtype's minimum. In cached decoding [R or 1, H or 1, Q, T]."""
    cross_bias: torch.Tensor | None = None
    """Mask of cross-attention, [B, 1, 1, S]; None in the encoder."""
    distance_bias_HR: torch.Tensor | None = None
    """Position bias in self_bias by distance: a key at s has [:, s - q + L - 1] of [H, 2L - 1] for a query at q. None
    where it has none, and in cached decoding; for the attention loss alone."""
    distances: Distances | None = None
    """None where layers have no position bias of their own."""

    def bias(self, kind: str) -> torch.Tensor:
        """The bias of "self" or "cross"."""
        bias = self.self_bias if kind == "self" else self.cross_bias
        assert bias is not None
        return bias

    def repeated(self, count: int) -> Self:
        """Those for `count` times the batch."""
        cross_bias = None if self.cross_bias is None else repeated(self.cross_bias, count)
        return replace(self, self_bias=repeated(self.self_bias, count), cross_bias=cross_bias)


def repeated(bias: torch.Tensor, count: int) -> torch.Tensor:
    """A bias for `count` times the batch; one that is the same for every example stays as it is."""
    if len(bias) == 1:
        return bias
    copies = empty_bias((count * len(bias), *bias.shape[1:]), bias.dtype, bias.device)
    copies.unflatten(0, (count, len(bias))).copy_(bias)
    return copies


def empty_bias(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Memory for an additive bias [..., L], each row at a multiple of 16 elements: others a GPU's attention copies in
    every call, and backward keeps the copies."""
    *rows, num_keys = shape
    width = -(-num_keys // ROW_ALIGNMENT) * ROW_ALIGNMENT
    return torch.empty(*rows, width, dtype=dtype, device=device)[..., :num_keys]


def visible_keys(mask_BL: torch.Tensor, *, causal: bool) -> torch.Tensor:
    """Which keys each query looks at: real ones and, if causal, none behind it; bool [B, 1, L or 1, L]."""
    visible = mask_BL[:, None, None, :]
    if not causal:
        return visible
    positions_1L = torch.arange(mask_BL.shape[1], device=mask_BL.device)[None]
    return visible & visible_at(positions_1L, mask_BL.shape[1])


def visible_at(positions_RQ: torch.Tensor, num_keys: int) -> torch.Tensor:
    """Which of the first keys are not behind tokens at these positions, bool [R or 1, 1, Q, T]."""
    return torch.arange(num_keys, device=positions_RQ.device) <= positions_RQ[:, None, :, None]


@dataclass(frozen=True)
class KeysValues:
    """What attention looks at."""

    keys: torch.Tensor
    """[B, H, L, K]."""
    values: torch.Tensor
    """[B, H, L, K]."""

    def select(self, examples: torch.Tensor) -> KeysValues:
        """Those of some examples, in this order."""
        return KeysValues(self.keys[examples], self.values[examples])


class SelfCache(Protocol):
    """Keys and values of self-attention in one decoder layer, of the tokens decoded so far."""

    def extend(self, new: KeysValues) -> KeysValues:
        """Take in those of the new tokens, [R, H, Q, K]; returns all that the new tokens may look at, [R, H, T, K]."""


class Shared(Protocol):
    """The teacher's parts around its layers: frozen, and used by teacher and student alike (an nn.Module)."""

    def embed(self, stack: str, ids_BL: torch.Tensor) -> torch.Tensor:
        """Hidden states before the first layer, [B, L, D]; the ids stand at positions 0, 1, ..."""

    def decoder_inputs(self, labels_BT: torch.Tensor) -> torch.Tensor:
        """Decoder input ids of labels, [B, T]."""

    def inputs(self, stack: str, mask_BL: torch.Tensor, source_mask_BS: torch.Tensor | None = None) -> StackInputs:
        """What the layers of a stack receive, for a mask of its real tokens and, in the decoder, that of the source."""

    def cross_bias(self, mask_BS: torch.Tensor) -> torch.Tensor:
        """Additive cross-attention bias [B, 1, 1, S]."""

    def embed_at(self, ids_RQ: torch.Tensor, positions_RQ: torch.Tensor) -> torch.Tensor:
        """States before the first decoder layer of tokens at these positions, [R, Q, D]; positions [R or 1, Q]."""

    def inputs_at(self, positions_RQ: torch.Tensor, num_keys: int, cross_bias: torch.Tensor) -> StackInputs:
        """What the decoder's layers receive for tokens at these positions [R or 1, Q], which look at those of the first
        `num_keys` positions that are not behind them."""

    def finish(self, stack: str, hidden_BLD: torch.Tensor) -> torch.Tensor:
        """What follows the last layer of a stack."""

    head: VocabularyHead

    def logits(self, normed_ND: torch.Tensor) -> torch.Tensor:
        """Logits [N, V] of finished decoder states [N, D]."""


class SharedParts(nn.Module):
    """What Shared is in every family alike: masks, and the head."""

    head: VocabularyHead

    def masked(self, visible: torch.Tensor) -> torch.Tensor:
        """The additive bias of a mask [..., L]: 0 where it is true, the dtype's minimum elsewhere."""
        dtype = next(self.head.parameters()).dtype  # a weight that is asked for by name stage 3 gathers, and keeps
        bias = empty_bias(visible.shape, dtype, visible.device).zero_()
        return bias.masked_fill_(~visible, torch.finfo(dtype).min)

    def cross_bias(self, mask_BS: torch.Tensor) -> torch.Tensor:
        return self.masked(mask_BS[:, None, None, :])

    def bias_of_source(self, mask_BS: torch.Tensor | None) -> torch.Tensor | None:
        """That of cross-attention, in the encoder none."""
        return None if mask_BS is None else self.cross_bias(mask_BS)

    def logits(self, normed_ND: torch.Tensor) -> torch.Tensor:
        return self.head(normed_ND)


class Family(Protocol):
    """Knowledge of one model family; holds no state."""

    keys: ClassVar[Keys]
    """Which keys of a config.json are carried."""
    size_keys: ClassVar[tuple[str, ...]]
    """Keys that a config.json must have: transformers takes sizes of another model where they lack."""
    start_key: ClassVar[str]
    """Config key of the token that outputs begin with."""
    has_attention_losses: ClassVar[bool]
    """Whether its layers can be taught attention maps (see `attentions`)."""
    engines: ClassVar[tuple[str, ...]]
    """Inference engines that are tested to compute what transformers does."""
    vocabulary_weights: ClassVar[tuple[str, ...]]
    """Names of the weights with one entry for each token of the vocabulary; the embedding first."""
    position_weights: ClassVar[tuple[str, ...]]
    """Names of the weights with one row for each position."""
    computed_weights: ClassVar[tuple[str, ...]]
    """Names of the weights that transformers computes where a file does not have them."""
    ties_by_default: ClassVar[bool]
    """Whether the head is the embedding where config.json does not say."""
    scales_tied_head: ClassVar[bool | None]
    """Whether transformers 5 scales what goes into a head that is the embedding, as transformers 4 does; None where
    neither scales."""
    takes_made_mask: ClassVar[bool]
    """Whether the whole model takes a mask [B, 1, 1, S] of the source as it is."""

    def layers(self, model: nn.Module, stack: str) -> nn.ModuleList:
        """The layers of one stack."""

    def layer_prefix(self, stack: str) -> str:
        """Text before the layer index in names of weights in files, such as `encoder.block.`."""

    def stored_name(self, name: str) -> str:
        """The name in files of a weight, by its name in the model or in files of an older version."""

    def is_shared_weight(self, name_in_layer: str) -> bool:
        """True for a weight that is stored in layer 0 but belongs to the stack, such as T5's relative position bias."""

    def depths(self, settings: Mapping[str, Any]) -> tuple[int, int]:
        """How many layers (encoder, decoder) have, from a config.json."""

    def with_layers(self, settings: Mapping[str, Any], layers: Mapping[str, Sequence[int]]) -> dict[str, Any]:
        """The config.json of a model whose layers are of the kind of some of this one's.

        Args:
            layers: the places of those, by stack.
        """

    def max_positions(self, config: Any) -> int | None:
        """Tokens of the longest text that a model with this Hugging Face config takes; None where any length goes."""

    def correct(self, model: nn.Module, settings: Mapping[str, Any]) -> None:
        """Have a model that the installed transformers has read from a config.json compute what other versions make of
        it."""

    def prepare_for_training(self, model: nn.Module) -> None:
        """Make training use every layer in every step: random depth is the draws' business, and ranks must agree. What
        the model computes in several operations where torch has one is computed in one."""

    def take_shared(self, model: nn.Module) -> Shared:
        """What is neither a teacher layer nor a modular layer, as one module; takes it out of the layers."""

    def call_layer(
        self,
        layer: nn.Module,
        hidden_BLD: torch.Tensor,
        encoded_BSD: torch.Tensor | None,
        inputs: StackInputs,
    ) -> torch.Tensor:
        """Hidden states after one layer, [B, L, D]; a decoder layer attends to the encoder's output `encoded_BSD`."""

    def cross_keys_values(self, layer: nn.Module, encoded_BSD: torch.Tensor) -> KeysValues:
        """What a decoder layer's cross-attention makes of the encoder's output: the same for every token decoded."""

    def call_cached(
        self, layer: nn.Module, hidden_RQD: torch.Tensor, cache: SelfCache, cross: KeysValues, inputs: StackInputs
    ) -> torch.Tensor:
        """Hidden states of new tokens after one decoder layer, [R, Q, D].

        Args:
            cross: of B encoder outputs; the rows of one output follow each other, R / B of them.
            inputs: as from Shared.inputs_at, cross_bias [B, 1, 1, S].
        """

    def place_layer(self, layer: nn.Module, index: int, first: nn.Module) -> None:
        """Make a layer fit for place `index` of an assembled Hugging Face stack, where `first` is the teacher's first
        layer: it takes the index by which caches keep keys and values, and at place 0 what the stack keeps there."""

    def set_layers(self, model: nn.Module, encoder: nn.ModuleList, decoder: nn.ModuleList) -> None:
        """Put these layers in place of a model's own, with configs of the model's own that say so."""

    def attentions(self, layer: nn.Module) -> dict[str, Projections]:
        """Where a layer's attentions get their queries and keys from: "self", and "cross" in the decoder. Nothing where
        the family has no attention losses."""

    def lr_factor(self, name: str, config: Any) -> float:
        """Learning-rate factor of a parameter, by its name and the model's Hugging Face config."""


def shifted(labels_BT: torch.Tensor, start_id: int, pad_id: int | None) -> torch.Tensor:
    """Decoder input ids of labels, [B, T]: the labels moved one to the right behind the start token, as in decoding;
    padding labels become the pad token."""
    shifted_BT = torch.roll(labels_BT, 1, dims=1)
    shifted_BT = shifted_BT.masked_fill(shifted_BT == IGNORED_LABEL, pad_id or 0)
    shifted_BT[:, 0] = start_id
    return shifted_BT


def stored_weights(model: Any, family: Family) -> dict[str, torch.Tensor]:
    """The weights that a checkpoint of a Hugging Face model holds, each once, by their names there."""
    kept = model.state_dict().keys() - set(model._keys_to_ignore_on_save or ())
    named = (*model.named_parameters(), *model.named_buffers())
    return {family.stored_name(name): weight for name, weight in named if name in kept}


def set_layer_index(layer: nn.Module, index: int) -> None:
    """Give a layer its place in an assembled stack: caches keep keys and values by this index."""
    for module in layer.modules():
        if hasattr(module, "layer_idx"):
            cast(Any, module).layer_idx = index


def sizes_of(weights: Mapping[str, torch.Tensor], family: Family) -> ModelSizes:
    """Sizes of a model's parts, from its weights by name, each once."""
    layers: dict[str, dict[str, int]] = {stack: {} for stack in STACKS}
    embeddings = rest = 0
    for name, weight in weights.items():
        stack = next((stack for stack in STACKS if name.startswith(family.layer_prefix(stack))), None)
        index, _, in_layer = name.removeprefix(family.layer_prefix(stack) if stack else "").partition(".")
        if stack and not family.is_shared_weight(in_layer):
            layers[stack][index] = layers[stack].get(index, 0) + weight.numel()
        elif name in family.vocabulary_weights + family.position_weights:
            embeddings += weight.numel()
        else:
            rest += weight.numel()
    return ModelSizes(
        num_layers=(len(layers["encoder"]), len(layers["decoder"])),
        encoder_layer=layers["encoder"]["0"],
        decoder_layer=layers["decoder"]["0"],
        embeddings=embeddings,
        rest=rest,
        bytes_per_parameter=max(weight.element_size() for weight in weights.values()),
    )
