"""The report of a run: a table in the terminal, scores.md, quality.png, and report.html, one self-contained file.

A report is only a view of what is published; it is drawn anew whenever it is asked for, in seconds.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from pipeline.config import Recipe
from pipeline.curves import write_summary
from pipeline.pictures import as_png, new_figure
from pipeline.report.data import SERIES, Line, Report, Row, count_text, frontier, load_report, series, size_of
from pipeline.report.page import bleu_axis, render_page
from pipeline.rundir import RunDir, write_atomic

WIDTH_WITHOUT_TERMINAL = 200
GROUPS = {"named": "by name", "finetuned": "fine-tuned", "engine": "engine", "peer": "other"}
COLUMNS = {  # name -> justification
    "asked by": "left",
    "asked": "right",
    "true": "right",
    "enc+dec": "left",
    "assembly": "left",
    "BLEU": "right",
    "\u00b1": "right",
    "% teacher": "right",
    "dropped": "right",
    "exact %": "right",
    "params": "right",
    "MB": "right",
    "ms": "right",
    "speed-up": "right",
    "tokens/s": "right",
}
LEFT_OUT_WHEN_NARROW = ("enc+dec", "\u00b1", "exact %", "params", "MB", "tokens/s")
TIMES: dict[str, Callable[[Row], float | None]] = {  # less is better
    "latency at batch 1 (ms)": lambda row: row.latency_ms,
    "time a token at full batch (\u00b5s)": lambda row: 1e6 / row.tokens_per_s if row.tokens_per_s else None,
}
MARKS = {  # series: (marker, colour)
    "teacher": ("*", "#111111"),
    "size-first": ("o", "#0b62a4"),
    "speed-first": ("^", "#c8500a"),
    "named": ("s", "#1b7f5c"),
    "dropped": ("x", "#777777"),
    "finetuned": ("D", "#97326f"),
    "searched": ("h", "#6a4bc4"),
    "engine": ("v", "#00737a"),
    "peer": ("P", "#7a5c00"),
}


def report(recipe: Recipe, run: RunDir) -> None:
    """Print the table and write RUN/report.

    Raises:
        FileNotFoundError: nothing has been evaluated.
    """
    data = load_report(recipe, run)
    folder = run.stage("report")
    write_atomic(folder / "scores.csv", run.scores.read_bytes())
    picture, table = quality_picture(data), markdown(data)
    write_atomic(folder / "quality.png", picture)
    write_atomic(folder / "scores.md", table)
    write_atomic(folder / "report.html", render_page(data))
    write_summary(run.tensorboard / "report", scalars(data), table, picture)
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDTH_WITHOUT_TERMINAL)
    print_table(data, console)
    for row in data.rows:
        if row.note:
            console.print(f"{row.name} {row.note}", soft_wrap=True, highlight=False, markup=False)
    console.print(f"report: {folder / 'report.html'}", soft_wrap=True, highlight=False, markup=False)


def scalars(data: Report) -> dict[str, float]:
    """Scores and costs by system, as TensorBoard's scalars."""
    found: dict[str, float] = {}
    for row in data.rows:
        values: dict[str, float | None] = {
            "bleu": row.bleu,
            "percent_of_teacher": row.percent,
            "latency_ms": row.latency_ms,
        }
        values |= {"tokens_per_s": row.tokens_per_s, "non_embedding_parameters": row.non_embedding_parameters}
        found |= {f"{name}/{row.name}": value for name, value in values.items() if value is not None}
    return found


def cells(line: Line) -> list[str]:
    """The texts of one table line, in the order of COLUMNS; +- is half the 95 % interval."""
    row = line.row
    return [
        GROUPS.get(line.group, line.group),
        f"{line.asked:g}" if line.asked else "",
        f"{row.ratio_layers:.2f}",
        row.layers,
        row.label,
        f"{row.bleu:.1f}",
        f"{(row.bleu_high - row.bleu_low) / 2:.1f}",
        f"{row.percent:.1f}" if row.percent is not None else "",
        f"{line.dropped.bleu:.1f}" if line.dropped else "",
        f"{row.scores['exact_match']:.1f}",
        count_text(row.parameters),
        f"{row.bytes / 1e6:.1f}",
        "" if row.latency_ms is None else f"{row.latency_ms:.1f}",
        "" if row.speedup is None else f"{row.speedup:.2f}",
        "" if row.tokens_per_s is None else f"{row.tokens_per_s:,.0f}",
    ]


def print_table(data: Report, console: Console) -> None:
    """The table for a terminal, one block for each preset; a narrow terminal gets fewer columns."""
    table = terminal_table(data, without=())
    if Measurement.get(console, console.options.update(max_width=1000), table).maximum > console.width:
        table = terminal_table(data, without=LEFT_OUT_WHEN_NARROW)
    console.print(table)


def terminal_table(data: Report, without: Sequence[str]) -> Table:
    table = Table(
        box=box.SIMPLE_HEAD,
        padding=0,
        title=f"{data.name}: {len(data.rows)} systems on {data.teacher.examples} test examples",
        caption="asked, true: ratio of layers; dropped: BLEU of teacher layers alone, no training;\n"
        "ms: median at batch 1 for as many tokens as the reference has",
    )
    shown = [name not in without for name in COLUMNS]
    for name, justify in itertools.compress(COLUMNS.items(), shown):
        table.add_column(name, justify="left" if justify == "left" else "right", no_wrap=True)
    for line, following in zip(data.lines, [*data.lines[1:], None], strict=True):
        style = {"teacher": "bold", "finetuned": "magenta"}.get(line.group)
        texts = [Text(text) for text in itertools.compress(cells(line), shown)]
        table.add_row(*texts, style=style, end_section=following is None or following.group != line.group)
    return table


def markdown(data: Report) -> str:
    """The same table in Markdown."""
    rules = [":--" if justify == "left" else "--:" for justify in COLUMNS.values()]
    lines = [list(COLUMNS), rules, *(cells(line) for line in data.lines)]
    return "".join("| " + " | ".join(text.replace("|", "\\|") for text in line) + " |\n" for line in lines)


def quality_picture(data: Report) -> bytes:
    """BLEU against size, latency and throughput, as PNG."""
    quantities = dict([size_of(data.rows)]) | TIMES
    figure, axes = new_figure(len(quantities), figsize=(17, 5.2))
    scale = bleu_axis(data.rows)
    values, places = zip(*scale.knots, strict=True)
    heights = [places[0] - place for place in places]
    to_height, to_bleu = partial(np.interp, xp=values, fp=heights), partial(np.interp, xp=heights, fp=values)
    for axis, (label, quantity) in zip(axes, quantities.items(), strict=True):
        measured = [row for row in data.rows if quantity(row) is not None]
        for name, rows in series(measured).items():
            _draw_series(axis, name, rows, [quantity(row) or 0.0 for row in rows])
        best = frontier(measured, quantity)
        axis.plot([quantity(row) for row in best], [row.bleu for row in best], "--", color="#888888", linewidth=1)
        axis.set_xlabel(label)
        axis.set_xlim(left=0)
        axis.set_yscale("function", functions=(to_height, to_bleu))
        axis.set_ylim(values[0], values[-1])
        axis.set_yticks(scale.ticks)
        axis.grid(alpha=0.25)
        if len(values) > 2:  # the lower part's scale is compressed
            axis.axhspan(values[0], values[1], color="#f1f3f4", zorder=0)
    axes[0].set_ylabel("BLEU (where shaded, its scale is compressed)" if len(values) > 2 else "BLEU")
    axes[0].xaxis.set_major_formatter(lambda value, _: count_text(value))
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    figure.suptitle(f"{data.name}: quality against size, latency and throughput")
    return as_png(figure, dpi=150)


def _draw_series(axis: Any, name: str, rows: list[Row], x: list[float]) -> None:
    marker, colour = MARKS[name]
    y = [row.bleu for row in rows]
    below = [max(0.0, row.bleu - row.bleu_low) for row in rows]
    above = [max(0.0, row.bleu_high - row.bleu) for row in rows]
    axis.errorbar(
        x,
        y,
        yerr=(below, above),
        label=SERIES[name],
        marker=marker,
        markersize=13 if name == "teacher" else 7,
        color=colour,
        linestyle="none",
        elinewidth=1,
        alpha=0.9,
        clip_on=False,
    )
