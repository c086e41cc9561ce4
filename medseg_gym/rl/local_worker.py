"""LocalWorker: an EnvWorker in this process; its env is stepped in a thread of its own while the event loop goes on."""

from __future__ import annotations

import asyncio
import hashlib
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode

from medseg_gym.datasets.vqa import Questions, open_questions
from medseg_gym.envs.engine import Slot
from medseg_gym.envs.questions import QuestionEngine, QuestionSample
from medseg_gym.envs.vector import SegmentVectorEnv
from medseg_gym.errors import InvalidActionError, MedSegError, unknown
from medseg_gym.policies import chat, protocols
from medseg_gym.policies.protocols import ChatProtocol
from medseg_gym.policies.protocols.questions import asking
from medseg_gym.rl.clocked import Clocked
from medseg_gym.rl.types import ImageRef
from medseg_gym.rl.worker import Observed
from medseg_gym.tools.cache import CachedTool
from medseg_gym.types import Action, Episode, Image, Mask, Unreadable

VIEW = 8  # pixels of the env's own observations, which nobody looks at: the smallest there are


class LocalWorker:
    """One SegmentVectorEnv and the protocol spoken with it; see worker.EnvWorker.

    `env` is an env id, `options` are gym.make's; the verbs are those of the env that the protocol has words for. What
    comes in while the thread is busy is done together next: all turns in one step, with one tool call.
    `questions` are a set of questions (datasets.vqa) that are found by their own keys, beside the cases.
    """

    def __init__(
        self,
        env: str,
        slots: int,
        protocol: str | ChatProtocol = "medsam-agent",
        *,
        size: int = chat.SIZE,
        options: Mapping[str, Any] | None = None,
        protocol_options: Mapping[str, Any] | None = None,
        questions: str | Questions = "",
    ) -> None:
        self.size = chat.check_size(size)
        self.env = _make(env, slots, options or {})
        self.protocol = protocols.make(protocol, self.env.verbs, **(protocol_options or {}))
        if getattr(self.protocol, "several", False):
            raise MedSegError(
                "an episode has one target a chat; several=True is read by the protocol's parse_many alone"
            )
        self.slots, self.history = slots, self.protocol.history
        self.asking = self.protocol  # the protocol's form for questions, where some may be asked
        if questions:
            self.asking = asking(self.protocol)
            self.env.engine = QuestionEngine.beside(self.env.engine, open_questions(questions))
        shared = self.env.engine.tool  # of all envs of the process, with its cache
        self._tool = Clocked(shared.tool)
        self.env.engine.tool = CachedTool(self._tool, cache=shared.cache, disk=shared.disk)
        self._played: list[_Played | None] = [None] * slots
        self._asked: list[_Asked] = []
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="medseg-gym-env")
        self._running: asyncio.Task[None] | None = None
        self._closed = False

    async def reset(self, slot: int, key: str, seed: int) -> Observed:
        return await self._ask(slot, lambda asked: self._reset(asked, key, seed))

    async def step(self, slot: int, text: str, cut_off: bool = False) -> Observed:
        return await self._ask(slot, _Said(text, cut_off))

    async def truncate(self, slot: int) -> None:
        await self._ask(slot, lambda _: self._truncate(slot))

    async def episode(self, slot: int, case: int, seed: int) -> Episode:
        return await self._ask(slot, lambda _: self._episode(slot, case, seed))

    async def keys(self, split: str) -> list[str]:
        config = self.env.engine.config
        return await self._ask(0, lambda _: list(self.env.dataset.keys(split, tuple(config.structures))))

    async def counters(self) -> Mapping[str, float]:
        """This worker's share of the tool's work, so that the counters of several workers add up."""
        return self._tool.counters()

    async def close(self) -> None:
        """Waits for what is under way; all else that was or is asked raises."""
        self._closed = True
        await asyncio.to_thread(self._thread.shutdown)
        self.env.close()

    # the queue

    async def _ask(self, slot: int, what: _Said | Callable[[_Asked], Any]) -> Any:
        if not 0 <= slot < self.slots:
            raise MedSegError(f"slot {slot}; wanted 0 to {self.slots - 1}")
        loop = asyncio.get_running_loop()
        asked = _Asked(slot, what, loop.create_future(), time.perf_counter())
        self._asked.append(asked)
        if self._running is None or self._running.done():
            self._running = loop.create_task(self._run(loop))
        return await asked.answer

    async def _run(self, loop: asyncio.AbstractEventLoop) -> None:
        """Hands the thread all that was asked, until nothing is."""
        while self._asked:
            batch, self._asked = self._asked, []
            batch = [asked for asked in batch if not asked.answer.done()]  # whoever asked may have been cancelled

            def settle(asked: _Asked, result: Any) -> None:
                loop.call_soon_threadsafe(_settle, asked.answer, result)

            try:
                if self._closed:
                    raise MedSegError("the worker was closed")
                await loop.run_in_executor(self._thread, self._execute, batch, settle)
            except Exception as error:
                for asked in batch:
                    _settle(asked.answer, error)

    # in the thread

    def _execute(self, batch: Sequence[_Asked], settle: Callable[[_Asked, Any], None]) -> None:
        """Does what was asked, the turns first; each result goes out as soon as it is there."""
        turns = [asked for asked in batch if isinstance(asked.what, _Said)]
        self._step(turns, settle)
        for asked in batch:
            if isinstance(asked.what, _Said):
                continue
            try:
                settle(asked, asked.what(asked))
            except Exception as error:
                settle(asked, error)

    def _step(self, turns: Sequence[_Asked], settle: Callable[[_Asked, Any], None]) -> None:
        begun = time.perf_counter()
        engine = self.env.engine
        ready: list[tuple[_Asked, Action | Unreadable]] = []
        for asked in turns:
            try:
                ready.append((asked, self._read(engine.running(asked.slot), asked.what)))
            except Exception as error:
                settle(asked, error)
        if not ready:
            return
        try:
            self.env.send([action for _, action in ready], [asked.slot for asked, _ in ready])
            self.env.recv()
        except Exception as error:
            for asked, _ in ready:
                settle(asked, error)
            return
        done = time.perf_counter()
        for asked, action in ready:
            played = self._played[asked.slot]
            assert played is not None and isinstance(asked.what, _Said)
            played.texts.append(asked.what.text)
            timing = {"queue_s": begun - asked.since, "env_s": done - begun}
            settle(asked, self._observed(asked.slot, timing, readable=not isinstance(action, Unreadable)))

    def _spoken(self, slot: Slot) -> ChatProtocol:
        return self.asking if isinstance(slot.sample, QuestionSample) else self.protocol

    def _read(self, slot: Slot, said: Any) -> Action | Unreadable:
        """The action of a completion; one that the env would refuse is the agent's mistake, not the run's."""
        grid = slot.grid
        decision = self._spoken(slot).parse(said.text, grid)
        if decision.action is None:
            reason = decision.reason or "no action could be read"
            return Unreadable(f"the answer was cut off; {reason}" if said.cut_off else reason)
        try:
            return self.env.engine.codec.read(decision.action, grid)
        except InvalidActionError as error:
            return Unreadable(f"{error!s:.300}")

    def _reset(self, asked: _Asked, key: str, seed: int) -> Observed:
        begun = time.perf_counter()
        slot, engine = asked.slot, self.env.engine
        self._played[slot] = None
        engine.reset(slot, np.random.default_rng(seed), {"sample": key})
        image = engine.slot(slot).sample.image
        same = next((played for played in self._played if played is not None and played.key == key), None)
        pictures = same.pictures if same else chat.Pictures(image, self.protocol, self.size)
        self._played[slot] = _Played(key, pictures, same.plain if same else [])
        return self._observed(slot, {"queue_s": begun - asked.since, "env_s": time.perf_counter() - begun})

    def _truncate(self, slot: int) -> None:
        self.env.engine.truncate(slot)
        played = self._played[slot]
        assert played is not None
        self._played[slot] = replace(played, horizon=len(played.texts))

    def _observed(self, slot: int, timing: dict[str, float], *, readable: bool = True) -> Observed:
        begun = time.perf_counter()
        state, played = self.env.engine.slot(slot), self._played[slot]
        assert played is not None
        messages: list[chat.Message] = []
        images: tuple[ImageRef, ...] = ()
        if state.ended is None:
            view = self.env.view(slot)
            messages = chat.news(view, self._spoken(state), played.pictures)
            images = (played.image(messages[-1]["content"][0]["image"], view.mask),)
        return Observed(
            messages=messages,
            images=images,
            turn=state.progress.turns,
            iou=state.progress.iou,
            dice=state.progress.dice,
            reward=self.env.engine.reward_of(slot),
            terms=dict(state.terms),
            readable=readable,
            ended=state.ended,
            timing={**timing, "render_s": time.perf_counter() - begun},
        )

    def _episode(self, slot: int, case: int, seed: int) -> Episode:
        played = self._played[slot]
        episode = self.env.episode(slot, case=case, seed=seed)
        if played is None:
            return episode
        turns = tuple(replace(turn, text=text) for turn, text in zip(episode.turns, played.texts, strict=True))
        return replace(episode, turns=turns, horizon=played.horizon or episode.horizon)


@dataclass(frozen=True, slots=True)
class _Said:
    text: str
    cut_off: bool


@dataclass(frozen=True, slots=True)
class _Asked:
    """Something a slot wants done, and where its result goes."""

    slot: int
    what: _Said | Callable[[_Asked], Any]
    answer: asyncio.Future[Any]
    since: float


@dataclass(frozen=True, slots=True)
class _Played:
    """The case in a slot, with what was said in it."""

    key: str
    pictures: chat.Pictures
    plain: list[ImageRef]  # that of the picture without a mask, once it is known; shared as the pictures are
    texts: list[str] = field(default_factory=list)
    horizon: int = 0  # where it was truncated

    def image(self, picture: Image, mask: Mask) -> ImageRef:
        """The picture with its hash.

        Drawing a picture of 512 pixels takes .6 ms, hashing it 2.7 ms, hashing what decides it, the plain picture's
        hash and the mask, .2 ms.
        """
        if not self.plain:
            self.plain.append(ImageRef.of(self.pictures.overlay.plain))
        if picture is self.plain[0].pixels:
            return self.plain[0]
        digest = hashlib.sha256(f"{self.plain[0].sha} {self.pictures.colours} {mask.shape}".encode())
        digest.update(np.packbits(mask).data)
        picture.flags.writeable = False
        return ImageRef(digest.hexdigest(), picture)


def _settle(answer: asyncio.Future[Any], result: Any) -> None:
    if answer.done():
        return
    if isinstance(result, Exception):
        answer.set_exception(result)
    else:
        answer.set_result(result)


def _make(env: str, slots: int, options: Mapping[str, Any]) -> SegmentVectorEnv:
    known = gym.registry.get(env)
    if known is None or known.vector_entry_point != "medseg_gym.envs:SegmentVectorEnv":
        raise unknown("env", env, (name for name in gym.registry if name.startswith("MedSeg-")))
    settings = {**options, "size": VIEW, "on_error": "fail", "autoreset_mode": AutoresetMode.DISABLED}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="an image observation does not say")  # the chat names the target
        made = gym.make_vec(env, num_envs=slots, vectorization_mode="vector_entry_point", **settings)
    assert isinstance(made.unwrapped, SegmentVectorEnv)
    return made.unwrapped
