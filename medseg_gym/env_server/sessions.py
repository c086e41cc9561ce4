"""The sessions of an env server: opened, used one thing at a time, recorded, forgotten when nobody asks any more."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from medseg_gym.env_server.limits import EnvLimits
from medseg_gym.env_server.session import Served, Session
from medseg_gym.env_server.wire import PROTOCOL, shown
from medseg_gym.episodes import to_json
from medseg_gym.errors import BadDataError, MedSegError, unknown

T = TypeVar("T")


class FullError(Exception):
    """There are as many sessions as may be."""


class LostError(Exception):
    """No such session, or none any more."""


class OrderError(Exception):
    """A numbered call that is neither the next one nor the last one again."""


class Sessions:
    """All sessions. Lives on an event loop; one thread beside it plays all envs, one after the other.

    `record` is a file to which every episode is added, one JSON object a line as episodes.jsonl has them, those that a
    client left unfinished too: nobody may drop what went badly.
    """

    def __init__(
        self,
        served: Sequence[Served],
        limits: EnvLimits,
        *,
        hide_metrics: bool = False,
        record: Path | None = None,
    ) -> None:
        self.served = {one.env: one for one in served}
        self.limits, self.hide, self._record = limits, hide_metrics, record
        if record is not None:
            self._note("")  # a file that cannot be written is told of at once
        self._sessions: dict[str, Session] = {}
        self._thread = ThreadPoolExecutor(1, "medseg-envs")

    def __len__(self) -> int:
        return len(self._sessions)

    def told(self) -> dict[str, Any]:
        envs = [one.told() for one in self.served.values()]
        return {"protocol": PROTOCOL, "envs": envs, "metrics": not self.hide, "limits": self.limits.told()}

    def find_env(self, env: object) -> Served:
        if not isinstance(env, str) or env not in self.served:
            raise unknown("env here", env if isinstance(env, str) else shown(env), self.served)
        return self.served[env]

    async def open(self, name: str, env: object, options: Mapping[str, Any]) -> dict[str, Any]:
        """A new session under the client's own name for it; opened twice with one name, it is the one."""
        self.sweep()
        if name in self._sessions:
            session = self._sessions[name]
            if session.served.env != env:
                raise BadDataError(f"session {name} is one of {session.served.env} already")
            return session.told()
        served = self.find_env(env)
        for bound in ("size", "horizon"):
            value = options.get(bound)
            if isinstance(value, int) and value > getattr(self.limits, bound):
                raise BadDataError(f"option {bound}={value}; the limit here is {getattr(self.limits, bound)}")
        if len(self._sessions) >= self.limits.sessions:
            raise FullError(
                f"{len(self._sessions)} sessions are open, as many as may be; close one, or come back later"
            )
        played = await self.work(lambda: served.make(options))
        session = Session(name, played, served, time.monotonic(), recorded=self._record is not None)
        if len(self._sessions) >= self.limits.sessions:  # others came meanwhile
            raise FullError(
                f"{len(self._sessions)} sessions are open, as many as may be; close one, or come back later"
            )
        return self._sessions.setdefault(name, session).told()

    async def move(self, name: str, work: Callable[[Session], object], call: Any, mark: bytes) -> tuple[Any, Any]:
        """Does what moves a session, and gives what it is then. `call` may number it, `mark` stands for what was asked:
        the last one sent again moves nothing, another under its number is refused. LostError, OrderError."""
        return await self.use(name, lambda session: self._moved(session, work, call, mark))

    async def use(self, name: str, work: Callable[[Session], T]) -> T:
        """Does something with a session, one thing at a time. LostError."""
        self.sweep()
        session = self._sessions.get(name)
        if session is None:
            raise LostError(
                f"no session {name}: it was closed, forgotten after {self.limits.session_ttl:g} s without a request, "
                "or of a server before this one; connect again"
            )
        session.busy += 1
        try:
            return await self.work(lambda: work(session))
        finally:
            session.busy -= 1
            session.used = time.monotonic()

    def close_session(self, name: str) -> None:
        """Forgets a session; one that is not there is forgotten already."""
        session = self._sessions.pop(name, None)
        if session is not None:
            self._thread.submit(self._closed, session)

    def sweep(self) -> None:
        """Forgets the sessions that nobody has used for long."""
        late = time.monotonic() - self.limits.session_ttl
        for name in [n for n, s in self._sessions.items() if s.used < late and not s.busy]:
            self.close_session(name)

    async def work(self, work: Callable[[], T]) -> T:
        """Runs on the envs' thread; a client that leaves meanwhile changes nothing of it."""
        return await asyncio.shield(asyncio.get_running_loop().run_in_executor(self._thread, work))

    def shutdown(self) -> None:
        """Ends all sessions; waits for the step under way."""
        for name in list(self._sessions):
            self.close_session(name)
        self._thread.shutdown(wait=True)

    def _closed(self, session: Session) -> None:
        session.finish()
        self._keep(session)

    def _keep(self, session: Session) -> None:
        """Writes down what is over, on the envs' thread."""
        if session.over:
            self._note("".join(to_json(episode) + "\n" for episode in session.over))
            session.over.clear()

    def _note(self, line: str) -> None:
        assert self._record is not None, "there is a file"
        try:
            with self._record.open("a", encoding="utf-8") as file:
                file.write(line)
        except OSError as error:
            raise MedSegError(f"{self._record} cannot be written: {error.strerror}; choose another file") from None

    def _moved(self, session: Session, work: Callable[[Session], object], call: Any, mark: bytes) -> tuple[Any, Any]:
        if call is not None and (type(call) is not int or call not in (session.calls, session.calls + 1)):
            raise OrderError(f"call {shown(call)}; the next one is {session.calls + 1}, or none to go unnumbered")
        if call is None or call > session.calls:
            work(session)
            session.calls, session.mark = session.calls + 1, mark
            self._keep(session)
        elif mark != session.mark:
            raise OrderError(f"call {call} was another request, and is done; the next one is {session.calls + 1}")
        return session.now(self.hide)
