"""What a suite's run holds beside its episodes: was it played by its entry's rules, are its measures its masks'?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from typing import Any

from medseg_gym.bench import suites
from medseg_gym.bench.leaderboard_run import MEASURES, PROVENANCE
from medseg_gym.bench.measures import SCHEMA, UNREAD, last_mask, measure
from medseg_gym.bench.runs import Run
from medseg_gym.bench.suites import Entry
from medseg_gym.bench.verify_findings import Finding, about, run_finding
from medseg_gym.bench.verify_run import env_settings, same
from medseg_gym.datasets.base import Dataset
from medseg_gym.envs.config import EnvConfig
from medseg_gym.errors import BadDataError
from medseg_gym.types import Episode

# Beyond the rounding of measures.json: MONAI's distances are float32.
_NSD = 2e-6
_HD95 = 2e-4
_HD95_SHARE = 1e-5
_FAR = 1e9  # mm, pixels, or seconds

# what a page shows of provenance.json, and nobody can prove
_TOLD: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("policy", "name", "command", "machine", "tool_fingerprint"), str),
    **dict.fromkeys(("commit", "weights_sha256"), (str, type(None))),
    "changed": bool,
    "versions": dict,
}


def entry_of(provenance: Mapping[str, Any]) -> tuple[str, Entry]:
    """The suite and the entry that a provenance.json names; BadDataError where this version has none such."""
    name, record = provenance.get("suite"), provenance.get("entry")
    if not isinstance(name, str) or name not in suites.SUITES or not isinstance(record, dict):
        raise BadDataError(f"of a suite {name!r:.100} that this version does not have")
    for entry in suites.SUITES[name].entries:
        if {**entry.record(), "cases": None} == {**record, "cases": None}:
            return name, entry
    raise BadDataError(f"suite {name} has no such entry any more: play it again")


def broken_rules(run: Run, provenance: Mapping[str, Any], entry: Entry) -> Iterator[tuple[str, Any, Any]]:
    """(what, found, wanted) for all that a run was not played by as its entry asks; of checked settings."""
    settings, env = run.settings, entry.env
    pairs = [[env, provenance.get("name")]]
    if settings["pairs"] != pairs:
        yield "pairs", settings["pairs"], pairs
        return
    options = {name: entry.options[name] for name in entry.options if not name.endswith("_options")}
    wanted = EnvConfig(split=entry.split, horizon=entry.horizon, **options)
    for name, value in env_settings(settings, env).items():
        if value != getattr(wanted, name):
            yield name, value, getattr(wanted, name)
    cases = provenance["entry"].get("cases")
    most = entry.cases is None or (isinstance(cases, int) and cases <= entry.cases)
    rows = (run.summary or {}).get("rows")
    row = rows[0] if isinstance(rows, list) and rows and isinstance(rows[0], dict) else {}
    record = entry.record()["options"]
    for name, found, asked in (
        ("split", settings["split"], entry.split),
        ("seed", settings["seed"], entry.seed),
        ("cases", settings.get("cases"), cases if most else entry.cases),
        ("tool_fingerprint", provenance.get("tool_fingerprint"), settings["tools"][env]),
        ("tool_options", row.get("tool_options", {}), record.get("tool_options", {})),
        ("dataset_options", row.get("dataset_options", {}), record.get("dataset_options", {})),
    ):
        if found != asked:
            yield name, found, asked


def check_suite(
    run: Run, provenance: Mapping[str, Any] | None, measures: Mapping[str, Any] | None
) -> Iterator[Finding]:
    """What the files of a suite's run say against each other; nothing of a run that `evaluate` alone wrote."""
    if provenance is None and measures is None:
        return
    for name, record in ((PROVENANCE, provenance), (MEASURES, measures)):
        if record is None:
            yield run_finding("incomplete", name, "none", "one: give the same leaderboard run again")
    if provenance is not None:
        for name, kind in _TOLD.items():
            if not isinstance(provenance.get(name), kind):
                found = f"{provenance.get(name)!r:.100}"
                yield run_finding("tampered", f"{PROVENANCE}: {name}", found, "what a suite's run writes")
        try:
            _, entry = entry_of(provenance)
        except BadDataError as error:
            yield run_finding("different", PROVENANCE, error, "an entry of a suite")
        else:
            for what, found, wanted in broken_rules(run, provenance, entry):
                yield run_finding("tampered", f"{PROVENANCE}: {what}", found, wanted, env=entry.env)
    if measures is not None:
        yield from _well_formed(run.episodes, measures)


def _well_formed(episodes: Sequence[Episode], measures: Mapping[str, Any]) -> Iterator[Finding]:
    """Measures of another number of cases, of other types and units, or that the last mask alone contradicts."""
    cases = measures.get("cases")
    if measures.get("schema") != SCHEMA or not isinstance(cases, list) or len(cases) != len(episodes):
        found = f"schema {measures.get('schema')!r:.20}, {len(cases) if isinstance(cases, list) else 'no'} cases"
        yield run_finding("tampered", MEASURES, found, f"schema {SCHEMA}, {len(episodes)} cases")
        return
    for episode, found in zip(episodes, cases, strict=True):
        if not isinstance(found, dict) or found.keys() != UNREAD.keys():
            yield about(episode, "tampered", MEASURES, found, f"{', '.join(UNREAD)}")
        elif found != UNREAD:
            unit = "mm" if episode.spacing_mm else "px"
            drawn = _drawn(episode)
            if not isinstance(found["present"], bool):
                yield about(episode, "tampered", f"{MEASURES}: present", found["present"], "true or false")
            if drawn is not None and found["drawn"] is not drawn:
                yield about(episode, "tampered", f"{MEASURES}: drawn", found["drawn"], drawn)
            nsd, hd95 = found["nsd"], found["hd95"]
            if measures.get("surface"):
                fits, wanted = _within(nsd, 1) and _within(hd95, _FAR) and found["unit"] == unit, f"numbers, in {unit}"
            else:
                fits, wanted = nsd is hd95 is found["unit"] is None, "none, as surface is false"
            if not fits:
                what = f"NSD {nsd!r:.40}, HD95 {hd95!r:.40} {found['unit']!r:.40}"
                yield about(episode, "tampered", MEASURES, what, wanted)


def _drawn(episode: Episode) -> bool | None:
    """Whether the last mask holds a pixel; None where it cannot be read, which is said elsewhere."""
    try:
        return bool(last_mask(episode, (1, 1)).any())
    except BadDataError:
        return None


def _within(value: Any, most: float) -> bool:
    """Whether a value of a stranger's file is a number from 0 to `most`; nan and infinity are not."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= most


def check_measures(episodes: Sequence[Episode], run: Run, measures: Any, dataset: Dataset) -> tuple[list[Finding], str]:
    """The measures of these episodes taken again from their stored last masks; and what could be looked at."""
    cases = measures.get("cases")
    if not isinstance(cases, list) or len(cases) != len(run.episodes):
        return [], "not done: of another number of cases"
    surface = bool(measures.get("surface"))
    monai = find_spec("monai") is not None and find_spec("torch") is not None
    stored = {(e.env, e.policy, e.case): found for e, found in zip(run.episodes, cases, strict=True)}
    findings = []
    for episode in episodes:
        found = stored[episode.env, episode.policy, episode.case]
        try:
            wanted = measure(episode, dataset, surface and monai)
        except (BadDataError, ValueError):
            continue  # the mask is none, or of another size: said already
        if not isinstance(found, dict) or wanted == UNREAD:
            continue
        names = ("present", "drawn", "nsd", "hd95", "unit") if surface and monai else ("present", "drawn")
        for name in names:
            if not _close(name, found.get(name), wanted[name]):
                findings.append(about(episode, "tampered", f"{MEASURES}: {name}", found.get(name), wanted[name]))
    what = f"{len(episodes)} episodes measured again"
    if surface and not monai:
        what += ", not NSD and HD95: they need pip install 'medseg-gym[surface]'"
    return findings, what


def _close(name: str, found: Any, wanted: Any) -> bool:
    if name in ("nsd", "hd95") and isinstance(found, int | float) and not isinstance(found, bool):
        reach = {"nsd": _NSD, "hd95": max(_HD95, _HD95_SHARE * abs(wanted))}[name]
        return bool(wanted - reach <= found <= wanted + reach)  # no difference: an int may be too large for a float
    return same(found, wanted)


def check_times(run: Run) -> Iterator[Finding]:
    """Times that are none. What they say is the submitter's word: a replay takes another time."""
    rows = (run.times or {}).get("rows", [])
    rows = rows if isinstance(rows, list) else [None]
    for row in rows:
        pair = [row.get("env"), row.get("policy")] if isinstance(row, dict) else None
        numbers = [row.get(name) for name in ("seconds_per_case", "seconds_per_action")] if pair else []
        if pair not in run.settings["pairs"] or not all(_within(number, _FAR) for number in numbers):
            yield run_finding("tampered", "times.json", row, "seconds of a pair of the run, from 0 up")
