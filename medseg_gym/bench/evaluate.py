"""`evaluate`: policies on envs, resumable, from episodes to summary and report."""

from __future__ import annotations

import json
import platform
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import gymnasium as gym
from gymnasium.vector import AutoresetMode

from medseg_gym import policies as policy_registry
from medseg_gym.bench.cases import choose_cases, content_of
from medseg_gym.bench.drive import drive
from medseg_gym.bench.rundir import RunDir
from medseg_gym.bench.summary import SUMMARY_SCHEMA, summarise_row
from medseg_gym.envs.config import EnvConfig, whole_number
from medseg_gym.envs.vector import SegmentVectorEnv
from medseg_gym.errors import MedSegError, unknown
from medseg_gym.policies.base import Policy
from medseg_gym.registration import ANY
from medseg_gym.rewards import describe
from medseg_gym.types import Episode, Unreadable

SECRET = "token"  # the option of a tool server that no record may hold
Progress = Callable[[str, int, int], None]  # (label, cases done, cases)


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What an evaluation gives back."""

    summary: Mapping[str, Any]
    episodes: tuple[Episode, ...]
    directory: Path
    report: Path | None


@dataclass(frozen=True, slots=True)
class _Pair:
    env: SegmentVectorEnv
    env_id: str
    policy: Policy
    label: str
    keys: list[str]


def evaluate(
    env: str | Sequence[str],
    policy: str | Policy | Sequence[str | Policy],
    *,
    out: str | Path,
    cases: int | None = 100,
    seed: int = 0,
    split: str = "test",
    num_envs: int = 8,
    restart: bool = False,
    report: bool = True,
    progress: Progress | None = None,
    **options: Any,
) -> Evaluation:
    """Plays every policy on every env and writes episodes.jsonl, summary.json, times.json and report.html into `out`.

    Cases are a seeded choice of the split (bench.cases). An interrupted run goes on when it is called again with the
    same arguments, and ends with the same files, times aside. Failed and unreadable episodes count as 0.
    `options` are the env's (horizon=, reward=, structures=, verbs=, tool_options=, ...; dataset= and tool= for
    "MedSeg-v0"), the same for every env.
    """
    envs = [env] if isinstance(env, str) else list(env)
    wanted = [policy] if isinstance(policy, str) or not isinstance(policy, Sequence) else list(policy)
    if not envs or not wanted:
        raise MedSegError("nothing to evaluate; give at least one env and one policy")
    seed = whole_number("seed", seed, 0, 2**63 - 1)
    for name in ("dataset", "tool"):
        if name in options and any(env_id != ANY for env_id in envs):
            raise MedSegError(f"{name}= goes with the env {ANY}; the others have theirs in their id: {', '.join(envs)}")
    options.setdefault("on_error", "fail")
    with ExitStack() as opened:  # the run's files; models and connections of the policies made here
        pairs: list[_Pair] = []
        notes: list[str] = []
        for made in (_make(name, num_envs, split, options) for name in dict.fromkeys(envs)):
            env_id = made.name
            keys, more = choose_cases(made.dataset, split, made.engine.config.structures, cases, seed)
            notes += more
            for spec in wanted:
                ready = policy_registry.make(spec, made)
                if isinstance(spec, str) and callable(close := getattr(ready, "close", None)):
                    opened.callback(close)
                pairs.append(_Pair(made, env_id, ready, ready.name, keys))
        _check_labels(pairs)
        run = RunDir(Path(out), _settings(pairs, cases, seed, split), restart=restart)
        opened.callback(run.close)
        _check_resumed(run, pairs)
        for pair in pairs:
            _play(pair, run, seed, progress)
        summary = _summary(run, pairs, cases, seed, split, notes)
        run.write("summary.json", summary)
        run.write("times.json", _times(run, pairs))
        page = None
        if report:
            from medseg_gym.bench.report import write_report

            page = write_report(run.path, {pair.env_id: pair.env.dataset for pair in pairs})
        return Evaluation(summary, tuple(run.episodes), run.path, page)


def _make(env_id: str, num_envs: int, split: str, options: Mapping[str, Any]) -> SegmentVectorEnv:
    known = gym.registry.get(env_id)
    if known is None or known.vector_entry_point != "medseg_gym.envs:SegmentVectorEnv":
        raise unknown("env", env_id, (name for name in gym.registry if name.startswith("MedSeg-")))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="an image observation does not say")  # policies get the View
        made = gym.make_vec(
            env_id,
            num_envs=num_envs,
            vectorization_mode="vector_entry_point",
            autoreset_mode=AutoresetMode.DISABLED,
            split=split,
            **options,
        )
    assert isinstance(made, SegmentVectorEnv)
    return made


def _check_labels(pairs: Sequence[_Pair]) -> None:
    seen: set[tuple[str, str]] = set()
    for pair in pairs:
        if (pair.env_id, pair.label) in seen:
            raise MedSegError(f"two policies are named {pair.label!r}; give each its own .name")
        seen.add((pair.env_id, pair.label))


def _settings(pairs: Sequence[_Pair], cases: int | None, seed: int, split: str) -> dict[str, Any]:
    """All that decides the episodes; two runs with equal settings have equal episodes."""
    from medseg_gym import __version__

    engines = {pair.env_id: pair.env.engine for pair in pairs}
    return {
        "version": __version__,
        "split": split,
        "seed": seed,
        "cases": cases,
        "pairs": [[pair.env_id, pair.label] for pair in pairs],
        "envs": {name: _described(engine.config) for name, engine in engines.items()},
        "rewards": {name: describe(engine.reward) for name, engine in engines.items()},
        "tools": {name: engine.tool.fingerprint for name, engine in engines.items()},
        "datasets": {pair.env_id: content_of(pair.env.dataset, pair.keys) for pair in pairs},
        "keys": {pair.env_id: pair.keys for pair in pairs},
    }


def _described(config: EnvConfig) -> dict[str, str]:
    """The env's settings; the reward is described by its terms, tool and dataset by their content."""
    apart = ("reward", "timing", "tool_options", "dataset_options")
    return {f.name: repr(getattr(config, f.name)) for f in fields(config) if f.name not in apart}


def _check_resumed(run: RunDir, pairs: Sequence[_Pair]) -> None:
    """Episodes found on disk must be the beginning of this very run."""
    expected = ((p.env_id, p.label, case, key) for p in pairs for case, key in enumerate(p.keys))
    for episode, wanted in zip(run.episodes, expected, strict=False):
        if (episode.env, episode.policy, episode.case, episode.key) != wanted:
            raise MedSegError(
                f"{run.path / 'episodes.jsonl'}: found case {episode.case} ({episode.key}) of {episode.policy} where "
                f"{wanted[3]} of {wanted[1]} should be; start over with --restart"
            )


def _play(pair: _Pair, run: RunDir, seed: int, progress: Progress | None) -> None:
    there = sum(e.env == pair.env_id and e.policy == pair.label for e in run.episodes)
    label = f"{pair.env_id}  {pair.label}"
    if progress:
        progress(label, there, len(pair.keys))
    todo = range(there, len(pair.keys))
    for done, (episode, timing) in enumerate(
        drive(pair.env, pair.policy, pair.keys, todo, label=pair.label, seed=seed), start=there + 1
    ):
        times = {"seconds": timing.seconds, "encodes": timing.encodes, "cache_hits": timing.cache_hits}
        run.append(episode, times | ({"costs": dict(timing.costs)} if timing.costs else {}))
        if progress:
            progress(label, done, len(pair.keys))


def _summary(
    run: RunDir, pairs: Sequence[_Pair], cases: int | None, seed: int, split: str, notes: Sequence[str]
) -> dict[str, Any]:
    rows = []
    notes = list(notes)
    for pair in pairs:
        episodes = [e for e in run.episodes if e.env == pair.env_id and e.policy == pair.label]
        labels = {
            "env": pair.env_id,
            "dataset": pair.env.dataset.name,
            "dataset_options": _plain(pair.env.engine.config.dataset_options),
            "tool": pair.env.tool.name,
            "tool_options": _plain({k: v for k, v in pair.env.engine.config.tool_options.items() if k != SECRET}),
            "tool_fingerprint": pair.env.tool.fingerprint,
            "policy": pair.label,
        }
        rows.append(summarise_row(episodes, **labels))
        failed = [e for e in episodes if e.ended == "failed"]
        if failed:
            notes.append(f"{pair.env_id}, {pair.label}: {len(failed)} episodes failed; the first: {failed[0].error}")
        unread = [t.action.reason for e in episodes for t in e.turns if isinstance(t.action, Unreadable)]
        if unread:
            notes.append(f"{pair.env_id}, {pair.label}: {len(unread)} turns were unreadable; the first: {unread[0]}")
    return {
        "schema": SUMMARY_SCHEMA,
        "split": split,
        "seed": seed,
        "cases_asked": cases,
        "cases": max(len(pair.keys) for pair in pairs),
        "notes": notes,
        "versions": versions(),
        "rows": rows,
    }


def _plain(options: Mapping[str, Any]) -> dict[str, Any] | None:
    """Options that JSON holds, so that a report can be drawn again from the folder alone; None where it does not."""
    try:
        return dict(json.loads(json.dumps(dict(options))))
    except TypeError:
        return None


def _times(run: RunDir, pairs: Sequence[_Pair]) -> dict[str, Any]:
    """What must stay out of every byte comparison: seconds and cache work, with the machine."""
    rows = []
    for pair in pairs:
        times = [t for t in run.times if t["env"] == pair.env_id and t["policy"] == pair.label]
        turns = sum(len(e.turns) for e in run.episodes if e.env == pair.env_id and e.policy == pair.label)
        seconds = sum(t["seconds"] for t in times)
        rows.append(
            {
                "env": pair.env_id,
                "policy": pair.label,
                "seconds_per_case": seconds / max(1, len(times)),
                "seconds_per_action": seconds / max(1, turns),
                "encodes": sum(t["encodes"] for t in times),
                "cache_hits": sum(t["cache_hits"] for t in times),
                **({"costs": _costs(times)} if any("costs" in t for t in times) else {}),
            }
        )
    return {"machine": machine(), "rows": rows}


def _costs(times: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Sums of what the policy's decisions cost: requests, tokens, seconds of waiting."""
    sums: dict[str, float] = {}
    for costs in (t.get("costs", {}) for t in times):
        for name, value in costs.items():
            sums[name] = sums.get(name, 0) + value
    return sums


def versions() -> dict[str, str]:
    """The versions that decide an episode's bytes."""
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in ("medseg-gym", "gymnasium", "numpy", "opencv-python-headless", "torch"):
        try:
            found[name.replace("-", "_")] = version(name)
        except PackageNotFoundError:  # run from a source tree, or without what this run did not need
            continue
    return found


def machine() -> str:
    """The machine in a line, for people who read times."""
    import os

    return f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()}, Python {platform.python_version()}"
