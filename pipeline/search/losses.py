"""Losses of many assemblies on the same examples, sharing every layer call that they have in common.

The assemblies form a tree of common prefixes, in which a decoder prefix includes its whole encoder: one layer call for
each distinct prefix. Each assembly gets bit for bit what it gets alone.

Shapes: A assemblies, B examples, S source tokens, T target tokens, D model width, N valid target tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from pipeline.data import MicroBatch
from pipeline.families import Family
from pipeline.model import ModularModel, task_loss
from pipeline.spans import Assembly, Span, Tiling, walk


@dataclass
class LayerCalls:
    """How often a layer of either stack was called."""

    encoder: int = 0
    decoder: int = 0


@torch.no_grad()
def assembly_losses(
    model: ModularModel,
    family: Family,
    batch: MicroBatch,
    assemblies: Sequence[Assembly],
    calls: LayerCalls | None = None,
) -> torch.Tensor:
    """Cross entropy with the references, summed over target tokens, in nats: fp32 [A], on the model's device.

    Args:
        calls: counts layer calls.
    """
    calls = calls or LayerCalls()
    shared = model.shared
    ones_1T, labels_N = torch.ones_like(batch.labels_BT[:1], dtype=torch.bool), batch.labels_N
    encoder_inputs = shared.inputs("encoder", batch.source_mask_BS)
    decoder_inputs = shared.inputs("decoder", ones_1T, batch.source_mask_BS)
    source_BSD = shared.embed("encoder", batch.source_BS)
    target_BTD = shared.embed("decoder", shared.decoder_inputs(batch.labels_BT))

    def encode(state_BSD: torch.Tensor, span: Span) -> torch.Tensor:
        calls.encoder += 1
        return family.call_layer(layer_of(model, "encoder", span), state_BSD, None, encoder_inputs)

    decoders: dict[Tiling, list[Tiling]] = {}
    for assembly in assemblies:
        decoders.setdefault(assembly.encoder, []).append(assembly.decoder)
    by_path = {tiling.spans: tiling for tiling in decoders}
    losses: dict[Assembly, torch.Tensor] = {}
    for encoder_path, state_BSD in walk(by_path, source_BSD, encode):
        encoder = by_path[encoder_path]
        encoded_BSD = shared.finish("encoder", state_BSD)

        def decode(state_BTD: torch.Tensor, span: Span, encoded_BSD: torch.Tensor = encoded_BSD) -> torch.Tensor:
            calls.decoder += 1
            return family.call_layer(layer_of(model, "decoder", span), state_BTD, encoded_BSD, decoder_inputs)

        paths = [tiling.spans for tiling in decoders[encoder]]
        for decoder_path, state_BTD in walk(paths, target_BTD, decode):
            state_ND = state_BTD.flatten(0, 1).index_select(0, batch.places_N)
            logits_NV = shared.logits(shared.finish("decoder", state_ND))
            decoder = Tiling(tuple(span.num_layers for span in decoder_path))
            losses[Assembly(encoder, decoder)] = task_loss(logits_NV, labels_N)
    return torch.stack([losses[assembly] for assembly in assemblies])


def layer_of(model: ModularModel, stack: str, span: Span) -> nn.Module:
    """The layer that stands for a span: the teacher's or a modular one."""
    if span.num_layers == 1:
        return model.teacher[stack][span.first].layer
    return model.modular[stack][str(span)].layer
