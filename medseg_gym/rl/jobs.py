"""Jobs and the Settings they are played with: all that a rollout hangs on beside the weights."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

from medseg_gym.rl.config import Common


@dataclass(frozen=True, slots=True)
class Job:
    """A group to be played: `members` episodes of one case, all on one worker, which differ in the sampling alone.

    With `keys` it is one episode of each of these cases instead, counted as groups of one from `group` on: cases that a
    lockstep engine is to answer together.
    """

    group: int
    key: str = ""
    members: int = 1
    seed: int = 0  # of the env's reset
    keys: tuple[str, ...] = ()

    @property
    def episodes(self) -> int:
        return len(self.keys) or self.members

    def place(self, member: int) -> tuple[int, int, str]:
        """Group, member and case of one of its episodes."""
        return (self.group + member, 0, self.keys[member]) if self.keys else (self.group, member, self.key)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What an answer hangs on beside its chat and the weights, and the names things go by."""

    seed: int  # of the run
    iteration: int = 0
    temperature: float = 1.0
    max_new_tokens: int = 256  # of one answer
    max_chat_tokens: int = 12288  # of one chat
    policy: str = ""  # in the episodes
    name: str = "train"  # in the requests' ids, as several `play` may share an engine

    @staticmethod
    def of(config: Common, iteration: int = 0, **other: object) -> Settings:
        """Those of a run; `other` fields replace them."""
        said: Mapping[str, object] = {
            "seed": config.seed,
            "iteration": iteration,
            "temperature": getattr(config, "temperature", config.validate_temperature),
            "max_new_tokens": config.max_new_tokens,
            "max_chat_tokens": config.max_chat_tokens,
            **other,
        }
        return Settings(**said)  # type: ignore[arg-type]

    def sampling_seed(self, group: int, member: int, turn: int) -> int:
        """The seed of one answer, 0 to 2^31 - 1: no timing and no other episode has a part in it."""
        words = f"{self.seed}/{self.iteration}/{group}/{member}/{turn}".encode()
        return int.from_bytes(hashlib.blake2b(words, digest_size=4).digest(), "big") >> 1
