"""report.html: one file that needs no network, drawn with inline SVG, for light and dark screens."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from pipeline.report.data import CHOICES, SERIES, Report, Row, count_text, frontier, series, size_of
from pipeline.scoring import METRICS
from pipeline.spans import PRESETS

TEMPLATE = "page.html.j2"
WIDTH, HEIGHT = 420, 350  # about the pixels that a chart gets in a row of three, so that its texts keep their size
LEFT, RIGHT, TOP, BOTTOM = 40, 12, 24, 46
LETTER = 7.5  # width, at most
SHAPES = {  # series -> outline around (0, 0), about 14 wide
    "teacher": "M0,-9L2.2,-3L8.6,-2.8L3.5,1.1L5.3,7.3L0,3.6L-5.3,7.3L-3.5,1.1L-8.6,-2.8L-2.2,-3Z",
    "size-first": "M-6.5,0A6.5,6.5 0 1 0 6.5,0A6.5,6.5 0 1 0 -6.5,0Z",
    "speed-first": "M0,-5.2L5,3.6L-5,3.6Z",
    "named": "M-5,-5H5V5H-5Z",
    "searched": "M-4,-5.5L4,-5.5L6.5,0L4,5.5L-4,5.5L-6.5,0Z",
    "dropped": "M-4.5,-4.5L4.5,4.5M-4.5,4.5L4.5,-4.5",
    "finetuned": "M0,-7L7,0L0,7L-7,0Z",
    "engine": "M0,6L6,-5L-6,-5Z",
    "peer": "M-2,-6H2V-2H6V2H2V6H-2V2H-6V-2H-2Z",
}
LABEL_GAP = 40  # between the labels of two points, in pixels


def render_page(data: Report) -> str:
    """The whole page; every text in it is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        undefined=jinja2.StrictUndefined,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"count": count_text, "number": number, "p_text": p_text}
    size_label, size = size_of(data.rows)
    charts = []
    for title, quantity, label, text_of in (
        ("Quality against size", size, size_label, count_text),
        ("Quality against latency", lambda row: row.latency_ms, "ms for one example at batch 1", "{:g}".format),
        (
            "Quality against throughput",
            lambda row: 1e6 / row.tokens_per_s if row.tokens_per_s else None,
            "microseconds a token at full batch",
            "{:g}".format,
        ),
    ):
        if any(quantity(row) is not None for row in data.rows):
            charts.append((title, scatter(data.rows, quantity, label, text_of)))
    return environment.get_template(TEMPLATE).render(
        data=data,
        charts=charts,
        metrics=[(name, label) for name, label in METRICS.items() if name != "bleu" and name in data.teacher.scores],
        legend=[(name, SERIES[name], mark(name)) for name in series(data.rows)],
        losses=loss_chart(data.losses) if data.losses else None,
    )


def number(value: float | None, digits: int = 1) -> str:
    """A number with so many decimals; empty when it was not measured."""
    return "" if value is None else f"{value:.{digits}f}"


def p_text(value: float | None) -> str:
    """A p-value; that of a difference that no resample reached says so."""
    return "\u2264 0.001" if value is not None and value <= 0.001 else number(value, 3)


@dataclass(frozen=True)
class Axis:
    """A scale that is linear between knots: (value, pixel) pairs in order of value. Two knots are an ordinary axis."""

    knots: Sequence[tuple[float, float]]
    ticks: Sequence[float]

    def __call__(self, value: float) -> float:
        for (v0, p0), (v1, p1) in zip(self.knots, self.knots[1:], strict=False):
            if value <= v1 or (v1, p1) == self.knots[-1]:
                return p0 + (value - v0) * (p1 - p0) / (v1 - v0)
        raise AssertionError("an axis has at least two knots")


def nice_ticks(low: float, high: float, count: int) -> list[float]:
    """Round values inside low..high, about `count` of them."""
    rough = (high - low) / max(1, count)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def bleu_axis(rows: Sequence[Row]) -> Axis:
    """BLEU from 0; where the assemblies all lie high, their part gets two thirds of the height."""
    bottom, top = HEIGHT - BOTTOM, TOP
    high = min(100.0, 5 * math.ceil(max(row.bleu_high for row in rows) / 5 + 0.2))
    low = 5.0 * math.floor(min(row.bleu_low for row in rows if row.kind in ("teacher", *CHOICES)) / 5 - 0.2)
    if low < 0.4 * high:
        return Axis(((0.0, bottom), (high, top)), nice_ticks(0, high, 6))
    broken = bottom - (bottom - top) / 3
    upper = [tick for tick in nice_ticks(low, high, 5) if tick > low]
    return Axis(((0.0, bottom), (low, broken), (high, top)), [0.0, 10.0 * round(low / 20), low, *upper])


def scatter(
    rows: Sequence[Row], quantity: Callable[[Row], float | None], label: str, text_of: Callable[[float], str]
) -> Markup:
    """BLEU against a quantity of the systems: 95 % intervals, a hover text on each point, the line of the best."""
    y = bleu_axis(rows)
    quantities = {row.name: found for row in rows if (found := quantity(row)) is not None}
    most = max(quantities.values()) * 1.04
    x = Axis(((0.0, LEFT), (most, WIDTH - RIGHT)), nice_ticks(0, most, 6))
    parts = [_frame(x, y, (label, "BLEU"), text_of)]
    if len(y.knots) > 2:
        level = y(y.knots[1][0])
        parts.append(
            Markup('<rect class="broken" x="{}" y="{}" width="{}" height="{}"/>').format(
                LEFT, _n(level), WIDTH - RIGHT - LEFT, _n(HEIGHT - BOTTOM - level)
            )
        )
    best = frontier(rows, quantity)
    path = " ".join(f"{_n(x(quantities[row.name]))},{_n(y(row.bleu))}" for row in best)
    parts.append(Markup('<polyline class="frontier" points="{}"/>').format(path))
    groups = series([row for row in rows if row.name in quantities])
    labelled: list[tuple[float, float]] = []
    labels: list[Markup] = []  # above all points
    for name in [
        each for each in ("dropped", "finetuned", "engine", "peer", "searched", "named", *PRESETS) if each in groups
    ]:
        for row in groups[name]:
            place = (x(quantities[row.name]), y(row.bleu))
            parts.append(_point(name, row, place, y))
            is_best = row in best and name in (*PRESETS, "searched", "named")
            if is_best and all(math.dist(place, other) > LABEL_GAP for other in labelled):
                labelled.append(place)
                ratio = f"{row.ratio_layers:.3g}\u00d7"
                labels.append(_text(place[0] - 9, place[1] - 7, ratio, f"{name} end"))
    for row in groups.get("teacher", []):
        parts.append(_point("teacher", row, (x(quantities[row.name]), y(row.bleu)), y))
    return _svg(f"BLEU against {label} of {len(quantities)} systems; the table below holds the numbers", parts + labels)


def describe(name: str, row: Row) -> str:
    """What one reads when pointing at a system."""
    share = f", {row.percent:.1f} % of the teacher" if row.percent is not None else ""
    parts = [
        f"{row.name} ({SERIES[name]}): {row.bleu:.1f} BLEU ({row.bleu_low:.1f} to {row.bleu_high:.1f}){share}",
        f"{row.layers} layers, {row.ratio_layers:.2f}\u00d7 fewer" if row.ratio_layers else f"{row.layers} layers",
        f"{count_text(row.non_embedding_parameters)} non-embedding parameters",
    ]
    if row.latency_ms is not None and row.speedup is not None:
        parts.append(f"{row.latency_ms:.1f} ms, {row.speedup:.2f}\u00d7 faster")
    if row.tokens_per_s is not None:
        parts.append(f"{row.tokens_per_s:,.0f} tokens/s at full batch")
    return "; ".join(parts)


def _point(name: str, row: Row, place: tuple[float, float], y: Axis) -> Markup:
    text = describe(name, row)
    return Markup(
        '<g class="{} point" tabindex="0" data-name="{}" aria-label="{}"><line x1="{x}" x2="{x}" y1="{}" y2="{}"/>'
        '<path transform="translate({x} {})" d="{}"/></g>'
    ).format(
        name, row.name, text, _n(y(row.bleu_low)), _n(y(row.bleu_high)), _n(place[1]), SHAPES[name], x=_n(place[0])
    )


def mark(name: str) -> Markup:
    """The shape of a series, for the legend."""
    return Markup(
        '<svg class="mark" viewBox="-10 -10 20 20" aria-hidden="true"><g class="{}"><path d="{}"/></g></svg>'
    ).format(name, SHAPES[name])


def loss_chart(losses: Mapping[str, list[tuple[int, float]]]) -> Markup:
    """Validation losses over the steps of the modular run, one line each, on a logarithmic axis."""
    values = [max(loss, 1e-6) for points in losses.values() for _, loss in points]
    low, high = math.log10(min(values)), math.log10(max(values))
    low, high = (low, high) if high - low > 0.05 else (low - 0.1, high + 0.1)
    y = Axis(((low, HEIGHT - BOTTOM - 8), (high, TOP + 8)), log_ticks(low, high))
    most = max(step for points in losses.values() for step, _ in points) or 1
    right = WIDTH - 12 - LETTER * max(map(len, losses))
    x = Axis(((0.0, LEFT), (float(most), right)), nice_ticks(0, most, 4))
    parts = [_frame(x, y, ("step", "nats"), "{:g}".format, y_text=lambda power: f"{10**power:.3g}", right=right)]
    ends = []
    for i, (name, points) in enumerate(losses.items()):
        path = " ".join(f"{_n(x(step))},{_n(y(math.log10(max(loss, 1e-6))))}" for step, loss in points)
        title = f"{name}: {points[-1][1]:.4g} after step {points[-1][0]}"
        parts.append(
            Markup('<g class="line-{} loss"><title>{}</title><polyline points="{}"/></g>').format(i % 6, title, path)
        )
        ends.append((y(math.log10(max(points[-1][1], 1e-6))), i, name))
    level = -math.inf
    for place, i, name in sorted(ends):
        level = max(place, level + 15)
        parts.append(_text(right + 6, level + 4, name, f"line-{i % 6} start"))
    return _svg("Validation losses over the steps of the modular run", parts)


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten inside low..high, with their 1, 2 and 5 times, as logarithms."""
    powers = range(math.floor(low), math.ceil(high) + 1)
    ticks = [power + math.log10(factor) for power in powers for factor in (1, 2, 5)]
    return [tick for tick in ticks if low <= tick <= high]


def _frame(
    x: Axis,
    y: Axis,
    labels: tuple[str, str],
    text_of: Callable[[float], str],
    y_text: Callable[[float], str] = "{:g}".format,
    right: float = WIDTH - RIGHT,
) -> Markup:
    """Grid lines, tick texts and the names of the axes, the horizontal one first."""
    parts = []
    for tick in y.ticks:
        place = _n(y(tick))
        parts.append(Markup('<line class="grid" x1="{}" x2="{}" y1="{y}" y2="{y}"/>').format(LEFT, _n(right), y=place))
        parts.append(_text(LEFT - 7, y(tick) + 4, y_text(tick), "end"))
    for tick in x.ticks:
        parts.append(_text(x(tick), HEIGHT - BOTTOM + 18, text_of(tick), "tick"))
    parts.append(_text((LEFT + right) / 2, HEIGHT - 6, labels[0], "axis"))
    parts.append(_text(0, TOP - 12, labels[1], "start"))
    return Markup("").join(parts)


def _text(x: float, y: float, text: str, css: str) -> Markup:
    return Markup('<text class="{}" x="{}" y="{}">{}</text>').format(css, _n(x), _n(y), text)


def _svg(label: str, parts: Iterable[Any]) -> Markup:
    return Markup('<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        WIDTH, HEIGHT, label, Markup("").join(parts)
    )


def _n(value: float) -> str:
    """A coordinate with as many digits as can be seen."""
    return f"{value:.1f}"
