"""A long run with env workers and a scripted engine in actors: no process grows with the iterations."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from grpo_parts import CUE, OneNumber, boxes, chat_tokens, settings

from medseg_gym.rl import sync
from medseg_gym.rl.cluster.engines import EngineRemote, RemoteEngine
from medseg_gym.rl.cluster.workers import RemoteWorker
from medseg_gym.rl.engines.fake import FakeEngine
from medseg_gym.rl.grpo import GRPO
from medseg_gym.rl.parts import Parts

ray = pytest.importorskip("ray")
psutil = pytest.importorskip("psutil")

ITERATIONS = int(os.environ.get("MEDSEG_GYM_SOAK", "0"))  # 200 take some minutes
MB_PER_100 = 4.0  # most that a process may grow over 100 iterations, once it has warmed up
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(not ITERATIONS, reason="a soak, by hand: MEDSEG_GYM_SOAK=200"),
]


def fake_engine() -> FakeEngine:
    return FakeEngine(boxes, chat_tokens())


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    monkeypatch.setenv("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    ray.init(address="local", num_cpus=4, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    yield
    ray.shutdown()


def own_megabytes(process: int) -> float:
    """What a process has for itself; pages of Ray's store are shared."""
    return float(psutil.Process(process).memory_full_info().uss) / 2**20


async def process_of(actor: Any) -> int:
    reference = actor.__ray_call__.remote(lambda _: __import__("os").getpid())
    return int(await asyncio.wrap_future(reference.future()))


def test_no_process_grows_over_the_iterations(cluster: None, tmp_path: Path) -> None:
    """Trap 18. Growth is the slope of a line through the second half of the iterations."""
    sizes: dict[str, list[float]] = {}
    given: dict[str, Any] = {"options": {"num_cpus": 0}, "timeout": 60.0}
    arguments = {"env": "MedSeg-Phantom-Stub-v0", "protocol": "tiny", "size": 64, "options": CUE}
    workers = [RemoteWorker(f"worker {i}", arguments, slots=8, history=True, **given) for i in range(2)]
    engine = EngineRemote("engine", "test_cluster_memory:fake_engine", {}, **given)

    async def whole() -> None:
        learner: Any = OneNumber()
        parts = Parts(workers, RemoteEngine([engine], lockstep=False), learner, chat_tokens(), sync.publish)
        try:
            for part in (*workers, engine):
                await part.alive()
            processes = {"driver": os.getpid()}
            processes |= {part.name: await process_of(part.actor) for part in (*workers, engine)}

            def show(step: int, *_: Any) -> None:
                learner.plans.clear()  # what the stand-in writes down
                for name, process in processes.items():
                    sizes.setdefault(name, []).append(own_megabytes(process))

            await GRPO(settings(tmp_path, iterations=ITERATIONS, save_every=50), parts, show=show).run()
        finally:
            await parts.close()

    asyncio.run(whole())
    for name, values in sizes.items():
        late = values[len(values) // 2 :]
        growth = 100 * float(np.polyfit(np.arange(len(late)), late, 1)[0])
        print(f"{name}: {values[0]:.1f} MB at first, {late[0]:.1f} in the middle, {values[-1]:.1f} at last, "
              f"{growth:+.2f} MB over 100 iterations")  # fmt: skip
        assert growth < MB_PER_100, name
