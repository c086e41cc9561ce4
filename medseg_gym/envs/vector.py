"""SegmentVectorEnv: the engine with many slots, every autoreset mode, and partial stepping by send and recv."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from operator import index as whole
from typing import Any

import numpy as np
from gymnasium.utils import seeding
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray

from medseg_gym.datasets.base import Dataset
from medseg_gym.envs.config import EnvConfig, whole_number
from medseg_gym.envs.engine import RESET_OPTIONS
from medseg_gym.envs.record import episode_of
from medseg_gym.envs.shared import RENDER_MODES, OverEngine, check_render_mode, make_engine, render_slot
from medseg_gym.errors import InvalidActionError, MedSegError, check_keywords, unknown
from medseg_gym.tools.base import SegmentationTool
from medseg_gym.types import Action, Episode, Image, View

Arrays = tuple[Any, NDArray[np.float64], NDArray[np.bool_], NDArray[np.bool_], dict[str, Any]]


class SegmentVectorEnv(OverEngine, VectorEnv[Any, Any, Any]):
    """Many episodes at once: one tool call a step for all of them. Slot i seeded s + i equals a SegmentEnv so seeded.

    `gym.make_vec(id, num_envs=8)` makes one. `autoreset_mode` is Gymnasium's: "NextStep" (default), "SameStep" or
    "Disabled"; all other arguments are SegmentEnv's. `reset(options=)` takes "sample" (one key for all, or one a
    slot, None where the slot shall draw), "start_mask" (one a slot) and "reset_mask" (which slots begin anew).
    Actions are an (N, 5) array, or a sequence of vectors and typed actions.
    """

    def __init__(
        self,
        num_envs: int = 1,
        dataset: str | Dataset = "Phantom",
        tool: str | SegmentationTool = "Nano",
        *,
        autoreset_mode: AutoresetMode | str = AutoresetMode.NEXT_STEP,
        render_mode: str | None = None,
        **options: Any,
    ) -> None:
        self.num_envs = whole_number("num_envs", num_envs, 1, 100_000)
        self.autoreset_mode = _autoreset_mode(autoreset_mode)
        self.metadata = {
            "render_modes": list(RENDER_MODES),
            "render_fps": 1,
            "autoreset_mode": self.autoreset_mode,
        }
        self.render_mode = check_render_mode(render_mode)
        self.engine = make_engine(dataset, tool, EnvConfig.of(options), slots=num_envs)
        self.single_observation_space = self.engine.observation_space
        self.single_action_space = self.engine.codec.space
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._rngs: list[np.random.Generator | None] = [None] * num_envs
        self._queue: dict[int, Any] = {}

    # Gymnasium's interface

    def reset(  # type: ignore[override]
        self,
        *,
        seed: int | Sequence[int | None] | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> tuple[Any, dict[str, Any]]:
        options = dict(options or {})
        check_keywords("reset option", options, (*RESET_OPTIONS, "reset_mask"))
        chosen = self._reset_mask(options.pop("reset_mask", None))
        seeds = self._seeds(seed)
        per_slot = {name: self._spread(name, value) for name, value in options.items()}
        anew = np.flatnonzero(chosen).tolist()
        busy = [i for i in anew if i in self._queue]
        if busy:
            raise MedSegError(f"slots {busy} have an action under way; call recv before reset")
        missing = [i for i, slot in enumerate(self.engine.slots) if slot is None and not chosen[i]]
        if missing:
            raise MedSegError(f"slots {missing} were never reset; the first reset must be of all slots")
        # all beginnings are made before any slot moves, so that a bad key or start mask changes nothing
        rngs = {i: self._rng(i, seeds[i]) for i in anew}
        begun = {
            i: self.engine.begin(rngs[i], {name: values[i] for name, values in per_slot.items()}, before=i)
            for i in anew
        }
        for i in anew:
            self._rngs[i], self.engine.slots[i] = rngs[i], begun[i]
        return self._observe(range(self.num_envs)), self._infos(np.flatnonzero(chosen).tolist())

    def step(self, actions: Any) -> Arrays:
        if self._queue:
            raise MedSegError(f"slots {sorted(self._queue)} have actions under way; call recv before step")
        actions = self._split(actions, self.num_envs)
        everyone = list(range(self.num_envs))
        anew: list[int] = []
        if self.autoreset_mode is AutoresetMode.NEXT_STEP:
            anew = [i for i in everyone if self.engine.slot(i).ended is not None]
        going = [i for i in everyone if i not in anew]
        self.engine.step(going, [actions[i] for i in going])
        for i in anew:
            self._reset_slot(i)
        rewards, terminated, truncated = self._results(everyone)
        finals: dict[int, dict[str, Any]] = {}
        if self.autoreset_mode is AutoresetMode.SAME_STEP:
            for i in np.flatnonzero(terminated | truncated).tolist():
                finals[i] = {"final_obs": self.engine.observe(i), "final_info": self.engine.info(i)}
                self._reset_slot(i)
        infos = self._infos(everyone)
        for i, final in finals.items():
            infos = self._add_info(infos, final, i)
        return self._observe(everyone), rewards, terminated, truncated, infos

    def render(self) -> tuple[Image, ...] | None:  # type: ignore[override]
        """One picture a slot."""
        if self.render_mode is None:
            return None
        return tuple(render_slot(self.engine.slot(i), self.engine.config.size) for i in range(self.num_envs))

    # partial stepping

    def send(self, actions: Any, env_ids: Sequence[int] | NDArray[np.integer[Any]]) -> None:
        """Queues one action for each of these slots; nothing is executed before recv. Needs AutoresetMode.DISABLED."""
        if self.autoreset_mode is not AutoresetMode.DISABLED:
            raise MedSegError(f'send needs autoreset_mode="Disabled"; this env has {self.autoreset_mode.value!r}')
        try:
            ids = [whole(i) for i in env_ids if not isinstance(i, bool | np.bool_)]
        except TypeError:
            ids = []
        if len(ids) != len(env_ids):
            raise InvalidActionError(f"env_ids={env_ids!r}; wanted slot numbers")
        actions = self._split(actions, len(ids))
        for i in ids:
            if not 0 <= i < self.num_envs:
                raise InvalidActionError(f"slot {i}; wanted 0 to {self.num_envs - 1}")
            if i in self._queue or ids.count(i) > 1:
                raise InvalidActionError(f"slot {i} has an action under way already; call recv first")
        # read now, so that a bad action is refused where it was given and spoils no one else's turn
        read = [
            self.engine.codec.read(action, self.engine.running(i).grid) for i, action in zip(ids, actions, strict=True)
        ]
        self._queue.update(zip(ids, read, strict=True))

    def recv(
        self,
    ) -> tuple[NDArray[np.int64], Any, NDArray[np.float64], NDArray[np.bool_], NDArray[np.bool_], dict[str, Any]]:
        """Executes all queued actions with one tool call. All results have one row a slot, in env_ids' order.

        Where the tool raises, no slot has moved and the queue is empty: the actions can be sent again.
        """
        if not self._queue:
            raise MedSegError("recv without anything sent; call send first")
        ids = sorted(self._queue)
        try:
            self.engine.step(ids, [self._queue[i] for i in ids])
        finally:
            self._queue.clear()
        return np.array(ids, np.int64), self._observe(ids), *self._results(ids), self._infos(ids, rows=len(ids))

    # what policies and recorders use

    def view(self, index: int) -> View:
        """What a policy may see of a slot now."""
        return self.engine.view(index)

    def views(self, env_ids: Sequence[int] | None = None) -> list[View]:
        """The views of these slots, or of all."""
        return [self.engine.view(int(i)) for i in (range(self.num_envs) if env_ids is None else env_ids)]

    def encode_action(self, action: Action, index: int) -> NDArray[np.int64]:
        """The action vector of a typed action on a slot's image."""
        return self.engine.codec.encode(action, self.engine.slot(index).grid)

    def episode(self, index: int, policy: str = "", seed: int = 0, case: int = 0, error: str = "") -> Episode:
        """The record of a slot's episode so far."""
        return episode_of(self.engine, index, env=self.name, policy=policy, seed=seed, case=case, error=error)

    # parts

    def _rng(self, index: int, seed: int | None) -> np.random.Generator:
        """A slot's next generator: a new one from a seed, else a copy of its own, to be kept if the reset succeeds."""
        current = self._rngs[index]
        if seed is not None or current is None:
            return seeding.np_random(seed)[0]
        return deepcopy(current)

    def _reset_slot(self, index: int) -> None:
        rng = self._rngs[index]
        assert rng is not None, "a slot that has ended has been reset before"
        self.engine.reset(index, rng)

    def _observe(self, indices: Sequence[int]) -> Any:
        """Fresh observations, one row an index."""
        if self.engine.config.observation == "image":
            size = self.engine.config.size
            rows = np.empty((len(indices), size, size, 3), np.uint8)
            for row, index in zip(rows, indices, strict=True):
                self.engine.observe(index, out=row)
            return rows
        single = [self.engine.observe(i) for i in indices]
        return {name: np.stack([obs[name] for obs in single]) for name in single[0]}

    def _results(self, indices: Sequence[int]) -> tuple[NDArray[np.float64], NDArray[np.bool_], NDArray[np.bool_]]:
        rewards = np.array([self.engine.reward_of(i) for i in indices], np.float64)
        flags = np.array([self.engine.flags(i) for i in indices], np.bool_).reshape(-1, 2)
        return rewards, flags[:, 0].copy(), flags[:, 1].copy()

    def _infos(self, indices: Sequence[int], rows: int | None = None) -> dict[str, Any]:
        """Gymnasium's vector info of these slots; with `rows`, one row an index instead of one a slot."""
        infos = [self.engine.info(i) for i in indices]
        positions = list(range(rows)) if rows is not None else list(indices)
        return _batch_infos(infos, positions, rows if rows is not None else self.num_envs)

    def _reset_mask(self, mask: Any) -> NDArray[np.bool_]:
        if mask is None:
            return np.ones(self.num_envs, np.bool_)
        mask = np.asarray(mask)
        if mask.shape != (self.num_envs,) or mask.dtype != np.bool_ or not mask.any():
            raise MedSegError(
                f"reset_mask of shape {mask.shape}, {mask.dtype}; wanted ({self.num_envs},) bool with a True in it"
            )
        return mask

    def _seeds(self, seed: int | Sequence[int | None] | None) -> list[int | None]:
        if seed is None:
            return [None] * self.num_envs
        if isinstance(seed, int | np.integer):
            return [int(seed) + i for i in range(self.num_envs)]
        if len(seed) != self.num_envs:
            raise MedSegError(f"{len(seed)} seeds; wanted one number, or one for each of the {self.num_envs} slots")
        return list(seed)

    def _spread(self, name: str, value: Any) -> list[Any]:
        if value is None or isinstance(value, str):
            return [value] * self.num_envs
        if len(value) != self.num_envs:
            raise MedSegError(
                f"option {name} has {len(value)} entries; wanted one for each of the {self.num_envs} slots"
            )
        return list(value)

    def _split(self, actions: Any, count: int) -> list[Any]:
        if not hasattr(actions, "__len__") or len(actions) != count:
            shape = getattr(actions, "shape", None) or type(actions).__name__
            raise InvalidActionError(f"actions of {shape}; wanted one row for each of {count} slots")
        return list(actions)


def _batch_infos(infos: Sequence[Mapping[str, Any]], positions: Sequence[int], rows: int) -> dict[str, Any]:
    """Infos with equal keys as arrays of `rows` with a `_key` mask each: what VectorEnv._add_info builds, at once."""
    there = np.zeros(rows, np.bool_)
    there[positions] = True
    batched: dict[str, Any] = {}
    for key, first in infos[0].items() if infos else ():
        values = [info[key] for info in infos]
        if isinstance(first, Mapping):
            batched[key] = _batch_infos(values, positions, rows)
        else:
            kind = type(first) if type(first) in (int, float, bool) else object
            array = np.zeros(rows, kind) if kind is not object else np.full(rows, None, object)
            array[positions] = values
            batched[key] = array
        batched[f"_{key}"] = there.copy()
    return batched


def _autoreset_mode(mode: AutoresetMode | str) -> AutoresetMode:
    if isinstance(mode, AutoresetMode):
        return mode
    known = {m.value: m for m in AutoresetMode}
    if mode not in known:
        raise unknown("autoreset_mode", mode, known)
    return known[mode]
