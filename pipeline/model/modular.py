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

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from pipeline.data import IGNORED_LABEL, MicroBatch
from pipeline.families import Family, QueriesKeys, StackInputs
from pipeline.kernels import AttentionPair, HeadLoss, HeadObjective, HiddenPair
from pipeline.model.leaves import ModularLeaf, Splice, TeacherLeaf, initial_layer
from pipeline.spans import STACKS, Assembly, Span, Stacks


@dataclass(frozen=True)
class Wanted:
    """What the forward pass makes for the objectives besides states, while the weights that it takes are gathered."""

    head: HeadObjective
    upstream: float = 1.0
    """Gradient that backward will bring for the loss of the head."""
    eager: bool = False
    """Take the definitions of the losses, not their fused paths."""
    attention: bool = False
    """Hand out the queries and keys of the attentions."""


@dataclass(frozen=True)
class ModularOutputs:
    """What the objectives need of one forward pass."""

    pairs: dict[str, HiddenPair]
    """Student and teacher state at the end of each modular span, by the modular layer's name."""
    student_logits_NV: torch.Tensor | None = None
    teacher_logits_NV: torch.Tensor | None = None
    labels_N: torch.Tensor | None = None
    head: HeadLoss | None = None
    """Sums over the tokens of `labels_N`."""
    attention: dict[str, dict[str, AttentionPair]] = field(default_factory=dict)
    """Attentions of each modular layer and of the last teacher layer of its span, by kind (self, cross) and name."""

    @property
    def task_sum(self) -> torch.Tensor:
        """Cross entropy summed over tokens."""
        assert self.head is not None
        return self.head.task


def modular_name(stack: str, span: Span) -> str:
    """Name of a modular layer, such as encoder.2-3."""
    return f"{stack}.{span}"


def granularity_of(name: str) -> int:
    """Granularity of a modular layer by its name."""
    first, last = name.rpartition(".")[2].split("-")
    return int(last) - int(first) + 1


@dataclass(frozen=True, kw_only=True)
class _StackPass:
    """What one stack is run with, beside the draw."""

    stack: str
    embedded_BLD: torch.Tensor
    inputs: StackInputs
    mask_BL: torch.Tensor
    """Tokens of this stack that count."""
    source_mask_BS: torch.Tensor
    teacher_encoded_BSD: torch.Tensor | None = None
    """For the decoder: the last state of the encoder, as the teacher and as the student has it."""
    student_encoded_BSD: torch.Tensor | None = None


class ModularModel(nn.Module):
    """A frozen teacher and its modular layers.

    Args:
        model: the teacher as transformers loads it; taken apart, not to be used by itself afterwards.
        granularities: of (encoder, decoder), see pipeline.spans.modular_spans; () leaves a stack whole.
        init: what a modular layer starts from, see `initial_layer`.
        share_memory: the modular layers start in the teacher's own memory, for an engine that copies every weight into
            shards of its own before it trains; otherwise they are copies.
    """

    def __init__(
        self,
        model: nn.Module,
        family: Family,
        granularities: tuple[Sequence[int], Sequence[int]],
        init: str,
        *,
        share_memory: bool = False,
    ) -> None:
        super().__init__()
        self.family = family
        self.shared: Any = family.take_shared(model)
        self.teacher: Any = nn.ModuleDict()
        self.modular: Any = nn.ModuleDict()
        encoder, decoder = (len(family.layers(model, stack)) for stack in STACKS)
        self.stacks = Stacks.of((encoder, decoder), granularities)
        for stack, _, spans in self.stacks:
            layers = family.layers(model, stack)
            self.teacher[stack] = nn.ModuleList(TeacherLeaf(layer, family) for layer in layers)
            self.modular[stack] = nn.ModuleDict(
                {
                    str(span): ModularLeaf(initial_layer(layers, span, init, share_memory=share_memory), family)
                    for span in spans
                }
            )
        self.requires_grad_(False)
        self.modular.requires_grad_(True)
        self.eval()

    def train(self, mode: bool = True) -> ModularModel:
        """Training does not turn dropout on: a modular layer learns from states of a teacher without dropout."""
        return super().train(False)

    def forward(self, batch: MicroBatch, draw: Assembly | None, wanted: Wanted | None = None) -> ModularOutputs:
        """One micro-batch through teacher and student.

        Args:
            draw: the assembly that the student takes; None for the local phase, where every modular layer is given the
                teacher's own state at the start of its span, and nothing else is computed for the student.
            wanted: losses to make of the distributions; None hands out the logits.
        """
        shared = self.shared
        outputs = ModularOutputs({}, attention={"self": {}, "cross": {}})
        capture = wanted is not None and wanted.attention
        mask_BS = batch.source_mask_BS
        target_mask_BT = batch.labels_BT != IGNORED_LABEL
        # by distance, too, whether or not an attention loss wants it: the order in which modules run stays one
        by_distance_HR = shared.distance_bias("encoder", mask_BS)
        # an example without targets only fills a micro-batch up: it counts nowhere
        counted_BS = mask_BS & target_mask_BT.any(1, keepdim=True)
        encoder = _StackPass(
            stack="encoder",
            inputs=StackInputs(shared.self_bias("encoder", mask_BS), distance_bias_HR=by_distance_HR),
            embedded_BLD=shared.embed("encoder", batch.source_BS),
            mask_BL=counted_BS,
            source_mask_BS=counted_BS,
        )
        teacher_BSD, student_BSD, same = self._run_stack(encoder, draw, True, outputs, capture)
        teacher_BSD = shared.finish("encoder", teacher_BSD)
        student_BSD = teacher_BSD if draw is None else shared.finish("encoder", student_BSD)

        # padding needs no mask: it stands behind every target token, where the causal mask hides it
        ones_1T = torch.ones_like(target_mask_BT[:1])
        by_distance_HR = shared.distance_bias("decoder", ones_1T)
        decoder = _StackPass(
            stack="decoder",
            inputs=StackInputs(shared.self_bias("decoder", ones_1T), shared.cross_bias(mask_BS), by_distance_HR),
            embedded_BLD=shared.embed("decoder", shared.decoder_inputs(batch.labels_BT)),
            mask_BL=target_mask_BT,
            source_mask_BS=mask_BS,
            teacher_encoded_BSD=teacher_BSD,
            student_encoded_BSD=student_BSD,
        )
        teacher_BTD, student_BTD, _ = self._run_stack(decoder, draw, same, outputs, capture)
        if draw is None:
            return outputs
        return self._with_head(outputs, teacher_BTD, student_BTD, batch.labels_BT, wanted)

    def _with_head(
        self,
        outputs: ModularOutputs,
        teacher_BTD: torch.Tensor,
        student_BTD: torch.Tensor,
        labels_BT: torch.Tensor,
        wanted: Wanted | None,
    ) -> ModularOutputs:
        """The outputs with the losses of the distributions or, where none are wanted, with the logits."""
        shared = self.shared
        # found once: on a GPU the host waits here, as often as a mask is an index
        places_N = (labels_BT != IGNORED_LABEL).flatten().nonzero().squeeze(1)
        labels_N = labels_BT.flatten()[places_N]
        with torch.no_grad():
            teacher_ND = shared.finish("decoder", teacher_BTD.flatten(0, 1).index_select(0, places_N))
        student_ND = shared.finish("decoder", student_BTD.flatten(0, 1).index_select(0, places_N))
        if wanted is None:
            with torch.no_grad():
                teacher_logits_NV = shared.logits(teacher_ND)
            student_logits_NV = shared.logits(student_ND)
            return replace(
                outputs, student_logits_NV=student_logits_NV, teacher_logits_NV=teacher_logits_NV, labels_N=labels_N
            )
        taught_by_ND = teacher_ND if wanted.head.logit != 0 else None
        head = shared.head.losses(student_ND, taught_by_ND, labels_N, wanted.head, wanted.upstream, eager=wanted.eager)
        return replace(outputs, labels_N=labels_N, head=head)

    def _run_stack(
        self, given: _StackPass, draw: Assembly | None, same: bool, outputs: ModularOutputs, capture: bool
    ) -> tuple[torch.Tensor, torch.Tensor, bool]:
        """(teacher state, student state, still the same) after the last layer; adds the pairs at span ends to the
        outputs.

        Args:
            same: the student has been the teacher so far; up to its first modular span it need not be computed.
        """
        stack, inputs = given.stack, given.inputs
        spans = draw.tiling(stack).spans if draw is not None else self.stacks.spans_of(stack)
        used = {span for span in spans if span.num_layers > 1}
        replaced = {layer for span in used for layer in range(span.first, span.last + 1)}
        lasts = {span.last for span in used}
        ends: dict[Span, tuple[torch.Tensor, dict[str, QueriesKeys]]] = {}
        teacher_maps: dict[int, dict[str, QueriesKeys]] = {}
        teacher_states = [given.embedded_BLD.detach()]
        student_BLD = given.embedded_BLD.detach().requires_grad_(torch.is_grad_enabled())
        for layer, teacher_leaf in enumerate(self.teacher[stack]):
            for span in (each for each in self.stacks.spans_of(stack) if each.first == layer):
                leaf = self.modular[stack][str(span)]
                if draw is None:
                    start_BLD = teacher_states[-1].detach().requires_grad_(torch.is_grad_enabled())
                    ends[span] = leaf.run(start_BLD, given.teacher_encoded_BSD, True, inputs, capture)
                    continue
                if span in used and same:
                    student_BLD, same = Splice.apply(student_BLD, teacher_states[-1]), False
                # an input that gets no gradient would keep DeepSpeed from releasing the leaf: what is not used is None
                encoded_BSD = given.student_encoded_BSD if span in used else None
                student_BLD, maps = leaf.run(student_BLD, encoded_BSD, span in used, inputs, capture)
                if span in used:
                    ends[span] = student_BLD, maps
            use = draw is not None and not same and layer not in replaced
            encoded_BSD = given.student_encoded_BSD if use else None
            teacher_BLD, student_BLD, teacher_maps[layer] = teacher_leaf(
                teacher_states[-1], student_BLD, given.teacher_encoded_BSD, encoded_BSD, use, inputs,
                capture and layer in lasts,
            )  # fmt: skip
            teacher_states.append(teacher_BLD)
        for span, (end_BLD, maps) in ends.items():
            name = modular_name(stack, span)
            start_BLD, target_BLD = teacher_states[span.first], teacher_states[span.last + 1]
            outputs.pairs[name] = HiddenPair(end_BLD, target_BLD, mask_BT=given.mask_BL, start_BTD=start_BLD)
            for kind, queries_keys in maps.items():
                pair = self._attention_pair(given, span, kind, queries_keys, teacher_maps[span.last][kind])
                outputs.attention[kind][name] = pair
        if same and draw is not None:
            student_BLD = Splice.apply(student_BLD, teacher_states[-1])
        return teacher_states[-1], student_BLD, same

    def _attention_pair(
        self, given: _StackPass, span: Span, kind: str, student: QueriesKeys, teacher: QueriesKeys
    ) -> AttentionPair:
        """The attentions of a modular layer and of the last teacher layer of its span; kind: self or cross."""
        attention = self.family.attentions(self.modular[given.stack][str(span)].layer)[kind]
        return AttentionPair(
            *student,
            *teacher,
            query_mask_BQ=given.mask_BL,
            key_mask_BS=given.mask_BL if kind == "self" else given.source_mask_BS,
            bias_HR=given.inputs.distance_bias_HR if kind == "self" else None,
            causal=(given.stack, kind) == ("decoder", "self"),
            scale=attention.scale,
        )
