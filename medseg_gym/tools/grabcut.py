"""GrabCut: the classical comparison. Colour models and a minimum cut, no weights, a few milliseconds a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from medseg_gym.images import image_hash
from medseg_gym.tools.base import ALL_PROMPTS, Memory, check_memory, fingerprint
from medseg_gym.tools.graphcut import colour_evidence, colours, minimum_cut
from medseg_gym.types import Box, Click, Embedding, Image, Logits, Mask, Prediction, Query

VERSION = 1
SIDE = 512  # images are worked on at most this large
WINDOW = 96  # and a prompt's surroundings at most this large
ENLARGE = 2.0  # small surroundings are enlarged by this at most, so that the cut's smoothing does not eat them
SURE = 20.0  # log odds nothing overrules
REACH = 6.0  # log odds of the shape prior are clipped here
FIRST_RADII = (5, 8, 12, 18, 27, 40, 60, 90)  # tried for a first click; pixels where the image's side is 512
SMALLEST_HOLE = 6.0  # working pixels; in smaller places a click's patch is as wide as the place
PENALTY = 0.03  # what a patch smaller than its place costs, in evidence per squared log ratio
LOGIT_SOFTNESS = 2.0  # pixels of distance to the outline per unit of logit
LOGIT_LIMIT = 10.0


@dataclass(frozen=True, slots=True)
class _Window:
    """A rectangle of the working image and its resized copy (h, w, 3)."""

    x1: int
    y1: int
    x2: int  # exclusive
    y2: int
    pixels: Image

    def grid(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Column and row of each resized pixel's centre, in working pixels."""
        h, w = self.pixels.shape[:2]
        xs = (np.arange(w, dtype=np.float32) + 0.5) * ((self.x2 - self.x1) / w) + self.x1 - 0.5
        ys = (np.arange(h, dtype=np.float32) + 0.5) * ((self.y2 - self.y1) / h) + self.y1 - 0.5
        return xs[None, :], ys[:, None]

    def shrink(self, mask: Mask) -> Mask:
        """A working mask's part in the window, at the resized copy's size."""
        import cv2

        h, w = self.pixels.shape[:2]
        part = mask[self.y1 : self.y2, self.x1 : self.x2].astype(np.uint8)
        return cv2.resize(part, (w, h), interpolation=cv2.INTER_NEAREST).astype(np.bool_)

    def paste(self, inner: Mask, shape: tuple[int, int]) -> Mask:
        """A working mask that holds a smoothed copy of the window's mask and is False elsewhere."""
        import cv2

        soft = cv2.GaussianBlur(inner.astype(np.float32), (0, 0), 1.0)
        size = (self.x2 - self.x1, self.y2 - self.y1)
        mask = np.zeros(shape, np.bool_)
        mask[self.y1 : self.y2, self.x1 : self.x2] = cv2.resize(soft, size, interpolation=cv2.INTER_LINEAR) > 0.5
        return mask


class GrabCut:
    """Box and clicks by iterated colour models and graph cuts (Rother et al. 2004), after each prompt around it only.

    A box starts from its inscribed ellipse; what is outside the box stays background. A first click tries circles of
    several sizes and keeps the one whose inside and outside differ most in colour. Any later click changes a patch
    that reaches about to the mask's edge at most, and only towards its own sign: positive clicks add, negative ones
    remove. A click the mask agrees with already, or a negative one without a mask, changes nothing.

    Limits: it knows colour and shape only, no anatomy, so a neighbour of the same grey level is cut where the ellipse
    ends; one click cannot tell an organ from its part; rings and other hollow or branching shapes come out filled or
    cut; texture is not seen; predicted_iou is nan. Images are worked on at 512 pixels a side or less. No random
    numbers are drawn (OpenCV's own GrabCut draws some), so calls from several threads do not disturb each other.
    """

    def __init__(self, *, memory: Memory = "cumulative") -> None:
        check_memory(memory)
        self.name = "GrabCut"
        self.prompts = ALL_PROMPTS
        self.memory: Memory = memory
        self.max_batch = 1
        self.fingerprint = fingerprint("GrabCut", version=VERSION, side=SIDE, memory=memory)

    def prior_shape(self, height: int, width: int) -> tuple[int, int]:
        """The image's size, scaled to at most 512 a side."""
        scale = min(1.0, SIDE / max(height, width))
        return max(1, round(height * scale)), max(1, round(width * scale))

    def encode(self, images: Sequence[Image]) -> list[Embedding]:
        """The image itself, at most 512 pixels a side."""
        import cv2

        embeddings = []
        for image in images:
            h, w = self.prior_shape(*image.shape[:2])
            small = image.copy()
            if (h, w) != image.shape[:2]:
                small = cv2.resize(image, (w, h), interpolation=cv2.INTER_AREA)
            embeddings.append(Embedding(image_hash(image), image.shape[0], image.shape[1], {"image": small}))
        return embeddings

    def predict(self, queries: Sequence[Query]) -> list[Prediction]:
        """One answer a query; with a prior only the newest prompt has to be worked in, else all, oldest first."""
        return [self._predict(query) for query in queries]

    def _predict(self, query: Query) -> Prediction:
        import cv2

        image: Image = query.embedding.features["image"]
        height, width = query.embedding.height, query.embedding.width
        mask = np.zeros(image.shape[:2], np.bool_) if query.prior is None else query.prior > 0
        prompts = [_scaled(p, height, width, image.shape[0], image.shape[1]) for p in query.prompts]
        for position, prompt in enumerate(prompts):
            if query.prior is not None and position < len(prompts) - 1:
                continue
            if isinstance(prompt, Box):
                mask = box_mask(image, prompt)
                for click in (p for p in prompts[:position] if isinstance(p, Click)):
                    mask = click_mask(image, mask, click)
            else:
                mask = click_mask(image, mask, prompt)
        prior = signed(mask)
        logits = prior
        if mask.shape != (height, width):
            logits = cv2.resize(prior, (width, height), interpolation=cv2.INTER_LINEAR)
        return Prediction(logits=logits.copy(), predicted_iou=float("nan"), prior=prior)


def box_mask(image: Image, box: Box) -> Mask:
    """The (H, W) mask of what a box holds; never empty."""
    half_w, half_h = (box.x2 - box.x1 + 1) / 2, (box.y2 - box.y1 + 1) / 2
    centre_x, centre_y = (box.x1 + box.x2) / 2, (box.y1 + box.y2) / 2
    window = _window(image, centre_x, centre_y, 1.4 * half_w + 3, 1.4 * half_h + 3)
    xs, ys = window.grid()
    dx, dy = (xs - centre_x) / half_w, (ys - centre_y) / half_h
    radius = np.sqrt(dx**2 + dy**2)
    odds = np.clip(4 * (1 - radius), -REACH, REACH)
    odds[(abs(dx) > 1) | (abs(dy) > 1)] = -SURE
    inner = minimum_cut(window.pixels, odds + colour_evidence(colours(window.pixels), odds))
    mask = window.paste(inner, image.shape[:2])
    mask[: box.y1] = mask[box.y2 + 1 :] = False
    mask[:, : box.x1] = mask[:, box.x2 + 1 :] = False
    if np.count_nonzero(mask) < 0.1 * 4 * half_w * half_h:  # the colours told nothing: keep the ellipse
        rows, columns = np.ogrid[: image.shape[0], : image.shape[1]]
        mask = ((columns - centre_x) / half_w) ** 2 + ((rows - centre_y) / half_h) ** 2 <= 1
    return mask


def click_mask(image: Image, mask: Mask, click: Click) -> Mask:
    """The (H, W) mask after one click: it adds or removes a patch around it, and nothing of the other sign."""
    import cv2

    wrong = mask != click.positive  # what the click could change
    if not wrong[click.y, click.x]:
        return mask
    if wrong.all():
        return first_mask(image, click) if click.positive else mask
    shape = mask.shape
    depth = float(cv2.distanceTransform(wrong.astype(np.uint8), cv2.DIST_L2, 5)[click.y, click.x])
    # Errors' centres touch the mask's edge on one side and the target's on the other, so the depth is their radius;
    # inside a hole or a far part it is only a bound, and smaller circles are tried too.
    depth = min(depth, 0.15 * max(shape))
    best, best_score = np.zeros(shape, np.bool_), -np.inf
    for share in (1.0, 0.6, 0.36, 0.22):
        reach = max(share * depth, 1.5)
        if share < 1 and reach < SMALLEST_HOLE:
            break
        window = _window(image, click.x, click.y, 2 * reach + 2, 2 * reach + 2)
        xs, ys = window.grid()
        radius = np.hypot(xs - click.x, ys - click.y) / reach
        odds = np.clip(8 * (1.1 - radius), -REACH, REACH)
        odds[radius <= (0.9 if depth < 2 * SMALLEST_HOLE else 0.5)] = SURE
        allowed = window.shrink(wrong)
        # Pixels on the mask's other side would lend the patch a contrast that is not between it and what stays.
        evidence = colour_evidence(colours(window.pixels), odds, allowed.astype(np.float32))
        odds[~allowed] = -SURE
        score = float(np.abs(evidence)[allowed & (radius < 1.8)].mean()) - PENALTY * np.log(share) ** 2
        if score > best_score:
            best_score = score
            best = window.paste(minimum_cut(window.pixels, odds + evidence), shape)
            sure = reach if share == 1.0 and depth < 2 * SMALLEST_HOLE else 0.5 * reach
            rows, columns = np.ogrid[: shape[0], : shape[1]]
            best |= (columns - click.x) ** 2 + (rows - click.y) ** 2 < max(sure, 1) ** 2
    patch = _connected(best & wrong, click)
    return mask | patch if click.positive else mask & ~patch


def first_mask(image: Image, click: Click) -> Mask:
    """The (H, W) mask of a lone positive click: of several circles, the one whose colours part best; never empty."""
    scale = max(image.shape[:2]) / 512
    best, best_score = np.zeros(image.shape[:2], np.bool_), -np.inf
    for size in FIRST_RADII:
        reach = max(size * scale, 1.0)
        window = _window(image, click.x, click.y, 1.6 * reach + 2, 1.6 * reach + 2, limit=64)
        xs, ys = window.grid()
        radius = np.hypot(xs - click.x, ys - click.y) / reach
        odds = np.clip(4 * (1 - radius), -REACH, REACH)
        odds[radius > 1.6] = -SURE
        odds[radius < 0.35] = SURE
        evidence = colour_evidence(colours(window.pixels), odds)
        # Most structures are about 4 % of the image's side in radius; far from that needs clearer evidence.
        score = float(np.abs(evidence)[radius < 1.6].mean()) - 0.2 * np.log(size / 20) ** 2
        if score > best_score:
            best_score = score
            best = window.paste(minimum_cut(window.pixels, odds + evidence), image.shape[:2])
    rows, columns = np.ogrid[: image.shape[0], : image.shape[1]]
    best |= (columns - click.x) ** 2 + (rows - click.y) ** 2 <= (2 * scale) ** 2
    return _connected(best, click)


def signed(mask: Mask) -> Logits:
    """(H, W) float32 logits of a mask: half the distance to its outline in pixels, within +-10; never 0."""
    import cv2

    if not mask.any():
        return np.full(mask.shape, -LOGIT_LIMIT, np.float32)
    if mask.all():
        return np.full(mask.shape, LOGIT_LIMIT, np.float32)
    inside = cv2.distanceTransform(mask.astype(np.uint8), cv2.DIST_L2, 5)
    outside = cv2.distanceTransform((~mask).astype(np.uint8), cv2.DIST_L2, 5)
    return np.clip((inside - outside) / LOGIT_SOFTNESS, -LOGIT_LIMIT, LOGIT_LIMIT)


def _window(image: Image, x: float, y: float, reach_x: float, reach_y: float, limit: int = WINDOW) -> _Window:
    import cv2

    height, width = image.shape[:2]
    x1, x2 = max(0, int(x - reach_x)), min(width, int(x + reach_x) + 1)
    y1, y2 = max(0, int(y - reach_y)), min(height, int(y + reach_y) + 1)
    scale = min(ENLARGE, limit / max(y2 - y1, x2 - x1))
    size = max(1, round((x2 - x1) * scale)), max(1, round((y2 - y1) * scale))
    how = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    return _Window(x1, y1, x2, y2, cv2.resize(image[y1:y2, x1:x2], size, interpolation=how))


def _connected(mask: Mask, click: Click) -> Mask:
    """The part of the mask that is connected to the click, which lies in it."""
    import cv2

    labels = cv2.connectedComponents(mask.astype(np.uint8), connectivity=4)[1]
    part: Mask = labels == labels[click.y, click.x]
    return part


def _scaled(prompt: Click | Box, height: int, width: int, h: int, w: int) -> Click | Box:
    """The prompt in the working image's pixels."""

    def to(x: int, y: int) -> tuple[int, int]:
        return min(max(x * w // width, 0), w - 1), min(max(y * h // height, 0), h - 1)

    if isinstance(prompt, Click):
        return Click(*to(prompt.x, prompt.y), prompt.positive)
    return Box(*to(prompt.x1, prompt.y1), *to(prompt.x2, prompt.y2))
