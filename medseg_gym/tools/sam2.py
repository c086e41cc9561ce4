"""SAM 2.1 and MedSAM2 on transformers' Sam2Model, with our own pre- and postprocessing instead of its processors."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

from medseg_gym.errors import BadDataError, unknown
from medseg_gym.frames import ToolFrame
from medseg_gym.tools.network import NetworkTool, Options
from medseg_gym.tools.sam2_config import published_size, resized
from medseg_gym.tools.sam2_original import POSITION_KEYS, read_original
from medseg_gym.tools.weights import find_weights
from medseg_gym.types import Image, Query

if TYPE_CHECKING:
    import torch

Preprocess = Literal["sam2", "hf"]
Engine = Literal["transformers", "sam2"]

MEAN = (0.485, 0.456, 0.406)  # ImageNet's, of RGB in [0, 1]
STD = (0.229, 0.224, 0.225)


class Sam2Tool(NetworkTool):
    """A SAM 2.1 model. Clicks and box go in as one prompt set, with the previous low-resolution logits.

    Without `multimask` the answer is the model's single mask, with its own fallback to the best of three when that
    mask is unstable.
    """

    version = 2
    levels = ("level0", "level1", "level2")  # features at 1/4, 1/8 and 1/16 of the input's side
    prior_limit = 32.0  # SAM 2's own predictor clamps the logits it feeds back
    engine: ClassVar[str] = "transformers"

    def __init__(self, model: Any, *, name: str = "SAM2", preprocess: Preprocess = "sam2", **options: Any) -> None:
        """A Sam2Model; `options` are those of network.Options."""
        if preprocess not in get_args(Preprocess):
            raise unknown("preprocess", preprocess, get_args(Preprocess))
        self._preprocess = preprocess
        super().__init__(
            model,
            name=name,
            size=self.input_size(model),
            options=Options.of(options, "name", "preprocess"),
            preprocess=preprocess,
            engine=self.engine,
        )

    @classmethod
    def from_pretrained(
        cls, path: str | Path, *, hiera: str | None = None, size: int | None = None, **options: Any
    ) -> Sam2Tool:
        """The tool of a local checkpoint: a folder in transformers' format or a file of the sam2 package or MedSAM2.

        Nothing is fetched, no pickle is run. `hiera` says which published size a file is ("T", "S", "BPlus", "L");
        by default its weights do. `size` is the input's side where it is not the checkpoint's own (MedSAM2 works at
        512). Weights that are missing, left over or of other shapes raise BadDataError.
        """
        return cls(read_model(Path(path), hiera=hiera, size=size), **options)

    @classmethod
    def from_config(cls, config: Any, seed: int, **options: Any) -> Sam2Tool:
        """The tool with random weights, scaled so that logits have a standard deviation above 1: for tests, timing."""
        from medseg_gym.tools.sam2_config import random_model

        return cls(random_model(config, seed), **options)

    @staticmethod
    def input_size(model: Any) -> int:
        return int(model.config.prompt_encoder_config.image_size)

    def preprocess(self, image: Image) -> torch.Tensor:
        return preprocess(image, self.size, self._preprocess)

    def features(self, pixels: torch.Tensor) -> Sequence[torch.Tensor]:
        return list(self.model.get_image_embeddings(pixels))

    def decode(
        self,
        levels: list[torch.Tensor],
        points: torch.Tensor | None,
        labels: torch.Tensor | None,
        boxes: torch.Tensor | None,
        priors: torch.Tensor | None,
        queries: Sequence[Query],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        inputs: dict[str, Any] = {
            "input_points": points,
            "input_labels": labels,
            "input_boxes": boxes,
            "input_masks": priors,
        }
        output = self.model(
            image_embeddings=levels,
            multimask_output=self.options.multimask,
            **{name: value[:, None] for name, value in inputs.items() if value is not None},
        )
        return output.pred_masks[:, 0], output.iou_scores[:, 0]

    def frame(self, height: int, width: int) -> ToolFrame:
        return ToolFrame(height, width, self.size)


def preprocess(image: Image, size: int, how: Preprocess = "sam2") -> torch.Tensor:
    """The (1, 3, size, size) float32 input of an (H, W, 3) image, stretched per axis, on the CPU.

    "sam2" divides by 255 and then resizes, as the sam2 package does; "hf" resizes the bytes and then divides, as
    transformers' processor does (within 2e-7). Both resize bilinearly with antialiasing and differ by a grey level.
    """
    import torch
    from torch.nn.functional import interpolate

    pixels = torch.tensor(image).permute(2, 0, 1)[None]
    if how == "sam2":
        pixels = pixels.contiguous().float().div_(255)
    pixels = interpolate(pixels, (size, size), mode="bilinear", align_corners=False, antialias=True)
    if how == "hf":
        pixels = pixels.contiguous().float().div_(255)
    mean, std = torch.tensor(MEAN)[None, :, None, None], torch.tensor(STD)[None, :, None, None]
    return pixels.sub_(mean).div_(std)


def read_model(path: Path, *, hiera: str | None = None, size: int | None = None) -> Any:
    """The Sam2Model of a folder or of an original file, in float32; complete, or BadDataError."""
    return _read_folder(path, hiera, size) if path.is_dir() else read_original(path, hiera, size or 1024)


def _read_folder(folder: Path, hiera: str | None, size: int | None) -> Any:
    import torch
    from transformers import Sam2Config, Sam2Model

    config = Sam2Config.from_pretrained(folder, local_files_only=True)
    found = published_size(config)
    if hiera is not None and found not in (None, hiera):  # a larger model under a smaller one's name
        raise BadDataError(f"{folder} is SAM 2.1's size {found}, wanted {hiera}; name the tool of that size")
    if size is not None:
        config = resized(config, size)
    loaded: Any = Sam2Model.from_pretrained(
        folder,
        config=config,
        dtype=torch.float32,
        local_files_only=True,
        use_safetensors=True,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
    )
    model, report = loaded
    missing = set(report["missing_keys"])
    # The two are one matrix in every trained SAM 2, and some writers keep a single copy of it.
    image, prompt = model.shared_image_embedding, model.prompt_encoder.shared_embedding
    lost = [name in missing for name in POSITION_KEYS]
    if sum(lost) == 1:
        source, copy = (prompt, image) if lost[0] else (image, prompt)
        copy.positional_embedding.data.copy_(source.positional_embedding)
        missing -= set(POSITION_KEYS)
    wrong = sorted(missing) + sorted(str(entry) for entry in report["mismatched_keys"])
    if wrong:
        raise BadDataError(
            f"{folder}: not a whole SAM 2.1 checkpoint; {len(wrong)} weights are missing or of another shape, "
            f"first {wrong[0]}"
        )
    return model


def load_checkpoint(
    name: str,
    hiera: str,
    *,
    size: int,
    weights: str | Path | None = None,
    engine: Engine = "transformers",
    preprocess: Preprocess = "sam2",
    **options: Any,
) -> Sam2Tool:
    """A tool of the catalogue, from its weights in the data home or from the folder or file `weights`.

    `engine` is the library that runs the network; `options` are those of network.Options.
    """
    Options.of(options, "size", "weights", "engine", "preprocess")  # before weights are looked for and read
    if engine not in get_args(Engine):
        raise unknown("engine", engine, get_args(Engine))
    kind = Sam2Tool
    if engine == "sam2":
        from medseg_gym.tools.sam2_package import Sam2PackageTool, check_installed

        check_installed()
        kind = Sam2PackageTool
    path = find_weights(name, weights)
    return kind.from_pretrained(path, hiera=hiera, size=size, name=name, preprocess=preprocess, **options)


load_sam21_tiny = partial(load_checkpoint, "SAM2.1T", "T", size=1024)
load_sam21_small = partial(load_checkpoint, "SAM2.1S", "S", size=1024)
load_sam21_base = partial(load_checkpoint, "SAM2.1BPlus", "BPlus", size=1024)
load_sam21_large = partial(load_checkpoint, "SAM2.1L", "L", size=1024)
load_medsam2 = partial(load_checkpoint, "MedSAM2", "T", size=512)
