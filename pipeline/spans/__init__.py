"""Which layers stand for which, in integers alone: spans, tilings, assemblies, their sizes, and the best of them."""

from __future__ import annotations

from pipeline.spans.prefixes import walk
from pipeline.spans.sizes import ModelSizes
from pipeline.spans.solve import Budget, Cost, Shape, best_assemblies, best_of, pareto_front, shape_of
from pipeline.spans.spans import (
    PRESETS,
    STACKS,
    Assembly,
    Span,
    Tiling,
    coarsest_assembly,
    count_tilings,
    kept_layers,
    modular_spans,
    preset_assembly,
    pure_tiling,
    refuse_misfit,
    teacher_assembly,
)

__all__ = [
    "PRESETS",
    "STACKS",
    "Assembly",
    "Budget",
    "Cost",
    "ModelSizes",
    "Shape",
    "Span",
    "Tiling",
    "best_assemblies",
    "best_of",
    "coarsest_assembly",
    "count_tilings",
    "kept_layers",
    "modular_spans",
    "pareto_front",
    "preset_assembly",
    "pure_tiling",
    "refuse_misfit",
    "shape_of",
    "teacher_assembly",
    "walk",
]
