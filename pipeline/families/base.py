"""What the pipeline needs to know of a model family.

Shapes: B examples, S source tokens, T target tokens, L tokens of a stack (S or T), D model width, H heads, N tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import nn


@dataclass(frozen=True)
class StackInputs:
    """Additive attention biases that every layer of one stack receives besides its states."""

    self_bias: torch.Tensor
    """Position bias and mask of self-attention, [B or 1, H, L, L]; masked entries hold the dtype's minimum."""
    cross_bias: torch.Tensor | None = None
    """Mask of cross-attention, [B, 1, 1, S]; None in the encoder."""


class Shared(Protocol):
    """The teacher's parts around its layers: frozen, and used by teacher and student alike (an nn.Module)."""

    def embed(self, stack: str, ids_BL: torch.Tensor) -> torch.Tensor:
        """Hidden states before the first layer, [B, L, D]."""

    def decoder_inputs(self, labels_BT: torch.Tensor) -> torch.Tensor:
        """Decoder input ids of labels, [B, T]."""

    def self_bias(self, stack: str, mask_BL: torch.Tensor) -> torch.Tensor:
        """Additive self-attention bias [B or 1, H, L, L] for a mask of real tokens."""

    def cross_bias(self, mask_BS: torch.Tensor) -> torch.Tensor:
        """Additive cross-attention bias [B, 1, 1, S]."""

    def finish(self, stack: str, hidden_BLD: torch.Tensor) -> torch.Tensor:
        """What follows the last layer of a stack."""

    def logits(self, normed_ND: torch.Tensor) -> torch.Tensor:
        """Logits [N, V] of finished decoder states [N, D]."""


class Family(Protocol):
    """Knowledge of one model family; holds no state."""

    depth_keys: ClassVar[dict[str, str]]
    """Config key that holds the number of layers, by stack."""
    vocabulary_weights: ClassVar[tuple[str, ...]]
    """Names of the weights with one row for each token of the vocabulary."""

    def layers(self, model: nn.Module, stack: str) -> nn.ModuleList:
        """The layers of one stack."""

    def layer_prefix(self, stack: str) -> str:
        """Text before the layer index in names of weights, such as `encoder.block.`."""

    def is_shared_weight(self, name_in_layer: str) -> bool:
        """True for a weight that is stored in layer 0 but belongs to the stack, such as T5's relative position bias."""

    def take_shared(self, model: nn.Module) -> Shared:
        """What is neither a teacher layer nor a modular layer, as one module; takes it out of the layers."""

    def call_layer(
        self, layer: nn.Module, hidden_BLD: torch.Tensor, encoded_BSD: torch.Tensor | None, inputs: StackInputs
    ) -> torch.Tensor:
        """Hidden states after one layer, [B, L, D]; a decoder layer attends to the encoder's output `encoded_BSD`."""

    def lr_factor(self, name: str, config: Any) -> float:
        """Learning-rate factor of a parameter, by its name and the model's Hugging Face config."""
