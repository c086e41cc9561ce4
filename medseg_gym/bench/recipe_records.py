"""What a recipe is: arms (a policy on an env, by the name an experiment gives it) and the papers' rows beside them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from medseg_gym.bench.reported import ReportedRow, reported
from medseg_gym.bench.suites import Entry

Kind = Literal["episodes", "rewards", "training"]


@dataclass(frozen=True, slots=True)
class Arm:
    """One row of a recipe's table: a policy on an env, under the name the experiment gives it."""

    setting: str
    entry: Entry
    policy: str  # a spec; "" where an agent has to be given (--agent), which then speaks `protocol`
    protocol: str = ""
    watches: str = ""  # a tool: the policy plays with it, and what it did there is done again here


@dataclass(frozen=True, slots=True)
class Printed:
    """Rows of a paper's table that correspond to a recipe's: all settings and columns where none are named."""

    source: str
    table: str
    settings: tuple[str, ...] = ()
    datasets: tuple[str, ...] = ()  # "" is the average over all modalities

    def rows(self) -> list[ReportedRow]:
        return [
            row
            for row in reported()
            if (row.source, row.table) == (self.source, self.table)
            and (not self.settings or row.setting in self.settings)
            and (row.dataset in self.datasets if self.datasets else True)
            and (row.overall or row.dataset)
        ]


@dataclass(frozen=True, slots=True)
class Recipe:
    """A named experiment. The first arm of a dataset and tool is the one that the others are compared with."""

    name: str
    title: str
    about: str
    differs: str  # what ours is not, beside the paper's
    printed: tuple[Printed, ...]
    arms: tuple[Arm, ...] = ()
    kind: Kind = "episodes"
    columns: tuple[str, ...] = ("dice", "iou", "actions")
    cold: bool = False  # every image is encoded anew for every arm, one env at a time, so that seconds compare

    @property
    def needs_agent(self) -> bool:
        return any(not arm.policy for arm in self.arms)
