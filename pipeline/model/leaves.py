"""The leaves of a modular model: one layer each, gathered by ZeRO-3 as a unit and called once a micro-batch.

Shapes: B examples, S source tokens, L tokens of the stack that a leaf is in, D model width.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from pipeline.families import Family, QueriesKeys, StackInputs, captured
from pipeline.spans import Span

CallLayer = Callable[..., torch.Tensor]
"""Family.call_layer, or what torch.compile makes of it."""


class _Leaf(nn.Module):
    """One layer, and the family that knows how to call it."""

    def __init__(self, layer: nn.Module, family: Family) -> None:
        super().__init__()
        self.layer = layer
        self.family = family
        self.compiled: CallLayer | None = None
        self.recompute = False
        """Whether the layer is computed again in backward, in which its leaf is gathered anyway."""

    def call_layer(self, *args: Any, capture: bool = False) -> torch.Tensor:
        """States after the layer, from those before it, the encoder's output and the inputs of the stack. What is to be
        captured is only met where the layer runs as it is."""
        call = self.family.call_layer if capture or self.compiled is None else self.compiled
        return checkpoint(call, self.layer, *args, use_reentrant=False) if self.recompute else call(self.layer, *args)


class TeacherLeaf(_Leaf):
    """One frozen teacher layer, for both passes."""

    def forward(
        self,
        teacher_BLD: torch.Tensor,
        student_BLD: torch.Tensor,
        teacher_encoded_BSD: torch.Tensor | None,
        student_encoded_BSD: torch.Tensor | None,
        use: bool,
        inputs: StackInputs,
        student_inputs: StackInputs,
        capture: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, QueriesKeys]]:
        """(teacher state after the layer, student state after the layer or, without `use`, as it was, the teacher's
        queries and keys if `capture`). The student's batch may be that of several students, one after the other; its
        encoded states and inputs are as many."""
        with torch.no_grad(), captured(self.family.attentions(self.layer), capture) as queries_keys:
            teacher_out_BLD = self.call_layer(teacher_BLD, teacher_encoded_BSD, inputs, capture=capture)
        if use:
            student_BLD = self.call_layer(student_BLD, student_encoded_BSD, student_inputs)
        else:
            student_BLD = student_BLD.view_as(student_BLD)
        return teacher_out_BLD, student_BLD, queries_keys


class ModularLeaf(_Leaf):
    """One trainable layer of the teacher's own type that stands for a span of its layers."""

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
            state_BLD = self.call_layer(state_BLD, encoded_BSD, inputs, capture=capture)
        if not capture:
            return state_BLD
        taken = [tensor for found in queries_keys.values() for tensor in found if tensor is not None]
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
        attentions = self.family.attentions(self.layer)
        for name, each in attentions.items():
            looked_at = encoded_BSD if name == "cross" and encoded_BSD is not None else state_BLD
            for each_BLD in (state_BLD, looked_at):
                shapes.append(torch.Size([*each_BLD.shape[:2], each.num_heads, each.width]))
            if each.bias is not None:
                shapes.append(torch.Size([2 * state_BLD.shape[1] - 1, each.num_heads]))
        parts = output.split([shape.numel() for shape in shapes])
        state_BLD, *rest = (part.view(shape) for part, shape in zip(parts, shapes, strict=True))
        taken = iter(rest)
        found = {
            name: QueriesKeys(next(taken), next(taken), next(taken) if each.bias is not None else None)
            for name, each in attentions.items()
        }
        return state_BLD, found


class Splice(torch.autograd.Function):
    """Value of the teacher, gradient of the student: where the student has been the teacher so far, it need not be
    computed twice, and its path back through the leaves stays whole."""

    @staticmethod
    def forward(ctx: Any, student_BLD: torch.Tensor, teacher_BLD: torch.Tensor) -> torch.Tensor:
        return teacher_BLD.clone()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grads[0], None


def initial_layer(layers: nn.ModuleList, span: Span, init: str, *, share_memory: bool = False) -> nn.Module:
    """What a modular layer starts from: a layer of the kind of the last of its span, with the weights of the "first",
    "middle" or "last" one (of two middle layers the earlier one), or their "average", parameter by parameter. With
    `share_memory` the weights of one layer are parameters of its own over that layer's memory.

    Raises:
        ValueError: no such start.
    """
    middle = (span.first + span.last) // 2
    sources = {"first": span.first, "middle": middle, "last": span.last, "average": span.last}
    if init not in sources:
        raise ValueError(f"unknown init {init!r}: choose from {', '.join(sources)}")
    weights = dict(layers[sources[init]].named_parameters())
    twins = {
        id(parameter): nn.Parameter(weights[name].data if share_memory else weights[name].data.clone())
        for name, parameter in layers[span.last].named_parameters()
    }
    layer = copy.deepcopy(layers[span.last], twins)
    if init == "average":
        for name, parameter in layer.named_parameters():
            each = [layers[i].get_parameter(name).data.float() for i in range(span.first, span.last + 1)]
            parameter.data = torch.stack(each).mean(0).to(parameter.dtype)
    return layer
