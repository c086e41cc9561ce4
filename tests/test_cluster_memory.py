"""A long run with env workers and a scripted engine in actors: no process grows with the iterations.

`MEDSEG_GYM_SOAK=200 MEDSEG_GYM_SOAK_RESULT=benchmarks/results/cluster_memory.json pytest tests/test_cluster_memory.py`
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from grpo_parts import CUE, OneNumber, boxes, chat_tokens, settings

from medseg_gym.bench.evaluate import machine
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
    pytest.mark.timeout(7200),
    pytest.mark.skipif(not ITERATIONS, reason="a soak, by hand: MEDSEG_GYM_SOAK=200"),
]


def fake_engine() -> FakeEngine:
    return FakeEngine(boxes, chat_tokens())


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    path = filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path))
    monkeypatch.setenv("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    ray.init(address="local", num_cpus=4, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    yield
    ray.shutdown()


def megabytes(process: int) -> tuple[float, float]:
    """What a process has resident, and what of it is its own: pages of Ray's store are shared."""
    said = psutil.Process(process).memory_full_info()
    return float(said.rss) / 2**20, float(said.uss) / 2**20


def slope(values: list[float]) -> float:
    """Growth over 100 iterations, of a line through the second half."""
    late = values[len(values) // 2 :]
    return 100 * float(np.polyfit(np.arange(len(late)), late, 1)[0])


def write_result(sizes: dict[str, list[tuple[float, float]]], seconds: float) -> None:
    """The result's file, where one is asked for."""
    if not (file := os.environ.get("MEDSEG_GYM_SOAK_RESULT", "")):
        return
    asked = ["git", "describe", "--always", "--dirty", "--abbrev=7"]
    commit = subprocess.run(asked, capture_output=True, text=True, check=True)
    processes = {
        name: {
            "growth_mb_per_100": round(slope([own for _, own in values]), 3),
            "own_mb": [round(own, 1) for _, own in values[::10]],
            "rss_mb": [round(rss, 1) for rss, _ in values[::10]],
        }
        for name, values in sizes.items()
    }
    said = {
        "command": f"MEDSEG_GYM_SOAK={ITERATIONS} pytest tests/test_cluster_memory.py",
        "machine": machine(),
        "commit": commit.stdout.strip(),
        "iterations": ITERATIONS,
        "seconds": round(seconds, 1),
        "note": "every 10th iteration; growth is the slope of own_mb (USS) over the second half; most allowed "
        f"{MB_PER_100:g} MB",
        "processes": processes,
    }
    part = Path(f"{file}.part")
    part.write_text(json.dumps(said, indent=1) + "\n", encoding="utf-8")
    part.replace(file)


async def process_of(actor: Any) -> int:
    reference = actor.__ray_call__.remote(lambda _: __import__("os").getpid())
    return int(await asyncio.wrap_future(reference.future()))


def test_no_process_grows_over_the_iterations(cluster: None, tmp_path: Path) -> None:
    """Trap 18. Growth is the slope of a line through the second half of the iterations."""
    sizes: dict[str, list[tuple[float, float]]] = {}
    begun = time.perf_counter()
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
                    sizes.setdefault(name, []).append(megabytes(process))

            await GRPO(settings(tmp_path, iterations=ITERATIONS, save_every=50), parts, show=show).run()
        finally:
            await parts.close()

    asyncio.run(whole())
    for name, values in sizes.items():
        own = [megabytes for _, megabytes in values]
        print(f"{name}: {own[0]:.1f} MB at first, {own[len(own) // 2]:.1f} in the middle, {own[-1]:.1f} at last, "
              f"{slope(own):+.2f} MB over 100 iterations")  # fmt: skip
        assert slope(own) < MB_PER_100, name
    write_result(sizes, time.perf_counter() - begun)
