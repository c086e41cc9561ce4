"""What encoding once, batching and serving are worth: actions a second of a tool, each way of asking in one run."""

from __future__ import annotations

import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np

from medseg_gym import tools
from medseg_gym.errors import MedSegError
from medseg_gym.tools.base import SegmentationTool, advance, empty_state
from medseg_gym.tools.cache import CachedTool
from medseg_gym.types import Box, Click, MaskState, Prompt, Query, Sample

RANDOM_SAM2 = "medseg_gym.bench.throughput_tools:random_sam2"
DECODES = 5  # of each kind in a round; they are short, so several in turn, that a slow moment hits all alike
PATIENCE = 1800.0  # seconds for an answer of the server, on a machine that others use too
TURN = 4  # the action of an episode that is timed: a box and two clicks stand already


def random_sam2(*, size: str = "T", image_size: int = 1024, seed: int = 0, **options: Any) -> SegmentationTool:
    """SAM 2.1 with random weights, at full size: it costs what the trained one costs."""
    from medseg_gym.tools.sam2 import Sam2Tool
    from medseg_gym.tools.sam2_config import sam21_config

    return Sam2Tool.from_config(sam21_config(size, image_size), seed, name=f"SAM2.1{size}-random", **options)


def measure_tools(
    tool: str = RANDOM_SAM2,
    options: Mapping[str, Any] | None = None,
    *,
    device: str | None = "cpu",
    envs: int = 8,
    images: int = 2,
    batch: int = 8,
    actions: Sequence[int] = (5, 40),
    rounds: int = 3,
    side: int = 512,
    seed: int = 0,
) -> dict[str, Any]:
    """Actions a second of a tool on (side, side) images, the prompts the same in all ways of asking.

    one env: `encode_always` encodes the image at every action, one request at a time; `warm` finds it in the cache;
    `served` asks a tool server in another process on this machine; `cold` is an episode of so many actions on an image
    that no cache has seen. several envs on a few images, all in the cache: `batched` by max_batch, `served_clients`
    with a thread each.
    `limit` is (encode + decode) / decode of the bare tool, the most that a cache can give, and `share_of_limit` what
    warm / encode_always is of it. `server_share` is what the server adds to an action, in decodes: the median over
    pairs taken in turn. All are medians over `rounds` interleaved rounds; times are seconds. device=None: a tool
    without that option.
    """
    given = {**(options or {}), **({} if device is None else {"device": device})}
    one, many = (CachedTool(tools.make(tool, **given, max_batch=size)) for size in (1, batch))
    many.cache = one.cache  # the same tool but for its batches, so one encode serves both
    always = CachedTool(one.tool, max_bytes=0)
    rng = np.random.default_rng(seed)
    drawn = [_sample(side, rng, str(i)) for i in range(images)]
    samples = [drawn[i % images] for i in range(envs)]
    prompts = _prompts(side, rng, TURN)
    with _served(tool, given) as url:
        served = tools.load(url, timeout=PATIENCE)
        stood = [_episode(one, sample, prompts[:-1]) for sample in drawn]
        before = [stood[i % images] for i in range(envs)]
        bare = _bare(one, samples[0], before[0], prompts[-1])
        ways: dict[str, Callable[[], object]] = {
            "decode": lambda: one.tool.predict([bare]),
            "warm": lambda: advance(one, samples[:1], before[:1], prompts[-1:]),
            "served": lambda: advance(served, samples[:1], before[:1], prompts[-1:]),
        }
        rare: dict[str, Callable[[], object]] = {
            "encode": lambda: one.tool.encode([samples[0].image]),
            "encode_always": lambda: advance(always, samples[:1], before[:1], prompts[-1:]),
            "batched_1": lambda: advance(one, samples, before, prompts[-1:] * envs),
            f"batched_{batch}": lambda: advance(many, samples, before, prompts[-1:] * envs),
            "served_clients": lambda: _clients(served, samples, before, prompts[-1]),
        }
        seconds = _interleaved(rare, ways, rounds, device)
        cold = {n: _time(lambda n=n: _cold(one.tool, samples[0], side, seed, n), device) for n in actions}  # type: ignore[misc]
        counters = dict(getattr(served.tool, "counters", dict)())
    median = {name: statistics.median(values) for name, values in seconds.items()}
    added = statistics.median(a - b for a, b in zip(seconds["served"], seconds["warm"], strict=True))
    gain = median["encode_always"] / median["warm"]
    limit = (median["encode"] + median["decode"]) / median["decode"]
    return {
        "tool": one.name,
        "device": device or "cpu",
        "side": side,
        "rounds": rounds,
        "envs": envs,
        "images": images,
        "encode_s": median["encode"],
        "decode_s": median["decode"],
        "actions_per_s": {
            "encode_always": 1 / median["encode_always"],
            **{f"cold_{n}": n / taken for n, taken in cold.items()},
            "warm": 1 / median["warm"],
            "served": 1 / median["served"],
            "batched_1": envs / median["batched_1"],
            f"batched_{batch}": envs / median[f"batched_{batch}"],
            "served_clients": envs / median["served_clients"],
        },
        "gain": gain,
        "limit": limit,
        "share_of_limit": gain / limit,
        "server_added_s": added,
        "server_share": added / median["decode"],
        "embedding_bytes": bare.embedding.nbytes,
        "server_batches": counters.get("batcher", {}),
    }


def _interleaved(
    rare: Mapping[str, Callable[[], object]], ways: Mapping[str, Callable[[], object]], rounds: int, device: str | None
) -> dict[str, list[float]]:
    """Seconds of every call, each round in another order, so that none always follows the same one."""
    seconds: dict[str, list[float]] = {name: [] for name in (*rare, *ways)}
    for call in (*rare.values(), *ways.values()):
        call()  # the first calls pay for allocation, encodes and connections
    for turn in range(rounds):
        for name, call in rare.items():
            seconds[name].append(_time(call, device))
        for again in range(DECODES):
            names = list(ways)
            shift = (turn + again) % len(names)
            for name in names[shift:] + names[:shift]:
                seconds[name].append(_time(ways[name], device))
    return seconds


def _time(call: Callable[[], object], device: str | None) -> float:
    _finish(device)
    start = time.perf_counter()
    call()
    _finish(device)
    return time.perf_counter() - start


def _finish(device: str | None) -> None:
    if device is not None and device.startswith("cuda"):
        import torch

        torch.cuda.synchronize()


@contextmanager
def _served(tool: str, options: Mapping[str, Any]) -> Iterator[str]:
    """The address of a tool server in a process of its own."""
    command = [sys.executable, "-m", "medseg_gym", "tools", "serve", "--tool", tool, "--port", "0", "--quiet"]
    for name, value in options.items():
        command += ["--option", f"{name}={value}"]
    env = {name: value for name, value in os.environ.items() if name != "MEDSEG_GYM_TOKEN"}
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        found = re.search(r" at (http\S+)", process.stdout.readline())
        if found is None:
            raise MedSegError(f"the tool server did not start: {' '.join(command)}")
        yield found[1]
    finally:
        process.terminate()
        process.wait(60)


def _bare(tool: CachedTool, sample: Sample, before: MaskState, prompt: Prompt) -> Query:
    assert before.prediction is not None
    (embedding,) = tool.encode([sample.image])
    return Query(embedding, (*before.prompts, prompt), before.prediction.prior)


def _clients(tool: CachedTool, samples: Sequence[Sample], before: Sequence[MaskState], prompt: Prompt) -> None:
    """One action of each env, every env on a thread of its own."""
    with ThreadPoolExecutor(len(samples)) as pool:
        steps = [
            pool.submit(advance, tool, [sample], [state], [prompt])
            for sample, state in zip(samples, before, strict=True)
        ]
        for step in steps:
            step.result()


def _cold(tool: SegmentationTool, sample: Sample, side: int, seed: int, count: int) -> None:
    _episode(CachedTool(tool), sample, _prompts(side, np.random.default_rng(seed), count))


def _episode(tool: CachedTool, sample: Sample, prompts: Sequence[Prompt]) -> MaskState:
    state = empty_state(sample)
    for prompt in prompts:
        (state,) = advance(tool, [sample], [state], [prompt])
    return state


def _sample(side: int, rng: np.random.Generator, name: str) -> Sample:
    image = rng.integers(0, 256, (side, side, 3), dtype=np.uint8)
    image.flags.writeable = False  # as datasets hand them out; its hash is then remembered
    return Sample(f"throughput/{name}", image, np.zeros((side, side), np.bool_), "noise", "noise", name)


def _prompts(side: int, rng: np.random.Generator, count: int) -> list[Prompt]:
    """A box, then clicks."""
    clicks = [Click(int(rng.integers(side)), int(rng.integers(side)), bool(turn % 2)) for turn in range(count - 1)]
    return [Box(side // 4, side // 4, 3 * side // 4, 3 * side // 4), *clicks]
