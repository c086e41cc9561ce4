"""A View as a chat: what the language model is shown, with a picture in every user turn and its own words kept.

A message is {"role", "content"}. The content of a user turn is two parts, {"type": "image", "image": (S, S, 3) uint8}
and {"type": "text", "text"}; system prompt and answers are text. Transformers' chat templates take them as they are,
OpenAI's API and vLLM with the picture as a data URL. All is a function of the View: a turn gives the same messages
however often it is asked for, so that prefixes can be cached and the tokens trained are the tokens sampled.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from medseg_gym.episodes import decode_mask
from medseg_gym.errors import MedSegError
from medseg_gym.frames import Grid
from medseg_gym.policies.protocols.base import ChatProtocol, Moment
from medseg_gym.render import Overlay
from medseg_gym.types import Action, Episode, Image, Mask, Unreadable, View

Message = dict[str, Any]
Answered = tuple[Action | Unreadable, str]  # what was done, and the words it was said in; "" where there were none

SIZE = 512
FACTORS = (32, 28)  # Qwen3-VL's patches of 16 pixels, merged 2 x 2; Qwen2-VL's and Qwen2.5-VL's of 14

# What tokenizers and chat templates of vision-language models act on instead of reading it as text.
_SPECIAL = re.compile(
    r"<(?=[|｜][^<>|｜]{1,40}[|｜]>"
    r"|/?(?:s|bos|eos|pad|unk|img|image|video|audio|IMG_CONTEXT|image_soft_token)>"
    r"|(?:start|end)_of_(?:image|turn)>)"
    r"|\[(?=/?(?:INST|IMG|IMG_BREAK|IMG_END)\])"
)


def messages(view: View, protocol: ChatProtocol, size: int = SIZE) -> list[Message]:
    """The chat up to the present user turn: all turns with the protocol's history, else system prompt and this turn.

    Earlier answers are View.decisions' texts; where a turn has none (a bare env, an oracle) the protocol's own words
    for its action. `size` is the side of the pictures.
    """
    texts = [decision.text for decision in view.decisions]
    texts += [""] * (len(view.history) - len(texts))
    answered = [(action, text) for (_, action), text in zip(view.history, texts, strict=True)]
    masks = [*(mask for mask, _ in view.history), view.mask]
    draw = Pictures(view.image, protocol, size)
    last = len(answered)
    chat = [_system(protocol)]
    for turn in range(0 if protocol.history else last, last + 1):
        chat.append(_user(protocol, draw, view.instruction, masks[turn], _before(answered, turn), turn))
        if turn < last:
            chat.append(_assistant(protocol, draw.grid, answered[turn]))
    return chat


def news(view: View, protocol: ChatProtocol, pictures: Pictures) -> list[Message]:
    """What the present turn adds to the chat: its user turn, after the system prompt where a chat begins with it.

    The last messages that `messages` of the view gives, without drawing the earlier turns' pictures again. `pictures`
    are of the view's image and serve all its turns.
    """
    turn = len(view.history)
    last = view.history[-1][1] if turn else None
    user = _user(protocol, pictures, view.instruction, view.mask, last, turn)
    return [user] if turn and protocol.history else [_system(protocol), user]


def of_episode(episode: Episode, image: Image, protocol: ChatProtocol, size: int = SIZE) -> list[list[Message]]:
    """The chats of a stored episode, every turn answered: one with the protocol's history, else one a turn.

    Each message but the answers is what `messages` gave, or would have given, in that turn. No chat without turns.
    """
    if not episode.turns:
        return []
    given = [turn.mask for turn in episode.turns[:-1]]
    first = decode_mask(episode.start) if episode.start is not None else _nothing(image)
    masks = [first, *(decode_mask(mask) for mask in given)]
    answered: list[Answered] = [(turn.action, turn.text) for turn in episode.turns]
    draw = Pictures(image, protocol, size)
    pairs = [
        [
            _user(protocol, draw, episode.instruction, masks[turn], _before(answered, turn), turn),
            _assistant(protocol, draw.grid, answered[turn]),
        ]
        for turn in range(len(answered))
    ]
    if protocol.history:
        return [[_system(protocol), *(message for pair in pairs for message in pair)]]
    return [[_system(protocol), *pair] for pair in pairs]


def png(image: Image) -> bytes:
    """The PNG file of an (H, W, 3) RGB picture, packed fast; equal pictures give equal bytes."""
    import cv2

    packed, data = cv2.imencode(".png", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_PNG_COMPRESSION, 1])
    if not packed:
        raise MedSegError(f"a picture of shape {image.shape}, {image.dtype} could not be packed as PNG")
    return data.tobytes()


def plain(text: str) -> str:
    """The text with a space in every special token ("< |im_end|>"), and half surrogate pairs spelled out.

    A model, or a dataset's instruction, could otherwise end its own turn or ask for a picture that is not there. Stored
    episodes spell surrogates the same way.
    """
    return _SPECIAL.sub(lambda match: match[0] + " ", text).encode("utf-8", "backslashreplace").decode()


def check_size(size: int) -> int:
    """A picture's side that the resize of Qwen3-VL (multiples of 32) or of its forerunners (of 28) leaves alone.

    A model's own limits come on top: Qwen3-VL is shipped with 256 to 4096, and takes smaller pictures larger.
    """
    if not isinstance(size, int) or not 28 <= size <= 4096 or all(size % factor for factor in FACTORS):
        raise MedSegError(f"size={size!r}; wanted a multiple of 32 (Qwen2.5-VL: of 28) up to 4096, such as {SIZE}")
    return size


class Pictures:
    """The pictures of one image in a protocol's colours: made once a case, drawn once a turn."""

    def __init__(self, image: Image, protocol: ChatProtocol, size: int) -> None:
        self.grid = Grid(image.shape[0], image.shape[1])
        self.overlay = Overlay(image, check_size(size), protocol.colour, protocol.alpha)
        self.colours = (*protocol.colour, protocol.alpha)  # with image and mask all that decides a picture

    def draw(self, mask: Mask) -> Image:
        """The (S, S, 3) picture of a mask; of an empty one the same read-only array every time."""
        return self.overlay.draw(mask) if mask.any() else self.overlay.plain


def _system(protocol: ChatProtocol) -> Message:
    return {"role": "system", "content": plain(protocol.system())}


def _user(
    protocol: ChatProtocol,
    draw: Pictures,
    instruction: str,
    mask: Mask,
    last: Action | Unreadable | None,
    turn: int,
) -> Message:
    moment = Moment(instruction, turn, bool(mask.any()), last)
    picture = {"type": "image", "image": draw.draw(mask)}
    return {"role": "user", "content": [picture, {"type": "text", "text": plain(protocol.user(moment))}]}


def _before(answered: Sequence[Answered], turn: int) -> Action | Unreadable | None:
    """The action before a turn; None before the first."""
    return answered[turn - 1][0] if turn else None


def _assistant(protocol: ChatProtocol, grid: Grid, answered: Answered) -> Message:
    action, text = answered
    if not text and not isinstance(action, Unreadable):
        text = protocol.format(action, grid)
    return {"role": "assistant", "content": plain(text)}


def _nothing(image: Image) -> Mask:
    import numpy as np

    return np.zeros(image.shape[:2], np.bool_)
