"""What a training is made of: every leaf with its parameters, and what lies outside of leaves."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from pipeline.spans import Assembly, Span, students_of

OVER_SOURCE = re.compile(r"(EncDecAttention\.[kv]|encoder_attn\.[kv]_proj)\.")
"""Names of the weights that make keys and values of cross-attention, in T5 and BART."""
OVER_BOTH = re.compile(r"self_attn\.[kv]_proj\.")
"""Names of those that make them of both texts, in a decoder layer that has none for the source alone: T5Gemma 2's."""
POSITION_BIAS = re.compile(r"(relative_attention_bias|bias\.(en|de)coder\.table)\.weight$")
"""Names of the tables [distances, heads] of biases by position: T5's, of a layer or a stack."""


@dataclass(frozen=True)
class Leaf:
    """One layer that is gathered as a whole."""

    stack: str
    num_parameters: int
    trained: bool
    width: int
    """Features into and out of its linear maps: elements that backward keeps for each token."""
    num_over_source: int = 0
    """Of a decoder layer's parameters those that read the encoder's output: keys and values of cross-attention."""
    num_over_both: int = 0
    """Of these those that read the decoder's own states, too."""
    has_bias: bool = False
    """Its attention makes a position bias of its own, as umT5's does."""

    def multiplied(self, num_source_tokens: int, num_target_tokens: int) -> int:
        """Parameters x tokens that they are applied to."""
        if self.stack == "encoder":
            return self.num_parameters * num_source_tokens
        rest = self.num_parameters - self.num_over_source + self.num_over_both
        return rest * num_target_tokens + self.num_over_source * num_source_tokens


@dataclass(frozen=True)
class Sizes:
    """What a module is made of."""

    leaves: tuple[Leaf, ...]
    rest: tuple[int, ...]
    """Sizes of the parameters outside leaves: embeddings, position biases, last norms, head."""
    num_trained_of_rest: int
    vocabulary: int
    draws: tuple[Assembly, ...] = ()
    """Of the replacing phase over modular layers: the dearest that share a micro-batch."""
    num_bias_heads: int = 0
    """Heads that have position biases: those are tensors of every pair of tokens. 0 for none."""
    longest: tuple[int, int] = (0, 0)
    """Tokens of the longest source and target, for tensors of pairs; 0 leaves these out."""

    @property
    def num_trained(self) -> int:
        """P_m."""
        return sum(leaf.num_parameters for leaf in self.leaves if leaf.trained) + self.num_trained_of_rest

    @property
    def num_frozen(self) -> int:
        """P_f."""
        return sum(leaf.num_parameters for leaf in self.leaves) + sum(self.rest) - self.num_trained

    @property
    def largest_leaf(self) -> int:
        return max(leaf.num_parameters for leaf in self.leaves)

    @property
    def largest_trained_leaf(self) -> int:
        return max(leaf.num_parameters for leaf in self.leaves if leaf.trained)

    @property
    def largest_trained(self) -> int:
        """Of the parameters outside leaves, such as a head, where these are trained; those inside are smaller than any
        buffer."""
        return max(self.rest) if self.num_trained_of_rest else 0

    def kind(self, layer: tuple[str, Span]) -> Leaf:
        """A layer of the same stack and kind, which are all of one size."""
        stack, span = layer
        return next(leaf for leaf in self.leaves if (leaf.stack, leaf.trained) == (stack, span.num_layers > 1))


def sizes_of(module: nn.Module, leaf_classes: Sequence[type[nn.Module]]) -> Sizes:
    """Count a module; its parameters may be on the meta device or spread over ranks already."""
    leaves: list[Leaf] = []
    inside: set[int] = set()
    modules: dict[str, nn.Module] = dict(module.named_modules())
    for name in [name for name, each in modules.items() if isinstance(each, tuple(leaf_classes))]:
        leaf = modules[name]
        parameters = list(leaf.parameters())
        inside |= {id(parameter) for parameter in parameters}
        width = sum(each.in_features + each.out_features for each in leaf.modules() if isinstance(each, nn.Linear))
        stack = "decoder" if "decoder" in name.split(".") else "encoder"
        count = sum(map(_num_elements, parameters))
        over_source = _num_named(leaf, OVER_SOURCE)
        over_both = _num_named(leaf, OVER_BOTH) if stack == "decoder" and not over_source else 0
        trained = any(parameter.requires_grad for parameter in parameters)
        has_bias = any(POSITION_BIAS.search(name) for name, _ in leaf.named_parameters())
        leaves.append(Leaf(stack, count, trained, width, over_source + over_both, over_both, has_bias))
    rest = [parameter for parameter in module.parameters() if id(parameter) not in inside]
    largest: Any = max(rest, key=_num_elements)
    return Sizes(
        leaves=tuple(leaves),
        rest=tuple(map(_num_elements, rest)),
        num_trained_of_rest=sum(_num_elements(each) for each in rest if each.requires_grad),
        vocabulary=_shape(largest)[0],
        num_bias_heads=next(
            (_shape(each)[1] for name, each in module.named_parameters() if POSITION_BIAS.search(name)), 0
        ),
    )


def _num_named(leaf: nn.Module, pattern: re.Pattern[str]) -> int:
    return sum(_num_elements(each) for name, each in leaf.named_parameters() if pattern.search(name))


def _num_elements(parameter: Any) -> int:
    return getattr(parameter, "ds_numel", parameter.numel())


def _shape(parameter: Any) -> Sequence[int]:
    return getattr(parameter, "ds_shape", parameter.shape)


def drawn_layers(sizes: Sizes, draws: Sequence[Assembly]) -> list[Leaf]:
    """The layers that are computed for the students of draws, each as often as it is."""
    return [sizes.kind(layer) for layer in students_of(draws)]
