"""The leaderboard's figures as inline SVG: agents against the ceiling, Dice after k actions, what each turn gained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from markupsafe import Markup

from medseg_gym.bench.leaderboard_records import Row
from medseg_gym.bench.leaderboard_svg import apart, colour, dash, marker, series, short, svg, text
from medseg_gym.bench.leaderboard_turns import Gain, Turns

WIDTH = 560.0
NAMES = 26  # characters of an agent's name that fit beside a figure


def ceiling_dots(rows: Sequence[Row], style: Mapping[str, int], title: str) -> Markup:
    """One tool's agents by final IoU: a dot and its 95 % interval; the broken line is the oracle's ceiling."""
    left, right, top, step = 178.0, 66.0, 30.0, 27.0
    width, height = WIDTH - left - right, step * len(rows) + 6

    def at(value: float) -> float:
        return left + min(max(value, 0.0), 1.0) * width

    out = _grid_down(left, top, width, height, "final IoU")
    for row in rows:  # agents on other cases have a ceiling of their own
        if row.ceiling_iou is None:
            continue
        y = top + 3 + step * rows.index(row)
        x = at(row.ceiling_iou)
        out.append(f'<path class="ceiling" d="M{x:.1f} {y:.1f}v{step:g}"/>')
    known = [row.ceiling_iou for row in rows if row.ceiling_iou is not None]
    if known:
        out.append(text(at(known[0]), top - 8, f"ceiling {known[0]:.3f}", "tick oracle", "middle"))
    for number, row in enumerate(rows):
        y, found, look = top + 3 + step * (number + 0.5), row.iou.overall, style[row.policy]
        low = found.mean if found.low is None else found.low
        high = found.mean if found.high is None else found.high
        name = short(row.policy, NAMES - 2) + ("\N{DAGGER}" if row.sees_target else "")
        out.append(series(row.policy))
        out.append(text(left - 12, y + 4.2, name, "label", "end"))
        out.append(f'<path class="span {colour(look)}" d="M{at(low):.1f} {y:.1f}H{at(high):.1f}"/>')
        out.append(marker(look, at(found.mean), y))
        out.append(text(WIDTH - right + 14, y + 4.2, f"{found.mean:.3f}", "label"))
        out.append("</g>")
    return svg(WIDTH, top + height + 40, title, out)


def dice_curves(agents: Sequence[Turns], style: Mapping[str, int], title: str) -> Markup:
    """One tool's agents: mean Dice after 0, 1, ... actions, a line each with its own dashes, named where it ends."""
    left, top, names, gap = 34.0, 14.0, 212.0, 17.5
    width, height = WIDTH - left - names, max(230.0, gap * (len(agents) + 1))
    horizon = max(1, len(agents[0].dice_at) - 1)

    def at(k: int, value: float) -> tuple[float, float]:
        return left + k * width / horizon, top + (1 - value) * height

    out = []
    for tick in range(6):
        _, y = at(0, tick / 5)
        out += [
            f'<path class="grid" d="M{left:g} {y:g}h{width:g}"/>',
            text(left - 7, y + 4, f"{tick / 5:.1f}", "tick", "end"),
        ]
    for k in range(0, horizon + 1, max(1, round(horizon / 10))):
        out.append(text(at(k, 0)[0], top + height + 18, str(k), "tick", "middle"))
    out.append(text(left + width / 2, top + height + 36, "actions", "name", "middle"))
    out.append(text(left + 6, top + 4, "Dice", "name"))
    heights = apart([at(horizon, agent.dice_at[-1])[1] for agent in agents], gap, top, top + height)
    for agent, label in zip(agents, heights, strict=True):
        look = style[agent.policy]
        points = [at(k, value) for k, value in enumerate(agent.dice_at)]
        path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
        out.append(series(agent.policy))
        out.append(f'<path class="line {colour(look)}" stroke-dasharray="{dash(look)}" d="{path}"/>')
        out += [marker(look, x, y) for x, y in points if horizon <= 20]
        x, y = points[-1]
        out.append(f'<path class="lead" d="M{x + 6:.1f} {y:.1f}L{left + width + 18:.1f} {label:.1f}"/>')
        out.append(marker(look, left + width + 26, label))
        out.append(
            text(left + width + 36, label + 4.2, f"{short(agent.policy, NAMES - 6)} {agent.dice_at[-1]:.2f}", "label")
        )
        out.append("</g>")
    return svg(WIDTH, top + height + 46, title, out)


def turn_gains(agent: Turns, most: int, title: str) -> Markup:
    """MedSAM-Agent's Fig. 3 for one agent: above the mean IoU gain of each turn, below how many episodes took it.

    The columns below are shares of all episodes: better (filled), as before (outlined), worse (hatched), and those
    that stopped there (dotted). `most` is the number of turns that all figures of a table have room for.
    """
    left, width, upper, lower, top = 34.0, 226.0, 52.0, 62.0, 16.0
    base, floor, step = top + upper, top + upper + 34 + lower, width / max(most, 1)
    thick, told = min(26.0, step * 0.62), most <= 8
    out = [
        f'<path class="axis" d="M{left:g} {base:g}h{width:g}M{left:g} {floor:g}h{width:g}"/>',
        text(left - 6, top + 6, "+1", "tick", "end"),
        text(left - 6, base + 4, "0", "tick", "end"),
        text(left - 6, floor - lower + 6, str(agent.episodes), "tick", "end"),
        text(left - 6, floor + 3, "0", "tick", "end"),
    ]
    for k in range(1, most + 1):
        if told or k == 1 or k % 5 == 0:
            out.append(text(left + step * (k - 0.5), floor + 15, str(k), "tick", "middle"))
    for gain in agent.gains:
        x = left + step * (gain.turn - 0.5) - thick / 2
        if gain.mean is not None:
            tall = min(abs(gain.mean), 1.0) * upper
            up = gain.mean >= 0
            kind, y = ("better", base - tall) if up else ("worse", base)
            out.append(f'<rect class="{kind}" x="{x:.1f}" y="{y:.1f}" width="{thick:.1f}" height="{tall:.1f}"/>')
            if told:
                out.append(text(x + thick / 2, (y if up else base) - 4, _change(gain.mean), "value", "middle"))
        out += _column(gain, agent.episodes, x, floor, thick, lower)
        if told and gain.reached:
            tall = lower * (gain.reached + gain.stopped) / agent.episodes
            out.append(text(x + thick / 2, floor - tall - 4, str(gain.reached), "value", "middle"))
    return svg(left + width + 6, floor + 20, title, out)


def _column(gain: Gain, episodes: int, x: float, floor: float, thick: float, lower: float) -> list[str]:
    out, y = [], floor
    for kind, count in (("better", gain.better), ("same", gain.same), ("worse", gain.worse), ("stopped", gain.stopped)):
        if count:
            tall = lower * count / episodes
            y -= tall
            out.append(f'<rect class="{kind}" x="{x:.1f}" y="{y:.1f}" width="{thick:.1f}" height="{tall:.1f}"/>')
    return out


def _change(value: float) -> str:
    """ "+.65", "-.02"; what rounds to nothing has no sign."""
    words = f"{value:+.2f}".replace("-", "\N{MINUS SIGN}").replace("0.", ".", 1)
    return words if any(c in "123456789" for c in words) else "0"


def _grid_down(left: float, top: float, width: float, height: float, name: str) -> list[str]:
    out = []
    for tick in range(6):
        x = left + width * tick / 5
        out.append(f'<path class="grid" d="M{x:g} {top:g}v{height:g}"/>')
        out.append(text(x, top + height + 17, f"{tick / 5:.1f}", "tick", "middle"))
    out.append(text(left + width / 2, top + height + 35, name, "name", "middle"))
    return out
