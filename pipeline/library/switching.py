"""The module library in use: any assembly as a model to call, and all of them share one copy of the weights.

    library = ModuleLibrary.load(Path("RUN/teacher/model"), Path("RUN/distill/library"))
    model = library.assembly("e2x12-d6x4")
    model.generate(**tokenizer("summarize: ...", return_tensors="pt"))

A model from here is an ordinary Hugging Face model whose parameters are the library's own: making one takes
milliseconds and no memory to speak of, and as many may live at once as one likes. Nothing may train them or move them
to another device one by one; move the library, and make models anew after that.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel

from pipeline.families import family_of
from pipeline.library.export import check_library
from pipeline.pretrained import model_of
from pipeline.spans import STACKS, Assembly, Span, Stacks


class ModuleLibrary:
    """A teacher and its modular layers.

    Args:
        teacher: as transformers loads it; the library owns it from here on.
        weights: modular layers by `<stack>.<span>.<name in the layer>`; {} makes a library of teacher layers alone.
    """

    def __init__(self, teacher: PreTrainedModel, weights: Mapping[str, torch.Tensor]) -> None:
        self.teacher: Any = teacher.eval().requires_grad_(False)
        self.family = family_of(teacher.config.model_type)
        self._first = {stack: self.family.layers(teacher, stack)[0] for stack in STACKS}
        # by stack and span: a span of one layer is the teacher's, a longer one a modular layer
        self.layers: dict[str, dict[Span, nn.Module]] = {
            stack: {Span(i, i): layer for i, layer in enumerate(self.family.layers(teacher, stack))} for stack in STACKS
        }
        by_layer: dict[tuple[str, Span], dict[str, torch.Tensor]] = {}
        for name, weight in weights.items():
            stack, text, in_layer = name.split(".", 2)
            by_layer.setdefault((stack, Span.parse(text)), {})[in_layer] = weight
        for (stack, span), tensors in by_layer.items():
            layer = _view(self.layers[stack][Span(span.last, span.last)])  # of its kind, and in no first place
            layer.load_state_dict(tensors, assign=True)
            self.layers[stack][span] = layer.eval().requires_grad_(False)

    @staticmethod
    def load(
        teacher: Path, library: Path | None, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
    ) -> ModuleLibrary:
        """Read a teacher's folder and the module library that was trained over it, in the checkpoints' dtype or
        `dtype`. Without a library there are the teacher's layers alone.

        Raises:
            FileNotFoundError: no library there.
            ValueError: damaged, or of another teacher.
        """
        if library is not None:
            check_library(teacher, library)
        return ModuleLibrary.read(teacher, library, device=device, dtype=dtype)

    @staticmethod
    def read(
        teacher: Path, library: Path | None, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
    ) -> ModuleLibrary:
        """`load` after check_library, which reads both files whole."""
        weights = {} if library is None else load_file(library / "modular.safetensors")
        model = model_of(teacher, dtype)
        return ModuleLibrary(model, {name: weight.to(model.dtype) for name, weight in weights.items()}).to(device)

    def to(self, device: torch.device | str) -> ModuleLibrary:
        """Move all weights. Make models anew after a move: in those made before, the parameters that they share have
        moved, and the buffers have not."""
        self.teacher.to(device)
        for layers in self.layers.values():
            for layer in layers.values():
                layer.to(device)
        return self

    @property
    def stacks(self) -> Stacks:
        """The teacher's layers and the spans that have a modular layer."""
        encoder, decoder = (tuple(sorted(each for each in self.layers[s] if each.num_layers > 1)) for s in STACKS)
        num_layers = (len(self.layers["encoder"]) - len(encoder), len(self.layers["decoder"]) - len(decoder))
        return Stacks(num_layers, (encoder, decoder))

    def assembly(self, assembly: str | Assembly) -> PreTrainedModel:
        """The model of an assembly, given as such or in its text form, such as e2x3-d1x4.2.

        Raises:
            ValueError: not an assembly, or one of other depths or of spans that have no modular layer.
        """
        wanted = Assembly.parse(assembly) if isinstance(assembly, str) else assembly
        self.stacks.refuse_misfit(wanted)
        return self.model_of({stack: wanted.tiling(stack).spans for stack in STACKS})

    def model_of(self, spans: Mapping[str, Sequence[Span]]) -> PreTrainedModel:
        """The model of any layers in any order, by the spans that they stand for; they need not cover a stack."""
        model: Any = _view(self.teacher, leave=[self.family.layers(self.teacher, stack) for stack in STACKS])
        model.generation_config = copy.deepcopy(self.teacher.generation_config)
        self.family.set_layers(model, *(self._placed(stack, spans[stack]) for stack in STACKS))
        return model

    def _placed(self, stack: str, spans: Sequence[Span]) -> nn.ModuleList:
        layers = [_view(self.layers[stack][span]) for span in spans]
        for index, layer in enumerate(layers):
            self.family.place_layer(layer, index, self._first[stack])
        return nn.ModuleList(layers).eval()


def _view(module: nn.Module, leave: Sequence[nn.Module] = ()) -> Any:
    """A module of its own that shares every tensor with `module`, and as a whole the parts in `leave`."""
    if any(module is each for each in leave):
        return module
    view = copy.copy(module)
    for name in ("_parameters", "_buffers", "_forward_hooks", "_forward_pre_hooks"):
        setattr(view, name, copy.copy(getattr(module, name)))
    view._modules = {name: child if child is None else _view(child, leave) for name, child in module._modules.items()}
    return view
