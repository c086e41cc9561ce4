"""What is served, and a client's session with it: one env of its own over shared data and tool."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import gymnasium as gym

from medseg_gym.datasets.base import SPLITS, Dataset
from medseg_gym.env_server.wire import METRICS, OPTIONS, read_action, shown
from medseg_gym.envs.segment import SegmentEnv
from medseg_gym.errors import MedSegError, UnknownNameError, unknown
from medseg_gym.tools.cache import CachedTool
from medseg_gym.types import Decision, Episode, Unreadable


@dataclass(frozen=True)
class Served:
    """An env that may be asked for: its data and tool, loaded once, and the options that the server has fixed."""

    env: str
    dataset: Dataset
    tool: CachedTool
    fixed: Mapping[str, Any]

    @staticmethod
    def load(env: str, given: Mapping[str, Any]) -> Served:
        """`given` holds env keywords; dataset, tool and their options, and those a client may then not change."""
        from medseg_gym import datasets, tools

        known = [name for name, spec in gym.registry.items() if spec.entry_point == "medseg_gym.envs:SegmentEnv"]
        if env not in known:
            raise unknown("env id", env, known)
        options = {**gym.spec(env).kwargs, **given}
        dataset = datasets.load(options.pop("dataset", "Phantom"), **options.pop("dataset_options", {}))
        tool = tools.load(options.pop("tool", "Nano"), **options.pop("tool_options", {}))
        served = Served(env, dataset, tool, options)
        # so that a wrong option stops the server and not its clients; "dict" is warned of nothing
        served.make({} if "observation" in options else {"observation": "dict"})
        return served

    def make(self, options: Mapping[str, Any]) -> SegmentEnv:
        """An env of a client's own."""
        for name, value in options.items():
            if name in self.fixed and value != self.fixed[name]:
                raise MedSegError(f"option {name}={shown(value)}; this server has it fixed to {self.fixed[name]!r}")
        return SegmentEnv(self.dataset, self.tool, render_mode="rgb_array", **{**options, **self.fixed})

    def check_case(self, key: object) -> None:
        """UnknownNameError for a case outside the split and the structures that are fixed."""
        if not isinstance(key, str) or not {"split", "structures"} & set(self.fixed):
            return
        splits = (self.fixed["split"],) if "split" in self.fixed else SPLITS
        given = self.fixed.get("structures") or ()
        structures = (given,) if isinstance(given, str) else tuple(given)
        if not any(key in self.dataset.keys(split, structures) for split in splits):
            raise UnknownNameError(f"no case {shown(key)} in what this server has fixed; /v1/keys tells what is")

    def told(self) -> dict[str, Any]:
        """What a client is told of it."""
        fixed = {name: value for name, value in self.fixed.items() if name in OPTIONS and isinstance(value, str | int)}
        return {
            "env": self.env,
            "dataset": self.dataset.name,
            "tool": self.tool.fingerprint,
            "structures": list(self.dataset.structures),
            "fixed": fixed,
        }


@dataclass(eq=False)
class Session:
    """A client's env. `calls` counts what moved it, so that a call that is sent twice is done once."""

    name: str
    env: SegmentEnv
    served: Served
    used: float
    calls: int = 0
    mark: bytes = b""  # of the last of them: what was asked
    busy: int = 0
    decisions: list[Decision] = field(default_factory=list)
    recorded: bool = False  # whether `over` collects the episodes
    over: list[Episode] = field(default_factory=list)
    running: bool = False
    seed: int = 0

    def told(self) -> dict[str, Any]:
        """What a client needs to build the spaces."""
        config = self.env.engine.config
        return {
            **self.served.told(),
            "observation": config.observation,
            "size": config.size,
            "horizon": config.horizon,
            "verbs": list(self.env.verbs),
        }

    def reset(self, seed: int | None, options: Mapping[str, Any]) -> None:
        self.served.check_case(options.get("sample"))
        unfinished = self._episode()
        self.env.reset(seed=seed, options=dict(options))
        self.over += unfinished
        self.decisions.clear()
        self.running, self.seed = True, seed or 0

    def step(self, given: Any) -> None:
        """One turn, of an action as JSON; BadDataError or MedSegError without any, where it cannot be read."""
        engine = self.env.engine
        action = read_action(given, engine.running(0).grid, self.env.verbs)
        decision = Decision(None)
        if isinstance(action, Decision):
            decision = action
            action = Unreadable(decision.reason) if decision.action is None else decision.action
        engine.step([0], [action])
        self.decisions.append(decision)
        if engine.slot(0).ended is not None:
            self.finish()

    def finish(self) -> None:
        """Ends the episode under way, if there is one; what was left unfinished is "failed"."""
        self.over += self._episode()
        self.running = False

    def _episode(self) -> list[Episode]:
        wanted = self.running and self.recorded
        return [self.env.episode(f"session {self.name[:8]}", self.seed)] if wanted else []

    def now(self, hide: bool) -> tuple[dict[str, Any], Any]:
        """What reset and step return, and the observation: a function of the state, so that it can be told again."""
        engine = self.env.engine
        info = engine.info(0)
        for name in METRICS if hide else ():
            del info[name]
        terminated, truncated = engine.flags(0)
        sample = engine.slot(0).sample
        told = {
            "call": self.calls,
            "reward": None if hide else engine.reward_of(0),
            "terminated": terminated,
            "truncated": truncated,
            "info": info,
            "image_size": list(sample.image.shape[:2]),
            "unreadable": self.decisions[-1].reason if self.decisions else "",
        }
        return told, engine.observe(0)
