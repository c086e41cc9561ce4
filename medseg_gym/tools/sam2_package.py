"""SAM 2.1 and MedSAM2 run by the sam2 package itself instead of transformers: `engine="sam2"`, the same answers."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medseg_gym.errors import MedSegError
from medseg_gym.tools.checkpoints import fill
from medseg_gym.tools.sam2 import Sam2Tool, read_model
from medseg_gym.tools.sam2_original import VIDEO_KEYS, to_original
from medseg_gym.types import Query

if TYPE_CHECKING:
    import torch

# Without the two switches pip fetches another torch, to build with and to run with.
INSTALL = "pip install 'medseg-gym[sam2]' && pip install --no-deps --no-build-isolation sam2==1.1.0"


class Sam2PackageTool(Sam2Tool):
    """A SAM 2.1 model of the sam2 package, with the same preprocessing, prompts, embeddings and switches.

    Its SAM2ImagePredictor is not used: it holds one image at a time, loops over a batch, and needs torchvision. The
    parts it calls are called here, on a batch over different images.
    """

    engine = "sam2"

    @classmethod
    def from_pretrained(
        cls, path: str | Path, *, hiera: str | None = None, size: int | None = None, **options: Any
    ) -> Sam2PackageTool:
        """The tool of the same folders and files as Sam2Tool's. MedSegError with the commands if sam2 is missing."""
        check_installed()
        return cls(_model(read_model(Path(path), hiera=hiera, size=size)), **options)

    @classmethod
    def from_config(cls, config: Any, seed: int, **options: Any) -> Sam2PackageTool:
        """The tool with the random weights of Sam2Tool.from_config; the width of neck and decoder has to be 256."""
        from medseg_gym.tools.sam2_config import random_model

        check_installed()
        return cls(_model(random_model(config, seed)), **options)

    @staticmethod
    def input_size(model: Any) -> int:
        return int(model.image_size)

    def features(self, pixels: torch.Tensor) -> Sequence[torch.Tensor]:
        levels = list(self.model.forward_image(pixels)["backbone_fpn"][-len(self.levels) :])
        if self.model.directly_add_no_mem_embed:  # stored as (1, 1, channels), for flattened features
            levels[-1] = levels[-1] + self.model.no_mem_embed.permute(0, 2, 1)[..., None]
        return levels

    def decode(
        self,
        levels: list[torch.Tensor],
        points: torch.Tensor | None,
        labels: torch.Tensor | None,
        boxes: torch.Tensor | None,
        priors: torch.Tensor | None,
        queries: Sequence[Query],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        import torch

        if boxes is not None:  # as two points before the others, so that the padding point comes along, as trained
            corners = boxes.reshape(-1, 2, 2)
            kinds = torch.tensor([[2, 3]], device=boxes.device).expand(len(boxes), 2)
            points = corners if points is None else torch.cat([corners, points], dim=1)
            labels = kinds if labels is None else torch.cat([kinds, labels], dim=1)
        sparse, dense = self.model.sam_prompt_encoder(
            points=(points, labels), boxes=None, masks=None if priors is None else priors[:, None]
        )
        masks, scores, _, _ = self.model.sam_mask_decoder(
            image_embeddings=levels[-1],
            image_pe=self.model.sam_prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=self.options.multimask,
            repeat_image=False,
            high_res_features=levels[:-1],
        )
        return masks, scores


def check_installed() -> None:
    """MedSegError with the commands that install it, unless the sam2 package is there."""
    if importlib.util.find_spec("sam2") is None:
        raise MedSegError(f'engine="sam2" needs the sam2 package: `{INSTALL}`; or leave the engine at "transformers"')


def build(config: Any) -> Any:
    """The sam2 package's SAM 2.1 of a Sam2Config, with weights of its own: its tiny model's yaml, changed."""
    from sam2.build_sam import build_sam2  # type: ignore[import-not-found]

    hiera = config.vision_config.backbone_config
    changed = {
        "image_size": config.prompt_encoder_config.image_size,
        "image_encoder.trunk.embed_dim": hiera.hidden_size,
        "image_encoder.trunk.num_heads": hiera.num_attention_heads,
        "image_encoder.trunk.stages": list(hiera.blocks_per_stage),
        "image_encoder.trunk.global_att_blocks": list(hiera.global_attention_blocks),
        "image_encoder.trunk.window_spec": list(hiera.window_size_per_stage),
        "image_encoder.trunk.window_pos_embed_bkg_spatial_size": list(
            hiera.window_positional_embedding_background_size
        ),
        "image_encoder.neck.backbone_channel_list": list(hiera.embed_dim_per_stage)[::-1],
    }
    overrides = [f"++model.{name}={value}" for name, value in changed.items()]
    return build_sam2("configs/sam2.1/sam2.1_hiera_t.yaml", None, device="cpu", hydra_overrides_extra=overrides)


def _model(source: Any) -> Any:
    """The sam2 package's model with the weights of a Sam2Model; those of the video stay random, and are not used."""
    model = build(source.config)
    fill(model, to_original(source.state_dict()), lambda key: key, ignore=VIDEO_KEYS, source="the Sam2Model")
    for pattern in VIDEO_KEYS:  # they would only change the fingerprint
        setattr(model, pattern.removesuffix(".*"), None)
    return model
