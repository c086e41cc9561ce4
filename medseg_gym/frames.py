"""The only coordinate conversions: pixels <-> 0-999 grid <-> tool input <-> letterboxed view."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from medseg_gym.types import Action, Box, Click, Image, Mask

GRID = 1000  # grid positions 0..999 along the padded square's side


@dataclass(frozen=True, slots=True)
class Grid:
    """The 0-999 grid over the padded square of an (H, W) image; integer arithmetic, so exact."""

    height: int
    width: int
    side: int = field(init=False)
    pad_x: int = field(init=False)
    pad_y: int = field(init=False)

    def __post_init__(self) -> None:
        side = max(self.height, self.width)
        object.__setattr__(self, "side", side)
        object.__setattr__(self, "pad_x", (side - self.width) // 2)
        object.__setattr__(self, "pad_y", (side - self.height) // 2)

    def to_pixel(self, gx: int, gy: int) -> tuple[int, int]:
        """The pixel under a grid position; a position in the padding gives the nearest pixel of the image."""
        return (
            _clamp((2 * gx + 1) * self.side // (2 * GRID) - self.pad_x, self.width),
            _clamp((2 * gy + 1) * self.side // (2 * GRID) - self.pad_y, self.height),
        )

    def from_pixel(self, x: int, y: int) -> tuple[int, int]:
        """The grid position of a pixel's centre. Inverse of to_pixel while the side is at most 1000."""
        return (
            (2 * (x + self.pad_x) + 1) * GRID // (2 * self.side),
            (2 * (y + self.pad_y) + 1) * GRID // (2 * self.side),
        )

    def snap(self, action: Action) -> Action:
        """The action the grid can express nearest to the given one; idempotent. Pixels outside are clamped first."""
        if isinstance(action, Click):
            x, y = self._snap(action.x, action.y)
            return Click(x, y, action.positive)
        if isinstance(action, Box):
            (x1, y1), (x2, y2) = self._snap(action.x1, action.y1), self._snap(action.x2, action.y2)
            return Box(min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2))
        return action

    def _snap(self, x: int, y: int) -> tuple[int, int]:
        return self.to_pixel(*self.from_pixel(_clamp(x, self.width), _clamp(y, self.height)))


@dataclass(frozen=True, slots=True)
class ToolFrame:
    """A tool's square input of side `size`, to which an (H, W) image is stretched per axis."""

    height: int
    width: int
    size: int

    def to_tool(self, x: float, y: float) -> tuple[float, float]:
        return x * self.size / self.width, y * self.size / self.height

    def from_tool(self, x: float, y: float) -> tuple[float, float]:
        return x * self.width / self.size, y * self.height / self.size


@dataclass(frozen=True, slots=True)
class PaddedFrame:
    """A tool's square input of side `size`: an (H, W) image scaled to fit, top left, the rest padding."""

    height: int
    width: int
    size: int

    @property
    def content(self) -> tuple[int, int]:
        """Rows and columns the image fills, rounded half up as SAM rounds; never 0."""
        scale = self.size * 1.0 / max(self.height, self.width)
        return max(1, int(self.height * scale + 0.5)), max(1, int(self.width * scale + 0.5))

    def to_tool(self, x: float, y: float) -> tuple[float, float]:
        rows, columns = self.content
        return x * (columns / self.width), y * (rows / self.height)

    def from_tool(self, x: float, y: float) -> tuple[float, float]:
        rows, columns = self.content
        return x / (columns / self.width), y / (rows / self.height)


@dataclass(frozen=True, slots=True)
class Letterbox:
    """The S x S view of an (H, W) image: scaled to fit, centred, padded with black."""

    height: int
    width: int
    size: int

    content: tuple[int, int, int, int] = field(init=False)  # x, y, width, height of the image, in view pixels

    def __post_init__(self) -> None:
        grid = Grid(self.height, self.width)
        w = max(1, round(self.width * self.size / grid.side))
        h = max(1, round(self.height * self.size / grid.side))
        x = min(round(grid.pad_x * self.size / grid.side), self.size - w)
        y = min(round(grid.pad_y * self.size / grid.side), self.size - h)
        object.__setattr__(self, "content", (x, y, w, h))

    @property
    def scale(self) -> float:
        return self.size / max(self.height, self.width)

    def to_view(self, x: float, y: float) -> tuple[float, float]:
        """View position of an image position; both measure from the top left corner of pixel (0, 0)."""
        left, top, w, h = self.content
        return left + x * w / self.width, top + y * h / self.height

    def from_view(self, x: float, y: float) -> tuple[float, float]:
        left, top, w, h = self.content
        return (x - left) * self.width / w, (y - top) * self.height / h

    def view_image(self, image: Image) -> Image:
        """The (S, S, 3) view; averaging when it shrinks, linear when it grows, a plain copy at the same size."""
        import cv2

        x, y, w, h = self.content
        shrinks = w < self.width or h < self.height
        inner = image
        if (h, w) != image.shape[:2]:
            inner = cv2.resize(image, (w, h), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
        view = np.zeros((self.size, self.size, 3), np.uint8)
        view[y : y + h, x : x + w] = inner
        return view

    def view_mask(self, mask: Mask) -> Mask:
        """The (S, S) view of a mask, nearest neighbour; the padding is False.

        OpenCV's plain INTER_NEAREST samples the top left of each cell, half a view pixel off the image's view.
        """
        import cv2

        x, y, w, h = self.content
        inner = mask.view(np.uint8)
        if (h, w) != mask.shape:
            inner = cv2.resize(inner, (w, h), interpolation=cv2.INTER_NEAREST_EXACT)
        if (h, w) == (self.size, self.size):
            return inner.view(np.bool_)
        view = np.zeros((self.size, self.size), np.bool_)
        view[y : y + h, x : x + w] = inner.view(np.bool_)
        return view


def _clamp(value: int, length: int) -> int:
    return min(max(int(value), 0), length - 1)
