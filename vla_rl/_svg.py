"""Small charts as SVG text, coloured by the style sheet of the page that they stand in."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

WIDTH, HEIGHT = 380, 236
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 10, 40


@dataclass(frozen=True)
class Series:
    """One line of a chart.

    Attributes:
        name: what the legend says.
        x: positions.
        y: values; NaN is left out.
        intervals: (low, high) for every value, drawn as error bars, or empty.
        kind: which colour and marker, 0 to 5.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    intervals: Sequence[tuple[float, float]] = ()
    kind: int = 0

    def points(self) -> list[tuple[float, float, tuple[float, float] | None]]:
        """(x, y, interval) of every finite value."""
        spans = self.intervals or [None] * len(self.x)
        return [(x, y, s) for x, y, s in zip(self.x, self.y, spans, strict=True) if math.isfinite(y)]


@dataclass
class Axis:
    """A linear or logarithmic axis between two pixels."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False
    ticks: list[tuple[float, str]] = field(default_factory=list)

    def __call__(self, value: float) -> float:
        """Pixel of a value."""
        low, high = (math.log10(self.low), math.log10(self.high)) if self.log else (self.low, self.high)
        at = math.log10(max(value, self.low)) if self.log else value
        return self.start + (self.end - self.start) * (at - low) / ((high - low) or 1.0)


def line_chart(
    series: Sequence[Series],
    *,
    title: str,
    x_label: str = "",
    x_names: Sequence[str] = (),
    y_range: tuple[float, float] | None = None,
    log: bool = False,
) -> str:
    """A chart with markers, error bars and a legend; empty text where there is no finite value.

    Args:
        series: the lines.
        title: read out by screen readers, and printed above.
        x_label: below the axis.
        x_names: names of the positions 0, 1, 2, ..., instead of numbers.
        y_range: limits; by default those of the values.
        log: logarithmic y, where the values are positive and more than tenfold apart.
    """
    points = [point for line in series for point in line.points()]
    if not points:
        return ""
    values = [y for _, y, _ in points] + [bound for _, _, span in points if span for bound in span]
    log = log and 0 < 10 * min(values) < max(values)
    xs = [x for x, _, _ in points]
    x_axis = _x_axis(min(xs), max(xs), x_names)
    y_axis = _y_axis(*(y_range or (min(values), max(values))), log=log, exact=y_range is not None)
    parts = [f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y_axis(v):.1f}" y2="{y_axis(v):.1f}"/>'
             f'<text class="tick" x="{LEFT - 6}" y="{y_axis(v) + 4:.1f}" text-anchor="end">{escape(t)}</text>'
             for v, t in y_axis.ticks]  # fmt: skip
    bottom = HEIGHT - BOTTOM
    for value, text in x_axis.ticks:
        for row, line in enumerate(text.split("\n")):
            parts.append(
                f'<text class="tick" x="{x_axis(value):.1f}" y="{bottom + 15 + 12 * row}" text-anchor="middle">'
                f"{escape(line)}</text>"
            )
    if x_label:
        parts.append(
            f'<text class="label" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 6}" text-anchor="middle">'
            f"{escape(x_label)}</text>"
        )
    parts += [_line(line, x_axis, y_axis) for line in series]
    legend = "".join(f"<li>{_key(line.kind)}{escape(line.name)}</li>" for line in series if line.points())
    legend = f'<ul class="legend">{legend}</ul>' if len(series) > 1 else ""
    return (
        f'<figure class="chart"><figcaption>{escape(title)}</figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">{"".join(parts)}</svg>'
        f"{legend}</figure>"
    )


def interval_bar(rate: float, low: float, high: float, *, kind: int = 0, width: int = 96) -> str:
    """A rate on [0, 1] as a dot, and its interval as a line."""
    at = [4 + (width - 8) * value for value in (low, high, rate)]
    return (
        f'<svg class="bar s{kind}" viewBox="0 0 {width} 12" width="{width}" height="12" aria-hidden="true">'
        f'<line class="track" x1="4" x2="{width - 4}" y1="6" y2="6"/>'
        f'<line class="span" x1="{at[0]:.1f}" x2="{at[1]:.1f}" y1="6" y2="6"/>'
        f'<circle cx="{at[2]:.1f}" cy="6" r="4"/></svg>'
    )


def _line(line: Series, x_axis: Axis, y_axis: Axis) -> str:
    drawn = [(x_axis(x), y_axis(y), span) for x, y, span in line.points()]
    path = " ".join(f"{'L' if i else 'M'}{x:.1f} {y:.1f}" for i, (x, y, _) in enumerate(drawn))
    parts = [f'<path class="line" d="{path}"/>']
    for x, _, span in drawn:
        if span:
            low, high = y_axis(span[0]), y_axis(span[1])
            ends = f"M{x - 4:.1f} {low:.1f}h8M{x - 4:.1f} {high:.1f}h8"
            parts.append(f'<path class="error" d="M{x:.1f} {low:.1f}V{high:.1f}{ends}"/>')
    if len(drawn) <= 40:
        parts += [_marker(x, y, line.kind) for x, y, _ in drawn]
    return f'<g class="s{line.kind}">{"".join(parts)}</g>'


def _marker(x: float, y: float, kind: int) -> str:
    shapes = (
        "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0Z",
        "M-3.6-3.6h7.2v7.2h-7.2Z",
        "M0-4.8L4.6 3.4H-4.6Z",
        "M0-5L5 0L0 5L-5 0Z",
    )
    return f'<path class="mark" transform="translate({x:.1f} {y:.1f})" d="{shapes[kind % len(shapes)]}"/>'


def _key(kind: int) -> str:
    """A line's marker, for the legend: who does not tell the colours apart can tell the shapes."""
    return f'<svg class="key s{kind}" viewBox="-6 -6 12 12" width="13" height="13">{_marker(0, 0, kind)}</svg>'


def _x_axis(low: float, high: float, names: Sequence[str]) -> Axis:
    if names:
        margin = 0.3 if len(names) > 1 else 0.5
        axis = Axis(-margin, len(names) - 1 + margin, LEFT, WIDTH - RIGHT)
        axis.ticks = [(float(i), name) for i, name in enumerate(names)]
        return axis
    if low == high:
        low, high = low - 0.5, high + 0.5
    axis = Axis(min(low, 0.0), high, LEFT, WIDTH - RIGHT - 8)
    axis.ticks = [(tick, short(tick)) for tick in nice_ticks(axis.low, axis.high)]
    return axis


def _y_axis(low: float, high: float, *, log: bool, exact: bool) -> Axis:
    if log:
        low, high = 10 ** math.floor(math.log10(low)), 10 ** math.ceil(math.log10(high) + 1e-9)
        decades = range(round(math.log10(low)), round(math.log10(high)) + 1)
        return Axis(low, high, HEIGHT - BOTTOM, TOP, log, [(10.0**d, short(10.0**d)) for d in decades])
    if low == high:
        low, high = low - (abs(low) or 1) * 0.1, high + (abs(high) or 1) * 0.1
    if not exact:
        low, high = low - 0.06 * (high - low), high + 0.06 * (high - low)
    ticks = [(tick, short(tick)) for tick in nice_ticks(low, high)]
    pad = 6 if exact else 0
    return Axis(low, high, HEIGHT - BOTTOM - pad, TOP + pad, ticks=ticks)


def nice_ticks(low: float, high: float, *, count: int = 5) -> list[float]:
    """About `count` round numbers (1, 2 or 5 times a power of ten apart) within [low, high]."""
    raw = (high - low) / count
    power = 10 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def short(value: float) -> str:
    """A tick's text: `40k`, `1.5M`, `0.02`, `1e-05`."""
    for limit, suffix in ((1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:.4g}{suffix}"
    if value and abs(value) < 1e-3:
        return f"{value:.0e}"
    return f"{value:.4g}"
