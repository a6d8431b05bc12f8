"""Which layers stand for which, in integers alone: spans, tilings, assemblies, their sizes, and the best of them."""

from pipeline.spans.paths import students_of
from pipeline.spans.prefixes import walk
from pipeline.spans.sizes import ModelSizes
from pipeline.spans.solve import Budget, Cost, Shape, best_assemblies, best_of, costs_of_sizes, pareto_front, shape_of
from pipeline.spans.spans import (
    PRESETS,
    STACKS,
    Assembly,
    Span,
    Tiling,
    count_tilings,
    kept_layers,
    modular_spans,
    pure_tiling,
)
from pipeline.spans.stacks import Stacks
