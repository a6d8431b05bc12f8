"""The models of a run before it runs: built on the meta device, from settings alone, to be counted."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from data_prep.hub import local_folder
from pipeline.assemble import Baseline, baselines_of, one_granularity, theseus_settings
from pipeline.config import DistillConfig, Recipe
from pipeline.families import family_of, stored_weights, t5_config
from pipeline.families import sizes_of as model_sizes_of
from pipeline.footprint import Sizes, sizes_of
from pipeline.model import ModularLeaf, ModularModel, Sampler, TeacherLeaf
from pipeline.ordinary import HEAD, TIED, check_kind, check_shapes, empty_model
from pipeline.planning.public_models import public_config
from pipeline.pretrained import check_embedding, config_of, settings_of, shapes_in
from pipeline.spans import STACKS, ModelSizes, Stacks
from pipeline.training import DistilledModel, full_model_task
from pipeline.weights import weight_files


@dataclass(frozen=True)
class Planned:
    """What a recipe's models will be."""

    recipe: Recipe
    settings: dict[str, Any]
    """The teacher's, as in its config.json."""
    has_own_head: bool
    """The head is not tied to the embedding."""
    source: str
    """Where the settings come from, for people."""
    folder: Path | None = None
    """Where they were read, if they were."""

    @staticmethod
    def of(recipe: Recipe) -> Planned:
        """Read the teacher's settings, or take those of the public model of that name where it is not here.

        Raises:
            ValueError: not here, and no public model.
        """
        name = recipe.teacher.folder
        if not name:
            config = t5_config(recipe.data.vocab_size, dataclasses.asdict(recipe.teacher.architecture))
            return Planned(recipe, config.to_dict(), False, "trained from scratch")
        try:
            folder = local_folder(name)
            if not (folder / "config.json").is_file():
                raise FileNotFoundError(folder)
        except FileNotFoundError:
            settings = public_config(name)
            source = f"{name} (not here: sizes of the public model)"
            return Planned(recipe, settings, settings.get("tie_word_embeddings") is False, source)
        config_of(folder)  # refuses what does not fit
        settings = settings_of(folder)
        check_kind(folder, settings)
        return Planned(recipe, settings, _has_own_head(folder, settings), name, folder)

    @property
    def stacks(self) -> Stacks:
        """Layers of the teacher, and the spans that get a modular layer."""
        return self.recipe.distill.stacks(family_of(self.settings["model_type"]).depths(self.settings))

    @property
    def baselines(self) -> list[Baseline]:
        return baselines_of(self.recipe, self.stacks)

    def model(self, num_layers: tuple[int, int] | None = None) -> PreTrainedModel:
        """The teacher, or a model of its kind with other numbers of layers, as it trains, without memory for its
        weights."""
        family = family_of(self.settings["model_type"])
        counts = zip(STACKS, num_layers or self.stacks.num_layers, strict=True)
        settings = family.with_layers(self.settings, {stack: range(count) for stack, count in counts})
        model: Any = empty_model(settings, Path(self.source))
        if self.has_own_head:  # transformers ties until weights are loaded
            model.lm_head.weight = nn.Parameter(torch.empty_like(model.lm_head.weight))
        family.prepare_for_training(model)
        return model

    @cached_property
    def teacher_sizes(self) -> Sizes:
        """The teacher while it trains."""
        task = full_model_task(self.model())
        return self._counted(task.module, task.leaf_classes)

    @cached_property
    def distill_sizes(self) -> Sizes:
        """Teacher and modular layers of stage distill."""
        return self.modular_sizes(self.recipe.distill)

    def modular_sizes(self, settings: DistillConfig) -> Sizes:
        """Teacher and modular layers as these settings have them."""
        model = self.model()
        family = family_of(model.config.model_type)
        modular = ModularModel(model, family, settings.by_stack, settings.init, share_memory=True)
        sizes = self._counted(modular, [TeacherLeaf, ModularLeaf])
        if settings.local_steps == settings.optim.num_steps:
            return sizes
        sampler = Sampler(settings, seed=self.recipe.seed, stacks=modular.stacks)
        return dataclasses.replace(sizes, draws=sampler.dearest())

    def baseline_sizes(self, baseline: Baseline) -> Sizes:
        """What the training of a baseline holds."""
        if baseline.method == "theseus":
            return self.modular_sizes(theseus_settings(self.recipe, one_granularity(baseline.assembly)))
        assembly = baseline.assembly
        task = full_model_task(self.model((assembly.encoder.num_layers, assembly.decoder.num_layers)))
        wrapped: Any = task.module
        module = DistilledModel(wrapped.model, self.model()) if baseline.method == "logit" else task.module
        return self._counted(module, task.leaf_classes)

    def _counted(self, module: nn.Module, leaf_classes: Sequence[type[nn.Module]]) -> Sizes:
        data = self.recipe.data
        longest = data.max_source_tokens, data.max_target_tokens
        return dataclasses.replace(sizes_of(module, leaf_classes), longest=longest)

    def checkpoint_sizes(self) -> ModelSizes:
        """Of the teacher and of every assembly, as folders in fp32."""
        model = self.model()
        family = family_of(model.config.model_type)
        return model_sizes_of(stored_weights(model, family), family)


def _has_own_head(folder: Path, settings: dict[str, Any]) -> bool:
    """Whether a model's head is not its embedding: by its weights, as settings that transformers saves do not say."""
    files = weight_files(folder)
    if not files:
        return settings.get("tie_word_embeddings") is False
    names = shapes_in(folder)
    return HEAD in names and any(name.endswith(("shared.weight", "embed_tokens.weight")) for name in names)


def check_fit(planned: Planned, folder: Path) -> None:
    """Hold the names and shapes that a teacher's weights announce against its settings.

    Raises:
        ValueError: a layer is missing or left over, a weight has another shape, or a file is damaged.
    """
    found = shapes_in(folder)
    if found:
        family = family_of(planned.settings["model_type"])
        check_shapes(planned.model(), family, found, f"teacher.folder {folder}")
        check_embedding(folder, planned.settings, found)
        if (
            planned.settings.get(TIED) is False and HEAD not in found
        ):  # transformers 4 would draw it, 5 take the embedding
            raise ValueError(f"{folder} lacks {HEAD}, which its config.json says is not the embedding ({TIED} false)")
