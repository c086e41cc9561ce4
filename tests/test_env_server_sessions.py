"""Sessions of an env server: numbered calls, hidden metrics, fixed options, what is recorded, and how they end."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import urllib3
from conftest import Blobs
from test_env_server import ENV, call, play, served
from test_serving_refusals import ask

from medseg_gym.env_server import connect
from medseg_gym.env_server.client import EnvServerError, NoAnswerError, SessionLostError
from medseg_gym.env_server.limits import EnvLimits
from medseg_gym.env_server.server import running
from medseg_gym.envs.segment import SegmentEnv
from medseg_gym.episodes import from_json
from medseg_gym.errors import MedSegError, UnknownNameError
from medseg_gym.tools.stub import Stub
from medseg_gym.types import Box, Click, Query, Stop, Undo


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with running(served()) as (url, _):
        yield url


def test_a_call_that_is_sent_twice_counts_once(url: str) -> None:
    call(url, "PUT", "", {"env": ENV, "options": {"size": 16}})
    call(url, "PUT", "", {"env": ENV, "options": {"size": 16}})  # so does opening
    reset = call(url, "POST", "/reset", {"call": 1, "seed": 0})
    assert call(url, "POST", "/reset", {"call": 1, "seed": 0}) == reset
    step = {"call": 2, "action": {"box": [0, 0, 500, 500]}}
    first = call(url, "POST", "/step", step)
    assert first[1]["info"]["turn"] == 1
    assert call(url, "POST", "/step", step) == first
    status, told = call(url, "POST", "/step", {**step, "call": 9})
    assert (status, told["error"]) == (409, "call 9; the next one is 3, or none to go unnumbered")
    for target, other in (("/step", {**step, "action": {"stop": True}}), ("/reset", {"call": 2, "seed": 0})):
        status, told = call(url, "POST", target, other)
        assert (status, told["error"]) == (409, "call 2 was another request, and is done; the next one is 3")
    assert call(url, "POST", "/step", step) == first
    call(url, "DELETE", "")


def test_an_answer_lost_on_its_way_is_asked_for_again(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    remote = connect(url, ENV, size=16)
    remote.reset(seed=0)
    pool = remote._connection._pools.mine()
    real: Any = pool.urlopen
    lost: list[int] = []

    def lossy(*arguments: Any, **keywords: Any) -> Any:
        answer = real(*arguments, **keywords)
        if not lost:
            lost.append(answer.status)
            raise urllib3.exceptions.ProtocolError("reset by peer")
        return answer

    monkeypatch.setattr(pool, "urlopen", lossy)
    info = remote.step(Box(2, 2, 20, 20))[-1]
    assert (lost, info["turn"], info["tool_calls"]) == ([200], 1, 1)
    remote.close()


@pytest.mark.parametrize("broken", [KeyboardInterrupt(), urllib3.exceptions.ReadTimeoutError(None, "", "slow")])  # type: ignore[arg-type]
def test_after_an_answer_that_never_came_only_reset_goes_on(
    url: str, broken: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the next call, of the same number, would be given the answer of the lost one."""
    remote, local = connect(url, ENV, size=16), SegmentEnv(Blobs(), Stub(), size=16)
    remote.reset(seed=0)
    pool = remote._connection._pools.mine()
    with monkeypatch.context() as patch:
        real = pool.urlopen

        def lost(*arguments: Any, **keywords: Any) -> Any:
            real(*arguments, **keywords)
            raise broken

        patch.setattr(pool, "urlopen", lost)
        with pytest.raises(KeyboardInterrupt if isinstance(broken, KeyboardInterrupt) else NoAnswerError):
            remote.step(Box(2, 2, 20, 20))
    with pytest.raises(NoAnswerError, match="call reset"):
        remote.step(Stop())
    with pytest.raises(UnknownNameError):
        remote.reset(options={"sample": "none"})
    info, wanted = remote.reset(seed=1)[1], local.reset(seed=1)[1]
    assert (info["key"], info["turn"]) == (wanted["key"], 0)
    assert remote.step(Stop())[2] is True
    remote.close()


def test_hidden_metrics_leave_nothing_that_hangs_on_the_target() -> None:
    """Two servers whose cases differ in nothing but the target answer byte for byte the same."""
    answers: list[list[bytes]] = []
    for absent in (False, True):
        asked: list[bytes] = []
        data = Blobs(absent=absent)
        with running({ENV: {"dataset": data, "tool": Stub(), "split": "test"}}, hide_metrics=True) as (url, _):
            remote = connect(url, ENV, observation="dict", size=32)
            move = remote._connection.ask

            def kept(*arguments: Any, to: Any = asked, how: Any = move, **keywords: Any) -> bytes:
                to.append(how(*arguments, **keywords))
                return to[-1]  # type: ignore[no-any-return]

            remote._connection.ask = kept  # type: ignore[method-assign]
            told = play(remote, [Box(5, 5, 40, 40), Click(3, 3), Undo(), Stop()], 0)
            assert math.isnan(told[1][1])
            assert not {"iou", "dice", "peak_iou", "reward_terms"} & set(told[1][-1])
            remote.view()
            remote.chat(size=32)
            assert ask(url, "GET", "/v1/envs")[1]["metrics"] is False
        answers.append(asked)
    assert len(answers[0]) == 8
    assert answers[0] == answers[1]


def test_options_that_the_server_has_fixed_stay_as_they_are() -> None:
    with running(served(split="test", size=24)) as (url, _):
        remote = connect(url, ENV)
        assert remote.reset(seed=0)[0].shape == (24, 24, 3)
        assert "/test-" in remote.reset()[1]["key"]
        assert connect(url, ENV, size=24).reset(seed=0)[0].shape == (24, 24, 3)
        with pytest.raises(MedSegError, match="option split=\"train\"; this server has it fixed to 'test'"):
            connect(url, ENV, split="train")
        told = ask(url, "GET", f"/v1/keys?env={ENV}&structure=bar&start=1")[1]
        assert told == {"keys": ["Blobs/test-1/bar", "Blobs/test-2/bar"], "start": 1, "total": 3}


@pytest.mark.parametrize(
    ("fixed", "case", "given"),
    [
        ({"split": "train"}, "Blobs/test-0/bar", "Blobs/train-0/bar"),
        ({"structures": "disc"}, "Blobs/test-0/bar", "Blobs/test-0/disc"),
        ({"split": "test", "structures": ["bar"]}, "Blobs/test-0/disc", "Blobs/test-0/bar"),
    ],
)
def test_a_pinned_case_is_one_of_those_that_are_fixed(fixed: dict[str, Any], case: str, given: str) -> None:
    with running(served(**fixed)) as (url, _):
        remote = connect(url, ENV, size=16)
        with pytest.raises(UnknownNameError, match=f'no case "{case}" in what this server has fixed'):
            remote.reset(options={"sample": case})
        assert remote.reset(options={"sample": given})[1]["key"] == given


def test_every_episode_is_recorded_those_left_unfinished_as_failed(tmp_path: Path) -> None:
    """Also what is looked at and left, so that nobody chooses among hidden cases; a bad reset leaves nothing."""
    file = tmp_path / "episodes.jsonl"
    with running(served(split="test"), hide_metrics=True, record=file, limits=EnvLimits(session_ttl=0.2)) as (
        url,
        all_,
    ):
        remote, local = connect(url, ENV, size=16), SegmentEnv(Blobs(), Stub(), size=16, split="test")
        for env in (remote, local):
            env.reset(seed=4)
            env.step(Box(2, 2, 30, 30))
            env.step(Stop())
        with pytest.raises(UnknownNameError):
            remote.reset(options={"sample": "none"})
        remote.reset(options={"sample": "Blobs/test-0/bar"})
        remote.reset(options={"sample": "Blobs/test-1/bar"})
        remote.step(Box(2, 2, 30, 30))
        with pytest.raises(UnknownNameError):
            remote.reset(options={"sample": "none"})
        remote.step(Undo())
        remote.close()
        lost = connect(url, ENV, size=16)
        lost.reset(options={"sample": "Blobs/test-2/bar"})
        while len(all_):
            time.sleep(0.01)
        connect(url, ENV, size=16).reset(options={"sample": "Blobs/test-2/disc"})  # the end of the server is its end
    first, *others = [from_json(line) for line in file.read_text().splitlines()]
    assert replace(first, policy="") == local.episode("", 4)
    assert first.policy == f"session {remote._session[:8]}"
    assert [(one.key[-10:], one.ended, len(one.turns)) for one in others] == [
        *(("test-0/bar", "failed", 0), ("test-1/bar", "failed", 2)),
        *(("test-2/bar", "failed", 0), ("est-2/disc", "failed", 0)),
    ]
    with pytest.raises(MedSegError, match="cannot be written"), running(served(), record=tmp_path / "no" / "file"):
        pass


class Slow(Stub):
    """A Stub that answers when it is let."""

    def __init__(self) -> None:
        super().__init__()
        self.asked, self.go = threading.Event(), threading.Event()

    def predict(self, queries: Sequence[Query]) -> Any:
        self.asked.set()
        assert self.go.wait(30)
        return super().predict(queries)


def test_idle_sessions_expire_and_busy_ones_do_not() -> None:
    tool = Slow()
    data = {ENV: {"dataset": Blobs(), "tool": tool}}
    with running(data, limits=EnvLimits(session_ttl=0.2)) as (url, sessions):
        idle, busy = connect(url, ENV, size=16), connect(url, ENV, size=16)
        busy.reset(seed=0)
        with ThreadPoolExecutor(1) as pool:
            step = pool.submit(busy.step, Box(2, 2, 20, 20))
            assert tool.asked.wait(30)
            while len(sessions) == 2:  # the sweep needs no request
                time.sleep(0.01)
            with pytest.raises(SessionLostError, match=r"forgotten after 0\.2 s without a request"):
                idle.reset(seed=0)
            assert len(sessions) == 1
            tool.go.set()
            assert step.result()[-1]["turn"] == 1
        while len(sessions):
            time.sleep(0.01)


def test_there_are_no_more_sessions_than_may_be() -> None:
    with running(served(), limits=EnvLimits(sessions=2)) as (url, sessions):
        envs = [connect(url, ENV, size=16) for _ in range(2)]
        with pytest.raises(EnvServerError, match="2 sessions are open, as many as may be"):
            connect(url, ENV, size=16, retries=0)
        assert len(sessions) == 2
        envs[0].close()
        envs[0].close()
        connect(url, ENV, size=16).reset(seed=0)
