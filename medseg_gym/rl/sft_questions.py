"""Questions in supervised training: their chats as token sequences, and batches of them beside trajectories."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from medseg_gym.datasets.vqa import Questions
from medseg_gym.errors import MedSegError
from medseg_gym.frames import Grid
from medseg_gym.policies import chat
from medseg_gym.policies.protocols.base import ChatProtocol
from medseg_gym.policies.protocols.questions import asking, demonstration
from medseg_gym.rl.questions import Share
from medseg_gym.rl.sft_rows import ChatRows, sequence_of
from medseg_gym.rl.tokens import ChatTokens
from medseg_gym.rl.types import TokenSequence
from medseg_gym.trajectories.chats import Chat
from medseg_gym.types import View


class QuestionRows:
    """Questions of the split "train" as chats to be learned: the question, and the answer at once, without the tool.

    A chat is made when it is asked for; none of them is longer than `max_chat_tokens`, else MedSegError.
    """

    def __init__(
        self, questions: Questions, protocol: ChatProtocol, tokens: ChatTokens, *, size: int, max_chat_tokens: int
    ) -> None:
        self.protocol, self.tokens, self.size = asking(protocol), tokens, size
        self.keys = questions.keys("train")
        if not len(self.keys):
            raise MedSegError(f"{questions.name} has no question in its train split")
        self._questions, self._max = questions, max_chat_tokens
        said = hashlib.sha256(f"{questions.content}\n{len(self.keys)}".encode())
        self.digest = said.hexdigest()

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, number: int) -> TokenSequence:
        key = self.keys[number]
        sample = self._questions[key]
        height, width = sample.image.shape[:2]
        nothing = np.zeros((height, width), np.bool_)
        view = View(key, sample.image, nothing, (), "", sample.asked.asked, 0, 1)
        text = demonstration(self.protocol, sample.asked.demonstrated, Grid(height, width))
        messages = [*chat.messages(view, self.protocol, self.size), {"role": "assistant", "content": chat.plain(text)}]
        found = sequence_of(Chat(tuple(messages), (True,), (0,)), self.tokens)
        if len(found.ids) > self._max:
            raise MedSegError(f"{key} takes {len(found.ids)} tokens, more than max_chat_tokens={self._max}; raise it")
        return found


class MixedRows:
    """Chats of trajectories with a share of questions among them, as an endless row of shuffled epochs of each."""

    def __init__(self, rows: ChatRows, questions: QuestionRows, share: float) -> None:
        self.rows, self.questions, self.share = rows, questions, Share(share)
        self.digest = hashlib.sha256(f"{rows.digest} {questions.digest}".encode()).hexdigest()

    def step(self, step: int, batch: int, seed: int) -> list[TokenSequence]:
        """The chats of a step, 1 the first: a function of these numbers."""
        positions = range((step - 1) * batch, step * batch)
        asked = [self.share.before(p) for p in positions if self.share.is_question(p)]
        shown = [p - self.share.before(p) for p in positions if not self.share.is_question(p)]
        questions = iter(_placed(asked, len(self.questions), [seed, 1]))
        rows = iter(_placed(shown, len(self.rows), [seed]))
        return [
            self.questions[next(questions)] if self.share.is_question(p) else self.rows[next(rows)] for p in positions
        ]


def _placed(positions: Sequence[int], count: int, seed: Sequence[int]) -> list[int]:
    """Which of `count` rows stand at positions of an endless row of shuffled epochs; sft_rows.drawn's order."""
    orders: dict[int, NDArray[np.int64]] = {}
    numbers = []
    for position in positions:
        epoch, place = divmod(position, count)
        if epoch not in orders:
            orders[epoch] = np.random.default_rng([seed[0], epoch, *seed[1:]]).permutation(count)
        numbers.append(int(orders[epoch][place]))
    return numbers
