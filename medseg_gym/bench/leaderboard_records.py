"""The records of a leaderboard: a row an agent and table, a table a group of a suite, and what is not in them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from medseg_gym.bench.leaderboard_read import Played
from medseg_gym.bench.statistics import Interval
from medseg_gym.bench.statistics_tables import Averages
from medseg_gym.bench.suites import Entry, Suite


@dataclass(frozen=True, slots=True)
class Clicks:
    """Mean NoC over the cases that reach a quality (None: none does), and NoF, the share that never does."""

    quality: int  # per cent of IoU
    noc: float | None
    nof: float


@dataclass(frozen=True, slots=True)
class Row:
    """One agent, a policy with a tool, in one table of a suite."""

    tool: str
    policy: str
    sees_target: bool
    rank: int | None  # None where it has not played all that the others have
    played: tuple[str, ...]  # datasets
    whole: bool  # all datasets of the table, and all their cases
    trial: bool  # fewer cases than the suite asks for
    cases: int
    patients: int
    iou: Averages
    dice: Averages
    iou_iqm: Interval
    dice_iqm: Interval
    nsd: float | None  # None where a case has none
    hd95: Mapping[str, float]  # by unit, "mm" and "px": over the cases of that unit alone
    f1: Mapping[str, float] | None  # of mask-to-entity correspondence, by dataset; None where a case has no counts
    f1_mean: float | None
    clicks: tuple[Clicks, ...]
    actions: float
    tool_calls: float
    failed: int
    unreadable: int  # episodes without one readable turn
    unreadable_turns: int
    seconds: float | None  # per case
    ceiling: str  # the oracle that is the tool's ceiling on these cases; "" where none played them
    ceiling_iou: float | None
    regret: Interval | None  # IoU per action below the ceiling
    against: str  # the agent it is compared with; "" where none played the same cases
    difference: Interval | None  # of final IoU, paired


@dataclass(frozen=True, slots=True)
class Table:
    """One group of a suite."""

    group: str
    modality: Mapping[str, str]  # by dataset, in the suite's order
    rows: tuple[Row, ...]


@dataclass(frozen=True, slots=True)
class Gap:
    """An entry without a result."""

    entry: Entry
    why: str
    commands: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Results:
    """A suite with its tables, its runs, and the entries that nobody has played."""

    suite: Suite
    tables: tuple[Table, ...]
    gaps: tuple[Gap, ...]
    runs: tuple[Played, ...]

    @property
    def ran(self) -> int:
        """How many of the suite's envs have a result."""
        return len(self.suite.entries) - len(self.gaps)
