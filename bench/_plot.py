"""A figure that grows with something, as a small SVG. Pure: a `Plot` in, text out.

The x axis is logarithmic with a tick at each value that was measured; the y axis begins at 0.
"""

from __future__ import annotations

import math
from typing import NamedTuple
from xml.sax.saxutils import escape


class Plot(NamedTuple):
    title: str
    x: str  # what the axes measure
    y: str
    lines: dict[str, list[tuple[float, float]]]  # each line's points, in order of x


WIDTH, HEIGHT = 640, 320
LEFT, RIGHT, TOP, BOTTOM = 70, 160, 36, 48  # margins; the lines' names stand in the right one
COLOURS = ("#1f6feb", "#d1471f", "#2a8a3e", "#8250df", "#946b00", "#57606a")


def svg(plot: Plot) -> str:
    """The drawing, as a file's text."""
    xs = sorted({x for points in plot.lines.values() for x, _ in points})
    step = round_step(max(y for points in plot.lines.values() for _, y in points))
    top = 5 * step
    low, high = math.log(xs[0]), math.log(xs[-1])

    def at_x(x: float) -> float:
        share = (math.log(x) - low) / (high - low) if high > low else 0.5
        return round(LEFT + share * (WIDTH - LEFT - RIGHT), 1)

    def at_y(y: float) -> float:
        return round(HEIGHT - BOTTOM - y / top * (HEIGHT - TOP - BOTTOM), 1)

    drawn = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="sans-serif" font-size="12" fill="#24292f">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>',
        _text(LEFT, 20, plot.title, "start", weight="bold"),
        _text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 10, plot.x),
        f'<g transform="rotate(-90)">{_text(-(TOP + HEIGHT - BOTTOM) / 2, 14, plot.y)}</g>',
    ]
    for n in range(6):
        y = at_y(n * step)
        drawn.append(f'<path d="M{LEFT} {y}H{WIDTH - RIGHT}" stroke="#d0d7de"/>')
        drawn.append(_text(LEFT - 8, y + 4, _number(n * step), "end"))
    drawn += [_text(at_x(x), HEIGHT - BOTTOM + 18, _number(x)) for x in xs]
    ends = _apart([at_y(points[-1][1]) for points in plot.lines.values()])
    for (name, points), end, colour in zip(plot.lines.items(), ends, COLOURS):
        way = " ".join(f"{at_x(x)},{at_y(y)}" for x, y in points)
        drawn.append(f'<polyline points="{way}" fill="none" stroke="{colour}" stroke-width="2"/>')
        drawn += [
            f'<circle cx="{at_x(x)}" cy="{at_y(y)}" r="3" fill="{colour}"/>' for x, y in points
        ]
        drawn.append(_text(WIDTH - RIGHT + 10, end + 4, name, "start", colour=colour))
    return "\n".join([*drawn, "</svg>", ""])


def round_step(most: float) -> float:
    """A fifth of the axis: the least of 1, 2, 2.5, 5 times a power of ten that has room for all."""
    if most <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(most / 5))
    return next(n * power for n in (1, 2, 2.5, 5, 10) if 5 * n * power >= most)


def _number(value: float) -> str:
    """Without an exponent, however large."""
    return f"{value:,.0f}" if value == round(value) else f"{value:,g}"


def _apart(heights: list[float], least: float = 14) -> list[float]:
    """The names' heights: each at its line's end, but none over another."""
    placed = list(heights)
    lowest = -math.inf
    for n in sorted(range(len(placed)), key=placed.__getitem__):
        lowest = placed[n] = max(placed[n], lowest + least)
    return placed


def _text(
    x: float, y: float, text: str, anchor: str = "middle", colour: str = "", weight: str = ""
) -> str:
    extra = f' fill="{colour}"' if colour else ""
    extra += f' font-weight="{weight}"' if weight else ""
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}"{extra}>{escape(text)}</text>'
