"""An evaluation's report: one HTML file with its tables, figures and pictures, that needs nothing beside it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from medseg_gym.bench import gallery as pictures
from medseg_gym.bench.gallery import Case, Score, final_score
from medseg_gym.bench.plots import COLOURS, Series, curves, spread
from medseg_gym.bench.rundir import write_whole
from medseg_gym.datasets.base import Dataset
from medseg_gym.episodes import decode_mask, from_json
from medseg_gym.errors import BadDataError, MedSegError
from medseg_gym.filmstrip import signed
from medseg_gym.metrics import iou
from medseg_gym.types import Episode, Sample

SUMMARY_SCHEMA = 1
PICTURE_BUDGET = 6_500_000  # bytes; with the page around them the file stays under 8 MB

_ROW_KEYS = (
    *("env", "dataset", "tool", "tool_fingerprint", "policy", "horizon", "episodes", "patients", "dice", "iou"),
    *("dice_at", "iou_at", "noc", "actions", "tool_calls", "reward", "unreadable_turns", "ended", "structures"),
)


def write_report(directory: Path, datasets: Mapping[str, Dataset], *, gallery: int = 24) -> Path:
    """Writes `report.html` into the folder of an evaluation and returns its path.

    Reads episodes.jsonl, summary.json and, where present, times.json. `datasets` holds the Dataset of each env id, for
    the pictures: without one the report is written all the same, and says so. `gallery` is the most cases shown.
    """
    directory = Path(directory)
    summary = _read_summary(directory / "summary.json")
    times = _read_times(directory / "times.json")
    episodes = read_episodes(directory / "episodes.jsonl")
    page = render_report(summary, times, episodes, datasets, gallery=gallery)
    path = directory / "report.html"
    write_whole(path, page)
    return path


def read_episodes(path: Path) -> list[Episode]:
    """The episodes of a JSON-lines file; BadDataError names the file and the line that is missing or wrong."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        raise BadDataError(f"{path}: no such file; run the evaluation first") from None
    except UnicodeDecodeError as error:
        raise BadDataError(f"{path}: not UTF-8 ({error})") from None
    if lines[-1] == "":
        lines.pop()
    episodes = []
    for number, line in enumerate(lines, start=1):
        try:
            episode = from_json(line)
            turns = len(episode.turns)
            if not len(episode.iou) == len(episode.dice) == turns + 1:
                raise BadDataError(
                    f"{turns} turns with {len(episode.iou)} IoU and {len(episode.dice)} Dice values; wanted {turns + 1}"
                )
        except BadDataError as error:
            raise BadDataError(f"{path}, line {number}: {error}") from None
        episodes.append(episode)
    return episodes


def render_report(
    summary: Mapping[str, Any],
    times: Mapping[str, Any] | None,
    episodes: Sequence[Episode],
    datasets: Mapping[str, Dataset],
    *,
    gallery: int = 24,
) -> str:
    """The page as text; equal arguments give equal pages."""
    rows = [dict(row) for row in summary["rows"]]
    _label(rows)
    _add_times(rows, times)
    _mark_best(rows)
    by_row = _episodes_by_row(rows, episodes)
    cases, gaps, dropped = _cases(rows, by_row, datasets, gallery)
    groups = [_group(name, of_group, by_row) for name, of_group in _by_dataset(rows).items()]
    return (
        _environment()
        .get_template("report.html.j2")
        .render(
            summary=summary,
            machine=(times or {}).get("machine", ""),
            rows=rows,
            timed=any(row["times"] for row in rows),
            groups=groups,
            cases=cases,
            hero=_hero(rows, by_row, datasets, cases),
            gaps=gaps,
            dropped=dropped,
            labels=_labels(rows),
            structures=sorted({case.structure for case in cases}),
            tools=sorted({row["tool"] for row in rows}),
            datasets=list(_by_dataset(rows)),
            horizons=sorted({row["horizon"] for row in rows}),
            patients=sum(max(r["patients"] for r in of_group) for of_group in _by_dataset(rows).values()),
            leader=max(rows, key=lambda row: _or_less(row["dice"])) if len(_by_dataset(rows)) == 1 else None,
        )
    )


def _read_summary(path: Path) -> dict[str, Any]:
    summary = _read_json(path)
    if summary.get("schema") != SUMMARY_SCHEMA:
        raise BadDataError(f"{path}: schema {summary.get('schema')!r}; this version reads {SUMMARY_SCHEMA}")
    for key in ("split", "cases", "rows"):
        if key not in summary:
            raise BadDataError(f"{path}: no {key!r}; run the evaluation again")
    if not summary["rows"]:
        raise BadDataError(f"{path}: no rows, so there is nothing to report")
    for number, row in enumerate(summary["rows"]):
        missing = [key for key in _ROW_KEYS if key not in row]
        if missing:
            raise BadDataError(f"{path}: row {number} has no {missing[0]!r}; run the evaluation again")
    return summary


def _read_times(path: Path) -> dict[str, Any] | None:
    return _read_json(path) if path.exists() else None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadDataError(f"{path}: no such file; run the evaluation first") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise BadDataError(f"{path}: not JSON ({error})") from None
    if not isinstance(record, dict):
        raise BadDataError(f"{path}: a {type(record).__name__}; wanted an object")
    return record


def _by_dataset(rows: Iterable[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row["dataset"], []).append(row)
    return groups


def _label(rows: Sequence[dict[str, Any]]) -> None:
    """Names each row by what tells it from the others, and gives equal names one look over all figures."""
    many_tools = len({row["tool"] for row in rows}) > 1
    many_policies = len({row["policy"] for row in rows}) > 1
    for row in rows:
        parts = ([row["policy"]] if many_policies or not many_tools else []) + ([row["tool"]] if many_tools else [])
        row["label"] = " · ".join(parts)
    styles = _labels(rows)
    for row in rows:
        row["style"] = styles[row["label"]]


def _labels(rows: Iterable[dict[str, Any]]) -> dict[str, int]:
    return {label: number for number, label in enumerate(dict.fromkeys(row["label"] for row in rows))}


def _add_times(rows: Sequence[dict[str, Any]], times: Mapping[str, Any] | None) -> None:
    known = {(entry.get("env"), entry.get("policy")): entry for entry in (times or {}).get("rows", ())}
    for row in rows:
        row["times"] = known.get((row["env"], row["policy"]))


def _or_less(value: float | None) -> float:
    return -math.inf if value is None else value


def _mark_best(rows: Sequence[dict[str, Any]]) -> None:
    """Marks what is best among the rows of one dataset: only these saw the same cases.

    NoC is judged by NoF first: its mean covers the cases that got there, so giving up on hard ones would flatter it.
    """

    def noc_rank(q: str) -> Callable[[dict[str, Any]], tuple[float, float]]:
        def rank(row: dict[str, Any]) -> tuple[float, float]:
            entry = row["noc"].get(q) or {}
            return (-math.inf, 0.0) if entry.get("mean") is None else (-entry["nof"], -entry["mean"])

        return rank

    ranks: dict[str, Callable[[dict[str, Any]], Any]] = {
        "dice": lambda row: _or_less(row["dice"]),
        "iou": lambda row: _or_less(row["iou"]),
        **{f"noc{q}": noc_rank(q) for q in ("80", "85", "90")},
    }
    for row in rows:
        row["best"] = set()
    for group in _by_dataset(rows).values():
        if len(group) < 2:
            continue
        for column, rank in ranks.items():
            top = max(rank(row) for row in group)
            for row in group:
                if rank(row) == top and top not in (-math.inf, (-math.inf, 0.0)):
                    row["best"].add(column)


def _episodes_by_row(
    rows: Sequence[dict[str, Any]], episodes: Sequence[Episode]
) -> dict[tuple[str, str], dict[str, Episode]]:
    """Per (env, policy): the episodes by key, in case order; a case's first episode counts."""
    by_row: dict[tuple[str, str], dict[str, Episode]] = {(row["env"], row["policy"]): {} for row in rows}
    for episode in sorted(episodes, key=lambda e: e.case):
        of_row = by_row.get((episode.env, episode.policy))
        if of_row is not None:
            of_row.setdefault(episode.key, episode)
    return by_row


def _cases(
    rows: Sequence[dict[str, Any]],
    by_row: Mapping[tuple[str, str], Mapping[str, Episode]],
    datasets: Mapping[str, Dataset],
    count: int,
) -> tuple[list[Case], list[str], int]:
    """The cases of the gallery, what is missing for their pictures, and how many did not fit into the file."""
    groups = _by_dataset(rows)
    cases: list[Case] = []
    gaps: dict[str, None] = {}
    spent = dropped = 0
    for place, (name, group) in enumerate(groups.items()):
        scores = _scores(group, by_row)
        share = count // len(groups) + (place < count % len(groups))
        for key, reasons in pictures.pick(scores, share).items():
            played = [
                (row["label"], row["style"], by_row[row["env"], row["policy"]][key])
                for row in group
                if key in by_row[row["env"], row["policy"]]
            ]
            if spent > PICTURE_BUDGET:
                dropped += 1
                continue
            sample, gap = _sample(played, datasets)
            if gap:
                gaps[f"{name}: {gap}"] = None
            case = pictures.draw_case(len(cases), name, reasons, played, sample)
            cases.append(case)
            spent += case.nbytes
    return cases, list(gaps), dropped


def _scores(group: Sequence[dict[str, Any]], by_row: Mapping[tuple[str, str], Mapping[str, Episode]]) -> list[Score]:
    finals: dict[str, list[float]] = {}
    structure: dict[str, str] = {}
    for row in group:
        for key, episode in by_row[row["env"], row["policy"]].items():
            finals.setdefault(key, []).append(final_score(episode))
            structure[key] = episode.structure
    return [Score(key, structure[key], sum(values) / len(values)) for key, values in finals.items()]


def _sample(played: Sequence[tuple[str, int, Episode]], datasets: Mapping[str, Dataset]) -> tuple[Sample | None, str]:
    """The case from the first dataset that has it, or why there is none."""
    gap = ""
    for _, _, episode in played:
        dataset = datasets.get(episode.env)
        if dataset is None:
            gap = gap or "the dataset is not on this machine"
            continue
        try:
            sample = dataset[episode.key]
        except (KeyError, MedSegError) as error:
            gap = gap or f"no case {episode.key} ({type(error).__name__})"
            continue
        sizes = {tuple(turn.mask["size"]) for _, _, other in played for turn in other.turns}
        if not sizes <= {sample.target.shape}:
            gap = gap or f"{episode.key} has another size here than in the episodes"
        elif not _is_target_of(sample, episode):
            gap = gap or f"{episode.key} has another target here than in the episodes"
        else:
            return sample, ""
    return None, gap


def _is_target_of(sample: Sample, episode: Episode) -> bool:
    """Whether the stored masks overlap the target as the episode says: a dataset of the same name may hold others."""
    return all(
        abs(iou(decode_mask(turn.mask), sample.target) - stored) < 1e-6
        for turn, stored in zip(episode.turns, episode.iou[1:], strict=False)
    )


def _group(
    name: str, rows: Sequence[dict[str, Any]], by_row: Mapping[tuple[str, str], Mapping[str, Episode]]
) -> dict[str, Any]:
    """One dataset's figures and its table of structures."""
    lines = [Series(row["label"], row["style"], tuple(map(float, row["dice_at"]))) for row in rows if row["dice_at"]]
    dots = [
        Series(row["label"], row["style"], tuple(map(final_score, by_row[row["env"], row["policy"]].values())))
        for row in rows
    ]
    structures = sorted({structure for row in rows for structure in row["structures"]})
    table = [
        {
            "name": structure,
            "episodes": max(row["structures"].get(structure, {}).get("episodes", 0) for row in rows),
            "cells": [row["structures"].get(structure) for row in rows],
        }
        for structure in structures
    ]
    return {
        "name": name,
        "rows": rows,
        "curves": curves(lines, "Dice", f"Mean Dice after each action on {name}") if lines else "",
        "spread": spread(dots, "Dice", f"Final Dice of every case of {name}"),
        "structures": table if len(table) > 1 else [],
    }


def _hero(
    rows: Sequence[dict[str, Any]],
    by_row: Mapping[tuple[str, str], Mapping[str, Episode]],
    datasets: Mapping[str, Dataset],
    cases: Sequence[Case],
) -> Case | None:
    """The gallery's first case, the median of all, as only the policy of best mean Dice played it."""
    if not cases:
        return None
    of_dataset = [row for row in rows if row["dataset"] == cases[0].dataset]
    for row in sorted(of_dataset, key=lambda row: -_or_less(row["dice"])):
        episode = by_row[row["env"], row["policy"]].get(cases[0].key)
        if episode is not None and episode.turns:
            played = [(row["label"], row["style"], episode)]
            return pictures.draw_case(len(cases), row["dataset"], (), played, _sample(played, datasets)[0])
    return None


@cache
def _environment():  # type: ignore[no-untyped-def]
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("medseg_gym.bench"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"fixed": _fixed, "percent": _percent, "listed": _listed, "signed": signed}
    environment.globals |= {"COLOURS": COLOURS}
    return environment


def _fixed(value: float | None, digits: int = 3) -> str:
    """A number with that many decimals; a dash for none."""
    return "\N{EM DASH}" if value is None or math.isnan(value) else f"{value:.{digits}f}"


def _percent(value: float | None) -> str:
    return "\N{EM DASH}" if value is None or math.isnan(value) else f"{100 * value:.0f}\N{NO-BREAK SPACE}%"


def _listed(names: Iterable[str]) -> str:
    """ "a", "a and b", "a, b and c"."""
    *most, last = names
    return f"{', '.join(most)} and {last}" if most else last
