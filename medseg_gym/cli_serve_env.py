"""`medseg-gym serve`: envs for clients over HTTP (`medseg-gym tools serve` serves a tool instead)."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from medseg_gym.cli_serve import tool_options
from medseg_gym.cli_terminal import clean_errors


def serve(
    env: Annotated[
        list[str],
        typer.Option("--env", help="An env id that clients may play; several times. No other can be asked for."),
    ],
    option: Annotated[
        list[str] | None,
        typer.Option("--option", help="NAME=VALUE, an env keyword fixed for all, such as split=test; several times."),
    ] = None,
    hide_metrics: Annotated[
        bool, typer.Option("--hide-metrics", help="Tell no IoU, Dice or reward: for held-out cases.")
    ] = False,
    record: Annotated[
        Path | None, typer.Option("--record", help="A file that gets every episode as a line, unfinished ones too.")
    ] = None,
    max_sessions: Annotated[int, typer.Option("--max-sessions", help="Envs open at once.")] = 64,
    session_ttl: Annotated[
        float, typer.Option("--session-ttl", help="Seconds without a request after which a session is forgotten.")
    ] = 600.0,
    host: Annotated[
        str, typer.Option("--host", help="Where to listen; beyond loopback a token is needed.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", help="0 takes a free one.")] = 8791,
    token_file: Annotated[
        Path | None, typer.Option("--token-file", help="A file with the token; otherwise $MEDSEG_GYM_TOKEN.")
    ] = None,
    certificate: Annotated[Path | None, typer.Option("--certificate", help="A PEM file, to speak https.")] = None,
    key: Annotated[Path | None, typer.Option("--key", help="The certificate's private key, a PEM file.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Do not log requests.")] = False,
) -> None:
    """Serve envs to other programs; they play them by medseg_gym.env_server.connect(URL, ENV) or in plain JSON.

    `medseg-gym tools serve` serves a segmentation tool to envs that are played elsewhere.
    """
    from medseg_gym.env_server.limits import EnvLimits
    from medseg_gym.env_server.server import PORT
    from medseg_gym.env_server.server import serve as run
    from medseg_gym.errors import MedSegError
    from medseg_gym.web.listen import check_binding, read_token

    with clean_errors():
        token = read_token(token_file)
        check_binding(host, port, token, PORT)  # before data and weights are loaded
        if max_sessions < 1 or not session_ttl > 0:
            raise MedSegError(f"--max-sessions {max_sessions} --session-ttl {session_ttl:g}; wanted more than 0")
        fixed = tool_options(option or [])
        with suppress(KeyboardInterrupt):  # the usual way to end it
            run(
                dict.fromkeys(env, fixed),
                host=host,
                port=port,
                token=token,
                limits=EnvLimits(sessions=max_sessions, session_ttl=session_ttl),
                hide_metrics=hide_metrics,
                record=record,
                certificate=certificate,
                key=key,
                access_log=not quiet,
                ready=lambda url: print(f"serving {', '.join(env)} at {url}", flush=True),
            )
