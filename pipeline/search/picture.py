"""The picture of a search: loss on validation data against cost, every candidate and the front."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipeline.pictures import as_png, new_figure


@dataclass(frozen=True)
class Point:
    """One candidate of a search."""

    cost: float
    loss: float
    group: str
    """candidate, front, or the name of a preset."""


STYLES = {  # group: (marker, size, colour)
    "candidate": ("o", 10, "#b8b8b8"),
    "size-first": ("o", 36, "#0b62a4"),
    "speed-first": ("^", 36, "#c8500a"),
    "front": ("s", 20, "#1b7f5c"),
}


def front_picture(title: str, panels: Mapping[str, Sequence[Point]]) -> bytes:
    """Loss against each cost (the keys of `panels` are the labels of the axes), as PNG."""
    figure, axes = new_figure(len(panels), figsize=(6 * len(panels), 4.6))
    for axis, (label, points) in zip(axes, panels.items(), strict=True):
        for group, (marker, size, colour) in STYLES.items():
            own = sorted((point.cost, point.loss) for point in points if point.group == group)
            if not own:
                continue
            x, y = zip(*own, strict=True)
            axis.scatter(x, y, marker=marker, s=size, color=colour, label=group, zorder=2 if group == "front" else 1)
            if group == "front":
                axis.step(x, y, where="post", color=colour, linewidth=1)
        axis.set_xlabel(label)
        axis.set_xlim(left=0)
        axis.set_yscale("log")
        axis.grid(alpha=0.25)
    figure.axes[0].set_ylabel("validation loss (nats per token)")
    figure.axes[-1].legend(fontsize=9)
    figure.suptitle(title)
    return as_png(figure, dpi=130)
