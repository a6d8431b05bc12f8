"""Teacher and modular layers as ONE module of leaves.

Every layer, the teacher's or a modular one, is its own leaf and is called once a micro-batch, in one fixed order,
whatever the draw: the teacher leaf i carries the teacher state through its layer and, where the draw takes that layer,
the student state too; a modular leaf carries a state through where the draw takes it; what the draw does not use hands
the student state through. So under ZeRO-3 one gather serves both passes, the order that DeepSpeed prefetches by changes
only between phases, gradients of unused layers are zeros and not leftovers, and draws may differ between ranks and
micro-batches.

Shapes: B examples, S source tokens, T target tokens, L tokens of a stack (S or T), D model width, N valid target
tokens, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pipeline.data import MicroBatch
from pipeline.families import Family, StackInputs
from pipeline.kernels import HiddenPair
from pipeline.spans import STACKS, Assembly, Span, modular_spans


class TeacherLeaf(nn.Module):
    """One frozen teacher layer, for both passes."""

    def __init__(self, layer: nn.Module, family: Family) -> None:
        super().__init__()
        self.layer = layer
        self.family = family

    def forward(
        self,
        teacher_BLD: torch.Tensor,
        student_BLD: torch.Tensor,
        teacher_encoded_BSD: torch.Tensor | None,
        student_encoded_BSD: torch.Tensor | None,
        use: bool,
        inputs: StackInputs,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(teacher state after the layer, student state after the layer or, without `use`, as it was)."""
        with torch.no_grad():
            teacher_out_BLD = self.family.call_layer(self.layer, teacher_BLD, teacher_encoded_BSD, inputs)
        if use:
            return teacher_out_BLD, self.family.call_layer(self.layer, student_BLD, student_encoded_BSD, inputs)
        return teacher_out_BLD, student_BLD.view_as(student_BLD)


class ModularLeaf(nn.Module):
    """One trainable layer of the teacher's own type that stands for a span of its layers."""

    def __init__(self, layer: nn.Module, family: Family) -> None:
        super().__init__()
        self.layer = layer
        self.family = family

    def forward(
        self, state_BLD: torch.Tensor, encoded_BSD: torch.Tensor | None, use: bool, inputs: StackInputs
    ) -> torch.Tensor:
        """The state after the layer or, without `use`, as it was. What requires grad is positional and a tensor: the
        engine hangs the reduction of this leaf's gradients on the gradients of these."""
        if use:
            return self.family.call_layer(self.layer, state_BLD, encoded_BSD, inputs)
        return state_BLD.view_as(state_BLD)


class _Splice(torch.autograd.Function):
    """Value of the teacher, gradient of the student: where the student has been the teacher so far, it need not be
    computed twice, and its path back through the leaves stays whole."""

    @staticmethod
    def forward(ctx: Any, student_BLD: torch.Tensor, teacher_BLD: torch.Tensor) -> torch.Tensor:
        return teacher_BLD.clone()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grads[0], None


@dataclass(frozen=True)
class ModularOutputs:
    """What the objectives need of one forward pass."""

    pairs: dict[str, HiddenPair]
    """Student and teacher state at the end of each modular span, by the modular layer's name."""
    student_logits_NV: torch.Tensor | None = None
    teacher_logits_NV: torch.Tensor | None = None
    labels_N: torch.Tensor | None = None


def modular_name(stack: str, span: Span) -> str:
    """Name of a modular layer, such as encoder.2-3."""
    return f"{stack}.{span}"


class ModularModel(nn.Module):
    """A frozen teacher and its modular layers.

    Args:
        model: the teacher as transformers loads it; taken apart, not to be used by itself afterwards.
        granularities: see pipeline.spans.modular_spans.
        init: teacher layer of the span that a modular layer is copied from: "first" or "last".
    """

    def __init__(self, model: nn.Module, family: Family, granularities: Sequence[int], init: str) -> None:
        super().__init__()
        self.shared: Any = family.take_shared(model)
        self.teacher: Any = nn.ModuleDict()
        self.modular: Any = nn.ModuleDict()
        self.spans: dict[str, tuple[Span, ...]] = {}
        for stack in STACKS:
            layers = family.layers(model, stack)
            self.spans[stack] = modular_spans(len(layers), granularities)
            self.teacher[stack] = nn.ModuleList(TeacherLeaf(layer, family) for layer in layers)
            self.modular[stack] = nn.ModuleDict(
                {
                    str(span): ModularLeaf(copy.deepcopy(layers[span.first if init == "first" else span.last]), family)
                    for span in self.spans[stack]
                }
            )
        self.requires_grad_(False)
        self.modular.requires_grad_(True)
        self.eval()

    @property
    def num_layers(self) -> tuple[int, int]:
        """Teacher layers of (encoder, decoder)."""
        return len(self.teacher["encoder"]), len(self.teacher["decoder"])

    def train(self, mode: bool = True) -> ModularModel:
        """Training does not turn dropout on: a modular layer learns from states of a teacher without dropout."""
        return super().train(False)

    def forward(self, batch: MicroBatch, draw: Assembly | None) -> ModularOutputs:
        """One micro-batch through teacher and student.

        Args:
            draw: the assembly that the student takes; None for the local phase, where every modular layer is given the
                teacher's own state at the start of its span, and nothing else is computed for the student.
        """
        shared = self.shared
        pairs: dict[str, HiddenPair] = {}
        inputs = StackInputs(shared.self_bias("encoder", batch.source_mask_BS))
        source_BSD = shared.embed("encoder", batch.source_BS)
        target_mask_BT = batch.labels_BT != -100
        # an example without targets only fills a micro-batch up: it counts nowhere
        counted_BS = batch.source_mask_BS & target_mask_BT.any(1, keepdim=True)
        teacher_BSD, student_BSD, same = self._run_stack(
            "encoder", draw, source_BSD, None, None, True, inputs, counted_BS, pairs
        )
        teacher_BSD = shared.finish("encoder", teacher_BSD)
        student_BSD = teacher_BSD if draw is None else shared.finish("encoder", student_BSD)

        # padding needs no mask: it stands behind every target token, where the causal mask hides it
        bias = shared.self_bias("decoder", torch.ones_like(target_mask_BT[:1]))
        inputs = StackInputs(bias, shared.cross_bias(batch.source_mask_BS))
        target_BTD = shared.embed("decoder", shared.decoder_inputs(batch.labels_BT))
        teacher_BTD, student_BTD, _ = self._run_stack(
            "decoder", draw, target_BTD, teacher_BSD, student_BSD, same, inputs, target_mask_BT, pairs
        )
        if draw is None:
            return ModularOutputs(pairs)
        with torch.no_grad():
            teacher_logits_NV = shared.logits(shared.finish("decoder", teacher_BTD[target_mask_BT]))
        student_logits_NV = shared.logits(shared.finish("decoder", student_BTD[target_mask_BT]))
        return ModularOutputs(pairs, student_logits_NV, teacher_logits_NV, batch.labels_BT[target_mask_BT])

    def _run_stack(
        self,
        stack: str,
        draw: Assembly | None,
        embedded_BLD: torch.Tensor,
        teacher_encoded_BSD: torch.Tensor | None,
        student_encoded_BSD: torch.Tensor | None,
        same: bool,
        inputs: StackInputs,
        mask_BL: torch.Tensor,
        pairs: dict[str, HiddenPair],
    ) -> tuple[torch.Tensor, torch.Tensor, bool]:
        """(teacher state, student state, still the same) after the last layer; adds the pairs at span ends.

        Args:
            same: the student has been the teacher so far; up to its first modular span it need not be computed.
        """
        spans = draw.tiling(stack).spans if draw is not None else self.spans[stack]
        used = {span for span in spans if span.num_layers > 1}
        replaced = {layer for span in used for layer in range(span.first, span.last + 1)}
        ends: dict[Span, torch.Tensor] = {}
        teacher_states = [embedded_BLD.detach()]
        student_BLD = embedded_BLD.detach().requires_grad_(torch.is_grad_enabled())
        for layer, teacher_leaf in enumerate(self.teacher[stack]):
            for span in (each for each in self.spans[stack] if each.first == layer):
                leaf = self.modular[stack][str(span)]
                if draw is None:
                    start_BLD = teacher_states[-1].detach().requires_grad_(torch.is_grad_enabled())
                    ends[span] = leaf(start_BLD, teacher_encoded_BSD, True, inputs)
                    continue
                if span in used and same:
                    student_BLD, same = _Splice.apply(student_BLD, teacher_states[-1]), False
                # an input that gets no gradient would keep DeepSpeed from releasing the leaf: what is not used is None
                encoded_BSD = student_encoded_BSD if span in used else None
                student_BLD = leaf(student_BLD, encoded_BSD, span in used, inputs)
                if span in used:
                    ends[span] = student_BLD
            use = draw is not None and not same and layer not in replaced
            encoded_BSD = student_encoded_BSD if use else None
            teacher_BLD, student_BLD = teacher_leaf(
                teacher_states[-1], student_BLD, teacher_encoded_BSD, encoded_BSD, use, inputs
            )
            teacher_states.append(teacher_BLD)
        for span, end_BLD in ends.items():
            pairs[modular_name(stack, span)] = HiddenPair(
                student_BTD=end_BLD,
                teacher_BTD=teacher_states[span.last + 1],
                mask_BT=mask_BL,
                start_BTD=teacher_states[span.first],
            )
        if same and draw is not None:
            student_BLD = _Splice.apply(student_BLD, teacher_states[-1])
        return teacher_states[-1], student_BLD, same
