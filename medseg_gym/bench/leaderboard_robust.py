"""Robustness from the results of the suite `robust`: how much of its IoU an agent keeps on corrupted images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from medseg_gym.bench.leaderboard_records import Results
from medseg_gym.bench.suites import CORRUPTIONS

SEVERITIES = (3, 5)
SUITE, CLEAN = "robust", "clean"
Key = tuple[str, str, str]  # dataset as titled, tool, policy


@dataclass(frozen=True, slots=True)
class Corrupted:
    """One agent's final IoU on one dataset: clean, and by corruption and severity."""

    dataset: str
    tool: str
    policy: str
    clean: float | None  # None where it has not played the clean images
    iou: Mapping[tuple[str, int], float]

    @property
    def whole(self) -> bool:
        """Whether it has played every corruption at every severity: a mean over some would be another number."""
        return len(self.iou) == len(CORRUPTIONS) * len(SEVERITIES)

    def mean(self, severity: int) -> float | None:
        """Over the kinds of corruption, at one severity."""
        return sum(self.iou[kind, severity] for kind in CORRUPTIONS) / len(CORRUPTIONS) if self.whole else None

    def kept(self, severity: int) -> float | None:
        """The share of the clean IoU that is left."""
        mean = self.mean(severity)
        return mean / self.clean if mean is not None and self.clean else None


@dataclass(frozen=True, slots=True)
class Noise:
    """An oracle with and without noise in its clicks, on one dataset with one tool: final IoU by policy."""

    dataset: str
    tool: str
    policy: str
    clean: float
    noisy: Mapping[str, float]  # by options, as "jitter=5"


def corrupted(results: Sequence[Results]) -> dict[Key, Corrupted]:
    """Every agent that has played a corrupted image, in the suite's order."""
    clean: dict[Key, float] = {}
    found: dict[Key, dict[tuple[str, int], float]] = {}
    for table in (table for one in results if one.suite.name == SUITE for table in one.tables):
        for row in table.rows:
            for dataset, mean in row.iou.datasets.items():
                key = (dataset, row.tool, row.policy)
                if table.group == CLEAN:
                    clean[key] = mean.mean
                else:
                    kind, _, severity = table.group.rpartition("-")
                    found.setdefault(key, {})[kind, int(severity)] = mean.mean
    return {key: Corrupted(*key, clean.get(key), values) for key, values in found.items()}


def noisy(results: Sequence[Results]) -> list[Noise]:
    """The clean images under noise in the clicks: every policy that was played with and without."""
    values: dict[Key, float] = {}
    for table in (table for one in results if one.suite.name == SUITE for table in one.tables if table.group == CLEAN):
        for row in table.rows:
            for dataset, mean in row.iou.datasets.items():
                values[dataset, row.tool, row.policy] = mean.mean
    found = []
    for (dataset, tool, policy), clean in values.items():
        with_noise = {
            name.partition(":")[2]: value
            for (d, t, name), value in values.items()
            if (d, t) == (dataset, tool) and name.startswith(f"{policy}:")
        }
        if with_noise:
            found.append(Noise(dataset, tool, policy, clean, with_noise))
    return found
