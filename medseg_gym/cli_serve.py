"""`medseg-gym tools serve`: one tool for many envs and processes, over HTTP."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer

from medseg_gym.cli_terminal import clean_errors
from medseg_gym.errors import MedSegError


def serve(
    tool: Annotated[str, typer.Option("--tool", help="A tool id, or package.module:Class.")],
    host: Annotated[
        str, typer.Option("--host", help="Where to listen; beyond loopback a token is needed.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", help="0 takes a free one.")] = 8790,
    max_batch: Annotated[
        int, typer.Option("--max-batch", help="Most queries in a forward pass; 0: the tool's own.")
    ] = 0,
    wait_ms: Annotated[float, typer.Option("--wait-ms", help="How long a batch waits for more, at most.")] = 3.0,
    cache_gb: Annotated[float, typer.Option("--cache-gb", help="Memory for embeddings.")] = 2.0,
    option: Annotated[
        list[str] | None, typer.Option("--option", help="NAME=VALUE of the tool, such as device=cuda; several times.")
    ] = None,
    token_file: Annotated[
        Path | None, typer.Option("--token-file", help="A file with the token; otherwise $MEDSEG_GYM_TOKEN.")
    ] = None,
    certificate: Annotated[Path | None, typer.Option("--certificate", help="A PEM file, to speak https.")] = None,
    key: Annotated[Path | None, typer.Option("--key", help="The certificate's private key, a PEM file.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Do not log requests.")] = False,
) -> None:
    """Serve a tool to other processes; envs use it by tool="http://HOST:PORT"."""
    from medseg_gym import tools
    from medseg_gym.tools.serving.server import check_binding, read_token
    from medseg_gym.tools.serving.server import serve as run

    with clean_errors():
        token = read_token(token_file)
        check_binding(host, port, token)  # before a model is loaded
        options = tool_options(option or [])
        if max_batch:
            options["max_batch"] = max_batch
        loaded = tools.load(tool, cache_bytes=int(cache_gb * 1024**3), **options)
        with suppress(KeyboardInterrupt):  # the usual way to end it
            run(
                loaded,
                host=host,
                port=port,
                token=token,
                wait_ms=wait_ms,
                certificate=certificate,
                key=key,
                access_log=not quiet,
                ready=lambda url: print(f"serving {loaded.fingerprint} at {url}", flush=True),
            )


def tool_options(given: list[str]) -> dict[str, Any]:
    """The keywords in NAME=VALUE texts; a value that is JSON (true, 3, null) is read as such, another is a text."""
    import json

    options: dict[str, Any] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals or not name.isidentifier():
            raise MedSegError(f"--option {text!r}; wanted NAME=VALUE, such as device=cuda")
        try:
            options[name] = json.loads(value)
        except ValueError:
            options[name] = value
    return options
