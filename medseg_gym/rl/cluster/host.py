"""Host and Remote: a part of training in a Ray actor, and its handle, which puts a new actor in a dead one's place."""

from __future__ import annotations

import asyncio
import importlib
import inspect
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from medseg_gym.errors import MedSegError
from medseg_gym.rl.worker import LostError, UnplacedError

CALLS = 1000  # that an actor holds at once; parts queue what they cannot do yet
LONGEST_WAIT = 5.0  # seconds between two tries to place an actor
TRIES = 5  # of a call whose actors die over it, where it may be given to another


class Host:
    """A Ray actor around a part. Its arguments are names and settings, so that another can be made of them anywhere.

    `build` is "package.module:callable". Exceptions come back as values: through Ray they would come wrapped in a
    traceback's text.
    """

    def __init__(self, build: str, arguments: Mapping[str, Any]) -> None:
        self._build, self._arguments = build, dict(arguments)
        self._part: Any = None

    async def begin(self, names: list[str]) -> tuple[bool, Any]:
        """Makes the part, and tells its plain attributes of these names."""
        try:
            module, _, attribute = self._build.partition(":")
            build = getattr(importlib.import_module(module), attribute)
            self._part = await asyncio.to_thread(build, **self._arguments)
            return True, {name: getattr(self._part, name) for name in names}
        except Exception as error:
            return False, _told(error)

    async def call(self, method: str, *arguments: Any, **keywords: Any) -> tuple[bool, Any]:
        try:
            result = getattr(self._part, method)(*arguments, **keywords)
            return True, (await result if inspect.isawaitable(result) else result)
        except Exception as error:
            return False, _told(error)


class Remote:
    """A part somewhere in the cluster.

    The actor of a dead one's successor is made of the same arguments, as soon as somebody asks; `life` counts them, and
    `_revive` gives a new one what the old one had been told. timeout: seconds a call may take, longer is taken for
    dead. patience: seconds an actor may take to find a place and to begin.
    """

    def __init__(
        self,
        name: str,
        build: str,
        arguments: Mapping[str, Any],
        *,
        options: Mapping[str, Any],
        attributes: tuple[str, ...] = (),
        timeout: float = 600.0,
        patience: float = 600.0,
    ) -> None:
        self.name, self.build, self.arguments, self.options = name, build, dict(arguments), dict(options)
        self.attributes, self.timeout, self.patience = attributes, timeout, patience
        self.life = 0  # how many actors there were
        self.actor: Any = None
        self.known: dict[str, Any] = {}  # the attributes, once begun
        self._begun: asyncio.Task[None] | None = None
        self._closed = False

    async def alive(self) -> int:
        """Waits until an actor has begun, and gives its life. MedSegError where its part cannot be made, UnplacedError
        where no actor had begun within the patience."""
        while True:
            task = self.begin()
            try:
                await asyncio.shield(task)
            except BaseException:
                if self.failure is not None and self._begun is task:  # not where only the waiting was cancelled
                    self._begun = None
                raise
            if self._begun is task:  # or it is gone again, and its successor may not have begun
                return self.life

    def begin(self) -> asyncio.Task[None]:
        """Has an actor made where there is none, without waiting for it."""
        if self._closed:
            raise MedSegError(f"{self.name} was closed")
        if self._begun is None or self.failure is not None:
            self._begun = asyncio.get_running_loop().create_task(self._begin())
        return self._begun

    async def ask(self, method: str, *arguments: Any, life: int | None = None, **keywords: Any) -> Any:
        """The result of a method of the part. LostError where the actor dies over it.

        Where a `life` is meant whose actor is gone, LostError at once: a successor could not answer, and may take long
        to find its place, or never find one.
        """
        if life is None:
            await self.alive()
        elif life != self.life or not self.there:
            raise LostError(f"{self.name} is gone or was replaced")
        return await self._ask(self.actor, "call", method, *arguments, **keywords)

    async def ask_again(self, method: str, *arguments: Any, **keywords: Any) -> Any:
        """`ask`, of a successor where an actor dies over it. MedSegError where that goes on."""
        for attempt in range(TRIES):
            try:
                return await self.ask(method, *arguments, **keywords)
            except LostError as error:
                if attempt == TRIES - 1:
                    raise MedSegError(f"{method}: {TRIES} actors in a row were lost over it; {error}") from None
        raise AssertionError("the last try raises")

    @property
    def there(self) -> bool:
        """Whether an actor has begun and is not known to be gone."""
        task = self._begun
        return task is not None and task.done() and not task.cancelled() and task.exception() is None

    @property
    def failure(self) -> BaseException | None:
        """Why no actor could begin when it was last tried; None where one is there, or may yet come."""
        task = self._begun
        return None if task is None or not task.done() or task.cancelled() else task.exception()

    def kill(self) -> None:
        """Ends the actor; the next who asks gets a new one."""
        if self.actor is not None:
            self._end(self.actor)

    async def close(self) -> None:
        """Ends the part and its actor for good."""
        self._closed = True
        if self._begun is not None and not self._begun.done():
            self._begun.cancel()
        elif self.actor is not None and self._begun is not None:
            with suppress(MedSegError, TimeoutError):  # it is ended anyhow
                await asyncio.wait_for(self._ask(self.actor, "call", "close"), 30)
        self.kill()

    async def _revive(self) -> None:
        """What a new actor is told before anybody else asks it."""

    async def _begin(self) -> None:
        """Makes actors until one has begun."""
        import ray

        until, wait = time.monotonic() + self.patience, 0.1
        while True:
            self.life += 1
            self.actor = ray.remote(Host).options(**self._placed()).remote(self.build, self.arguments)
            try:
                left = max(1.0, until - time.monotonic())
                self.known = await self._ask(self.actor, "begin", list(self.attributes), timeout=left)
                await self._revive()
                return
            except LostError as error:
                if time.monotonic() + wait > until:
                    raise UnplacedError(f"{self.name} could not be brought back: {error}") from None
            except BaseException:
                self._end(self.actor)
                raise
            await asyncio.sleep(wait)
            wait = min(2 * wait, LONGEST_WAIT)

    def _placed(self) -> dict[str, Any]:
        return {"max_restarts": 0, "max_task_retries": 0, "max_concurrency": CALLS, **self.options}

    async def _ask(
        self, actor: Any, method: str, *arguments: Any, timeout: float | None = None, **keywords: Any
    ) -> Any:
        from ray import exceptions as broken

        timeout = self.timeout if timeout is None else timeout
        try:
            reference = getattr(actor, method).remote(*arguments, **keywords)
            well, value = await asyncio.wait_for(asyncio.wrap_future(reference.future()), timeout)
        except TimeoutError:
            self._end(actor)
            raise LostError(f"{self.name} gave no answer within {timeout:g} s and was ended") from None
        except (broken.RayTaskError, broken.RuntimeEnvSetupError, broken.ObjectStoreFullError) as error:
            # what another actor would say too: an answer that cannot travel, a store without room
            raise MedSegError(f"{self.name}, {method}: {_reason(getattr(error, 'cause', None) or error)}") from None
        except broken.RayError as error:  # the actor, its node or its place is gone, or what it had sent
            self._end(actor)
            raise LostError(f"{self.name} is gone: {_reason(error)}") from None
        if not well:
            raise value
        return value

    def _end(self, actor: Any) -> None:
        import ray

        with suppress(Exception):  # it is gone, or the cluster is
            ray.kill(actor, no_restart=True)
        self._gone(actor)

    def _gone(self, actor: Any) -> None:
        """Forgets the actor, unless there is another already."""
        if actor is self.actor and self._begun is not None and self._begun.done():
            self._begun = None


def _told(error: Exception) -> Exception:
    """The exception as it can travel: itself where it is ours, else its words."""
    return error if isinstance(error, MedSegError) else MedSegError(f"{type(error).__name__}: {error}")


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
