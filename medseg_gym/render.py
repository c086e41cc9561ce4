"""What agents and people see: the mask overlay of an observation, and pictures with prompts, contours and errors."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, lru_cache

import numpy as np
from numpy.typing import NDArray

from medseg_gym.frames import Letterbox
from medseg_gym.types import Box, Click, Image, Mask, Prompt

Colour = tuple[int, int, int]  # RGB

GREEN: Colour = (0, 255, 0)  # the agent's overlay, as MedSAM-Agent has it; IBISAgent's is (34, 139, 34) at alpha 0.4

# Okabe and Ito's sky blue, vermilion and yellow: told apart with any colour vision, and in grey by lightness.
CAUGHT: Colour = (86, 180, 233)  # in the mask and in the target (TP)
SPILLED: Colour = (213, 94, 0)  # in the mask only (FP)
MISSED: Colour = (240, 228, 66)  # in the target only (FN)

MASK: Colour = (25, 205, 130)  # pictures for people: softer than the agent's green, so that the anatomy stays readable
TARGET: Colour = (255, 190, 60)
POSITIVE: Colour = (0, 122, 84)
NEGATIVE: Colour = (200, 40, 30)
BOX: Colour = (110, 195, 255)
INK: Colour = (18, 22, 28)
WHITE: Colour = (255, 255, 255)


class Overlay:
    """The agent's view of one image: built once an episode, drawn once a step.

    A tinted value is (1 - alpha) * image + alpha * colour, halves rounded up; outside the mask the view is untouched.
    """

    def __init__(self, image: Image, size: int, colour: Colour = GREEN, alpha: float = 0.5) -> None:
        self.letterbox = Letterbox(image.shape[0], image.shape[1], size)
        self.plain = self.letterbox.view_image(image)  # (S, S, 3), read-only
        self._tinted = tint(self.plain, colour, alpha)
        self.plain.flags.writeable = False

    def draw(self, mask: Mask, out: Image | None = None) -> Image:
        """A fresh (S, S, 3) view with the (H, W) mask laid over it, or `out` filled with that."""
        import cv2

        view = np.empty_like(self.plain) if out is None else out
        np.copyto(view, self.plain)
        # One masked copy is all a step costs: reading the mask's extent first was measured, and takes longer.
        cv2.copyTo(self._tinted, self.letterbox.view_mask(mask).view(np.uint8), view)
        return view

    def view_mask(self, mask: Mask) -> Mask:
        """The (S, S) view of an (H, W) mask; the mask itself where it has that size already."""
        return self.letterbox.view_mask(mask)


def tint(view: Image, colour: Colour, alpha: float) -> Image:
    """The whole view mixed with a colour: (1 - alpha) * view + alpha * colour, halves rounded up."""
    import cv2

    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha is {alpha}; wanted a share of the colour, 0 to 1")
    values = np.arange(256)[:, None] * (1 - alpha) + alpha * np.asarray(colour, np.float64)
    # The inner rounding drops the float error that would push exact halves to either side.
    table = np.floor(np.round(values, 6) + 0.5).astype(np.uint8)
    return cv2.LUT(view, table[None])


def frame(
    image: Image,
    mask: Mask,
    prompts: Sequence[Prompt] = (),
    size: int = 512,
    *,
    target: Mask | None = None,
    numbers: Sequence[int] | None = None,
    lit: bool = True,
) -> Image:
    """The (size, size, 3) picture of a state for people: mask, numbered prompts and, where given, the target's contour.

    `numbers` and `lit` are draw_prompts' own.
    """
    letterbox = Letterbox(image.shape[0], image.shape[1], size)
    view = lay(letterbox.view_image(image), mask, letterbox)
    if target is not None:
        view = draw_contour(view, target, letterbox)
    return draw_prompts(view, prompts, letterbox, numbers=numbers, lit=lit)


def lay(view: Image, mask: Mask, letterbox: Letterbox, colour: Colour = MASK, alpha: float = 0.38) -> Image:
    """The view with a translucent mask and its outline."""
    import cv2

    over = view.copy()
    cv2.copyTo(tint(view, colour, alpha), letterbox.view_mask(mask).view(np.uint8), over)
    return draw_contour(over, mask, letterbox, colour, casing=False)


def oracle_view(image: Image, mask: Mask, target: Mask, size: int, alpha: float = 0.55) -> Image:
    """The (size, size, 3) privileged view, never an observation: caught sky blue, spilled vermilion, missed yellow."""
    import cv2

    letterbox = Letterbox(image.shape[0], image.shape[1], size)
    plain = letterbox.view_image(image)
    view = plain.copy()
    for region, colour in ((mask & target, CAUGHT), (mask & ~target, SPILLED), (target & ~mask, MISSED)):
        cv2.copyTo(tint(plain, colour, alpha), letterbox.view_mask(region).view(np.uint8), view)
    return view


def draw_contour(
    view: Image, mask: Mask, letterbox: Letterbox, colour: Colour = TARGET, *, casing: bool = True
) -> Image:
    """The view with the mask's contour as a thin antialiased line, cased in dark so that it shows on any tissue."""
    import cv2

    out = view.copy()
    loops = [loop.astype(np.int32) for loop in contours(mask, letterbox, scale=16)]
    width = 1 if letterbox.size < 400 else 2
    if casing:
        cv2.polylines(out, loops, True, INK, width + 2, cv2.LINE_AA, shift=4)
        out = cv2.addWeighted(out, 0.55, view, 0.45, 0)
    cv2.polylines(out, loops, True, colour, width, cv2.LINE_AA, shift=4)
    return out


def contours(mask: Mask, letterbox: Letterbox, scale: int = 1) -> list[NDArray[np.float64]]:
    """Closed outlines of an (H, W) mask, holes included, as (N, 1, 2) x, y in 1/scale of a view pixel; [] if empty.

    Traced at four times the view's resolution; a mask too small to fill half a pixel there is still outlined.
    """
    import cv2

    if not mask.any():
        return []
    fine = Letterbox(letterbox.height, letterbox.width, letterbox.size * 4)
    left, top, width, height = fine.content
    shrinks = width < mask.shape[1] or height < mask.shape[0]
    soft = cv2.resize(
        mask.astype(np.uint8) * 255,
        (width, height),
        interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR,
    )
    hard = soft > 127
    if not hard.any():
        hard = soft > 0
    loops, _ = cv2.findContours(hard.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    # OpenCV's line drawing puts (0, 0) on the first pixel's centre, hence the half pixels.
    offset = np.array([left + 0.5, top + 0.5])
    return [((loop + offset) / 4 - 0.5) * scale for loop in loops]


def draw_prompts(
    view: Image,
    prompts: Sequence[Prompt],
    letterbox: Letterbox,
    *,
    numbers: Sequence[int] | None = None,
    lit: bool = True,
) -> Image:
    """The view with its prompts, oldest first: green + and red - dots, blue boxes, numbered; the newest larger and lit.

    `numbers` replaces 1, 2, ... where some prompts were taken back; `lit` off shows none as new, as after a stop.
    """
    out = view.copy()
    labels = list(numbers) if numbers is not None else list(range(1, len(prompts) + 1))
    marks = list(zip(prompts, labels, strict=True))
    for position, (prompt, number) in enumerate(marks):  # boxes first, dots stay on top
        if isinstance(prompt, Box):
            _draw_box(out, prompt, number, letterbox, newest=lit and position == len(marks) - 1)
    for position, (prompt, number) in enumerate(marks):
        if isinstance(prompt, Click):
            newest = lit and position == len(marks) - 1
            x, y = letterbox.to_view(prompt.x + 0.5, prompt.y + 0.5)
            _blit(out, _dot(prompt.positive, number, _radius(letterbox.size, newest), newest), x, y)
    return out


def _radius(size: int, newest: bool) -> float:
    radius = min(max(4.0, 2.6 + size * 0.012), 16.0)
    return radius * 1.2 if newest else radius


def _draw_box(out: Image, box: Box, number: int, letterbox: Letterbox, newest: bool) -> None:
    """Whole-pixel lines: they stay crisp where antialiased ones would blur."""
    left, top = letterbox.to_view(box.x1, box.y1)
    right, bottom = letterbox.to_view(box.x2 + 1, box.y2 + 1)
    x1, y1, x2, y2 = round(left), round(top), max(round(right), round(left) + 1), max(round(bottom), round(top) + 1)
    line = max(1, round(letterbox.size / 300)) + (1 if newest else 0)
    _ring(out, x1 - line - 1, y1 - line - 1, x2 + line + 1, y2 + line + 1, line + 2, INK)
    _ring(out, x1 - line, y1 - line, x2 + line, y2 + line, line, WHITE if newest else BOX)
    tag = _tag(number, _radius(letterbox.size, newest), newest)
    _blit(out, tag, x1 + tag.shape[1] / 2 - line, y1 - tag.shape[0] / 2 - line)


def _ring(out: Image, x1: int, y1: int, x2: int, y2: int, line: int, colour: Colour) -> None:
    """A rectangle's border of `line` pixels inside [x1, x2) x [y1, y2), moved inside the view where it sticks out."""
    height, width = out.shape[:2]
    x1, x2 = max(x1, 0), min(x2, width)
    y1, y2 = max(y1, 0), min(y2, height)
    inner = out[y1 + line : y2 - line, x1 + line : x2 - line].copy()
    out[y1:y2, x1:x2] = colour
    if inner.size:
        out[y1 + line : y2 - line, x1 + line : x2 - line] = inner


def _blit(out: Image, sprite: NDArray[np.uint8], x: float, y: float) -> None:
    """Lays an RGBA sprite over `out`, centred on (x, y) and moved as a whole to stay inside where it can."""
    height, width = sprite.shape[:2]
    left = min(max(round(x - width / 2), 0), max(out.shape[1] - width, 0))
    top = min(max(round(y - height / 2), 0), max(out.shape[0] - height, 0))
    part = out[top : top + height, left : left + width]
    sprite = sprite[: part.shape[0], : part.shape[1]]
    alpha = sprite[..., 3:].astype(np.float32) / 255
    part[:] = np.round(part * (1 - alpha) + sprite[..., :3] * alpha).astype(np.uint8)


_FINE = 8  # sprites are drawn this many times larger, then averaged: antialiasing better than any drawing call's


@lru_cache(maxsize=512)
def _dot(positive: bool, number: int, radius: float, newest: bool) -> NDArray[np.uint8]:
    """RGBA sprite of a click, centred: halo if newest, white ring, coloured disc with its sign, number at the right."""
    from PIL import Image as pil
    from PIL import ImageDraw

    half = int(np.ceil(radius * 3.4))
    picture = pil.new("RGBA", (2 * half * _FINE, 2 * half * _FINE), (0, 0, 0, 0))
    pen = ImageDraw.Draw(picture)

    def disc(r: float, colour: tuple[int, ...]) -> None:
        pen.ellipse([(half - r) * _FINE, (half - r) * _FINE, (half + r) * _FINE, (half + r) * _FINE], fill=colour)

    if newest:
        disc(radius * 1.75, (255, 255, 255, 90))
    disc(radius * 1.16 + 0.6, (*INK, 210))
    disc(radius * 1.16, WHITE)
    disc(radius * 0.9, POSITIVE if positive else NEGATIVE)
    arm, thick = radius * 0.5, radius * 0.15
    bars = [(arm, thick), (thick, arm)] if positive else [(arm, thick)]
    for dx, dy in bars:
        pen.rectangle(
            [(half - dx) * _FINE, (half - dy) * _FINE, (half + dx) * _FINE - 1, (half + dy) * _FINE - 1], fill=WHITE
        )
    _write(pen, half + radius * 1.5, half - radius * 1.25, str(number), radius * 1.55, anchor="lm")
    return np.asarray(picture.reduce(_FINE))


@lru_cache(maxsize=512)
def _tag(number: int, radius: float, newest: bool) -> NDArray[np.uint8]:
    """RGBA sprite of a box's number: a small filled label that sits on the box's top left corner."""
    from PIL import Image as pil
    from PIL import ImageDraw

    height = int(np.ceil(radius * 2.1))
    width = int(np.ceil(radius * (1.2 + 0.95 * len(str(number)))))
    picture = pil.new("RGBA", (width * _FINE, height * _FINE), (*INK, 255))
    pen = ImageDraw.Draw(picture)
    pen.rectangle([_FINE, _FINE, (width - 1) * _FINE - 1, (height - 1) * _FINE - 1], fill=WHITE if newest else BOX)
    pen.text(
        (width * _FINE / 2, height * _FINE / 2), str(number), INK, font=_digits(radius * 1.55 * _FINE), anchor="mm"
    )
    return np.asarray(picture.reduce(_FINE))


def _write(pen, x: float, y: float, text: str, size: float, anchor: str) -> None:  # type: ignore[no-untyped-def]
    pen.text(
        (x * _FINE, y * _FINE),
        text,
        WHITE,
        font=_digits(size * _FINE),
        anchor=anchor,
        stroke_width=round(size * 0.13 * _FINE),
        stroke_fill=INK,
    )


@cache
def _digits(size: float):  # type: ignore[no-untyped-def]
    from PIL import ImageFont

    return ImageFont.load_default(size)
