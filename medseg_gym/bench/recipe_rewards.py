"""What rewards pay, whole and with each term off: their returns over the same episodes, and the policy they favour."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from medseg_gym import datasets
from medseg_gym.bench.exploits import MARGIN, ORACLES
from medseg_gym.bench.recipe_run import Ran
from medseg_gym.bench.rescore import rewarded
from medseg_gym.policies.scripted import Targets
from medseg_gym.rewards import PRESETS, RewardSpec


def variants() -> Iterator[tuple[str, str, RewardSpec]]:
    """(preset, the term that is off, its reward) for every preset: whole first, with "" for the term."""
    for name, spec in PRESETS.items():
        yield name, "", spec
        for term in spec.terms:
            yield name, term, without(spec, term)


def without(spec: RewardSpec, term: str) -> RewardSpec:
    """The reward without one of its terms; the others keep their weights, and the bound stays where it is."""
    return replace(
        spec,
        name=f"{spec.name} without {term}",
        terms={name: weight for name, weight in spec.terms.items() if name != term},
        clipped=tuple(name for name in spec.clipped if name != term),
    )


def reward_rows(ran: Sequence[Ran]) -> list[dict[str, Any]]:
    """A row a dataset, tool and reward: what the oracle and the best paid exploit earn, and who earns the most.

    Returns are sums of rewards as a learner is given them, failed episodes included. The oracle is the first of
    `exploits.ORACLES` among the arms; "pays_most" is over oracles and exploits alike, ties to the earlier arm.
    """
    groups: dict[tuple[str, str], list[Ran]] = defaultdict(list)
    for one in ran:
        groups[one.arm.entry.dataset, one.arm.entry.tool].append(one)
    return [row for members in groups.values() for row in _rows(members)]


def _rows(members: Sequence[Ran]) -> list[dict[str, Any]]:
    from medseg_gym.bench.recipe_table import MEASURES, mean_of, paired, patient

    entry = members[0].arm.entry
    targets = Targets(
        datasets.load(entry.dataset, **entry.options.get("dataset_options", {})), size=len(members[0].episodes)
    )
    by_name = {one.arm.setting: one for one in members}
    oracle = next(name for name in ORACLES if name in by_name)
    exploits = [name for name in by_name if name not in ORACLES]
    episodes = by_name[oracle].episodes
    rows = []
    for preset, off, spec in variants():
        earned = {
            name: [sum(sum(terms.values()) for terms in rewarded(e, spec, targets[e.key])) for e in one.episodes]
            for name, one in by_name.items()
        }
        mean = {name: float(np.mean(values)) for name, values in earned.items()}
        most = max(mean, key=lambda name: mean[name])
        row: dict[str, Any] = {
            "dataset": entry.dataset,
            "tool": entry.tool,
            "reward": preset,
            "without": off,
            "cases": len(episodes),
            "patients": len({patient(episode) for episode in episodes}),
            "pays_most": most,
            "iou": mean_of([MEASURES["iou"][0](e, 0.0) for e in by_name[most].episodes], episodes, (0, 1)),
            "actions": mean_of([MEASURES["actions"][0](e, 0.0) for e in by_name[most].episodes], episodes),
            "oracle": oracle,
            "oracle_earns": mean_of(earned[oracle], episodes),
            "returns": {name: round(value, 4) for name, value in mean.items()},
        }
        if exploits:
            best = max(exploits, key=lambda name: mean[name])
            row["exploit"] = best
            row["exploit_earns"] = mean_of(earned[best], episodes)
            row["difference"] = paired(earned[best], earned[oracle], episodes)
            row["paid_more"] = [name for name in exploits if mean[name] > mean[oracle] + MARGIN]
        rows.append(row)
    return rows
