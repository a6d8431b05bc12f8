"""Figures as PNG; the only file that imports matplotlib."""

from __future__ import annotations

import io
from typing import Any


def new_figure(num_panels: int, **size: Any) -> tuple[Any, list[Any]]:
    """A figure of panels side by side, which share their y axis, and the axes of each."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, num_panels, sharey=True, layout="constrained", squeeze=False, **size)
    return figure, list(axes[0])


def as_png(figure: Any, dpi: int) -> bytes:
    """The file of a figure, which is closed."""
    from matplotlib import pyplot

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    pyplot.close(figure)
    return buffer.getvalue()
