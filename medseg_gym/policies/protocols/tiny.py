"""A grammar of five characters for tiny test models: `B` and four letters for a box's edges, or `S` for stop."""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from typing import Any

from medseg_gym.frames import Grid
from medseg_gym.policies.protocols.base import Moment, Unread, decide, speakable, spoken_verb
from medseg_gym.render import GREEN, Colour
from medseg_gym.types import Action, Box, Decision, Stop, Unreadable

CELLS = string.ascii_uppercase + string.ascii_lowercase + string.digits + "+/"  # one character a cell, 64 a side


class Tiny:
    """Boxes on a 64 x 64 grid over the padded square. Exact for images up to 64 pixels a side, coarser beyond.

    Five characters say a box, so a byte-level model of 0.2 M parameters learns it in seconds (cue task). Beyond 64
    pixels `parse(format(box))` is the box with its edges moved to the centre pixels of their cells.
    """

    name = "tiny"
    history = True
    colour: Colour = GREEN
    alpha = 0.5
    settings: Mapping[str, Any] = {"horizon": 2, "stop_after_repeats": 0}

    def __init__(self, verbs: Sequence[str] = ("box", "stop")) -> None:
        self.verbs = speakable(self.name, verbs, ("box", "stop"))

    def system(self) -> str:
        return "Bxyxy: box. S: stop." if "stop" in self.verbs else "Bxyxy: box."

    def user(self, moment: Moment) -> str:
        if isinstance(moment.last, Unreadable):
            return "What?"
        return "More?" if moment.masked else "Where?"

    def parse(self, text: str, grid: Grid) -> Decision:
        return decide(text, lambda text: self._read(text.strip(), grid))

    def format(self, action: Action, grid: Grid, *, thought: str = "", answer: str = "") -> str:
        """The letters of an action; `thought` and `answer` have no place here and are left out."""
        spoken_verb(self.name, action, self.verbs)
        if not isinstance(action, Box):
            return "S"
        box = grid.snap(action)
        assert isinstance(box, Box), "snapping keeps the kind of an action"
        edges = ((box.x1, grid.pad_x), (box.y1, grid.pad_y), (box.x2, grid.pad_x), (box.y2, grid.pad_y))
        cells = ((2 * (pixel + pad) + 1) * len(CELLS) // (2 * grid.side) for pixel, pad in edges)
        return "B" + "".join(CELLS[cell] for cell in cells)

    def _read(self, text: str, grid: Grid) -> Action:
        if text == "S" and "stop" in self.verbs:
            return Stop()
        cells = [CELLS.find(letter) for letter in text[1:6]]
        if len(text) != 5 or text[0] != "B" or min(cells) < 0:
            raise Unread("wanted B and four letters" + (", or S" if "stop" in self.verbs else ""))
        x1, x2 = sorted(_pixel(cell, grid.side, grid.pad_x, grid.width) for cell in (cells[0], cells[2]))
        y1, y2 = sorted(_pixel(cell, grid.side, grid.pad_y, grid.height) for cell in (cells[1], cells[3]))
        return grid.snap(Box(x1, y1, x2, y2))


def _pixel(cell: int, side: int, pad: int, length: int) -> int:
    """The pixel under a cell's centre, clamped to the image: frames.Grid's rule with 64 cells."""
    return min(max((2 * cell + 1) * side // (2 * len(CELLS)) - pad, 0), length - 1)
