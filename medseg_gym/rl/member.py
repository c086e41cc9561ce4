"""A Member: one episode under way as the token ids it is played in, appended turn by turn and never read again."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from medseg_gym.errors import BadDataError, MedSegError
from medseg_gym.rl.engines.base import GenRequest, GenResult
from medseg_gym.rl.jobs import Settings
from medseg_gym.rl.tokens import ChatTokens, TokenPrompt
from medseg_gym.rl.types import ImageRef, Rollout, Segment, TokenSequence
from medseg_gym.rl.worker import Observed
from medseg_gym.types import Episode

Intern = Callable[[ImageRef], ImageRef]
PARTS = ("generate_s", "queue_s", "prefill_s", "decode_s", "worker_s", "env_s", "render_s", "tokens_s")


class Member:
    """One member of a group: its chat so far, its finished chats, and where its time went.

    Within `settings.max_chat_tokens` there is always room for a whole answer. Ids are what was sampled and what was
    shown, nothing is tokenized twice.
    """

    def __init__(
        self, tokens: ChatTokens, intern: Intern, settings: Settings, place: tuple[int, int, str], history: bool
    ) -> None:
        self.tokens, self.intern, self.settings, self.history = tokens, intern, settings, history
        self.group, self.member, self.key = place
        self.turn = 0  # whose answer comes next
        self.spent = dict.fromkeys(PARTS, 0.0)  # seconds since it began
        self._finished: list[TokenSequence] = []
        self._segments: list[Segment] = []  # of the present chat
        self._ids: tuple[int, ...] = ()
        self._images: tuple[ImageRef, ...] = ()

    @property
    def length(self) -> int:
        """Tokens of the present chat."""
        return len(self._ids)

    def observe(self, observed: Observed) -> bool:
        """Appends what the env shows; False where no answer would fit after it: then nothing is appended at all."""
        begun = time.perf_counter()
        goes_on = self.history and bool(self._segments)
        try:
            if goes_on:  # the last segment ends with an end of turn, sampled or put there, so none is put twice
                prompt = self.tokens.suffix(self._segments[-1].ids, observed.messages)
            else:
                prompt = self.tokens.prompt(observed.messages)
            self.tokens.check(TokenPrompt(prompt.ids, tuple(image.pixels for image in observed.images)))
        except BadDataError as error:
            raise BadDataError(f"{self.key}, turn {self.turn}: {error}") from None
        most, room = self.settings.max_new_tokens, self.settings.max_chat_tokens
        fits = (len(self._ids) if goes_on else 0) + len(prompt.ids) + most <= room
        if fits:
            self._append(prompt, observed.images, goes_on)
        elif not self.turn:
            raise MedSegError(
                f"the first turn of {self.key} takes {len(prompt.ids)} tokens, which with an answer of {most} is more "
                f"than a chat may have ({room}): raise max_chat_tokens, or lower max_new_tokens or size"
            )
        self.spent["tokens_s"] += time.perf_counter() - begun
        return fits

    def request(self, attempt: int = 0) -> GenRequest:
        """The answer asked for; the same but for its id whenever it is asked for."""
        settings = self.settings
        name = f"{settings.name}/{settings.iteration}/{self.group}/{self.member}"
        return GenRequest(
            id=f"{name}/{self.turn}/{attempt}",
            ids=self._ids,
            images=self._images,
            temperature=settings.temperature,
            max_tokens=settings.max_new_tokens,
            seed=settings.sampling_seed(self.group, self.member, self.turn),
            stop_ids=(self.tokens.end,),
            banned_ids=self.tokens.banned_ids,
            episode=name,
        )

    def answer(self, result: GenResult) -> str:
        """Appends a whole answer, with an end of turn where it was cut off; its text."""
        begun = time.perf_counter()
        self._check(result)
        action = Segment("action", result.ids, self.turn, logprobs=result.logprobs, versions=result.versions)
        self._segments.append(action)
        self._ids += result.ids
        if result.finish == "length":
            self._segments.append(Segment("injected", (self.tokens.end,), self.turn))
            self._ids += (self.tokens.end,)
        self.turn += 1
        text = self.tokens.decode(result.ids)
        self.spent["tokens_s"] += time.perf_counter() - begun
        return text

    def spend(self, timing: Mapping[str, float]) -> None:
        """Adds seconds to the episode's."""
        for name, seconds in timing.items():
            if name in self.spent:
                self.spent[name] += seconds

    def rollout(self, episode: Episode, dropped: str = "") -> Rollout:
        """What was played; an observation that was not answered is no part of it."""
        self._close()
        return Rollout(
            group=self.group,
            member=self.member,
            episode=replace(episode, policy=self.settings.policy),
            sequences=tuple(self._finished),
            dropped=dropped,
            timing=dict(self.spent),
        )

    def _append(self, prompt: TokenPrompt, shown: Sequence[ImageRef], goes_on: bool) -> None:
        if not goes_on:
            self._close()
        images = tuple(self.intern(image) for image in shown)
        self._segments.append(Segment("observation" if goes_on else "prompt", prompt.ids, self.turn, images))
        self._ids += prompt.ids
        self._images += images

    def _close(self) -> None:
        """Ends the present chat; what follows begins a new one."""
        while self._segments and self._segments[-1].kind in ("prompt", "observation"):
            self._segments.pop()
        if self._segments:
            self._finished.append(TokenSequence(tuple(self._segments)))
        self._segments, self._ids, self._images = [], (), ()

    def _check(self, result: GenResult) -> None:
        """MedSegError where an answer is none that could have been sampled as it was asked for."""
        ids, end, most = result.ids, self.tokens.end, self.settings.max_new_tokens
        edges = [0, *(last for _, _, last in result.versions)]
        wrong = ""
        if not ids or len(ids) > most:
            wrong = f"{len(ids)} tokens; wanted 1 to {most}"
        elif len(result.logprobs) != len(ids):
            wrong = f"{len(result.logprobs)} log-probabilities for {len(ids)} tokens"
        elif end in ids[:-1] or (ids[-1] == end) != (result.finish == "stop"):
            wrong = f"an answer that ended by {result.finish!r}, its end of turn elsewhere than at its end"
        elif not self.tokens.banned_ids.isdisjoint(ids):
            wrong = f"banned ids {sorted(self.tokens.banned_ids.intersection(ids))}"
        elif edges != [*(first for _, first, _ in result.versions), len(ids)]:
            wrong = f"version spans {result.versions} for {len(ids)} tokens"
        if wrong:
            raise MedSegError(f"{self.key}, turn {self.turn}: the engine gave {wrong}")
