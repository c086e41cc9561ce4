"""What the env server refuses, whom it does not serve, and its command line."""

from __future__ import annotations

import http.client
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
from conftest import Blobs
from test_serving_refusals import address, ask

from medseg_gym.env_server import connect
from medseg_gym.env_server.client import EnvServerError
from medseg_gym.env_server.limits import EnvLimits
from medseg_gym.env_server.server import running
from medseg_gym.errors import MedSegError
from medseg_gym.policies.protocols.base import MAX_TEXT
from medseg_gym.tools.stub import Stub
from medseg_gym.types import Unreadable

ENV = "MedSeg-v0"
NAME = "f" * 32
TOKEN = "correct horse battery staple"
JSON = {"Content-Type": "application/json"}
LIKELY = np.frombuffer(b'0123456789{}[],:"-.etn', np.uint8)


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    limits = EnvLimits(body_bytes=20_000, size=64, horizon=10, sessions=4)
    with running({ENV: {"dataset": Blobs(), "tool": Stub()}}, limits=limits) as (url, _):
        send(url, "PUT", "", {"env": ENV, "options": {"size": 16}})
        yield url


def send(url: str, method: str, target: str, body: Any, name: str = NAME, **headers: str) -> tuple[int, dict[str, Any]]:
    packed = body if isinstance(body, bytes) else json.dumps(body).encode()
    return ask(url, method, f"/v1/sessions/{name}{target}", packed, {**JSON, **headers})


@pytest.mark.parametrize(
    ("action", "wanted"),
    [
        (None, "action null; wanted [verb, x1, y1, x2, y2], or one of"),
        ("stop", 'action "stop"; wanted'),
        (7, "action 7; wanted"),
        ([], "wanted 5 integers: verb 0-4 (positive, negative, box, stop, undo)"),
        ([0, 1, 2, 3], "action of shape (4,)"),
        ([0, 1, 2, 3, 1000], "in 0-999"),
        ([0, 1, 2, 3, 10**30], "wanted [verb"),
        ([0, 1, 2, 3, True], "wanted [verb"),
        ([0, 1, 2, 3, 0.5], "wanted [verb"),
        ([[0, 1, 2, 3, 4]], "wanted [verb"),
        ({}, "action {}; wanted"),
        ({"box": [1, 2, 3]}, "wanted 4 whole numbers from 0 to 999"),
        ({"box": [1, 2, 3, 1000]}, "wanted 4 whole numbers from 0 to 999"),
        ({"box": "here"}, "wanted 4 whole numbers"),
        ({"click": [1, 2], "positive": "yes"}, "wanted"),
        ({"click": [1, -1]}, "wanted 2 whole numbers from 0 to 999"),
        ({"stop": False}, 'action {"stop": false}; wanted'),
        ({"stop": True, "undo": True}, "wanted"),
        ({"do": "fly"}, "not an action"),
        ({"do": "click", "x": 1.5, "y": 2}, "x is 1.5; wanted int"),
        ({"do": "click", "x": 10**9, "y": 2}, "more than a million pixels away"),
        ({"text": 3}, "wanted text and protocol to be texts"),
        ({"text": "x", "protocol": "none"}, "unknown protocol 'none'"),
        ({"text": "x", "loud": 1}, "unknown action keyword 'loud'"),
    ],
)
def test_an_unreadable_action_is_told_what_was_wanted(url: str, action: Any, wanted: str) -> None:
    assert send(url, "POST", "/reset", {"seed": 0})[0] == 200
    status, told = send(url, "POST", "/step", {"action": action})
    assert status == 400
    assert wanted in told["error"]
    assert send(url, "POST", "/step", {"action": {"undo": True}})[1]["info"]["turn"] == 1


def test_what_a_chat_may_hold_is_bounded() -> None:
    """A long text is an unreadable turn of which the beginning is kept; pictures are counted before they are drawn."""
    limits = EnvLimits(chat_pixels=3 * 64 * 64)
    with running({ENV: {"dataset": Blobs(), "tool": Stub()}}, limits=limits) as (url, _):
        env = connect(url, ENV, size=16, horizon=9)
        env.reset(seed=0)
        env.say("x" * 3_000_000)
        chat = env.chat(size=64)
        assert [len(m["content"]) for m in chat if m["role"] == "assistant"] == [MAX_TEXT]
        assert "has 3000000 characters" in chat[-1]["content"][1]["text"]
        with pytest.raises(MedSegError, match=f"wanted texts of {MAX_TEXT} characters at most"):
            env.step(Unreadable("x" * (MAX_TEXT + 1)))
        env.step(Unreadable("?"))
        assert len(env.chat(size=64)) == 6
        env.step(Unreadable("?"))
        with pytest.raises(MedSegError, match="4 pictures with size=64; a chat has 12288 pixels at most"):
            env.chat(size=64)
        assert len(env.chat(size=32)) == 8
        assert len(env.chat("ibis", size=64)) == 2
        env.close()


@pytest.mark.parametrize(
    ("target", "body", "wanted"),
    [
        ("/reset", {"seed": -1}, "wanted a whole number from 0"),
        ("/reset", {"seed": "one"}, 'seed "one"'),
        ("/reset", {"options": []}, 'wanted {"sample": key'),
        ("/reset", {"options": {"sample": 3}}, "option sample=3; wanted a key such as"),
        ("/reset", {"options": {"sample": "../x"}}, "has no case"),
        ("/reset", {"options": {"start_mask": [1]}}, "start_mask is no run lengths"),
        ("/reset", {"options": {"start_mask": {"size": [9, 9], "counts": "zz"}}}, "run lengths"),
        ("/reset", {"options": {"start_mask": {"size": [10**9, 10**9], "counts": "0"}}}, "run lengths"),
        ("/reset", {"sed": 1}, "unknown reset keyword 'sed'; did you mean 'seed'"),
        ("/step", {}, "has no action"),
        ("/step", {"actions": 1}, "did you mean 'action'"),
        ("", {"env": ENV, "options": {"size": 65}}, "the limit here is 64"),
        ("", {"env": ENV, "options": {"horizon": 11}}, "the limit here is 10"),
        ("", {"env": ENV, "options": {"size": "big"}}, "wanted a whole number from 8"),
        ("", {"env": ENV, "options": {"reward": {"quality": 1}}}, "wanted a text, a whole number or a list of texts"),
        ("", {"env": ENV, "options": {"dataset_options": {"path": "/etc"}}}, "unknown env option keyword"),
        ("", {"env": ENV, "options": {"tool": "GrabCut"}}, "unknown env option keyword 'tool'"),
        ("", {"env": ENV, "options": 3}, "options 3; wanted an object"),
        ("", {"env": "MedSeg-Phantom-Nano-v0"}, "unknown env here"),
        ("", {"env": None}, "unknown env here 'null'"),
        ("", {"env": ENV, "options": {"split": "secret"}}, "split"),
        ("", {"env": ENV, "options": {"structures": ["heart"]}}, "heart"),
        ("", {"env": ENV, "options": {"timing": "now"}}, "timing"),
        ("", {"env": ENV, "options": {"verbs": ["jump"]}}, "jump"),
    ],
)
def test_a_bad_request_is_told_what_came_and_what_was_wanted(url: str, target: str, body: Any, wanted: str) -> None:
    status, told = send(url, "PUT" if not target else "POST", target, body, NAME if target else "e" * 32)
    assert status == 400
    assert wanted in told["error"]


def test_a_session_is_named_by_the_client_and_opened_once(url: str) -> None:
    for name in ("x", "F" * 32, "f" * 33, "..%2F" * 8):
        status, told = send(url, "PUT", "", {"env": ENV}, name)
        assert status in (400, 404)
        assert status == 404 or "wanted 32 hex digits of your own" in told["error"]
    for target in ("/reset", "/step"):
        assert send(url, "POST", target, {"action": [0] * 5} if target == "/step" else {}, "0" * 32)[0] == 404
    for target in ("/view", "/picture", "/chat?size=64"):
        assert ask(url, "GET", f"/v1/sessions/{'0' * 32}{target}")[0] == 404
    assert ask(url, "GET", f"/v1/sessions/{NAME}/picture?of=target")[0] == 400
    assert ask(url, "GET", f"/v1/sessions/{NAME}/chat?size=9999999")[0] == 400
    assert ask(url, "GET", f"/v1/sessions/{NAME}/chat?protocol=none")[0] == 400
    assert ask(url, "GET", "/v1/keys?env=MedSeg-v0&start=-1")[0] == 400
    assert ask(url, "GET", "/v1/keys?env=other")[0] == 400


def test_malformed_and_too_large_bodies_are_refused(url: str) -> None:
    deep = b"[" * 9_000 + b"]" * 9_000
    for body in (
        b"",
        b"\0",
        b"{",
        b"[]",
        b'"x"',
        b'{"seed": NaN}',
        b'{"seed": 1e999}',
        b'{"a":' + deep + b"}",
        b"\xff" * 9,
    ):
        assert send(url, "POST", "/reset", body)[0] == 400, body[:20]
    assert send(url, "POST", "/reset", b" " * 20_001)[0] == 413
    assert send(url, "POST", "/reset", {"seed": 0}, **{"Content-Type": "text/plain"})[0] == 415
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=30)
    connection.putrequest("POST", f"/v1/sessions/{NAME}/reset")
    connection.putheader("Content-Type", "application/json")
    connection.putheader("Content-Length", "99999999")  # said, and never sent
    connection.endheaders()
    assert connection.getresponse().status == 413
    connection.close()
    assert ask(url, "GET", "/v2/envs")[0] == 404
    assert ask(url, "POST", "/v1/envs", b"")[0] == 405


def test_no_bytes_whatever_break_the_server(url: str) -> None:
    rng = np.random.default_rng(0)
    reset = json.dumps({"seed": 1, "options": {"sample": "Blobs/train-0/bar"}}).encode()
    good = {
        "/reset": reset,
        "/step": json.dumps({"action": {"do": "box", "x1": 1, "y1": 2, "x2": 30, "y2": 40}}).encode(),
        "": json.dumps({"env": ENV, "options": {"size": 16, "verbs": ["box", "stop"], "reward": "shaped"}}).encode(),
    }
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=30)
    seen = set()
    for i in range(450):
        target = ("/reset", "/step", "")[i % 3]
        body = bytearray(good[target])
        for _ in range(int(rng.integers(0, 4))):
            place = int(rng.integers(len(body)))
            body[place] = int(rng.integers(256)) if rng.random() < 0.5 else int(rng.choice(LIKELY))
        name = NAME if target else "d" * 32
        connection.request("POST" if target else "PUT", f"/v1/sessions/{name}{target}", bytes(body), JSON)
        answer = connection.getresponse()
        data = answer.read()
        assert b"Traceback" not in data
        seen.add(answer.status)
    connection.close()
    assert seen == {200, 400}
    assert send(url, "POST", "/reset", reset)[0] == 200


def test_only_programs_of_this_machine_are_answered_without_a_token(url: str) -> None:
    port = address(url)[1]
    for headers in (
        {"Host": "evil.example"},
        {"Host": f"evil.example:{port}"},
        {"Origin": "http://127.0.0.1"},
        {"Origin": "https://evil.example", "Host": f"127.0.0.1:{port}"},
    ):
        assert ask(url, "GET", "/v1/envs", headers=headers)[0] == 403
        assert send(url, "POST", "/reset", {"seed": 0}, **headers)[0] == 403
    assert ask(url, "GET", "/v1/envs")[0] == 200


def test_with_a_token_nothing_but_health_is_told_without_it() -> None:
    with running({ENV: {"dataset": Blobs(), "tool": Stub()}}, token=TOKEN) as (url, sessions):
        for header in ({}, {"Authorization": f"Bearer {TOKEN}x"}, {"Authorization": TOKEN}):
            assert ask(url, "GET", "/v1/envs", headers=header)[0] == 401
            assert send(url, "PUT", "", {"env": ENV}, **header)[0] == 401
        assert ask(url, "GET", "/health")[0] == 200
        with pytest.raises(EnvServerError, match="wants a token: give token=, or set .MEDSEG_GYM_TOKEN"):
            connect(url, ENV, token="wrong")
        assert len(sessions) == 0
        env = connect(url, ENV, token=TOKEN, size=16)
        assert env.reset(seed=0)[0].shape == (16, 16, 3)
        assert TOKEN not in repr(env)


def test_what_cannot_be_served_is_told() -> None:
    for envs, message in (
        ([], "no env to serve"),
        (["MedSeg-Phantm-Stub-v0"], "unknown env id .*did you mean"),
        (["CartPole-v1"], "unknown env id"),
        ({ENV: {"sizes": 3, "tool": "Stub"}}, "did you mean 'size'"),
        ({ENV: {"split": "secret", "tool": "Stub"}}, "split"),
    ):
        with pytest.raises(MedSegError, match=message), running(envs):
            pass
    with pytest.raises(MedSegError, match="needs a token"), running([ENV], host="0.0.0.0"):
        pass


def test_the_command_serves_until_it_is_told_to_end(tmp_path: Path) -> None:
    words = "--env MedSeg-Phantom-Stub-v0 --option split=test --option horizon=2 --port 0 --quiet --max-sessions 1"
    process = subprocess.Popen(
        [sys.executable, "-m", "medseg_gym", "serve", *words.split()], stdout=subprocess.PIPE, text=True, cwd=tmp_path
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("serving MedSeg-Phantom-Stub-v0 at http://127.0.0.1:")
        env = connect(line.split()[-1], "MedSeg-Phantom-Stub-v0", size=32, observation="dict")
        assert env.horizon == 2
        assert "/test/" in env.reset(seed=0)[1]["key"]
        with pytest.raises(EnvServerError, match="1 sessions are open"):
            connect(line.split()[-1], "MedSeg-Phantom-Stub-v0", retries=0)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) in (0, -signal.SIGTERM)
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--env MedSeg-Nothing-v0", "unknown env id"),
        ("--env MedSeg-v0 --host 0.0.0.0", "needs a token"),
        ("--env MedSeg-v0 --port 8265", "such as 8791"),
        ("--env MedSeg-v0 --max-sessions 0", "wanted more than 0"),
        ("--env MedSeg-v0 --option horizon", "wanted NAME=VALUE"),
        ("", "--env"),
    ],
)
def test_a_wrong_command_is_told_so(words: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from typer.testing import CliRunner

    from medseg_gym.cli import app

    monkeypatch.delenv("MEDSEG_GYM_TOKEN", raising=False)
    result = CliRunner().invoke(app, ["serve", *words.split()])
    assert result.exit_code
    assert message in " ".join(result.output.split())
