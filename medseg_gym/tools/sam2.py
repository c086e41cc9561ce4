"""SAM 2.1 and MedSAM2 on transformers' Sam2Model, with our own pre- and postprocessing instead of its processors."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from medseg_gym.errors import BadDataError, unknown
from medseg_gym.frames import ToolFrame
from medseg_gym.images import image_hash
from medseg_gym.tools.base import ALL_PROMPTS, Memory, buckets, fingerprint
from medseg_gym.tools.sam2_config import resized
from medseg_gym.tools.weights import find_weights, state_sha256
from medseg_gym.types import Box, Click, Embedding, Image, Logits, Prediction, Query

if TYPE_CHECKING:
    import torch

Preprocess = Literal["sam2", "hf"]
Dtype = Literal["float32", "bfloat16", "float16"]

VERSION = 1  # of the pre- and postprocessing below; part of the fingerprint
MEAN = (0.485, 0.456, 0.406)  # ImageNet's, of RGB in [0, 1]
STD = (0.229, 0.224, 0.225)
PRIOR_LIMIT = 32.0  # SAM 2's own predictor clamps the logits it feeds back to +-32
GPU_BATCH = 16
POSITION_KEYS = ("shared_image_embedding.positional_embedding", "prompt_encoder.shared_embedding.positional_embedding")
LEVELS = ("level0", "level1", "level2")  # features at 1/4, 1/8 and 1/16 of the input's side


class Sam2Tool:
    """A SAM 2.1 model. Clicks and box go in as one prompt set, with the previous low-resolution logits.

    The encoder runs and embeddings are kept in `dtype`; the decoder always runs in float32, where coordinates are
    exact. With `multimask` the answer is the one of three masks with the largest predicted IoU (the first of equals);
    without it, the model's single mask, with its own fallback to the best of three when that mask is unstable.
    """

    def __init__(
        self,
        model: Any,
        *,
        name: str = "SAM2",
        preprocess: Preprocess = "sam2",
        multimask: bool = True,
        feed_prior: bool = True,
        memory: Memory = "cumulative",
        dtype: Dtype = "float32",
        device: str = "cpu",
        max_batch: int | None = None,
    ) -> None:
        for kind, value, known in (
            ("preprocess", preprocess, get_args(Preprocess)),
            ("dtype", dtype, get_args(Dtype)),
            ("memory", memory, get_args(Memory)),
        ):
            if value not in known:
                raise unknown(kind, value, known)
        self.name = name
        self.prompts = ALL_PROMPTS
        self.memory: Memory = memory
        self.size = int(model.config.prompt_encoder_config.image_size)
        self.max_batch = max_batch if max_batch is not None else (1 if device == "cpu" else GPU_BATCH)
        if self.max_batch < 1:
            raise ValueError(f"max_batch is {self.max_batch}; wanted 1 or more")
        self._preprocess, self._multimask, self._feed_prior = preprocess, multimask, feed_prior
        self._dtype, self._device = dtype, device
        self.fingerprint = fingerprint(
            name,
            version=VERSION,
            weights=state_sha256(model.state_dict()),
            size=self.size,
            preprocess=preprocess,
            multimask=multimask,
            feed_prior=feed_prior,
            memory=memory,
            dtype=dtype,
        )
        self.model = model.eval().requires_grad_(False).to(device)

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, size: int | None = None, **options: Any) -> Sam2Tool:
        """The tool of a local folder with config.json and model.safetensors; nothing is fetched, no pickle is read.

        `size` is the input's side where it is not the checkpoint's own (MedSAM2 works at 512). A checkpoint that
        lacks weights of the model, or has them in other shapes, raises BadDataError.
        """
        return cls(_read_model(Path(folder), size), **options)

    @classmethod
    def from_config(cls, config: Any, seed: int, **options: Any) -> Sam2Tool:
        """The tool with random weights, scaled so that logits have a standard deviation above 1: for tests, timing."""
        from medseg_gym.tools.sam2_config import random_model

        return cls(random_model(config, seed), **options)

    def prior_shape(self, height: int, width: int) -> tuple[int, int]:
        """A quarter of the input's side each way, whatever the image's size."""
        return self.size // 4, self.size // 4

    def encode(self, images: Sequence[Image]) -> list[Embedding]:
        """Three feature levels an image, as tensors on the tool's device; pure."""
        import torch

        embeddings: list[Embedding] = []
        for start in range(0, len(images), self.max_batch):
            chunk = images[start : start + self.max_batch]
            with torch.inference_mode():
                pixels = torch.cat([preprocess(image, self.size, self._preprocess) for image in chunk])
                levels = self._features(pixels.to(self._device))
            for row, image in enumerate(chunk):
                # A slice would keep the whole batch alive behind the cache's back.
                features = {name: level[row : row + 1].clone() for name, level in zip(LEVELS, levels, strict=True)}
                embeddings.append(Embedding(image_hash(image), image.shape[0], image.shape[1], features))
        return embeddings

    def predict(self, queries: Sequence[Query]) -> list[Prediction]:
        """One prediction a query, in order. Queries share a forward pass if they have as many clicks, box and prior."""
        import torch

        answers: dict[int, Prediction] = {}
        with torch.inference_mode():
            for positions, chunk in buckets(queries, self._bucket, self.max_batch):
                answers.update(zip(positions, self._predict(chunk), strict=True))
        return [answers[position] for position in range(len(queries))]

    def _features(self, pixels: torch.Tensor) -> list[torch.Tensor]:
        import torch

        if self._dtype == "float32":
            return list(self.model.get_image_embeddings(pixels))
        dtype = getattr(torch, self._dtype)
        with torch.autocast(torch.device(self._device).type, dtype=dtype):
            return [level.to(dtype) for level in self.model.get_image_embeddings(pixels)]

    def _bucket(self, query: Query) -> tuple[int, bool, bool]:
        boxes = sum(isinstance(prompt, Box) for prompt in query.prompts)
        if not query.prompts or boxes > 1:
            raise ValueError(f"{self.name} needs one prompt or more and at most one box; got {query.prompts}")
        return len(query.prompts) - boxes, boxes == 1, self._feed_prior and query.prior is not None

    def _predict(self, queries: list[Query]) -> list[Prediction]:
        """One forward pass over queries of one bucket: no padding of prompts anywhere."""
        import torch

        clicks, box, prior = self._bucket(queries[0])
        inputs: dict[str, Any] = {}
        if clicks:
            given = [[p for p in query.prompts if isinstance(p, Click)] for query in queries]
            points = [
                [self._frame(query).to_tool(p.x, p.y) for p in row] for query, row in zip(queries, given, strict=True)
            ]
            labels = [[int(p.positive) for p in row] for row in given]
            inputs["input_points"] = self._tensor(points)[:, None]
            inputs["input_labels"] = torch.tensor(labels, dtype=torch.int64, device=self._device)[:, None]
        if box:
            corners = [
                [*self._frame(query).to_tool(p.x1, p.y1), *self._frame(query).to_tool(p.x2, p.y2)]
                for query in queries
                for p in query.prompts
                if isinstance(p, Box)
            ]
            inputs["input_boxes"] = self._tensor(corners)[:, None]
        if prior:
            inputs["input_masks"] = self._tensor(np.stack([self._prior(query) for query in queries]))[:, None]
        levels = [torch.cat([q.embedding.features[name] for q in queries]).float() for name in LEVELS]
        output = self.model(image_embeddings=levels, multimask_output=self._multimask, **inputs)
        scores, masks = output.iou_scores[:, 0].float(), output.pred_masks[:, 0].float()
        rows = torch.arange(len(queries), device=masks.device)
        best = scores.argmax(dim=1)
        chosen, ious = masks[rows, best], scores[rows, best].tolist()
        return [
            Prediction(
                logits=upsample(low, query.embedding.height, query.embedding.width),
                predicted_iou=iou,
                prior=low.clamp(-PRIOR_LIMIT, PRIOR_LIMIT).cpu().numpy(),
            )
            for query, low, iou in zip(queries, chosen, ious, strict=True)
        ]

    def _frame(self, query: Query) -> ToolFrame:
        return ToolFrame(query.embedding.height, query.embedding.width, self.size)

    def _prior(self, query: Query) -> Logits:
        wanted = self.prior_shape(query.embedding.height, query.embedding.width)
        assert query.prior is not None
        if query.prior.shape != wanted:
            raise ValueError(f"{self.name}'s prior is {query.prior.shape}; wanted {wanted}, the shape it answers with")
        return query.prior

    def _tensor(self, values: Any) -> torch.Tensor:
        import torch

        return torch.tensor(values, dtype=torch.float32, device=self._device)


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


def upsample(low: torch.Tensor, height: int, width: int) -> Logits:
    """The (H, W) float32 logits of (h, w) low-resolution ones, bilinear."""
    from torch.nn.functional import interpolate

    logits = interpolate(low[None, None], (height, width), mode="bilinear", align_corners=False)[0, 0]
    return np.array(logits.cpu().numpy())


def _read_model(folder: Path, size: int | None) -> Any:
    """The Sam2Model of a folder, complete or BadDataError."""
    import torch
    from transformers import Sam2Config, Sam2Model

    config = Sam2Config.from_pretrained(folder, local_files_only=True)
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
    *,
    size: int,
    weights: str | Path | None = None,
    preprocess: Preprocess = "sam2",
    multimask: bool = True,
    feed_prior: bool = True,
    memory: Memory = "cumulative",
    dtype: Dtype = "float32",
    device: str = "cpu",
    max_batch: int | None = None,
) -> Sam2Tool:
    """A tool of the catalogue from its checkpoint in the data home, or from the folder `weights`."""
    return Sam2Tool.from_pretrained(
        find_weights(name, weights),
        size=size,
        name=name,
        preprocess=preprocess,
        multimask=multimask,
        feed_prior=feed_prior,
        memory=memory,
        dtype=dtype,
        device=device,
        max_batch=max_batch,
    )


load_sam21_tiny = partial(load_checkpoint, "SAM2.1T", size=1024)
load_sam21_small = partial(load_checkpoint, "SAM2.1S", size=1024)
load_sam21_base = partial(load_checkpoint, "SAM2.1BPlus", size=1024)
load_sam21_large = partial(load_checkpoint, "SAM2.1L", size=1024)
load_medsam2 = partial(load_checkpoint, "MedSAM2", size=512)
