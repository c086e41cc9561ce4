"""From run folders to the scores of every case, and which folders a leaderboard leaves out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from medseg_gym.bench import suites
from medseg_gym.bench.leaderboard_run import MEASURES, PROVENANCE
from medseg_gym.bench.runs import Run, find_runs, read_record, read_run
from medseg_gym.bench.suites import Entry
from medseg_gym.bench.summary import curves
from medseg_gym.bench.verify_episode import well_formed
from medseg_gym.bench.verify_findings import Finding
from medseg_gym.bench.verify_run import check_list, check_settings
from medseg_gym.bench.verify_suite import check_suite, check_times, entry_of
from medseg_gym.errors import BadDataError
from medseg_gym.metrics import entity_counts
from medseg_gym.types import Episode, Unreadable


@dataclass(frozen=True, slots=True)
class Case:
    """One played case, without its masks."""

    patient: str  # "" where the case could not be read
    iou: tuple[float, ...]  # T + 1 values that count: all zero for a failed or unreadable episode
    dice: tuple[float, ...]
    actions: int
    tool_calls: int
    unreadable_turns: int
    ended: str
    nsd: float | None  # None where it was not measured
    hd95: float | None
    unit: str | None  # of hd95: "mm" or "px"
    entity: tuple[int, int] | None  # metrics.entity_counts of its last mask
    kinds: tuple[str, ...] = ()  # of its T actions: "click", "box", "undo", "stop" or "unreadable"


@dataclass(frozen=True, slots=True)
class Played:
    """One policy on one entry of a suite."""

    entry: Entry
    policy: str
    fingerprint: str  # of the tool
    data: str  # what identifies the cases' content
    cases: dict[tuple[int, str], Case]  # by seed and key
    asked: int | None  # the cases that were asked for
    trial: bool  # fewer cases than the suite has
    seconds: float | None  # per case
    provenance: dict[str, Any] = field(default_factory=dict)
    folder: Path | None = field(default=None, compare=False)  # where its episodes lie, masks and texts included


@dataclass(frozen=True, slots=True)
class Skipped:
    """A folder that is no part of the leaderboard, and why."""

    folder: str
    why: str


def read_all(directories: Iterable[str | Path]) -> tuple[dict[str, list[Played]], list[Skipped]]:
    """Per suite, in the suites' order, its runs; and the folders that were left out.

    Where several folders hold the same policy on the same entry, the first counts; a full run goes before a trial.
    """
    found: dict[str, dict[tuple[str, str], Played]] = {}
    skipped: list[Skipped] = []
    for directory in directories:
        root = Path(directory)
        for folder in find_runs(root):
            place = folder.relative_to(root).as_posix()
            try:
                name, played = read_played(folder)
            except BadDataError as error:
                skipped.append(Skipped(place, _without(str(error), root)))
                continue
            of_suite = found.setdefault(name, {})
            key = (played.entry.folder, played.policy)
            if key in of_suite and not (of_suite[key].trial and not played.trial):
                skipped.append(Skipped(place, "the same policy on the same entry is there already"))
                continue
            of_suite[key] = played
    return {name: list(found[name].values()) for name in suites.SUITES if name in found}, skipped


def read_played(folder: Path) -> tuple[str, Played]:
    """The suite and the run of a folder; BadDataError says why it is no part of a leaderboard."""
    provenance = read_record(folder / PROVENANCE)
    if provenance is None:
        raise BadDataError("no finished run of a suite; give its `medseg-gym leaderboard run` again to finish it")
    name, entry = entry_of(provenance)
    run, measures = read_run(folder), read_record(folder / MEASURES)
    if run.summary is None or not run.episodes:
        raise BadDataError("no summary or no episode; play it again with --restart")
    check_settings(run.settings)
    bad = next(_contradictions(run, provenance, measures), None)
    if bad is not None or measures is None:
        raise BadDataError(f"{bad}; `medseg-gym leaderboard verify` tells all that is wrong with it")
    timed = ((run.times or {}).get("rows") or [{}])[0]
    return name, Played(
        entry=entry,
        policy=run.episodes[0].policy,
        fingerprint=run.episodes[0].tool,
        data=str((run.settings.get("datasets") or {}).get(entry.env, "")),
        cases={(e.seed, e.key): _case(e, s) for e, s in zip(run.episodes, measures["cases"], strict=True)},
        asked=provenance["entry"].get("cases"),
        trial=provenance["entry"].get("cases") != entry.cases,
        seconds=timed.get("seconds_per_case"),
        provenance=provenance,
        folder=folder,
    )


def _contradictions(run: Run, provenance: dict[str, Any], measures: dict[str, Any] | None) -> Iterator[Finding]:
    """What the files alone show to be wrong: numbers that no page may take in, and rules of the suite not kept."""
    yield from filter(None, map(well_formed, run.episodes))
    yield from check_list(run)
    yield from check_suite(run, provenance, measures)
    yield from check_times(run)


def _case(episode: Episode, measures: dict[str, Any]) -> Case:
    iou, dice = curves(episode)
    return Case(
        patient=episode.patient,
        iou=tuple(iou),
        dice=tuple(dice),
        actions=len(episode.turns),
        tool_calls=sum(turn.tool_called for turn in episode.turns),
        unreadable_turns=sum(isinstance(turn.action, Unreadable) for turn in episode.turns),
        ended=episode.ended,
        nsd=measures.get("nsd"),
        hd95=measures.get("hd95"),
        unit=measures.get("unit"),
        entity=_entity(episode, measures),
        kinds=tuple(type(turn.action).__name__.lower() for turn in episode.turns),
    )


def _entity(episode: Episode, measures: dict[str, Any]) -> tuple[int, int] | None:
    drawn, present = measures.get("drawn"), measures.get("present")
    if not isinstance(drawn, bool) or not isinstance(present, bool):
        return None
    failed = episode.ended in ("failed", "unreadable")
    return entity_counts(episode.iou[-1], drawn, present, failed=failed)


def _without(text: str, root: Path) -> str:
    """The text without the folder it was found in: pages name no place of a machine."""
    return text.replace(f"{root}/", "")
