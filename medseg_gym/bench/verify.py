"""`verify`: is a run what it says it is? Its files against each other, then against data and tool as far as here.

    files    run.json, episodes and summary agree; every case once; numbers follow from turns by the rules of the env;
             a suite's run was played by the rules of its entry
    data     the cases are those the seed chooses; stored masks are scored, and measured, again; scripted policies
             decide again
    tool     the episodes are played again (bench.replay)

The files come from strangers: sizes are bounded, nothing they name is imported or opened but data and tools by id.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from medseg_gym import policies
from medseg_gym import tools as tool_registry
from medseg_gym.bench.cases import choose_cases, content_of
from medseg_gym.bench.leaderboard_run import MEASURES, PROVENANCE
from medseg_gym.bench.provenance import weights_sha256
from medseg_gym.bench.replay import is_unread, replay
from medseg_gym.bench.rescore import spec_of
from medseg_gym.bench.runs import Run, read_record, read_run
from medseg_gym.bench.verify_episode import check_case, check_decisions, check_episode, start_of, well_formed
from medseg_gym.bench.verify_findings import Finding, Report, about, run_finding, worst
from medseg_gym.bench.verify_run import check_list, check_settings, check_summary, env_settings
from medseg_gym.bench.verify_source import Source, sources_of
from medseg_gym.bench.verify_suite import check_measures, check_suite, check_times
from medseg_gym.datasets.base import Dataset
from medseg_gym.envs.spaces import tool_verbs
from medseg_gym.envs.vector import SegmentVectorEnv
from medseg_gym.errors import BadDataError, MedSegError
from medseg_gym.policies.base import BUILTIN
from medseg_gym.registration import env_id
from medseg_gym.tools.base import SegmentationTool
from medseg_gym.types import Episode

Progress = Callable[[str, int, int], None]  # (what, done, of how many)

SHOWN = 50  # findings a report holds
SLOTS = 8


@dataclass(slots=True)
class _State:
    """What is known while a run is verified."""

    run: Run
    sound: list[Episode]  # those whose records can be worked with
    chosen: list[Episode] = field(default_factory=list)  # of them, those that are looked at against the data
    findings: list[Finding] = field(default_factory=list)
    checks: dict[str, str] = field(default_factory=dict)
    replayed: int = 0
    provenance: dict[str, Any] | None = None  # of a suite's run, like the measures
    measures: dict[str, Any] | None = None
    skipped: bool = False  # whether something that should have been replayed was not


def verify(
    folder: str | Path,
    *,
    cases: int | None = None,
    rng: np.random.Generator | None = None,
    play: bool = True,
    datasets: Mapping[str, Dataset] | None = None,
    tools: Mapping[str, SegmentationTool] | None = None,
    progress: Progress | None = None,
) -> Report:
    """What is to be said of the run in a folder that evaluate wrote.

    `cases` looks at that many cases of every env and policy against data and tool, drawn from `rng`, and at all in the
    files; None takes all. `play=False` needs no tool. `datasets` and `tools` give those of an env id that is not to
    be had by name. What is not here is not an error: `checks` says what could not be looked at.
    """
    try:
        run = read_run(folder)
        provenance, measures = (read_record(Path(folder) / name) for name in (PROVENANCE, MEASURES))
    except BadDataError as error:
        return _unreadable(folder, run_finding("incomplete", "file", error, "a whole run"))
    try:
        check_settings(run.settings)
        specs = {env: spec_of(run.settings["rewards"][env]) for env, _ in run.settings["pairs"]}
    except BadDataError as error:
        return _unreadable(
            folder, run_finding("tampered", "run.json", error, "the settings of a run"), len(run.episodes)
        )
    state = _State(run, [], provenance=provenance, measures=measures)
    readable: list[Episode] = []
    for episode in run.episodes:
        bad = well_formed(episode)
        if bad is None:
            readable.append(episode)
        else:
            state.findings.append(bad)
    state.sound = [episode for episode in readable if episode.env in specs]
    state.findings += [*check_list(run._replace(episodes=readable)), *check_summary(run._replace(episodes=readable))]
    state.findings += [*check_suite(run._replace(episodes=readable), provenance, measures), *check_times(run)]
    settings = {env: env_settings(run.settings, env) for env in specs}
    for number, episode in enumerate(state.sound, start=1):
        state.findings += check_episode(episode, settings[episode.env], specs[episode.env])
        if progress is not None:
            progress("files", number, len(state.sound))
    state.checks["files"] = f"{len(run.episodes)} episodes"
    state.chosen = _choose(state, cases, rng or np.random.default_rng(0))
    sources = sources_of(run, Path(folder))
    for env in specs:
        _verify_env(state, env, sources[env], settings[env], specs[env], play, datasets or {}, tools or {}, progress)
    replayed = state.replayed > 0 and not state.skipped
    return _report(folder, state, replayed)


def _choose(state: _State, cases: int | None, rng: np.random.Generator) -> list[Episode]:
    """The episodes to look at against the data: of cases that run.json names, `cases` of every pair."""
    keys = state.run.settings["keys"]
    named = [e for e in state.sound if 0 <= e.case < len(keys[e.env]) and keys[e.env][e.case] == e.key]
    if cases is None:
        return named
    chosen: list[Episode] = []
    for env, policy in state.run.settings["pairs"]:
        mine = [e for e in named if (e.env, e.policy) == (env, policy)]
        chosen += [mine[i] for i in sorted(rng.permutation(len(mine))[:cases].tolist())]
    return chosen


def _verify_env(
    state: _State,
    env: str,
    source: Source,
    settings: dict[str, Any],
    spec: Any,
    play: bool,
    datasets: Mapping[str, Dataset],
    tools: Mapping[str, SegmentationTool],
    progress: Progress | None,
) -> None:
    mine = [e for e in state.chosen if e.env == env]
    data = datasets.get(env)
    try:
        data = data if data is not None else source.dataset_here()
        foreign = _check_dataset(state, env, data, settings)
    except MedSegError as error:
        _skip(state, env, "data", str(error))
        return
    if foreign and not source.written and env not in datasets:
        state.findings.pop()
        _skip(state, env, "data", "its files do not say with which options its dataset was made")
        return
    if foreign:
        _skip(state, env, "data", "the dataset here is another")
        return
    if env not in datasets and env_id(data.name, source.tool) != env:
        state.findings.append(run_finding("tampered", "env", env, env_id(data.name, source.tool), env=env))
    tool, why = tools.get(env), ""
    try:
        tool = tool_registry.load(tool) if tool is not None else source.tool_here()
    except MedSegError as error:
        why = str(error)
    verbs = settings["verbs"] or (tool_verbs(tool) if tool is not None else None)
    _check_data(state, env, data, mine, spec, verbs, progress)
    if state.measures is not None:
        found, state.checks[f"measures of {env}"] = check_measures(mine, state.run, state.measures, data)
        state.findings += found
    if tool is None:
        _skip(state, env, "replay", why)
        return
    wanted = state.run.settings["tools"][env]
    if tool.fingerprint != wanted:
        state.findings.append(
            run_finding("different", "tool", wanted, f"{tool.fingerprint}, the {tool.name} that is here", env=env)
        )
        _skip(state, env, "replay", f"a foreign tool: the run has {wanted}, here is {tool.fingerprint}")
        return
    if state.provenance is not None and env not in tools:
        here, told = weights_sha256(source.tool), state.provenance.get("weights_sha256")
        if here != told:
            state.findings.append(run_finding("tampered", f"{PROVENANCE}: weights_sha256", told, here, env=env))
    if not play:
        _skip(state, env, "replay", "not asked for")
        return
    _replay(state, env, data, tool, mine, settings, spec, progress)


def _check_dataset(state: _State, env: str, data: Dataset, settings: dict[str, Any]) -> bool:
    """Holds the dataset here against the run; whether it is another one."""
    run, keys = state.run.settings, state.run.settings["keys"][env]
    try:
        chosen, _ = choose_cases(data, settings["split"], settings["structures"], run["cases"], run["seed"])
    except (MedSegError, TypeError, ValueError) as error:
        raise BadDataError(f"its cases cannot be chosen again: {error}") from None
    try:
        content = content_of(data, keys)
    except KeyError:
        content = "one without all the keys of run.json"
    if content != run["datasets"][env]:
        state.findings.append(run_finding("different", "dataset", run["datasets"][env], content, env=env))
        return True
    if chosen != keys:
        gone, more = sorted(set(chosen) - set(keys)), sorted(set(keys) - set(chosen))
        found = f"{len(keys)} cases, {len(more)} of them others" + (f", as {more[0]}" if more else "")
        wanted = f"the {len(chosen)} that seed {run['seed']} chooses" + (f", as {gone[0]}" if gone else "")
        state.findings.append(run_finding("tampered", "cases or seed", found, wanted, env=env))
    return False


def _check_data(
    state: _State,
    env: str,
    data: Dataset,
    episodes: Sequence[Episode],
    spec: Any,
    verbs: Sequence[str] | None,
    progress: Progress | None,
) -> None:
    """Scores the stored masks again, and asks the scripted policies again."""
    asked: dict[str, Any] = {}
    decided = 0
    ordered = sorted(episodes, key=lambda e: e.key)
    sample = None
    for number, episode in enumerate(ordered, start=1):
        try:
            sample = sample if sample is not None and sample.key == episode.key else data[episode.key]
        except (KeyError, MedSegError) as error:
            if not is_unread(episode):
                state.findings.append(about(episode, "different", "case", error, "a case of the dataset here"))
            continue
        if is_unread(episode):
            continue  # the replay says whether it can be read here
        found = list(check_case(episode, sample, start_of(data, episode.key), spec))
        if not found and verbs is not None:
            policy = asked.setdefault(episode.policy, _scripted(episode.policy, data, verbs))
            if policy is not None and episode.ended != "failed":
                found += check_decisions(episode, sample, policy, verbs)
                decided += 1
        state.findings += found
        if progress is not None:
            progress(f"data of {env}", number, len(ordered))
    state.checks[f"data of {env}"] = f"{len(ordered)} episodes scored again, {decided} decided again"


def _scripted(label: str, data: Dataset, verbs: Sequence[str]) -> Any:
    """The scripted policy of a label; None for any other."""
    if not BUILTIN.get(label.partition(":")[0], "").startswith("medseg_gym.policies.scripted:"):
        return None
    try:
        policy = policies.make(label, dataset=data, verbs=tuple(verbs))
    except MedSegError:
        return None
    return policy if policy.name == label else None


def _replay(
    state: _State,
    env: str,
    data: Dataset,
    tool: SegmentationTool,
    episodes: Sequence[Episode],
    settings: dict[str, Any],
    spec: Any,
    progress: Progress | None,
) -> None:
    from gymnasium.vector import AutoresetMode

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="an image observation does not say")
        try:
            made = SegmentVectorEnv(
                SLOTS,
                data,
                tool,
                autoreset_mode=AutoresetMode.DISABLED,
                on_error="fail",
                size=8,  # nobody looks
                reward=spec,
                **settings,
            )
        except MedSegError as error:
            _skip(state, env, "replay", str(error))
            return
    show = None if progress is None else lambda done: progress(f"replay of {env}", done, len(episodes))
    counts = {"exact": 0, "equivalent": 0, "different": 0}
    for episode, result in zip(episodes, replay(made, episodes, show), strict=True):
        counts[result.verdict] += 1
        if result.verdict == "different":
            state.findings.append(
                about(episode, "different", result.what, result.found, result.wanted, turn=result.turn)
            )
        elif result.verdict == "equivalent":
            what = f"masks of Dice {result.dice:.5f} with those played here"
            state.findings.append(about(episode, "equivalent", "mask", what, "equal masks", turn=result.turn))
    state.replayed += len(episodes)
    state.checks[f"replay of {env}"] = ", ".join(f"{n} {verdict}" for verdict, n in counts.items() if n) or "no episode"


def _skip(state: _State, env: str, what: str, why: str) -> None:
    state.checks[f"{what} of {env}"] = f"not done: {why}"
    state.skipped = True


def _unreadable(folder: str | Path, finding: Finding, episodes: int = 0) -> Report:
    return Report(Path(folder).name, finding.kind, episodes, 0, (finding,), checks={"files": "not done"})


def _report(folder: str | Path, state: _State, replayed: bool) -> Report:
    findings = sorted(state.findings, key=lambda f: f.kind == "equivalent")
    return Report(
        folder=Path(folder).name,
        verdict=worst(findings, replayed=replayed),
        episodes=len(state.run.episodes),
        replayed=state.replayed,
        findings=tuple(findings[:SHOWN]),
        left_out=max(0, len(findings) - SHOWN),
        checks=state.checks,
    )
