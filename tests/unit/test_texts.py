"""What people read first: short sentences, and links that lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("data_prep", "ds_configs", "pipeline", "slurm", "tests")
BESIDE = [path.relative_to(ROOT).as_posix() for folder in FOLDERS for path in (ROOT / folder).glob("**/README.md")]
TEXTS = sorted({"README.md", "data_prep/FORMAT.md", "pipeline/spans/presets.md", *BESIDE})
DERIVATIONS = {"pipeline/kernels/README.md"}  # formulas and figures for those who change a kernel
MOST_WORDS = 25
NO_PROSE = re.compile(r"^( {4}|#|\|).*$", re.MULTILINE)  # code, headings, tables


def sentences_of(text: str) -> list[str]:
    """Prose in sentences; code within a line counts as one word, and so does a link's address as none."""
    text = re.sub(r"\]\([^)]*\)", "]", re.sub(r"`[^`]*`", "code", NO_PROSE.sub("", text)))
    paragraphs = re.split(r"\n\s*\n|^(?:-|\d+\.) ", text, flags=re.MULTILINE)
    return [each for paragraph in paragraphs for each in re.split(r"(?<=[.?!])\s", " ".join(paragraph.split()))]


@pytest.mark.parametrize("name", sorted({*TEXTS} - DERIVATIONS))
def test_sentences_stay_short(name: str) -> None:
    sentences = sentences_of((ROOT / name).read_text(encoding="utf-8"))
    counts = {each: len(re.findall(r"\w[\w.,'’-]*", each)) for each in sentences}
    assert {each: count for each, count in counts.items() if count > MOST_WORDS} == {}


def test_the_counter_counts() -> None:
    text = "# A\n\n    code is no prose\n\n1. One `a b c` two.\n2. See [this](x/y.md), 3.5 times. Four?\n"
    assert sentences_of(text)[-3:] == ["One code two.", "See [this], 3.5 times.", "Four?"]


@pytest.mark.parametrize("name", TEXTS)
def test_links_lead_somewhere(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)]+)\)", text):
        path, _, chapter = target.partition("#")
        linked = ((ROOT / name).parent / path).resolve() if path else ROOT / name
        assert linked.exists(), target
        if chapter:
            titles = re.findall(r"^#+ (.*)$", linked.read_text(encoding="utf-8"), re.MULTILINE)
            assert chapter in [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles], target


def test_the_first_page_links_every_other() -> None:
    links = set(re.findall(r"\]\(([^)#]+)", (ROOT / "README.md").read_text(encoding="utf-8")))
    assert {*TEXTS} - links == {"README.md"}
