"""Files and folders that are whole or absent, and what differs between two of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from data_prep.publish import is_kept_by_nfs, make_folder, publish_bytes


def write_atomic(path: Path, content: str | bytes) -> None:
    """Publish a file, and the folder that it lies in."""
    make_folder(path.parent)
    publish_bytes(path, content.encode() if isinstance(content, str) else content)


def check_empty(folder: Path, option: str) -> None:
    """Refuse to publish over what a user may want to keep.

    Raises:
        ValueError: something is there already; the message names the option that says where to.
    """
    if folder.is_file() or (folder.is_dir() and not all(map(is_kept_by_nfs, folder.iterdir()))):
        raise ValueError(f"{folder} is not empty: choose another folder for {option}")


def read_json(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file, or None when there is no such file.

    Raises:
        ValueError: it is no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): copy it again, or run the stage that wrote it again") from None


def difference(old: dict[str, Any], new: dict[str, Any]) -> str:
    """What differs between two settings, as `name: old -> new`; names inside of objects are joined by dots."""
    old, new = _flat(old), _flat(new)
    names = [name for name in sorted(old.keys() | new.keys()) if old.get(name) != new.get(name)]
    return ", ".join(f"{name}: {old.get(name)} -> {new.get(name)}" for name in names)


def _flat(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, each in value.items():
        flat |= _flat(each, f"{prefix}{key}.") if isinstance(each, dict) else {prefix + key: each}
    return flat
