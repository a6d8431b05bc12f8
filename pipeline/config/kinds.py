"""Settings by what changing them means."""

from __future__ import annotations

import dataclasses
from typing import Any


def fields_of_kind(config: Any, kind: str, prefix: str = "") -> dict[str, Any]:
    """Values of all fields of a settings dataclass that are marked `kind`, by dotted name."""
    return {name: value for name, value, _ in _fields(config, kind, prefix)}


def identity_of(config: Any) -> dict[str, Any]:
    """The identity fields, without those that say what was done before there was such a field."""
    return {name: value for name, value, before in _fields(config, "identity", "") if value != before}


def _fields(config: Any, kind: str, prefix: str) -> list[tuple[str, Any, Any]]:
    """(dotted name, value, value before there was such a field)."""
    found: list[tuple[str, Any, Any]] = []
    for each in dataclasses.fields(config):
        value = getattr(config, each.name)
        if dataclasses.is_dataclass(value):
            found += _fields(value, kind, f"{prefix}{each.name}.")
        elif each.metadata.get("kind") == kind:
            found.append((prefix + each.name, _lists(value), _lists(each.metadata["before"])))
    return found


def _lists(value: Any) -> Any:
    """Tuples, at any depth, as the lists that JSON makes of them."""
    return [_lists(each) for each in value] if isinstance(value, tuple) else value
