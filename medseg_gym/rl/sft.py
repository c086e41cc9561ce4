"""Supervised fine-tuning: the loop. Chats of trajectories, one optimiser step, validation by episodes, checkpoint.

What is trained is a function of settings, data and the number of the step, so a run that goes on from a checkpoint
equals one that never ended, bit for bit on a CPU. A step's numbers are written, and its validation is played, before
its checkpoint: a kill in between repeats both, and leaves nothing doubled or missing.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from medseg_gym.datasets.vqa import open_questions
from medseg_gym.errors import MedSegError
from medseg_gym.policies import protocols
from medseg_gym.policies.protocols import ChatProtocol
from medseg_gym.rl import checkpoint
from medseg_gym.rl.batch import plan, supervised_rows
from medseg_gym.rl.config import Common, SFTConfig
from medseg_gym.rl.local_worker import LocalWorker
from medseg_gym.rl.loss import Objective
from medseg_gym.rl.questions import validation_questions
from medseg_gym.rl.ranks import LearnerHandle, learner
from medseg_gym.rl.runlog import RunLog, read_metrics
from medseg_gym.rl.sft_questions import MixedRows, QuestionRows
from medseg_gym.rl.sft_rows import ChatRows, Progress, drawn, open_data
from medseg_gym.rl.start import starting_folder
from medseg_gym.rl.stopping import Interrupted, Stopping
from medseg_gym.rl.tokens import ChatTokens
from medseg_gym.rl.types import TokenSequence
from medseg_gym.rl.validate import Validation, validate

CHECKPOINTS, FINAL, BEST = "checkpoints", "final", "best"
NOT_FINITE = 3  # optimiser steps in a row that may be skipped as not finite before the run ends

Show = Callable[[int, int, Mapping[str, float]], None]  # (step, of how many, its numbers): the progress display
Say = Callable[[str], None]  # a line for people
Start = Callable[[Common, Path, int], Awaitable[LearnerHandle]]  # (settings, checkpoint folder, steps)


@dataclass(slots=True)
class State:
    """Where a run stands, beside the learner: a checkpoint's record."""

    step: int = 0  # optimiser steps done
    cursor: int = 0  # chats drawn
    not_finite: int = 0  # steps skipped in a row
    best: float | None = None  # mean IoU of the best validation
    best_step: int = 0
    last: float | None = None  # of the last one
    validated: int = 0  # its step


class SFT:
    """One run. `run` begins it, or goes on with it from its newest checkpoint.

    It leaves out/final, a checkpoint folder that transformers and vLLM load, and out/best with the weights of the best
    validation, if any was played. `start` makes the learner; by default here, in `config.ranks` processes.
    """

    def __init__(
        self,
        config: SFTConfig,
        *,
        show: Show = lambda step, steps, numbers: None,
        say: Say = lambda line: None,
        progress: Progress | None = None,
        stopping: Stopping | None = None,
        start: Start = learner,
    ) -> None:
        self.config, self.out = config, Path(config.out)
        self.show, self.say, self.progress = show, say, progress
        self.stopping = stopping or Stopping()
        self.state, self.steps = State(), 0
        self._start = start
        self._saved = -1  # the step of the newest checkpoint
        self._worker: LocalWorker | None = None
        self._check()

    async def run(self) -> State:
        """Trains to the end; State of the last step. A stop raises Interrupted, after a checkpoint."""
        found = checkpoint.latest(self.out / CHECKPOINTS)
        if found is not None and found[1]["config"] != checkpoint.digest(self.config):
            RunLog(self.out, self.config).close()  # refuses, and says what differs
            raise MedSegError(f"{found[0]} was written by a run of other settings; choose another --out")
        self.log = RunLog(self.out, self.config, found[1]["step"] if found else 0)
        try:
            await self._begin(found)
            try:
                await self._train()
            finally:
                await self.learner.close()
        finally:
            if self._worker is not None:
                await self._worker.close()
            self.log.close()
        return self.state

    async def _begin(self, found: tuple[Path, dict[str, Any]] | None) -> None:
        config = self.config
        self.folder = starting_folder(config)
        self.tokens = ChatTokens.from_pretrained(self.folder)
        if config.env:
            self._worker = LocalWorker(
                config.env,
                min(config.slots, max(1, config.validate_cases)),
                config.protocol,
                size=config.size,
                options=config.env_options,
                protocol_options=config.protocol_options,
                questions=config.questions,
            )
            protocol = self._worker.protocol  # with the words for this env's verbs
        else:
            verbs = config.env_options.get("verbs")  # None: all that the protocol has words for
            protocol = protocols.make(config.protocol, verbs, **config.protocol_options)
        self.rows = ChatRows(
            open_data(config.data),
            protocol,
            self.tokens,
            size=config.size,
            max_chat_tokens=config.max_chat_tokens,
            progress=self.progress,
        )
        self.mixed = self._mixed(protocol)
        self.steps = config.steps or max(1, round(config.epochs * len(self.rows) / (config.batch * self._outlined)))
        left_out = self.rows.notes("; left out: ")
        if config.validate_every and not config.env:
            self.say('no validation, as it plays episodes: env = "..." is not given')
        self.say(f"{len(self.rows)} chats to learn, {config.batch} a step, {self.steps} steps{left_out}")
        self.learner = await self._start(config, self.folder, self.steps)
        if found is not None:
            try:
                if found[1]["data"] != self._digest:
                    raise MedSegError(
                        f"{config.data} holds other trajectories than when {self.out} was begun; choose another --out"
                    )
                await self.learner.load(found[0] / "learner")
            except BaseException:
                await self.learner.close()
                raise
            self.state, self._saved = State(**found[1]["state"]), found[1]["step"]
            self.say(f"going on after step {self.state.step} of {self.steps}")

    def _mixed(self, protocol: ChatProtocol) -> MixedRows | None:
        """The chats with questions among them; None where none are asked."""
        config = self.config
        if not config.questions:
            return None
        asked = QuestionRows(
            open_questions(config.questions),
            protocol,
            self.tokens,
            size=config.size,
            max_chat_tokens=config.max_chat_tokens,
        )
        self.say(f"{len(asked)} questions to learn, {config.question_share:g} of every step")
        return MixedRows(self.rows, asked, config.question_share)

    @property
    def _outlined(self) -> float:
        """The share of the chats that are trajectories."""
        return 1 - self.config.question_share if self.config.questions else 1.0

    @property
    def _digest(self) -> str:
        return self.rows.digest if self.mixed is None else self.mixed.digest

    async def _train(self) -> None:
        objective = Objective.of(self.config)
        ahead: asyncio.Task[list[TokenSequence]] | None = None
        try:
            await self._validate_late()
            while self.state.step < self.steps:
                self.stopping.check()
                step = self.state.step + 1
                chats = await (ahead or self._chats(step))
                # the next step's pictures are drawn while this one is computed
                ahead = asyncio.create_task(self._chats(step + 1)) if step < self.steps else None
                numbers = await self._step(step, chats, objective)
                try:
                    if self._validates(step):
                        numbers |= await self._validate(step)
                finally:  # a stop may cut the validation short, which a continuation then begins with
                    self.log.write(step, numbers)
                self.show(step, self.steps, numbers)
                if self._due(self.config.save_every, step):
                    await self._save()
        except Interrupted:
            await self._save()
            raise
        finally:
            if ahead is not None:
                ahead.cancel()
                await asyncio.gather(ahead, return_exceptions=True)
        await self._save()
        await self._export(FINAL)

    async def _validate_late(self) -> None:
        """The validation that a stop cut short, if one was due at the step the run goes on from."""
        step = self.state.step
        if step and self.state.validated != step and self._validates(step):
            numbers = await self._validate(step)
            # it is not in the checkpoint that it was played, so a kill makes it come again; its record is written once
            if not any(line["step"] == step and "val/iou" in line for line in read_metrics(self.out)):
                self.log.write(step, numbers)

    async def _chats(self, step: int) -> list[TokenSequence]:
        """The chats of a step: a function of its number."""
        config = self.config

        def render() -> list[TokenSequence]:
            if self.mixed is not None:
                return self.mixed.step(step, config.batch, config.seed)
            return [self.rows[number] for number in drawn(step, len(self.rows), config.batch, config.seed)]

        return await asyncio.to_thread(render)

    async def _step(self, step: int, chats: list[TokenSequence], objective: Objective) -> dict[str, float]:
        begun = time.perf_counter()
        config, state = self.config, self.state
        planned = plan(supervised_rows(chats), config.ranks, config.micro_rows, config.micro_tokens)
        learned = await self.learner.step(planned, objective)
        seconds = time.perf_counter() - begun
        skipped = bool(learned.get("skipped"))
        state.step, state.cursor = step, step * config.batch
        state.not_finite = state.not_finite + 1 if skipped else 0
        if skipped:
            self.say(f"step {step} skipped: loss or gradient were not finite")
        if state.not_finite == NOT_FINITE:
            raise MedSegError(
                f"{NOT_FINITE} steps in a row were not finite, the last {step}; lower lr or grad_clip, and give "
                f"another --out. The newest checkpoint is of step {max(self._saved, 0)}"
            )
        tokens = sum(len(chat.ids) for chat in chats)
        measured = {
            "epoch": state.cursor * self._outlined / len(self.rows),
            "speed/seconds": seconds,
            "speed/tokens_s": tokens / seconds,  # of whole chats, those that are not trained too
            "speed/chats_s": len(chats) / seconds,
        }
        return {**{f"train/{name}": float(value) for name, value in learned.items()}, **measured}

    async def _validate(self, step: int) -> dict[str, float]:
        """Episodes in the env by the learner's weights; those of the best validation are exported to out/best."""
        begun = time.perf_counter()
        played = await self.stopping.unless(self.play())
        self.state.last, self.state.validated = played.iou, step
        if self.state.best is None or played.iou > self.state.best:
            self.state.best, self.state.best_step = played.iou, step
            await self._export(BEST)
        return {**played.scalars(), "val/seconds": time.perf_counter() - begun}

    async def play(self) -> Validation:
        """Plays the validation cases by the learner's present weights, in an engine made for it.

        Between validations no engine is there, so that its weights take no memory from the learner.
        """
        from medseg_gym.rl.engines.hf import HFEngine
        from medseg_gym.rl.sync import publish

        config = self.config
        if self._worker is None:
            raise MedSegError('validation plays episodes: give an env id as env = "..."')
        keys = await self._worker.keys(config.validate_split)
        weights = await self.learner.weights(full=False)
        engine = HFEngine(self.folder, self.tokens, device=config.device, dtype=config.dtype)
        try:
            await engine.pause()
            await engine.update_weights(publish(weights, self.state.step, full=False))
            await engine.resume()
            return await validate(
                [self._worker],
                engine,
                self.tokens,
                chosen(keys, config.validate_cases, config.seed),
                temperature=config.validate_temperature,
                seed=config.seed,
                max_new_tokens=config.max_new_tokens,
                max_chat_tokens=config.max_chat_tokens,
                questions=validation_questions(config),
            )
        finally:
            await engine.close()

    async def _save(self) -> None:
        """A checkpoint of the present step, unless it is there."""
        if self.state.step in (self._saved, 0):
            return
        loop = asyncio.get_running_loop()

        def write(folder: Path) -> None:
            asyncio.run_coroutine_threadsafe(self.learner.save(folder / "learner"), loop).result()

        record = {"config": checkpoint.digest(self.config), "data": self._digest, "state": asdict(self.state)}
        root, step = self.out / CHECKPOINTS, self.state.step
        await asyncio.to_thread(checkpoint.save, root, step, write, record, self.config.keep)
        self._saved = step

    async def _export(self, name: str) -> None:
        loop = asyncio.get_running_loop()

        def write(folder: Path) -> None:
            asyncio.run_coroutine_threadsafe(self.learner.export(folder), loop).result()

        await asyncio.to_thread(checkpoint.replace_folder, self.out / name, write)

    def _due(self, every: int, step: int) -> bool:
        return bool(every) and (step % every == 0 or step == self.steps)

    def _validates(self, step: int) -> bool:
        return bool(self.config.env) and self._due(self.config.validate_every, step)

    def _check(self) -> None:
        config = self.config
        for name, least in {"batch": 1, "steps": 0, "save_every": 1, "keep": 1, "validate_every": 0}.items():
            if getattr(config, name) < least:
                raise MedSegError(f"{name}={getattr(config, name)}; wanted {least} or more")
        if not config.steps and not (config.epochs > 0 and math.isfinite(config.epochs)):
            raise MedSegError(f"epochs={config.epochs}; wanted more than 0, or steps")


def chosen(keys: list[str], count: int, seed: int) -> list[str]:
    """`count` of the cases by the seed, in their order; all where there are fewer."""
    if count >= len(keys):
        return list(keys)
    places = np.sort(np.random.default_rng(seed).choice(len(keys), count, replace=False))
    return [keys[place] for place in places]


def train(
    config: SFTConfig, *, show: Show | None = None, say: Say | None = None, progress: Progress | None = None
) -> State:
    """A whole run, with ^C and SIGTERM as a stop: then Interrupted is raised and the same settings go on later."""

    async def whole() -> State:
        stopping = Stopping()
        given = {name: value for name, value in (("show", show), ("say", say)) if value is not None}
        with stopping.on_signals():
            return await SFT(config, progress=progress, stopping=stopping, **given).run()  # type: ignore[arg-type]

    return asyncio.run(whole())
