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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from pipeline.data import MicroBatch
from pipeline.families import Family, StackInputs
from pipeline.families.capture import QueriesKeys, captured
from pipeline.kernels import AttentionPair, HeadLoss, HeadObjective, HiddenPair
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
        capture: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, QueriesKeys]]:
        """(teacher state after the layer, student state after the layer or, without `use`, as it was, the teacher's
        queries and keys if `capture`)."""
        with torch.no_grad(), captured(self.family.attentions(self.layer), capture) as queries_keys:
            teacher_out_BLD = self.family.call_layer(self.layer, teacher_BLD, teacher_encoded_BSD, inputs)
        if use:
            student_BLD = self.family.call_layer(self.layer, student_BLD, student_encoded_BSD, inputs)
        else:
            student_BLD = student_BLD.view_as(student_BLD)
        return teacher_out_BLD, student_BLD, queries_keys


class ModularLeaf(nn.Module):
    """One trainable layer of the teacher's own type that stands for a span of its layers."""

    def __init__(self, layer: nn.Module, family: Family) -> None:
        super().__init__()
        self.layer = layer
        self.family = family

    def forward(
        self,
        state_BLD: torch.Tensor,
        encoded_BSD: torch.Tensor | None,
        use: bool,
        inputs: StackInputs,
        capture: bool = False,
    ) -> torch.Tensor:
        """The state after the layer or, without `use`, as it was; with `capture` its queries and keys behind it (see
        `run`). What requires grad is positional and a tensor, and there is one output: the engine hangs the reduction
        of this leaf's gradients on the gradients of the inputs, and counts outputs, which must not depend on the
        draw."""
        if not use:
            return state_BLD.view_as(state_BLD)
        with captured(self.family.attentions(self.layer), capture) as queries_keys:
            state_BLD = self.family.call_layer(self.layer, state_BLD, encoded_BSD, inputs)
        if not capture:
            return state_BLD
        taken = [tensor for pair in queries_keys.values() for tensor in pair]
        return torch.cat([tensor.flatten() for tensor in (state_BLD, *taken)])

    def run(
        self,
        state_BLD: torch.Tensor,
        encoded_BSD: torch.Tensor | None,
        use: bool,
        inputs: StackInputs,
        capture: bool,
    ) -> tuple[torch.Tensor, dict[str, QueriesKeys]]:
        """(the state after the layer or, without `use`, as it was, its queries and keys if `use` and `capture`)."""
        output = self(state_BLD, encoded_BSD, use, inputs, capture)
        if not (use and capture):
            return output, {}
        shapes = [state_BLD.shape]
        names = ["self", "cross"] if encoded_BSD is not None else ["self"]
        for name in names:
            projections = self.family.attentions(self.layer)[name]
            looked_at = encoded_BSD if name == "cross" and encoded_BSD is not None else state_BLD
            for each_BLD in (state_BLD, looked_at):
                shapes.append(torch.Size([*each_BLD.shape[:2], projections.num_heads, projections.width]))
        parts = [
            part.view(shape) for part, shape in zip(output.split([s.numel() for s in shapes]), shapes, strict=True)
        ]
        found = {name: QueriesKeys(*parts[1 + 2 * i : 3 + 2 * i]) for i, name in enumerate(names)}
        return parts[0], found


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


def initial_layer(layers: nn.ModuleList, span: Span, init: str, *, share_memory: bool = False) -> nn.Module:
    """What a modular layer starts from: a copy of the "first", "middle" or "last" layer of its span (of two middle
    layers the earlier one), or their "average", parameter by parameter. With `share_memory` a copy of one layer has
    parameters of its own over that layer's memory."""
    middle = (span.first + span.last) // 2
    source = layers[{"first": span.first, "middle": middle}.get(init, span.last)]
    twins = {id(parameter): nn.Parameter(parameter.data) for parameter in source.parameters()}
    layer = copy.deepcopy(source, twins if share_memory else None)
    if init == "average":
        for name, parameter in layer.named_parameters():
            each = [layers[i].get_parameter(name).data.float() for i in range(span.first, span.last + 1)]
            parameter.data = torch.stack(each).mean(0).to(parameter.dtype)
    return layer


class ModularModel(nn.Module):
    """A frozen teacher and its modular layers.

    Args:
        model: the teacher as transformers loads it; taken apart, not to be used by itself afterwards.
        granularities: see pipeline.spans.modular_spans; of both stacks, or by stack ((): that one is left whole).
        init: what a modular layer starts from, see `initial_layer`.
        share_memory: the modular layers start in the teacher's own memory, for an engine that copies every weight into
            shards of its own before it trains; otherwise they are copies.
    """

    def __init__(
        self,
        model: nn.Module,
        family: Family,
        granularities: Sequence[int] | Mapping[str, Sequence[int]],
        init: str,
        *,
        share_memory: bool = False,
    ) -> None:
        super().__init__()
        self.family = family
        self.shared: Any = family.take_shared(model)
        self.teacher: Any = nn.ModuleDict()
        self.modular: Any = nn.ModuleDict()
        self.spans: dict[str, tuple[Span, ...]] = {}
        for stack in STACKS:
            layers = family.layers(model, stack)
            own = granularities[stack] if isinstance(granularities, Mapping) else granularities
            self.spans[stack] = modular_spans(len(layers), own)
            self.teacher[stack] = nn.ModuleList(TeacherLeaf(layer, family) for layer in layers)
            self.modular[stack] = nn.ModuleDict(
                {
                    str(span): ModularLeaf(initial_layer(layers, span, init, share_memory=share_memory), family)
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
        # by distance, too, whether or not an attention loss wants it: the order in which modules run stays one
        by_distance_HR = shared.distance_bias("encoder", mask_BS)
        inputs = StackInputs(shared.self_bias("encoder", mask_BS), distance_bias_HR=by_distance_HR)
        source_BSD = shared.embed("encoder", batch.source_BS)
        target_mask_BT = batch.labels_BT != -100
        # an example without targets only fills a micro-batch up: it counts nowhere
        counted_BS = mask_BS & target_mask_BT.any(1, keepdim=True)
        teacher_BSD, student_BSD, same = self._run_stack(
            "encoder", draw, source_BSD, None, None, True, inputs, counted_BS, counted_BS, outputs, capture
        )
        teacher_BSD = shared.finish("encoder", teacher_BSD)
        student_BSD = teacher_BSD if draw is None else shared.finish("encoder", student_BSD)

        # padding needs no mask: it stands behind every target token, where the causal mask hides it
        ones_1T = torch.ones_like(target_mask_BT[:1])
        by_distance_HR = shared.distance_bias("decoder", ones_1T)
        inputs = StackInputs(shared.self_bias("decoder", ones_1T), shared.cross_bias(mask_BS), by_distance_HR)
        target_BTD = shared.embed("decoder", shared.decoder_inputs(batch.labels_BT))
        teacher_BTD, student_BTD, _ = self._run_stack(
            "decoder",
            draw,
            target_BTD,
            teacher_BSD,
            student_BSD,
            same,
            inputs,
            target_mask_BT,
            mask_BS,
            outputs,
            capture,
        )
        if draw is None:
            return outputs
        labels_N = batch.labels_BT[target_mask_BT]
        with torch.no_grad():
            teacher_ND = shared.finish("decoder", teacher_BTD[target_mask_BT])
        student_ND = shared.finish("decoder", student_BTD[target_mask_BT])
        if wanted is None:
            with torch.no_grad():
                teacher_logits_NV = shared.logits(teacher_ND)
            return replace(
                outputs,
                student_logits_NV=shared.logits(student_ND),
                teacher_logits_NV=teacher_logits_NV,
                labels_N=labels_N,
            )
        needs_teacher = wanted.head.logit != 0
        head = shared.head.losses(
            student_ND,
            teacher_ND if needs_teacher else None,
            labels_N,
            wanted.head,
            wanted.upstream,
            eager=wanted.eager,
        )
        return replace(outputs, labels_N=labels_N, head=head)

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
        source_mask_BS: torch.Tensor,
        outputs: ModularOutputs,
        capture: bool,
    ) -> tuple[torch.Tensor, torch.Tensor, bool]:
        """(teacher state, student state, still the same) after the last layer; adds the pairs at span ends to the
        outputs.

        Args:
            same: the student has been the teacher so far; up to its first modular span it need not be computed.
        """
        spans = draw.tiling(stack).spans if draw is not None else self.spans[stack]
        used = {span for span in spans if span.num_layers > 1}
        replaced = {layer for span in used for layer in range(span.first, span.last + 1)}
        lasts = {span.last for span in used}
        ends: dict[Span, torch.Tensor] = {}
        maps: dict[Span, dict[str, QueriesKeys]] = {}
        teacher_maps: dict[int, dict[str, QueriesKeys]] = {}
        teacher_states = [embedded_BLD.detach()]
        student_BLD = embedded_BLD.detach().requires_grad_(torch.is_grad_enabled())
        for layer, teacher_leaf in enumerate(self.teacher[stack]):
            for span in (each for each in self.spans[stack] if each.first == layer):
                leaf = self.modular[stack][str(span)]
                if draw is None:
                    start_BLD = teacher_states[-1].detach().requires_grad_(torch.is_grad_enabled())
                    ends[span], maps[span] = leaf.run(start_BLD, teacher_encoded_BSD, True, inputs, capture)
                    continue
                if span in used and same:
                    student_BLD, same = _Splice.apply(student_BLD, teacher_states[-1]), False
                # an input that gets no gradient would keep DeepSpeed from releasing the leaf: what is not used is None
                encoded_BSD = student_encoded_BSD if span in used else None
                student_BLD, maps[span] = leaf.run(student_BLD, encoded_BSD, span in used, inputs, capture)
                if span in used:
                    ends[span] = student_BLD
            use = draw is not None and not same and layer not in replaced
            encoded_BSD = student_encoded_BSD if use else None
            teacher_BLD, student_BLD, teacher_maps[layer] = teacher_leaf(
                teacher_states[-1],
                student_BLD,
                teacher_encoded_BSD,
                encoded_BSD,
                use,
                inputs,
                capture and layer in lasts,
            )
            teacher_states.append(teacher_BLD)
        for span, end_BLD in ends.items():
            name = modular_name(stack, span)
            for kind, (query, key) in maps[span].items():
                outputs.attention[kind][name] = AttentionPair(
                    query,
                    key,
                    *teacher_maps[span.last][kind],
                    query_mask_BQ=mask_BL,
                    key_mask_BS=mask_BL if kind == "self" else source_mask_BS,
                    bias_HR=inputs.distance_bias_HR if kind == "self" else None,
                    causal=(stack, kind) == ("decoder", "self"),
                    scale=self.family.attentions(self.modular[stack][str(span)].layer)[kind].scale,
                )
            outputs.pairs[name] = HiddenPair(
                student_BTD=end_BLD,
                teacher_BTD=teacher_states[span.last + 1],
                mask_BT=mask_BL,
                start_BTD=teacher_states[span.first],
            )
        if same and draw is not None:
            student_BLD = _Splice.apply(student_BLD, teacher_states[-1])
        return teacher_states[-1], student_BLD, same
