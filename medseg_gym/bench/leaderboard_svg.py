"""The pieces that the leaderboard's figures are drawn of: markers, dashes, axes, labels that keep apart."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from markupsafe import Markup, escape

from medseg_gym.bench.suites import SCRIPTED

COLOURS = 8  # the style sheet defines .c0 to .c7, light and dark
DASHES = ("", "7 4", "2 3.5", "9 3 2 3", "12 4", "4 2", "1.5 3", "14 3 3 3")
SHAPES = (  # circle, square, diamond, triangles: lines differ without colour too
    "m-3.6 0a3.6 3.6 0 1 0 7.2 0a3.6 3.6 0 1 0 -7.2 0z",
    "m-3.2 -3.2h6.4v6.4h-6.4z",
    "m0 -4.6l4.4 4.6l-4.4 4.6l-4.4 -4.6z",
    "m0 -4.4l4.4 7.6h-8.8z",
    "m0 4.4l4.4 -7.6h-8.8z",
)


def styles(policies: Iterable[str]) -> dict[str, int]:
    """A look a policy, one for the whole page: the scripted ones have theirs, the others follow in order."""
    names = dict.fromkeys(SCRIPTED) | dict.fromkeys(policies)
    return {name: number for number, name in enumerate(names)}


def colour(style: int) -> str:
    return f"c{style % COLOURS}"


def dash(style: int) -> str:
    return DASHES[style % len(DASHES)]


def marker(style: int, x: float, y: float, extra: str = "") -> str:
    return f'<path class="mark {colour(style)}{extra}" d="M{x:.1f} {y:.1f}{SHAPES[style % len(SHAPES)]}"/>'


def text(x: float, y: float, words: str, kind: str, anchor: str = "") -> str:
    """A text of a class of the style sheet; `words` may come from strangers."""
    at = f' text-anchor="{anchor}"' if anchor else ""
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}"{at}>{escape(words)}</text>'


def series(policy: str) -> str:
    """Opens the group of all that belongs to a policy, which the page's filter looks for."""
    return str(Markup('<g class="series" data-policy="{}">').format(policy))


def svg(width: float, height: float, title: str, pieces: Iterable[str]) -> Markup:
    """A figure that says what it is to those who do not see it."""
    head = Markup('<svg class="plot" viewBox="0 0 {} {}" role="img" aria-label="{}">').format(
        f"{width:g}", f"{height:g}", title
    )
    return head + Markup("".join(map(str, pieces))) + Markup("</svg>")


def apart(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Positions near the wanted ones, at least `gap` apart, order kept; inside [low, high] while there is room."""
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    placed: list[float] = []
    for i in order:
        at = min(max(wanted[i], low), high)
        placed.append(at if not placed else max(at, placed[-1] + gap))
    if placed and placed[-1] > high:
        placed[-1] = max(high, low + gap * (len(placed) - 1))
        for i in range(len(placed) - 2, -1, -1):
            placed[i] = min(placed[i], placed[i + 1] - gap)
    found = [0.0] * len(wanted)
    for position, i in enumerate(order):
        found[i] = placed[position]
    return found


def short(words: str, length: int) -> str:
    return words if len(words) <= length else words[: length - 1].rstrip() + "…"
