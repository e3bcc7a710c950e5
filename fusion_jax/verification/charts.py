"""Draws charts as SVG text.

The colors are CSS variables of the page: ``--card``, ``--soft``, ``--faint``, ``--c0``, ``--c1``
and ``--c2``.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import NamedTuple

import numpy as np

_WIDTH, _HEIGHT = 340, 220
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 20, 14, 40
_LEVELS = 24
_ROW, _LETTER = 22, 6.2
Number = int | float


class Line(NamedTuple):
    """A line of a chart: a label, and the coordinates of its points."""

    label: str
    x: Sequence[float] | np.ndarray
    y: Sequence[float] | np.ndarray


def heatmap(matrix: np.ndarray, largest: float, labels: tuple[str, str], title: str) -> str:
    """Draws a matrix as squares with a color bar, in an ``<svg>`` element.

    A larger absolute value has a stronger color: ``--c0`` above zero, ``--c1`` below.

    Args:
        matrix: (n, m) the matrix.
        largest: The absolute value that has the full color.
        labels: The labels of the rows and of the columns, which are numbered from 1.
        title: The description of the picture.

    Example:
        >>> heatmap(np.eye(2), 1.0, ("row", "column"), "identity").count("<path")
        1
    """
    n, m = matrix.shape
    left, right, side = 38, 78, _WIDTH - 38 - 78
    share = matrix / largest if largest > 0 else np.zeros(matrix.shape)
    levels = np.rint(_LEVELS * share.clip(-1, 1)).astype(int)
    size = side / max(n, m)
    width, height = size * m, size * n
    squares = []
    for level in range(-_LEVELS, _LEVELS + 1):
        cells = "".join(f"M{j} {i}h1v1h-1z" for i, j in np.argwhere(levels == level))
        if cells and level:
            squares.append(f'<path d="{cells}" {_level_color(level)}/>')
    parts = [
        f'<g transform="translate({left} {_TOP}) scale({size:.4f})" shape-rendering="crispEdges">'
        f"{''.join(squares)}</g>",
        _outline(left, _TOP, width, height),
    ]
    for i in _numbered(n):
        y = _TOP + size * (i - 0.5) + 4
        parts.append(f'<text x="{left - 4}" y="{y:.1f}" text-anchor="end">{i}</text>')
    for j in _numbered(m):
        x = left + size * (j - 0.5)
        parts.append(
            f'<text x="{x:.1f}" y="{_TOP + height + 13:.1f}" text-anchor="middle">{j}</text>'
        )
    parts.append(_upright(escape(labels[0]), 10, _TOP + height / 2))
    parts.append(
        f'<text x="{left + width / 2:.1f}" y="{_TOP + height + 29:.1f}" text-anchor="middle">'
        f"{escape(labels[1])}</text>"
    )
    lowest = -_LEVELS if (matrix < 0).any() else 0
    parts.append(_color_bar(lowest, largest, _WIDTH - right + 10, height))
    return _svg(parts, [], round(_TOP + height + 34), title)


def _numbered(count: int) -> range:
    """Returns which rows or columns have their number beside them."""
    step = next(s for s in (1, 2, 5, 10, 20, 50, 100, 10**9) if count <= 16 * s)
    return range(1 if step == 1 else step, count + 1, step)


def _level_color(level: int) -> str:
    color = "var(--c0)" if level > 0 else "var(--c1)"
    return f'fill="{color}" fill-opacity="{abs(level) / _LEVELS:.3f}"'


def _color_bar(lowest: int, largest: float, x: Number, height: float) -> str:
    """Draws the colors of the levels from the lowest to the highest, with numbers beside them."""
    count = _LEVELS - lowest
    step = height / count
    parts = [
        f'<rect x="{x}" y="{_TOP + i * step:.2f}" width="10" height="{step:.2f}" '
        f'{_level_color(_LEVELS - i)} shape-rendering="crispEdges"/>'
        for i in range(count)
    ]
    parts.append(_outline(x, _TOP, 10, height))
    for value in (1, 0.5, 0, -0.5, -1):
        if value * _LEVELS >= lowest:
            y = _TOP + (1 - value) * _LEVELS * step + 4
            parts.append(f'<text x="{x + 14}" y="{y:.1f}">{_number(value * largest)}</text>')
    return "".join(parts)


def _outline(x: Number, y: Number, width: Number, height: Number) -> str:
    return (
        f'<rect x="{x}" y="{y}" width="{width:.1f}" height="{height:.1f}" fill="none" '
        'stroke="var(--faint)"/>'
    )


def _upright(text: str, x: Number, y: Number) -> str:
    return (
        f'<text transform="translate({x} {y:.1f}) rotate(-90)" text-anchor="middle">{text}</text>'
    )


def _number(value: Number) -> str:
    return f"{value:.3g}".replace("e+0", "e").replace("e-0", "e-")


def line_chart(
    series: Sequence[Line], x_label: str, y_label: str, *, log_x: bool = False, log_y: bool = False
) -> str:
    """Draws a few lines with axes and a legend in an ``<svg>`` element.

    Args:
        series: At most three lines.
        x_label: The label of the x axis.
        y_label: The label of the y axis.
        log_x: Whether the x axis is logarithmic; it omits points with x <= 0.
        log_y: Whether the y axis is logarithmic; it omits points with y <= 0.

    Example:
        >>> line_chart([Line("a", [0.0, 1.0], [2.0, 3.0])], "x", "y").count("<polyline")
        1
    """
    kept = []
    for line in series:
        x, y = np.asarray(line.x, np.float64), np.asarray(line.y, np.float64)
        shown = np.isfinite(x) & np.isfinite(y) & ((x > 0) | (not log_x)) & ((y > 0) | (not log_y))
        kept.append(Line(line.label, x[shown], y[shown]))
    across = _Axis(np.concatenate([k.x for k in kept]), log_x, _LEFT, _WIDTH - _RIGHT)
    up = _Axis(np.concatenate([k.y for k in kept]), log_y, _HEIGHT - _BOTTOM, _TOP)
    parts = [_frame(across, up, x_label, y_label)]
    for i, line in enumerate(kept):
        points = " ".join(
            f"{across.at(a):.1f},{up.at(b):.1f}" for a, b in zip(line.x, line.y, strict=True)
        )
        dash = ' stroke-dasharray="6 3"' if i else ""
        parts.append(
            f'<polyline points="{points}" fill="none" stroke="var(--c{i})" stroke-width="2"{dash}/>'
        )
    return _svg(parts, [k.label for k in kept], _HEIGHT, f"{y_label} by {x_label}")


def dot_chart(
    rows: Sequence[tuple[str, Sequence[float]]],
    labels: Sequence[str],
    x_label: str,
    *,
    limit: float | None = None,
) -> str:
    """Draws the values of each row as dots on a common logarithmic axis, in an ``<svg>`` element.

    Args:
        rows: The name and the values of each row; values that are not positive are omitted.
        labels: The labels of the values, at most three.
        x_label: The label of the axis.
        limit: The part of the axis above this value is shaded, and dots there are hollow, except
            for those of the first value.

    Example:
        >>> dot_chart([("a", [0.1, 1.0])], ["measured", "bound"], "change").count("<circle")
        4
    """
    height = _TOP + _BOTTOM + _ROW * len(rows)
    names = [name if len(name) <= 24 else f"…{name[-23:]}" for name, _ in rows]
    left = round(10 + _LETTER * max(map(len, names), default=0))
    across = _Axis(np.array([x for _, xs in rows for x in xs]), True, left, _WIDTH - _RIGHT)
    parts = []
    if limit is not None and across.at(limit) < across.end:
        start = max(across.start, across.at(limit))
        parts.append(
            f'<rect x="{start:.1f}" y="{_TOP}" width="{across.end - start:.1f}" '
            f'height="{height - _BOTTOM - _TOP}" fill="var(--faint)" fill-opacity=".45"/>'
        )
    parts.append(_ticks_below(across, height, x_label))
    for i, (name, (_, values)) in enumerate(zip(names, rows, strict=True)):
        y = _TOP + _ROW * i + _ROW / 2
        parts.append(f'<text x="{left - 6}" y="{y + 4}" text-anchor="end">{escape(name)}</text>')
        shown = [(j, v, across.at(v)) for j, v in enumerate(values) if np.isfinite(v) and v > 0]
        if shown:
            ends = [at for _, _, at in shown]
            parts.append(
                f'<line x1="{min(ends):.1f}" x2="{max(ends):.1f}" y1="{y}" y2="{y}" '
                'stroke="var(--soft)"/>'
            )
        # The first value is the smallest dot, on top, so that equal values show as rings.
        for j, value, at in reversed(shown):
            hollow = j > 0 and limit is not None and value > limit
            fill = "var(--card)" if hollow else f"var(--c{j})"
            parts.append(
                f'<circle cx="{at:.1f}" cy="{y}" r="{3 + j}" fill="{fill}" '
                f'stroke="var(--c{j})" stroke-width="1.5"/>'
            )
    return _svg(parts, labels, height, x_label)


class _Axis:
    """Maps values to coordinates; axes end at ticks: powers of ten, or multiples of 1, 2 or 5."""

    def __init__(self, values: np.ndarray, log: bool, start: int, end: int):
        values = values[np.isfinite(values) & ((values > 0) | (not log))]
        low, high = (values.min(), values.max()) if values.size else (0.1, 1.0)
        self.log, self.start, self.end = log, start, end
        if log:
            low, high = np.log10(low), np.log10(high)
        span = float(high - low)
        if span <= 1e-9 * max(abs(low), abs(high), 1e-30):
            span = 1.0 if log else max(1.0, abs(float(low)))
        power = 10.0 ** np.floor(np.log10(span / 4))
        step = next(power * s for s in (1, 2, 5, 10) if span / (power * s) <= 5)
        self.step = float(max(1.0, np.ceil(step)) if log else step)
        self.low = self.step * float(np.floor(low / self.step))
        self.high = self.step * float(np.ceil(high / self.step))
        if self.high <= self.low:
            self.high = self.low + self.step

    def at(self, value: float) -> float:
        return self._coordinate(float(np.log10(value)) if self.log else value)

    def _coordinate(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self) -> list[tuple[float, str]]:
        count = round((self.high - self.low) / self.step)
        values = [self.low + i * self.step for i in range(count + 1)]
        texts = [f"{10.0**v if self.log else v:.4g}".replace("e+0", "e") for v in values]
        return [(self._coordinate(v), text) for v, text in zip(values, texts, strict=True)]


def _frame(across: _Axis, up: _Axis, x_label: str, y_label: str) -> str:
    parts = [_ticks_below(across, _HEIGHT, x_label)]
    for y, text in up.ticks():
        parts.append(
            f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}" '
            f'stroke="var(--faint)" stroke-width=".5"/>'
            f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{text}</text>'
        )
    parts.append(_upright(escape(y_label), 10, (_HEIGHT - _BOTTOM + _TOP) / 2))
    return "".join(parts)


def _ticks_below(across: _Axis, height: int, label: str) -> str:
    parts = []
    for x, text in across.ticks():
        parts.append(
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{height - _BOTTOM}" '
            f'stroke="var(--faint)" stroke-width=".5"/>'
            f'<text x="{x:.1f}" y="{height - _BOTTOM + 15}" text-anchor="middle">{text}</text>'
        )
    middle = (across.start + across.end) / 2
    parts.append(f'<text x="{middle}" y="{height - 6}" text-anchor="middle">{escape(label)}</text>')
    return "".join(parts)


def _svg(parts: Sequence[str], labels: Sequence[str], height: int, title: str) -> str:
    legend, x, y = [], 12.0, height + 8
    for i, label in enumerate(labels):
        width = 28 + _LETTER * len(label)
        if x > 12 and x + width > _WIDTH:
            x, y = 12.0, y + 18
        legend.append(
            f'<circle cx="{x:.0f}" cy="{y}" r="4.5" fill="var(--c{i})"/>'
            f'<text x="{x + 9:.0f}" y="{y + 4}">{escape(label)}</text>'
        )
        x += width
    bottom = y + 12 if labels else height
    return (
        f'<svg viewBox="0 0 {_WIDTH} {bottom}" role="img" aria-label="{escape(title)}" '
        f'font-size="11">{"".join(parts)}{"".join(legend)}</svg>'
    )
