"""Envs over HTTP: the client's env equals the local one bit for bit, and its target never leaves the server."""

from __future__ import annotations

import base64
import io
import json
import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from conftest import Blobs
from gymnasium.utils.env_checker import check_env
from PIL import Image as pil
from test_serving_refusals import ask

from medseg_gym.env_server import RemoteEnv, connect
from medseg_gym.env_server.client import EnvServerError, SessionLostError
from medseg_gym.env_server.limits import EnvLimits
from medseg_gym.env_server.server import running
from medseg_gym.env_server.sessions import Sessions
from medseg_gym.envs.segment import SegmentEnv
from medseg_gym.errors import InvalidActionError, MedSegError, UnknownNameError
from medseg_gym.policies import chat, protocols
from medseg_gym.policies.endpoint import to_openai
from medseg_gym.tools.stub import Stub
from medseg_gym.types import Box, Click, Stop, Undo, Unreadable

ENV = "MedSeg-v0"
NAME = "0123456789abcdef" * 2
JSON = {"Content-Type": "application/json"}


def served(**fixed: Any) -> dict[str, dict[str, Any]]:
    return {ENV: {"dataset": Blobs(), "tool": Stub(), **fixed}}


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[str, Sessions]]:
    with running(served(), limits=EnvLimits(sessions=12)) as pair:
        yield pair


@pytest.fixture
def url(server: tuple[str, Sessions]) -> str:
    return server[0]


def same(a: Any, b: Any) -> bool:
    """Whether two results are equal, types and bits included."""
    if type(a) is not type(b):
        return False
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, tuple | list):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def play(env: Any, actions: Sequence[Any], seed: int, options: dict[str, Any] | None = None) -> list[Any]:
    told = [env.reset(seed=seed, options=options)]
    for action in actions:
        told.append(env.step(action))
        if told[-1][2] or told[-1][3]:
            told.append(env.reset())
    return told


def call(url: str, method: str, target: str, body: Any = None, name: str = NAME, **headers: str) -> Any:
    packed = None if body is None else json.dumps(body).encode()
    return ask(url, method, f"/v1/sessions/{name}{target}", packed, {**JSON, **headers})


@pytest.mark.parametrize(
    "options",
    [
        {"size": 32},
        {"size": 40, "observation": "dict", "horizon": 3, "reward": "medsam-agent", "timing": "terminal"},
        {"size": 16, "observation": "dict", "verbs": ("undo", "box"), "structures": ["disc"], "split": "test"},
    ],
)
def test_a_remote_env_equals_the_local_one_bit_for_bit(options: dict[str, Any]) -> None:
    local = SegmentEnv(Blobs(), Stub(), **options)
    with running(served()) as (url, _):
        remote = connect(url, ENV, **options)
        assert remote.observation_space == local.observation_space
        assert remote.action_space == local.action_space
        for seed in (0, 7):
            local.action_space.seed(seed)
            actions = [local.action_space.sample() for _ in range(12)]
            assert same(play(local, actions, seed), play(remote, actions, seed))
        remote.close()


def test_typed_actions_start_masks_and_pinned_cases_go_over_the_wire(url: str) -> None:
    local = SegmentEnv(Blobs(), Stub(), observation="dict", size=48, horizon=9)
    remote = connect(url, ENV, observation="dict", size=48, horizon=9)
    mask = np.zeros((48, 64), np.bool_)
    mask[5:9, 3:50] = True
    pinned = {"sample": "Blobs/test-2/bar", "start_mask": mask}
    actions = [
        Undo(),
        Box(np.int64(-3), 4, 900, 30),  # type: ignore[arg-type]
        Click(10, 11),
        Click(20, 21, positive=False),
        Unreadable("no <action> was found"),
        np.array([2, 999, 0, 3, 500]),
        [1, 5, 5, 0, 0],
        Stop(),
    ]
    told, wanted = play(remote, actions, 3, pinned), play(local, actions, 3, pinned)
    for one, two in zip(told, wanted, strict=True):  # what the tool has counted is the server's, all clients' together
        for info in (one[-1], two[-1]):
            for counter in ("encodes", "cache_hits", "cache_misses"):
                info.pop(counter)
        assert same(one, two)
    for env in (remote, local):
        env.reset(seed=1)
    for action in (Box(3, 4, 40, 30), Click(7, 7, positive=False)):
        assert remote.encode_action(action).tolist() == local.encode_action(action).tolist()
    remote.close()


def test_gymnasiums_own_checker_accepts_it(url: str) -> None:
    env = connect(url, ENV, observation="dict", size=32, render_mode="rgb_array")
    check_env(env, skip_render_check=True)
    local = SegmentEnv(Blobs(), Stub(), observation="dict", size=32, render_mode="rgb_array")
    for one in (env, local):
        one.reset(seed=2)
        one.step(Box(2, 2, 30, 30))
    assert same(env.render(), local.render())
    env.close()


def test_views_and_chats_are_those_of_the_local_env(url: str) -> None:
    local, remote = SegmentEnv(Blobs(), Stub(), size=32), connect(url, ENV, size=32)
    for env in (local, remote):
        env.reset(seed=5)
        for action in (Box(2, 2, 30, 30), Unreadable("what?"), Click(3, 3)):
            env.step(action)
    assert isinstance(remote, RemoteEnv)
    seen, wanted = remote.view(), local.view()
    for name in ("key", "prompts", "structure", "instruction", "turn", "horizon", "decisions"):
        assert getattr(seen, name) == getattr(wanted, name)
    assert same(seen.image, wanted.image)
    assert same(seen.mask, wanted.mask)
    assert [a for _, a in seen.history] == [a for _, a in wanted.history]
    assert all(same(a, b) for (a, _), (b, _) in zip(seen.history, wanted.history, strict=True))
    protocol = protocols.make("medsam-agent", local.verbs)
    assert remote.chat(size=64) == to_openai(chat.messages(wanted, protocol, 64))
    remote.close()


def test_a_model_plays_by_words_and_its_words_stay_in_the_chat(url: str) -> None:
    remote = connect(url, ENV, size=32)
    remote.reset(seed=0)
    said = '<tool_call>{"name": "add_bbox", "arguments": {"bbox_2d": [100, 100, 600, 600]}}</tool_call>'
    assert remote.say(said)[-1]["tool_calls"] == 1
    info = remote.say("I would rather not.")[-1]
    assert (info["tool_calls"], info["turn"]) == (1, 2)
    assert [m["content"] for m in remote.chat(size=32) if m["role"] == "assistant"] == [said, "I would rather not."]
    with pytest.raises(MedSegError, match="unknown protocol 'medsam'"):
        remote.say("x", protocol="medsam")
    assert remote.say('<tool_call>{"name": "stop_action"}</tool_call>')[2] is True
    remote.close()


def test_plain_json_plays_too(url: str) -> None:
    """What a client without Python sends: the forms of one action do the same, pictures are PNG."""
    local = SegmentEnv(Blobs(), Stub(), observation="dict", size=32)
    obs, _ = local.reset(seed=4)
    status, told = call(url, "PUT", "", {"env": ENV, "options": {"observation": "dict", "size": 32}})
    assert (status, told["structures"], told["verbs"][2]) == (200, ["bar", "disc"], "box")
    _, told = call(url, "POST", "/reset", {"seed": 4})
    assert picture(told, "image").tobytes() == obs["image"].tobytes()
    assert told["observation"]["target"] == obs["target"]
    wanted = local.step([2, 100, 200, 500, 700])
    box = local.engine.slot(0).state.prompts[0]
    assert isinstance(box, Box)
    pixels = {"do": "box", "x1": box.x1, "y1": box.y1, "x2": box.x2, "y2": box.y2}
    for action in ([2, 100, 200, 500, 700], {"box": [100, 200, 500, 700]}, {"box": [500, 200, 100, 700]}, pixels):
        call(url, "POST", "/reset", {"seed": 4})
        status, told = call(url, "POST", "/step", {"action": action})
        assert status == 200
        assert (told["reward"], told["terminated"], told["truncated"]) == wanted[1:4]
        assert told["info"]["iou"] == wanted[4]["iou"]
        assert picture(told, "overlay").tobytes() == wanted[0]["overlay"].tobytes()
        assert (picture(told, "mask") == 255 * wanted[0]["mask"]).all()
    assert call(url, "POST", "/step", {"action": {"click": [300, 300], "positive": False}})[0] == 200
    assert call(url, "POST", "/step", {"action": {"undo": True}})[1]["info"]["turn"] == 3
    assert call(url, "POST", "/step", {"action": {"stop": True}})[1]["terminated"] is True
    assert call(url, "DELETE", "") == (200, {"closed": True})
    assert call(url, "POST", "/step", {"action": {"stop": True}})[0] == 404


def picture(told: dict[str, Any], name: str) -> np.ndarray:
    return np.array(pil.open(io.BytesIO(base64.b64decode(told["observation"][name]["png"]))))


def test_bad_actions_raise_what_the_local_env_raises_and_change_nothing(url: str) -> None:
    local, remote = SegmentEnv(Blobs(), Stub(), size=16, verbs=["box"]), connect(url, ENV, size=16, verbs=["box"])
    with pytest.raises(MedSegError, match="call reset first"):
        remote.step([0, 1, 1, 5, 5])
    for env in (local, remote):
        env.reset(seed=0)
    for action in ([9, 0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0, 1000], Stop()):
        errors = []
        for env in (local, remote):
            with pytest.raises(InvalidActionError) as caught:
                env.step(action)
            errors.append(str(caught.value))
        assert errors[0] == errors[1]
    for action in ("box", {"box": 1}, None, [0.5] * 5, [[0, 1, 1, 5, 5]]):
        with pytest.raises(InvalidActionError, match="wanted"):
            remote.step(action)
    assert remote.step([0, 1, 1, 900, 900])[-1]["turn"] == 1
    with pytest.raises(UnknownNameError, match="has no case 'Blobs/none'"):
        remote.reset(options={"sample": "Blobs/none"})
    with pytest.raises(UnknownNameError, match="unknown reset option keyword 'samples'; did you mean 'sample'"):
        remote.reset(options={"samples": "x"})
    remote.close()
    with pytest.raises(SessionLostError, match="connect again"):
        remote.reset()


def test_parallel_clients_do_not_mix(url: str) -> None:
    """Eight clients at once, each against an env of its own here."""

    def one(seed: int) -> bool:
        local = SegmentEnv(Blobs(), Stub(), observation="dict", size=24, structures=["disc"])
        remote = connect(url, ENV, observation="dict", size=24, structures=["disc"])
        local.action_space.seed(seed)
        actions = [local.action_space.sample() for _ in range(15)]
        told, wanted = play(remote, actions, seed), play(local, actions, seed)
        remote.close()
        return all(same(a[0], b[0]) and a[1:-1] == b[1:-1] for a, b in zip(told, wanted, strict=True))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(one, range(8)))


def test_what_is_wrong_with_an_address_is_told(url: str) -> None:
    with pytest.raises(EnvServerError, match="no env server answers at .*medseg-gym serve --env MedSeg-v0"):
        connect("http://127.0.0.1:9", ENV, retries=0)
    with pytest.raises(MedSegError, match="not an env server.s address"):
        connect("127.0.0.1:8791", ENV)
    with pytest.raises(UnknownNameError, match="unknown env here 'MedSeg-Phantom-Nano-v0'; .*MedSeg-v0"):
        connect(url, "MedSeg-Phantom-Nano-v0")
    with pytest.raises(UnknownNameError, match="unknown env option keyword 'sizes'; did you mean 'size'"):
        connect(url, ENV, sizes=3)
    with pytest.raises(MedSegError, match="the limit here is 1024"):
        connect(url, ENV, size=2048)


def test_a_server_on_a_thread_leaves_the_logging_of_its_process_alone() -> None:
    closed: list[bool] = []

    class Handler(logging.Handler):
        def close(self) -> None:
            closed.append(True)
            super().close()

    handler = Handler()
    with running(["MedSeg-Phantom-Stub-v0"]):
        assert not closed
    handler.close()
    assert closed == [True]
