"""What the embedding cache is worth: actions a second with SAM 2.1 on random weights, warm, cold and uncached."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from medseg_gym.tools.base import SegmentationTool, advance, empty_state
from medseg_gym.tools.cache import CachedTool
from medseg_gym.types import Box, Click, MaskState, Prompt, Query, Sample


def measure_cache(
    size: str = "T",
    *,
    actions: Sequence[int] = (5, 40),
    repeats: int = 3,
    image_size: int = 1024,
    side: int = 512,
    seed: int = 0,
    tool: SegmentationTool | None = None,
) -> dict[str, Any]:
    """Actions a second of one env on one (side, side) image, as medians of `repeats` interleaved rounds.

    `warm` finds the image in the cache, `uncached` encodes it at every action, both with the same prompts: a box,
    then clicks with the previous logits. `gain` is warm / uncached; `limit` is (encode + decode) / decode of the bare
    tool timed in the same rounds, the most a cache can give; `share_of_limit` is wanted at .9 or more. `cold` is an
    episode of so many actions on an image the cache has not seen, all prompts staying in force.
    """
    if tool is None:
        from medseg_gym.tools.sam2 import Sam2Tool
        from medseg_gym.tools.sam2_config import sam21_config

        tool = Sam2Tool.from_config(sam21_config(size, image_size), seed, name=f"SAM2.1{size}-random")
    sample = _sample(side, np.random.default_rng(seed))
    rng = np.random.default_rng(seed + 1)
    prompts = _prompts(side, rng, 4)  # the fourth action of an episode is typical of what is asked
    warm_tool = CachedTool(tool)
    uncached = CachedTool(tool, max_bytes=0)
    before = _start(warm_tool, sample, prompts[:-1])
    _advance(uncached, sample, before, prompts[-1])  # the first calls pay for allocation
    (embedding,) = tool.encode([sample.image])
    assert before.prediction is not None
    query = Query(embedding, (*before.prompts, prompts[-1]), before.prediction.prior)
    seconds: dict[str, list[float]] = {"encode": [], "decode": [], "warm": [], "uncached": []}
    for _ in range(repeats):
        seconds["encode"].append(_time(lambda: tool.encode([sample.image])))
        seconds["uncached"].append(_time(lambda: _advance(uncached, sample, before, prompts[-1])))
        # Decodes are short: several a round, in turn, so that a slow moment hits both alike.
        for _ in range(5):
            seconds["decode"].append(_time(lambda: tool.predict([query])))
            seconds["warm"].append(_time(lambda: _advance(warm_tool, sample, before, prompts[-1])))
    median = {name: statistics.median(values) for name, values in seconds.items()}
    cold = {n: _time(lambda n=n: _start(CachedTool(tool), sample, _prompts(side, rng, n))) for n in actions}  # type: ignore[misc]
    gain = median["uncached"] / median["warm"]
    limit = (median["encode"] + median["decode"]) / median["decode"]
    return {
        "tool": tool.name,
        "image_size": image_size,
        "side": side,
        "repeats": repeats,
        "encode_s": median["encode"],
        "decode_s": median["decode"],
        "warm_actions_per_s": 1 / median["warm"],
        "uncached_actions_per_s": 1 / median["uncached"],
        "gain": gain,
        "limit": limit,
        "share_of_limit": gain / limit,
        "cold_actions_per_s": {n: n / seconds_ for n, seconds_ in cold.items()},
        "embedding_bytes": embedding.nbytes,
        "counters": warm_tool.counters(),
    }


def _time(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _advance(tool: CachedTool, sample: Sample, state: MaskState, prompt: Prompt) -> MaskState:
    return advance(tool, [sample], [state], [prompt])[0]


def _start(tool: CachedTool, sample: Sample, prompts: Sequence[Prompt]) -> MaskState:
    state = empty_state(sample)
    for prompt in prompts:
        state = _advance(tool, sample, state, prompt)
    return state


def _sample(side: int, rng: np.random.Generator) -> Sample:
    image = rng.integers(0, 256, (side, side, 3), dtype=np.uint8)
    image.flags.writeable = False  # as datasets hand them out; its hash is then remembered
    return Sample("throughput/1", image, np.zeros((side, side), np.bool_), "noise", "noise", "1")


def _prompts(side: int, rng: np.random.Generator, count: int) -> list[Prompt]:
    """A box, then clicks."""
    clicks = [Click(int(rng.integers(side)), int(rng.integers(side)), bool(turn % 2)) for turn in range(count - 1)]
    return [Box(side // 4, side // 4, 3 * side // 4, 3 * side // 4), *clicks]
