"""A leaderboard's episodes to look at: which cases and agents are shown, by a fixed rule, and their drawings."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from medseg_gym import datasets
from medseg_gym.bench.gallery import Case, Frame, Score, draw_case, pick
from medseg_gym.bench.leaderboard_read import Played
from medseg_gym.bench.leaderboard_records import Results, Table
from medseg_gym.bench.leaderboard_robust import CLEAN, SEVERITIES, SUITE
from medseg_gym.bench.leaderboard_svg import styles
from medseg_gym.bench.runs import read_episodes
from medseg_gym.datasets.base import Dataset
from medseg_gym.episodes import decode_mask
from medseg_gym.errors import MedSegError
from medseg_gym.metrics import iou
from medseg_gym.types import Episode, Sample

PICTURES = ("Phantom",)  # datasets whose images a page may hold: real ones are not ours to hand on
BUDGET = 2_000_000  # bytes of all drawings
CASES, STRIPS, FRAMES = 3, 6, 5  # the most of a dataset, of a case, of an episode
MANY = 4  # datasets and tables of a suite from which on each shows one case
WORST = f"-{max(SEVERITIES)}"  # of corrupted images only these are shown
LONGEST_TEXT = 900  # characters of an answer

Agent = tuple[str, str]  # tool, policy


@dataclass(frozen=True, slots=True)
class Shown:
    """One agent's episode of a case."""

    tool: str
    policy: str
    strip: int  # which of the case's strips
    left_out: int  # turns that are not drawn


@dataclass(frozen=True, slots=True)
class Exhibit:
    """One case with the episodes of some agents."""

    modality: str
    case: Case
    agents: tuple[Shown, ...]


@dataclass(frozen=True, slots=True)
class Gallery:
    """The exhibits of one table, and how many more the rule names than the page has room for."""

    suite: str
    group: str
    exhibits: tuple[Exhibit, ...]
    dropped: int


def galleries(results: Sequence[Results]) -> dict[tuple[str, str], Gallery]:
    """By suite and group. Runs without a folder, as tests make them, have no episodes to show."""
    look = styles(row.policy for one in results for table in one.tables for row in table.rows)
    found: dict[tuple[str, str], Gallery] = {}
    number = spent = 0
    for one in results:
        share = CASES if sum(len(table.modality) for table in one.tables) <= MANY else 1
        for table in one.tables:
            if one.suite.name == SUITE and table.group != CLEAN and not table.group.endswith(WORST):
                continue
            exhibits: list[Exhibit] = []
            dropped = 0
            for dataset, modality in table.modality.items():
                runs = [run for run in one.runs if (run.entry.group, run.entry.title) == (table.group, dataset)]
                for exhibit in _exhibits(table, dataset, modality, runs, look, share, number):
                    if spent > BUDGET:
                        dropped += 1
                        continue
                    exhibits.append(exhibit)
                    spent += exhibit.case.nbytes
                    number += 1
            if exhibits or dropped:
                found[one.suite.name, table.group] = Gallery(one.suite.name, table.group, tuple(exhibits), dropped)
    return found


def chosen(table: Table) -> list[Agent]:
    """The agents whose episodes are shown, in the table's order: each tool's ceiling, then those that do not see the
    target, then the others, the best first; STRIPS at most."""
    rows = list(table.rows)
    first = [row for row in rows if row.ceiling == row.policy]
    blind = [row for row in rows if not row.sees_target]
    order = dict.fromkeys((row.tool, row.policy) for row in (*first, *blind, *rows))
    kept = set(list(order)[:STRIPS])
    return [(row.tool, row.policy) for row in rows if (row.tool, row.policy) in kept]


def _exhibits(
    table: Table, dataset: str, modality: str, runs: Sequence[Played], look: Mapping[str, int], count: int, number: int
) -> list[Exhibit]:
    agents = chosen(table)
    episodes = {
        (run.entry.tool, run.policy): {(e.seed, e.key): e for e in read_episodes(run.folder)}
        for run in runs
        if run.folder is not None and (run.entry.tool, run.policy) in agents
    }
    finals: dict[str, list[float]] = defaultdict(list)
    named: dict[str, tuple[int, str]] = {}
    structure: dict[str, str] = {}
    for run in runs:
        if (run.entry.tool, run.policy) not in episodes:
            continue
        for (seed, key), case in run.cases.items():
            finals[key].append(case.dice[-1])
            named.setdefault(key, (seed, key))
            structure[key] = structure.get(key) or episodes[run.entry.tool, run.policy][seed, key].structure
    scores = [Score(key, structure[key], sum(values) / len(values)) for key, values in finals.items()]
    data = _pictures(runs)
    found: list[Exhibit] = []
    for key, reasons in pick(scores, count).items():
        played = [(agent, episodes[agent][named[key]]) for agent in agents if named[key] in episodes.get(agent, {})]
        sample = _sample(data, key, [episode for _, episode in played])
        drawn = draw_case(
            number + len(found),
            dataset,
            reasons,
            [(f"{policy} with {tool}", look[policy], episode) for (tool, policy), episode in played],
            sample,
        )
        drawn, left_out = _shorter(drawn)
        shown = tuple(
            Shown(tool, policy, place, left)
            for place, (((tool, policy), _), left) in enumerate(zip(played, left_out, strict=True))
        )
        found.append(Exhibit(modality, drawn, shown))
    return found


def _shorter(case: Case) -> tuple[Case, list[int]]:
    """Of long episodes the first and the last turns, of long answers the beginning."""
    last, left_out, strips = FRAMES // 2, [], []
    for strip in case.strips:
        frames = strip.frames
        if len(frames) > FRAMES:
            frames = (*frames[: FRAMES - last], *frames[-last:])
        left_out.append(len(strip.frames) - len(frames))
        strips.append(replace(strip, frames=tuple(map(_clipped, frames))))
    return replace(case, strips=tuple(strips)), left_out


def _clipped(frame: Frame) -> Frame:
    if len(frame.text) <= LONGEST_TEXT:
        return frame
    return replace(
        frame, text=f"{frame.text[:LONGEST_TEXT].rstrip()} … {len(frame.text) - LONGEST_TEXT} more characters"
    )


def _pictures(runs: Sequence[Played]) -> Dataset | None:
    """The dataset of these runs, where its images may be shown; all of them have the same options but for the tool."""
    entry = runs[0].entry
    if entry.dataset not in PICTURES:
        return None
    try:
        return datasets.load(entry.dataset, **entry.options.get("dataset_options", {}))
    except MedSegError:
        return None


def _sample(data: Dataset | None, key: str, episodes: Sequence[Episode]) -> Sample | None:
    """The case, if its target is the one that the episodes were scored by: drawings change with their version."""
    if data is None:
        return None
    try:
        sample = data[key]
    except (KeyError, MedSegError):
        return None
    for episode in episodes:
        for turn, stored in zip(episode.turns, episode.iou[1:], strict=True):
            mask = decode_mask(turn.mask)
            if mask.shape != sample.target.shape or abs(iou(mask, sample.target) - stored) > 1e-6:
                return None
    return sample
