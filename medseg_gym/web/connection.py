"""Asking a server of ours: one connection pool a process, lost connections and busy servers asked again."""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from medseg_gym.errors import MedSegError

BYTES = "application/octet-stream"
TOKEN_VARIABLE = "MEDSEG_GYM_TOKEN"
POOL = 32  # connections kept open
LONGEST_WAIT = 10.0  # seconds between two tries
FIRST_RETRIES = 3  # a wrong address should not take half a minute to say so


class Connection:
    """A way to one server. Asked twice is safe: every request of ours is pure, or numbered so that it counts once.

    token: by default $MEDSEG_GYM_TOKEN; what names the server in errors ("tool server"), start how one is started;
    unreachable is raised when nobody answers, and refused makes the error of (url, status, body).
    """

    def __init__(
        self,
        url: str,
        *,
        token: str | None,
        timeout: float,
        retries: int,
        what: str,
        start: str,
        unreachable: type[Exception],
        refused: Callable[[str, int, bytes], Exception],
    ) -> None:
        self.url = checked_url(url, what)
        self._timeout, self._retries = timeout, retries
        self._what, self._start, self._unreachable, self._refused = what, start, unreachable, refused
        secret = os.environ.get(TOKEN_VARIABLE) if token is None else token
        self._headers = {"Authorization": f"Bearer {secret}"} if secret else {}
        self._pools = _Pools(self.url, timeout, what)

    def ask(
        self,
        method: str,
        target: str,
        body: Any = None,
        kind: str = BYTES,
        *,
        headers: Mapping[str, str] | None = None,
        retries: int | None = None,
    ) -> bytes:
        """The body of a successful answer. Lost connections and busy servers are tried again; the rest raises."""
        import urllib3.exceptions as broken

        retries = self._retries if retries is None else min(self._retries, retries)
        for attempt in range(retries + 1):
            last = attempt == retries
            try:
                answer = self._pools.mine().urlopen(
                    method,
                    self._pools.path + target,
                    body=body,
                    headers={**self._headers, "Content-Type": kind, **(headers or {})},
                    retries=False,
                    redirect=False,
                )
            except broken.ReadTimeoutError:
                raise self._unreachable(
                    f"{self.url} gave no answer within {self._timeout:g} s; is it overloaded? A larger timeout= waits "
                    "longer"
                ) from None
            except (broken.HTTPError, OSError) as error:
                if last:
                    raise self._unreachable(
                        f"no {self._what} answers at {self.url} ({_short(error)}); start one with "
                        f"`{self._start}`, or mend the address"
                    ) from None
                _wait(attempt)
                continue
            if answer.status in (429, 503) and not last:
                _wait(attempt, answer.headers.get("Retry-After"))
                continue
            if answer.status == 200:
                return bytes(answer.data)
            raise self._refused(self.url, answer.status, bytes(answer.data))
        raise AssertionError("unreachable")


class _Pools:
    """The connections of this process; a forked child gets its own."""

    def __init__(self, url: str, timeout: float, what: str) -> None:
        from urllib.parse import urlsplit

        self._url, self._timeout, self._what = url, timeout, what
        self.path = urlsplit(url).path.rstrip("/")
        self._pool: Any = None
        self._process = -1
        self._lock = threading.Lock()

    def mine(self) -> Any:
        if self._process != os.getpid():
            try:
                import urllib3
            except ImportError:
                raise MedSegError(f"{self._what}s are asked through urllib3: pip install 'medseg-gym[serve]'") from None
            with self._lock:
                wait = urllib3.Timeout(connect=min(10.0, self._timeout), read=self._timeout)
                self._pool = urllib3.connection_from_url(self._url, maxsize=POOL, timeout=wait)
                self._process = os.getpid()
        return self._pool


def checked_url(url: str, what: str) -> str:
    """The address without a slash at its end; MedSegError where it is none, or holds a secret."""
    from urllib.parse import urlsplit

    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and parts.hostname and (parts.port is None or parts.port > 0)
    except ValueError:
        good = False
    if not good or parts.username is not None or parts.password is not None or parts.query or parts.fragment:
        article = "an" if what[0] in "aeiou" else "a"
        raise MedSegError(
            f"not {article} {what}'s address: {_without_secrets(url)!r}; wanted http://HOST:PORT, and a token by "
            f"token= or ${TOKEN_VARIABLE}"
        )
    return url.rstrip("/")


def _without_secrets(url: str) -> str:
    scheme, _, rest = url.partition("://")
    return f"{scheme}://{rest.rpartition('@')[2].partition('?')[0]}"


def _wait(attempt: int, told: str | None = None) -> None:
    """Sleeps longer from try to try, with some chance in it so that clients do not come back all at once."""
    longest = min(LONGEST_WAIT, 0.1 * 2**attempt)
    if told is not None and told.isdigit():
        longest = min(LONGEST_WAIT, max(longest, float(told)))
    time.sleep(longest * random.uniform(0.5, 1.0))


def _short(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".split("(_ssl")[0][:200]
