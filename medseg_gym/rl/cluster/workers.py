"""RemoteWorker: an EnvWorker in an actor. What dies with the actor is played again elsewhere, with the same seeds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from medseg_gym.rl.cluster.host import Remote
from medseg_gym.rl.worker import LostError, Observed
from medseg_gym.types import Episode

BUILD = "medseg_gym.rl.cluster.workers:make"


class RemoteWorker(Remote):
    """The handle of a LocalWorker elsewhere. LostError says that the episodes under way there are gone.

    `arguments` are LocalWorker's; with `tool_actor` among them its env asks that actor in place of a tool of its own.
    """

    def __init__(self, name: str, arguments: Mapping[str, Any], *, slots: int, history: bool, **settings: Any) -> None:
        super().__init__(name, BUILD, {**arguments, "slots": slots}, **settings)
        self.slots, self.history = slots, history
        self._lives: dict[int, int] = {}  # by slot: the actor its episode is in
        self._keys: dict[str, list[str]] = {}  # by split

    async def reset(self, slot: int, key: str, seed: int) -> Observed:
        """Of an actor that is there: whoever asks has waited for `alive`, or has others to ask."""
        if not self.there:
            raise LostError(f"{self.name} is gone")
        life = self.life
        observed = await self.ask("reset", slot, key, seed, life=life)
        self._lives[slot] = life
        return _own(observed)

    async def step(self, slot: int, text: str, cut_off: bool = False) -> Observed:
        return _own(await self.ask("step", slot, text, cut_off=cut_off, life=self._lives.get(slot)))

    async def truncate(self, slot: int) -> None:
        await self.ask("truncate", slot, life=self._lives.get(slot))

    async def episode(self, slot: int, case: int, seed: int) -> Episode:
        episode: Episode = await self.ask("episode", slot, case, seed, life=self._lives.get(slot))
        return episode

    async def keys(self, split: str) -> list[str]:
        if split not in self._keys:
            self._keys[split] = list(await self.ask_again("keys", split))
        return list(self._keys[split])

    async def counters(self) -> Mapping[str, float]:
        """Of the present actor, none where there is none; the work of those before it is not in them."""
        if not self.there:
            return {}
        try:
            return dict(await self.ask("counters", life=self.life))
        except LostError:
            return {}


def make(*, tool_actor: Any = None, options: Mapping[str, Any] | None = None, **arguments: Any) -> Any:
    """The LocalWorker inside the actor."""
    from medseg_gym.rl.local_worker import LocalWorker

    chosen = dict(options or {})
    if tool_actor is not None:
        chosen["tool"] = tool_actor
        chosen.pop("tool_options", None)  # with which the actor has loaded it
    return LocalWorker(options=chosen, **arguments)


def _own(observed: Observed) -> Observed:
    """With pictures of its own: those that come are views of Ray's store, which would have to keep them.

    The messages' pictures are those of `images`, and stay so: one copy of each.
    """
    copies: dict[int, np.ndarray[Any, Any]] = {}

    def copied(value: Any) -> Any:
        if not isinstance(value, np.ndarray):
            return value
        if id(value) not in copies:
            copies[id(value)] = np.array(value)
            copies[id(value)].flags.writeable = False
        return copies[id(value)]

    messages = [
        {**message, "content": [{key: copied(value) for key, value in part.items()} for part in message["content"]]}
        if not isinstance(message["content"], str)
        else message
        for message in observed.messages
    ]
    images = tuple(replace(image, pixels=copied(image.pixels)) for image in observed.images)
    return replace(observed, messages=messages, images=images)
