"""`medseg-gym tools serve` as a process: it says where it is, serves, and ends in good order."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from test_serving import episode, random_image, same
from typer.testing import CliRunner

from medseg_gym import tools
from medseg_gym.cli_serve import tool_options
from medseg_gym.cli_tools import app
from medseg_gym.errors import MedSegError
from medseg_gym.tools.serving.client import RemoteTool
from medseg_gym.types import Click, Prediction, Query

TOKEN = "0123456789abcdef0123"
HERE = Path(__file__).parent


@contextmanager
def served(tool: str, *arguments: str, token: str = "") -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """A server process and its address."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])}
    env["MEDSEG_GYM_TOKEN"] = token
    command = [sys.executable, "-m", "medseg_gym", "tools", "serve", "--tool", tool, "--port", "0", *arguments]
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if found := re.search(r"^serving (\S+) at (http\S+)$", line):
                yield found[2], process
                break
        else:
            raise AssertionError("it did not start")
    finally:
        process.kill()
        process.wait(30)


@pytest.mark.slow
def test_a_process_serves_and_answers_what_is_under_way_before_it_ends() -> None:
    image = random_image(1)
    with served("test_serving_actor:SlowNoisy", token=TOKEN) as (url, process):
        remote = RemoteTool(url, token=TOKEN)
        (embedding,) = remote.encode([image])
        got: list[Prediction] = []
        asking = threading.Thread(target=lambda: got.extend(remote.predict([Query(embedding, (Click(1, 1),))])))
        asking.start()
        while remote.counters()["batcher"]["passes"] == 0:
            pass
        process.send_signal(signal.SIGTERM)
        asking.join(60)
        assert len(got) == 1
        assert process.stdout is not None
        log = process.stdout.read()
        assert process.wait(60) in (0, -signal.SIGTERM)
    assert "POST /v1/predict" in log and TOKEN not in log and "Traceback" not in log


@pytest.mark.slow
def test_options_reach_the_tool() -> None:
    with served("Stub", "--option", "memory=latest", "--max-batch", "3", "--quiet") as (url, _):
        remote = RemoteTool(url)
        assert (remote.memory, remote.max_batch) == ("latest", 3)
        local = tools.load("Stub", memory="latest", max_batch=3)
        assert remote.fingerprint == local.fingerprint
        assert same(episode(remote, random_image(1)), episode(local, random_image(1)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--host", "0.0.0.0"], "needs a token"),
        (["--port", "8265"], "Ray dashboard"),
        (["--tool", "Stubb"], "did you mean 'Stub'"),
        (["--option", "memory"], "wanted NAME=VALUE"),
        (["--option", "memori=latest"], "did you mean 'memory'"),
        (["--token-file", "nowhere"], "no token can be read from nowhere"),
    ],
)
def test_what_cannot_be_served_is_told(arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MEDSEG_GYM_TOKEN", raising=False)
    done = CliRunner().invoke(app, ["serve", "--tool", "Stub", "--port", "0", *arguments])
    assert done.exit_code == 1 and message in done.output.replace("\n", " ")


def test_values_of_options_are_json_where_they_can_be() -> None:
    given = ["multimask=false", "max_batch=4", "device=cuda:0", "weights=/a=b", "size=null"]
    wanted = {"multimask": False, "max_batch": 4, "device": "cuda:0", "weights": "/a=b", "size": None}
    assert tool_options(given) == wanted
    with pytest.raises(MedSegError, match="wanted NAME=VALUE"):
        tool_options(["=3"])
