"""Nano: the embedded tool, a small promptable network that looks at a window around what is prompted."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from medseg_gym.errors import BadDataError, WeightsMissingError
from medseg_gym.images import image_hash
from medseg_gym.tools import nano_maps as view
from medseg_gym.tools.base import ALL_PROMPTS, Memory, buckets, fingerprint
from medseg_gym.tools.nano_maps import Array, Window
from medseg_gym.types import Box, Click, Embedding, Image, Logits, Prediction, Query

VERSION = 1  # of everything around the network that changes an answer
WEIGHTS = Path(__file__).parent / "nano_weights" / "nano.safetensors"
SHA256 = "67eaf05650668f31ae4390cf074ca3ec348394685ed1ffce92a15ab7aa2e65c5"
PRIOR_SIDE = 512  # pixels of the prior's longer side, at most
SURE = 0.5  # the logit a click's own pixel has at least, in the click's favour
LOOK = 0.36  # size of the window a lone click is first seen in, as a share of the image's longer side; by validation
SECOND_MARGIN = 1.95  # of the windows in which that answer is asked again: it may have been cut off by the first
SECOND_LOOKS = 2  # and how often that answer is asked again, in a window around itself
# The network draws structures a little small. What is added to its logits was chosen on images held out of training:
LEAN_BOX, LEAN_FIRST, LEAN_LATER = 0.6, 0.3, 0.0  # with a box, at a lone first click, at later clicks without a box
EMPTY_REACH = 0.15  # half a window's side, as a share of the image, where clicks have found nothing yet


class Nano:
    """A U-Net of 1.2 M parameters over windows of 96 x 96 pixels, trained by baselines/train_nano.py.

    A box is seen in a window half as wide again. A first click without a box is seen in a window of about a third of
    the image, and its answer is asked again, twice, in a window around itself. Later clicks are seen in a window around
    the mask and all clicks. Every click's own pixel gets the click's sign. The prior is the image's frame, at most 512
    pixels a side; it is -8 where no window was. predicted_iou is the network's estimate.

    weights: another file of baselines/train_nano.py; then no checksum is wanted. max_batch: windows a forward pass.
    """

    def __init__(
        self,
        *,
        weights: str | Path | None = None,
        device: str = "cpu",
        memory: Memory = "cumulative",
        max_batch: int = 1,
    ) -> None:
        path = WEIGHTS if weights is None else Path(weights).expanduser()
        content = read_weights(path, SHA256 if weights is None else None)
        self.name = "Nano"
        self.prompts = ALL_PROMPTS
        self.memory: Memory = memory
        self.max_batch = max_batch
        self.device = device
        self._net = load_network(content, path, device)
        self._lock = threading.Lock()
        digest = hashlib.sha256(content).hexdigest()
        self.fingerprint = fingerprint("Nano", version=VERSION, weights=digest, memory=memory)

    @classmethod
    def of(cls, network: Any, *, max_batch: int = 1) -> Nano:
        """A tool around a network at hand; for training, which has no file yet."""
        tool = cls.__new__(cls)
        tool.name, tool.prompts, tool.memory, tool.max_batch = "Nano", ALL_PROMPTS, "cumulative", max_batch
        tool.device = str(next(network.parameters()).device)
        tool._net, tool._lock = network.eval(), threading.Lock()
        tool.fingerprint = fingerprint("Nano", version=VERSION, weights=f"memory {id(network)}", memory="cumulative")
        return tool

    def prior_shape(self, height: int, width: int) -> tuple[int, int]:
        """The image's size, scaled to at most 512 a side."""
        scale = min(1.0, PRIOR_SIDE / max(height, width))
        return max(1, round(height * scale)), max(1, round(width * scale))

    def encode(self, images: Sequence[Image]) -> list[Embedding]:
        """The image's pyramid; one channel where the three are equal."""
        embeddings = []
        for image in images:
            height, width = image.shape[:2]
            grey = np.array_equal(image[..., 0], image[..., 1]) and np.array_equal(image[..., 0], image[..., 2])
            levels = view.pyramid(np.array(image[..., 0] if grey else image))
            features = {f"level{i}": level for i, level in enumerate(levels)}
            embeddings.append(Embedding(image_hash(image), height, width, features))
        return embeddings

    def predict(self, queries: Sequence[Query]) -> list[Prediction]:
        """One answer a query; max_batch queries share a forward pass, first clicks apart from the others."""
        answers: list[Prediction | None] = [None] * len(queries)
        for positions, chunk in buckets(queries, _unplaced, self.max_batch):
            for position, prediction in zip(positions, self._predict(chunk), strict=True):
                answers[position] = prediction
        return [answer for answer in answers if answer is not None]

    def _predict(self, queries: list[Query]) -> list[Prediction]:
        priors = [query.prior for query in queries]
        unplaced = _unplaced(queries[0])
        windows = [_first_look(q) if unplaced else _window_around(q, q.prior) for q in queries]
        logits, quality = self._ask(queries, windows, priors)
        for _ in range(SECOND_LOOKS if unplaced else 0):
            sizes = [self.prior_shape(query.embedding.height, query.embedding.width) for query in queries]
            priors = [_pasted(*given) for given in zip(queries, windows, logits, sizes, strict=True)]
            windows = [_window_around(*asked, SECOND_MARGIN) for asked in zip(queries, priors, strict=True)]
            logits, quality = self._ask(queries, windows, priors)
        return [
            self._prediction(query, window, found, float(iou))
            for query, window, found, iou in zip(queries, windows, logits, quality, strict=True)
        ]

    def _ask(
        self, queries: Sequence[Query], windows: Sequence[Window], priors: Sequence[Logits | None]
    ) -> tuple[Array, Array]:
        """(B, S, S) logits in the windows and (B,) predicted IoU, in one forward pass."""
        import torch

        seen = np.stack([_seen(*asked) for asked in zip(queries, windows, priors, strict=True)])
        with torch.inference_mode():
            inputs = torch.from_numpy(seen).to(self.device).contiguous(memory_format=torch.channels_last)
            logits, quality = self._net(inputs)
        return logits.float().cpu().numpy(), quality.float().cpu().numpy()

    def _prediction(self, query: Query, window: Window, logits: Array, iou: float) -> Prediction:
        height, width = query.embedding.height, query.embedding.width
        h, w = self.prior_shape(height, width)
        logits = logits + np.float32(_lean(query))
        prior = _pasted(query, window, logits, (h, w))
        full = prior.copy() if (h, w) == (height, width) else _pasted(query, window, logits, (height, width))
        for prompt in query.prompts:
            if isinstance(prompt, Click):
                value = full[prompt.y, prompt.x]
                full[prompt.y, prompt.x] = max(value, SURE) if prompt.positive else min(value, -SURE)
        return Prediction(logits=full, predicted_iou=iou, prior=prior)


def _lean(query: Query) -> float:
    if _box(query) is not None:
        return LEAN_BOX
    return LEAN_FIRST if _unplaced(query) else LEAN_LATER


def _unplaced(query: Query) -> bool:
    """Clicks with neither box nor prior: nothing says yet how large the structure is."""
    return query.prior is None and _box(query) is None


def _first_look(query: Query) -> Window:
    """A window around the clicks, LOOK of the image wide or as wide as they need."""
    height, width = query.embedding.height, query.embedding.width
    clicks = _clicks(query)
    xs, ys = [click.x for click in clicks], [click.y for click in clicks]
    bounds = float(min(xs)), float(min(ys)), float(max(xs)), float(max(ys))
    return view.around(bounds, 1.0, max(LOOK * max(height, width), 2 * view.least_side(height, width)))


def _box(query: Query) -> Box | None:
    return next((p for p in query.prompts if isinstance(p, Box)), None)


def _clicks(query: Query) -> list[Click]:
    return [p for p in query.prompts if isinstance(p, Click)]


def _window_around(query: Query, prior: Logits | None, margin: float = view.MARGIN) -> Window:
    """Around the box and the clicks; without a box, around the prior's mask and the clicks."""
    height, width = query.embedding.height, query.embedding.width
    clicks, box = _clicks(query), _box(query)
    bounds: tuple[float, float, float, float] | None = None
    if box is not None:
        bounds = box.x1, box.y1, box.x2, box.y2
    elif prior is not None:
        fy, fx = prior.shape[0] / height, prior.shape[1] / width
        points = [((c.x + 0.5) * fx - 0.5, (c.y + 0.5) * fy - 0.5) for c in clicks]
        found = view.mask_bounds(prior > 0, points)
        if found is not None:
            x1, y1, x2, y2 = found
            bounds = (x1 + 0.5) / fx - 0.5, (y1 + 0.5) / fy - 0.5, (x2 + 0.5) / fx - 0.5, (y2 + 0.5) / fy - 0.5
    if bounds is None:
        reach, last = EMPTY_REACH * max(height, width), clicks[-1]
        bounds = last.x - reach, last.y - reach, last.x + reach, last.y + reach
    xs, ys = [bounds[0], bounds[2], *(c.x for c in clicks)], [bounds[1], bounds[3], *(c.y for c in clicks)]
    return view.around((min(xs), min(ys), max(xs), max(ys)), margin, view.least_side(height, width))


def _seen(query: Query, window: Window, prior: Logits | None) -> Array:
    """The network's input for a query through a window."""
    height, width = query.embedding.height, query.embedding.width
    features = query.embedding.features
    levels = [features[f"level{i}"] for i in range(len(features))]
    pixels = view.sample(levels, window.matrix())
    back = window.inverse()

    def to(x: float, y: float) -> tuple[float, float]:
        return float(back[0, 0] * x + back[0, 2]), float(back[1, 1] * y + back[1, 2])

    box = _box(query)
    old = None
    if prior is not None:
        shrink = _scaling((height, width), prior.shape)
        old = view.resample(
            np.ascontiguousarray(prior, np.float32), view.compose(window.matrix(), shrink), (view.SIDE,) * 2
        )
    return view.maps(
        pixels,
        None if box is None else (*to(box.x1, box.y1), *to(box.x2, box.y2)),
        [(*to(click.x, click.y), click.positive) for click in _clicks(query)],
        old,
        float(np.sqrt(window.w * window.h)) / max(height, width),
    )


def _pasted(query: Query, window: Window, logits: Array, size: tuple[int, int]) -> Logits:
    """(h, w) logits of the image's frame at that size: the window's, and OUTSIDE around it."""
    scaling = _scaling(size, (query.embedding.height, query.embedding.width))
    matrix = view.compose(scaling, window.inverse())  # pixel of the result -> window pixel
    x1, y1 = _floor((-0.5 - matrix[0, 2]) / matrix[0, 0]), _floor((-0.5 - matrix[1, 2]) / matrix[1, 1])
    x2 = _floor((view.SIDE - 0.5 - matrix[0, 2]) / matrix[0, 0]) + 1
    y2 = _floor((view.SIDE - 0.5 - matrix[1, 2]) / matrix[1, 1]) + 1
    x1, y1, x2, y2 = max(0, x1), max(0, y1), min(size[1], x2), min(size[0], y2)
    out = np.full(size, view.OUTSIDE, np.float32)
    if x1 < x2 and y1 < y2:
        shifted = view.compose(np.array([[1.0, 0, x1], [0, 1.0, y1]]), matrix)
        out[y1:y2, x1:x2] = view.resample(logits, shifted, (y2 - y1, x2 - x1))
    return out


def _scaling(size: tuple[int, int], to: tuple[int, ...]) -> Array:
    """(2, 3): a pixel of an image of one size -> the same place in one of the other."""
    fy, fx = to[0] / size[0], to[1] / size[1]
    return np.array([[fx, 0, (fx - 1) / 2], [0, fy, (fy - 1) / 2]])


def _floor(value: float) -> int:
    return int(np.floor(value))


def read_weights(path: Path, sha256: str | None) -> bytes:
    """The bytes of a weight file, checked against its sha256 where one is wanted."""
    mend = (
        "reinstall medseg-gym (`pip install --force-reinstall --no-deps medseg-gym`), or train with "
        "`python baselines/train_nano.py` and name the file with weights=PATH"
    )
    wanted = "" if sha256 is None else f" with sha256 {sha256}"
    if not path.is_file():
        raise WeightsMissingError(f"Nano needs its weights: {path} is not there; wanted a file{wanted}; {mend}")
    content = path.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if sha256 is not None and found != sha256:
        raise BadDataError(f"{path} is damaged: its sha256 is {found}, wanted {sha256}; {mend}")
    return content


def load_network(content: bytes, path: Path, device: str) -> Any:
    """The network of a weight file's bytes, in float32."""
    import torch
    from safetensors.torch import load

    from medseg_gym.tools.nano_net import NanoNet

    try:
        state = {name: value.float() for name, value in load(content).items()}
        widths = tuple(state[f"{name}.0.weight"].shape[0] for name in ("stem", "down2", "down3", "down4"))
        network = NanoNet(widths, state["stem.0.weight"].shape[1])  # type: ignore[arg-type]
        network.load_state_dict(state)
    except Exception as error:
        raise BadDataError(
            f"{path} holds no weights of Nano ({error}); wanted a file that baselines/train_nano.py wrote"
        ) from None
    return network.to(device).to(memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
