"""Stub: a tool whose masks can be worked out by hand, for tests and for learning the env's rules."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from medseg_gym.images import image_hash
from medseg_gym.tools.base import ALL_PROMPTS, Memory, check_memory, fingerprint
from medseg_gym.types import Box, Embedding, Image, Logits, Prediction, Query


class Stub:
    """A box fills its rectangle; a positive click adds a disc, a negative click removes one; later prompts win.

    The disc's radius is max(2, min(H, W) // 8) pixels. Logits are +10 and -10, the prior is the mask at full
    resolution, and a query's answer starts from its prior only where `memory` is "latest".
    """

    def __init__(self, *, memory: Memory = "cumulative", max_batch: int = 1) -> None:
        check_memory(memory)
        self.name = "Stub"
        self.prompts = ALL_PROMPTS
        self.memory: Memory = memory
        self.max_batch = max_batch
        self.fingerprint = fingerprint("Stub", version=1, memory=memory)

    def prior_shape(self, height: int, width: int) -> tuple[int, int]:
        return height, width

    def encode(self, images: Sequence[Image]) -> list[Embedding]:
        return [
            Embedding(
                image=image_hash(image),
                height=image.shape[0],
                width=image.shape[1],
                features={"mean": np.array(image.mean(), np.float32)},
            )
            for image in images
        ]

    def predict(self, queries: Sequence[Query]) -> list[Prediction]:
        return [self._predict(query) for query in queries]

    def _predict(self, query: Query) -> Prediction:
        height, width = query.embedding.height, query.embedding.width
        mask = np.zeros((height, width), np.bool_)
        if self.memory == "latest" and query.prior is not None:
            mask |= query.prior > 0
        radius = max(2, min(height, width) // 8)
        rows, columns = np.ogrid[:height, :width]
        for prompt in query.prompts:
            if isinstance(prompt, Box):
                mask[prompt.y1 : prompt.y2 + 1, prompt.x1 : prompt.x2 + 1] = True
            else:
                disc = (columns - prompt.x) ** 2 + (rows - prompt.y) ** 2 <= radius**2
                mask[disc] = prompt.positive
        logits: Logits = np.where(mask, np.float32(10), np.float32(-10))
        return Prediction(logits=logits, predicted_iou=float("nan"), prior=logits)
