"""The report's two figures as inline SVG: quality after each action, and how final scores are spread."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

COLOURS = 8  # the template defines .c0 to .c7, light and dark
DASHES = ("", "7 4", "2 3.5", "9 3 2 3", "12 4", "4 2", "1 3", "14 3 3 3")


@dataclass(frozen=True, slots=True)
class Series:
    """One line or one row of a figure."""

    label: str
    style: int  # colour, dash and marker; equal labels keep theirs over all figures
    values: tuple[float, ...]


def curves(series: Sequence[Series], quality: str, title: str) -> Markup:
    """Mean quality (0 to 1) after 0, 1, ... actions: a line each, named where it ends."""
    left, top, height = 34.0, 14.0, 250.0
    room = min(100 + 7.0 * max(len(line.label) for line in series), 270)  # for the names at the right
    width = 560 - left - room
    horizon = max(1, max(len(line.values) for line in series) - 1)

    def at(k: int, value: float) -> tuple[float, float]:
        return left + k * width / horizon, top + (1 - value) * height

    out = [_open(left + width + room, top + height + 44, title)]
    for tick in range(6):
        _, y = at(0, tick / 5)
        out.append(f'<path class="grid" d="M{left:g} {y:g}h{width:g}"/>')
        out.append(f'<text class="tick" x="{left - 8:g}" y="{y + 4:g}" text-anchor="end">{tick / 5:.1f}</text>')
    step = max(1, round(horizon / 10))
    for k in range(0, horizon + 1, step):
        x, y = at(k, 0)
        out.append(f'<text class="tick" x="{x:g}" y="{y + 18:g}" text-anchor="middle">{k}</text>')
    out.append(
        f'<text class="name" x="{left + width / 2:g}" y="{top + height + 38:g}" text-anchor="middle">actions</text>'
    )
    out.append(f'<text class="name" x="{left + 6:g}" y="{top + 4:g}">{escape(quality)}</text>')
    ends = []
    for line in series:
        points = [at(k, value) for k, value in enumerate(line.values)]
        path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
        dash = DASHES[line.style % len(DASHES)]
        out.append(f'<path class="line c{line.style % COLOURS}" stroke-dasharray="{dash}" d="{path}"/>')
        if horizon <= 20:
            out += [_marker(line.style, x, y) for x, y in points]
        ends.append(points[-1])
    for line, (x, y), label in zip(series, ends, _spread([y for _, y in ends], 19.0, top, top + height), strict=True):
        out.append(f'<path class="lead" d="M{x + 6:.1f} {y:.1f}L{left + width + 20:.1f} {label:.1f}"/>')
        out.append(_marker(line.style, left + width + 28, label))
        out.append(
            f'<text class="label" x="{left + width + 38:.1f}" y="{label + 4.5:.1f}">{escape(_short(line.label, 25))}'
            f' <tspan class="value">{line.values[-1]:.2f}</tspan></text>'
        )
    out.append("</svg>")
    return Markup("".join(str(piece) for piece in out))


def spread(series: Sequence[Series], quality: str, title: str) -> Markup:
    """Every case's final score (0 to 1) as a dot, a row a policy; bar: the middle half, line: the median."""
    left, top, width, row = 20.0, 6.0, 510.0, 76.0
    height = row * len(series)

    def at(value: float) -> float:
        return left + min(max(value, 0.0), 1.0) * width

    out = [_open(left + width + 30, top + height + 40, title)]
    for tick in range(6):
        x = at(tick / 5)
        out.append(f'<path class="grid" d="M{x:g} {top:g}v{height:g}"/>')
        out.append(f'<text class="tick" x="{x:g}" y="{top + height + 18:g}" text-anchor="middle">{tick / 5:.1f}</text>')
    out.append(
        f'<text class="name" x="{left + width / 2:g}" y="{top + height + 36:g}" text-anchor="middle">'
        f"final {escape(quality)}</text>"
    )
    for number, line in enumerate(series):
        y = top + row * number
        middle = y + 46
        out.append(_marker(line.style, left + 6, y + 11))
        out.append(f'<text class="label halo" x="{left + 17:g}" y="{y + 15.5:g}">{escape(_short(line.label, 34))}')
        if not line.values:
            out.append("</text>")
            continue
        low, median, high = (_quantile(line.values, q) for q in (0.25, 0.5, 0.75))
        out.append(f' <tspan class="value">median {median:.2f}</tspan></text>')
        out.append(
            f'<rect class="middle c{line.style % COLOURS}" x="{at(low):.1f}" y="{middle - 22:g}" '
            f'width="{max(at(high) - at(low), 1):.1f}" height="44" rx="3"/>'
        )
        out.append(f'<path class="dots c{line.style % COLOURS}" d="{_dots(line.values, at, middle)}"/>')
        out.append(f'<path class="median" d="M{at(median):.1f} {middle - 24:g}v48"/>')
    out.append("</svg>")
    return Markup("".join(str(piece) for piece in out))


def _dots(values: Sequence[float], at, middle: float) -> str:  # type: ignore[no-untyped-def]
    """A dot a value: columns of nearly equal values, stacked around the middle, closer where there are many."""
    columns: dict[int, int] = {}
    for value in values:
        column = round(min(max(value, 0.0), 1.0) * 100)
        columns[column] = columns.get(column, 0) + 1
    path = []
    for column, count in sorted(columns.items()):
        gap = min(4.6, 40 / max(count - 1, 1))
        x = at(column / 100)
        path += [f"M{x:.1f} {middle + (n - (count - 1) / 2) * gap:.1f}h0" for n in range(count)]
    return "".join(path)


def _marker(style: int, x: float, y: float) -> str:
    """Circle, square, diamond, triangle: a shape each, so that lines differ without colour too."""
    shapes = (
        "m-3.6 0a3.6 3.6 0 1 0 7.2 0a3.6 3.6 0 1 0 -7.2 0z",
        "m-3.2 -3.2h6.4v6.4h-6.4z",
        "m0 -4.6l4.4 4.6l-4.4 4.6l-4.4 -4.6z",
        "m0 -4.4l4.4 7.6h-8.8z",
        "m0 4.4l4.4 -7.6h-8.8z",
    )
    return f'<path class="mark c{style % COLOURS}" d="M{x:.1f} {y:.1f}{shapes[style % len(shapes)]}"/>'


def _spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Positions near the wanted ones, at least `gap` apart, order kept; inside [low, high] while there is room."""
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    placed = [min(max(wanted[i], low), high) for i in order]
    for i in range(1, len(placed)):
        placed[i] = max(placed[i], placed[i - 1] + gap)
    if placed and placed[-1] > high:
        placed[-1] = max(high, low + gap * (len(placed) - 1))
        for i in range(len(placed) - 2, -1, -1):
            placed[i] = min(placed[i], placed[i + 1] - gap)
    result = [0.0] * len(wanted)
    for position, i in enumerate(order):
        result[i] = placed[position]
    return result


def _quantile(values: Sequence[float], q: float) -> float:
    """Linear between the two nearest values."""
    ordered = sorted(values)
    place = q * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def _short(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1].rstrip() + "…"


def _open(width: float, height: float, title: str) -> str:
    return str(
        Markup('<svg class="plot" viewBox="0 0 {} {}" role="img" aria-label="{}"><title>{}</title>').format(
            f"{width:g}", f"{height:g}", title, title
        )
    )
