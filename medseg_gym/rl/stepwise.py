"""Stepwise: a GRPO run one iteration a call, for schedulers and notebooks that await nothing."""

from __future__ import annotations

import asyncio
import shutil
import signal
import threading
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import aclosing, suppress
from pathlib import Path
from typing import Any, TypeVar

from medseg_gym.errors import MedSegError
from medseg_gym.rl import checkpoint
from medseg_gym.rl.config import GRPOConfig
from medseg_gym.rl.grpo import BEST, CHECKPOINTS, GRPO, make_parts
from medseg_gym.rl.grpo_check import check
from medseg_gym.rl.grpo_step import State
from medseg_gym.rl.runlog import METRICS
from medseg_gym.rl.stopping import Interrupted, Stopping

T = TypeVar("T")


class Stepwise:
    """`grpo.train`, cut into calls: what they train together equals what it trains, bit for bit.

    Engine, learner and env workers are made at once and live in a thread of their own until `close`. ^C within a call
    saves the last whole iteration, raises KeyboardInterrupt, and the next call goes on from there; so it does after any
    other error, from the newest checkpoint in the run's folder.
    """

    def __init__(self, config: GRPOConfig, say: Callable[[str], None] = lambda line: None) -> None:
        check(config)
        self.config, self.say, self.out = config, say, Path(config.out)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="medseg-gym-grpo", daemon=True)
        self._thread.start()
        self._grpo: GRPO | None = None
        self._iterations: AsyncGenerator[dict[str, float], None] | None = None
        self._stopping = Stopping()
        self._begun = False  # parts that have done nothing yet serve any checkpoint
        try:
            self._wait(self._make())
        except BaseException:
            self.close()
            raise

    @property
    def state(self) -> State:
        return self._grpo.state if self._grpo is not None else State()

    @property
    def done(self) -> bool:
        return self._grpo is not None and self._grpo.done

    def step(self) -> dict[str, float]:
        """The next iteration's numbers; MedSegError where the run is done. The last one writes out/final."""
        numbers = self._wait(self._next())
        if numbers is None:
            raise MedSegError(
                f"the run in {self.out} is done: {self.state.stopped or f'iterations={self.config.iterations}'}; give "
                "more iterations, or begin another in a folder of its own"
            )
        return numbers

    def save(self, folder: Path) -> int:
        """Writes the run's last whole iteration into a folder that `load` goes on from anywhere; its number, 0 if none.

        Beside the run's own checkpoint: the numbers so far, and the best model, where there is one.
        """
        if self._grpo is not None:
            self._wait(self._grpo.save())
        found = checkpoint.latest(self.out / CHECKPOINTS)
        if found is None:
            return 0
        place, record = found
        step = int(record["step"])
        _copy(place, folder / CHECKPOINTS / place.name)
        shutil.copyfile(self.out / METRICS, folder / METRICS)
        if (self.out / BEST).is_dir():
            _copy(self.out / BEST, folder / BEST)
        return step

    def load(self, folder: Path, step: int) -> None:
        """Takes the run to where `save` left it; later iterations of this run's folder are forgotten."""
        found = checkpoint.latest(folder / CHECKPOINTS)
        if step and (found is None or found[1]["step"] != step):
            raise MedSegError(f"{folder} holds no whole checkpoint of iteration {step}; take an older one")
        if self._begun:
            self._wait(self._leave())
        shutil.rmtree(self.out / CHECKPOINTS, ignore_errors=True)
        (self.out / METRICS).unlink(missing_ok=True)
        shutil.rmtree(self.out / BEST, ignore_errors=True)
        if found is not None and step:
            self.out.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / METRICS, self.out / METRICS)
            if (folder / BEST).is_dir():
                checkpoint.replace_folder(self.out / BEST, lambda part: _copy(folder / BEST, part))
            place = found[0]
            checkpoint.replace_folder(self.out / CHECKPOINTS, lambda part: _copy(place, part / place.name))
        if self._grpo is None:
            self._wait(self._make())

    def close(self) -> None:
        """Ends all parts; whatever was not saved is gone. A closed run may be closed again."""
        if not self._thread.is_alive():
            return
        try:
            self._wait(self._leave())
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    # in the thread

    async def _make(self) -> None:
        self._stopping, self._begun = Stopping(), False
        self._grpo = GRPO(self.config, await make_parts(self.config), say=self.say, stopping=self._stopping)
        self._iterations = self._grpo.iterations()

    async def _leave(self) -> None:
        grpo, iterations = self._grpo, self._iterations
        self._grpo = self._iterations = None
        if iterations is not None:
            async with aclosing(iterations):
                pass
        if grpo is not None:
            await grpo.parts.close()

    async def _next(self) -> dict[str, float] | None:
        if self._iterations is None:
            await self._make()
        assert self._iterations is not None
        self._begun = True
        try:
            return await anext(self._iterations, None)
        except BaseException:
            await self._leave()
            raise

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        """What `work` gives; ^C meanwhile asks the run to stop, and is raised when it has."""
        if not self._thread.is_alive():
            work.close()
            raise MedSegError(f"the run in {self.out} was closed; make another to go on with it")
        waiting = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return waiting.result()
        except KeyboardInterrupt:
            self._loop.call_soon_threadsafe(self._stopping.ask, signal.SIGINT)
            with suppress(Interrupted):
                waiting.result()
            raise


def _copy(source: Path, place: Path) -> None:
    shutil.copytree(source, place, dirs_exist_ok=True)
