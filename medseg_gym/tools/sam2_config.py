"""The published SAM 2.1 sizes as transformers configs, other input sizes, and random weights that behave."""

from __future__ import annotations

import copy
from typing import Any

from medseg_gym.errors import unknown

# From the yaml files of the sam2 package; what is not named is the tiny model's.
_SIZES: dict[str, dict[str, Any]] = {
    "T": {},
    "S": {"blocks_per_stage": [1, 2, 11, 2], "global_attention_blocks": [7, 10, 13]},
    "BPlus": {
        "hidden_size": 112,
        "num_attention_heads": 2,
        "embed_dim_per_stage": [112, 224, 448, 896],
        "num_attention_heads_per_stage": [2, 4, 8, 16],
        "blocks_per_stage": [2, 3, 16, 3],
        "global_attention_blocks": [12, 16, 20],
        "window_positional_embedding_background_size": [14, 14],
    },
    "L": {
        "hidden_size": 144,
        "num_attention_heads": 2,
        "embed_dim_per_stage": [144, 288, 576, 1152],
        "num_attention_heads_per_stage": [2, 4, 8, 16],
        "blocks_per_stage": [2, 6, 36, 4],
        "global_attention_blocks": [23, 33, 43],
        "window_size_per_stage": [8, 4, 16, 8],
    },
}


def sam21_config(size: str = "T", image_size: int = 1024) -> Any:
    """The transformers Sam2Config of a published SAM 2.1 ("T", "S", "BPlus", "L") at a given input side."""
    if size not in _SIZES:
        raise unknown("SAM 2.1 size", size, _SIZES)
    return sam2_config(image_size, **_SIZES[size])


def published_size(config: Any) -> str | None:
    """Which published SAM 2.1 ("T", "S", "BPlus", "L") a Sam2Config is of, told by width and depth; None for others."""
    shape = _shape(config)
    return next((size for size in _SIZES if _shape(sam21_config(size)) == shape), None)


def _shape(config: Any) -> tuple[list[int], list[int]]:
    hiera = config.vision_config.backbone_config
    return list(hiera.embed_dim_per_stage), list(hiera.blocks_per_stage)


def sam2_config(image_size: int, *, width: int = 256, mlp_dim: int = 2048, **backbone: Any) -> Any:
    """A Sam2Config: keywords of the Hiera encoder, and the width of neck, prompt encoder and decoder."""
    from transformers import (
        Sam2Config,
        Sam2HieraDetConfig,
        Sam2MaskDecoderConfig,
        Sam2PromptEncoderConfig,
        Sam2VisionConfig,
    )

    hiera: Any = Sam2HieraDetConfig(**backbone)
    vision = Sam2VisionConfig(
        backbone_config=hiera, backbone_channel_list=hiera.embed_dim_per_stage[::-1], fpn_hidden_size=width
    )
    config = Sam2Config(
        vision_config=vision,
        prompt_encoder_config=Sam2PromptEncoderConfig(hidden_size=width),
        mask_decoder_config=Sam2MaskDecoderConfig(hidden_size=width, mlp_dim=mlp_dim, iou_head_hidden_dim=width),
    )
    return resized(config, image_size)


def resized(config: Any, image_size: int) -> Any:
    """A copy of a Sam2Config for another input side, a multiple of 32; no weight depends on it."""
    if image_size < 32 or image_size % 32:
        raise ValueError(f"image_size is {image_size}; wanted a multiple of 32")
    config = copy.deepcopy(config)
    config.prompt_encoder_config.image_size = image_size
    config.vision_config.backbone_config.image_size = [image_size, image_size]
    config.vision_config.backbone_feature_sizes = [[image_size // stride] * 2 for stride in (4, 8, 16)]
    return config


def random_model(config: Any, seed: int) -> Any:
    """A Sam2Model with seeded random weights scaled by fan-in.

    transformers' own initialisation gives logits that peak at .014, with which any comparison passes. Both position
    encodings get the same matrix, as in every trained model.
    """
    import torch
    from transformers import Sam2Model

    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model: Any = Sam2Model(config)
        for name, parameter in model.named_parameters():
            # cross_attn_token_to_image is no token: weights of deviation 1 there make attention pick single positions,
            # and a rounding error of 1e-6 in the prior grows to 1e-2 of the logits.
            token = name.endswith(("token.weight", "tokens.weight"))
            if parameter.ndim > 1 and name.endswith("weight") and "embed" not in name and not token:
                fan_in = parameter[0].numel() if "upscale_conv" not in name else parameter.shape[0]
                parameter.normal_(0, (2 / fan_in) ** 0.5)
            elif parameter.ndim > 1:
                parameter.normal_(0, 1 if token or "point" in name else 0.5)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.1)
        # The mask is a product of two random vectors; this brings its logits to the scale of trained ones.
        for mlp in model.mask_decoder.output_hypernetworks_mlps:
            mlp.proj_out.weight.mul_(0.25)
        position = model.shared_image_embedding.positional_embedding
        model.prompt_encoder.shared_embedding.positional_embedding.copy_(position)
    return model
