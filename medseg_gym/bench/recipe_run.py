"""Running a recipe: every arm through `evaluate`, resumed where it was cut off, then its table as JSON and Markdown."""

from __future__ import annotations

import hashlib
import json
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from medseg_gym import datasets, tools
from medseg_gym.bench.evaluate import evaluate, machine, versions
from medseg_gym.bench.leaderboard_run import slug
from medseg_gym.bench.provenance import commit, weights_sha256
from medseg_gym.bench.recipe_policies import Recorded
from medseg_gym.bench.recipe_records import Arm, Recipe
from medseg_gym.bench.recipes import recipe, with_agent
from medseg_gym.bench.rundir import write_whole
from medseg_gym.bench.runs import read_record
from medseg_gym.bench.suites import Entry
from medseg_gym.errors import MedSegError
from medseg_gym.policies.base import Policy
from medseg_gym.types import Box, Episode, Query

Progress = Callable[[str, int, int], None]  # (env and policy, cases done, cases)

ORIGIN = "origin.json"  # in a run's folder: what played it
SCHEMA = 1


@dataclass(frozen=True, slots=True)
class Ran:
    """A played arm: its episodes in case order, and the seconds of each."""

    arm: Arm
    episodes: tuple[Episode, ...]
    seconds: tuple[float, ...]
    origin: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Left:
    """An arm that was not played, and what it lacks here."""

    arm: Arm
    tools: tuple[str, ...] = ()  # whose weights are missing
    datasets: tuple[str, ...] = ()  # that are not prepared
    agent: bool = False

    @property
    def why(self) -> str:
        """ "needs MedSAM2's weights and BTCV prepared"."""
        parts = [f"{name}'s weights" for name in self.tools] + [f"{name} prepared" for name in self.datasets]
        return "needs " + " and ".join(parts + ["an agent (--agent)"] * self.agent)


@dataclass(frozen=True, slots=True)
class Result:
    """What a recipe gives back: the record, as result.json holds it, and its two files."""

    record: dict[str, Any]
    json: Path
    markdown: Path


def run_recipe(
    name: str | Recipe,
    *,
    out: str | Path,
    results: str | Path | None = None,
    cases: int | None = None,
    agent: str = "",
    num_envs: int = 8,
    progress: Progress | None = None,
) -> Result:
    """Plays what can be played here and writes NAME/result.json and NAME/table.md into `results`, else into `out`.

    The same call again goes on where it was cut off; recipes with the same `out` share the runs they have in common.
    `cases` plays fewer cases than the recipe has, and its record says so. `agent` is the spec of the policy that a
    recipe leaves open. Nothing that can be played here raises MedSegError with what is missing.
    """
    from medseg_gym.bench.recipe_table import record_of
    from medseg_gym.bench.recipe_text import markdown

    one = recipe(name) if isinstance(name, str) else name
    if cases is not None and cases < 1:
        raise MedSegError(f"cases={cases}; wanted at least 1")
    if agent and not one.needs_agent:
        raise MedSegError(f"recipe {one.name} leaves no policy open, so --agent {agent} has no place in it")
    words = ["medseg-gym", "recipe", "run", one.name]
    words += (["--agent", agent] if agent else []) + (["--cases", str(cases)] if cases is not None else [])
    begun = {"schema": SCHEMA, "recipe": one.name, "command": shlex.join(words), "trial": _is_trial(one, cases)}
    if one.kind == "training":
        record = {**begun, **train(one, Path(out) / "runs", cases=cases, progress=progress)}
    else:
        chosen = with_agent(one, agent) if agent else one
        ran, left = play(chosen, Path(out) / "runs", cases=cases, num_envs=num_envs, progress=progress)
        if not ran:
            reasons = sorted({each.why for each in left})
            raise MedSegError(f"nothing of recipe {one.name} can be played here: {'; '.join(reasons)}")
        record = {**begun, **_origin_of(ran), **record_of(chosen, ran, left)}
    place = Path(out if results is None else results) / one.name
    place.mkdir(parents=True, exist_ok=True)
    write_whole(place / "result.json", json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    write_whole(place / "table.md", markdown(record))
    return Result(record, place / "result.json", place / "table.md")


def play(
    one: Recipe, runs: Path, *, cases: int | None, num_envs: int, progress: Progress | None
) -> tuple[list[Ran], list[Left]]:
    """The arms that can be played here, played; and the others."""
    ran: list[Ran] = []
    left: list[Left] = []
    for arm in one.arms:
        lacks = lacking(arm)
        if lacks is not None:
            left.append(lacks)
            continue
        fewer = arm.entry.cases if cases is None else min(cases, arm.entry.cases or cases)
        job = replace(arm, entry=replace(arm.entry, cases=fewer))
        policy: str | Policy = job.policy
        if job.watches:
            watched = replace(job.entry, tool=job.watches)
            seen = _played(watched, job.policy, runs, num_envs, False, progress)
            policy = Recorded(seen.episodes, f"{job.policy} as played with {job.watches}")
        done = _played(job.entry, policy, runs, 1 if one.cold else num_envs, one.cold, progress)
        ran.append(replace(done, arm=job))
    return ran, left


def train(one: Recipe, runs: Path, *, cases: int | None, progress: Progress | None) -> dict[str, Any]:
    """A recipe that trains: its record. `cases` makes it a trial of a step of everything; seconds are a processor's."""
    from medseg_gym.bench.recipe_table import not_run, told
    from medseg_gym.bench.recipe_training import Training, trained_rows
    from medseg_gym.bench.recipe_ways import TOOL

    training = Training() if cases is None else Training().trial(cases)
    settings = json.dumps(asdict(training), sort_keys=True)
    folder = runs / f"{one.name}-{hashlib.sha256(settings.encode()).hexdigest()[:8]}"
    origin = _begun(folder, TOOL)
    spent = read_record(folder / "seconds.json") or {"seconds": 0.0}
    clock = time.process_time()
    rows = trained_rows(folder, training, progress or (lambda label, done, total: None))
    spent["seconds"] += time.process_time() - clock
    write_whole(folder / "seconds.json", json.dumps(spent) + "\n")
    return {
        "commits": [{name: origin[name] for name in ("commit", "changed")}],
        "machines": [origin["machine"]],
        "versions": origin["versions"],
        "tools": {TOOL: tools.load(TOOL).fingerprint},
        "weights_sha256": {TOOL: origin["weights_sha256"]},
        "seconds": round(spent["seconds"], 1),
        **told(one),
        "training": asdict(training),
        "rows": rows,
        "overall": [],
        "not_run": not_run([], len(rows)),
    }


def _is_trial(one: Recipe, cases: int | None) -> bool:
    """Whether fewer cases are played than the recipe has; of a training any number makes a trial."""
    if cases is None or one.kind == "training":
        return cases is not None
    return any(arm.entry.cases is None or cases < arm.entry.cases for arm in one.arms)


def lacking(arm: Arm) -> Left | None:
    """What has to be got before an arm can be played here; None where all is there. Opens nothing."""
    wanted = dict.fromkeys((arm.entry.tool, arm.watches or arm.entry.tool))
    without = tuple(name for name in wanted if not tools.available(name))
    data = () if datasets.available(arm.entry.dataset) else (arm.entry.dataset,)
    return Left(arm, without, data, not arm.policy) if without or data or not arm.policy else None


def _played(
    entry: Entry, policy: str | Policy, runs: Path, num_envs: int, cold: bool, progress: Progress | None
) -> Ran:
    """One policy on one env, in the folder that all recipes share for it."""
    label = policy if isinstance(policy, str) else policy.name
    settings = json.dumps([entry.record(), cold], sort_keys=True)
    place = f"{entry.env}-{hashlib.sha256(settings.encode()).hexdigest()[:8]}"
    folder = runs / place / slug(label)
    origin = _begun(folder, entry.tool)
    if cold:
        _empty_cache(entry)
    done = evaluate(
        entry.env,
        policy,
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
    origin = {**origin, "tool_fingerprint": done.summary["rows"][0]["tool_fingerprint"]}
    return Ran(Arm(label, entry, label), done.episodes, _seconds(folder), origin)


def _begun(folder: Path, tool: str) -> dict[str, Any]:
    """What plays or trains here; where a run is resumed, what began it."""
    found = read_record(folder / ORIGIN)
    if found is not None:
        return found
    origin = {**commit(), "machine": machine(), "versions": versions(), "weights_sha256": weights_sha256(tool)}
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / ORIGIN, json.dumps(origin, indent=1) + "\n")
    return origin


def _empty_cache(entry: Entry) -> None:
    """Forgets every embedding, after one answer of the tool: the first of a process takes longer than all others."""
    tool = tools.load(entry.tool, **entry.options.get("tool_options", {}))
    blank = np.zeros((64, 64, 3), np.uint8)
    tool.predict([Query(tool.encode([blank])[0], (Box(8, 8, 40, 40),), None)])
    tool.cache.clear()


def _seconds(folder: Path) -> tuple[float, ...]:
    """The seconds of every case, in case order; of a case that was played twice the last."""
    lines = (folder / "times.jsonl").read_text(encoding="utf-8").splitlines()
    by_case = {record["case"]: float(record["seconds"]) for record in map(json.loads, lines)}
    return tuple(by_case[case] for case in sorted(by_case))


def _origin_of(ran: Sequence[Ran]) -> dict[str, Any]:
    """Where the numbers come from: the commits and machines that played them, and how long that took."""
    distinct: dict[str, dict[str, Any]] = {}
    for one in ran:
        distinct.setdefault(json.dumps(one.origin["commit"]), {k: one.origin[k] for k in ("commit", "changed")})
        distinct[json.dumps(one.origin["commit"])]["changed"] |= one.origin["changed"]
    return {
        "commits": list(distinct.values()),
        "machines": sorted({one.origin["machine"] for one in ran}),
        "versions": ran[0].origin["versions"],
        "tools": dict(sorted({one.arm.entry.tool: one.origin["tool_fingerprint"] for one in ran}.items())),
        "weights_sha256": dict(sorted({one.arm.entry.tool: one.origin["weights_sha256"] for one in ran}.items())),
        "seconds": round(sum(sum(one.seconds) for one in ran), 1),
    }
