"""How large an assembly is, by arithmetic: every layer of a stack has as many parameters as its neighbours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.spans.spans import PRESETS, Assembly, teacher_assembly
from pipeline.spans.stacks import Stacks


@dataclass(frozen=True)
class ModelSizes:
    """Parameters of the parts of a teacher; weights that are tied count once."""

    num_layers: tuple[int, int]
    """Teacher layers of (encoder, decoder)."""
    encoder_layer: int
    """Parameters of one encoder layer."""
    decoder_layer: int
    """Parameters of one decoder layer."""
    embeddings: int
    """Parameters with a row for each token of the vocabulary or each position: embeddings and heads."""
    rest: int
    """Everything else outside the layers: final norms, relative position biases."""
    bytes_per_parameter: int = 4

    def non_embedding(self, assembly: Assembly) -> int:
        """Parameters of an assembly but for its embeddings and head."""
        layers = (assembly.encoder.num_layers * self.encoder_layer, assembly.decoder.num_layers * self.decoder_layer)
        return sum(layers) + self.rest

    def parameters(self, assembly: Assembly) -> int:
        """All parameters of an assembly."""
        return self.non_embedding(assembly) + self.embeddings

    def bytes(self, assembly: Assembly) -> int:
        """Bytes of an assembly's weights, in memory and (but for a header of some kB) on disk."""
        return self.parameters(assembly) * self.bytes_per_parameter

    def ratios(self, assembly: Assembly) -> Ratios:
        """How much smaller an assembly is than the teacher."""
        teacher = teacher_assembly(*self.num_layers)
        return Ratios(
            layers=assembly.ratio_of_layers,
            non_embedding=self.non_embedding(teacher) / self.non_embedding(assembly),
            parameters=self.parameters(teacher) / self.parameters(assembly),
            bytes=self.bytes(teacher) / self.bytes(assembly),
        )


@dataclass(frozen=True)
class Ratios:
    """How many times smaller an assembly is than its teacher, by what is counted."""

    layers: float
    """The headline: layers of both stacks together."""
    non_embedding: float
    """Parameters without embeddings and head."""
    parameters: float
    """All parameters."""
    bytes: float
    """Bytes of the weights; equal to the ratio of parameters where teacher and assembly have one dtype."""


def t5_sizes(*, num_layers: int, d_model: int, d_ff: int, gated: bool, tied: bool, vocab_size: int) -> ModelSizes:
    """Sizes of a T5 with as many decoder as encoder layers, d_model = heads x d_kv, and 32 position buckets.

    An encoder layer holds 4 attention matrices of d_model^2, the 2 (gated: 3) of its feed-forward part, and 2 norms; a
    decoder layer 4 attention matrices and a norm more.
    """
    feed_forward = (3 if gated else 2) * d_model * d_ff
    attention = 4 * d_model * d_model
    num_heads = d_model // 64
    return ModelSizes(
        num_layers=(num_layers, num_layers),
        encoder_layer=attention + feed_forward + 2 * d_model,
        decoder_layer=2 * attention + feed_forward + 3 * d_model,
        embeddings=(1 if tied else 2) * vocab_size * d_model,
        rest=2 * d_model + 2 * 32 * num_heads,
    )


def preset_table(sizes: ModelSizes, granularities: Sequence[int], ratios: Sequence[float]) -> str:
    """What each preset makes of each ratio of layers, as a Markdown table."""
    rows = ["| ratio asked | preset | assembly | layers | non-embedding | parameters |", "|---|---|---|---|---|---|"]
    stacks = Stacks.of(sizes.num_layers, (granularities, granularities))
    for ratio in ratios:
        for preset in PRESETS:
            assembly = stacks.preset(preset, ratio)
            got = sizes.ratios(assembly)
            layers = f"{assembly.encoder.num_layers}+{assembly.decoder.num_layers}: {got.layers:.2f}x"
            rows.append(
                f"| {ratio:g} | {preset} | `{assembly}` | {layers} | {got.non_embedding:.2f}x | {got.parameters:.2f}x |"
            )
    return "\n".join(rows)
