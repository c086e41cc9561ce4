"""What a verification says: findings, and the verdict they come to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from medseg_gym.types import Episode

Kind = Literal["equivalent", "different", "incomplete", "tampered"]

# worst last; "consistent" is what a run without a finding is while nothing was replayed
VERDICTS = ("exact", "equivalent", "consistent", "different", "incomplete", "tampered")


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is not as it should be."""

    kind: Kind
    what: str  # "mask", "reward", "case", "seed", "tool", ...
    found: str
    wanted: str
    env: str = ""
    policy: str = ""
    case: int | None = None
    key: str = ""
    turn: int | None = None  # 0 is the beginning

    def __str__(self) -> str:
        place = ", ".join(
            part
            for part in (
                self.env,
                self.policy,
                "" if self.case is None else f"case {self.case}",
                self.key,
                "" if self.turn is None else f"turn {self.turn}",
            )
            if part
        )
        return f"{self.kind}: {place + ': ' if place else ''}{self.what}: found {self.found}; wanted {self.wanted}"


@dataclass(frozen=True, slots=True)
class Report:
    """What was found out about a run's folder."""

    folder: str
    verdict: str  # one of VERDICTS
    episodes: int
    replayed: int
    findings: tuple[Finding, ...]  # the first of them; `left_out` says how many more there are
    left_out: int = 0
    checks: dict[str, str] = field(default_factory=dict)  # what was looked at, "done" or why it was not

    def record(self) -> dict[str, Any]:
        """As JSON holds it."""
        return asdict(self)


def about(
    episode: Episode, kind: Kind, what: str, found: object, wanted: object, *, turn: int | None = None
) -> Finding:
    """A finding in an episode; long values are cut."""
    return Finding(
        kind, what, _short(found), _short(wanted), episode.env, episode.policy, episode.case, episode.key, turn
    )


def run_finding(kind: Kind, what: str, found: object, wanted: object, **place: Any) -> Finding:
    """A finding about a run, or about an env or a policy of it."""
    return Finding(kind, what, _short(found), _short(wanted), **place)


def worst(findings: Sequence[Finding], *, replayed: bool) -> str:
    """The verdict of a run with these findings."""
    found = [finding.kind for finding in findings]
    return max(found, key=VERDICTS.index, default="") if set(found) - {"equivalent"} else _sound(found, replayed)


def _sound(found: Sequence[str], replayed: bool) -> str:
    if not replayed:
        return "consistent"
    return "equivalent" if found else "exact"


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 240 else f"{text[:237]}..."
