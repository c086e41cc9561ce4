"""Checkpoints of the segment-anything package (SAM, MedSAM): their key names and how they become a SamModel."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from medseg_gym.tools.checkpoints import fill

PE = "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"
POSITION_KEYS = ("shared_image_embedding.positional_embedding", "prompt_encoder.shared_embedding.positional_embedding")
IGNORED = ("pixel_mean", "pixel_std")  # constants that early checkpoints carry

# In this order, each on the whole key.
_RULES = (
    (r"^image_encoder\.", "vision_encoder."),
    (r"\.patch_embed\.proj\.", ".patch_embed.projection."),
    (r"^(vision_encoder)\.blocks\.", r"\1.layers."),
    (r"\.norm_final_attn\.", ".layer_norm_final_attn."),
    (r"\.norm(\d)\.", r".layer_norm\1."),
    (r"\bneck\.([02])\.", lambda m: f"neck.conv{int(m[1]) // 2 + 1}."),
    (r"\bneck\.([13])\.", lambda m: f"neck.layer_norm{int(m[1]) // 2 + 1}."),
    (r"\.point_embeddings\.", ".point_embed."),
    (r"\.mask_downscaling\.([036])\.", lambda m: f".mask_embed.conv{int(m[1]) // 3 + 1}."),
    (r"\.mask_downscaling\.([14])\.", lambda m: f".mask_embed.layer_norm{int(m[1]) // 3 + 1}."),
    (r"\.output_upscaling\.([03])\.", lambda m: f".upscale_conv{int(m[1]) // 3 + 1}."),
    (r"\.output_upscaling\.1\.", ".upscale_layer_norm."),
    (r"(_mlps\.\d+|_head)\.layers\.0\.", r"\1.proj_in."),
    (r"(_mlps\.\d+|_head)\.layers\.2\.", r"\1.proj_out."),
    (r"(_mlps\.\d+|_head)\.layers\.1\.", r"\1.layers.0."),
)


def rename(key: str) -> str | tuple[str, ...]:
    """The SamModel's name of a segment-anything key; both names for the position matrix, which it keeps twice."""
    if key == PE:
        return POSITION_KEYS
    for pattern, new in _RULES:
        key = re.sub(pattern, new, key)
    return key


def model_of(state: Mapping[str, Any], config: Any, source: str | Path = "the checkpoint") -> Any:
    """The SamModel of a config filled with a segment-anything state dict; anything left over is BadDataError."""
    import torch
    from transformers import SamModel

    with torch.device("meta"):
        model: Any = SamModel(config)
    fill(model, state, rename, ignore=IGNORED, source=str(source))
    return model
