"""The sam2 package's side of the parity tests: its models with random weights that behave, and its predictor."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from medseg_gym.types import Box, Click, Image, Prompt

YAMLS = {"T": "t", "S": "s", "BPlus": "b+", "L": "l"}


def package_model(hiera: str, *overrides: str) -> Any:
    """The sam2 package's model of a published size, from its own yaml."""
    from sam2.build_sam import build_sam2

    yaml = f"configs/sam2.1/sam2.1_hiera_{YAMLS[hiera]}.yaml"
    return build_sam2(yaml, None, device="cpu", hydra_overrides_extra=list(overrides))


@dataclass
class Original:
    """A model of the sam2 package, and the file its authors would have saved."""

    model: Any
    path: Path
    hiera: str

    @property
    def size(self) -> int:
        return int(self.model.image_size)


def original(hiera: str, size: int, folder: Path) -> Original:
    """The package's own model, its image part with random weights whose logits have a deviation above 1."""
    import torch

    from medseg_gym.tools.sam2_config import random_model, sam21_config
    from medseg_gym.tools.sam2_original import to_original

    model = package_model(hiera, f"++model.image_size={size}")
    found = model.load_state_dict(to_original(random_model(sam21_config(hiera, size), 0).state_dict()), strict=False)
    assert not found.unexpected_keys
    path = folder / f"sam2.1_{hiera}_{size}.pt"
    torch.save({"model": model.state_dict()}, path)
    return Original(model, path, hiera)


def predictor(given: Original, image: Image) -> Any:
    """The package's SAM2ImagePredictor with an image set. Its feature sizes are written down for 1024."""
    from sam2.sam2_image_predictor import SAM2ImagePredictor

    asked = SAM2ImagePredictor(given.model)
    asked._bb_feat_sizes = [(given.size // stride,) * 2 for stride in (4, 8, 16)]
    asked.set_image(image)
    return asked


def predictor_turn(asked: Any, prompts: tuple[Prompt, ...], prior: Any, multimask: bool) -> tuple[Any, float, Any]:
    """(H, W) logits, predicted IoU and (1, h, w) logits to feed back, of the mask the predictor thinks best."""
    clicks = [p for p in prompts if isinstance(p, Click)]
    boxes = [p for p in prompts if isinstance(p, Box)]
    masks, scores, low = asked.predict(
        point_coords=np.array([[c.x, c.y] for c in clicks], np.float32) if clicks else None,
        point_labels=np.array([c.positive for c in clicks], np.int32) if clicks else None,
        box=np.array([boxes[0].x1, boxes[0].y1, boxes[0].x2, boxes[0].y2], np.float32) if boxes else None,
        mask_input=prior,
        multimask_output=multimask,
        return_logits=True,
    )
    best = int(scores.argmax())
    return masks[best], float(scores[best]), low[best : best + 1]
