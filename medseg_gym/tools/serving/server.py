"""Running a tool server: a ToolHost behind the routes of app.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from medseg_gym.errors import MedSegError
from medseg_gym.tools.base import SegmentationTool
from medseg_gym.tools.serving.host import ToolHost
from medseg_gym.tools.serving.limits import Limits
from medseg_gym.web.listen import DRAIN_S, PORT, RAY_PORT, check_binding, is_loopback, listen, listening, read_token

__all__ = ["PORT", "RAY_PORT", "check_binding", "is_loopback", "read_token", "running", "serve"]


def serve(
    tool: SegmentationTool,
    *,
    host: str = "127.0.0.1",
    port: int = PORT,
    token: str | None = None,
    limits: Limits | None = None,
    wait_ms: float = 3.0,
    certificate: Path | None = None,
    key: Path | None = None,
    access_log: bool = True,
    ready: Callable[[str], None] | None = None,
) -> None:
    """Serves a tool until SIGTERM or ^C, then answers what is under way and returns.

    Beyond loopback a token is needed (MedSegError otherwise). `ready` is called with the address once it listens;
    port 0 takes a free one. With `certificate` and `key` (PEM files) it speaks https.
    """
    check_binding(host, port, token)
    backend = ToolHost(tool, limits=limits, wait_ms=wait_ms)
    try:
        listen(
            _app(backend, token),
            backend.limits,
            host=host,
            port=port,
            certificate=certificate,
            key=key,
            access_log=access_log,
            ready=ready,
        )
    finally:
        backend.close(DRAIN_S)


@contextmanager
def running(
    tool: SegmentationTool,
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    token: str | None = None,
    limits: Limits | None = None,
    max_batch: int | None = None,
    wait_ms: float = 3.0,
) -> Iterator[tuple[str, ToolHost]]:
    """A tool server on a thread of this process, for tests and notebooks: its address and its host."""
    check_binding(host, port, token)
    backend = ToolHost(tool, limits=limits, max_batch=max_batch, wait_ms=wait_ms)
    try:
        with listening(_app(backend, token), backend.limits, host=host, port=port) as url:
            yield url, backend
    finally:
        backend.close(DRAIN_S)


def _app(backend: ToolHost, token: str | None) -> Any:
    try:
        import uvicorn  # noqa: F401

        from medseg_gym.tools.serving.app import make_app

        return make_app(backend, token, DRAIN_S)
    except ImportError as error:
        raise MedSegError(f"serving a tool needs {error.name}: pip install 'medseg-gym[serve]'") from None
