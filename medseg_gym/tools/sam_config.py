"""The published SAM sizes as transformers configs, and random weights that behave, for SAM and IMISNet."""

from __future__ import annotations

from typing import Any

from medseg_gym.errors import unknown

# From the segment-anything package; what is not named is ViT-B's.
_SIZES: dict[str, dict[str, Any]] = {
    "B": {},
    "L": {
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "global_attn_indexes": [5, 11, 17, 23],
    },
    "H": {
        "hidden_size": 1280,
        "num_hidden_layers": 32,
        "num_attention_heads": 16,
        "global_attn_indexes": [7, 15, 23, 31],
    },
}
# transformers' default is 1e-6; SAM and what descends from it use torch's default in the decoder's transformer.
DECODER_EPS = 1e-5


def published(size: str = "B") -> Any:
    """The transformers SamConfig of a published SAM: "B", "L" or "H", all at 1024."""
    if size not in _SIZES:
        raise unknown("SAM size", size, _SIZES)
    return sam_config(1024, **_SIZES[size])


def published_size(config: Any) -> str | None:
    """Which published SAM ("B", "L", "H") a SamConfig is of, told by its encoder's width and depth; None for others."""
    vision = config.vision_config
    return {(768, 12): "B", (1024, 24): "L", (1280, 32): "H"}.get((vision.hidden_size, vision.num_hidden_layers))


def sam_config(
    image_size: int,
    *,
    width: int = 256,
    neck: int | None = None,
    mlp_dim: int = 2048,
    iou_width: int = 256,
    **vision: Any,
) -> Any:
    """A SamConfig: keywords of the ViT encoder, and the width of prompt encoder and decoder.

    `neck` is the encoder's output width where it is not `width`. image_size: a multiple of the patch's side, 16.
    """
    from transformers import SamConfig, SamMaskDecoderConfig, SamPromptEncoderConfig, SamVisionConfig

    if image_size < 16 or image_size % 16:
        raise ValueError(f"image_size is {image_size}; wanted a multiple of 16")
    encoder: Any = SamVisionConfig(
        image_size=image_size, output_channels=neck or width, num_pos_feats=width // 2, **vision
    )
    prompts: Any = SamPromptEncoderConfig(hidden_size=width, image_size=image_size)
    decoder: Any = SamMaskDecoderConfig(
        hidden_size=width, mlp_dim=mlp_dim, iou_head_hidden_dim=iou_width, layer_norm_eps=DECODER_EPS
    )
    return SamConfig(vision_config=encoder, prompt_encoder_config=prompts, mask_decoder_config=decoder)


def random_model(config: Any, seed: int) -> Any:
    """A SamModel with seeded random weights that behave."""
    import torch
    from transformers import SamModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = SamModel(config)
        scatter(model)
    return model


def scatter(model: Any) -> None:
    """Gives a SAM-like module random weights scaled by fan-in, from torch's own generator.

    transformers' initialisation leaves logits near 0, with which any comparison passes.
    """
    import torch
    from torch import nn

    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
                weight = module.weight
                fan_in = weight.shape[0] if isinstance(module, nn.ConvTranspose2d) else weight[0].numel()
                weight.normal_(0, (2 / fan_in) ** 0.5)
                if module.bias is not None:
                    module.bias.normal_(0, 0.1)
            elif isinstance(module, nn.Embedding):
                module.weight.normal_()
            elif isinstance(module, nn.LayerNorm):
                module.weight.normal_(1, 0.1)
                module.bias.normal_(0, 0.1)
        for name, parameter in model.named_parameters():
            if "rel_pos" in name or name.endswith("pos_embed"):
                parameter.normal_(0, 0.1)
            elif name.endswith("positional_embedding"):
                parameter.normal_()
        # The mask is a product of two vectors; this brings its logits to the scale of trained ones, however narrow.
        for mlp in model.mask_decoder.output_hypernetworks_mlps:
            mlp.proj_out.weight.mul_(4)
