"""IMISNet's network: SAM's ViT-B with a wide neck, SAM's prompt encoder, a decoder with semantics, and CLIP's text."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel
from transformers.models.sam.modeling_sam import (
    SamFeedForward,
    SamLayerNorm,
    SamPromptEncoder,
    SamTwoWayTransformer,
    SamVisionEncoder,
    SamVisionNeck,
)

from medseg_gym.tools import sam_original
from medseg_gym.tools.checkpoints import fill
from medseg_gym.tools.sam_config import sam_config, scatter

MASKS = 4  # the single mask, and three for ambiguous prompts
SEMANTIC = 512  # width of the semantic prediction, CLIP's


class Config(NamedTuple):
    """What IMISNet is made of."""

    sam: Any  # a SamConfig: the encoder, prompts, and the decoder's transformer
    text: Any  # a CLIPTextConfig


def imisnet_config(
    image_size: int = 1024, *, width: int = 768, neck: int = 256, text: Mapping[str, Any] | None = None, **sam: Any
) -> Config:
    """The published network, or another: `width` of prompts and decoder, `neck` of the encoder's own, unused one.

    `text`: keywords of CLIPTextConfig, whose defaults are ViT-B/32's. `sam`: keywords of sam_config.
    """
    return Config(sam_config(image_size, width=width, neck=neck, **sam), CLIPTextConfig(**(text or {})))


class IMISNet(nn.Module):
    """The network; submodules are named as in transformers' SamModel where it has them, so that its key map serves."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        config = copy.deepcopy(config)
        sam, text = self.config = config
        width = sam.prompt_encoder_config.hidden_size
        sam._attn_implementation = text._attn_implementation = "sdpa"  # transformers' parts, made alone, ask for it
        self.vision_encoder: Any = SamVisionEncoder(sam.vision_config)
        wide = copy.deepcopy(sam.vision_config)
        wide.output_channels = width
        self.neck = SamVisionNeck(wide)
        self.prompt_encoder: Any = SamPromptEncoder(sam)
        self.mask_decoder = IMISDecoder(sam.mask_decoder_config)
        model: Any = CLIPTextModel(text)
        self.text_model = getattr(model, "text_model", model)  # nested in earlier transformers
        self.text_out_dim = nn.Linear(text.hidden_size, width)

    def image(self, pixels: Tensor) -> Tensor:
        """(B, width, s/16, s/16) features of (B, 3, s, s) pixels. The encoder's own neck is left out."""
        hidden = self.vision_encoder.patch_embed(pixels) + self.vision_encoder.pos_embed
        for layer in self.vision_encoder.layers:
            hidden = layer(hidden)
        features: Tensor = self.neck(hidden)
        return features

    def text(self, tokens: Tensor) -> Tensor:
        """(B, width) text features of (B, N) CLIP token ids, each row with its end-of-text."""
        features: Tensor = self.text_out_dim(self.text_model(input_ids=tokens).pooler_output)
        return features

    def prompts(
        self,
        points: Tensor | None,
        labels: Tensor | None,
        boxes: Tensor | None,
        priors: Tensor | None,
        text: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Sparse tokens (B, N, width) and dense features of the prompts, of which at least one is given.

        points (B, P, 2), labels (B, P), boxes (B, 4), priors (B, s/4, s/4), text (B, width). The tokens: points, a
        padding point if there are points and no box, the two corners of the box, the text.
        """
        given = (points, labels, boxes, priors)
        rows = next(len(value) for value in (*given, text) if value is not None)
        sparse, dense = self.prompt_encoder(*(None if value is None else value[:, None] for value in given))
        tokens = [] if sparse is None else [sparse[:, 0]]
        tokens += [] if text is None else [text[:, None]]
        return torch.cat(tokens, dim=1), dense.expand(rows, -1, -1, -1)

    def positions(self) -> Tensor:
        """(1, width, s/16, s/16): the encoded centre of every feature's patch."""
        side = self.config.sam.prompt_encoder_config.image_embedding_size
        embed = self.prompt_encoder.shared_embedding
        at = (torch.arange(side, device=embed.positional_embedding.device) + 0.5) / side
        grid = torch.stack(torch.meshgrid(at, at, indexing="xy"), dim=-1)
        encoded: Tensor = embed(grid).permute(2, 0, 1)[None]
        return encoded

    def forward(
        self,
        features: Tensor,
        points: Tensor | None,
        labels: Tensor | None,
        boxes: Tensor | None,
        priors: Tensor | None,
        text: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Logits (B, 4, s/4, s/4), predicted IoU (B, 4) and semantic features (B, 4, 512) of the features of `image`.

        The first mask is the single one, the other three are for `multimask`.
        """
        sparse, dense = self.prompts(points, labels, boxes, priors, text)
        answer: tuple[Tensor, Tensor, Tensor] = self.mask_decoder(features + dense, self.positions(), sparse, text)
        return answer


class IMISDecoder(nn.Module):
    """SAM's mask decoder with a semantic token beside each mask token, and the text's own share in every mask."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        width, part = config.hidden_size, config.hidden_size // 8
        self.iou_token = nn.Embedding(1, width)
        self.mask_tokens = nn.Embedding(MASKS, width)
        self.semantic_tokens = nn.Embedding(MASKS, width)
        self.transformer = SamTwoWayTransformer(config)
        self.upscale_conv1 = nn.ConvTranspose2d(width, width // 4, kernel_size=2, stride=2)
        self.upscale_layer_norm = SamLayerNorm(width // 4, data_format="channels_first")
        self.upscale_conv2 = nn.ConvTranspose2d(width // 4, part, kernel_size=2, stride=2)
        head = partial(SamFeedForward, num_layers=3)
        self.output_hypernetworks_mlps = nn.ModuleList(head(width, width, part) for _ in range(MASKS))
        self.text_output = nn.Linear(width, part)
        self.iou_prediction_head = head(width, config.iou_head_hidden_dim, MASKS)
        self.semantic_prediction_head = head(width, config.iou_head_hidden_dim, SEMANTIC)

    def tokens(self, sparse: Tensor) -> Tensor:
        """(B, 9 + N, width): the IoU token, four mask tokens, four semantic tokens, then the prompts'."""
        own = torch.cat([self.iou_token.weight, self.mask_tokens.weight, self.semantic_tokens.weight])
        return torch.cat([own.expand(len(sparse), -1, -1), sparse], dim=1)

    def forward(
        self, features: Tensor, positions: Tensor, sparse: Tensor, text: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As IMISNet.forward; `features` with the dense prompt added."""
        rows, width, height, across = features.shape
        out, mixed = self.transformer(
            point_embeddings=self.tokens(sparse)[:, None],
            image_embeddings=features,
            image_positional_embeddings=positions.expand(rows, -1, -1, -1),
            attention_similarity=None,
        )
        iou, masks, semantic = out[:, 0, 0], out[:, 0, 1 : 1 + MASKS], out[:, 0, 1 + MASKS : 1 + 2 * MASKS]
        upscaled = self.upscale(mixed[:, 0].transpose(1, 2).reshape(rows, width, height, across))
        weights = torch.stack([mlp(masks[:, i]) for i, mlp in enumerate(self.output_hypernetworks_mlps)], dim=1)
        if text is not None:
            weights = weights + self.text_output(text)[:, None]  # a product with the sum is the sum of the products
        logits = torch.einsum("bmc,bchw->bmhw", weights, upscaled)
        return logits, self.iou_prediction_head(iou), self.semantic_prediction_head(semantic)

    def upscale(self, features: Tensor) -> Tensor:
        """(B, width / 8, 4h, 4w) of (B, width, h, w)."""
        gelu = nn.functional.gelu
        return gelu(self.upscale_conv2(gelu(self.upscale_layer_norm(self.upscale_conv1(features)))))


def rename(key: str) -> str | None:
    """This module's name of one of the authors' keys."""
    if key == sam_original.PE:
        return "prompt_encoder.shared_embedding.positional_embedding"
    if key.startswith("text_"):
        return key
    key = re.sub(r"\.mlp\.fc([12])\.", r".mlp.lin\1.", key)  # timm's ViT
    own = re.sub(r"^image_encoder\.neck\.", "neck.", key)
    new = sam_original.rename(own.replace("image_encoder.sam_encoder.", "image_encoder.", 1))
    return new if isinstance(new, str) else None


def model_of(state: Mapping[str, Any], config: Config, source: str | Path = "the checkpoint") -> IMISNet:
    """The network filled with a state dict of the authors' names; anything left over on either side is BadDataError."""
    model = IMISNet(config)
    fill(model, state, rename, source=str(source))
    return model


def random_model(config: Config, seed: int) -> IMISNet:
    """The network with seeded random weights that behave."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = IMISNet(config)
        scatter(model)
    return model
