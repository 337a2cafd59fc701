"""Plots as SVG text: readable on a phone, in light and dark, without a script."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Final

Points = Sequence[tuple[float, float]]

WIDTH: Final = 420
HEIGHT: Final = 280
LEFT: Final = 58
BOTTOM: Final = 44
TOP: Final = 14
RIGHT: Final = 14
COLOURS: Final = ("#3b82c4", "#e0892b", "#3f9d63", "#c2506b", "#7d6bc7", "#8a7a4d", "#2f9aa0")


@dataclass(frozen=True)
class Axis:
    """One axis: title, range and scale; on a logarithmic one both ends are positive; ``marked`` has ticks."""

    title: str
    low: float
    high: float
    logarithmic: bool = False
    marked: bool = True

    def share(self, value: float) -> float:
        """Where a value lies between the ends, 0 to 1; outside ones are moved to the edge."""
        low, high, at = self.low, self.high, value
        if self.logarithmic:
            low, high, at = math.log10(low), math.log10(high), math.log10(max(value, low))
        return min(1.0, max(0.0, (at - low) / (high - low) if high > low else 0.5))

    def ticks(self) -> list[float]:
        """Round numbers from end to end."""
        if not self.marked:
            return []
        if self.logarithmic:
            first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
            factors = (1, 2, 5) if last - first <= 3 else (1,)
            numbers = [f * 10.0**power for power in range(first, last + 1) for f in factors]
            return [number for number in numbers if self.low <= number <= self.high]
        raw = (self.high - self.low) / 4 or 1.0
        unit = 10.0 ** math.floor(math.log10(raw))
        step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= raw)
        first = math.ceil(self.low / step - 1e-9)
        return [step * index for index in range(first, math.floor(self.high / step + 1e-9) + 1)]


@dataclass
class Plot:
    """Marks between two axes; ``x`` and ``y`` of the marks are in their units."""

    title: str
    x: Axis
    y: Axis
    _marks: list[str] = field(default_factory=list)
    _legend: list[tuple[str, str]] = field(default_factory=list)

    def dots(self, points: Points, colour: str, name: str = "", radius: float = 2.2) -> None:
        """Scatter points."""
        for x, y in points:
            at = f'cx="{self._x(x):.1f}" cy="{self._y(y):.1f}"'
            self._marks.append(f'<circle {at} r="{radius}" fill="{colour}" fill-opacity="0.75"/>')
        self._name(name, colour)

    def line(self, points: Points, colour: str, name: str = "", dashed: bool = False) -> None:
        """A line through points."""
        path = " ".join(f"{self._x(x):.1f},{self._y(y):.1f}" for x, y in points)
        dash = ' stroke-dasharray="5 4"' if dashed else ""
        self._marks.append(
            f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.8"{dash}/>'
        )
        self._name(name, colour)

    def bar(self, x: float, width: float, height: float, colour: str) -> None:
        """A bar from the bottom, ``width`` in units of the axis."""
        left, right, top = self._x(x - width / 2), self._x(x + width / 2), self._y(height)
        base = HEIGHT - BOTTOM
        size = f'width="{right - left:.1f}" height="{max(0.0, base - top):.1f}"'
        self._marks.append(f'<rect x="{left:.1f}" y="{top:.1f}" {size} fill="{colour}"/>')

    def text(self, x: float, y: float, content: str, anchor: str = "start") -> None:
        """Words at a point."""
        place = f'x="{self._x(x):.1f}" y="{self._y(y) - 4:.1f}" text-anchor="{anchor}"'
        self._marks.append(f'<text {place} class="mark">{escape(content)}</text>')

    def svg(self) -> str:
        """The plot as one element with its legend below."""
        parts = [f"<figcaption>{escape(self.title)}</figcaption>"]
        parts.append(f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(self.title)}">')
        parts += [*self._grid(), *self._marks, "</svg>"]
        legend = "".join(
            f'<span><i style="background:{colour}"></i>{escape(name)}</span>' for name, colour in self._legend
        )
        return f"<figure>{''.join(parts)}<p class='legend'>{legend}</p></figure>"

    def _name(self, name: str, colour: str) -> None:
        if name:
            self._legend.append((name, colour))

    def _x(self, value: float) -> float:
        return LEFT + self.x.share(value) * (WIDTH - LEFT - RIGHT)

    def _y(self, value: float) -> float:
        return HEIGHT - BOTTOM - self.y.share(value) * (HEIGHT - BOTTOM - TOP)

    def _grid(self) -> list[str]:
        base, middle = HEIGHT - BOTTOM, (HEIGHT - BOTTOM + TOP) / 2
        lines = []
        for tick in self.x.ticks():
            x = self._x(tick)
            lines.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{base}" class="grid"/>')
            lines.append(f'<text x="{x:.1f}" y="{base + 15}" text-anchor="middle">{tick:g}</text>')
        for tick in self.y.ticks():
            y = self._y(tick)
            lines.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" class="grid"/>')
            lines.append(f'<text x="{LEFT - 5}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>')
        across, title = f'x="{(WIDTH + LEFT) / 2}" y="{HEIGHT - 6}"', escape(self.x.title)
        lines.append(f'<text {across} text-anchor="middle" class="title">{title}</text>')
        up = f'transform="translate(12 {middle}) rotate(-90)"'
        lines.append(f'<text {up} text-anchor="middle" class="title">{escape(self.y.title)}</text>')
        return lines
