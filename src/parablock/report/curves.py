"""SVG of a comparison: eval loss of several runs against rounds, seconds and bytes."""

from __future__ import annotations

from collections.abc import Sequence
from math import floor, isfinite, log10

from parablock.printable import as_html
from parablock.report.figures import loss_points
from parablock.report.reading import RunRecord

COLORS = [
    *("#3366cc", "#dc3912", "#109618", "#990099", "#ff9900"),
    *("#0099c6", "#7a4a2a", "#dd4477", "#66aa00", "#444444"),
]
DASHES = ("", "6 3", "2 3", "10 3 2 3")
"""Patterns of lines: the first curves are whole, and each further round of the colors has the next one."""
AXES = {"rounds": "rounds", "seconds": "seconds", "bytes": "MB over all links"}
PANEL, GAP, LEFT, TOP, HEIGHT = 300, 55, 55, 20, 220


def curves_svg(runs: Sequence[RunRecord]) -> str:
    """Draw the eval loss of every run, from the base model's on, in one panel for each x axis."""
    curves = [
        [point for point in loss_points(run, "eval_loss") if point["loss"] is not None and isfinite(point["loss"])]
        for run in runs
    ]
    losses = [point["loss"] for curve in curves for point in curve] or [0.0]
    low, high = min(losses), max(losses)
    high = high if high > low else low + 1.0
    parts = [_panel(number, axis, curves, low, high) for number, axis in enumerate(AXES)]
    below = TOP + HEIGHT + 50
    for number, run in enumerate(runs):
        x, y = LEFT + 180 * (number % 5), below + 18 * (number // 5)
        parts.append(
            f'<line x1="{x}" y1="{y - 4}" x2="{x + 18}" y2="{y - 4}" {stroke(number)} stroke-width="3"/>'
            f'<text x="{x + 24}" y="{y}">{as_html(run.name)}</text>'
        )
    width, height = LEFT + 3 * (PANEL + GAP), below + 18 * (1 + (len(runs) - 1) // 5)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
        f'font-size="12"><title>Eval loss of {len(runs)} runs</title>'
        f'<rect width="{width}" height="{height}" fill="white"/>{"".join(parts)}</svg>\n'
    )


def _panel(number: int, axis: str, curves: Sequence[Sequence[dict[str, float]]], low: float, high: float) -> str:
    left = LEFT + number * (PANEL + GAP)
    unit = 1e6 if axis == "bytes" else 1.0
    most = max((point[axis] / unit for curve in curves for point in curve), default=0.0) or 1.0

    def place(x: float, y: float) -> tuple[float, float]:
        return left + PANEL * x / most, TOP + HEIGHT * (high - y) / (high - low)

    parts = [f'<rect x="{left}" y="{TOP}" width="{PANEL}" height="{HEIGHT}" fill="none" stroke="#aaa"/>']
    for tick in ticks(0.0, most):
        x, y = place(tick, low)
        parts.append(f'<text x="{x:.1f}" y="{y + 16:.1f}" text-anchor="middle">{tick:g}</text>')
    for tick in ticks(low, high):
        x, y = place(0.0, tick)
        parts.append(f'<text x="{x - 6:.1f}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for run, curve in enumerate(curves):
        points = " ".join("{:.1f},{:.1f}".format(*place(point[axis] / unit, point["loss"])) for point in curve)
        parts.append(f'<polyline points="{points}" fill="none" {stroke(run)} stroke-width="2"/>')
    middle = left + PANEL / 2
    parts.append(f'<text x="{middle}" y="{TOP + HEIGHT + 32}" text-anchor="middle">{AXES[axis]}</text>')
    return "".join(parts)


def ticks(low: float, high: float) -> list[float]:
    """Return a few round numbers between two values."""
    step = 10 ** floor(log10(high - low))
    step *= next(factor for factor in (0.2, 0.5, 1.0, 2.0) if (high - low) / (factor * step) <= 6)
    first = -floor(-low / step)
    return [round(k * step, 10) for k in range(first, floor(high / step + 1e-9) + 1)]


def stroke(number: int) -> str:
    """Return the attributes of a curve's line: its color, and dashes where another curve has that color."""
    dashes = DASHES[number // len(COLORS) % len(DASHES)]
    return f'stroke="{COLORS[number % len(COLORS)]}"' + (f' stroke-dasharray="{dashes}"' if dashes else "")
