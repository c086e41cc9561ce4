"""The log-probabilities of chats under a model: what the learner's loss is made of, and what an engine is held to."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from medseg_gym.errors import BadDataError, MedSegError
from medseg_gym.rl.tokens import ChatTokens, TokenPrompt
from medseg_gym.rl.types import TokenSequence

if TYPE_CHECKING:
    import torch

LOGITS = 2**25  # most logits in a chunk: 128 MB in float32, 220 positions of a vocabulary of 152 thousand


def token_logprobs(
    model: Any,
    tokens: ChatTokens,
    sequences: Sequence[TokenSequence],
    *,
    temperature: float = 1.0,
    banned: bool = True,
    device: str | torch.device = "cpu",
) -> torch.Tensor:
    """(B, T) float32: the log-probability of each trained token given all before it, 0 elsewhere.

    T is the longest chat; shorter ones stand at the right, as `ChatTokens.inputs` pads them (`unpad` takes them out).
    Errors are those of `scored`.
    """
    import torch

    chosen = [sequence.loss_mask for sequence in sequences]
    flat = scored(model, tokens, sequences, chosen, temperature=temperature, banned=banned, device=device)
    where = torch.from_numpy(_padded(chosen)).to(device)
    return torch.zeros(where.shape, device=device).masked_scatter(where, flat)


def unpad(padded: torch.Tensor, sequences: Sequence[TokenSequence]) -> list[NDArray[np.float32]]:
    """The (T,) arrays of each chat in a left-padded (B, T)."""
    rows = padded.detach().float().cpu().numpy()
    return [row[len(row) - len(sequence.ids) :].copy() for row, sequence in zip(rows, sequences, strict=True)]


def scored(
    model: Any,
    tokens: ChatTokens,
    sequences: Sequence[TokenSequence],
    chosen: Sequence[NDArray[np.bool_]],
    *,
    temperature: float = 1.0,
    banned: bool = True,
    device: str | torch.device = "cpu",
) -> torch.Tensor:
    """(N,) float32: the log-probabilities of the chosen tokens, a (T,) mask a chat, one chat after the other; N may
    be 0.

    The distribution is the one an engine samples from: `banned` takes out what may not be sampled, then `temperature`
    divides the logits. Chats whose image tokens do not fit their images, or that choose a banned token, raise
    BadDataError.
    """
    import torch

    if temperature <= 0:
        raise MedSegError(f"temperature={temperature}: greedy choices have no log-probabilities; wanted more than 0")
    for sequence, mask in zip(sequences, chosen, strict=True):
        check_images(tokens, sequence)
        if banned:
            _check_banned(tokens, sequence, mask)
    scorer = model if isinstance(model, scorer_class()) else scorer_class()(model)
    inputs = model_inputs(scorer.model, tokens, sequences)
    where = torch.from_numpy(_padded(chosen))
    if where[:, 0].any():
        raise BadDataError("the first token of a chat was to be trained; nothing comes before it to predict it from")
    vocabulary = scorer.model.lm_head.weight.shape[0]
    taken_out = sorted(token for token in tokens.banned_ids if token < vocabulary) if banned else []
    return scorer(
        {name: value.to(device) for name, value in inputs.items()},
        where.to(device),
        temperature,
        torch.tensor(taken_out, dtype=torch.long, device=device),
    )


def model_inputs(model: Any, tokens: ChatTokens, sequences: Sequence[TokenSequence]) -> dict[str, torch.Tensor]:
    """A base model's keyword arguments for whole chats, on the CPU: left-padded, with mRoPE positions (3, B, T)."""
    import torch

    inputs = tokens.inputs([TokenPrompt(s.ids, tuple(image.pixels for image in s.images)) for s in sequences])
    inputs.setdefault("mm_token_type_ids", torch.zeros_like(inputs["input_ids"]))
    # A model that is given no positions may take those left by its last generation.
    inputs["position_ids"], _ = model.model.get_rope_index(
        inputs["input_ids"],
        mm_token_type_ids=inputs["mm_token_type_ids"],
        image_grid_thw=inputs.get("image_grid_thw"),
        attention_mask=inputs["attention_mask"],
    )
    return inputs


def micros(sequences: Sequence[TokenSequence], rows: int, tokens: int) -> list[list[TokenSequence]]:
    """The chats in order, cut into as few micro-batches as have no more rows, and no more tokens with their padding."""
    found: list[list[TokenSequence]] = []
    longest = 0
    for sequence in sequences:
        longest = max(longest, len(sequence.ids))
        if not found or len(found[-1]) == rows or longest * (len(found[-1]) + 1) > tokens:
            found.append([])
            longest = len(sequence.ids)
        found[-1].append(sequence)
    return found


def check_images(tokens: ChatTokens, sequence: TokenSequence) -> None:
    """BadDataError, naming the turn, unless every segment has image tokens for exactly its own images."""
    for segment in sequence.segments:
        try:
            tokens.check(TokenPrompt(segment.ids, tuple(image.pixels for image in segment.images)))
        except BadDataError as error:
            raise BadDataError(f"turn {segment.turn}, {segment.kind}: {error}") from None


def _check_banned(tokens: ChatTokens, sequence: TokenSequence, mask: NDArray[np.bool_]) -> None:
    for at in np.flatnonzero(mask):
        if sequence.ids[at] in tokens.banned_ids:
            raise BadDataError(
                f"turn {sequence.turns[at]}: token {sequence.ids[at]} was to be trained, but no sampler may produce it"
            )


def _padded(masks: Sequence[NDArray[np.bool_]]) -> NDArray[np.bool_]:
    longest = max(len(mask) for mask in masks)
    return np.stack([np.pad(mask, (longest - len(mask), 0)) for mask in masks])


@cache
def scorer_class() -> type[Any]:
    """The module that holds a model and applies its head only where a chosen token is predicted, chunk by chunk.

    A module, so that FSDP's hooks, which gather the weights, run around it; made here, as torch is not imported before.
    """
    import torch
    from torch.utils.checkpoint import checkpoint

    class Scorer(torch.nn.Module):
        def __init__(self, model: Any) -> None:
            super().__init__()
            self.model = model

        def forward(
            self, inputs: dict[str, torch.Tensor], chosen: torch.Tensor, temperature: float, banned: torch.Tensor
        ) -> torch.Tensor:
            """(N,) log-probabilities of the chosen tokens of a (B, T) mask, row by row."""
            hidden = self.model.model(**inputs, use_cache=False)[0]
            hidden = hidden[:, :-1][chosen[:, 1:]]  # token t is predicted at t - 1
            ids = inputs["input_ids"][chosen]
            chunk = max(1, LOGITS // self.model.lm_head.weight.shape[0])
            # Where there are several chunks, the logits of each are computed anew when its gradient is due.
            several = len(ids) > chunk and torch.is_grad_enabled()
            score = _recomputed(self._score) if several else self._score
            pairs = zip(hidden.split(chunk), ids.split(chunk), strict=True)
            return torch.cat([score(states, these, temperature, banned) for states, these in pairs])

        def _score(
            self, states: torch.Tensor, ids: torch.Tensor, temperature: float, banned: torch.Tensor
        ) -> torch.Tensor:
            logits = self.model.lm_head(states).float()
            if len(banned):
                logits.index_fill_(1, banned, -torch.inf)  # in place, as is what follows: a copy is a chunk's memory
            if temperature != 1:
                logits.div_(temperature)
            return -torch.nn.functional.cross_entropy(logits, ids, reduction="none")

    def _recomputed(function: Any) -> Any:
        return lambda *given: checkpoint(function, *given, use_reentrant=False, preserve_rng_state=False)

    return Scorer
