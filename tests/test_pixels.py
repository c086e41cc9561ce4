"""Patches of pictures are the image processor's, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from medseg_gym.rl.pixels import Patches
from medseg_gym.rl.tiny_model import image_processor


def images():
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (*shape, 3), dtype=np.uint8) for shape in ((64, 64), (32, 96), (128, 64))]


def processors():
    tiny, odd = image_processor(), image_processor()
    odd.image_mean, odd.image_std = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
    large = image_processor()
    large.patch_size, large.size = 14, {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280}
    return {"tiny": tiny, "other mean and deviation": odd, "patches of 14": large}


@pytest.mark.parametrize("name", processors())
def test_patches_are_the_processors(name):
    processor = processors()[name]
    cut = Patches(processor)
    assert cut.exact
    given = [np.ascontiguousarray(i[: i.shape[0] // 32 * 28, : i.shape[1] // 32 * 28]) for i in images()]
    given = [i for i in given if i.shape[0] * i.shape[1] >= 56 * 56] if name == "patches of 14" else images()
    assert len(given) >= 2
    wanted = processor(images=given, return_tensors="pt")
    pixels, grids = cut(given)
    assert torch.equal(pixels, wanted["pixel_values"]) and pixels.dtype == torch.float32
    assert torch.equal(grids, wanted["image_grid_thw"])


def test_a_processor_that_does_more_is_asked():
    """One that mixes pixels is no table of levels."""

    class Mixing:
        patch_size, merge_size, temporal_patch_size, size = 16, 2, 2, {"shortest_edge": 1024}

        def __call__(self, images, return_tensors):
            found = image_processor()(images=images, return_tensors=return_tensors)
            found["pixel_values"] = found["pixel_values"] + found["pixel_values"][:, :1]
            return found

    cut = Patches(Mixing())
    given = images()[:2]
    assert not cut.exact
    assert torch.equal(cut(given)[0], Mixing()(given, "pt")["pixel_values"])
