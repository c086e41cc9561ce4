"""The SegmentationTool protocol, and `advance`: one more prompt per case, as a pure function."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, Literal, Protocol, get_args, runtime_checkable

import numpy as np

from medseg_gym.errors import BadDataError, unknown
from medseg_gym.frames import PaddedFrame
from medseg_gym.types import (
    Box,
    Click,
    Embedding,
    Image,
    Mask,
    MaskState,
    Prediction,
    Prompt,
    Query,
    Sample,
)

Memory = Literal["cumulative", "latest"]
START_LOGIT = 10.0  # a given start mask becomes the prior 20 * mask - 10


@runtime_checkable
class SegmentationTool(Protocol):
    """A promptable model. Holds weights, never an image: all about an image is in its embedding."""

    @property
    def name(self) -> str: ...

    @property
    def fingerprint(self) -> str:
        """Changes with weights, preprocessing and every switch that changes an answer."""
        ...

    @property
    def prompts(self) -> frozenset[type[Prompt]]:
        """What it can be asked with."""
        ...

    @property
    def memory(self) -> Memory:
        """Whether a query carries all prompts in force or the newest only."""
        ...

    @property
    def max_batch(self) -> int:
        """The most images or queries in one forward pass."""
        ...

    def encode(self, images: Sequence[Image]) -> list[Embedding]:
        """One embedding an image, in order; pure."""
        ...

    def predict(self, queries: Sequence[Query]) -> list[Prediction]:
        """One prediction a query, in order, whatever else is in the batch; pure. One forward pass a bucket."""
        ...

    def prior_shape(self, height: int, width: int) -> tuple[int, int]:
        """(h, w) of the low-resolution logits for an (H, W) image."""
        ...


def fingerprint(name: str, **parts: Any) -> str:
    """`name:` and 16 hex digits over everything that changes an answer; parts must be JSON-serialisable."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"))
    return f"{name}:{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def check_memory(memory: object) -> None:
    if memory not in get_args(Memory):
        raise unknown("memory", memory, get_args(Memory))


def buckets(
    queries: Sequence[Query], key: Callable[[Query], Hashable], max_batch: int
) -> Iterator[tuple[list[int], list[Query]]]:
    """Positions and queries that may share a forward pass: equal keys, at most max_batch, first come first.

    Padding a SAM prompt to a common length changes its answer, so the key holds the prompt count.
    """
    groups: dict[Hashable, list[int]] = defaultdict(list)
    for position, query in enumerate(queries):
        groups[key(query)].append(position)
    for positions in groups.values():
        for start in range(0, len(positions), max_batch):
            chunk = positions[start : start + max_batch]
            yield chunk, [queries[i] for i in chunk]


def empty_state(sample: Sample) -> MaskState:
    """Nothing outlined yet."""
    mask = np.zeros(sample.image.shape[:2], np.bool_)
    mask.flags.writeable = False
    return MaskState(prompts=(), mask=mask, prediction=None)


def given_state(tool: SegmentationTool, mask: Mask) -> MaskState:
    """A start mask as a MaskState: its prior is 20 * mask - 10 at the tool's low resolution.

    That is the whole image stretched, or for a tool that says `pads`, the image scaled to fit the top left corner.
    """
    import cv2

    mask = mask.copy()
    mask.flags.writeable = False
    height, width = mask.shape
    h, w = tool.prior_shape(height, width)
    rows, columns = PaddedFrame(height, width, max(h, w)).content if getattr(tool, "pads", False) else (h, w)
    low = np.zeros((h, w), np.float32)
    low[:rows, :columns] = cv2.resize(mask.astype(np.float32), (columns, rows), interpolation=cv2.INTER_AREA)
    logits = np.where(mask, START_LOGIT, -START_LOGIT).astype(np.float32)
    prediction = Prediction(logits=logits, predicted_iou=float("nan"), prior=2 * START_LOGIT * low - START_LOGIT)
    return MaskState(prompts=(), mask=mask, prediction=prediction)


def with_prompt(prompts: tuple[Prompt, ...], newest: Prompt) -> tuple[Prompt, ...]:
    """The prompts in force after one more; a newer box replaces the older."""
    if isinstance(newest, Box):
        prompts = tuple(p for p in prompts if not isinstance(p, Box))
    return (*prompts, newest)


def advance(
    tool: SegmentationTool,
    samples: Sequence[Sample],
    states: Sequence[MaskState],
    actions: Sequence[Prompt],
) -> list[MaskState]:
    """The states after one more prompt each. Pure: the env, trajectory retries and replay all call this.

    Give a CachedTool and each distinct image is encoded once. A prompt the tool cannot take raises ValueError.
    """
    if not actions:
        return []
    for action in actions:
        if type(action) not in tool.prompts:
            able = ", ".join(sorted(p.__name__ for p in tool.prompts))
            raise ValueError(f"{tool.name} cannot take a {type(action).__name__}; it takes {able}")
    embeddings = tool.encode([sample.image for sample in samples])
    prompts = [with_prompt(state.prompts, action) for state, action in zip(states, actions, strict=True)]
    queries = [
        Query(
            embedding=embedding,
            prompts=in_force if tool.memory == "cumulative" else in_force[-1:],
            prior=state.prediction.prior if state.prediction is not None else None,
        )
        for embedding, in_force, state in zip(embeddings, prompts, states, strict=True)
    ]
    predictions = tool.predict(queries)
    if len(predictions) != len(queries):
        raise BadDataError(f"{tool.name} gave {len(predictions)} predictions for {len(queries)} queries")
    return [
        MaskState(prompts=in_force, mask=_mask(tool, prediction, state), prediction=prediction)
        for in_force, prediction, state in zip(prompts, predictions, states, strict=True)
    ]


def _mask(tool: SegmentationTool, prediction: Prediction, before: MaskState) -> Mask:
    if not isinstance(prediction, Prediction) or prediction.logits.shape != before.mask.shape:
        came = getattr(getattr(prediction, "logits", prediction), "shape", type(prediction).__name__)
        raise BadDataError(f"{tool.name} gave {came}; wanted a Prediction with logits of {before.mask.shape}")
    mask = prediction.logits > 0
    mask.flags.writeable = False
    return mask


ALL_PROMPTS: frozenset[type[Prompt]] = frozenset({Click, Box})
