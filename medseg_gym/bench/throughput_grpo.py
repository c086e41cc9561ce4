"""Where a GRPO step's time goes: tool, engine, learner, and what is left of the wall clock, which is the framework."""

from __future__ import annotations

import asyncio
import os
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from medseg_gym import tools
from medseg_gym.bench.throughput import OneImage
from medseg_gym.bench.throughput_tools import RANDOM_SAM2
from medseg_gym.rl import sync
from medseg_gym.rl.advantages import advantages
from medseg_gym.rl.batch import plan, rows_of
from medseg_gym.rl.config import GRPOConfig
from medseg_gym.rl.engines.base import GenRequest, GenResult, PolicyEngine
from medseg_gym.rl.jobs import Job, Settings
from medseg_gym.rl.loss import Objective
from medseg_gym.rl.rollout import play
from medseg_gym.rl.tokens import ChatTokens
from medseg_gym.rl.types import Rollout
from medseg_gym.types import Embedding, Image, Prediction, Query, Sample

Span = tuple[float, float]  # begun, done
QUANTILES = (50, 95, 99)
CASES = 256


class Noise(OneImage):
    """`OneImage` with its noise moved along, so that every case is an image of its own."""

    name = "Noise"

    def keys(self, split: str, structures: Sequence[str] = ()) -> tuple[str, ...]:
        return tuple(f"Noise/{i}/disc" for i in range(CASES))

    def __getitem__(self, key: str) -> Sample:
        image = np.roll(self.sample.image, int(key.split("/")[1]), axis=0)
        image.flags.writeable = False
        return Sample(key, image, self.sample.target, "disc", "disc in noise", key.split("/")[1])


class Recorded:
    """A tool that writes down when it worked, how much of a core that took, and what it encoded."""

    def __init__(self, tool: Any) -> None:
        self._tool = tool
        self.spans: list[Span] = []
        self.core_s, self.encodes = 0.0, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tool, name)

    def encode(self, images: Sequence[Image]) -> list[Embedding]:
        self.encodes += len(images)
        return self._timed(self._tool.encode, images)

    def predict(self, queries: Sequence[Query]) -> list[Prediction]:
        return self._timed(self._tool.predict, queries)

    def _timed(self, work: Any, given: Any) -> Any:
        begun, core = time.perf_counter(), time.thread_time()
        try:
            return work(given)
        finally:
            self.spans.append((begun, time.perf_counter()))
            self.core_s += time.thread_time() - core


class Watched:
    """An engine that writes down when requests were under way."""

    def __init__(self, engine: PolicyEngine) -> None:
        self._engine, self.lockstep = engine, engine.lockstep
        self.spans: list[Span] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    async def generate(self, request: GenRequest) -> GenResult:
        begun = time.perf_counter()
        try:
            return await self._engine.generate(request)
        finally:
            self.spans.append((begun, time.perf_counter()))

    async def generate_together(self, requests: Sequence[GenRequest]) -> list[GenResult]:
        begun = time.perf_counter()
        try:
            return await self._engine.generate_together(requests)
        finally:
            self.spans.append((begun, time.perf_counter()))


class Slow:
    """An env worker whose every turn takes so many seconds longer."""

    def __init__(self, worker: Any, seconds: float) -> None:
        self._worker, self._seconds = worker, seconds
        self.turns = 0
        self.last = 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._worker, name)

    async def step(self, slot: int, text: str, cut_off: bool = False) -> Any:
        await asyncio.sleep(self._seconds)
        seen = await self._worker.step(slot, text, cut_off)
        self.turns, self.last = self.turns + 1, time.perf_counter()
        return seen


@dataclass
class Parts:
    """What a step is made of."""

    workers: list[Any]
    engine: Watched
    learner: Any
    tool: Recorded
    tokens: ChatTokens
    config: GRPOConfig
    keys: list[str]
    turns: list[Mapping[str, float]] = field(default_factory=list)  # of the step under way


@dataclass(frozen=True)
class Scale:
    """How much is played, on what."""

    model: str
    device: str
    steps: int
    prompts: int
    rollouts: int
    workers: int
    size: int
    seed: int


def measure_grpo(
    model: str = "",
    *,
    device: str = "cpu",
    answer_s: Sequence[float] = (0.1, 0.5, 1.0),
    steps: int = 3,
    prompts: int = 2,
    rollouts: int = 8,
    workers: int = 2,
    size: int = 512,
    seed: int = 0,
) -> dict[str, Any]:
    """A GRPO step's parts, and how a slow env worker is felt by the others.

    Without `model` the engine is fake: an answer of 75 tokens takes `answer_s` seconds, any number at once, as on a GPU
    of its own; the tool is Nano and the learner has the tiny model, both on the CPU. With a checkpoint folder it is the
    transformers engine with SAM 2.1 tiny (random weights) on `device`, and `answer_s` is not used.

    framework_share is the share of a step's wall clock, the learner's own seconds left out, in which neither tool nor
    engine works: gaps between turns, planning, sync. framework_core_share is for how much of it the framework keeps a
    core busy while episodes are played: what it could cost at most, if nothing overlapped. learner_share is of the
    whole step. Medians over `steps` after a first one that is not counted; the learner takes part in the last one, at
    the first pace, where also the slow worker is measured.
    """
    scale = Scale(model, device, steps, prompts, rollouts, workers, size, seed)
    paces: Sequence[float] = (0.0,) if model else answer_s
    if not model:
        import torch

        torch.set_num_threads(1)  # a tool's helper threads could not be told from the framework's
    with tempfile.TemporaryDirectory() as folder:
        found = [asyncio.run(_measure(Path(folder), scale, pace, whole=not i)) for i, pace in enumerate(paces)]
    return {**asdict(scale), "engine": "hf" if model else "fake", "paces": found}


async def _measure(folder: Path, scale: Scale, pace: float, *, whole: bool) -> dict[str, Any]:
    parts = await _make(folder, scale, pace)
    try:
        rows, memory = [], []
        for step in range(scale.steps + 1):
            row = await _step(parts, scale, step, learns=whole and step == scale.steps)
            if step:  # the first one pays for imports and for the first call of everything
                rows.append(row)
                memory.append(row["rss_mb"])
        slope = float(np.polyfit(np.arange(len(memory)), memory, 1)[0]) if len(memory) > 1 else float("nan")
        found: dict[str, Any] = {"answer_s": pace, **_summary(rows), "rss_mb_per_step": slope, **_gpu(scale.device)}
        if whole and scale.workers > 1:
            found["one_slow_worker"] = await _barrier(parts, scale, max(pace, 0.05))
        return found
    finally:
        for part in (parts.engine, parts.learner, *parts.workers):
            await part.close()


async def _make(folder: Path, scale: Scale, pace: float) -> Parts:
    from medseg_gym.rl.engines.fake import FakeEngine
    from medseg_gym.rl.engines.hf import HFEngine
    from medseg_gym.rl.local_worker import LocalWorker
    from medseg_gym.rl.ranks import learner
    from medseg_gym.rl.tiny_model import save_tiny_model

    real, device, size = bool(scale.model), scale.device, scale.size
    checkpoint = Path(scale.model) if real else folder / "tiny"
    if not checkpoint.exists():
        save_tiny_model(checkpoint, scale.seed)
    tokens = ChatTokens.from_pretrained(checkpoint)
    config = GRPOConfig(
        model=str(checkpoint),
        out=str(folder),
        env="MedSeg-v0",
        seed=scale.seed,
        prompts=scale.prompts,
        rollouts=scale.rollouts,
        device=device,
        dtype="float32" if device == "cpu" else "bfloat16",
        size=size,
        max_new_tokens=128,
    )
    tool = Recorded(tools.make(RANDOM_SAM2, device=device, max_batch=scale.rollouts) if real else tools.make("Nano"))
    options = {"dataset": Noise(size), "tool": tool, "horizon": 5}
    slots = max(scale.rollouts, scale.prompts * scale.rollouts // scale.workers)
    workers = [LocalWorker("MedSeg-v0", slots, size=size, options=options) for _ in range(scale.workers)]
    engine: PolicyEngine
    if real:
        engine = HFEngine(checkpoint, tokens, device=device, dtype=config.dtype)
    else:
        engine = FakeEngine(_answers(), tokens, seconds_per_request=pace)
    trained = await learner(config, checkpoint, 1000)
    return Parts(workers, Watched(engine), trained, tool, tokens, config, await workers[0].keys("train"))


def _answers() -> list[str]:
    """Calls of the medsam-agent protocol, boxes mostly, 75 letters long."""
    box = '<tool_call>\n{{"name": "add_bbox", "arguments": {{"bbox_2d": [{}, {}, {}, {}]}}}}\n</tool_call>'
    point = '{{"name": "add_point", "arguments": {{"point_2d": [{}, {}], "point_type": "positive"}}}}'
    point = f"<tool_call>\n{point}\n</tool_call>"
    rng = np.random.default_rng(0)
    boxes = [box.format(*rng.integers(100, 400, 2), *rng.integers(500, 900, 2)) for _ in range(200)]
    return boxes + [point.format(*rng.integers(100, 900, 2)) for _ in range(100)]


async def _step(parts: Parts, scale: Scale, step: int, *, learns: bool) -> dict[str, Any]:
    """One step, taken apart."""
    config = parts.config
    parts.tool.spans, parts.engine.spans, parts.turns = [], [], []
    encodes, tool_core, core = parts.tool.encodes, parts.tool.core_s, time.process_time()
    marks = [time.perf_counter()]
    first = step * scale.prompts
    jobs = [Job(i, parts.keys[(first + i) % len(parts.keys)], scale.rollouts) for i in range(scale.prompts)]
    groups = await _played(parts, jobs, Settings.of(config, step))
    marks.append(time.perf_counter())
    core = time.process_time() - core - (parts.tool.core_s - tool_core)
    memory = rss()
    given = [values for group in groups for values in advantages(group)]
    members = [member for group in groups for member in group]
    planned = plan(rows_of(members, given, config), 1, config.micro_rows, config.micro_tokens)
    marks.append(time.perf_counter())
    learned = await parts.learner.step(planned, Objective.of(config)) if learns else {}
    marks.append(time.perf_counter())
    if learns:
        await _publish(parts, step)
    marks.append(time.perf_counter())
    played, planning, learning, syncing = np.diff(marks).tolist()
    busy = {"tool": covered(parts.tool.spans), "engine": covered(parts.engine.spans), "learner": learning}
    gaps = played - covered([*parts.tool.spans, *parts.engine.spans])
    others = played + planning + syncing
    found = {
        "play_s": played,
        "gaps_s": gaps,
        "plan_s": planning,
        "framework_share": (gaps + planning + syncing) / others,
        "env_steps_per_s": len(parts.turns) / played,
        "sampled_tokens_per_s": sum(turn["tokens"] for turn in parts.turns) / played,
        "prompt_tokens_per_s": sum(turn["prompt_tokens"] for turn in parts.turns) / played,
        "encodes_per_episode": (parts.tool.encodes - encodes) / len(members),
        "dropped_share": sum(bool(member.dropped) for member in members) / len(members),
        "latency_ms": _latency(parts.turns),
        "rss_mb": memory,
    }
    if not scale.model:  # a real engine's own work is on the same cores
        found["framework_core_share"] = core / others
        found["framework_core_ms_per_turn"] = 1000 * core / len(parts.turns)
    if learns:
        whole = others + learning
        found |= {"step_s": whole, "learn_s": learning, "sync_s": syncing, "learner_share": learning / whole}
        found |= {f"idle_{role}": 1 - seconds / whole for role, seconds in busy.items()}
        found |= {"mismatch_kl": learned["mismatch_kl"]} if scale.model else {}  # a fake answer has no probability
    return found


async def _played(parts: Parts, jobs: Sequence[Job], settings: Settings, workers: Any = None) -> list[list[Rollout]]:
    engine: Any = parts.engine
    watch = parts.turns.append
    playing = play(jobs, workers or parts.workers, engine, parts.tokens, settings, watch=watch)
    return sorted([group async for group in playing], key=lambda group: group[0].group)


async def _publish(parts: Parts, version: int) -> None:
    source = sync.publish(await parts.learner.weights(False), version, False)
    await parts.engine.pause()
    await parts.engine.update_weights(source)
    await parts.engine.resume()


async def _barrier(parts: Parts, scale: Scale, pace: float) -> dict[str, float]:
    """Turns a second of all workers but the first, alone and beside a first one that takes long for every turn."""
    speeds = []
    for slowness in (0.0, 10 * pace):
        workers = [Slow(worker, slowness if i == 0 else 0.0) for i, worker in enumerate(parts.workers)]
        jobs = [Job(i, parts.keys[-1 - i], scale.rollouts) for i in range(2 * len(workers))]
        begun = time.perf_counter()
        await _played(parts, jobs, Settings.of(parts.config, -1), workers)
        others = workers[1:]
        speeds.append(sum(worker.turns for worker in others) / (max(worker.last for worker in others) - begun))
    alone, beside = speeds
    return {"slower_by_s": 10 * pace, "others_alone": alone, "others_beside": beside, "ratio": beside / alone}


def covered(spans: Iterable[Span]) -> float:
    """Seconds in which at least one of the spans ran."""
    total, end = 0.0, -np.inf
    for begun, done in sorted(spans):
        if done > end:
            total += done - max(begun, end)
            end = done
    return float(total)


def _latency(turns: Sequence[Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Milliseconds of a turn and its parts at each quantile."""
    parts = {
        "turn": ("generate_s", "worker_s", "tokens_s"),
        "queue": ("queue_s",),
        "prefill": ("prefill_s",),
        "decode": ("decode_s",),
        "env": ("env_s",),
        "preprocessing": ("render_s", "tokens_s"),
    }
    values = {name: np.array([sum(turn[k] for k in keys) for turn in turns]) for name, keys in parts.items()}
    values["env_queue"] = np.array([turn["worker_s"] - turn["env_s"] - turn["render_s"] for turn in turns]).clip(0)
    return {name: {f"p{q}": 1000 * float(np.percentile(value, q)) for q in QUANTILES} for name, value in values.items()}


def _summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Medians over the steps that have a number."""
    out: dict[str, Any] = {}
    for name, newest in rows[-1].items():
        values = [row[name] for row in rows if name in row]
        out[name] = _summary(values) if isinstance(newest, Mapping) else float(np.median(values))
    return out


def _gpu(device: str) -> dict[str, float]:
    if not device.startswith("cuda"):
        return {}
    import torch

    return {"gpu_peak_mb": torch.cuda.max_memory_allocated() / 2**20}


def rss() -> float:
    """Megabytes of this process that lie in memory; nan where the system does not tell."""
    if not sys.platform.startswith("linux"):
        return float("nan")
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20
