"""What a run's settings, list of episodes and summary must be: the checks of `verify` that look at no single turn."""

from __future__ import annotations

import ast
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from medseg_gym.bench.runs import Run
from medseg_gym.bench.summary import SUMMARY_SCHEMA, summarise_row
from medseg_gym.bench.verify_findings import Finding, about, run_finding
from medseg_gym.errors import BadDataError
from medseg_gym.types import Episode

TOLERANCE = 1e-9
MAX_KEYS = 1_000_000
MAX_TURNS = 10_000  # the longest horizon that EnvConfig takes
_SETTINGS: dict[str, type | tuple[type, ...]] = {
    "split": str,
    "seed": int,
    "pairs": list,
    "envs": dict,
    "rewards": dict,
    "tools": dict,
    "datasets": dict,
    "keys": dict,
}
# what of an env's settings decides an episode, and what it must be read as
_ENV: dict[str, type | tuple[type, ...]] = {
    "split": str,
    "structures": tuple,
    "horizon": int,
    "verbs": (tuple, type(None)),
    "stop_after_repeats": int,
    "on_unreadable": str,
}


def check_settings(settings: Mapping[str, Any]) -> None:
    """BadDataError where run.json is not what evaluate writes."""
    for name, kind in _SETTINGS.items():
        if not isinstance(settings.get(name), kind) or isinstance(settings.get(name), bool):
            raise BadDataError(f"run.json: {name} is {settings.get(name)!r:.100}; wanted what evaluate writes")
    if isinstance(settings.get("cases", ""), bool | str | list | dict | float):
        raise BadDataError("run.json: cases is no number and not null")
    if not all(isinstance(p, list) and len(p) == 2 and all(isinstance(s, str) for s in p) for p in settings["pairs"]):
        raise BadDataError("run.json: pairs are not pairs of an env and a policy")
    for env, _ in settings["pairs"]:
        for name in ("envs", "rewards", "tools", "datasets", "keys"):
            if env not in settings[name]:
                raise BadDataError(f"run.json: {name} lacks {env}")
        keys = settings["keys"][env]
        if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys) or len(keys) > MAX_KEYS:
            raise BadDataError(f"run.json: keys of {env} are no list of keys")
        env_settings(settings, env)


def env_settings(settings: Mapping[str, Any], env: str) -> dict[str, Any]:
    """The settings of an env that decide its episodes, as values; BadDataError where they are none."""
    written = settings["envs"][env]
    read: dict[str, Any] = {}
    for name, kind in _ENV.items():
        try:
            text = written[name]
            if not isinstance(text, str) or len(text) > 100_000:
                raise ValueError("no text")
            read[name] = ast.literal_eval(text)
        except (KeyError, TypeError, ValueError, SyntaxError, MemoryError, RecursionError) as error:
            raise BadDataError(f"run.json: {name} of {env}: {error!r:.200}") from None
        bounded = not isinstance(read[name], int) or 0 <= read[name] <= MAX_TURNS
        if not isinstance(read[name], kind) or isinstance(read[name], bool) or not bounded:
            raise BadDataError(f"run.json: {name} of {env} is {text:.100}")
    return read


def check_list(run: Run) -> Iterator[Finding]:
    """Every case of every pair once, in order, with the labels and settings of run.json."""
    settings = run.settings
    expected = [(env, policy, case) for env, policy in settings["pairs"] for case in range(len(settings["keys"][env]))]
    there = Counter((e.env, e.policy, e.case) for e in run.episodes)
    known = set(expected)
    for env, policy, case in expected:
        place = {"env": env, "policy": policy, "case": case, "key": settings["keys"][env][case]}
        if not there[env, policy, case]:
            yield run_finding("incomplete", "case", "no episode", "one", **place)
        elif there[env, policy, case] > 1:
            yield run_finding("tampered", "case", f"{there[env, policy, case]} episodes", "one", **place)
    for episode in run.episodes:
        if (episode.env, episode.policy, episode.case) not in known:
            yield about(episode, "tampered", "case", "an episode that run.json does not name", "none")
        else:
            yield from _labels(episode, settings)
    order = [(e.env, e.policy, e.case) for e in run.episodes]
    if Counter(order) == Counter(expected) and order != expected:
        at = next(i for i, (one, other) in enumerate(zip(order, expected, strict=True)) if one != other)
        yield about(run.episodes[at], "tampered", "order", f"line {at + 1}", f"{expected[at]} there")
    asked = settings.get("cases")
    for env, keys in settings["keys"].items():
        if len(set(keys)) != len(keys) or sorted(keys) != keys:
            yield run_finding("tampered", "keys", "keys out of order or twice", "sorted, each once", env=env)
        if isinstance(asked, int) and len(keys) > asked:
            yield run_finding("tampered", "keys", f"{len(keys)} cases", f"at most the {asked} asked for", env=env)


def _labels(episode: Episode, settings: Mapping[str, Any]) -> Iterator[Finding]:
    reward = settings["rewards"][episode.env]
    wanted = {
        "key": settings["keys"][episode.env][episode.case],
        "seed": settings["seed"],
        "horizon": env_settings(settings, episode.env)["horizon"],
        "tool": settings["tools"][episode.env],
        "reward": reward["name"] if isinstance(reward, dict) else None,
    }
    for name, value in wanted.items():
        if getattr(episode, name) != value:
            yield about(episode, "tampered", name, getattr(episode, name), f"{value}, as run.json has it")
    stored = episode.extra.get("reward") if isinstance(episode.extra, Mapping) else None
    if stored is not None and stored != reward:
        yield about(episode, "tampered", "reward", stored, reward)


def check_summary(run: Run) -> Iterator[Finding]:
    """The stored summary against the one that the episodes give."""
    summary, settings = run.summary, run.settings
    checked = (
        ("schema", SUMMARY_SCHEMA),
        ("split", settings["split"]),
        ("seed", settings["seed"]),
        ("cases_asked", settings.get("cases")),
        ("cases", max((len(settings["keys"][env]) for env, _ in settings["pairs"]), default=0)),
    )
    if summary is None:
        yield run_finding("incomplete", "summary.json", "none", "one: give the same evaluate command again")
        return
    for name, wanted in checked:
        if summary.get(name) != wanted:
            yield run_finding("tampered", f"summary.json: {name}", summary.get(name), wanted)
    rows = summary.get("rows")
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        yield run_finding("tampered", "summary.json", "no rows", "one a pair")
        return
    found = [[row.get("env"), row.get("policy")] for row in rows]
    if found != settings["pairs"]:
        yield run_finding("tampered", "summary.json: rows", found, settings["pairs"])
        return
    for row, (env, policy) in zip(rows, settings["pairs"], strict=True):
        mine = [e for e in run.episodes if (e.env, e.policy) == (env, policy)]
        if [e.case for e in mine] != list(range(len(settings["keys"][env]))) or not mine:
            continue  # said already: what is missing, or there twice, would be said again of every mean
        if {e.horizon for e in mine} != {env_settings(settings, env)["horizon"]}:
            continue  # said already, and a summary is as long as its horizon
        if row.get("tool_fingerprint") != settings["tools"][env]:
            what = "summary.json: tool_fingerprint"
            yield run_finding("tampered", what, row.get("tool_fingerprint"), settings["tools"][env], env=env)
        for name, wanted in summarise_row(mine).items():
            if not same(row.get(name), wanted):
                yield run_finding("tampered", f"summary.json: {name}", row.get(name), wanted, env=env, policy=policy)


def same(found: Any, wanted: Any) -> bool:
    """Whether two JSON values are equal, numbers within TOLERANCE."""
    if isinstance(wanted, Mapping):
        alike = isinstance(found, Mapping) and found.keys() == wanted.keys()
        return alike and all(same(found[name], value) for name, value in wanted.items())
    if isinstance(wanted, Sequence) and not isinstance(wanted, str):
        return isinstance(found, Sequence) and len(found) == len(wanted) and all(map(same, found, wanted))
    if isinstance(wanted, float) and not isinstance(found, bool) and isinstance(found, int | float):
        fits = abs(found) <= 2**63  # an int may be too large for a float
        return fits and math.isclose(found, wanted, rel_tol=TOLERANCE, abs_tol=TOLERANCE)
    return bool(found == wanted) and isinstance(found, bool) == isinstance(wanted, bool)
