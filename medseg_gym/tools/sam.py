"""SAM and MedSAM on transformers' SamModel, with our own pre- and postprocessing instead of its processors."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from medseg_gym.errors import BadDataError
from medseg_gym.frames import PaddedFrame, ToolFrame
from medseg_gym.tools.base import ALL_PROMPTS
from medseg_gym.tools.network import Frame, NetworkTool, Options, upsample
from medseg_gym.tools.sam_config import published, published_size
from medseg_gym.tools.weights import find_weights, read_state
from medseg_gym.types import Box, Image, Prompt, Query

if TYPE_CHECKING:
    import torch

MEAN = (123.675, 116.28, 103.53)  # of RGB in [0, 255]
STD = (58.395, 57.12, 57.375)
MEDSAM_DEFAULTS = {"multimask": False, "feed_prior": False}


class SamTool(NetworkTool):
    """A SAM model: the longest side scaled to the input's, padded right or below, prompts and prior alike.

    A padding point goes with clicks when there is no box, as SAM was trained. Without `multimask` the answer is the
    single mask. The prior is what SAM's own predictor gives back: the low-resolution logits, padding included.
    """

    version = 1
    levels = ("image",)
    takes: frozenset[type[Prompt]] = ALL_PROMPTS
    pads = True  # the low resolution is the padded square's, for start masks (base.given_state)

    def __init__(self, model: Any, *, name: str = "SAM", **options: Any) -> None:
        """A SamModel; `options` are those of network.Options."""
        super().__init__(
            model,
            name=name,
            size=int(model.config.prompt_encoder_config.image_size),
            options=Options.of(options, "name"),
            prompts=self.takes,
        )

    @classmethod
    def from_pretrained(cls, path: str | Path, *, config: Any = None, **options: Any) -> SamTool:
        """The tool of a folder in transformers' format, or of a file of the segment-anything package's.

        Nothing is fetched and no pickle is run. `config` is the model of a file: ViT-B unless told. Weights that are
        missing, left over or of another shape raise BadDataError.
        """
        path = Path(path)
        if path.is_dir():
            return cls(_read_folder(path, config), **options)
        from medseg_gym.tools.sam_original import model_of

        return cls(model_of(read_state(path), published() if config is None else config, path), **options)

    @classmethod
    def from_config(cls, config: Any, seed: int, **options: Any) -> SamTool:
        """The tool with random weights, scaled so that logits have a standard deviation above 1: for tests, timing."""
        from medseg_gym.tools.sam_config import random_model

        return cls(random_model(config, seed), **options)

    def preprocess(self, image: Image) -> torch.Tensor:
        return padded_pixels(image, self.size)

    def features(self, pixels: torch.Tensor) -> Sequence[torch.Tensor]:
        return [self.model.get_image_embeddings(pixels)]

    def decode(
        self,
        levels: list[torch.Tensor],
        points: torch.Tensor | None,
        labels: torch.Tensor | None,
        boxes: torch.Tensor | None,
        priors: torch.Tensor | None,
        queries: Sequence[Query],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        inputs = {"input_points": points, "input_labels": labels, "input_boxes": boxes, "input_masks": priors}
        output = self.model(
            image_embeddings=levels[0],
            multimask_output=self.options.multimask,
            **{name: value[:, None] for name, value in inputs.items() if value is not None},
        )
        return output.pred_masks[:, 0], output.iou_scores[:, 0]

    def frame(self, height: int, width: int) -> Frame:
        return PaddedFrame(height, width, self.size)

    def upsample(self, low: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """To the input's size, without the padding, to the image's size: bilinear, in this order, as SAM's own."""
        rows, columns = PaddedFrame(height, width, self.size).content
        return upsample(upsample(low, self.size, self.size)[:rows, :columns], height, width)


class MedSamTool(SamTool):
    """MedSAM (Ma et al., Nature Communications 2024): SAM ViT-B tuned on medical images, with boxes only.

    As in the authors' MedSAM_Inference.py: the image stretched per axis, cubic, and brought from its least and largest
    value to [0, 1] without SAM's mean and deviation; the single mask; no prior; and it is the probabilities that are
    upsampled, in one step.
    """

    takes: frozenset[type[Prompt]] = frozenset({Box})
    pads = False

    def __init__(self, model: Any, *, name: str = "MedSAM", **options: Any) -> None:
        super().__init__(model, name=name, **{**MEDSAM_DEFAULTS, **options})

    def preprocess(self, image: Image) -> torch.Tensor:
        return stretched_pixels(image, self.size)

    def frame(self, height: int, width: int) -> Frame:
        return ToolFrame(height, width, self.size)

    def upsample(self, low: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """The logits of upsampled probabilities: positive exactly where the probability is above one half."""
        import torch

        inside, outside = (upsample(torch.sigmoid(sign * low.double()), height, width) for sign in (1, -1))
        return (inside.log() - outside.log()).float()


def padded_pixels(image: Image, size: int) -> torch.Tensor:
    """SAM's (1, 3, size, size) float32 input: bilinear on bytes (Pillow's), mean and deviation, then zeros as padding.

    The same values as SAM's own transform, which goes through Pillow too.
    """
    import PIL.Image
    import torch

    rows, columns = PaddedFrame(image.shape[0], image.shape[1], size).content
    bytes_ = PIL.Image.fromarray(image).resize((columns, rows), PIL.Image.Resampling.BILINEAR)
    pixels = torch.zeros(1, 3, size, size)
    pixels[0, :, :rows, :columns] = _normalised(torch.from_numpy(np.array(bytes_)).permute(2, 0, 1).float())
    return pixels


def stretched_pixels(image: Image, size: int) -> torch.Tensor:
    """MedSAM's (1, 3, size, size) float32 input in [0, 1]; a plain image is 0.

    Cubic splines after a Gaussian where the image shrinks, and cut to bytes: what scikit-image's resize does there.
    """
    import torch
    from scipy import ndimage

    factors = np.array(image.shape) / (size, size, 3)
    values = ndimage.gaussian_filter(image.astype(float), np.maximum(0, (factors - 1) / 2), mode="mirror")
    values = ndimage.zoom(values, 1 / factors, order=3, mode="mirror", grid_mode=True)
    values = np.clip(values, image.min(), image.max()).astype(np.uint8).astype(float)
    values = (values - values.min()) / max(np.ptp(values), 1e-8)
    return torch.from_numpy(values).float().permute(2, 0, 1)[None].contiguous()


def _normalised(pixels: torch.Tensor) -> torch.Tensor:
    import torch

    return (pixels - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


def _read_folder(folder: Path, wanted: Any) -> Any:
    """The SamModel of a folder in transformers' format, complete and of no other published size, or BadDataError."""
    import torch
    from transformers import SamConfig, SamModel

    found = published_size(SamConfig.from_pretrained(folder, local_files_only=True))
    size = None if wanted is None else published_size(wanted)
    if None not in (found, size) and found != size:  # a larger model under a smaller one's name
        raise BadDataError(f"{folder} is SAM's size {found}, wanted {size}; name the tool of that size")
    loaded: Any = SamModel.from_pretrained(
        folder,
        dtype=torch.float32,
        local_files_only=True,
        use_safetensors=True,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
    )
    model, report = loaded
    wrong = sorted(report["missing_keys"]) + sorted(str(entry) for entry in report["mismatched_keys"])
    if wrong:
        raise BadDataError(
            f"{folder}: not a whole SAM checkpoint; {len(wrong)} weights are missing or of another shape, "
            f"first {wrong[0]}"
        )
    return model


def load_checkpoint(
    kind: type[SamTool], name: str, size: str, *, weights: str | Path | None = None, **options: Any
) -> SamTool:
    """A tool of the catalogue from its weights in the data home, or from the folder or file `weights`."""
    return kind.from_pretrained(find_weights(name, weights), config=published(size), name=name, **options)


load_sam_base = partial(load_checkpoint, SamTool, "SAMB", "B")
load_sam_large = partial(load_checkpoint, SamTool, "SAML", "L")
load_sam_huge = partial(load_checkpoint, SamTool, "SAMH", "H")
load_medsam = partial(load_checkpoint, MedSamTool, "MedSAM", "B")
