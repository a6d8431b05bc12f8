"""The assemblies that lose least under any budget, found on validation data."""

from pipeline.search.stage import check_budgets, search
