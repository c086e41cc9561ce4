"""An episode as a strip of pictures: the case and its target, then each turn's action, mask, IoU and reward terms."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import count
from pathlib import Path

import numpy as np

from medseg_gym.episodes import decode_mask
from medseg_gym.frames import Letterbox
from medseg_gym.render import draw_contour, frame
from medseg_gym.types import Action, Answer, Box, Click, Episode, Image, Mask, Prompt, Sample, Stop, Undo, Unreadable

PAPER, INK, MUTED = (255, 255, 255), (27, 29, 33), (105, 111, 121)


@dataclass(frozen=True, slots=True, eq=False)
class Panel:
    """One picture of a strip and its caption."""

    picture: Image  # (S, S, 3)
    heading: str  # left of the first line
    value: str = ""  # right of the first line
    notes: tuple[str, ...] = ()  # smaller lines below


@dataclass(frozen=True, slots=True)
class Region:
    """A part of an image, in its pixels: columns [x1, x2), rows [y1, y2)."""

    x1: int
    y1: int
    x2: int
    y2: int

    def cut(self, array: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(array[self.y1 : self.y2, self.x1 : self.x2])

    def holds(self, prompt: Prompt) -> bool:
        """Whether all of the prompt lies inside."""
        x1, y1, x2, y2 = _extent(prompt)
        return self.x1 <= x1 and x2 < self.x2 and self.y1 <= y1 and y2 < self.y2

    def shift(self, prompt: Prompt) -> Prompt:
        """The prompt in the region's own pixels."""
        if isinstance(prompt, Click):
            return Click(prompt.x - self.x1, prompt.y - self.y1, prompt.positive)
        return Box(prompt.x1 - self.x1, prompt.y1 - self.y1, prompt.x2 - self.x1, prompt.y2 - self.y1)


def focus(shape: tuple[int, int], masks: Iterable[Mask], prompts: Iterable[Prompt], margin: float = 0.35) -> Region:
    """The square around everything given, so that small structures can be seen; the whole image if nothing is given.

    The square is `margin` of the extent wider on each side, at least a sixth of the image's longer side, moved to
    lie inside and cut where the image is too short. Nothing drawn falls outside: a mask that spills is seen to spill.
    """
    height, width = shape
    xs: list[int] = []
    ys: list[int] = []
    for mask in masks:
        columns, rows = np.flatnonzero(mask.any(0)), np.flatnonzero(mask.any(1))
        if columns.size:
            xs += [int(columns[0]), int(columns[-1])]
            ys += [int(rows[0]), int(rows[-1])]
    for prompt in prompts:
        x1, y1, x2, y2 = _extent(prompt)
        xs += [x1, x2]
        ys += [y1, y2]
    if not xs:
        return Region(0, 0, width, height)
    extent = max(max(xs) - min(xs), max(ys) - min(ys)) + 1
    side = max(round(extent * (1 + 2 * margin)), -(-max(height, width) // 6), 1)
    x1, x2 = _span(min(xs), max(xs), side, width)
    y1, y2 = _span(min(ys), max(ys), side, height)
    return Region(x1, y1, x2, y2)


def _extent(prompt: Prompt) -> tuple[int, int, int, int]:
    if isinstance(prompt, Click):
        return prompt.x, prompt.y, prompt.x, prompt.y
    return prompt.x1, prompt.y1, prompt.x2, prompt.y2


def _span(low: int, high: int, side: int, length: int) -> tuple[int, int]:
    start = min(max((low + high + 1 - side) // 2, 0), max(length - side, 0))
    return start, min(start + side, length)


def in_force(actions: Sequence[Action | Unreadable]) -> list[tuple[tuple[Prompt, ...], tuple[int, ...]]]:
    """After each turn: the prompts in force and the turns (from 1) they were given in.

    A newer box replaces the older; undo brings the previous state back, and with nothing left changes nothing. A start
    mask carries no prompts, so that taking it back changes none.
    """
    empty: tuple[tuple[Prompt, int], ...] = ()
    stack = [empty]
    after = []
    for turn, action in enumerate(actions, start=1):
        if isinstance(action, Undo):
            if len(stack) > 1:
                stack.pop()
        elif isinstance(action, Click | Box):
            kept = stack[-1]
            if isinstance(action, Box):
                kept = tuple(pair for pair in kept if not isinstance(pair[0], Box))
            stack.append((*kept, (action, turn)))
        after.append((tuple(p for p, _ in stack[-1]), tuple(n for _, n in stack[-1])))
    return after


def action_text(action: Action | Unreadable) -> str:
    """An action in a word or two."""
    match action:
        case Click(positive=True):
            return "+ click"
        case Click():
            return "\N{MINUS SIGN} click"
        case Box():
            return "box"
        case Stop():
            return "stop"
        case Undo():
            return "undo"
        case Answer(text=text):
            return f"answer: {text[:40]}"
        case _:
            return "unreadable"


def signed(value: float) -> str:
    """A number with its sign and two decimals; a true minus, and no sign on what rounds to zero."""
    text = f"{abs(value):.2f}"
    return text if text == "0.00" else ("+" if value > 0 else "\N{MINUS SIGN}") + text


def episode_panels(sample: Sample, episode: Episode, size: int = 256, *, zoom: bool = True) -> list[Panel]:
    """The case with its target's contour, then a panel a turn; `zoom` shows the region of interest only."""
    masks = [decode_mask(turn.mask) for turn in episode.turns]
    start = None if episode.start is None else decode_mask(episode.start)
    states = in_force([turn.action for turn in episode.turns])
    shape = sample.target.shape
    everything = [sample.target, *masks] if start is None else [sample.target, start, *masks]
    prompts = [turn.action for turn in episode.turns if isinstance(turn.action, Click | Box)]
    region = focus((shape[0], shape[1]), everything, prompts) if zoom else Region(0, 0, shape[1], shape[0])
    image, target = region.cut(sample.image), region.cut(sample.target)
    letterbox = Letterbox(image.shape[0], image.shape[1], size)
    panels = [Panel(draw_contour(letterbox.view_image(image), target, letterbox), sample.structure, "target")]
    if start is not None:
        panels.append(
            Panel(
                frame(image, region.cut(start), (), size, target=target),
                "start",
                f"{episode.iou[0]:.2f}" if episode.iou else "",
            )
        )
    for number, turn, mask, (in_effect, numbers) in zip(count(1), episode.turns, masks, states, strict=False):
        picture = frame(
            image,
            region.cut(mask),
            [region.shift(prompt) for prompt in in_effect],
            size,
            target=target,
            numbers=numbers,
            lit=isinstance(turn.action, Click | Box),
        )
        notes = tuple(f"{name} {signed(value)}" for name, value in turn.terms.items() if round(value, 2))
        heading = f"{number}  {action_text(turn.action)}"
        value = f"IoU {episode.iou[number]:.2f}" if episode.iou else ""  # a question has none
        panels.append(Panel(picture, heading, value, notes))
    if episode.ended in ("failed", "unreadable"):
        panels[-1] = replace(panels[-1], notes=(f"{episode.ended}: counts 0", *panels[-1].notes))
    return panels


def filmstrip(panels: Sequence[Panel], gap: int = 12) -> Image:
    """The panels side by side on white with their captions below; at least one, all of one size."""
    from PIL import Image as pil
    from PIL import ImageDraw

    if not panels:
        raise ValueError("a filmstrip needs at least one panel")
    size = panels[0].picture.shape[0]
    text = max(9, round(size / 18))
    small = max(8, round(text * 0.82))
    lines = max(len(panel.notes) for panel in panels)
    height = gap + size + round(text * 2.1) + round(lines * small * 1.35) + gap
    strip = pil.new("RGB", (gap + len(panels) * (size + gap), height), PAPER)
    pen = ImageDraw.Draw(strip)
    for column, panel in enumerate(panels):
        left, line = gap + column * (size + gap), gap + size + round(text * 0.55)
        strip.paste(pil.fromarray(panel.picture), (left, gap))
        room = size - (pen.textlength(panel.value, font=_font(text)) + text if panel.value else 0)
        pen.text((left, line), _fit(pen, panel.heading, text, room, bold=True), INK, font=_font(text, bold=True))
        pen.text((left + size, line), panel.value, INK if column else MUTED, font=_font(text), anchor="ra")
        for row, note in enumerate(panel.notes):
            where = (left, line + round(text * 1.5) + round(row * small * 1.35))
            pen.text(where, _fit(pen, note, small, size), MUTED, font=_font(small))
    return np.asarray(strip)


def write_png(path: Path, picture: Image) -> Path:
    """Writes an (H, W, 3) picture; equal pictures give equal files."""
    from PIL import Image as pil

    pil.fromarray(picture).save(path, format="PNG", optimize=True)
    return path


def _fit(pen, text: str, size: int, room: float, bold: bool = False) -> str:  # type: ignore[no-untyped-def]
    """The text, shortened by an ellipsis to the pixels there are."""
    font = _font(size, bold)
    if pen.textlength(text, font=font) <= room:
        return text
    while text and pen.textlength(text + "…", font=font) > room:
        text = text[:-1]
    return text.rstrip() + "…"


@cache
def _font(size: int, bold: bool = False):  # type: ignore[no-untyped-def]
    """Matplotlib's DejaVu Sans: the one font every installation has that knows signs and accents."""
    import matplotlib
    from PIL import ImageFont

    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name), size)
