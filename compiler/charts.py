"""Small SVG pictures for report.html. Colours are CSS variables of the page, so that they follow light and dark.

`--ink` text, `--faint` grid lines, `--plain` the baseline, `--accent` what is to be seen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape

WIDTH, HEIGHT = 720, 240
LEFT, RIGHT, TOP, BOTTOM = 56, 12, 16, 30
COLOURS = ("var(--plain)", "var(--accent)")

Value = float | None


def lines(blocks: Sequence[int], series: Sequence[tuple[str, Sequence[Value]]], unit: str = "block") -> str:
    """Values above 0 per block (or another unit) on a logarithmic axis, at most two series; None, 0 and what is not
    finite are gaps."""
    shown = [v for _, values in series for v in values if _drawn(v)]
    if not shown:
        return ""
    low, high = _decades(min(shown), max(shown))
    x = _across(blocks)

    def y(value: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (high - math.log10(value)) / (high - low)

    parts = [_rule(y(tick), _plain(tick)) for tick in _ticks(low, high)] + _numbers(blocks, x)
    for (name, values), colour in zip(series, COLOURS, strict=False):
        points = [(x(i), y(v), b, v) for i, (b, v) in enumerate(zip(blocks, values, strict=True)) if _drawn(v)]
        path = " ".join(f"{px:.1f},{py:.1f}" for px, py, _, _ in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        parts += [
            f'<circle cx="{px:.1f}" cy="{py:.1f}" r="3" fill="{colour}">'
            f"<title>{unit} {block}, {escape(name)}: {value:.3g}</title></circle>"
            for px, py, block, value in points
        ]
    legend = "".join(
        f'<span><i style="background:{colour}"></i>{escape(name)}</span>'
        for (name, _), colour in zip(series, COLOURS, strict=False)
    )
    return f'<p class="legend">{legend}</p>' + _svg(parts, WIDTH, HEIGHT)


def _drawn(value: Value) -> bool:
    return bool(value) and math.isfinite(value)


def bars(blocks: Sequence[int], values: Sequence[Value], text: Callable[[Value], str], unit: str = "block") -> str:
    """Values per block (or another unit) as bars from 0; `text` writes a value with its unit."""
    top = _round_up(max((v for v in values if v), default=0) or 1.0)
    x = _across(blocks)
    width = max(1.5, 0.62 * (WIDTH - LEFT - RIGHT) / len(blocks))
    span = HEIGHT - TOP - BOTTOM
    parts = [_rule(TOP + span * (1 - f), text(f * top)) for f in (0, 0.5, 1)] + _numbers(blocks, x)
    for i, (block, value) in enumerate(zip(blocks, values, strict=True)):
        tall = span * (value or 0) / top
        parts.append(
            f'<rect x="{x(i) - width / 2:.1f}" y="{TOP + span - tall:.1f}" width="{width:.1f}" height="{tall:.1f}" '
            f'fill="var(--accent)"><title>{unit} {block}: {escape(text(value))}</title></rect>'
        )
    return _svg(parts, WIDTH, HEIGHT)


def curve(points: Sequence[tuple[float, float]]) -> str:
    """One learning curve [[step, loss], ...] as a small picture: logarithmic, first and last value written."""
    wide, tall, edge = 150, 64, 6
    shown = [(step, loss) for step, loss in points if loss > 0]
    if len(shown) < 2:
        return ""
    steps, logs = [s for s, _ in shown], [math.log10(v) for _, v in shown]
    low, high = min(logs), max(logs)
    rise, run = (high - low) or 1, (steps[-1] - steps[0]) or 1
    path = " ".join(
        f"{edge + (wide - 2 * edge) * (s - steps[0]) / run:.1f},{edge + (tall - 2 * edge) * (high - v) / rise:.1f}"
        for s, v in zip(steps, logs, strict=True)
    )
    told = f"from {shown[0][1]:.3g} to {shown[-1][1]:.3g} in {steps[-1]:g} steps"
    line = f'<polyline points="{path}" fill="none" stroke="var(--accent)" stroke-width="1.5"><title>{told}</title>'
    return _svg([line + "</polyline>"], wide, tall)


def heat(names: Sequence[str], matrix: Sequence[Sequence[float]]) -> str:
    """Values from -1 to 1 of every name with every other: the stronger, the fuller; below 0 in the plain colour."""
    shown = [name if len(name) <= 22 else name[:21] + "…" for name in names]
    longest = max(map(len, shown))
    left, top, right = 16 + 7 * longest, 12 + 5 * longest, 5 * longest
    cell = min(64.0, (WIDTH - left - right) / len(names))
    size = min(11.0, 0.36 * cell)
    parts = []
    for i, (name, row) in enumerate(zip(shown, matrix, strict=True)):
        x, y = left + cell * (i + 0.5), top + cell * (i + 0.5)
        parts.append(f'<text x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{escape(name)}</text>')
        parts.append(f'<text transform="translate({x:.1f} {top - 8}) rotate(-40)">{escape(name)}</text>')
        for j, value in enumerate(row):
            colour, fill = COLOURS[value > 0], 0.5 * min(1.0, abs(value))
            parts.append(
                f'<rect x="{left + cell * j:.1f}" y="{y - cell / 2:.1f}" width="{cell - 1:.1f}"'
                f' height="{cell - 1:.1f}" fill="{colour}" fill-opacity="{fill:.3f}">'
                f"<title>{escape(names[i])}, {escape(names[j])}: {value:.3f}</title></rect>"
            )
            parts.append(
                f'<text x="{left + cell * (j + 0.5):.1f}" y="{y + size / 3:.1f}" text-anchor="middle"'
                f' style="fill:var(--ink);font-size:{size:.1f}px;pointer-events:none">{value:.2f}</text>'
            )
    return _svg(parts, WIDTH, math.ceil(top + cell * len(names)) + 14)


def tiles(blocks: Sequence[int], rows: Sequence[tuple[str, Sequence[int | None]]], unit: str) -> str:
    """A small number for every row and block, the larger, the fuller its tile; None is left empty."""
    longest = max(len(name) for name, _ in rows)
    left, tall = 16 + 7 * longest, 26
    cell = min(64.0, (WIDTH - left - RIGHT) / len(blocks))
    size = min(11.0, 0.6 * cell)
    most = max(value for _, values in rows for value in values if value is not None)
    parts = []
    for i, (name, values) in enumerate(rows):
        y = TOP + tall * i
        parts.append(f'<text x="{left - 8}" y="{y + tall / 2 + 4:.1f}" text-anchor="end">{escape(name)}</text>')
        for j, (block, value) in enumerate(zip(blocks, values, strict=True)):
            if value is None:
                continue
            x, fill = left + cell * j, 0.1 + 0.6 * value / most
            parts.append(
                f'<rect x="{x:.1f}" y="{y}" width="{cell - 1:.1f}" height="{tall - 1}" fill="var(--accent)"'
                f' fill-opacity="{fill:.2f}"><title>block {block}, {escape(name)}: {value} {unit}</title></rect>'
                f'<text x="{x + cell / 2:.1f}" y="{y + tall / 2 + size / 3:.1f}" text-anchor="middle"'
                f' style="fill:var(--ink);font-size:{size:.1f}px;pointer-events:none">{value}</text>'
            )
    every, below = math.ceil(len(blocks) / 20), TOP + tall * len(rows) + 16
    for j, block in enumerate(blocks):
        if j % every == 0:
            parts.append(f'<text x="{left + cell * (j + 0.5):.1f}" y="{below}" text-anchor="middle">{block}</text>')
    return _svg(parts, WIDTH, below + 8)


def _svg(parts: Sequence[str], width: int, height: int) -> str:
    return f'<svg viewBox="0 0 {width} {height}" role="img" xmlns="http://www.w3.org/2000/svg">{"".join(parts)}</svg>'


def _across(blocks: Sequence[int]) -> Callable[[int], float]:
    return lambda i: LEFT + (WIDTH - LEFT - RIGHT) * (i + 0.5) / len(blocks)


def _rule(y: float, text: str) -> str:
    line = f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="var(--faint)"/>'
    return line + f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{escape(text)}</text>'


def _numbers(blocks: Sequence[int], x: Callable[[int], float]) -> list[str]:
    every = math.ceil(len(blocks) / 20)
    return [
        f'<text x="{x(i):.1f}" y="{HEIGHT - 10}" text-anchor="middle">{block}</text>'
        for i, block in enumerate(blocks)
        if i % every == 0
    ]


def _decades(low: float, high: float) -> tuple[float, float]:
    """Bounds in log10 with a little room."""
    a, b = math.log10(low), math.log10(high)
    room = max(0.08 * (b - a), 0.1)
    return a - room, b + room


def _ticks(low: float, high: float) -> list[float]:
    """1, 2, 5 times powers of ten between the bounds; powers alone where these are enough, round steps where few."""
    powers = range(math.floor(low), math.ceil(high) + 1)
    steps = (1,) if high - low > 2.5 else (1, 2, 5)
    ticks = [m * 10.0**p for p in powers for m in steps]
    ticks = [t for t in ticks if low <= math.log10(t) <= high]
    if len(ticks) > 2:
        return ticks
    least = (10**high - 10**low) / 5
    power = 10.0 ** math.floor(math.log10(least))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= least)
    return [step * i for i in range(math.ceil(10**low / step), math.floor(10**high / step) + 1)]


def _plain(value: float) -> str:
    return f"{value:g}" if 1e-3 <= value < 1e4 else f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")


def _round_up(value: float) -> float:
    scale = 10.0 ** math.floor(math.log10(value))
    return next(m for m in (1, 1.5, 2, 3, 4, 5, 6, 8, 10) if m * scale >= value * (1 - 1e-9)) * scale
