"""The one word for each stage (standard library, Python 3.9: jobs read it too)."""

from __future__ import annotations

FORMER_NAMES = {"prepare": "data"}
"""Words that job names, logs, jobs.json and cluster files had for a stage until November 2026, and what it is called
now: they are still read, and never written."""


def stage_of(word: str) -> str:
    """The stage that a word means."""
    return FORMER_NAMES.get(word, word)


def words_for(stage: str) -> tuple[str, ...]:
    """All words that a run directory may have for a stage."""
    return stage, *(word for word, meant in FORMER_NAMES.items() if meant == stage)
