"""The picture of a study."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.pictures import as_png, new_figure
from pipeline.study.lines import EQUAL, FULL, RECOVERED, Line

LABELS = {
    EQUAL: "a rival each, equal cost in all",
    FULL: "a rival each, at full cost",
    RECOVERED: "modular, trained further",
}


def picture_of(tables: Mapping[int, Sequence[Line]]) -> bytes:
    """Two panels for each budget, the second where rivals were trained at full cost.

    The share of the teacher's BLEU that each side keeps, over the ratio. And the same over how many sizes are wanted,
    for as much as one modular run costs: each of so many rivals has its part of that.
    """
    panels = [(budget, lines, draw) for budget, lines in tables.items() for draw in (_over_ratios, _over_sizes_wanted)]
    drawn = [each for each in panels if each[2] is _over_ratios or any(line.both for line in each[1])]
    figure, all_axes = new_figure(len(drawn), figsize=(5.5 * len(drawn), 4))
    for axes, (budget, lines, draw) in zip(all_axes, drawn, strict=True):
        draw(axes, lines)
        axes.set(title=f"{budget:,} steps", ylabel="% of the teacher's BLEU")
        axes.legend()
    return as_png(figure, dpi=150)


def _over_ratios(axes: Any, lines: Sequence[Line]) -> None:
    kept = [line.kept for line in lines]
    spread = [[e.value - e.low for e in kept], [e.high - e.value for e in kept]]
    axes.errorbar([line.ratio for line in lines], [e.value for e in kept], spread, marker="o", label="modular run")
    for side, label in LABELS.items():
        points = [(line.ratio, line.share(line.rivals[side][1])) for line in lines if side in line.rivals]
        if points:
            axes.plot(*zip(*points, strict=True), marker="s", linestyle="--", label=label)
    axes.set(xlabel="times fewer layers")


def _over_sizes_wanted(axes: Any, lines: Sequence[Line]) -> None:
    """Where a ratio's two lines cross, one modular run begins to be the cheaper."""
    for line in lines:
        if line.both is None:
            continue
        wanted = 1.0, line.flops["modular"] / line.flops[EQUAL]
        shares = line.share(line.both.full), line.share(line.both.equal)
        (drawn,) = axes.plot(wanted, shares, marker="s", linestyle="--", label=f"{line.ratio:g}x: a rival each")
        own = [line.share(line.both.modular)] * 2
        axes.plot(wanted, own, color=drawn.get_color(), label=f"{line.ratio:g}x: modular run")
    axes.set_xscale("log", base=2)
    axes.set_xticks([1, 2, 4, 8], ["1", "2", "4", "8"])
    axes.set(xlabel="sizes wanted, for the cost of one modular run")
