"""GRPO on a Ray cluster equals GRPO in one process: undisturbed, with parts killed, with nodes that come and go."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from grpo_parts import CUE, settings, stand_ins

from medseg_gym.errors import MedSegError, UnknownNameError
from medseg_gym.rl.cluster.parts import cluster_parts
from medseg_gym.rl.cluster.workers import RemoteWorker, make
from medseg_gym.rl.config import GRPOConfig
from medseg_gym.rl.grpo import GRPO, train
from medseg_gym.rl.parts import Parts
from medseg_gym.rl.runlog import read_metrics
from medseg_gym.tools.stub import Stub

ray = pytest.importorskip("ray")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

ROOT = Path(__file__).resolve().parents[1]
TIMED = ("time/", "idle/", "speed/")
HEAD_CPUS = 6


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """One node, to which tests may add others. One thread everywhere: sums hang on their number."""
    import torch
    from ray.cluster_utils import Cluster

    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("MEDSEG_GYM_HOME", str(tmp_path_factory.mktemp("home")))  # with no data in it
        patch.setenv("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
        torch.set_num_threads(1)
        made = Cluster(initialize_head=True, head_node_args={"num_cpus": HEAD_CPUS, "include_dashboard": False})
        ray.init(address=made.address, logging_level="ERROR", log_to_driver=False)
        yield made
        ray.shutdown()
        made.shutdown()
        torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def learn_cue() -> ModuleType:
    """baselines/learn_cue.py, which is no package."""
    spec = importlib.util.spec_from_file_location("learn_cue", ROOT / "baselines" / "learn_cue.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(ROOT / "baselines"))
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def taught(learn_cue: ModuleType, cluster: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that answers with a box often enough for rewards to differ."""
    given = {"steps": 80, "batch": 16, "lr": 2e-3}
    folder: Path = learn_cue.supervised(0, tmp_path_factory.mktemp("cue"), given, demonstrations=96)
    return folder


@pytest.fixture(scope="module")
def run_of(learn_cue: ModuleType, taught: Path) -> Callable[..., GRPOConfig]:
    def config(out: Path, **given: Any) -> GRPOConfig:
        small = {"iterations": 4, "prompts": 2, "rollouts": 4, "lr": 1e-3, "slots": 8, "workers": 2, "save_every": 2}
        made: GRPOConfig = learn_cue.grpo_config(0, taught, out, {**small, "call_timeout": 120.0, **given})
        return made

    return config


@pytest.fixture(scope="module")
def alone(run_of: Callable[..., GRPOConfig], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run in one process."""
    out = tmp_path_factory.mktemp("runs") / "alone"
    train(run_of(out))
    return out


def numbers(out: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in record.items() if not k.startswith(TIMED)} for record in read_metrics(out)]


def same_results(one: Path, two: Path) -> None:
    from safetensors.numpy import load_file

    assert numbers(one) == numbers(two)
    expected, found = (load_file(out / "final" / "model.safetensors") for out in (one, two))
    assert expected.keys() == found.keys()
    for name in expected:
        assert np.array_equal(found[name], expected[name]), name


def test_a_cluster_with_two_env_workers_trains_the_same_weights_as_one_process(
    cluster: Any, run_of: Callable[..., GRPOConfig], alone: Path, taught: Path, tmp_path: Path
) -> None:
    from safetensors.numpy import load_file

    train(run_of(tmp_path / "cluster", cluster="local"))
    same_results(alone, tmp_path / "cluster")
    start, end = load_file(taught / "model.safetensors"), load_file(alone / "final" / "model.safetensors")
    assert any(not np.array_equal(start[name], end[name]) for name in end)
    assert ray.is_initialized()  # it was not started for this run, so it is not ended with it


async def process_of(actor: Any) -> int:
    reference = actor.__ray_call__.remote(lambda _: __import__("os").getpid())
    return int(await asyncio.wrap_future(reference.future()))


class Killing:
    """A part whose calls of `method`, by their number, end a process while they are under way."""

    def __init__(self, inner: Any, method: str, victims: dict[int, Callable[[], Awaitable[int]]]) -> None:
        self.inner, self.method, self.victims, self.calls, self.killed = inner, method, victims, 0, list[int]()

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.inner, name)
        if name != self.method:
            return found

        async def call(*given: Any, **named: Any) -> Any:
            self.calls += 1
            victim = self.victims.pop(self.calls, None)
            process = None if victim is None else await victim()
            work = asyncio.ensure_future(found(*given, **named))
            if process is not None:
                await asyncio.sleep(0.02)
                os.kill(process, signal.SIGKILL)
                self.killed.append(process)
            return await work

        return call


def test_one_of_each_part_killed_in_mid_iteration_leaves_the_result_as_it_is(
    cluster: Any, run_of: Callable[..., GRPOConfig], alone: Path, tmp_path: Path
) -> None:
    """Trap 17: env worker and engine while episodes are played, tool actor, and the learner in its step, which takes
    the run back to a checkpoint. The tool is shared by both workers, in one process each has its own."""
    said: list[str] = []
    config = run_of(tmp_path / "killed", cluster="local", tool_actors=1)

    async def whole() -> None:
        parts = await cluster_parts(config)
        workers: Any = parts.workers
        engine: Any = parts.engine
        tool = workers[0].arguments["tool_actor"].actor
        ranks = parts.learner._processes  # type: ignore[attr-defined]
        killing = Killing(
            engine,
            "generate_together",
            {
                2: lambda: process_of(workers[0].actor),
                6: lambda: process_of(engine.engines[0].actor),
                9: lambda: process_of(tool),
            },
        )
        learner = Killing(parts.learner, "step", {3: lambda: process_of(ranks.actors[0])})
        try:
            await GRPO(config, replace(parts, engine=killing, learner=learner), say=said.append).run()
        finally:
            await parts.close()
        assert len(killing.killed) == 3 and len(learner.killed) == 1
        assert workers[0].life >= 2 and engine.engines[0].life == 2

    asyncio.run(whole())
    assert len([line for line in said if "all ranks begin again" in line]) == 1
    same_results(alone, tmp_path / "killed")


def test_a_worker_with_a_tool_actor_leaves_the_tools_options_to_it() -> None:
    options = {**CUE, "tool_options": {"device": "cuda"}}
    tool = Stub()
    made = make(tool_actor=tool, options=options, env="MedSeg-Phantom-Stub-v0", slots=1, protocol="tiny", size=64)
    assert made.env.engine.tool.tool._tool is tool
    asyncio.run(made.close())


def remote_worker(number: int, **settings: Any) -> RemoteWorker:
    arguments = {"env": "MedSeg-Phantom-Stub-v0", "protocol": "tiny", "size": 64, "options": CUE}
    given = {"slots": 8, "history": True, "options": {"num_cpus": HEAD_CPUS - 1}, "timeout": 60.0, **settings}
    return RemoteWorker(f"env worker {number}", arguments, **given)


def test_a_node_that_joins_late_plays_and_one_that_leaves_is_not_missed(cluster: Any, tmp_path: Path) -> None:
    """The head has room for one of two workers; the other waits for a node, which goes again in mid-iteration."""

    async def whole() -> tuple[RemoteWorker, list[int]]:
        parts = stand_ins()
        workers = [remote_worker(0), remote_worker(1)]
        asked: list[int] = []
        nodes: list[Any] = []

        class Events:
            """The engine, by whose requests nodes come and go."""

            def __getattr__(self, name: str) -> Any:
                return getattr(parts.engine, name)

            async def generate(self, request: Any) -> Any:
                asked.append(workers[1].life)
                if len(asked) == 10:  # of the first iteration: the second worker has found no place
                    assert not workers[1].there and workers[0].there
                    nodes.append(cluster.add_node(num_cpus=HEAD_CPUS))  # it wants the main thread
                    await workers[1].alive()
                if len(asked) == 90:
                    assert workers[1].there
                    cluster.remove_node(nodes[0], allow_graceful=False)
                return await parts.engine.generate(request)

        given = Parts(workers, Events(), parts.learner, parts.tokens, parts.publish)  # type: ignore[arg-type]
        try:
            await GRPO(settings(tmp_path / "nodes", iterations=6), given).run()
        finally:
            await given.close()
            for worker in parts.workers:
                await worker.close()
        return workers[1], asked

    worker, asked = asyncio.run(whole())
    assert len(asked) > 100 and not worker.there

    async def undisturbed() -> None:
        parts = stand_ins()
        try:
            await GRPO(settings(tmp_path / "whole", iterations=6), parts).run()
        finally:
            await parts.close()

    asyncio.run(undisturbed())
    assert numbers(tmp_path / "nodes") == numbers(tmp_path / "whole")


def test_workers_that_find_no_place_at_all_end_the_run(cluster: Any, tmp_path: Path) -> None:
    async def whole() -> None:
        parts = stand_ins()
        worker = remote_worker(0, options={"num_cpus": 999}, patience=2.0)
        given = Parts([worker], parts.engine, parts.learner, parts.tokens, parts.publish)
        try:
            await GRPO(settings(tmp_path), given).run()
        finally:
            await parts.close()
            await worker.close()

    with pytest.raises(MedSegError, match="env worker 0 could not be brought back"):
        asyncio.run(whole())


def test_what_a_worker_lacks_is_said_as_in_one_process(cluster: Any) -> None:
    """An unknown dataset option by its name with what is known; data that are not there and how to get them."""

    async def keys(env: str, options: Any) -> None:
        worker = remote_worker(0, options={"num_cpus": 1})
        worker.arguments.update(env=env, options=options)
        try:
            await worker.keys("train")
        finally:
            await worker.close()

    with pytest.raises(UnknownNameError, match="unknown task 'queue'"):
        asyncio.run(keys("MedSeg-Phantom-Stub-v0", {"dataset_options": {"task": "queue"}}))
    with pytest.raises(MedSegError, match="medseg-gym data prepare BTCV"):
        asyncio.run(keys("MedSeg-BTCV-Stub-v0", {}))
