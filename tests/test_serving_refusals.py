"""What the tool server refuses, whom it does not serve, and the clients that must not hold the others up."""

from __future__ import annotations

import http.client
import json
import logging
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
from test_serving import Noisy, episode, random_image, same

from medseg_gym.errors import MedSegError
from medseg_gym.images import image_hash
from medseg_gym.tools.cache import CachedTool
from medseg_gym.tools.serving import wire
from medseg_gym.tools.serving.client import RemoteTool
from medseg_gym.tools.serving.host import Ask, ToolHost
from medseg_gym.tools.serving.limits import Limits
from medseg_gym.tools.serving.remote import RefusedError, ServerError
from medseg_gym.tools.serving.server import PORT, RAY_PORT, check_binding, is_loopback, read_token, running
from medseg_gym.types import Click, Image, Query

TOKEN = "correct horse battery staple"
SMALL = Limits(body_bytes=60_000, pixels=10_000, queries=4, prompts=3, answer_bytes=100_000, json_bytes=5_000)
IMAGE = random_image(0)
NAME = image_hash(IMAGE)
LIKELY = np.frombuffer(b'0123456789abcdef{}[],:"-', np.uint8)


def ask(
    url: str, method: str, target: str, body: bytes | None = None, headers: dict[str, str] | None = None
) -> tuple[int, dict[str, Any]]:
    """Status and JSON of a request; no status other than 200 may come without an "error" in it."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=30)
    try:
        kind = {"Content-Type": "application/octet-stream"}
        connection.request(method, target, body, {**kind, **(headers or {})})
        answer = connection.getresponse()
        data = answer.read()
    finally:
        connection.close()
    if answer.headers.get("Content-Type") != "application/json":
        return answer.status, {}
    told = json.loads(data)
    assert answer.status == 200 or isinstance(told["error"], str)
    assert b"Traceback" not in data
    return answer.status, told


def put(url: str, image: Image, **changes: Any) -> int:
    given = {"name": image_hash(image), "height": image.shape[0], "width": image.shape[1], **changes}
    target = "/v1/images/{name}?height={height}&width={width}".format(**given)
    return ask(url, "PUT", target, image.tobytes())[0]


def predict(url: str, head: dict[str, Any], rest: bytes = b"") -> tuple[int, dict[str, Any]]:
    return ask(url, "POST", "/v1/predict", wire.pack(head) + rest)


def query(**changes: Any) -> dict[str, Any]:
    prompt = {"do": "click", "x": 1, "y": 2, "positive": True}
    return {"masks": "logits", "queries": [{"image": NAME, "prompts": [prompt], "prior": None, **changes}]}


@pytest.fixture(scope="module")
def small() -> Iterator[tuple[str, ToolHost]]:
    with running(CachedTool(Noisy()), limits=SMALL) as (url, host):
        assert put(url, IMAGE) == 200
        yield url, host


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({}, 200),
        ({"name": "0" * 64}, 400),  # not its hash
        ({"name": NAME.upper()}, 400),
        ({"name": "x"}, 400),
        ({"height": 23}, 400),
        ({"height": 0}, 400),
        ({"height": -24, "width": -32}, 400),
        ({"height": "many"}, 400),
        ({"height": 1e300}, 400),
        ({"width": 10_000_000}, 400),
    ],
)
def test_an_image_is_what_its_name_and_size_say(small: tuple[str, ToolHost], changes: Any, status: int) -> None:
    assert put(small[0], IMAGE, **changes) == status


def test_images_as_png_are_the_same_images(small: tuple[str, ToolHost]) -> None:
    kind = {"Content-Type": "image/png"}
    image = random_image(77)
    target = f"/v1/images/{image_hash(image)}"
    assert ask(small[0], "HEAD", target)[0] == 404
    assert ask(small[0], "PUT", target, wire.write_png(image), kind)[0] == 200
    assert ask(small[0], "HEAD", target)[0] == 200
    assert ask(small[0], "PUT", f"/v1/images/{NAME}", wire.write_png(image), kind)[0] == 400
    assert ask(small[0], "PUT", target, wire.write_png(image)[:-40], kind)[0] == 400
    assert ask(small[0], "PUT", target, b"GIF89a" + bytes(99), kind)[0] == 400
    deep = np.zeros((4, 4), np.uint16)
    assert ask(small[0], "PUT", target, wire.write_png(deep), kind)[0] == 400  # type: ignore[arg-type]
    bomb = wire.write_png(np.zeros((200, 200, 3), np.uint8))  # few bytes, and more pixels than may be
    assert len(bomb) < 1000
    assert "200x200 pixels; the limit is 10000" in ask(small[0], "PUT", target, bomb, kind)[1]["error"]


def test_more_than_may_be_is_refused(small: tuple[str, ToolHost]) -> None:
    url = small[0]
    assert put(url, np.zeros((101, 100, 3), np.uint8)) == 400  # pixels
    tall = np.zeros((100, 99, 3), np.uint8)
    assert put(url, tall) == 200
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=30)
    connection.putrequest("POST", "/v1/predict")
    connection.putheader("Content-Length", "60001")  # said, and never sent
    connection.endheaders()
    assert connection.getresponse().status == 413
    connection.close()
    assert ask(url, "POST", "/v1/encode", json.dumps({"images": [NAME] * 4}).encode())[0] == 200
    assert ask(url, "POST", "/v1/encode", json.dumps({"images": [NAME] * 5}).encode())[0] == 400
    assert ask(url, "POST", "/v1/encode", b"[" + b" " * 5_000)[0] == 413
    prompt = query()["queries"][0]["prompts"][0]
    assert predict(url, query(prompts=[prompt] * 3))[0] == 200
    assert predict(url, query(prompts=[prompt] * 4))[0] == 400
    assert predict(url, {"queries": query()["queries"] * 5})[0] == 400
    many = {"queries": query(image=image_hash(tall))["queries"] * 3}
    assert predict(url, many)[0] == 413  # three answers of 100 x 99 logits
    assert ask(url, "GET", "/v1/prior-shape?height=1000&width=1000")[0] == 400


@pytest.mark.parametrize(
    "head",
    [
        {},
        {"queries": None},
        {"queries": ["x"]},
        {"queries": [{}]},
        {**query(), "masks": "pictures"},
        {**query(), "masks": ["bits"]},
        query(image=None),
        query(image="../../etc"),
        query(prompts=[]),
        query(prompts={"do": "click"}),
        query(prompts=[{"do": "stop"}]),
        query(prompts=[{"do": "click", "x": 1.5, "y": 2, "positive": True}]),
        query(prompts=[{"do": "click", "x": 10**9, "y": 2, "positive": True}]),
        query(prompts=[{"do": "click", "x": "1", "y": 2, "positive": True}]),
        query(prompts=[{"do": "click", "x": 1, "y": 2, "positive": True, "extra": 1}]),
        query(prompts=[{"do": "box", "x1": 1, "y1": 2, "x2": 3, "y2": 4}] * 2),
        query(prior=7),
        query(prior={"shape": [7, 5]}),
        query(prior={"shape": [7, 5], "dtype": "object"}),
        query(prior={"shape": [7, 5], "dtype": "float32"}),  # announced, and not there
        query(prior={"shape": [7, -5], "dtype": "float32"}),
        query(prior={"shape": [10**6, 10**6], "dtype": "float32"}),
        query(surprise=1),
    ],
)
def test_malformed_queries_are_refused(small: tuple[str, ToolHost], head: dict[str, Any]) -> None:
    assert predict(small[0], head)[0] == 400


def test_a_prior_may_travel_in_half_precision(small: tuple[str, ToolHost]) -> None:
    prior = np.linspace(-9, 9, 35, dtype=np.float16).reshape(7, 5)
    asked = query(prior={"shape": [7, 5], "dtype": "float16"})
    whole = query(prior={"shape": [7, 5], "dtype": "float32"})
    answers = []
    for head, array in ((asked, prior), (whole, prior.astype(np.float32))):
        connection = http.client.HTTPConnection(urlsplit(small[0]).netloc, timeout=30)
        body = wire.pack(head, [array])
        connection.request("POST", "/v1/predict", body, {"Content-Type": "application/octet-stream"})
        answers.append(wire.unpack_answers(connection.getresponse().read(), [IMAGE.shape[:2]])[0])
        connection.close()
    assert same(*answers)


def test_malformed_bodies_are_refused(small: tuple[str, ToolHost]) -> None:
    url = small[0]
    deep = b"[" * 2_000 + b"]" * 2_000
    bodies = [b"", b"\0", b"\xff\xff\xff\xff", b"\x05\0\0\0{}", struct.pack("<I", 4_000) + deep[:4_000], b"\2\0\0\0[]"]
    bodies += [
        struct.pack("<I", len(t)) + t for t in (b'{"queries": NaN}', b'"\xff"', b'{"queries":' + b"9" * 4_900 + b"}")
    ]
    for body in bodies:
        assert ask(url, "POST", "/v1/predict", body)[0] == 400, body[:40]
        assert ask(url, "POST", "/v1/encode", body[4:])[0] in (400, 413), body[:40]
    assert predict(url, query(), b"more")[0] == 400
    assert ask(url, "POST", "/v1/predict", b"x", {"Content-Type": "text/html"})[0] == 415
    assert ask(url, "GET", "/v2/tool")[0] == 404
    assert ask(url, "DELETE", f"/v1/images/{NAME}")[0] == 405


def test_no_bytes_whatever_break_the_server(small: tuple[str, ToolHost]) -> None:
    url, _ = small
    rng = np.random.default_rng(0)
    prior = rng.normal(0, 1, (7, 5)).astype(np.float32)
    good = wire.pack_asks([Ask(NAME, (Click(1, 2), Click(3, 4)), prior)], "logits")
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=30)
    seen = set()
    for _ in range(400):
        body = bytearray(good)
        for _ in range(int(rng.integers(1, 4))):
            place = int(rng.integers(len(body) if rng.random() < 0.3 else 250))
            body[place] = int(rng.integers(256)) if rng.random() < 0.5 else int(rng.choice(LIKELY))
        if rng.random() < 0.2:
            body = body[: int(rng.integers(len(body)))]
        connection.request("POST", "/v1/predict", bytes(body), {"Content-Type": "application/octet-stream"})
        answer = connection.getresponse()
        data = answer.read()
        assert b"Traceback" not in data
        seen.add(answer.status)
    connection.close()
    assert seen <= {200, 400, 409, 413, 422} and {200, 400, 409} <= seen
    assert ask(url, "POST", "/v1/predict", good)[0] == 200


def test_raw_noise_instead_of_http_is_survived(small: tuple[str, ToolHost]) -> None:
    rng = np.random.default_rng(1)
    for _ in range(20):
        with socket.create_connection(address(small[0]), timeout=30) as line:
            line.sendall(rng.bytes(200) + b"\r\n\r\n")
    assert ask(small[0], "GET", "/health") == (200, {"status": "ok"})


def test_a_client_refuses_what_the_server_would(small: tuple[str, ToolHost]) -> None:
    remote = RemoteTool(small[0])
    with pytest.raises(RefusedError, match="takes images of 10000 pixels"):
        remote.encode([random_image(1, 200, 200)])
    (embedding,) = remote.encode([IMAGE])
    answers = remote.predict([Query(embedding, (Click(i, i),)) for i in range(9)])  # more than go into one request
    assert same(answers, Noisy().predict([Query(embedding, (Click(i, i),)) for i in range(9)]))


def test_a_full_queue_says_when_to_come_back(small: tuple[str, ToolHost]) -> None:
    tool = Noisy()
    with running(CachedTool(tool), limits=Limits(queue=1)) as (url, host):
        assert put(url, IMAGE) == 200
        tool.go.clear()
        body = wire.pack(query())
        lines = []
        for waiting in (0, 1):
            lines.append(half(url, body, len(body)))
            while not tool.passes or host.batcher.counters()["waiting"] < waiting:
                pass
        connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=30)
        connection.request("POST", "/v1/predict", body, {"Content-Type": "application/octet-stream"})
        answer = connection.getresponse()
        assert (answer.status, answer.headers["Retry-After"]) == (429, "1")
        remote = RemoteTool(url, retries=0)
        with pytest.raises(ServerError, match="1 queries wait already and 1 may"):
            remote.encode([IMAGE])
        tool.go.set()
        assert len(RemoteTool(url).encode([IMAGE])) == 1  # it comes back by itself
        for line in lines:
            assert line.recv(12) == b"HTTP/1.1 200"
            line.close()


def test_too_many_requests_at_once_are_sent_away(small: tuple[str, ToolHost]) -> None:
    tool = Noisy()
    with running(CachedTool(tool), limits=Limits(requests=1)) as (url, _):
        assert put(url, IMAGE) == 200
        tool.go.clear()
        body = wire.pack(query())
        line = half(url, body, len(body))
        while not tool.passes:
            pass
        assert ask(url, "GET", "/v1/tool")[0] == 503
        assert ask(url, "GET", "/health")[0] == 200
        tool.go.set()
        line.recv(1000)
        line.close()


# dead and slow clients


def address(url: str) -> tuple[str, int]:
    parts = urlsplit(url)
    assert parts.hostname and parts.port
    return parts.hostname, parts.port


def half(url: str, body: bytes, sent: int) -> socket.socket:
    """A connection on which so many bytes of a predict request's body were sent."""
    line = socket.create_connection(address(url), timeout=30)
    head = (
        f"POST /v1/predict HTTP/1.1\r\nHost: {urlsplit(url).netloc}\r\nContent-Type: application/octet-stream\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    line.sendall(head.encode() + body[:sent])
    return line


KILLED = """
import socket, sys, time
line = socket.create_connection((sys.argv[1], int(sys.argv[2])))
line.sendall(bytes.fromhex(sys.argv[3]))
print("sent", flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_a_client_killed_in_mid_request_leaves_the_others_served(share: float) -> None:
    tool = Noisy(max_batch=1)
    with running(CachedTool(tool)) as (url, host):
        assert put(url, IMAGE) == 200
        body = wire.pack(query())
        head = (
            f"POST /v1/predict HTTP/1.1\r\nHost: {urlsplit(url).netloc}\r\nContent-Length: {len(body)}\r\n"
            "Content-Type: application/octet-stream\r\n\r\n"
        ).encode()
        tool.go.clear()
        with half(url, body, len(body)) as first:  # keeps the tool busy, so that the victim's query has to wait
            while not tool.passes:
                pass
            sent = head + body[: int(share * len(body))]
            victim = subprocess.Popen(
                [sys.executable, "-c", KILLED, *map(str, address(url)), sent.hex()], stdout=subprocess.PIPE
            )
            assert victim.stdout is not None and victim.stdout.readline() == b"sent\n"
            while share == 1 and host.batcher.counters()["waiting"] < 1:
                pass
            victim.send_signal(signal.SIGKILL)
            victim.wait(30)
            victim.stdout.close()
            deadline = time.monotonic() + 30
            while share == 1 and not _cancelled(host) and time.monotonic() < deadline:
                time.sleep(0.01)
            tool.go.set()
            assert first.recv(12) == b"HTTP/1.1 200"
        image = random_image(4)
        assert same(episode(RemoteTool(url), image), episode(CachedTool(Noisy()), image))
        assert tool.passes == [1] * 4  # the dead client's query was never computed


def _cancelled(host: ToolHost) -> bool:
    lines = host.batcher._lines
    return all(job.answer.cancelled() for line in list(lines.values()) for job in list(line))


def test_a_request_that_never_ends_is_dropped() -> None:
    with running(CachedTool(Noisy()), limits=Limits(receive_s=0.3)) as (url, _):
        assert put(url, IMAGE) == 200
        body = wire.pack(query())
        for line in (half(url, body, len(body) // 2), socket.create_connection(address(url), timeout=30)):
            assert ended(line)
        assert predict(url, query())[0] == 200


def test_a_client_that_never_reads_is_dropped_and_holds_nobody_up() -> None:
    image = random_image(5, 1500, 1500)  # an answer of 9 MB
    with running(CachedTool(Noisy()), limits=Limits(send_s=0.5)) as (url, _):
        assert put(url, image) == 200
        body = wire.pack(query(image=image_hash(image)))
        deaf = socket.socket()
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.settimeout(30)
        deaf.connect(address(url))
        head = f"POST /v1/predict HTTP/1.1\r\nHost: {urlsplit(url).netloc}\r\nContent-Length: {len(body)}\r\n"
        deaf.sendall((head + "Content-Type: application/octet-stream\r\n\r\n").encode() + body)
        small = random_image(6)
        assert same(episode(RemoteTool(url), small), episode(CachedTool(Noisy()), small))
        time.sleep(2.5)  # past the deadline, without reading
        got, whole = 0, 1500 * 1500 * 4
        try:
            while part := deaf.recv(65536):
                got += len(part)
        except ConnectionResetError:
            pass
        deaf.close()
        assert got < whole
        assert predict(url, query(image=image_hash(image)))[0] == 200


def ended(line: socket.socket) -> bool:
    try:
        return line.recv(1000) == b""
    except ConnectionResetError:
        return True
    finally:
        line.close()


# who may ask


def test_with_a_token_nothing_but_health_is_told_without_it(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG), running(CachedTool(Noisy()), token=TOKEN) as (url, _):
        for header in (
            {},
            {"Authorization": f"Bearer {TOKEN}x"},
            {"Authorization": TOKEN},
            {"Authorization": "Bearer "},
        ):
            assert ask(url, "GET", "/v1/tool", headers=header)[0] == 401
            assert ask(url, "PUT", f"/v1/images/{NAME}", b"", header)[0] == 401
        assert ask(url, "GET", "/health")[0] == 200
        assert ask(url, "GET", "/v1/tool", headers={"Authorization": f"bearer {TOKEN}"})[0] == 200
        with pytest.raises(ServerError, match="wants a token: give token=, or set .MEDSEG_GYM_TOKEN"):
            RemoteTool(url)
        with pytest.raises(ServerError, match="wants a token"):
            RemoteTool(url, token="wrong")
        remote = RemoteTool(url, token=TOKEN)
        assert len(episode(remote, IMAGE)) == 3
        assert TOKEN not in repr(remote)
    assert TOKEN not in caplog.text


def test_the_token_may_come_from_the_environment_or_a_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("MEDSEG_GYM_TOKEN", raising=False)
    assert read_token(None) is None
    (tmp_path / "token").write_text(f"{TOKEN}\n")
    assert read_token(tmp_path / "token") == TOKEN
    with pytest.raises(MedSegError, match="no token can be read"):
        read_token(tmp_path / "nothing")
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(MedSegError, match="is empty"):
        read_token(tmp_path / "empty")
    with running(CachedTool(Noisy()), token=TOKEN) as (url, _):
        monkeypatch.setenv("MEDSEG_GYM_TOKEN", TOKEN)
        assert read_token(None) == TOKEN
        assert RemoteTool(url).name == "Stub"


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.1.2.3", "example.org", ""])
def test_beyond_loopback_it_does_not_start_without_a_token(host: str) -> None:
    with pytest.raises(MedSegError, match="needs a token"):
        check_binding(host, PORT, None)
    check_binding(host, PORT, TOKEN)


def test_places_and_tokens_that_are_never_taken() -> None:
    assert is_loopback("127.0.0.1") and is_loopback("::1") and is_loopback("localhost") and is_loopback("127.9.9.9")
    assert PORT != RAY_PORT == 8265
    with pytest.raises(MedSegError, match="Ray dashboard"):
        check_binding("127.0.0.1", 8265, None)
    with pytest.raises(MedSegError, match="port 70000"):
        check_binding("127.0.0.1", 70_000, None)
    for bad in ("short", "", "longer than sixteen\n characters", "schön ist es auch anderswo"):
        with pytest.raises(MedSegError, match="the token is shorter than 16 characters"):
            check_binding("127.0.0.1", PORT, bad)
    with running(CachedTool(Noisy())) as (url, _):
        twice = running(CachedTool(Noisy()), port=address(url)[1])
        with pytest.raises(MedSegError, match="cannot listen on 127.0.0.1 port"), twice:
            raise AssertionError


def test_without_a_token_web_pages_are_not_answered(small: tuple[str, ToolHost]) -> None:
    for headers in ({"Host": "evil.example"}, {"Host": "evil.example:80"}, {"Origin": "http://evil.example"}):
        assert ask(small[0], "GET", "/v1/tool", headers=headers)[0] == 403
    assert ask(small[0], "GET", "/v1/tool", headers={"Host": "localhost:1"})[0] == 200
