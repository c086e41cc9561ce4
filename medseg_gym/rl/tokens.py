"""Chats as token ids, piece by piece: a turn's ids are appended to those before, never decoded and read again."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from medseg_gym.errors import BadDataError, MedSegError
from medseg_gym.rl.pixels import Patches
from medseg_gym.types import Image

if TYPE_CHECKING:
    import torch

Message = Mapping[
    str, Any
]  # {"role": str, "content": str | [{"type": "image", "image": Image} | {"type": "text", "text": str}]}

TEXTS = 4096  # texts whose ids are kept

_PROBE: list[dict[str, Any]] = [
    {"role": "system", "content": [{"type": "text", "text": "a"}]},
    {"role": "user", "content": [{"type": "image", "image": "x"}, {"type": "text", "text": "b"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "c"}]},
    {"role": "user", "content": [{"type": "image", "image": "x"}, {"type": "text", "text": "d"}]},
]


@dataclass(frozen=True, slots=True, eq=False)
class TokenPrompt:
    """Token ids with every image placeholder expanded to its visual tokens, and the images in their order."""

    ids: tuple[int, ...]
    images: tuple[Image, ...]

    def __add__(self, other: TokenPrompt) -> TokenPrompt:
        return TokenPrompt(self.ids + other.ids, self.images + other.images)


class ChatTokens:
    """Renders chats for one Qwen-VL checkpoint: ChatML with images as vision tokens.

    `prompt(messages)` begins a conversation, `completion(ids)` is what the model sampled, `suffix(messages)` closes its
    turn and adds the next; their concatenation is the conversation's ids. A text can hold no special token: what looks
    like one is tokenized as ordinary characters, so that no user text and no completion can forge a turn.
    """

    def __init__(self, tokenizer: Any, processor: Any) -> None:
        self.tokenizer, self.processor = tokenizer, processor
        self.patches = Patches(processor)
        self.cell = int(processor.patch_size) * int(processor.merge_size)  # pixels of a visual token's side
        self.start, self.end = self._special("<|im_start|>"), self._special("<|im_end|>")
        self.vision_start, self.vision_end = self._special("<|vision_start|>"), self._special("<|vision_end|>")
        self.image_pad = self._special("<|image_pad|>")
        # What no sampler may produce: every special token but the end of turn, vision tokens above all.
        self.banned_ids = frozenset(tokenizer.all_special_ids) | {
            self.start,
            self.vision_start,
            self.vision_end,
            self.image_pad,
            self._special("<|video_pad|>"),
        }
        self.banned_ids -= {self.end}
        self._texts: dict[str, tuple[int, ...]] = {}  # most texts of a chat are the same in every chat
        self._newline = self.text("\n")
        self._check_template()

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> ChatTokens:
        """Of a local checkpoint folder; nothing is fetched."""
        from transformers import AutoTokenizer
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        if not Path(folder).is_dir():
            raise MedSegError(f"no checkpoint folder at {folder}; give the path of a local Qwen-VL checkpoint")
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            processor = Qwen2VLImageProcessorPil.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError) as error:
            why = " ".join(str(error).split())[:200]
            raise BadDataError(
                f"{folder} holds no tokenizer and image processor that transformers loads; wanted a whole Qwen-VL "
                f"checkpoint: {why}"
            ) from None
        return cls(tokenizer, processor)

    def text(self, text: str) -> tuple[int, ...]:
        """The ids of plain text; nothing in it is read as a special token."""
        ids = self._texts.get(text)
        if ids is None:
            if len(self._texts) >= TEXTS:
                self._texts.clear()
            ids = tuple(self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True))
            self._texts[text] = ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of sampled ids, for people and parsers; special tokens are left out."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    def prompt(self, messages: Sequence[Message]) -> TokenPrompt:
        """A conversation up to where the assistant speaks next: every message, then the assistant's header."""
        ids: list[int] = []
        images: list[Image] = []
        for message in messages:
            ids.append(self.start)
            words = f"{message['role']}\n"  # up to the next special token, as a merge may reach over a part's edge
            for part in _parts(message):
                if part.get("type") == "image":
                    images.append(part["image"])
                    ids += [*self.text(words), *self._image(part["image"])]
                    words = ""
                else:
                    words += part["text"]
            ids += [*self.text(words), self.end, *self._newline]
        ids += [self.start, *self.text("assistant\n")]
        return TokenPrompt(tuple(ids), tuple(images))

    def suffix(self, completion: Sequence[int], messages: Sequence[Message]) -> TokenPrompt:
        """What follows the sampled `completion`: its end of turn, if the model did not produce one, and `messages`."""
        closing = () if completion and completion[-1] == self.end else (self.end,)
        return TokenPrompt((*closing, *self._newline), ()) + self.prompt(messages)

    def conversation(self, messages: Sequence[Message], said: Sequence[Sequence[int]] = ()) -> TokenPrompt:
        """A chat with the assistant's messages in it, up to where it speaks next.

        `said` are the sampled ids of its messages, oldest first; where there are some, they stand for the message,
        which is not tokenized again. Where there are none the message's text and an end of turn do.
        """
        turns: list[list[Message]] = [[]]
        spoken: list[tuple[int, ...]] = []
        for message in messages:
            if message["role"] != "assistant":
                turns[-1].append(message)
                continue
            ids = tuple(said[len(spoken)]) if len(spoken) < len(said) else ()
            spoken.append(ids or self.text("".join(part["text"] for part in _parts(message))))
            turns.append([])
        whole = self.prompt(turns[0])
        for ids, following in zip(spoken, turns[1:], strict=True):
            whole = whole + TokenPrompt(ids, ()) + self.suffix(ids, following)
        return whole

    def collapse(self, ids: Sequence[int]) -> list[int]:
        """The ids with each run of image tokens as one placeholder, which is how vLLM wants them."""
        return [
            token for i, token in enumerate(ids) if token != self.image_pad or i == 0 or ids[i - 1] != self.image_pad
        ]

    def inputs(self, prompts: Sequence[TokenPrompt]) -> dict[str, torch.Tensor]:
        """A model's keyword arguments for a batch: left-padded ids, attention and token types, pixels with their grids.

        Prompts whose image tokens do not fit their images raise BadDataError: the model would attend to the wrong
        picture without saying so.
        """
        import torch

        longest = max(len(prompt.ids) for prompt in prompts)
        pad = self.tokenizer.pad_token_id
        ids = torch.full((len(prompts), longest), pad, dtype=torch.long)
        attention = torch.zeros((len(prompts), longest), dtype=torch.long)
        for row, prompt in enumerate(prompts):
            self.check(prompt)
            ids[row, longest - len(prompt.ids) :] = torch.tensor(prompt.ids)
            attention[row, longest - len(prompt.ids) :] = 1
        inputs = {"input_ids": ids, "attention_mask": attention}
        images = [image for prompt in prompts for image in prompt.images]
        if images:
            inputs["pixel_values"], inputs["image_grid_thw"] = self.patches(images)
            inputs["mm_token_type_ids"] = (ids == self.image_pad).long()
        return inputs

    def check(self, prompt: TokenPrompt) -> None:
        """BadDataError unless the runs of image tokens are as many and as long as the images need."""
        pads = np.array(prompt.ids, np.int64) == self.image_pad
        edges = np.flatnonzero(np.diff(pads, prepend=False, append=False))  # where runs begin and end, in turn
        runs = (edges[1::2] - edges[::2]).tolist()
        wanted = [self.visual_tokens(image) for image in prompt.images]
        if runs != wanted:
            raise BadDataError(f"image tokens come in runs of {runs}; the images need {wanted}")

    def visual_tokens(self, image: Image) -> int:
        """How many tokens an (H, W, 3) image takes; sizes the processor would resample raise BadDataError."""
        height, width = image.shape[:2]
        least, most = self.processor.size["shortest_edge"], self.processor.size["longest_edge"]
        if height % self.cell or width % self.cell or not least <= height * width <= most:
            raise BadDataError(
                f"an image of {height}x{width} would be resampled; wanted multiples of {self.cell} "
                f"with {least} to {most} pixels"
            )
        return (height // self.cell) * (width // self.cell)

    def _image(self, image: Image) -> list[int]:
        return [self.vision_start, *[self.image_pad] * self.visual_tokens(image), self.vision_end]

    def _special(self, token: str) -> int:
        found = self.tokenizer.convert_tokens_to_ids(token)
        if found is None or found == self.tokenizer.unk_token_id:
            raise MedSegError(f"the tokenizer has no {token}; wanted a Qwen-VL checkpoint")
        return int(found)

    def _check_template(self) -> None:
        """MedSegError where the checkpoint's own template says anything else than what is rendered here."""
        theirs = self.tokenizer.apply_chat_template(_PROBE, tokenize=False, add_generation_prompt=True)
        side = self.cell * math.ceil(math.sqrt(self.processor.size["shortest_edge"]) / self.cell)
        image = np.zeros((side, side, 3), np.uint8)
        shown = [
            {**m, "content": [{**part, "image": image} if "image" in part else part for part in m["content"]]}
            for m in _PROBE
        ]
        if list(self.tokenizer.encode(theirs, add_special_tokens=False)) != self.collapse(self.prompt(shown).ids):
            raise MedSegError(
                "the checkpoint's chat template is not Qwen's ChatML, so chats rendered here would differ from those "
                f"it was trained on; its template gives {theirs!r}"
            )


def _parts(message: Message) -> Sequence[Mapping[str, Any]]:
    content = message["content"]
    return [{"type": "text", "text": content}] if isinstance(content, str) else content
