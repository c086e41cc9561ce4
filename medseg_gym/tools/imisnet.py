"""IMISNet as a tool: its preprocessing, its answers, its checkpoint file and its optional text prompt."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medseg_gym.errors import BadDataError, WeightsMissingError
from medseg_gym.frames import ToolFrame
from medseg_gym.tools.network import NetworkTool, Options, upsample
from medseg_gym.tools.sam import MEAN, STD
from medseg_gym.tools.weights import find_weights, read_state
from medseg_gym.types import Image, Query

if TYPE_CHECKING:
    import torch

SENTENCE = "A segmentation area of a {}."  # what the authors put a structure's name into
LONGEST = 77  # CLIP's text positions
TOKENIZER_FILES = (("tokenizer.json",), ("vocab.json", "merges.txt"))  # either serves


class IMISNetTool(NetworkTool):
    """IMISNet (Cheng et al., CVPR 2025): clicks, box and prior as in SAM, at the image stretched per axis.

    With `tokens` the same text goes with every query, as one more sparse token and as its share in every mask.
    Without `multimask` the answer is the first of the four masks.
    """

    version = 1
    levels = ("image",)

    def __init__(
        self, model: Any, *, name: str = "IMISNet", tokens: Sequence[int] | None = None, **options: Any
    ) -> None:
        """An imisnet_net.IMISNet; `tokens` are CLIP's ids of a text, end-of-text included; else network.Options."""
        import torch

        text = model.config.text
        if tokens is not None and not (text.eos_token_id in tokens and len(tokens) <= text.max_position_embeddings):
            raise BadDataError(
                f"{len(tokens)} text tokens; wanted at most {text.max_position_embeddings}, with the end-of-text token "
                f"{text.eos_token_id} among them"
            )
        super().__init__(
            model,
            name=name,
            size=int(model.config.sam.prompt_encoder_config.image_size),
            options=Options.of(options, "name", "tokens"),
            tokens=None if tokens is None else [int(token) for token in tokens],
        )
        self._text: torch.Tensor | None = None
        if tokens is not None:
            with torch.inference_mode():
                self._text = self.model.text(self.to_device(torch.tensor([list(tokens)])))

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        config: Any = None,
        text: str | None = None,
        tokenizer: str | Path | None = None,
        **options: Any,
    ) -> IMISNetTool:
        """The tool of the authors' checkpoint file, or of a folder's model.safetensors with the same key names.

        `text` is a structure's name, for which CLIP's tokenizer files lie beside the weights or in the folder
        `tokenizer`. Weights that are missing, left over or of another shape raise BadDataError.
        """
        from medseg_gym.tools.imisnet_net import imisnet_config, model_of

        path = Path(path)
        file = path / "model.safetensors" if path.is_dir() else path
        if text is not None:
            options["tokens"] = tokenize(text, file.parent if tokenizer is None else Path(tokenizer).expanduser())
        elif tokenizer is not None:
            raise ValueError("tokenizer= is for a text prompt, and there is no text=")
        return cls(model_of(read_state(file), imisnet_config() if config is None else config, file), **options)

    @classmethod
    def from_config(cls, config: Any, seed: int, **options: Any) -> IMISNetTool:
        """The tool with random weights, scaled so that logits have a standard deviation above 1: for tests, timing."""
        from medseg_gym.tools.imisnet_net import random_model

        return cls(random_model(config, seed), **options)

    def preprocess(self, image: Image) -> torch.Tensor:
        return nearest_pixels(image, self.size)

    def features(self, pixels: torch.Tensor) -> Sequence[torch.Tensor]:
        return [self.model.image(pixels)]

    def decode(
        self,
        levels: list[torch.Tensor],
        points: torch.Tensor | None,
        labels: torch.Tensor | None,
        boxes: torch.Tensor | None,
        priors: torch.Tensor | None,
        queries: Sequence[Query],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        text = None if self._text is None else self._text.expand(len(queries), -1)
        masks, scores, _ = self.model(levels[0], points, labels, boxes, priors, text)
        chosen = slice(1, None) if self.options.multimask else slice(0, 1)
        return masks[:, chosen], scores[:, chosen]

    def frame(self, height: int, width: int) -> ToolFrame:
        return ToolFrame(height, width, self.size)

    def upsample(self, low: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """To the input's size, then to the image's, both bilinear. The mask's sigmoid is above .5 where this is > 0."""
        return upsample(upsample(low, self.size, self.size), height, width)


def nearest_pixels(image: Image, size: int) -> torch.Tensor:
    """IMISNet's (1, 3, size, size) float32 input: nearest neighbours per axis, then SAM's mean and deviation."""
    import torch
    from torch.nn.functional import interpolate

    pixels = interpolate(torch.tensor(image).permute(2, 0, 1)[None].float(), (size, size), mode="nearest")
    return (pixels - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


def tokenize(text: str, folder: Path) -> list[int]:
    """CLIP's token ids of the authors' sentence about a structure, begin and end included; at most 77."""
    if not any(all((folder / name).is_file() for name in names) for names in TOKENIZER_FILES):
        wanted = " or ".join(" and ".join(names) for names in TOKENIZER_FILES)
        raise WeightsMissingError(
            f"a text prompt needs CLIP's tokenizer: {folder} has no {wanted}; put there those of "
            f"openai/clip-vit-base-patch32, or name their folder with tokenizer=PATH"
        )
    from transformers import CLIPTokenizer

    tokenizer: Any = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    ids: list[int] = tokenizer(SENTENCE.format(text), truncation=True, max_length=LONGEST)["input_ids"]
    return ids


def load_checkpoint(name: str, *, weights: str | Path | None = None, **options: Any) -> IMISNetTool:
    """A tool of the catalogue from its weights in the data home, or from the file `weights`."""
    return IMISNetTool.from_pretrained(find_weights(name, weights), name=name, **options)


load_imisnet = partial(load_checkpoint, "IMISNet")
