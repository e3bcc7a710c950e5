"""Draws charts as SVG text.

The colors are CSS variables of the page: ``--ink``, ``--faint``, ``--c0``, ``--c1`` and ``--c2``.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import NamedTuple

import numpy as np

_WIDTH, _HEIGHT = 420, 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 24, 12, 40
_LEVELS = 24


class Line(NamedTuple):
    """A line of a chart: a label, and the coordinates of its points."""

    label: str
    x: Sequence[float] | np.ndarray
    y: Sequence[float] | np.ndarray


def heatmap(matrix: np.ndarray, largest: float, title: str) -> str:
    """Draws a matrix as squares in an ``<svg>`` element; a larger absolute value is darker.

    Args:
        matrix: (n, m) the matrix.
        largest: The absolute value that has the full color.
        title: The description of the picture.

    Example:
        >>> heatmap(np.eye(2), 1.0, "identity").count("<path")
        1
    """
    n, m = matrix.shape
    share = np.abs(matrix) / largest if largest > 0 else np.zeros(matrix.shape)
    levels = np.rint(_LEVELS * share.clip(0, 1)).astype(int)
    paths = []
    for level in range(1, _LEVELS + 1):
        cells = "".join(f"M{j} {i}h1v1h-1z" for i, j in np.argwhere(levels == level))
        if cells:
            opacity = level / _LEVELS
            paths.append(f'<path d="{cells}" fill="var(--c0)" fill-opacity="{opacity:.3f}"/>')
    frame = f'<rect width="{m}" height="{n}" fill="none" stroke="var(--faint)" stroke-width=".1"/>'
    return (
        f'<svg viewBox="0 0 {m} {n}" role="img" aria-label="{escape(title)}" '
        f'shape-rendering="crispEdges">{"".join(paths)}{frame}</svg>'
    )


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
    return _svg(parts, [k.label for k in kept], _HEIGHT)


def dot_chart(
    rows: Sequence[tuple[str, Sequence[float]]], labels: Sequence[str], x_label: str
) -> str:
    """Draws the values of each row as dots on a common logarithmic axis, in an ``<svg>`` element.

    Args:
        rows: The name and the values of each row; values that are not positive are omitted.
        labels: The labels of the values, at most three.
        x_label: The label of the axis.

    Example:
        >>> dot_chart([("a", [0.1, 1.0])], ["measured", "bound"], "change").count("<circle")
        4
    """
    height = _TOP + _BOTTOM + 22 * len(rows)
    left = _LEFT + 110
    across = _Axis(np.array([x for _, xs in rows for x in xs]), True, left, _WIDTH - _RIGHT)
    parts = [_ticks_below(across, height, x_label)]
    for i, (name, values) in enumerate(rows):
        y = _TOP + 22 * i + 11
        parts.append(f'<text x="{left - 8}" y="{y + 4}" text-anchor="end">{escape(name)}</text>')
        at = [across.at(v) if np.isfinite(v) and v > 0 else None for v in values]
        known = [a for a in at if a is not None]
        if known:
            parts.append(
                f'<line x1="{min(known):.1f}" x2="{max(known):.1f}" y1="{y}" y2="{y}" '
                'stroke="var(--faint)"/>'
            )
        # The first value is the smallest dot, on top, so that equal values show as rings.
        parts += [
            f'<circle cx="{a:.1f}" cy="{y}" r="{3.5 + j}" fill="var(--c{j})"/>'
            for j, a in reversed(list(enumerate(at)))
            if a is not None
        ]
    return _svg(parts, list(labels), height)


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
    middle = (_HEIGHT - _BOTTOM + _TOP) / 2
    parts.append(
        f'<text transform="translate(12 {middle}) rotate(-90)" text-anchor="middle">'
        f"{escape(y_label)}</text>"
    )
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


def _svg(parts: Sequence[str], labels: Sequence[str], height: int) -> str:
    legend, x = [], float(_LEFT)
    for i, label in enumerate(labels):
        legend.append(
            f'<circle cx="{x:.0f}" cy="{height + 8}" r="4.5" fill="var(--c{i})"/>'
            f'<text x="{x + 9:.0f}" y="{height + 12}">{escape(label)}</text>'
        )
        x += 34 + 6.5 * len(label)
    return (
        f'<svg viewBox="0 0 {_WIDTH} {height + 20}" role="img" '
        f'font-size="11">{"".join(parts)}{"".join(legend)}</svg>'
    )
