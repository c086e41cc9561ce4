"""The tool as a Ray actor: conformance, many workers, and an actor that is killed and comes back."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_serving import Noisy, episode, random_image, same

from medseg_gym.errors import MedSegError
from medseg_gym.tools.cache import CachedTool
from medseg_gym.tools.conformance import check_tool
from medseg_gym.tools.serving.actor import ActorTool, start_actor
from medseg_gym.tools.serving.remote import RefusedError, ServerError
from medseg_gym.types import Click, Prediction, Query

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.slow
HERE = Path(__file__).parent
SLOW = "test_serving_actor:SlowNoisy"


class SlowNoisy(Noisy):
    """A Noisy of one query a pass, whose pass takes half a second."""

    def __init__(self) -> None:
        super().__init__(max_batch=1)

    def predict(self, queries: Sequence[Query]) -> list[Prediction]:
        time.sleep(0.5)
        return super().predict(queries)


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    path = os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH", "")]))
    sys.path.insert(0, str(HERE))
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        logging_level="ERROR",
        log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": path, "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"}},
    )
    yield
    ray.shutdown()
    sys.path.remove(str(HERE))


@pytest.fixture(scope="module")
def noisy(cluster: None) -> ActorTool:
    return start_actor("test_serving:Noisy", ray_options={"num_cpus": 0})


def kill(tool: ActorTool) -> None:
    """Kills the actor's process with the signal that nothing catches."""
    os.kill(ray.get(tool.actor.__ray_call__.remote(lambda _: os.getpid())), signal.SIGKILL)


def test_conformance_through_the_actor(noisy: ActorTool) -> None:
    check_tool(noisy)


def test_it_comes_back_after_a_kill_between_calls_and_within_one(cluster: None) -> None:
    image = random_image(1)
    wanted = episode(CachedTool(Noisy()), image)
    tool = start_actor(SLOW, max_restarts=2)
    assert same(episode(tool, image), wanted)
    (embedding,) = tool.encode([image])
    (first,) = tool.predict([Query(embedding, (Click(5, 5),))])
    kill(tool)  # the image and every prior are gone with it
    (again,) = tool.predict([Query(embedding, (Click(5, 5),), first.prior)])
    assert same([again], Noisy().predict([Query(embedding, (Click(5, 5),), first.prior)]))
    assert tool.counters()["cache"]["encodes"] == 1
    killer = threading.Timer(0.2, kill, [tool])
    killer.start()
    assert same(episode(tool, image), wanted)
    killer.join()


def test_an_actor_that_is_gone_for_good_is_told(cluster: None) -> None:
    tool = start_actor("Stub", max_restarts=0, timeout=60)
    kill(tool)
    with pytest.raises(ServerError, match="actor is gone"):
        tool.encode([random_image(1)])


def test_a_tool_that_cannot_be_loaded_is_told(cluster: None) -> None:
    with pytest.raises(ServerError, match="unknown tool 'Stubb'; did you mean 'Stub'"):
        start_actor("Stubb", max_restarts=0)


def test_a_call_that_takes_too_long_is_given_up(cluster: None) -> None:
    tool = start_actor(SLOW, ray_options={"num_cpus": 0})
    (embedding,) = tool.encode([random_image(1)])
    tool.timeout = 0.1
    with pytest.raises(ServerError, match="gave no answer within 0.1 s"):
        tool.predict([Query(embedding, (Click(1, 1),))])


def test_workers_share_it_and_errors_reach_the_one_they_concern(noisy: ActorTool) -> None:
    tool, before = noisy, noisy.counters()["cache"]["encodes"]

    @ray.remote
    def work(tool: ActorTool, seed: int) -> Any:
        return episode(tool, random_image(seed % 2))

    wanted = [episode(CachedTool(Noisy()), random_image(seed)) for seed in range(2)]
    for seed, answers in enumerate(ray.get([work.remote(tool, seed) for seed in range(6)], timeout=120)):
        assert same(answers, wanted[seed % 2])
    assert tool.counters()["cache"]["encodes"] == before + 2
    (embedding,) = tool.encode([random_image(0)])
    with pytest.raises(RefusedError, match="unlucky"):
        tool.predict([Query(embedding, (Click(13, 13),))])
    with pytest.raises(MedSegError, match="a query without prompts"):
        tool.predict([Query(embedding, ())])
    prior = np.zeros((7, 5), np.float32)
    query = Query(embedding, (Click(1, 1),), prior)
    assert same(tool.predict([query]), Noisy().predict([query]))
