"""Pictures as the patches a Qwen-VL vision tower takes: the image processor's numbers, in a fraction of its time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from medseg_gym.types import Image

if TYPE_CHECKING:
    import torch


class Patches:
    """Cuts (H, W, 3) uint8 images that the processor would not resample.

    What the processor makes of each of the 256 levels of a channel is read off one image that it is given; where the
    patches of that image are then not the processor's bit for bit, it is asked every time.
    """

    def __init__(self, processor: Any) -> None:
        self._processor = processor
        self.patch, self.merge = int(processor.patch_size), int(processor.merge_size)
        self._frames = int(processor.temporal_patch_size)
        self._levels = np.zeros((1, 256, 3), np.float32)
        cell = self.patch * self.merge
        side = cell * math.ceil(max(math.sqrt(processor.size["shortest_edge"]), 16) / cell)
        mixed = np.random.default_rng(0)  # every channel has all levels, in an order of its own
        levels = np.arange(side * side) % 256
        probe = np.stack([mixed.permutation(levels) for _ in range(3)], 1).astype(np.uint8).reshape(side, side, 3)
        wanted = processor(images=[probe], return_tensors="np")["pixel_values"]
        self._levels[0, probe.reshape(-1, 3), [0, 1, 2]] = self._seen(wanted, probe.shape)[0].reshape(-1, 3)
        self.exact = np.array_equal(self._values([probe]), wanted)

    def __call__(self, images: Sequence[Image]) -> tuple[torch.Tensor, torch.Tensor]:
        """`pixel_values`, the patches of all images one after the other, and `image_grid_thw`, (N, 3)."""
        import torch

        if not self.exact:
            found = self._processor(images=list(images), return_tensors="pt")
            return found["pixel_values"], found["image_grid_thw"]
        grids = [(1, image.shape[0] // self.patch, image.shape[1] // self.patch) for image in images]
        return torch.from_numpy(self._values(images)), torch.tensor(grids)

    def _values(self, images: Sequence[Image]) -> NDArray[np.float32]:
        import cv2

        sizes = [image.shape[0] * image.shape[1] // self.patch**2 for image in images]
        values = np.empty((sum(sizes), 3 * self._frames * self.patch**2), np.float32)
        for image, part in zip(images, np.split(values, np.cumsum(sizes)[:-1]), strict=True):
            levels = cv2.LUT(np.asarray(image), self._levels)
            self._seen(part, image.shape)[...] = levels.reshape(self._split(image.shape))[None]
        return values

    def _seen(self, values: NDArray[np.float32], shape: tuple[int, ...]) -> NDArray[np.float32]:
        """(frames, H / cell, merge, patch, W / cell, merge, patch, 3): a view of an image's patches as its pixels."""
        height, merge, patch, width, *_ = self._split(shape)
        parts = values.reshape(height, width, merge, merge, 3, self._frames, patch, patch)
        return parts.transpose(5, 0, 2, 6, 1, 3, 7, 4)

    def _split(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        height, width = (side // self.patch // self.merge for side in shape[:2])
        return height, self.merge, self.patch, width, self.merge, self.patch, 3
