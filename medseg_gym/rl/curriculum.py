"""Which case comes next: a seeded order over all cases, and a curriculum that passes over those that teach little."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medseg_gym.errors import MedSegError, unknown

CURRICULA = ("none", "difficulty")
LEAST = 0.1  # how often a case comes that is always or never solved, next to one solved half the time
RATE = 0.5  # of the running estimate: what the newest group of a case counts


@dataclass(frozen=True, slots=True)
class Draw:
    """A case drawn for a group."""

    position: int  # in the endless order over all passes
    key: str


class CaseOrder:
    """The cases in an endless order: a fresh seeded permutation a pass, and a cursor into it.

    What comes next is a function of keys, seed, cursor and, with the "difficulty" curriculum, of how often each case
    was solved when it was last played. A case whose estimate is s comes with probability LEAST + (1 - LEAST) 4 s (1 -
    s), one not played yet for certain; whether it does is decided by the seed and its position alone.
    """

    def __init__(self, keys: Sequence[str], seed: int, curriculum: str = "none") -> None:
        if curriculum not in CURRICULA:
            raise unknown("curriculum", curriculum, CURRICULA)
        if not keys:
            raise MedSegError("no cases to train on; choose another split, structures or keys_file")
        if len(set(keys)) != len(keys):
            raise MedSegError(f"{len(keys) - len(set(keys))} case keys come twice; list each once")
        self.keys, self.seed, self.curriculum = tuple(keys), seed, curriculum
        self._digest = hashlib.sha256("\n".join(self.keys).encode()).hexdigest()
        self.cursor = 0  # the position that is looked at next
        self._solved: dict[str, float] = {}
        self._pass: tuple[int, NDArray[np.int64]] = (-1, np.zeros(0, np.int64))

    def draw(self, count: int) -> list[Draw]:
        """The next `count` cases; the cursor moves past all that were looked at. Cases repeat only over passes."""
        drawn: list[Draw] = []
        passed_over = 0
        while len(drawn) < count:
            found = Draw(self.cursor, self.keys[self._index(self.cursor)])
            self.cursor += 1
            # A pass in which nothing was taken would mean LEAST a hundred times over; it must still end.
            if passed_over < len(self.keys) and not self._taken(found):
                passed_over += 1
                continue
            passed_over = 0
            drawn.append(found)
        return drawn

    def played(self, key: str, solved: float) -> None:
        """Takes in a group's share of solved episodes, 0 to 1."""
        if self.curriculum == "none":
            return
        before = self._solved.get(key)
        self._solved[key] = solved if before is None else before + RATE * (solved - before)

    def state(self) -> dict[str, Any]:
        """What `load` needs to go on from here; plain JSON."""
        return {"cursor": self.cursor, "solved": dict(self._solved), "cases": self._digest}

    def load(self, state: Mapping[str, Any]) -> None:
        """Goes on from a state of the same cases; of others, as when keys_file was edited, it raises MedSegError."""
        if state.get("cases", self._digest) != self._digest:
            raise MedSegError(
                f"the {len(self.keys)} cases are not those this run began with: give keys_file and data as they were, "
                "or choose another --out"
            )
        self.cursor = int(state["cursor"])
        self._solved = {str(key): float(value) for key, value in state["solved"].items()}

    def _index(self, position: int) -> int:
        turn, place = divmod(position, len(self.keys))
        if self._pass[0] != turn:
            order = np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=(0, turn)))
            self._pass = (turn, order.permutation(len(self.keys)))
        return int(self._pass[1][place])

    def _taken(self, found: Draw) -> bool:
        share = self._solved.get(found.key)
        if share is None:
            return True
        rng = np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=(1, found.position)))
        return bool(rng.random() < LEAST + (1 - LEAST) * 4 * share * (1 - share))


def read_keys(file: str | Path, known: Sequence[str]) -> list[str]:
    """The case keys of a text file, one a line, in its order; blank lines and those that begin with # are left out.

    A key that is not among `known` raises MedSegError with its line.
    """
    path = Path(file)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise MedSegError(f"cannot read keys_file {path}: {error}") from None
    there = set(known)
    keys: list[str] = []
    for number, line in enumerate(lines, start=1):
        key = line.strip()
        if not key or key.startswith("#"):
            continue
        if key not in there:
            such = f"; there are {len(known)}, such as {known[0]!r}" if known else ", which has none"
            raise MedSegError(f"{path}, line {number}: no case {key!r} in the split{such}")
        keys.append(key)
    return keys
