"""Protocols that ask a question: the words for the tool stay, and an answer takes the place of the stop.

`asking(protocol)` gives a protocol's asking form. ibis: Terminate with the answer in <answer>; medsam-agent: a function
`answer`; tiny: `A` and the answer. A protocol of another package has its own form where it has a method `asking`.
"""

from __future__ import annotations

import json
from typing import Any

from medseg_gym.answers import MAX_ANSWER
from medseg_gym.errors import MedSegError
from medseg_gym.frames import Grid
from medseg_gym.policies.protocols.base import (
    ChatProtocol,
    Moment,
    Unread,
    after_thought,
    between,
    check_free,
    explanation,
)
from medseg_gym.policies.protocols.ibis import IBIS
from medseg_gym.policies.protocols.medsam_agent import MedSAMAgent, _function
from medseg_gym.policies.protocols.tiny import Tiny
from medseg_gym.types import Action, Answer, Decision, Stop, Undo, Unreadable

THOUGHT = "The picture itself tells the answer."  # before a demonstrated answer, where a protocol wants a thought

MEDSAM_SYSTEM = """\
You answer questions about medical images. You may use a segmentation model on the picture before you answer: you tell \
it where, it draws its mask, and you are shown the result. Where the picture tells the answer by itself, answer at once.

The picture
- A mask, where there is one, lies over the image in see-through green.

Positions
- Whole numbers from 0 to 999, measured over the whole picture with any black borders: x from its left edge to its \
right edge, y from its top edge to its bottom edge.

Functions
{functions}

Your answer is one call in this form, and only the first call of an answer counts:
<tool_call>
{{"name": FUNCTION, "arguments": {{...}}}}
</tool_call>"""

IBIS_SYSTEM = """\
You are an expert who answers questions about medical images. You may guide an interactive segmentation model on the \
picture before you answer; where the picture tells the answer by itself, answer at once.

The picture
- A translucent green area is the present mask; without one there is none.

Actions
{actions}
x and y are fractions of the picture's width and height, black borders included, with four decimals: (0.0000, 0.0000) \
is its top left corner, (1.0000, 1.0000) its bottom right corner.

Answer in this form, with one action:
{form}"""


class AskingMedSAMAgent(MedSAMAgent):
    """MedSAM-Agent's protocol with the function `answer` in place of stop_action."""

    def schema(self) -> list[dict[str, Any]]:
        text = "Answers the question and ends the work. Short: yes or no, a choice's letter, or a few words."
        said = {"text": {"type": "string", "minLength": 1, "maxLength": MAX_ANSWER}}
        return [*(f for f in super().schema() if f["name"] != "stop_action"), _function("answer", text, said)]

    def system(self) -> str:
        return MEDSAM_SYSTEM.format(functions="\n".join(json.dumps(function) for function in self.schema()))

    def user(self, moment: Moment) -> str:
        if moment.turn == 0:
            return f"Question: {moment.instruction}\nMake a call."
        if isinstance(moment.last, Unreadable):
            return f"{explanation(moment.last)} Make the next call."
        now = "This is the mask after your last call." if moment.masked else "Your last call left no mask."
        return f"{now} Make the next call, or answer the question."

    def format(self, action: Action, grid: Grid, *, thought: str = "", answer: str = "") -> str:
        if not isinstance(action, Answer):
            return super().format(action, grid, thought=thought, answer=answer)
        call = json.dumps({"name": "answer", "arguments": {"text": check_free(action.text, "</tool_call>")}})
        before = check_free(thought, "<tool_call>", "</think>") + "\n" if thought else ""
        return f"{before}<tool_call>\n{call}\n</tool_call>"

    def _read(self, text: str, grid: Grid) -> Action:
        rest = after_thought(text)
        if rest is None and "<think>" in text:
            raise Unread("<think> was not closed by </think>")
        name, arguments = self._call(between(text if rest is None else rest, "tool_call")[0])
        return _answer(arguments["text"]) if name == "answer" else super()._read(text, grid)


class AskingIBIS(IBIS):
    """IBISAgent's protocol with Terminate as the answer: what stands in <answer> is compared with the truth."""

    def system(self) -> str:
        lines = {
            "positive": "- Positive Point (x, y): marks this place for the segmentation model.",
            "negative": "- Negative Point (x, y): marks this place as not to be segmented.",
            "undo": "- Undo: takes the newest point back.",
            "stop": "- Terminate: answers the question; with <answer> ... </answer> after it, and nothing but the "
            "answer in it: yes or no, a choice's letter, or a few words.",
        }
        form = "<action>\nTerminate\n</action>\n<answer>\nyour answer\n</answer>"
        return IBIS_SYSTEM.format(
            actions="\n".join(lines[verb] for verb in ("positive", "negative", "undo", "stop") if verb in self.verbs),
            form=f"<think>\nwhat you see and why you act so\n</think>\n{form}" if self.thinking else form,
        )

    def user(self, moment: Moment) -> str:
        said = f"Question: {moment.instruction}\n"
        if isinstance(moment.last, Unreadable):
            said += explanation(moment.last) + "\n"
        elif isinstance(moment.last, Undo):
            said += "You took the last step back.\n"
        return said + ("This is the present mask. " if moment.masked else "") + "Which action now?"

    def format(self, action: Action, grid: Grid, *, thought: str = "", answer: str = "") -> str:
        if not isinstance(action, Answer):
            return super().format(action, grid, thought=thought, answer=answer)
        return self._written(["Terminate"], True, thought or (THOUGHT if self.thinking else ""), action.text)

    def _single(self, text: str, grid: Grid) -> Action:
        action = super()._single(text, grid)
        return _answer(self.answer(text)) if isinstance(action, Stop) else action


class AskingTiny(Tiny):
    """The grammar of tiny models with `A` and the answer in place of `S`: "AB", "Ayes"."""

    def system(self) -> str:
        return "Bxyxy: box. A..: answer."

    def user(self, moment: Moment) -> str:
        if isinstance(moment.last, Unreadable):
            return "What?"
        return moment.instruction if moment.turn == 0 else "And?"

    def format(self, action: Action, grid: Grid, *, thought: str = "", answer: str = "") -> str:
        return f"A{action.text}" if isinstance(action, Answer) else super().format(action, grid)

    def _read(self, text: str, grid: Grid) -> Action:
        return _answer(text[1:]) if text.startswith("A") else super()._read(text, grid)


def asking(protocol: ChatProtocol) -> ChatProtocol:
    """The asking form of a protocol, over the same verbs but stop and with the same options; MedSegError if none."""
    if callable(own := getattr(protocol, "asking", None)):
        return own()  # type: ignore[no-any-return]
    tools = tuple(verb for verb in protocol.verbs if verb != "stop")
    if isinstance(protocol, AskingMedSAMAgent | AskingIBIS | AskingTiny):
        return protocol
    if isinstance(protocol, MedSAMAgent):
        return AskingMedSAMAgent(tools)
    if isinstance(protocol, IBIS):
        return AskingIBIS((*tools, "stop"), history=protocol.history, thinking=protocol.thinking)
    if isinstance(protocol, Tiny):
        return AskingTiny(tools)
    raise MedSegError(
        f"the protocol {protocol.name} has no words for questions; wanted medsam-agent, ibis or tiny, or a protocol "
        "with a method `asking` that gives its form for questions"
    )


def demonstration(protocol: ChatProtocol, answer: str, grid: Grid) -> str:
    """The completion that answers at once in an asking form; MedSegError where it reads another answer from it."""
    text = protocol.format(Answer(answer), grid)
    read: Decision = protocol.parse(text, grid)
    if read.action != Answer(answer):
        raise MedSegError(f"{protocol.name}: {text!r:.200} is read as {read.action or read.reason!r}, not {answer!r}")
    return text


def _answer(text: object) -> Answer:
    if not isinstance(text, str):
        raise Unread(f"the answer is a {type(text).__name__}; wanted a text")
    text = text.strip()
    if not text:
        raise Unread("the answer is empty")
    if len(text) > MAX_ANSWER:
        raise Unread(f"the answer has {len(text)} characters; at most {MAX_ANSWER} are read")
    return Answer(text)
