"""Teacher and modular layers as ONE module of leaves.

Every layer, the teacher's or a modular one, is its own leaf and is called once a micro-batch, in one fixed order,
whatever the draws: the teacher leaf i carries the teacher state through its layer and, where draws take that layer,
their student states too; a modular leaf carries the states through of the draws that take it; what no draw uses hands a
student state through. So under ZeRO-3 one gather serves both passes and all draws, the order that DeepSpeed prefetches
by changes only between phases, gradients of unused layers are zeros and not leftovers, and draws may differ between
ranks and micro-batches.

Shapes: B examples, S source tokens, T target tokens, L tokens of a stack (S or T), D model width, N valid target
tokens, V vocabulary, U students: draws that differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import nn

from pipeline.data import IGNORED_LABEL, MicroBatch
from pipeline.families import Family, QueriesKeys
from pipeline.kernels import AttentionPair, HeadLoss, HeadObjective, HiddenPair
from pipeline.model.leaves import ModularLeaf, TeacherLeaf, initial_layer
from pipeline.model.streams import (
    DrawnRun,
    End,
    LocalRun,
    StackLeaves,
    StackPass,
    StackRun,
    Stream,
    start_of,
    together,
)
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


class Use(NamedTuple):
    """A modular layer as one stream takes it."""

    name: str
    draws: tuple[int, ...]
    """The draws that the stream serves, by their places in the micro-batch; (0,) in the local phase."""


@dataclass(frozen=True)
class ModularOutputs:
    """What the objectives need of one forward pass."""

    pairs: dict[Use, HiddenPair]
    """Student and teacher state at the end of each modular span, for each stream through it."""
    num_draws: int = 1
    student_logits_NV: torch.Tensor | None = None
    teacher_logits_NV: torch.Tensor | None = None
    labels_N: torch.Tensor | None = None
    head: HeadLoss | None = None
    """Sums over the tokens of `labels_N`, the means over the draws."""
    attention: dict[str, dict[Use, AttentionPair]] = field(default_factory=dict)
    """Attentions of each modular layer and of the last teacher layer of its span, by kind (self, cross)."""

    @property
    def task_sum(self) -> torch.Tensor:
        """Cross entropy summed over tokens, the mean over the draws."""
        assert self.head is not None
        return self.head.task


def modular_name(stack: str, span: Span) -> str:
    """Name of a modular layer, such as encoder.2-3."""
    return f"{stack}.{span}"


def granularity_of(name: str) -> int:
    """Granularity of a modular layer by its name."""
    first, last = name.rpartition(".")[2].split("-")
    return int(last) - int(first) + 1


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

    def forward(
        self, batch: MicroBatch, draws: Sequence[Assembly] | None, wanted: Wanted | None = None
    ) -> ModularOutputs:
        """One micro-batch through teacher and students.

        Args:
            draws: the assemblies that students take, one or more; None for the local phase, where every modular layer
                is given the teacher's own state at the start of its span, and nothing else is computed for a student.
            wanted: losses to make of the distributions; None hands out the logits (of one draw).
        """
        shared, mask_BS, target_mask_BT = self.shared, batch.source_mask_BS, batch.labels_BT != IGNORED_LABEL
        outputs = ModularOutputs({}, len(draws) if draws else 1, attention={"self": {}, "cross": {}})
        capture = wanted is not None and wanted.attention
        # an example without targets only fills a micro-batch up: it counts nowhere
        counted_BS = mask_BS & target_mask_BT.any(1, keepdim=True)
        encoder = StackPass(
            stack="encoder",
            inputs=shared.inputs("encoder", mask_BS),
            embedded_BLD=shared.embed("encoder", batch.source_BS),
            mask_BL=counted_BS,
            source_mask_BS=counted_BS,
            capture=capture,
        )
        everyone = tuple(range(outputs.num_draws))
        teacher_BSD, streams = self._run_stack(
            encoder, draws, [Stream(everyone, start_of(encoder.embedded_BLD))], outputs
        )
        teacher_BSD = shared.finish("encoder", teacher_BSD)
        self._finish_encoder(streams)

        # padding needs no mask: it stands behind every target token, where the causal mask hides it
        ones_1T = torch.ones_like(target_mask_BT[:1])
        decoder = StackPass(
            stack="decoder",
            inputs=shared.inputs("decoder", ones_1T, mask_BS),
            embedded_BLD=shared.embed("decoder", shared.decoder_inputs(batch.labels_BT)),
            mask_BL=target_mask_BT,
            source_mask_BS=mask_BS,
            teacher_encoded_BSD=teacher_BSD,
            capture=capture,
        )
        start_BTD = start_of(decoder.embedded_BLD)
        teacher_BTD, streams = self._run_stack(
            decoder, draws, [replace(stream, state_BLD=start_BTD) for stream in streams], outputs
        )
        if draws is None:
            return outputs
        return self._with_head(outputs, teacher_BTD, streams, batch, wanted)

    def _finish_encoder(self, streams: Sequence[Stream]) -> None:
        """Give each stream the encoder's output that its decoder layers attend to."""
        if streams:
            finished = self.shared.finish("encoder", together([stream.state_BLD for stream in streams]))
            for stream, encoded_BSD in zip(streams, finished.chunk(len(streams)), strict=True):
                stream.encoded_BSD = encoded_BSD

    def _with_head(
        self,
        outputs: ModularOutputs,
        teacher_BTD: torch.Tensor,
        streams: Sequence[Stream],
        batch: MicroBatch,
        wanted: Wanted | None,
    ) -> ModularOutputs:
        """The outputs with the losses of the distributions or, where none are wanted, with the logits."""
        shared, places_N, labels_N = self.shared, batch.places_N, batch.labels_N
        with torch.no_grad():
            teacher_ND = shared.finish("decoder", teacher_BTD.flatten(0, 1).index_select(0, places_N))
        states = [stream.state_BLD.flatten(0, 1).index_select(0, places_N) for stream in streams]
        student_UND = shared.finish("decoder", together(states)).unflatten(0, (len(streams), len(places_N)))
        if wanted is None:
            assert len(streams) == 1, "logits are handed out of one draw"
            with torch.no_grad():
                teacher_logits_NV = shared.logits(teacher_ND)
            student_logits_NV = shared.logits(student_UND[0])
            return replace(
                outputs, student_logits_NV=student_logits_NV, teacher_logits_NV=teacher_logits_NV, labels_N=labels_N
            )
        taught_by_ND = teacher_ND if wanted.head.logit != 0 else None
        shares_U = [len(stream.draws) / outputs.num_draws for stream in streams]
        head = shared.head.losses(
            student_UND, shares_U, taught_by_ND, labels_N, wanted.head, wanted.upstream, eager=wanted.eager
        )
        return replace(outputs, labels_N=labels_N, head=head)

    def _run_stack(
        self, given: StackPass, draws: Sequence[Assembly] | None, streams: Sequence[Stream], outputs: ModularOutputs
    ) -> tuple[torch.Tensor, Sequence[Stream]]:
        """(teacher state, streams) after the last layer, without streams in the local phase; adds the pairs at span
        ends to the outputs."""
        stack = given.stack
        modular = {span: self.modular[stack][str(span)] for span in self.stacks.spans_of(stack)}
        leaves = StackLeaves(self.teacher[stack], modular)
        run: LocalRun | DrawnRun
        if draws is None:
            run = LocalRun(given, leaves)
        else:
            run = DrawnRun(given, leaves, [draw.tiling(stack) for draw in draws], streams)
        run.run()
        for end in run.ends:
            self._add_pairs(run, end, outputs)
        return run.teacher_states[-1], run.streams if isinstance(run, DrawnRun) else []

    def _add_pairs(self, run: StackRun, end: End, outputs: ModularOutputs) -> None:
        """Hold what comes out of a modular layer beside the teacher, in states and attentions."""
        given, span = run.given, end.span
        use = Use(modular_name(given.stack, span), end.draws)
        start_BLD, target_BLD = run.teacher_states[span.first], run.teacher_states[span.last + 1]
        outputs.pairs[use] = HiddenPair(end.state_BLD, target_BLD, mask_BT=given.mask_BL, start_BTD=start_BLD)
        for kind, student in end.maps.items():
            pair = self._attention_pair(given, span, kind, student, run.teacher_maps[span.last][kind])
            outputs.attention[kind][use] = pair

    def _attention_pair(
        self, given: StackPass, span: Span, kind: str, student: QueriesKeys, teacher: QueriesKeys
    ) -> AttentionPair:
        """The attentions of a modular layer and of the last teacher layer of its span; kind: self or cross."""
        attention = self.family.attentions(self.modular[given.stack][str(span)].layer)[kind]
        of_stack_HR = given.inputs.distance_bias_HR if kind == "self" else None
        return AttentionPair(
            *student[:2],
            *teacher[:2],
            query_mask_BQ=given.mask_BL,
            key_mask_BS=given.mask_BL if kind == "self" else given.source_mask_BS,
            bias_HR=of_stack_HR if teacher.bias_RH is None else teacher.bias_RH.T,
            causal=(given.stack, kind) == ("decoder", "self"),
            scale=attention.scale,
            student_bias_HR=None if student.bias_RH is None else student.bias_RH.T,
        )
