"""GRPO: the loop. Cases, groups of episodes, advantages, one optimiser step, checkpoint, engine updated, and on.

It holds no tensor and knows nothing of where its parts run: engine, learner and env workers are handles that are
awaited, here objects of this process, elsewhere actors.

What is trained is a function of settings, starting weights and the number of the iteration: cases come from a cursor
in a seeded order, every sampling seed from run, iteration, group, member and turn, and a round of groups is played to
its end. So a run that goes on from a checkpoint equals one that never ended. An iteration's numbers are written before
its checkpoint and the engine gets the weights after it; a kill in between leaves nothing doubled or missing.

With `staleness=1` an iteration's groups are played while the one before is learned, all by the weights that the step
under way starts from, which only then are changed: see `ahead`.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import asdict
from pathlib import Path
from typing import Any

from medseg_gym.errors import MedSegError
from medseg_gym.rl import checkpoint, invariants, measures
from medseg_gym.rl.advantages import advantages
from medseg_gym.rl.ahead import Ahead
from medseg_gym.rl.config import GRPOConfig
from medseg_gym.rl.curriculum import Draw, read_keys
from medseg_gym.rl.gallery import of_iteration, write_gallery
from medseg_gym.rl.groups import Group, Groups, draw_groups
from medseg_gym.rl.grpo_check import check
from medseg_gym.rl.grpo_step import State, learn
from medseg_gym.rl.jobs import Job, Settings
from medseg_gym.rl.parts import Parts, local_parts
from medseg_gym.rl.questions import order_of, validation_questions
from medseg_gym.rl.rollout import play
from medseg_gym.rl.runlog import RunLog, recorded
from medseg_gym.rl.sft import chosen
from medseg_gym.rl.stopping import Interrupted, Stopping
from medseg_gym.rl.validate import validate
from medseg_gym.rl.worker import LostError, keys_of

CHECKPOINTS, GALLERY, FINAL, BEST = "checkpoints", "gallery", "final", "best"
LOSSES = 3  # of the learner without an iteration beyond those before, before the run ends


Show = Callable[[int, int, Mapping[str, float]], None]  # (iteration, of how many, its numbers): the display
Say = Callable[[str], None]  # a line for people


class GRPO:
    """One run. `run` begins it, or goes on with it from its newest checkpoint."""

    def __init__(
        self,
        config: GRPOConfig,
        parts: Parts,
        *,
        show: Show = lambda step, steps, numbers: None,
        say: Say = lambda line: None,
        stopping: Stopping | None = None,
    ) -> None:
        check(config)
        self.config, self.parts, self.show, self.say = config, parts, show, say
        self.out = Path(config.out)
        self.stopping = stopping or Stopping()
        self.state = State()
        self._saved = -1  # the step of the newest checkpoint
        self._order: dict[str, Any] = {}  # where the cases stood after those of `state.step`
        self._ahead = Ahead()

    async def run(self) -> State:
        """Trains to the end and writes out/final, and out/best by the best validation.

        A stop raises Interrupted, after a checkpoint. A learner that is lost begins anew, all its ranks, and the run
        goes on from its newest checkpoint.
        """
        async with aclosing(self.iterations()) as running:
            async for _ in running:
                pass
        return self.state

    async def iterations(self) -> AsyncGenerator[dict[str, float], None]:
        """`run`, one iteration at a time: the numbers of each, once, with those of a validation that follows it.

        The last one's come when out/final is written; a run that was done before gives none.
        """
        losses, furthest, told = 0, -1, -1
        while True:
            try:
                if losses:
                    await self._renewed()
                async with aclosing(self._run()) as running:
                    async for numbers in running:
                        if self.state.step > told:  # not one that was lost and is repeated
                            told = self.state.step
                            yield numbers
                return
            except LostError as error:
                self.stopping.check()
                losses = 1 if self.state.step > furthest else losses + 1
                furthest = max(furthest, self.state.step)
                if losses > LOSSES:
                    raise MedSegError(
                        f"the learner was lost {losses} times after iteration {furthest}: {error}"
                    ) from None
                self.say(f"{error}; all ranks begin again from the newest checkpoint")

    async def _renewed(self) -> None:
        """Everything as before the first iteration, for a run that goes on as any other does."""
        self.state, self._saved, self._ahead = State(), -1, Ahead()
        await self.parts.learner.restart()

    @property
    def done(self) -> bool:
        return self.state.step >= self.config.iterations or bool(self.state.stopped)

    async def _run(self) -> AsyncGenerator[dict[str, float], None]:
        found = checkpoint.latest(self.out / CHECKPOINTS)
        self.log = RunLog(self.out, self.config, found[1]["step"] if found else 0)
        try:
            await self._begin(found)
            await self._validate()
            numbers: dict[str, float] = {}
            while not self.done:
                numbers = {**await self._iterate(), **await self._validate()}
                if not self.done:
                    yield numbers
            await self._finish()
            if numbers:
                yield numbers
        except Interrupted:
            await self.save()
            raise
        finally:
            await self._ahead.drop()
            self.log.close()

    async def _begin(self, found: tuple[Path, dict[str, Any]] | None) -> None:
        config, parts = self.config, self.parts
        keys = await keys_of(parts.workers, config.split)
        if config.keys_file:
            keys = read_keys(config.keys_file, keys)
        self.order = order_of(config, keys)
        if found is not None:
            folder, record = found
            if record["config"] != checkpoint.digest(config):
                raise MedSegError(f"{folder} was written by a run of other settings; choose another --out")
            await parts.learner.load(folder / "learner")
            self.state, self._saved = State(**record["state"]), record["step"]
            self.order.load(record["order"])
            self._order, self._ahead = self.order.state(), Ahead.read(folder, record)
            self.say(f"going on after iteration {self.state.step} of {config.iterations}")
        whole, trained = await parts.learner.weights(full=True), await parts.learner.weights(full=False)
        self._ahead.names = frozenset(trained)
        frozen = invariants.frozen_digest(whole, trained)
        if self.state.frozen and frozen != self.state.frozen:
            raise invariants.InvariantError(f"{config.model}: its frozen weights are not those this run began with")
        self.state.frozen = frozen
        await self._publish(whole, full=True)

    async def _iterate(self) -> dict[str, float]:
        config, parts, watch = self.config, self.parts, measures.Stopwatch()
        step = self.state.step + 1
        before = await self._counters()
        with watch.part("play"):
            groups, sampled = await self._groups(step)
        invariants.check_staleness(sampled, self.state.version, config.staleness)
        for group in groups.played:
            invariants.check_group(group, parts.tokens, sampled)
        given = [advantages(group, credit=config.credit, std=config.std) for group in groups.trained]
        order, stale = self.order.state(), self.state.version - sampled
        if config.staleness:
            self._ahead.begin(self._stoppable(step + 1, self.state.version) if step < config.iterations else None)
        with watch.part("learn"):
            learned = await learn(self.state, config, parts.learner, groups, given, stale=stale > 0, say=self.say)
        with watch.part("ahead"):
            await self._ahead.played()
        after = await self._counters()
        numbers = {
            **measures.of_rollouts([member for group in groups.played for member in group]),
            **measures.of_groups(groups),
            **({"groups/staleness": float(stale)} if config.staleness else {}),
            **{f"learner/{name}": value for name, value in learned.items()},
            **watch.measures(
                measures.change(before[0], after[0]),
                [measures.change(*pair) for pair in zip(before[1], after[1], strict=True)],
            ),
        }
        self.state.step, self._order = step, order
        self._stop_on_reward(numbers)
        if config.gallery_every and step % config.gallery_every == 0:
            shown = of_iteration(groups, given, parts.dataset)
            write_gallery(self.out / GALLERY / f"iteration-{step:06d}.html", f"Iteration {step}", shown)
        self.log.write(step, numbers)
        if step % config.save_every == 0 or step == config.iterations or self.state.stopped:
            await self.save()
        self._ahead.check()
        if learned and not learned.get("skipped"):
            await self._publish(await parts.learner.weights(full=False), full=False)
        self.show(step, config.iterations, numbers)
        return numbers

    async def _groups(self, step: int) -> tuple[Groups, int]:
        """The iteration's groups, and the version of the weights they were played by; those played ahead, if any.

        A run that goes on plays them anew: by the weights of then, which are given to the engine for that.
        """
        if self._ahead.playing:
            return await self._ahead.take()
        given = self._ahead.given
        if not self.config.staleness or given is None or given.version == self.state.version:
            return await self._stoppable(step, self.state.version), self.state.version
        whole = await self.parts.learner.weights(full=True)
        await self._publish({**whole, **given.weights}, full=True, version=given.version)
        groups = await self._stoppable(step, given.version)
        await self._publish(await self.parts.learner.weights(full=False), full=False)
        return groups, given.version

    async def _stoppable(self, step: int, version: int) -> Groups:
        return await self.stopping.unless(self._play(step, version))

    async def _play(self, step: int, version: int) -> Groups:
        """The iteration's groups, of the weights of this version."""
        config, parts = self.config, self.parts
        settings = Settings.of(config, step, policy=self._policy(version))

        def playing(draws: Sequence[Draw], first: int) -> AsyncIterator[Group]:
            jobs = [Job(first + at, draw.key, config.rollouts) for at, draw in enumerate(draws)]
            return play(jobs, parts.workers, parts.engine, parts.tokens, settings)

        return await draw_groups(
            self.order,
            playing,
            wanted=config.prompts,
            filtered=config.filter,
            credit=config.credit,
            resample=config.resample,
            solved=config.solved,
        )

    async def _publish(self, weights: dict[str, Any], *, full: bool, version: int | None = None) -> None:
        """Gives the engine weights, under the state's version where no other is said."""
        engine, version = self.parts.engine, self.state.version if version is None else version
        source = self.parts.publish(weights, version, full)
        await engine.pause()
        try:
            await engine.update_weights(source)
        finally:
            await engine.resume()
        if (found := (await engine.status()).version) != version:
            raise invariants.InvariantError(f"the engine says version {found} after it was given {version}")
        if self.config.staleness:
            self._ahead.published(version, weights)

    async def _validate(self) -> dict[str, float]:
        """Plays the validation cases if they are due and no earlier run has written down what they gave."""
        config, state = self.config, self.state
        due = config.validate_every and (
            state.step % config.validate_every == 0 or state.step == config.iterations or state.stopped
        )
        if not due:
            return {}
        numbers = recorded(self.out, state.step, "val/iou")  # a kill came between it and a checkpoint
        if numbers is None:
            numbers = await self.stopping.unless(self._validation())
            self.log.write(state.step, numbers)
        if state.validated < state.step:
            state.validated = state.step
            score = numbers["val/iou"]
            if state.best is None or score > state.best:
                state.best, state.best_step, state.worse = score, state.step, 0
                await self._export(BEST)
            else:
                state.worse += 1
            if config.patience and state.worse >= config.patience and not state.stopped:
                state.stopped = f"{state.worse} validations without a mean IoU above {state.best:.3f}"
        self.show(state.step, config.iterations, numbers)
        return numbers

    async def _validation(self) -> dict[str, float]:
        config, parts = self.config, self.parts
        found = await validate(
            parts.workers,
            parts.engine,
            parts.tokens,
            chosen(await keys_of(parts.workers, config.validate_split), config.validate_cases, config.seed),
            temperature=config.validate_temperature,
            seed=config.seed,
            max_new_tokens=config.max_new_tokens,
            max_chat_tokens=config.max_chat_tokens,
            policy=self._policy(self.state.version),
            questions=validation_questions(config),
        )
        return found.scalars()

    def _stop_on_reward(self, numbers: Mapping[str, float]) -> None:
        limit = self.config.stop_reward
        if limit and numbers.get("train/reward", -math.inf) > limit:
            self.state.stopped = f"mean reward {numbers['train/reward']:.3f} is above {limit:g}"

    async def save(self) -> None:
        """Writes a checkpoint of the last whole iteration, if there is one and it has none."""
        if self.state.step in (self._saved, 0):
            return
        record = {
            "config": checkpoint.digest(self.config),
            "state": asdict(self.state),
            "order": self._order,
            **self._ahead.record(self.state.version),
        }

        async def fill(folder: Path) -> None:
            await self.parts.learner.save(folder / "learner")
            await asyncio.to_thread(self._ahead.write, folder, self.state.version)

        await checkpoint.filled(
            lambda write: checkpoint.save(self.out / CHECKPOINTS, self.state.step, write, record, self.config.keep),
            fill,
        )
        self._saved = self.state.step

    async def _finish(self) -> None:
        await self.save()
        whole = await self.parts.learner.weights(full=True)
        frozen = invariants.frozen_digest(whole, await self.parts.learner.weights(full=False))
        if frozen != self.state.frozen:
            raise invariants.InvariantError("weights that were frozen have changed in the course of the run")
        await self._export(FINAL)
        end = self.state.stopped or "done"
        self.say(f"{end} after iteration {self.state.step}; the model is in {self.out / FINAL}")

    async def _export(self, name: str) -> None:
        await checkpoint.filled(
            lambda write: checkpoint.replace_folder(self.out / name, write), self.parts.learner.export
        )

    async def _counters(self) -> tuple[Mapping[str, float], list[Mapping[str, float]]]:
        status = await self.parts.engine.status()
        return status.counters, [await worker.counters() for worker in self.parts.workers]

    def _policy(self, version: int) -> str:
        return f"{Path(self.config.model).name}@{version}"


def train(config: GRPOConfig, *, show: Show | None = None, say: Say | None = None) -> State:
    """A whole run, in this process or on `config.cluster`, with ^C and SIGTERM as a stop: then Interrupted is raised,
    after a checkpoint."""
    check(config)

    async def whole() -> State:
        stopping = Stopping()
        given = {name: value for name, value in (("show", show), ("say", say)) if value is not None}
        with stopping.on_signals():
            parts = await make_parts(config)
            try:
                return await GRPO(config, parts, stopping=stopping, **given).run()  # type: ignore[arg-type]
            finally:
                await parts.close()

    return asyncio.run(whole())


async def make_parts(config: GRPOConfig) -> Parts:
    """All in this process, or as actors."""
    if not config.cluster:
        return await local_parts(config)
    from medseg_gym.rl.cluster.parts import cluster_parts

    return await cluster_parts(config)
