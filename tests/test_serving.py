"""The tool server: answers equal the local tool's bit for bit, whoever asks, whatever was evicted meanwhile."""

from __future__ import annotations

import json
import multiprocessing
import pickle
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from conftest import Blobs

from medseg_gym import tools
from medseg_gym.bench.evaluate import evaluate
from medseg_gym.errors import MedSegError, ToolUnavailableError
from medseg_gym.images import image_hash
from medseg_gym.tools.base import SegmentationTool
from medseg_gym.tools.cache import CachedTool
from medseg_gym.tools.conformance import check_tool, example_images, example_queries
from medseg_gym.tools.serving.client import RemoteTool
from medseg_gym.tools.serving.limits import Limits
from medseg_gym.tools.serving.remote import PIXELS, RefusedError, ServerError, ToolChangedError, UnreachableError
from medseg_gym.tools.serving.server import running
from medseg_gym.tools.stub import Stub
from medseg_gym.types import Box, Click, Embedding, Image, Prediction, Query


class Noisy(Stub):
    """A Stub whose answers are numbers of all sizes that hang on image, prompts and prior, and count its work."""

    def __init__(self, *, tag: str = "", max_batch: int = 8) -> None:
        super().__init__(max_batch=max_batch)
        self.fingerprint = f"Noisy:{tag}"
        self.encoded = 0
        self.passes: list[int] = []
        self.go = threading.Event()
        self.go.set()

    def prior_shape(self, height: int, width: int) -> tuple[int, int]:
        return 7, 5

    def encode(self, images: Sequence[Image]) -> list[Embedding]:
        self.encoded += len(images)
        return super().encode(images)

    def predict(self, queries: Sequence[Query]) -> list[Prediction]:
        self.passes.append(len(queries))
        assert self.go.wait(30)
        if any(p == Click(13, 13) for q in queries for p in q.prompts):
            raise ValueError("unlucky")
        return [self._noise(query) for query in queries]

    def _noise(self, query: Query) -> Prediction:
        seed = [int(query.embedding.image[:8], 16), *repr(query.prompts).encode()]
        if query.prior is not None:
            seed += list(query.prior.tobytes())
        rng = np.random.default_rng(seed)
        size = query.embedding.height, query.embedding.width
        logits = (rng.normal(0, 1, size) * 10.0 ** rng.integers(-30, 30, size)).astype(np.float32)
        return Prediction(logits, float(rng.random()), rng.normal(0, 9, (7, 5)).astype(np.float32))


def random_image(seed: int, height: int = 24, width: int = 32) -> Image:
    image = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    image.flags.writeable = False
    return image


def episode(tool: SegmentationTool, image: Image, turns: int = 3) -> list[Prediction]:
    """A box and clicks, each with the prior of the one before."""
    (embedding,) = tool.encode([image])
    answers: list[Prediction] = []
    prompts: tuple[Any, ...] = (Box(2, 2, 9, 9),)
    for turn in range(turns):
        prior = answers[-1].prior if answers else None
        answers += tool.predict([Query(embedding, prompts, prior)])
        prompts = (*prompts, Click(turn, turn + 1, bool(turn % 2)))
    return answers


def same(a: Sequence[Prediction], b: Sequence[Prediction]) -> bool:
    return len(a) == len(b) and all(
        np.array_equal(x.logits.view(np.uint32), y.logits.view(np.uint32))
        and np.array_equal(x.prior.view(np.uint32), y.prior.view(np.uint32))
        and repr(x.predicted_iou) == repr(y.predicted_iou)
        for x, y in zip(a, b, strict=True)
    )


@pytest.mark.parametrize("options", [{}, {"masks": "bits"}, {"masks": "rle", "upload": "png"}])
def test_conformance_through_the_server(options: dict[str, Any]) -> None:
    with running(CachedTool(Noisy())) as (url, _):
        check_tool(RemoteTool(url, **options))


def network() -> SegmentationTool:
    """SAM 2.1 of 64 pixels and a few channels, with random weights."""
    from test_sam2 import tiny_config

    from medseg_gym.tools.sam2 import Sam2Tool

    return Sam2Tool.from_config(tiny_config(), 0)


@pytest.mark.parametrize("make", [lambda: tools.make("Nano"), lambda: tools.make("GrabCut"), network])
def test_answers_of_real_tools_are_the_local_ones_bit_for_bit(make: Callable[[], SegmentationTool]) -> None:
    rng = np.random.default_rng(0)
    local = make()
    images = example_images(rng)
    queries = [q for e in local.encode(images) for q in _two(e, local, rng)]
    with running(CachedTool(make())) as (url, _):
        remote = RemoteTool(url)
        handles = {e.image: e for e in remote.encode(images)}
        asked = [Query(handles[q.embedding.image], q.prompts, q.prior) for q in queries]
        assert same(remote.predict(asked), local.predict(queries))
        assert (remote.name, remote.fingerprint) == (local.name, local.fingerprint)
        assert (remote.prompts, remote.memory, remote.max_batch) == (local.prompts, local.memory, local.max_batch)
        assert remote.prior_shape(33, 90) == local.prior_shape(33, 90)


def _two(embedding: Embedding, tool: SegmentationTool, rng: np.random.Generator) -> list[Query]:
    shape = tool.prior_shape(embedding.height, embedding.width)
    return example_queries(embedding, tool.prompts, shape, rng)[::11]


def test_masks_alone_have_the_same_masks_priors_and_predicted_iou() -> None:
    image = random_image(1, 37, 53)
    wanted = episode(CachedTool(Noisy()), image)
    with running(CachedTool(Noisy())) as (url, _):
        for masks in ("bits", "rle"):
            for answer, exact in zip(episode(RemoteTool(url, masks=masks), image), wanted, strict=True):
                assert np.array_equal(answer.logits > 0, exact.logits > 0)
                assert set(np.unique(answer.logits)) == {-10, 10}
                assert np.array_equal(answer.prior, exact.prior) and answer.predicted_iou == exact.predicted_iou


def test_predicted_iou_may_be_nan() -> None:
    with running(CachedTool(Stub())) as (url, _):
        (answer,) = episode(RemoteTool(url), random_image(0), turns=1)
        assert np.isnan(answer.predicted_iou)


def test_an_image_is_sent_and_encoded_once_whoever_asks() -> None:
    tool = Noisy()
    image = random_image(3)
    with running(CachedTool(tool)) as (url, host):
        uploads: list[str] = []
        put = host.put
        host.put = lambda name, image: (uploads.append(name), put(name, image))[1]  # type: ignore[method-assign]
        for _ in range(3):
            episode(RemoteTool(url), image.copy())
        assert uploads == [image_hash(image)] and tool.encoded == 1


def test_many_images_are_encoded_a_few_batches_a_request(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    plain = RemoteTool._encode

    def counted(self: RemoteTool, names: Sequence[str]) -> str:
        asked.append(len(names))
        return plain(self, names)

    monkeypatch.setattr(RemoteTool, "_encode", counted)
    tool = Noisy(max_batch=1)
    with running(CachedTool(tool)) as (url, _):
        RemoteTool(url).encode([random_image(seed) for seed in range(10)])
    assert tool.encoded == 10
    assert max(asked) == 4


def test_priors_stay_on_the_server_by_handle_and_travel_where_they_must() -> None:
    tool = Noisy()
    image = random_image(3)
    wanted = episode(CachedTool(Noisy()), image, 4)
    with running(CachedTool(tool)) as (url, host):
        remote = RemoteTool(url)
        sent: list[Any] = []
        predict = host.predict
        host.predict = lambda asks, owner: (sent.extend(a.prior for a in asks), predict(asks, owner))[1]  # type: ignore[method-assign]
        answers = episode(remote, image, 4)
        assert same(answers, wanted)
        assert [type(p) for p in sent] == [type(None), str, str, str]
        sent.clear()
        (embedding,) = remote.encode([image])
        query = Query(embedding, (Click(1, 1),), answers[0].prior.copy())  # equal numbers, and no handle
        (first,) = remote.predict([query])
        assert isinstance(sent[0], np.ndarray)
        host.priors.max_bytes = 0
        host.priors.put("flush", np.zeros(1, np.float32))
        (again,) = remote.predict([Query(embedding, (Click(1, 1),), answers[0].prior)])  # its handle is gone
        assert same([first], [again])
        assert [type(p) for p in sent] == [np.ndarray, str, np.ndarray]


def test_what_is_evicted_is_sent_again() -> None:
    images = [random_image(seed) for seed in range(6)]
    wanted = [episode(CachedTool(Noisy()), image) for image in images]
    room = Limits(image_bytes=2 * images[0].nbytes, pixels=24 * 32, prior_bytes=200)
    tool = Noisy()
    with running(CachedTool(tool, max_bytes=0), limits=room) as (url, host):
        remote = tools.load(url)
        for _ in range(2):
            for image, answers in zip(images, wanted, strict=True):
                assert same(episode(remote, image), answers)
        embeddings = remote.encode(images)
        assert same(remote.predict([Query(e, (Box(2, 2, 9, 9),)) for e in embeddings]), [w[0] for w in wanted])
        assert len(host.images) <= 2 and host.priors.bytes <= 200


def test_a_handle_keeps_the_image_as_it_was() -> None:
    image = random_image(5).copy()
    with running(CachedTool(Noisy())) as (url, host):
        remote = RemoteTool(url)
        (embedding,) = remote.encode([image])
        wanted = remote.predict([Query(embedding, (Click(1, 1),))])
        image[:] = 0
        host.images.put(embedding.image, np.zeros(0))
        host.images._arrays.clear()
        assert same(remote.predict([Query(embedding, (Click(1, 1),))]), wanted)
        assert embedding.image == image_hash(embedding.features[PIXELS])


def test_requests_of_many_clients_share_forward_passes() -> None:
    tool = Noisy()
    image = random_image(2)
    local = CachedTool(Noisy())
    (embedding,) = local.encode([image])
    queries = [Query(embedding, (Click(i, i),)) for i in range(12)]
    wanted = local.predict(queries)
    with running(CachedTool(tool)) as (url, host), ThreadPoolExecutor(12) as pool:
        remotes = [RemoteTool(url) for _ in queries]
        handles = [remote.encode([image])[0] for remote in remotes]
        tool.go.clear()
        asked = [
            pool.submit(remote.predict, [Query(handle, query.prompts)])
            for remote, handle, query in zip(remotes, handles, queries, strict=True)
        ]
        while not tool.passes or sum(tool.passes) + host.batcher.counters()["waiting"] < 12:
            pass
        tool.go.set()
        assert same([future.result(30)[0] for future in asked], wanted)
    assert sum(tool.passes) == 12 and len(tool.passes) <= 4 and max(tool.passes) == 8


def test_a_query_that_fails_is_its_own_clients_only() -> None:
    tool = Noisy()
    image = random_image(2)
    with running(CachedTool(tool)) as (url, host), ThreadPoolExecutor(4) as pool:
        remote = RemoteTool(url)
        (embedding,) = remote.encode([image])
        tool.go.clear()
        asked = [pool.submit(remote.predict, [Query(embedding, (Click(x, x),))]) for x in (1, 2, 13, 4)]
        while not tool.passes or sum(tool.passes) + host.batcher.counters()["waiting"] < 4:
            pass
        tool.go.set()
        for future, x in zip(asked, (1, 2, 13, 4), strict=True):
            if x == 13:
                with pytest.raises(RefusedError, match="Stub refused: unlucky"):
                    future.result(30)
            else:
                assert same(future.result(30), Noisy().predict([Query(embedding, (Click(x, x),))]))


def test_another_tool_behind_the_same_address_is_noticed() -> None:
    tool = Noisy(tag="before")
    with running(CachedTool(tool)) as (url, _):
        remote = RemoteTool(url)
        (embedding,) = remote.encode([random_image(1)])
        tool.fingerprint = "Noisy:after"
        for call in (
            lambda: remote.predict([Query(embedding, (Click(1, 1),))]),
            lambda: remote.encode([random_image(1)]),
            lambda: remote.prior_shape(9, 9),
        ):
            with pytest.raises(ToolChangedError, match="answers as Noisy:after and was Noisy:before"):
                call()


def test_a_restarted_server_is_asked_again_and_gets_what_it_lost() -> None:
    image = random_image(1)
    wanted = episode(CachedTool(Noisy()), image)
    with running(CachedTool(Noisy())) as (url, _):
        remote = RemoteTool(url)
        (embedding,) = remote.encode([image])
        (first,) = remote.predict([Query(embedding, (Box(2, 2, 9, 9),))])
    port = int(url.rpartition(":")[2])
    with running(CachedTool(Noisy()), port=port):
        prompts = Box(2, 2, 9, 9), Click(0, 1, False)
        assert same([first, *remote.predict([Query(embedding, prompts, first.prior)])], wanted[:2])


def test_a_run_whose_server_is_gone_ends_and_goes_on_when_it_is_back(blobs: Blobs, tmp_path: Any) -> None:
    """A dead server fails no case: the remaining ones would stand in the results as zeros for good."""

    settings: dict[str, Any] = {
        "dataset": blobs,
        "tool_options": {"retries": 0},
        "cases": 6,
        "num_envs": 2,
        "report": False,
    }
    with running(CachedTool(Stub())) as (url, _):
        remote: Any = tools.load(url, retries=0).tool
        answer, calls = remote._predict, iter(range(99))

        def predict(*asked: Any) -> Any:
            if next(calls) == 5:
                raise UnreachableError("no tool server answers")
            return answer(*asked)

        remote._predict = predict
        with pytest.raises(ToolUnavailableError, match="no tool server answers"):
            evaluate("MedSeg-v0", "OracleClicks", out=tmp_path / "run", tool=url, **settings)
        found = evaluate("MedSeg-v0", "OracleClicks", out=tmp_path / "run", tool=url, **settings)
    assert [episode.ended == "failed" for episode in found.episodes] == [False] * 6
    assert next(calls) > 9


def test_no_server_and_no_address_are_told() -> None:
    with pytest.raises(ServerError, match="no tool server answers at http://127.0.0.1:1 .*tools serve"):
        RemoteTool("http://127.0.0.1:1", retries=0)
    for bad in ("http://", "ftp://localhost:1", "http://user:secret@localhost:1", "http://localhost:1?token=secret"):
        with pytest.raises(MedSegError, match="not a tool server's address") as caught:
            RemoteTool(bad)
        assert "secret" not in str(caught.value)


def test_it_is_a_tool_of_gym_make_with_the_episodes_of_the_local_one(blobs: Blobs) -> None:
    with running(tools.load("Nano")) as (url, _):
        for spec in (url, "Nano"):
            env = gym.make("MedSeg-v0", dataset=blobs, tool=spec, structures="disc", size=64)
            seen = [env.reset(seed=1)[0]]
            for action in ([2, 300, 300, 700, 700], [0, 400, 400, 0, 0], [1, 100, 100, 0, 0]):
                seen.append(env.step(np.array(action))[0])
            if spec == url:
                remote, fingerprint = seen, env.unwrapped.tool.fingerprint  # type: ignore[attr-defined]
        assert all(np.array_equal(a, b) for a, b in zip(remote, seen, strict=True))
        assert fingerprint == tools.load("Nano").fingerprint


def test_evaluation_writes_the_same_episodes(blobs: Blobs, tmp_path: Any) -> None:
    with running(tools.load("GrabCut")) as (url, _):
        for name, tool in (("remote", url), ("local", "GrabCut")):
            evaluate(
                "MedSeg-v0", "OracleBoxThenClicks", out=tmp_path / name, cases=3, dataset=blobs, tool=tool, report=False
            )
    texts = [(tmp_path / name / "episodes.jsonl").read_text() for name in ("remote", "local")]
    assert texts[0] == texts[1] and len(texts[0].splitlines()) == 3


def test_a_servers_token_is_in_no_file_of_a_run(blobs: Blobs, tmp_path: Any) -> None:
    with running(CachedTool(Stub()), token="very-secret-token") as (url, _):
        given = {"token": "very-secret-token", "retries": 2}
        evaluate("MedSeg-v0", "BoxOnce", out=tmp_path, dataset=blobs, tool=url, tool_options=given, cases=2)
    written = {file.name: file.read_text() for file in tmp_path.iterdir() if file.is_file()}
    assert "summary.json" in written and "retries" in written["summary.json"]
    assert not [name for name, text in written.items() if "secret" in text]


def test_it_can_be_pickled_and_shared_by_threads() -> None:
    image = random_image(8)
    wanted = episode(CachedTool(Noisy()), image)
    with running(CachedTool(Noisy(max_batch=1))) as (url, _), ThreadPoolExecutor(8) as pool:
        remote = pickle.loads(pickle.dumps(RemoteTool(url, masks="logits", timeout=60)))
        for future in [pool.submit(episode, remote, image) for _ in range(24)]:
            assert same(future.result(60), wanted)


def _client(url: str, seed: int, results: Any) -> None:
    answers = episode(tools.load(url), random_image(seed % 3))
    results.put((seed, pickle.dumps(answers)))


@pytest.mark.slow
def test_sixteen_clients_of_several_processes_get_the_local_bits() -> None:
    wanted = [episode(CachedTool(Noisy()), random_image(seed)) for seed in range(3)]
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    with running(CachedTool(Noisy())) as (url, _), ThreadPoolExecutor(12) as pool:
        processes = [context.Process(target=_client, args=(url, seed, results)) for seed in range(4)]
        for process in processes:
            process.start()
        threads = [pool.submit(_client, url, seed, results) for seed in range(4, 16)]
        got = [results.get(timeout=120) for _ in range(16)]
        for process in processes:
            process.join(30)
        assert not any(thread.exception() for thread in threads)
    assert {seed for seed, _ in got} == set(range(16))
    assert all(same(pickle.loads(answers), wanted[seed % 3]) for seed, answers in got)


def test_the_counters_tell_what_was_merged_and_kept() -> None:
    with running(CachedTool(Noisy())) as (url, _):
        remote = RemoteTool(url)
        episode(remote, random_image(0))
        told = remote.counters()
        assert told["batcher"] == {"passes": 3, "answered": 4, "failed": 0, "waiting": 0}
        assert told["cache"]["encodes"] == 1 and told["images"] == 1 and told["priors"] == 3
        json.dumps(told)
