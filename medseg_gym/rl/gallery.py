"""A gallery of sampled groups: one HTML page, members of a group below each other with rewards and advantages."""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medseg_gym.datasets.base import Dataset
from medseg_gym.errors import MedSegError
from medseg_gym.filmstrip import Panel, action_text, episode_panels, signed
from medseg_gym.rl.advantages import too_few
from medseg_gym.rl.groups import Groups
from medseg_gym.rl.types import Rollout
from medseg_gym.types import Image, Sample

GROUPS = 4  # a page
SIZE = 192  # pixels of a picture's side
LONGEST = 600  # characters of a completion that are shown


@dataclass(frozen=True, slots=True, eq=False)
class Shown:
    """A group as the gallery shows it."""

    members: Sequence[Rollout]
    advantages: Sequence[Sequence[float]]  # per member, per turn; empty where a group is not trained
    verdict: str  # "trained", or why not
    sample: Sample | None  # without it there are no pictures


def of_iteration(
    groups: Groups, advantages: Sequence[Sequence[NDArray[np.float64] | None]], dataset: Dataset | None
) -> list[Shown]:
    """Some groups of an iteration; `advantages` are those of the trained groups' members."""
    given = {id(group): values for group, values in zip(groups.trained, advantages, strict=True)}
    marked = [(id(group) in given, group) for group in groups.played]
    shown = []
    for trained, group in (marked[at] for at in pick(marked, GROUPS)):
        verdict = "trained" if trained else "left out: too few members" if too_few(group) else "left out: equal rewards"
        values = [[] if a is None else a.tolist() for a in given.get(id(group), ())]
        shown.append(Shown(group, values, verdict, _sample(dataset, group[0].episode.key)))
    return shown


def write_gallery(path: Path, title: str, groups: Sequence[Shown]) -> Path:
    """Writes the page, which needs nothing beside it."""
    from medseg_gym.bench.rundir import write_whole

    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, render(title, groups))
    return path


def render(title: str, groups: Sequence[Shown]) -> str:
    """The page's HTML. A completion can hold anything, so everything is escaped."""
    from jinja2 import Environment

    page = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(_PAGE)
    largest = max(
        (abs(a) for group in groups for member in group.advantages for a in member if math.isfinite(a)), default=0.0
    )
    return page.render(title=title, groups=[_group(group, largest) for group in groups])


def pick(groups: Sequence[tuple[bool, Sequence[Rollout]]], count: int) -> list[int]:
    """Which of (trained, members) groups are shown: the one of widest spread, the best, the worst, then as they come.

    A fixed rule, so that nobody chooses; ties go to the earlier group. Groups that were filtered out come last.
    """

    def rewards(members: Sequence[Rollout]) -> list[float]:
        return [m.reward for m in members if not m.dropped and math.isfinite(m.reward)] or [0.0]

    means = [sum(rewards(members)) / len(rewards(members)) for _, members in groups]
    widths = [max(rewards(members)) - min(rewards(members)) for _, members in groups]
    trained = [i for i, (is_trained, _) in enumerate(groups) if is_trained]
    chosen: list[int] = []
    if trained:
        for best in (
            max(trained, key=lambda i: widths[i]),
            max(trained, key=lambda i: means[i]),
            min(trained, key=lambda i: means[i]),
        ):
            if best not in chosen:
                chosen.append(best)
    rest = [*trained, *(i for i in range(len(groups)) if i not in trained)]
    chosen += [i for i in rest if i not in chosen]
    return chosen[:count]


def _sample(dataset: Dataset | None, key: str) -> Sample | None:
    try:
        return None if dataset is None else dataset[key]
    except (KeyError, MedSegError):
        return None


def _group(group: Shown, largest: float) -> dict[str, Any]:
    first = group.members[0].episode
    rewards = [m.reward for m in group.members if not m.dropped and math.isfinite(m.reward)]
    target = "" if group.sample is None else _data_url(episode_panels(group.sample, first, SIZE, zoom=False)[0].picture)
    return {
        "key": first.key,
        "instruction": first.instruction,
        "verdict": group.verdict,
        "target": target,
        "mean": f"{sum(rewards) / len(rewards):.3f}" if rewards else "none",
        "low": f"{min(rewards):.3f}" if rewards else "none",
        "high": f"{max(rewards):.3f}" if rewards else "none",
        "members": [_member(group, at, largest) for at in range(len(group.members))],
    }


def _member(group: Shown, at: int, largest: float) -> dict[str, Any]:
    member = group.members[at]
    advantages = list(group.advantages[at]) if at < len(group.advantages) else []
    episode = member.episode
    advantage = advantages[0] if advantages and math.isfinite(advantages[0]) else None
    # by turn only where turns differ: with one advantage an episode it would say the same thing five times
    by_turn = len(set(advantages)) > 1
    panels = _panels(group.sample, member)
    return {
        "number": member.member,
        "reward": f"{member.reward:.3f}",
        "advantage": None if advantage is None else signed(advantage),
        "side": "up" if advantage is not None and advantage >= 0 else "down",
        "width": round(50 * abs(advantage) / largest, 1) if advantage is not None and largest else 0,
        "iou": f"{episode.iou[-1]:.2f}" if episode.iou else "none",
        "ended": episode.ended,
        "dropped": member.dropped,
        "turns": [
            {
                "number": number + 1,
                "picture": "" if panels is None else _data_url(panels[number].picture),
                "action": action_text(turn.action),
                "iou": f"{episode.iou[number + 1]:.2f}" if episode.iou else "none",
                "reward": signed(turn.reward),
                "advantage": signed(advantages[number]) if by_turn and math.isfinite(advantages[number]) else "",
                "terms": [f"{name} {signed(value)}" for name, value in turn.terms.items() if signed(value) != "0.00"],
                "text": turn.text if len(turn.text) <= LONGEST else turn.text[: LONGEST - 1] + "…",
            }
            for number, turn in enumerate(episode.turns)
        ],
    }


def _panels(sample: Sample | None, member: Rollout) -> list[Panel] | None:
    """A picture a turn; None without the sample."""
    if sample is None or not member.episode.turns:
        return None
    return episode_panels(sample, member.episode, SIZE, zoom=False)[-len(member.episode.turns) :]


def _data_url(picture: Image) -> str:
    import cv2

    done, data = cv2.imencode(".webp", cv2.cvtColor(picture, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_WEBP_QUALITY, 80])
    if not done:
        raise RuntimeError("OpenCV wrote no WebP")
    return "data:image/webp;base64," + base64.b64encode(data.tobytes()).decode("ascii")


_PAGE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
:root { color-scheme: light dark; --ink: #1b1d21; --muted: #646b76; --line: #dfe2e7; --paper: #fff; --card: #f6f7f9;
  --up: #0072b2; --down: #b8500a; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8eaed; --muted: #9aa2ad; --line: #353a42; --paper: #16181c;
  --card: #1f2228; --up: #56b4e9; --down: #f0975a; } }
body { margin: 2rem auto; max-width: 78rem; padding: 0 1.25rem; background: var(--paper); color: var(--ink);
  font: 15px/1.45 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 0 0 1.5rem; } h2 { font-size: 1.15rem; margin: 0; }
section { border-top: 1px solid var(--line); padding: 1.5rem 0; }
header { display: flex; gap: 1.25rem; align-items: flex-start; margin-bottom: 1rem; }
header p { margin: .2rem 0; color: var(--muted); }
img { display: block; width: 100%; border-radius: 4px; }
header img { width: 128px; }
.members { display: flex; flex-wrap: wrap; gap: 0 3rem; }
.member { display: grid; grid-template-columns: 9.5rem 1fr; gap: 1.25rem; padding: .9rem 0; max-width: 100%;
  border-top: 1px solid var(--line); }
.number { font-variant-numeric: tabular-nums; }
.score b { font-size: 1.25rem; } .score, .small { color: var(--muted); font-size: .85rem; }
.score b { color: var(--ink); }
.bar { position: relative; height: .5rem; margin: .4rem 0; background: var(--card); border-radius: 2px; }
.bar::after { content: ""; position: absolute; left: 50%; top: -2px; bottom: -2px; width: 1px;
  background: var(--muted); }
.bar i { position: absolute; top: 0; bottom: 0; border-radius: 2px; }
.up { color: var(--up); } .bar i.up { left: 50%; background: var(--up); }
.down { color: var(--down); } .bar i.down { right: 50%; background: var(--down); }
.turns { display: flex; flex-wrap: wrap; gap: 1rem; min-width: 0; }
figure { margin: 0; width: 10.5rem; } figcaption { font-size: .8rem; line-height: 1.35; margin-top: .3rem; }
figcaption span { float: right; }
pre { margin: .3rem 0 0; padding: .3rem .4rem; background: var(--card); border-radius: 3px; font-size: .72rem;
  white-space: pre-wrap; overflow-wrap: anywhere; max-height: 9rem; overflow: auto; }
</style>
</head>
<body>
<h1>{{ title }}</h1>
{% for group in groups %}
<section>
<header>
{% if group.target %}<img src="{{ group.target }}" alt="the case with its target outlined">{% endif %}
<div>
<h2>{{ group.instruction }}</h2>
<p>{{ group.key }}</p>
<p class="number">reward: mean {{ group.mean }}, from {{ group.low }} to {{ group.high }}</p>
<p>{{ group.verdict }}</p>
</div>
</header>
<div class="members">
{% for member in group.members %}
<div class="member">
<div class="score number">
<b>{{ member.reward }}</b> reward<br>
{% if member.advantage is not none %}
<div class="bar"><i class="{{ member.side }}" style="width: {{ member.width }}%"></i></div>
<span class="{{ member.side }}">{{ member.advantage }}</span> advantage<br>
{% endif %}
IoU {{ member.iou }}, {{ member.ended }}<br>
member {{ member.number }}{% if member.dropped %}<br>dropped: {{ member.dropped }}{% endif %}
</div>
<div class="turns">
{% for turn in member.turns %}
<figure>
{% if turn.picture %}<img src="{{ turn.picture }}" alt="turn {{ turn.number }}: {{ turn.action }}">{% endif %}
<figcaption class="number">
<b>{{ turn.number }}&ensp;{{ turn.action }}</b><span>IoU {{ turn.iou }}</span>
<div class="small">{{ turn.reward }} reward{% if turn.terms %} = {{ turn.terms | join(", ") }}{% endif %}
{% if turn.advantage %}<br>{{ turn.advantage }} advantage{% endif %}</div>
<pre>{{ turn.text or "(no text)" }}</pre>
</figcaption>
</figure>
{% else %}
<p class="small">no turn was played</p>
{% endfor %}
</div>
</div>
{% endfor %}
</div>
</section>
{% endfor %}
</body>
</html>
"""
