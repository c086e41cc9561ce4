"""Playing a suite: a run folder an entry and policy, resumed where it was cut off, left alone where it is finished."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from medseg_gym import datasets
from medseg_gym.bench.evaluate import evaluate, machine, versions
from medseg_gym.bench.measures import measures_of
from medseg_gym.bench.provenance import command_of, commit, weights_sha256
from medseg_gym.bench.rundir import FILES, write_whole
from medseg_gym.bench.runs import EPISODES, read_episodes, read_record
from medseg_gym.bench.suites import Entry, Suite, missing, suite
from medseg_gym.errors import MedSegError, PolicyUnavailableError, ToolUnavailableError, UnknownNameError
from medseg_gym.policies.base import Policy

Progress = Callable[[str, int, int], None]  # (entry, cases done, cases)

PROVENANCE = "provenance.json"  # written last: a folder with it is finished
MEASURES = "measures.json"
SCHEMA = 1


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one policy on one entry."""

    entry: Entry
    policy: str
    state: str  # "played", "failed" (in every case), "there" (finished before), "missing", "refused"; see note
    folder: Path
    note: str = ""
    commands: tuple[str, ...] = ()


def run_suite(
    name: str | Suite,
    policies: Sequence[str | Policy] = (),
    *,
    out: str | Path,
    cases: int | None = None,
    tools: Sequence[str] = (),
    num_envs: int = 8,
    restart: bool = False,
    progress: Progress | None = None,
) -> list[Outcome]:
    """Plays the policies (the suite's own where none are given) on every entry whose data and weights are here.

    What is finished is not played again, what was cut off goes on, and a new policy joins what is there. A folder
    with other settings, or a policy that cannot play an entry, is refused with the reason and the others go on.
    `cases` plays fewer cases than the suite asks for: a trial, marked as such wherever it is shown. `tools` keeps
    only the entries of these tools.
    """
    wanted = suite(name) if isinstance(name, str) else name
    entries = _chosen(wanted, cases, tools)
    outcomes: list[Outcome] = []
    for entry in entries:
        specs = list(dict.fromkeys(policies)) or list(wanted.policies_of(entry))
        lacks = missing(entry)
        for number, spec in enumerate(specs):
            label = spec if isinstance(spec, str) else spec.name
            folder = Path(out) / wanted.name / entry.folder / slug(label)
            if lacks is not None:
                outcomes.append(Outcome(entry, label, "missing", folder, lacks.what, lacks.commands))
                continue
            shown = _within(progress, entry.folder, number, len(specs))
            job = _Job(wanted, entry, spec, label, folder, cases)
            try:
                outcomes.append(_play(job, num_envs, restart, shown))
            except (PolicyUnavailableError, ToolUnavailableError):
                raise  # its server is gone: every other entry would say the same, and this one is resumed
            except MedSegError as error:
                outcomes.append(Outcome(entry, label, "refused", folder, str(error)))
    return outcomes


def slug(label: str) -> str:
    """A folder's name for a policy's: as it is where that is safe, else with a hash, so that two never share one."""
    safe = re.sub(r"[^A-Za-z0-9._=,-]+", "_", label).strip(".")[:80] or "policy"
    return safe if safe == label else f"{safe}-{hashlib.sha256(label.encode()).hexdigest()[:8]}"


def _chosen(wanted: Suite, cases: int | None, tools: Sequence[str]) -> list[Entry]:
    if cases is not None and cases < 1:
        raise MedSegError(f"cases={cases}; wanted at least 1")
    known = dict.fromkeys(entry.tool for entry in wanted.entries)
    for tool in tools:
        if tool not in known:
            raise UnknownNameError(f"suite {wanted.name} has no tool {tool!r}; it has {', '.join(known)}")
    return [
        replace(entry, cases=entry.cases if cases is None else min(cases, entry.cases or cases))
        for entry in wanted.entries
        if not tools or entry.tool in tools
    ]


def _within(progress: Progress | None, label: str, number: int, policies: int) -> Progress | None:
    """The progress of one policy as a part of its entry's."""
    if progress is None:
        return None
    return lambda _, done, total: progress(label, number * total + done, policies * total)


@dataclass(frozen=True, slots=True)
class _Job:
    suite: Suite
    entry: Entry
    spec: str | Policy
    label: str
    folder: Path
    cases: int | None  # as they were asked for, for the record of the command


def _play(job: _Job, num_envs: int, restart: bool, progress: Progress | None) -> Outcome:
    """Plays, goes on with, or leaves alone one run folder."""
    entry, folder = job.entry, job.folder
    finished = read_record(folder / PROVENANCE)
    if finished is not None and not restart:
        differs = changed(folder, finished, entry, job.label)
        if differs:
            raise MedSegError(
                f"{folder} holds a run with other {', '.join(differs)} than asked for now; choose another --out, or "
                "play it again with --restart"
            )
        if progress:
            keys = ((read_record(folder / "run.json") or {}).get("keys") or {}).get(entry.env) or [""]
            progress("", len(keys), len(keys))
        return Outcome(entry, job.label, "there", folder)
    if restart:
        for name in (PROVENANCE, MEASURES, *EPISODES, *FILES):
            (folder / name).unlink(missing_ok=True)
    done = evaluate(
        entry.env,
        job.spec,
        out=folder,
        cases=entry.cases,
        seed=entry.seed,
        split=entry.split,
        num_envs=num_envs,
        report=False,
        progress=progress,
        horizon=entry.horizon,
        **dict(entry.options),
    )
    data = datasets.load(entry.dataset, **entry.options.get("dataset_options", {}))
    _write(folder / MEASURES, measures_of(done.episodes, data))
    row, notes = done.summary["rows"][0], done.summary["notes"]
    _write(folder / PROVENANCE, _provenance(job, row))
    state = "failed" if row["ended"]["failed"] == row["episodes"] else "played"
    return Outcome(entry, job.label, state, folder, "; ".join(notes))


def _provenance(job: _Job, row: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "suite": job.suite.name,
        "entry": job.entry.record(),
        "policy": job.label,
        "name": row["policy"],
        "command": command_of(job.suite.name, job.label, job.cases),
        **commit(),
        "versions": versions(),
        "machine": machine(),
        "tool_fingerprint": row["tool_fingerprint"],
        "weights_sha256": weights_sha256(job.entry.tool),
    }


def changed(folder: Path, finished: dict[str, Any], entry: Entry, label: str) -> list[str]:
    """What of a finished run is not what would be played now: its policy, entry, tool or data. Versions may differ."""
    from medseg_gym import tools
    from medseg_gym.bench.cases import content_of

    settings = read_record(folder / "run.json") or {}
    tool = tools.load(entry.tool, **entry.options.get("tool_options", {}))
    data = datasets.load(entry.dataset, **entry.options.get("dataset_options", {}))
    keys = settings.get("keys", {}).get(entry.env, [])
    try:
        content = content_of(data, keys)
    except KeyError:
        content = ""
    checks = {
        "policy": finished.get("policy") == label,
        "entry": finished.get("entry") == entry.record(),
        "tool": settings.get("tools") == {entry.env: tool.fingerprint},
        "data": settings.get("datasets") == {entry.env: content},
    }
    return [name for name, same in checks.items() if not same]


def freeze(source: str | Path, destination: str | Path) -> list[Path]:
    """Copies every finished run below a folder, episodes gzipped, as it is to be published; the folders written.

    Equal runs give equal bytes. Unfinished runs are left out; what was there of the same run is replaced. A folder
    without a finished run raises MedSegError.
    """
    import gzip

    from medseg_gym.bench.runs import find_runs

    written = []
    for folder in find_runs(source):
        finished = read_record(folder / PROVENANCE)
        if finished is None:
            continue
        read_episodes(folder)  # nothing is published that cannot be read
        place = Path(destination) / folder.relative_to(source)
        place.mkdir(parents=True, exist_ok=True)
        for name in ("run.json", "summary.json", "times.json", MEASURES):
            write_whole(place / name, (folder / name).read_text(encoding="utf-8"))
        plain = next(folder / name for name in EPISODES if (folder / name).is_file())
        data = gzip.decompress(plain.read_bytes()) if plain.suffix == ".gz" else plain.read_bytes()
        part = place / f"{EPISODES[1]}.part"
        part.write_bytes(gzip.compress(data, 9, mtime=0))
        part.replace(place / EPISODES[1])
        (place / EPISODES[0]).unlink(missing_ok=True)
        _write(place / PROVENANCE, finished)
        written.append(place)
    if not written:
        raise MedSegError(f"no finished run in {source}; play one: medseg-gym leaderboard run --suite quick")
    return written


def _write(file: Path, record: Any) -> None:
    write_whole(file, json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
