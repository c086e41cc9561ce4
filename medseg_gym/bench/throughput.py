"""How long an env-step takes beside the tool, and how fast the package imports."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from medseg_gym.envs import SegmentEnv, SegmentVectorEnv
from medseg_gym.images import image_hash
from medseg_gym.tools.base import ALL_PROMPTS, Memory
from medseg_gym.types import Embedding, Image, Prediction, Query, Sample

TURNS = 5  # of an episode, as the papers have it


class Instant:
    """A tool that answers at once with one of a few logits made beforehand: what is left of a step is the env."""

    name = "Instant"
    fingerprint = "Instant:0"
    prompts = ALL_PROMPTS
    memory: Memory = "cumulative"
    max_batch = 1

    def __init__(self, size: int) -> None:
        rows, columns = np.mgrid[:size, :size].astype(np.float32)
        self.answers = [
            Prediction(
                logits=(size / k - np.hypot(rows - size / 2, columns - size / 2)).astype(np.float32),
                predicted_iou=0.5,
                prior=np.zeros((64, 64), np.float32),
            )
            for k in (3, 4, 5, 6)
        ]

    def prior_shape(self, height: int, width: int) -> tuple[int, int]:
        return 64, 64

    def encode(self, images: Sequence[Image]) -> list[Embedding]:
        return [Embedding(image_hash(i), i.shape[0], i.shape[1], {}) for i in images]

    def predict(self, queries: Sequence[Query]) -> list[Prediction]:
        return [self.answers[len(query.prompts) % len(self.answers)] for query in queries]


class OneImage:
    """A dataset of one noisy image with a disc."""

    name = "OneImage"
    structures = ("disc",)

    def __init__(self, size: int) -> None:
        rows, columns = np.mgrid[:size, :size]
        image = np.random.default_rng(0).integers(0, 256, (size, size, 3), np.uint8)
        target = np.hypot(rows - size / 2, columns - size / 2) < size / 4
        image.flags.writeable = target.flags.writeable = False
        self.sample = Sample("OneImage/0/disc", image, target, "disc", "disc in noise", "0")

    def keys(self, split: str, structures: Sequence[str] = ()) -> tuple[str, ...]:
        return (self.sample.key,)

    def __getitem__(self, key: str) -> Sample:
        return self.sample


def env_step(size: int, *, steps: int = 2000, slots: int = 0) -> dict[str, Any]:
    """Milliseconds of one core for an env-step beside the tool, size x size in and out: median over five-turn episodes.

    `slots` 0 is the single env; otherwise the vector env, and the time is a slot's share of a step.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        common: dict[str, Any] = {"dataset": OneImage(size), "tool": Instant(size), "size": size, "horizon": 10_000}
        env: Any = SegmentVectorEnv(slots, **common) if slots else SegmentEnv(**common)
    rng = np.random.default_rng(0)
    vectors = np.concatenate([rng.integers(0, 2, (64, 1)), rng.integers(0, 1000, (64, 4))], axis=1)
    times, per = [], max(1, slots)
    for start in range(0, max(TURNS, steps // per), TURNS):
        env.reset(seed=start)
        for i in range(start, start + TURNS):
            action = np.tile(vectors[i % 64], (slots, 1)) if slots else vectors[i % 64]
            begun = time.process_time()  # the core's time, not the clock's: other processes do not count
            env.step(action)
            times.append((time.process_time() - begun) / per * 1000)
    return {"size": size, "slots": slots, "ms_per_step": statistics.median(times), "bare_ms": bare(size)}


def bare(size: int, repeats: int = 200) -> float:
    """Milliseconds of one core for the array work no env can avoid: mask, two counts, one masked copy; median."""
    import cv2

    image = np.random.default_rng(0).integers(0, 256, (size, size, 3), np.uint8)
    tinted, logits = image[::-1].copy(), Instant(size).answers[0].logits
    target = logits > 5
    times = []
    for _ in range(repeats):
        begun = time.process_time()
        mask = logits > 0
        np.count_nonzero(mask & target)
        np.count_nonzero(mask)
        view = image.copy()
        cv2.copyTo(tinted, mask.view(np.uint8), view)
        times.append((time.process_time() - begun) * 1000)
    return statistics.median(times)


def import_seconds(repeats: int = 5) -> dict[str, Any]:
    """Seconds of `import medseg_gym` in fresh interpreters (median), and whether torch came along."""
    code = (
        "import sys, time; t = time.perf_counter(); import medseg_gym; "
        "print(time.perf_counter() - t, 'torch' in sys.modules)"
    )
    lines = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
        for _ in range(repeats)
    ]
    return {
        "seconds": statistics.median(float(t) for t, _ in lines),
        "torch_loaded": any(loaded == "True" for _, loaded in lines),
    }
