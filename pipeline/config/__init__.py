"""What a run is told: one recipe of typed, frozen settings, and the command line that reads it."""

from pipeline.config.cli import (
    parse_recipe,
    recipe_parser,
    recipe_yaml,
    run_program,
    settings_parser,
    with_recipe_paths,
)
from pipeline.config.kinds import fields_of_kind, identity_of
from pipeline.config.recipe import (
    COARSEST,
    CROSSED,
    PURE,
    QUANTIZATIONS,
    SAMPLED,
    SAMPLERS,
    SEARCHED,
    BatchConfig,
    DistillConfig,
    LaunchConfig,
    LoopConfig,
    LossConfig,
    OptimConfig,
    Recipe,
)
from pipeline.config.search import SearchConfig
