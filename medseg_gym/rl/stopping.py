"""Stopping a run from outside: ^C and SIGTERM leave what can be repeated and let what cannot come to its end."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

T = TypeVar("T")


class Interrupted(Exception):
    """The run was asked to stop; `signal` is the signal's number, 0 where it was none."""

    def __init__(self, number: int = 0) -> None:
        super().__init__(signal.Signals(number).name if number else "stop")
        self.signal = number


class Stopping:
    """Whether a stop was asked for, and how to wait for something unless it is."""

    def __init__(self) -> None:
        self._asked = asyncio.Event()
        self._signal = 0

    @property
    def asked(self) -> bool:
        return self._asked.is_set()

    def ask(self, number: int = 0) -> None:
        """Asks for a stop; from the loop's own thread."""
        self._signal = self._signal or number
        self._asked.set()

    def check(self) -> None:
        """Raises Interrupted if a stop was asked for."""
        if self._asked.is_set():
            raise Interrupted(self._signal)

    async def unless(self, work: Coroutine[Any, Any, T]) -> T:
        """What `work` gives; a stop cancels it, waits until it has ended and raises Interrupted."""
        task, asked = asyncio.ensure_future(work), asyncio.ensure_future(self._asked.wait())
        try:
            await asyncio.wait({task, asked}, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise Interrupted(self._signal)
            return task.result()
        finally:
            asked.cancel()
            task.cancel()
            await asyncio.gather(task, asked, return_exceptions=True)

    @contextmanager
    def on_signals(self) -> Iterator[None]:
        """Within it the first ^C or SIGTERM asks for a stop; the next one acts as it would have otherwise."""
        loop = asyncio.get_running_loop()
        numbers = (signal.SIGINT, signal.SIGTERM)

        def first(number: signal.Signals) -> None:
            self.ask(number)
            remove()

        def remove() -> None:
            for number in numbers:
                with suppress(ValueError, NotImplementedError, RuntimeError):
                    loop.remove_signal_handler(number)

        for number in numbers:
            with suppress(ValueError, NotImplementedError, RuntimeError):  # not the main thread, or Windows
                loop.add_signal_handler(number, first, number)
        try:
            yield
        finally:
            remove()
