"""How a SAM-like network is asked: what SAM, SAM 2.1, MedSAM2 and IMISNet share between images, prompts and answers."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, get_args

import numpy as np

from medseg_gym.errors import MedSegError, check_keywords, unknown
from medseg_gym.images import image_hash
from medseg_gym.tools.base import ALL_PROMPTS, Memory, buckets, check_memory, fingerprint
from medseg_gym.tools.weights import state_sha256
from medseg_gym.types import Box, Click, Embedding, Image, Logits, Prediction, Prompt, Query

if TYPE_CHECKING:
    import torch

Dtype = Literal["float32", "bfloat16", "float16"]
GPU_BATCH = 16


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The switches every network has. Values that do not exist raise.

    multimask: answer with the one of three masks whose predicted IoU is largest (the first of equals), not with the
        single mask. feed_prior: feed the query's prior to the decoder. memory: what a query carries (tools/base.py).
    dtype: embeddings are kept in it, and off the CPU the encoder runs in it; the decoder always runs in float32, where
        coordinates are exact. max_batch: None is 1 on a CPU, where batching costs, and 16 elsewhere. compile:
        torch.compile's encoder, whose rounding may differ as another device's does.
    """

    multimask: bool = True
    feed_prior: bool = True
    memory: Memory = "cumulative"
    dtype: Dtype = "float32"
    device: str = "cpu"
    max_batch: int | None = None
    compile: bool = False

    def __post_init__(self) -> None:
        check_memory(self.memory)
        if self.dtype not in get_args(Dtype):
            raise unknown("dtype", self.dtype, get_args(Dtype))
        if self.max_batch is not None and self.max_batch < 1:
            raise ValueError(f"max_batch is {self.max_batch}; wanted 1 or more")

    @classmethod
    def of(cls, given: Mapping[str, Any], *also: str) -> Options:
        """The record of a tool's keywords; `also` names the tool's own ones, for the error of a mistyped one."""
        names = [field.name for field in dataclasses.fields(cls)]
        check_keywords("tool", given, [*names, *also])
        return cls(**given)


class Frame(Protocol):
    """Where a pixel of the image lies in the network's input; `frames.ToolFrame` is one."""

    def to_tool(self, x: float, y: float) -> tuple[float, float]: ...


class NetworkTool(abc.ABC):
    """A segmentation tool around a network with an image encoder and a promptable mask decoder.

    A subclass sets `version` (of all its pre- and postprocessing) and `levels`, and says how an image becomes pixels,
    pixels features, and features with prompts masks. What it gets and gives there are tensors on the tool's device,
    under inference_mode; here they are put into batches, chosen from, and made Embeddings and Predictions.
    """

    version: ClassVar[int]
    levels: ClassVar[tuple[str, ...]]  # names of what `features` gives, in order
    prior_limit: ClassVar[float | None] = None  # the prior is clamped to +- this; the logits are not

    def __init__(
        self,
        model: Any,
        *,
        name: str,
        size: int,
        options: Options,
        prompts: frozenset[type[Prompt]] = ALL_PROMPTS,
        **parts: Any,
    ) -> None:
        """`model` is a torch module, moved to the device here; `size` the side of its input; `parts` are the switches
        of the subclass that change an answer, for the fingerprint."""
        check_device(options.device)
        self.name, self.size, self.options, self.prompts = name, size, options, prompts
        self.memory: Memory = options.memory
        on_cpu = options.device == "cpu"
        self.max_batch = options.max_batch if options.max_batch is not None else 1 if on_cpu else GPU_BATCH
        self.fingerprint = fingerprint(
            name,
            version=self.version,
            weights=state_sha256(model.state_dict()),
            size=size,
            multimask=options.multimask,
            feed_prior=options.feed_prior,
            memory=options.memory,
            dtype=options.dtype,
            **parts,
        )
        self.model = model.eval().requires_grad_(False).to(options.device)
        self._features = _compiled(self.features) if options.compile else self.features

    @abc.abstractmethod
    def preprocess(self, image: Image) -> torch.Tensor:
        """The (1, 3, size, size) float32 input of an (H, W, 3) image, on the CPU."""

    @abc.abstractmethod
    def features(self, pixels: torch.Tensor) -> Sequence[torch.Tensor]:
        """One tensor a level, (B, ...), of (B, 3, size, size) pixels; off the CPU under dtype's autocast."""

    @abc.abstractmethod
    def decode(
        self,
        levels: list[torch.Tensor],
        points: torch.Tensor | None,
        labels: torch.Tensor | None,
        boxes: torch.Tensor | None,
        priors: torch.Tensor | None,
        queries: Sequence[Query],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Low-resolution logits (B, M, h, w) and predicted IoU (B, M) of B queries with equally many prompts.

        levels: float32, (B, ...) each. points (B, P, 2) and boxes (B, 4): x, y in the input's pixels, from `frame`.
        labels (B, P): int64, 1 positive and 0 negative. priors (B, h, w). None where the queries have none of a kind.
        M is 1 without `multimask`; of several, the one of largest predicted IoU becomes the answer.
        """

    @abc.abstractmethod
    def frame(self, height: int, width: int) -> Frame:
        """From pixels of an (H, W) image to the network's input."""

    def upsample(self, low: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """The (H, W) logits of (h, w) low-resolution ones; bilinear over the whole image unless overridden."""
        return upsample(low, height, width)

    def prior_shape(self, height: int, width: int) -> tuple[int, int]:
        """A quarter of the input's side each way, whatever the image's size."""
        return self.size // 4, self.size // 4

    def encode(self, images: Sequence[Image]) -> list[Embedding]:
        """The feature levels of each image, as tensors on the tool's device; pure."""
        import torch

        embeddings: list[Embedding] = []
        with torch.inference_mode():
            for start in range(0, len(images), self.max_batch):
                chunk = images[start : start + self.max_batch]
                pixels = self.to_device(torch.cat([self.preprocess(image) for image in chunk]))
                levels = self._in_dtype(pixels)
                for row, image in enumerate(chunk):
                    # A slice would keep the whole batch alive behind the cache's back.
                    rows = {name: level[row : row + 1].clone() for name, level in zip(self.levels, levels, strict=True)}
                    embeddings.append(Embedding(image_hash(image), image.shape[0], image.shape[1], rows))
        return embeddings

    def predict(self, queries: Sequence[Query]) -> list[Prediction]:
        """One prediction a query, in order. Queries share a forward pass if they have as many clicks, box and prior."""
        import torch

        answers: dict[int, Prediction] = {}
        with torch.inference_mode():
            for positions, chunk in buckets(queries, self._bucket, self.max_batch):
                answers.update(zip(positions, self._predict(chunk), strict=True))
        return [answers[position] for position in range(len(queries))]

    def to_device(self, values: torch.Tensor) -> torch.Tensor:
        """CPU values on the tool's device; on CUDA through pinned memory, without waiting for the copy."""
        if self.options.device.startswith("cuda"):
            return values.pin_memory().to(self.options.device, non_blocking=True)
        return values.to(self.options.device)

    def _in_dtype(self, pixels: torch.Tensor) -> Sequence[torch.Tensor]:
        import torch

        if self.options.dtype == "float32":
            return self._features(pixels)
        dtype = getattr(torch, self.options.dtype)
        if pixels.device.type == "cpu":  # float16 takes it ten times as long; SAM 2.1's tiny encoder 105 s for 10
            return [level.to(dtype) for level in self._features(pixels)]
        with torch.autocast(pixels.device.type, dtype=dtype):
            return [level.to(dtype) for level in self._features(pixels)]

    def _bucket(self, query: Query) -> tuple[int, bool, bool]:
        boxes = sum(isinstance(prompt, Box) for prompt in query.prompts)
        if not query.prompts or boxes > 1:
            raise ValueError(f"{self.name} needs one prompt or more and at most one box; got {query.prompts}")
        strange = {type(prompt) for prompt in query.prompts} - self.prompts
        if strange:
            able = ", ".join(sorted(p.__name__ for p in self.prompts))
            raise ValueError(f"{self.name} cannot take {query.prompts}; it takes {able}")
        return len(query.prompts) - boxes, boxes == 1, self.options.feed_prior and query.prior is not None

    def _predict(self, queries: list[Query]) -> list[Prediction]:
        """One forward pass over queries of one bucket: no padding of prompts anywhere."""
        import torch

        clicks, box, prior = self._bucket(queries[0])
        frames = [self.frame(query.embedding.height, query.embedding.width) for query in queries]
        points = labels = boxes = priors = None
        if clicks:
            given = [[p for p in query.prompts if isinstance(p, Click)] for query in queries]
            rows = [[frame.to_tool(p.x, p.y) for p in row] for frame, row in zip(frames, given, strict=True)]
            points = self.to_device(torch.tensor(rows, dtype=torch.float32))
            labels = self.to_device(torch.tensor([[int(p.positive) for p in row] for row in given], dtype=torch.int64))
        if box:
            corners = [
                [*frame.to_tool(p.x1, p.y1), *frame.to_tool(p.x2, p.y2)]
                for frame, query in zip(frames, queries, strict=True)
                for p in query.prompts
                if isinstance(p, Box)
            ]
            boxes = self.to_device(torch.tensor(corners, dtype=torch.float32))
        if prior:
            priors = self.to_device(torch.from_numpy(np.stack([self._prior(query) for query in queries])))
        levels = [self._level(queries, name) for name in self.levels]
        masks, scores = self.decode(levels, points, labels, boxes, priors, queries)
        masks, scores = masks.float(), scores.float()
        best = scores.argmax(dim=1)
        every = torch.arange(len(queries), device=masks.device)
        low, ious = masks[every, best], scores[every, best]
        fed_back = low if self.prior_limit is None else low.clamp(-self.prior_limit, self.prior_limit)
        full = [self.upsample(row, q.embedding.height, q.embedding.width) for row, q in zip(low, queries, strict=True)]
        iou_rows, prior_rows, *logits = to_host([ious, fed_back, *full])
        return [
            Prediction(logits=row, predicted_iou=float(iou), prior=np.array(old))
            for row, iou, old in zip(logits, iou_rows, prior_rows, strict=True)
        ]

    def _level(self, queries: Sequence[Query], name: str) -> torch.Tensor:
        """One level of all queries as float32 on the device; embeddings read from a disk may lie elsewhere."""
        import torch

        device = self.options.device
        rows = [torch.as_tensor(query.embedding.features[name]).to(device, non_blocking=True) for query in queries]
        return torch.cat(rows).float()

    def _prior(self, query: Query) -> Logits:
        wanted = self.prior_shape(query.embedding.height, query.embedding.width)
        assert query.prior is not None
        if query.prior.shape != wanted:
            raise ValueError(f"{self.name}'s prior is {query.prior.shape}; wanted {wanted}, the shape it answers with")
        return np.asarray(query.prior, np.float32)


def upsample(low: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """(H, W) logits of (h, w) ones, bilinear between pixel centres."""
    from torch.nn.functional import interpolate

    return interpolate(low[None, None], (height, width), mode="bilinear", align_corners=False)[0, 0]


def to_host(tensors: Sequence[torch.Tensor]) -> list[np.ndarray]:
    """Each tensor as an array that owns its memory; from CUDA all are copied to pinned memory, and waited for once."""
    import torch

    if not tensors or tensors[0].device.type != "cuda":
        return [np.array(tensor.cpu().numpy()) for tensor in tensors]
    pinned = [torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True) for tensor in tensors]
    for copy, tensor in zip(pinned, tensors, strict=True):
        copy.copy_(tensor, non_blocking=True)
    torch.cuda.current_stream(tensors[0].device).synchronize()
    return [np.array(copy.numpy()) for copy in pinned]


def check_device(device: str) -> None:
    """MedSegError unless this PyTorch sees the device."""
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise MedSegError(f"device {device!r} cannot be used here ({reason}); device='cpu' always can") from None


def _compiled(function: Any) -> Any:
    """torch.compile for one static shape; the decoder is left out, whose shapes change with every prompt count."""
    import torch

    return torch.compile(function)
