"""IBISAgent's protocol: a thought, then a point as fractions of the picture, undo or Terminate with an answer."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from medseg_gym.envs.spaces import VERBS
from medseg_gym.errors import MedSegError
from medseg_gym.frames import Grid
from medseg_gym.policies.protocols.base import (
    MAX_TEXT,
    Moment,
    Unread,
    after_thought,
    between,
    check_free,
    check_length,
    decide,
    explanation,
    safe,
    speakable,
    spoken_verb,
)
from medseg_gym.render import Colour
from medseg_gym.types import Action, Click, Decision, Stop, Undo, Unreadable

DONE = "Finished."  # the answer of a formatted Terminate that was given none

SYSTEM = """\
You are an expert who segments medical images by guiding an interactive segmentation model. You go step by step: look \
at the picture, judge the mask, choose an action, and look at what came of it.

The picture
- Without a green area there is no mask yet: {begin}.
- A translucent green area is the present mask: compare its edge with the structure that is asked for and refine it.

Actions
{actions}
x and y are fractions of the picture's width and height, black borders included, with four decimals: (0.0000, 0.0000) \
is its top left corner, (1.0000, 1.0000) its bottom right corner.

Answer in this form, {how_many}:
{form}"""

_POINT = re.compile(r"(positive|negative) point ?\(([^(),]{1,64}),([^(),]{1,64})\)", re.IGNORECASE | re.ASCII)
_NUMBER = re.compile(r"([0-9]{0,9})(?:\.([0-9]{0,60}))?", re.ASCII)


class IBIS:
    """The protocol of IBISAgent's released code and, where its paper goes further, of the paper; in our words.

    Without `history` (the released default) a chat is the system prompt and the present picture. `thinking` asks for
    <think> ... </think> before the action and reads no answer without it; its opening tag may be missing, as chat
    templates write it themselves. `several` words the system prompt for several targets in one answer (paper only):
    then `parse_many` reads it and each target has an env slot of its own.

    A point at fraction f lies in cell floor(1000 f) of the 0-999 grid, 1 in the last; a cell is written as its
    centre's fraction, (g + .5) / 1000, which has exactly four decimals.
    """

    name = "ibis"
    colour: Colour = (34, 139, 34)
    alpha = 0.4
    settings: Mapping[str, Any] = {"horizon": 20, "stop_after_repeats": 3}

    def __init__(
        self,
        verbs: Sequence[str] = VERBS,
        *,
        history: bool = False,
        thinking: bool = True,
        several: bool = False,
    ) -> None:
        for name, value in (("history", history), ("thinking", thinking), ("several", several)):
            if not isinstance(value, bool):
                raise MedSegError(f"{name}={value!r}; wanted true or false")
        self.verbs = speakable(self.name, verbs, ("positive", "negative", "stop", "undo"))
        self.history, self.thinking, self.several = history, thinking, several

    def system(self) -> str:
        undo = "takes the newest point back, or a mask that was given and shows something else."
        stop = (
            "the mask fits, or the structure is not there and there is no mask; with <answer> ... </answer> after it."
        )
        lines = {
            "positive": "- Positive Point (x, y): this place belongs to the structure; for what the mask misses.",
            "negative": "- Negative Point (x, y): this place does not belong to it; for where the mask spills over.",
            "undo": "- Undo: " + undo,
            "stop": "- Terminate: " + stop,
        }
        first = "set a positive point inside the structure" if "positive" in self.verbs else "take the first action"
        sign = "Positive" if "positive" in self.verbs else "Negative"
        form = f"<action>\n{sign} Point (x, y)\n</action>"
        if self.several:
            form = f"<action>\nliver: {sign} Point (x, y)\nspleen: {sign} Point (x, y)\n</action>"
        how_many = "with a line for each target you want to change, its name and a colon before the action"
        return SYSTEM.format(
            begin=first,
            actions="\n".join(lines[verb] for verb in ("positive", "negative", "undo", "stop") if verb in self.verbs),
            how_many=how_many if self.several else "with one action",
            form=f"<think>\nwhat you see and why you act so\n</think>\n{form}" if self.thinking else form,
        )

    def user(self, moment: Moment) -> str:
        """Every turn names the request, as without history there is no other place that does."""
        said = f"Request: {moment.instruction}\n"
        if isinstance(moment.last, Unreadable):
            said += explanation(moment.last) + "\n"
        elif isinstance(moment.last, Undo):
            said += "You took the last step back.\n"
        if not moment.masked:
            return said + "There is no mask. Which action now?"
        ask = "This is the present mask. Refine it"
        if not moment.turn:
            ask = "A mask was given to start from. Refine it"
            ask += ", undo it if it shows something else" if "undo" in self.verbs else ""
        return said + ask + (", or terminate if it fits." if "stop" in self.verbs else ".")

    def parse(self, text: str, grid: Grid) -> Decision:
        return decide(text, lambda text: self._single(text, grid))

    def parse_many(self, text: str, grid: Grid, targets: Sequence[str]) -> dict[str, Decision]:
        """The decisions of an answer by target; a target without a line is not in it and keeps its mask.

        Lines read `liver: Positive Point (x, y)`; with one target the name may be missing, and Terminate without a name
        is for all. What cannot be read as a whole is unreadable for every target. Each decision has the whole text.
        """
        try:
            actions = self._lines(check_length(text), grid, targets)
        except Unread as error:
            return {target: Decision(None, text, reason=str(error)) for target in targets}
        return {target: Decision(action, text) for target, action in actions.items()}

    def answer(self, text: str) -> str | None:
        """What stands in <answer> after the action, stripped; None where there is none."""
        rest = after_thought(text[:MAX_TEXT])
        _, _, tail = (text[:MAX_TEXT] if rest is None else rest).partition("</action>")
        try:
            return between(tail, "answer")[0].strip()
        except Unread:
            return None

    def format(self, action: Action, grid: Grid, *, thought: str = "", answer: str = "") -> str:
        return self._written([self._line(action, grid)], isinstance(action, Stop), thought, answer)

    def format_many(self, actions: Mapping[str, Action], grid: Grid, *, thought: str = "", answer: str = "") -> str:
        """The answer that `parse_many` reads as these actions; a target's name must not hold a line break."""
        if not actions or any("\n" in check_free(target, "</action>") for target in actions):
            raise MedSegError(f"targets {list(actions)!r}; wanted at least one, each in one line")
        lines = [f"{target}: {self._line(action, grid)}" for target, action in actions.items()]
        return self._written(lines, any(isinstance(action, Stop) for action in actions.values()), thought, answer)

    # writing

    def _line(self, action: Action, grid: Grid) -> str:
        verb = spoken_verb(self.name, action, self.verbs)
        if verb in ("stop", "undo"):
            return {"stop": "Terminate", "undo": "Undo"}[verb]
        click = grid.snap(action)
        assert isinstance(click, Click), "the protocol has no verb for a box"
        x, y = grid.from_pixel(click.x, click.y)
        return f"{verb.capitalize()} Point (0.{10 * x + 5:04d}, 0.{10 * y + 5:04d})"

    def _written(self, lines: Sequence[str], ends: bool, thought: str, answer: str) -> str:
        written = "<action>\n" + "\n".join(lines) + "\n</action>"
        if self.thinking or thought:
            written = f"<think>\n{check_free(thought, '</think>')}\n</think>\n{written}"
        if ends:
            written += f"\n<answer>\n{check_free(answer, '</answer>') or DONE}\n</answer>"
        return written

    # reading

    def _single(self, text: str, grid: Grid) -> Action:
        lines, tail = self._body(text)
        if len(lines) != 1:
            raise Unread(f"{len(lines)} lines stand in <action>; wanted one action")
        return self._action(lines[0], tail, grid)

    def _lines(self, text: str, grid: Grid, targets: Sequence[str]) -> dict[str, Action]:
        lines, tail = self._body(text)
        known = {target.casefold(): target for target in targets} | {target: target for target in targets}
        actions: dict[str, Action] = {}
        for line in lines:
            name, colon, rest = line.rpartition(":")
            action = self._action(rest.strip(), tail, grid)
            if not colon and (
                (len(targets) == 1 and len(lines) == 1) or (isinstance(action, Stop) and len(lines) == 1)
            ):
                return dict.fromkeys(targets, action)
            target = known.get(name.strip()) or known.get(name.strip().casefold())
            if target is None:
                raise Unread(f"there is no target {safe(name)}; the targets are {', '.join(targets)}")
            if target in actions:
                raise Unread(f"{target} has two actions; wanted one for each target")
            actions[target] = action
        if not actions:
            raise Unread("nothing stands in <action>")
        return actions

    def _body(self, text: str) -> tuple[list[str], str]:
        """The lines of the first <action> after the thought that are not blank, and what follows it."""
        rest = after_thought(text)
        if rest is None and self.thinking:
            raise Unread("no <think> ... </think> came before the action")
        body, tail = between(text if rest is None else rest, "action")
        return [line.strip() for line in body.split("\n") if line.strip()], tail

    def _action(self, line: str, tail: str, grid: Grid) -> Action:
        word = line.casefold()
        point = _POINT.fullmatch(line)
        verb = {"terminate": "stop", "undo": "undo"}.get(word, point[1].lower() if point else "")
        if verb not in self.verbs:
            words = {"positive": "Positive Point (x, y)", "negative": "Negative Point (x, y)"}
            words |= {"undo": "Undo", "stop": "Terminate"}
            raise Unread(f"{safe(line)} is no action here; wanted {' or '.join(words[v] for v in self.verbs)}")
        if point:
            x, y = grid.to_pixel(_cell(point[2]), _cell(point[3]))
            return grid.snap(Click(x, y, positive=verb == "positive"))
        if verb == "stop":
            try:
                between(tail, "answer")
            except Unread:
                raise Unread("Terminate wants <answer> ... </answer> after the action") from None
            return Stop()
        return Undo()


def _cell(number: str) -> int:
    """The grid cell of a fraction from 0 to 1, from its digits: no rounding anywhere."""
    match = _NUMBER.fullmatch(number.strip())
    if not match or not (match[1] or match[2]):
        raise Unread("x and y are numbers from 0 to 1, such as 0.5125")
    whole, decimals = int(match[1] or "0"), match[2] or ""
    if whole > 1 or (whole == 1 and decimals.strip("0")):
        raise Unread("x and y lie between 0 and 1")
    return 999 if whole else int((decimals + "000")[:3])
