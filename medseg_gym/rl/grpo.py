"""GRPO: the loop. Cases, groups of episodes, advantages, one optimiser step, checkpoint, engine updated, and on.

It holds no tensor and knows nothing of where its parts run: engine, learner and env workers are handles that are
awaited, here objects of this process, elsewhere actors.

What is trained is a function of settings, starting weights and the number of the iteration: cases come from a cursor
in a seeded order, every sampling seed from run, iteration, group, member and turn, and a round of groups is played to
its end. So a run that goes on from a checkpoint equals one that never ended. An iteration's numbers are written before
its checkpoint and the engine gets the weights after it; a kill in between leaves nothing doubled or missing.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medseg_gym.errors import MedSegError, unknown
from medseg_gym.rl import checkpoint, invariants, measures
from medseg_gym.rl.advantages import CREDITS, advantages
from medseg_gym.rl.batch import NORMALISERS, plan, rows_of
from medseg_gym.rl.config import PLACEMENTS, GRPOConfig
from medseg_gym.rl.curriculum import CURRICULA, CaseOrder, Draw, read_keys
from medseg_gym.rl.engines.builds import BUILDS
from medseg_gym.rl.gallery import of_iteration, write_gallery
from medseg_gym.rl.groups import Group, Groups, draw_groups
from medseg_gym.rl.jobs import Job, Settings
from medseg_gym.rl.loss import Objective
from medseg_gym.rl.parts import Parts, local_parts
from medseg_gym.rl.rollout import play
from medseg_gym.rl.runlog import RunLog, read_metrics
from medseg_gym.rl.sft import chosen
from medseg_gym.rl.stopping import Interrupted, Stopping
from medseg_gym.rl.validate import validate
from medseg_gym.rl.worker import LostError

Advantages = NDArray[np.float64] | None  # of a member's turns; None where it is not trained

CHECKPOINTS, GALLERY, FINAL, BEST = "checkpoints", "gallery", "final", "best"
NOT_FINITE = 3  # optimiser steps in a row that may be skipped as not finite before the run ends
LOSSES = 3  # of the learner without an iteration beyond those before, before the run ends


@dataclass(slots=True)
class State:
    """Where a run stands, beside the learner: a checkpoint's record."""

    step: int = 0  # iterations done
    version: int = 0  # of the weights: how often they were changed
    not_finite: int = 0  # optimiser steps skipped in a row
    best: float | None = None  # mean IoU of the best validation
    best_step: int = 0
    worse: int = 0  # validations since
    validated: int = -1  # the iteration whose validation was taken in last
    stopped: str = ""  # why the run ended early
    frozen: str = ""  # digest of the weights that are not trained


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
        self.objective = Objective.of(config)
        self.stopping = stopping or Stopping()
        self.state = State()
        self._saved = -1  # the step of the newest checkpoint

    async def run(self) -> State:
        """Trains to the end and writes out/final, and out/best by the best validation.

        A stop raises Interrupted, after a checkpoint. A learner that is lost begins anew, all its ranks, and the run
        goes on from its newest checkpoint.
        """
        losses, furthest = 0, -1
        while True:
            try:
                if losses:
                    await self._renewed()
                return await self._run()
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
        self.state, self._saved = State(), -1
        await self.parts.learner.restart()

    async def _run(self) -> State:
        found = checkpoint.latest(self.out / CHECKPOINTS)
        self.log = RunLog(self.out, self.config, found[1]["step"] if found else 0)
        try:
            await self._begin(found)
            await self._validate()
            while self.state.step < self.config.iterations and not self.state.stopped:
                await self._iterate()
                await self._validate()
            await self._finish()
            return self.state
        except Interrupted:
            await self._save()
            raise
        finally:
            self.log.close()

    async def _begin(self, found: tuple[Path, dict[str, Any]] | None) -> None:
        config, parts = self.config, self.parts
        keys = await parts.workers[0].keys(config.split)
        if config.keys_file:
            keys = read_keys(config.keys_file, keys)
        self.order = CaseOrder(keys, config.seed, config.curriculum)
        if found is not None:
            folder, record = found
            if record["config"] != checkpoint.digest(config):
                raise MedSegError(f"{folder} was written by a run of other settings; choose another --out")
            await parts.learner.load(folder / "learner")
            self.state, self._saved = State(**record["state"]), record["step"]
            self.order.load(record["order"])
            self.say(f"going on after iteration {self.state.step} of {config.iterations}")
        whole = await parts.learner.weights(full=True)
        frozen = invariants.frozen_digest(whole, await parts.learner.weights(full=False))
        if self.state.frozen and frozen != self.state.frozen:
            raise invariants.InvariantError(f"{config.model}: its frozen weights are not those this run began with")
        self.state.frozen = frozen
        await self._publish(whole, full=True)

    async def _iterate(self) -> None:
        config, parts, watch = self.config, self.parts, measures.Stopwatch()
        step = self.state.step + 1
        before = await self._counters()
        order = self.order.state()
        try:
            with watch.part("play"):
                groups = await self.stopping.unless(self._play(step))
        except BaseException:
            self.order.load(order)  # so that a checkpoint written now is of the iteration before
            raise
        for group in groups.played:
            invariants.check_group(group, parts.tokens, self.state.version)
        given = [advantages(group, credit=config.credit, std=config.std) for group in groups.trained]
        with watch.part("learn"):
            learned = await self._learn(groups, given)
        after = await self._counters()
        numbers = {
            **measures.of_rollouts([member for group in groups.played for member in group]),
            **measures.of_groups(groups),
            **{f"learner/{name}": value for name, value in learned.items()},
            **watch.measures(
                measures.change(before[0], after[0]),
                [measures.change(*pair) for pair in zip(before[1], after[1], strict=True)],
            ),
        }
        self.state.step = step
        self._stop_on_reward(numbers)
        if config.gallery_every and step % config.gallery_every == 0:
            shown = of_iteration(groups, given, parts.dataset)
            write_gallery(self.out / GALLERY / f"iteration-{step:06d}.html", f"Iteration {step}", shown)
        self.log.write(step, numbers)
        if step % config.save_every == 0 or step == config.iterations or self.state.stopped:
            await self._save()
        if learned and not learned.get("skipped"):
            await self._publish(await parts.learner.weights(full=False), full=False)
        self.show(step, config.iterations, numbers)

    async def _play(self, step: int) -> Groups:
        config, parts = self.config, self.parts
        settings = Settings.of(config, step, policy=self._policy())

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

    async def _learn(self, groups: Groups, by_group: Sequence[Sequence[Advantages]]) -> dict[str, float]:
        """One optimiser step; what the learner says of it, nothing where there is nothing to learn from."""
        config, learner = self.config, self.parts.learner
        given = [values for group in by_group for values in group]
        if not groups.trained or not (config.kl or any(values is not None and values.any() for values in given)):
            # Not a step of zeros: it would still decay the weights and follow the optimiser's momentum.
            self.say(
                f"iteration {self.state.step + 1}: no step, as all advantages are 0: of {len(groups.played)} groups "
                f"{groups.equal or len(groups.trained)} have equal rewards and {groups.short} fewer than two members"
            )
            return {}
        rows = rows_of([member for group in groups.trained for member in group], given, config)
        if config.kl:
            found = await learner.reference_logprobs([row.sequence for row in rows], temperature=config.temperature)
            rows = [replace(row, reference=values) for row, values in zip(rows, found, strict=True)]
        planned = plan(rows, config.ranks, config.micro_rows, config.micro_tokens)
        invariants.check_plan(planned, rows)
        learned = await learner.step(planned, self.objective)
        if learned.get("skipped"):
            self.state.not_finite += 1
            self.say(f"iteration {self.state.step + 1}: step skipped, loss or gradient were not finite")
            if self.state.not_finite == NOT_FINITE:
                raise MedSegError(
                    f"{NOT_FINITE} optimiser steps in a row were not finite; the weights are those before them. Lower "
                    "lr or grad_clip, or take dtype float32, and go on from the last checkpoint in a new folder"
                )
            return learned
        self.state.not_finite = 0
        if said := invariants.mismatch_fault(learned["mismatch_kl"], config.dtype == "float32"):
            self.say(f"iteration {self.state.step + 1}: {said}")
        self.state.version += 1
        return learned

    async def _publish(self, weights: dict[str, Any], *, full: bool) -> None:
        engine, version = self.parts.engine, self.state.version
        source = self.parts.publish(weights, version, full)
        await engine.pause()
        try:
            await engine.update_weights(source)
        finally:
            await engine.resume()
        if (found := (await engine.status()).version) != version:
            raise invariants.InvariantError(f"the engine says version {found} after it was given {version}")

    async def _validate(self) -> None:
        """Plays the validation cases if they are due and no earlier run has written down what they gave."""
        config, state = self.config, self.state
        due = config.validate_every and (
            state.step % config.validate_every == 0 or state.step == config.iterations or state.stopped
        )
        if not due:
            return
        numbers = self._recorded()
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

    async def _validation(self) -> dict[str, float]:
        config, parts = self.config, self.parts
        found = await validate(
            parts.workers,
            parts.engine,
            parts.tokens,
            chosen(await parts.workers[0].keys(config.validate_split), config.validate_cases, config.seed),
            temperature=config.validate_temperature,
            seed=config.seed,
            max_new_tokens=config.max_new_tokens,
            max_chat_tokens=config.max_chat_tokens,
            policy=self._policy(),
        )
        return found.scalars()

    def _recorded(self) -> dict[str, float] | None:
        """The validation of this step that metrics.jsonl holds already: a kill came between it and a checkpoint."""
        for record in read_metrics(self.out):
            if record["step"] == self.state.step and "val/iou" in record:
                return {name: value for name, value in record.items() if name != "step"}
        return None

    def _stop_on_reward(self, numbers: Mapping[str, float]) -> None:
        limit = self.config.stop_reward
        if limit and numbers.get("train/reward", -math.inf) > limit:
            self.state.stopped = f"mean reward {numbers['train/reward']:.3f} is above {limit:g}"

    async def _save(self) -> None:
        if self.state.step in (self._saved, 0):
            return
        record = {
            "config": checkpoint.digest(self.config),
            "state": asdict(self.state),
            "order": self.order.state(),
        }
        await self._written(
            lambda write: checkpoint.save(self.out / CHECKPOINTS, self.state.step, write, record, self.config.keep),
            lambda folder: self.parts.learner.save(folder / "learner"),
        )
        self._saved = self.state.step

    async def _finish(self) -> None:
        await self._save()
        whole = await self.parts.learner.weights(full=True)
        frozen = invariants.frozen_digest(whole, await self.parts.learner.weights(full=False))
        if frozen != self.state.frozen:
            raise invariants.InvariantError("weights that were frozen have changed in the course of the run")
        await self._export(FINAL)
        end = self.state.stopped or "done"
        self.say(f"{end} after iteration {self.state.step}; the model is in {self.out / FINAL}")

    async def _export(self, name: str) -> None:
        await self._written(lambda write: checkpoint.replace_folder(self.out / name, write), self.parts.learner.export)

    async def _written(
        self, place: Callable[[Callable[[Path], None]], Path], fill: Callable[[Path], Coroutine[Any, Any, None]]
    ) -> None:
        """Has a folder put in its place in a thread, where it is filled by the learner, which is awaited here."""
        loop = asyncio.get_running_loop()

        def write(folder: Path) -> None:
            asyncio.run_coroutine_threadsafe(fill(folder), loop).result()

        await asyncio.to_thread(place, write)

    async def _counters(self) -> tuple[Mapping[str, float], list[Mapping[str, float]]]:
        status = await self.parts.engine.status()
        return status.counters, [await worker.counters() for worker in self.parts.workers]

    def _policy(self) -> str:
        return f"{Path(self.config.model).name}@{self.state.version}"


def check(config: GRPOConfig) -> None:
    """MedSegError for settings that no run can have; said before anything is loaded."""
    least = {"iterations": 1, "prompts": 1, "rollouts": 2, "resample": 0, "save_every": 1, "keep": 1, "patience": 0}
    least |= {"validate_every": 0, "validate_cases": 1, "gallery_every": 0, "workers": 1, "max_new_tokens": 1}
    least |= {"engines": 1, "tool_actors": 0, "seed": 0, "ranks": 1, "micro_rows": 1, "micro_tokens": 1, "lr": 0}
    for name, lowest in least.items():
        if getattr(config, name) < lowest:
            raise MedSegError(f"{name}={getattr(config, name)}; wanted {lowest} or more")
    known_by_name: Mapping[str, Iterable[str]] = {
        "credit": CREDITS,
        "normaliser": NORMALISERS,
        "curriculum": CURRICULA,
        "engine": BUILDS,
        "placement": PLACEMENTS,
    }
    for name, known in known_by_name.items():
        if getattr(config, name) not in known:
            raise unknown(name, getattr(config, name), known)
    if not config.env:  # a dataclass cannot take back the default that it inherits
        raise MedSegError('episodes are played in an env: give an id as env = "...", such as MedSeg-Phantom-Nano-v0')
    if config.patience and not config.validate_every:
        raise MedSegError(f"patience={config.patience} counts validations; give validate_every, or patience=0")
    Objective.of(config)


def train(config: GRPOConfig, *, show: Show | None = None, say: Say | None = None) -> State:
    """A whole run, in this process or on `config.cluster`, with ^C and SIGTERM as a stop: then Interrupted is raised,
    after a checkpoint."""
    check(config)

    async def whole() -> State:
        stopping = Stopping()
        given = {name: value for name, value in (("show", show), ("say", say)) if value is not None}
        with stopping.on_signals():
            parts = await _parts(config)
            try:
                return await GRPO(config, parts, stopping=stopping, **given).run()  # type: ignore[arg-type]
            finally:
                await parts.close()

    return asyncio.run(whole())


async def _parts(config: GRPOConfig) -> Parts:
    """All in this process, or as actors."""
    if not config.cluster:
        return await local_parts(config)
    from medseg_gym.rl.cluster.parts import cluster_parts

    return await cluster_parts(config)
