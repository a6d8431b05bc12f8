"""What goes through the leaves of one stack: the teacher's state, and beside it the states of students.

A stream is the state of one or more draws whose paths agree so far. At a layer where they part, it becomes several. The
streams that use a leaf go through it together, put together along the batch: each leaf is called once a micro-batch,
however many draws share it. Where the path of a stream has been the teacher's so far, its value is the teacher's, and
nothing is computed.

Shapes: B examples, S source tokens, L tokens of the stack, D model width, U streams that use a leaf.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import nn

from pipeline.families import QueriesKeys, StackInputs
from pipeline.model.leaves import Splice
from pipeline.spans import Span, Tiling


@dataclass(frozen=True, kw_only=True)
class StackPass:
    """What one stack is run with, beside the draws."""

    stack: str
    embedded_BLD: torch.Tensor
    inputs: StackInputs
    mask_BL: torch.Tensor
    """Tokens of this stack that count."""
    source_mask_BS: torch.Tensor
    teacher_encoded_BSD: torch.Tensor | None = None
    """For the decoder: the last state of the encoder, as the teacher has it."""
    capture: bool = False
    """Hand out the queries and keys of the attentions."""


class StackLeaves(NamedTuple):
    """The leaves of one stack."""

    teacher: nn.ModuleList
    modular: Mapping[Span, Any]
    """The modular leaf of each span, in order of (first, last)."""


@dataclass(eq=False)
class Stream:
    """The state of the draws whose paths agree so far."""

    draws: tuple[int, ...]
    """Their places among the draws of the micro-batch."""
    state_BLD: torch.Tensor
    encoded_BSD: torch.Tensor | None = None
    """For the decoder: the last state of the encoder, as these draws have it."""
    is_teacher: bool = True
    """The path has been the teacher's so far: the state carries gradients, and its value is the teacher's state."""


class End(NamedTuple):
    """What comes out of a modular layer."""

    span: Span
    draws: tuple[int, ...]
    """That take the stream which this is of; (0,) in the local phase."""
    state_BLD: torch.Tensor
    maps: dict[str, QueriesKeys]
    """Queries and keys of its attentions, where they are captured."""


class StackRun(ABC):
    """One pass through one stack: every leaf once, in one order; what the students make of it is up to the phase."""

    def __init__(self, given: StackPass, leaves: StackLeaves) -> None:
        self.given = given
        self._leaves = leaves
        self.teacher_states: list[torch.Tensor] = [given.embedded_BLD.detach()]
        """Before the first layer, and after each."""
        self.teacher_maps: dict[int, dict[str, QueriesKeys]] = {}
        """Queries and keys of the teacher's layers, where they are captured."""
        self.ends: list[End] = []

    def run(self) -> None:
        """Through all layers."""
        for layer, teacher_leaf in enumerate(self._leaves.teacher):
            self._arrive(layer)
            for span, leaf in self._leaves.modular.items():
                if span.first == layer:
                    self._through_modular(span, leaf)
            teacher_BLD, self.teacher_maps[layer] = self._through_teacher(layer, teacher_leaf)
            self.teacher_states.append(teacher_BLD)
        self._leave()

    @abstractmethod
    def _arrive(self, layer: int) -> None:
        """Before the leaves that start at a layer."""

    @abstractmethod
    def _leave(self) -> None:
        """After the last leaf."""

    @abstractmethod
    def _through_modular(self, span: Span, leaf: Any) -> None:
        """Call a modular leaf."""

    @abstractmethod
    def _through_teacher(self, layer: int, leaf: Any) -> tuple[torch.Tensor, dict[str, QueriesKeys]]:
        """Call a teacher leaf; (the teacher's state after it, its queries and keys where they are captured)."""


class LocalRun(StackRun):
    """The local phase: every modular layer is given the teacher's own state at the start of its span."""

    def __init__(self, given: StackPass, leaves: StackLeaves) -> None:
        super().__init__(given, leaves)
        self._lasts = {span.last for span in leaves.modular}
        self._handed_BLD = start_of(given.embedded_BLD)

    def _arrive(self, layer: int) -> None:
        pass

    def _leave(self) -> None:
        pass

    def _through_modular(self, span: Span, leaf: Any) -> None:
        given, start_BLD = self.given, start_of(self.teacher_states[-1])
        end = leaf.run(start_BLD, given.teacher_encoded_BSD, True, given.inputs, given.capture)
        self.ends.append(End(span, (0,), *end))

    def _through_teacher(self, layer: int, leaf: Any) -> tuple[torch.Tensor, dict[str, QueriesKeys]]:
        given, capture = self.given, self.given.capture and layer in self._lasts
        teacher_BLD, self._handed_BLD, maps = leaf(
            self.teacher_states[-1], self._handed_BLD, given.teacher_encoded_BSD, None, False, given.inputs,
            given.inputs, capture,
        )  # fmt: skip
        return teacher_BLD, maps


class DrawnRun(StackRun):
    """The replacing phase: streams take the leaves that their draws name.

    Args:
        tilings: of this stack, by draw.
        streams: before the first layer; the first of them serves draw 0. After `run` they are those behind the last.
    """

    def __init__(
        self, given: StackPass, leaves: StackLeaves, tilings: Sequence[Tiling], streams: Sequence[Stream]
    ) -> None:
        super().__init__(given, leaves)
        self.streams = list(streams)
        self._starts = [{span.first: span for span in tiling.spans} for tiling in tilings]
        self._lasts = {span.last for tiling in tilings for span in tiling.spans if span.num_layers > 1}
        self._repeated: dict[int, StackInputs] = {1: given.inputs}
        self._encoded: dict[tuple[int, ...], torch.Tensor] = {}

    def _arrive(self, layer: int) -> None:
        """Part the streams whose draws take different spans from here on."""
        parted: list[Stream] = []
        for stream in self.streams:
            by_span: dict[Span | None, list[int]] = {}
            for draw in stream.draws:
                by_span.setdefault(self._starts[draw].get(layer), []).append(draw)
            parted += [replace(stream, draws=tuple(draws)) for draws in by_span.values()]
        self.streams = parted

    def _leave(self) -> None:
        for stream in self.streams:
            self._splice(stream)

    def _splice(self, stream: Stream) -> None:
        """Give a stream that has been the teacher so far the teacher's value; its path back stays whole."""
        if stream.is_teacher:
            stream.state_BLD = Splice.apply(stream.state_BLD, self.teacher_states[-1])

    def _taking(self, span: Span) -> list[Stream]:
        return [stream for stream in self.streams if self._starts[stream.draws[0]].get(span.first) == span]

    def _through_modular(self, span: Span, leaf: Any) -> None:
        users = self._taking(span)
        for stream in users:
            self._splice(stream)
            stream.is_teacher = False
        state_BLD, encoded_BSD, inputs = self._together(users)
        state_BLD, maps = leaf.run(state_BLD, encoded_BSD, bool(users), inputs, self.given.capture)
        self._apart(users, state_BLD)
        each_maps = {kind: found.chunk(len(users)) for kind, found in maps.items()}
        for place, stream in enumerate(users):
            own = {kind: parts[place] for kind, parts in each_maps.items()}
            self.ends.append(End(span, stream.draws, stream.state_BLD, own))

    def _through_teacher(self, layer: int, leaf: Any) -> tuple[torch.Tensor, dict[str, QueriesKeys]]:
        given, capture = self.given, self.given.capture and layer in self._lasts
        users = [stream for stream in self._taking(Span(layer, layer)) if not stream.is_teacher]
        state_BLD, encoded_BSD, inputs = self._together(users)
        teacher_BLD, state_BLD, maps = leaf(
            self.teacher_states[-1], state_BLD, given.teacher_encoded_BSD, encoded_BSD, bool(users), given.inputs,
            inputs, capture,
        )  # fmt: skip
        self._apart(users, state_BLD)
        return teacher_BLD, maps

    def _together(self, users: Sequence[Stream]) -> tuple[torch.Tensor, torch.Tensor | None, StackInputs]:
        """(state, encoder's output, biases) of all users; without any, the first stream's state, to be handed through.

        An input that gets no gradient would keep DeepSpeed from releasing the leaf: what is not used is None.
        """
        if not users:
            return self.streams[0].state_BLD, None, self.given.inputs
        if len(users) not in self._repeated:
            self._repeated[len(users)] = self.given.inputs.repeated(len(users))
        state_UBLD = together([stream.state_BLD for stream in users])
        return state_UBLD, self._encoded_of(users), self._repeated[len(users)]

    def _encoded_of(self, users: Sequence[Stream]) -> torch.Tensor | None:
        """The encoder's output as these streams have it, put together once for all leaves that they share."""
        encoded = [stream.encoded_BSD for stream in users if stream.encoded_BSD is not None]
        if len(encoded) < 2:
            return encoded[0] if encoded else None
        key = tuple(map(id, encoded))
        if key not in self._encoded:
            self._encoded[key] = together(encoded)
        return self._encoded[key]

    def _apart(self, users: Sequence[Stream], state_UBLD: torch.Tensor) -> None:
        """Hand each user, or the stream that was handed through, its state back."""
        through = users or self.streams[:1]
        for stream, state_BLD in zip(through, _parts(state_UBLD, len(through)), strict=True):
            stream.state_BLD = state_BLD


def start_of(state_BLD: torch.Tensor) -> torch.Tensor:
    """A state from which gradients are followed: what goes into a leaf must require them (see ModularLeaf)."""
    return state_BLD.detach().requires_grad_(torch.is_grad_enabled())


def together(states: Sequence[torch.Tensor]) -> torch.Tensor:
    """Tensors [B, ...] put together along the batch; one alone is not copied."""
    return torch.cat(list(states)) if len(states) > 1 else states[0]


def _parts(tensor: torch.Tensor, count: int) -> Sequence[torch.Tensor]:
    """Inverse of `together`."""
    return tensor.chunk(count) if count > 1 else (tensor,)
