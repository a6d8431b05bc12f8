"""From the module library to plain Hugging Face folders: which are asked for, and how each is written."""

from pipeline.assemble.card import card_of, loading_of, scores_of, write_card, write_trimmed_card
from pipeline.assemble.requests import (
    Baseline,
    assembly_to_recover,
    baselines_of,
    check_granularities,
    one_granularity,
    requested_assemblies,
    stacks_of,
    theseus_settings,
)
from pipeline.assemble.stage import assemble
from pipeline.assemble.systems import ENGINE_PREFIX, System
from pipeline.assemble.write import Parts, write_checkpoint, write_converted
