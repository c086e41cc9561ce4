"""Running an env server: which envs, where, with which token, and what of the truth is told."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from medseg_gym.env_server.limits import EnvLimits
from medseg_gym.env_server.session import Served
from medseg_gym.env_server.sessions import Sessions
from medseg_gym.errors import MedSegError
from medseg_gym.web.listen import check_binding, listen, listening

PORT = 8791
Envs = Sequence[str] | Mapping[str, Mapping[str, Any]]
"""Env ids, or ids with the env keywords that are fixed for each."""


def serve(
    envs: Envs,
    *,
    host: str = "127.0.0.1",
    port: int = PORT,
    token: str | None = None,
    limits: EnvLimits | None = None,
    hide_metrics: bool = False,
    record: Path | None = None,
    certificate: Path | None = None,
    key: Path | None = None,
    access_log: bool = True,
    ready: Callable[[str], None] | None = None,
) -> None:
    """Serves envs until SIGTERM or ^C. Beyond loopback a token is needed (MedSegError otherwise).

    `hide_metrics` keeps IoU, Dice, reward terms and the reward, which tells the IoU, to the server; `record` is a file
    that gets every episode as a line, also those left unfinished. `ready` is called with the address once it listens;
    port 0 takes a free one. With `certificate` and `key` it speaks https.
    """
    check_binding(host, port, token, PORT)
    sessions = _sessions(envs, limits, hide_metrics, record)
    how: dict[str, Any] = {"certificate": certificate, "key": key, "access_log": access_log, "ready": ready}
    listen(_app(sessions, token), sessions.limits, host=host, port=port, **how)


@contextmanager
def running(
    envs: Envs,
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    token: str | None = None,
    limits: EnvLimits | None = None,
    hide_metrics: bool = False,
    record: Path | None = None,
) -> Iterator[tuple[str, Sessions]]:
    """An env server on a thread of this process, for tests and notebooks: its address and its sessions."""
    check_binding(host, port, token, PORT)
    sessions = _sessions(envs, limits, hide_metrics, record)
    with listening(_app(sessions, token), sessions.limits, host=host, port=port) as url:
        yield url, sessions


def _sessions(envs: Envs, limits: EnvLimits | None, hide_metrics: bool, record: Path | None) -> Sessions:
    given = envs if isinstance(envs, Mapping) else {env: {} for env in ([envs] if isinstance(envs, str) else envs)}
    if not given:
        raise MedSegError("no env to serve; wanted env ids such as MedSeg-Phantom-Nano-v0")
    served = [Served.load(env, options) for env, options in given.items()]
    return Sessions(served, limits or EnvLimits(), hide_metrics=hide_metrics, record=record)


def _app(sessions: Sessions, token: str | None) -> Any:
    try:
        import uvicorn  # noqa: F401

        from medseg_gym.env_server.app import make_app

        return make_app(sessions, token)
    except ImportError as error:
        raise MedSegError(f"serving envs needs {error.name}: pip install 'medseg-gym[serve]'") from None
