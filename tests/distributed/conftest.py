"""A small build of the built-in corpus, made once for all tests of data builds."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.builds import SMALL, build, write_recipe


@pytest.fixture(scope="session")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("recipe") / "recipe.yaml", SMALL)


@pytest.fixture(scope="session")
def built(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("built") / "data"
    result = build(recipe, out)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("data: train 1,380, validation 60, test 60 examples")
    return out
