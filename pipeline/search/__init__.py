"""The assemblies that lose least under any budget, found on validation data."""

from __future__ import annotations

from pipeline.search.stage import check_budgets, search

__all__ = ["check_budgets", "search"]
