"""A served language model as a policy: what it says is what is scored, and what goes wrong is counted as such."""

from __future__ import annotations

import html
import json
import logging
import re
import socket
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chat_server import ChatServer, Reply, digest
from conftest import Blobs

from medseg_gym.bench.evaluate import Evaluation, evaluate
from medseg_gym.errors import MedSegError, PolicyUnavailableError, UnknownNameError
from medseg_gym.policies import base, chat
from medseg_gym.policies.endpoint import EndpointModel, to_openai
from medseg_gym.policies.protocols import IBIS
from medseg_gym.policies.text_oracle import TextOracle
from medseg_gym.policies.vlm import VLMPolicy
from medseg_gym.types import Decision, Stop, Unreadable, View

pytest.importorskip("openai", reason="the openai client is not installed: pip install 'medseg-gym[vlm]'")

BLOBS: dict[str, Any] = {"dataset": Blobs(), "tool": "Stub"}
SAY_STOP = '<tool_call>\n{"name": "stop_action", "arguments": {}}\n</tool_call>'
SAY_BOX = '<tool_call>\n{"name": "add_bbox", "arguments": {"bbox_2d": [200, 300, 600, 700]}}\n</tool_call>'


class Recorder:
    """An oracle that speaks, and writes down what it says to which chat: the script of a server that plays it."""

    name = "Recorder"

    def __init__(self, oracle: TextOracle, script: dict[str, str]) -> None:
        self.oracle, self.script = oracle, script

    def act(self, views: Sequence[View], rngs: Sequence[np.random.Generator]) -> list[Decision]:
        decisions = self.oracle.act(views, rngs)
        for view, decision in zip(views, decisions, strict=True):
            self.script[digest(to_openai(chat.messages(view, self.oracle.protocol)))] = decision.text
        return decisions


class Silent:
    """A model that is never asked."""

    name = "silent"

    def complete(self, messages: Any, said: Any, seed: int) -> Future[Any]:
        raise NotImplementedError

    def close(self) -> None:
        pass


def run(out: Path, policy: Any, **options: Any) -> Evaluation:
    settings = {**BLOBS, "cases": None, "report": False, **options}
    return evaluate("MedSeg-v0", policy, out=out, **settings)


def spec(server: ChatServer, **options: Any) -> str:
    pairs = {"model": "fake", "base_url": server.url, "retries": 1, **options}
    return "vlm:" + ",".join(f"{key}={value}" for key, value in pairs.items())


def body_of(text: str) -> Callable[[dict[str, Any]], Reply]:
    return lambda _: text


def is_about(body: dict[str, Any], word: str) -> bool:
    return word in json.dumps([part for message in body["messages"][1:2] for part in message["content"][1:]])


@pytest.mark.parametrize("protocol", ["medsam-agent", "ibis"])
@pytest.mark.parametrize("where", [BLOBS, {"dataset": "Phantom", "tool": "Nano"}], ids=["stub", "nano"])
def test_a_served_model_that_answers_as_the_oracle_does_scores_exactly_what_the_oracle_scores(
    tmp_path: Path, protocol: str, where: dict[str, Any]
) -> None:
    from medseg_gym import datasets

    dataset = datasets.load(where["dataset"])
    script: dict[str, str] = {}
    verbs = ("positive", "negative", "stop")
    oracle = TextOracle(dataset, verbs, protocol=protocol)
    options = {**where, "cases": 6, "verbs": verbs, "horizon": 6}
    plain = run(tmp_path / "plain", "OracleClicks", **options)
    run(tmp_path / "record", Recorder(oracle, script), **options)
    with ChatServer(lambda body: script.get(digest(body["messages"]), "?")) as server:
        served = run(tmp_path / "served", spec(server, protocol=protocol), **options)
    for ours, theirs in zip(served.episodes, plain.episodes, strict=True):
        assert [turn.action for turn in ours.turns] == [turn.action for turn in theirs.turns]
        assert (ours.iou, ours.dice, ours.ended) == (theirs.iou, theirs.dice, theirs.ended)
        assert [turn.reward for turn in ours.turns] == [turn.reward for turn in theirs.turns]
        assert all(turn.text for turn in ours.turns)
    assert sum(len(episode.turns) for episode in served.episodes) > 12


def test_a_slow_answer_holds_up_no_other_slot(tmp_path: Path) -> None:
    """Answers about bars wait until all three discs are done: a turn barrier would wait forever."""
    discs, lock, free = 0, threading.Lock(), threading.Event()

    def answer(body: dict[str, Any]) -> str:
        nonlocal discs
        if is_about(body, "bar"):
            assert free.wait(60)
            return SAY_STOP
        if len(body["messages"]) == 2:
            return SAY_BOX
        with lock:
            discs += 1
            if discs == 3:
                free.set()
        return SAY_STOP

    with ChatServer(answer) as server:
        result = run(tmp_path, spec(server), num_envs=4)
    assert [len(e.turns) for e in result.episodes] == [1, 2] * 3
    assert [e.case for e in result.episodes] == list(range(6))


@pytest.mark.parametrize("trouble", [429, 500, None], ids=["429", "500", "dropped"])
def test_a_request_that_fails_once_is_asked_again(tmp_path: Path, trouble: Reply) -> None:
    seen: set[str] = set()

    def answer(body: dict[str, Any]) -> Reply:
        if digest(body["messages"]) not in seen:
            seen.add(digest(body["messages"]))
            return trouble
        return SAY_STOP

    with ChatServer(answer) as server:
        result = run(tmp_path, spec(server))
    assert [e.ended for e in result.episodes] == ["stopped"] * 6
    costs = json.loads((tmp_path / "times.json").read_text())["rows"][0]["costs"]
    assert (costs["requests"], costs["retries"]) == (6, 6)
    assert (costs["prompt_tokens"], costs["completion_tokens"]) == (42, 18)
    assert costs["latency_s"] >= costs["server_s"] > 0


@pytest.mark.parametrize(
    ("trouble", "word"),
    [
        (429, "429"),
        (500, "500"),
        (400, "400"),
        (None, "dropped the connection"),
        (b"<html>oops</html>", "answer"),
        (b"{}", "no chat completion"),
        (b'{"choices": [{"message": {"content": [1]}, "finish_reason": "stop"}]}', "wanted text"),
    ],
)
def test_a_request_that_never_succeeds_fails_its_episode_alone(tmp_path: Path, trouble: Reply, word: str) -> None:
    with ChatServer(lambda body: trouble if is_about(body, "bar") else SAY_STOP) as server:
        result = run(tmp_path, spec(server))
    assert [e.ended for e in result.episodes] == ["failed", "stopped"] * 3
    assert all(word in e.error for e in result.episodes if e.ended == "failed")
    row = result.summary["rows"][0]
    assert (row["ended"]["failed"], row["iou"]) == (3, 0.0)


def test_an_answer_that_does_not_come_in_time_fails_its_episode(tmp_path: Path) -> None:
    done = threading.Event()
    try:
        with ChatServer(lambda body: done.wait(60) and None if is_about(body, "bar") else SAY_STOP) as server:
            result = run(tmp_path, spec(server, timeout=0.3, retries=0))
    finally:
        done.set()
    assert [e.ended for e in result.episodes] == ["failed", "stopped"] * 3
    assert "in time" in result.episodes[0].error


def test_nonsense_is_unreadable_and_the_model_is_told_why(tmp_path: Path) -> None:
    with ChatServer(body_of("I think it is a <fish>")) as server:
        result = run(tmp_path, spec(server), cases=1, horizon=3)
        second = server.requests[1]["messages"]
    assert result.episodes[0].ended == "unreadable"
    assert [turn.text for turn in result.episodes[0].turns] == ["I think it is a <fish>"] * 3
    assert [message["role"] for message in second] == ["system", "user", "assistant", "user"]
    assert second[2]["content"] == "I think it is a <fish>"
    assert "no <tool_call> was found" in second[3]["content"][1]["text"]


def test_the_gallery_has_every_answer_at_its_picture_with_unreadable_ones_marked(tmp_path: Path) -> None:
    words = {2: "a <fish>, I think", 4: SAY_BOX, 6: "<b>stop</b>"}
    with ChatServer(lambda body: words[len(body["messages"])]) as server:
        run(tmp_path, spec(server), cases=1, horizon=3, report=True)
    page = (tmp_path / "report.html").read_text()
    case = page[page.index('<article class="case') :]
    figures = [re.sub(r"\s+", " ", figure) for figure in re.findall(r"(?s)<figure.*?</figure>", case)]
    assert len(figures) == 3
    for figure, said, marked in zip(figures, words.values(), (True, False, True), strict=True):
        assert " ".join(said.split()) in html.unescape(figure)
        assert ('class="shot unreadable' in figure) == ("[unreadable: " in figure) == marked


def test_an_answer_that_was_cut_off_and_one_that_is_too_long_are_told_as_such(tmp_path: Path) -> None:
    def answer(body: dict[str, Any]) -> bytes:
        words, finish = ("<tool_call>\n{", "length") if is_about(body, "bar") else ("a" * 100_000, "stop")
        return json.dumps({"choices": [{"message": {"content": words}, "finish_reason": finish}]}).encode()

    with ChatServer(answer) as server:
        result = run(tmp_path, spec(server), cases=None, horizon=1)
    (bar,), (disc,) = (episode.turns for episode in result.episodes[:2])
    assert isinstance(bar.action, Unreadable) and isinstance(disc.action, Unreadable)
    assert bar.action.reason == "the answer was cut off; <tool_call> was not closed by </tool_call>"
    assert disc.action.reason == "the answer has 65537 characters; at most 65536 are read"
    assert len(disc.text) == 65_537  # no more of it is kept


def test_no_more_requests_than_concurrency_are_under_way(tmp_path: Path) -> None:
    under_way, most, lock = 0, 0, threading.Lock()

    def answer(body: dict[str, Any]) -> str:
        nonlocal under_way, most
        with lock:
            under_way += 1
            most = max(most, under_way)
        time.sleep(0.1)
        with lock:
            under_way -= 1
        return SAY_STOP

    with ChatServer(answer) as server:
        run(tmp_path, spec(server, concurrency=2), num_envs=6)
    assert most == 2


def test_an_exception_before_the_model_is_asked_fails_that_episode_alone(tmp_path: Path) -> None:
    class Faulty(TextOracle):
        def submit(self, view: View, rng: np.random.Generator) -> Future[Decision]:
            if "bar" in view.instruction:
                raise ValueError("no chat for bars")
            answer: Future[Decision] = Future()
            answer.set_result(Decision(Stop(), "stop"))
            return answer

    result = run(tmp_path, Faulty(Blobs()))
    assert [e.ended for e in result.episodes] == ["failed", "stopped"] * 3
    assert "no chat for bars" in result.episodes[0].error


def test_an_address_that_takes_no_connection_ends_the_run() -> None:
    """A queue of one, filled: the next connection is neither taken nor refused, as behind a firewall."""
    with socket.socket() as deaf, ExitStack() as filled:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen(0)
        for _ in range(4):
            waiting = filled.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(deaf.getsockname())
        model = EndpointModel(f"http://127.0.0.1:{deaf.getsockname()[1]}/v1", "fake", timeout=0.3, retries=0)
        with pytest.raises(PolicyUnavailableError, match="cannot be reached"):
            model.complete([{"role": "user", "content": "?"}], (), seed=0).result(30)
        model.close()


def test_evaluate_closes_what_it_opened_also_when_the_run_breaks_off(tmp_path: Path) -> None:
    def open_connections() -> int:
        return sum(thread.name == "medseg-gym-endpoint" for thread in threading.enumerate())

    before = open_connections()
    with ChatServer(body_of(SAY_STOP)) as server:
        run(tmp_path / "whole", spec(server))
    with ChatServer(lambda _: 404) as server, pytest.raises(PolicyUnavailableError):
        run(tmp_path / "broken", spec(server))
    assert open_connections() == before


def test_answers_still_to_come_are_cancelled_when_the_model_is_closed() -> None:
    free = threading.Event()
    with ChatServer(lambda _: free.wait(60) and None) as server:
        model = EndpointModel(server.url, "fake")
        answer = model.complete([{"role": "user", "content": "?"}], (), seed=0)
        model.close()
        assert answer.cancelled()
        free.set()
    with pytest.raises(MedSegError, match="was closed"):
        model.complete([], (), seed=0)


@pytest.mark.parametrize(
    ("option", "turns", "ended"),
    [
        (["--on-unreadable", "end"], [1] * 3, "unreadable"),
        (["--on-unreadable", "explain"], [4] * 3, "unreadable"),
        (["--stop-after-repeats", "3"], [3] * 3, "stopped"),
    ],
)
def test_the_command_line_ends_episodes_as_it_is_told(
    tmp_path: Path, option: list[str], turns: list[int], ended: str
) -> None:
    from typer.testing import CliRunner

    from medseg_gym.cli import app

    words = SAY_BOX if "repeats" in option[0] else "hm"
    with ChatServer(body_of(words)) as server:
        command = ["evaluate", "--env", "MedSeg-Phantom-Stub-v0", "--policy", spec(server), "--cases", "3"]
        result = CliRunner().invoke(app, [*command, "--horizon", "4", "--out", str(tmp_path), *option])
    assert result.exit_code == 0, result.output
    episodes = [json.loads(line) for line in (tmp_path / "episodes.jsonl").read_text().splitlines()]
    assert [len(e["turns"]) for e in episodes] == turns
    assert {e["ended"] for e in episodes} == {ended}


def test_a_server_that_dies_ends_the_run_and_the_same_command_goes_on(tmp_path: Path) -> None:
    def answers(limit: int) -> Callable[[dict[str, Any]], Reply]:
        count = 0

        def answer(body: dict[str, Any]) -> Reply:
            nonlocal count
            count += 1
            if count > limit:
                threading.Thread(target=server.__exit__).start()
                return None
            return SAY_BOX if len(body["messages"]) == 2 else SAY_STOP

        return answer

    with ChatServer(answers(10**6)) as server:
        run(tmp_path / "whole", spec(server), num_envs=1)
    with ChatServer(answers(7)) as server:
        port = server.port
        with pytest.raises(PolicyUnavailableError, match="cannot be reached; start the server"):
            run(tmp_path / "cut", spec(server, retries=3), num_envs=1)
    assert len((tmp_path / "cut" / "episodes.jsonl").read_text().splitlines()) == 3
    with ChatServer(answers(10**6), port) as server:
        run(tmp_path / "cut", spec(server), num_envs=1)
    for name in ("episodes.jsonl", "summary.json", "run.json"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_an_unknown_model_ends_the_run_at_once(tmp_path: Path) -> None:
    with ChatServer(lambda _: 404) as server, pytest.raises(PolicyUnavailableError, match=r"404 .*check key, model"):
        run(tmp_path, spec(server))


def test_the_key_comes_from_the_environment_and_is_seen_by_the_server_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MY_KEY", "sk-very-secret")
    with (
        caplog.at_level(logging.DEBUG),
        ChatServer(lambda _: 401) as server,
        pytest.raises(PolicyUnavailableError) as error,
    ):
        run(tmp_path, spec(server, api_key_env="MY_KEY"))
    assert server.headers[0]["authorization"] == "Bearer sk-very-secret"
    written = "".join(path.read_text() for path in tmp_path.iterdir() if path.suffix in (".json", ".jsonl"))
    assert "secret" not in str(error.value) + caplog.text + written


def test_a_server_that_echoes_the_key_does_not_get_it_into_the_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret")
    said = "I was sent sk-very-secret"
    for number, (status, answer) in enumerate([(400, {"error": {"message": said}}), (200, {"choices": said})]):
        body = json.dumps(answer).encode()
        with ChatServer(lambda _, status=status, body=body: (status, body)) as server:
            run(tmp_path / str(number), spec(server))
        written = (tmp_path / str(number) / "episodes.jsonl").read_text()
        assert "I was sent ***" in written
        assert "secret" not in written


def test_a_seed_gives_the_same_requests_whatever_the_number_of_slots(tmp_path: Path) -> None:
    asked = []
    for slots in (1, 5):
        with ChatServer(body_of(SAY_STOP)) as server:
            run(tmp_path / str(slots), spec(server, temperature=0.7), num_envs=slots)
        asked.append(sorted((digest(r["messages"]), r["seed"], r["temperature"]) for r in server.requests))
    assert asked[0] == asked[1]
    first, second = ((tmp_path / n / "episodes.jsonl").read_bytes() for n in ("1", "5"))
    assert first == second


def test_a_policys_name_tells_all_that_its_answers_hang_on() -> None:
    """It is what a run is resumed by."""
    policy = base.make(
        "vlm:model=m,base_url=http://127.0.0.1:1/v1,protocol=ibis,history=true,thinking=false,temperature=0.5,"
        "max_tokens=9,size=256,timeout=1,retries=0,concurrency=1"
    )
    settings = "protocol=ibis,history=true,thinking=false,temperature=0.5,max_tokens=9,size=256"
    assert policy.name == f"vlm:model=m,{settings}"
    assert (policy.protocol.history, policy.protocol.thinking, policy.size) == (True, False, 256)  # type: ignore[attr-defined]
    policy.close()  # type: ignore[attr-defined]


def test_settings_that_cannot_be_are_refused_with_the_next_move() -> None:
    with pytest.raises(MedSegError, match="vlm:model=NAME,base_url="):
        base.make("vlm")
    with pytest.raises(UnknownNameError, match="did you mean 'temperature'"):
        base.make("vlm:model=x,base_url=http://127.0.0.1:1/v1,temperatur=1")
    with pytest.raises(MedSegError, match="wanted http://HOST:PORT/v1"):
        base.make("vlm:model=x,base_url=ftp")
    for option, wanted in (
        ("timeout=abc", "timeout='abc'; wanted a number"),
        ("temperature=hot", "temperature='hot'; wanted a number"),
        ("temperature=nan", "wanted a number"),
        ("concurrency=1.5", "concurrency=1.5; wanted a whole number, at least 1"),
        ("max_tokens=0", "max_tokens=0; wanted a whole number, at least 1"),
        ("api_key_env=none", "wanted the name of an environment variable"),
        ("size=500", "size=500; wanted a multiple of 32"),
        ("history=true", "protocol medsam-agent keyword 'history'"),
    ):
        with pytest.raises(MedSegError, match=wanted):
            base.make(f"vlm:model=x,base_url=http://127.0.0.1:1/v1,{option}")
    with pytest.raises(MedSegError, match="one target a chat"):
        VLMPolicy(Silent(), IBIS(several=True))
    with pytest.raises(UnknownNameError, match="protocol"):
        base.make("vlm:model=x,base_url=http://127.0.0.1:1/v1,protocol=ibiss")
