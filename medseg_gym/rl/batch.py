"""From episodes to what a learner is given: rows with their weights, and the plan of micro-batches for each rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from medseg_gym.errors import BadDataError, MedSegError, unknown
from medseg_gym.rl.config import GRPOConfig
from medseg_gym.rl.types import Rollout, Row, TokenSequence

NORMALISERS = ("constant", "token", "sequence")
Plan = list[list[list[Row]]]  # [rank][micro-batch][row]


@dataclass(frozen=True, slots=True, eq=False)
class Flat:
    """The trained tokens of some rows, one row after the other: (N,) each, as `loss.token_losses` wants them."""

    chosen: tuple[NDArray[np.bool_], ...]  # of each row (T,): the tokens with a weight, which are the trained ones
    weights: NDArray[np.float32]
    advantages: NDArray[np.float32] | None
    engine_logprobs: NDArray[np.float32]  # zeros where no engine sampled
    old: NDArray[np.float32] | None
    reference: NDArray[np.float32] | None

    @property
    def lengths(self) -> tuple[int, ...]:
        """How many trained tokens each row has; 0 for one that only fills a plan."""
        return tuple(int(chosen.sum()) for chosen in self.chosen)


def rows_of(
    rollouts: Sequence[Rollout], advantages: Sequence[NDArray[np.floating] | None], config: GRPOConfig
) -> list[Row]:
    """One row a chat of each rollout that has advantages, in order. With R such rollouts, the weight of a token is:

    "constant": 1 / (R max_new_tokens), so that no episode's length changes what one of its tokens weighs (Dr. GRPO,
    arXiv 2503.20783). "token": 1 / the batch's tokens, whose weights then add up to 1 (DAPO, arXiv 2503.14476).
    "sequence": 1 / (R tokens of the rollout), so that every rollout weighs the same, in however many chats it was
    played (GRPO, arXiv 2402.03300). A rollout without a trained token has no row and is not counted.
    """
    if config.normaliser not in NORMALISERS:
        raise unknown("normaliser", config.normaliser, NORMALISERS)
    pairs = [
        (r, a, tokens) for r, a in zip(rollouts, advantages, strict=True) if a is not None and (tokens := _tokens(r))
    ]
    whole = sum(tokens for _, _, tokens in pairs)
    rows = []
    for rollout, values, tokens in pairs:
        divisor = {
            "constant": len(pairs) * config.max_new_tokens,
            "token": whole,
            "sequence": len(pairs) * tokens,
        }[config.normaliser]
        rows += [_row(sequence, values, 1 / divisor) for sequence in rollout.sequences if sequence.loss_mask.any()]
    return rows


def supervised_rows(sequences: Sequence[TokenSequence]) -> list[Row]:
    """A step's rows in supervised training: the loss is the mean over its trained tokens. None trained is an error."""
    whole = sum(int(sequence.loss_mask.sum()) for sequence in sequences)
    if not whole:
        raise BadDataError(f"none of the {len(sequences)} chats of this step has a token to train")
    return [Row(sequence, sequence.loss_mask.astype(np.float32) / np.float32(whole)) for sequence in sequences]


def filler(row: Row) -> Row:
    """A copy that weighs nothing, so that a rank with fewer rows takes part in the others' steps."""
    return replace(row, weights=np.zeros_like(row.weights))


def plan(rows: Sequence[Row], ranks: int, micro_rows: int, micro_tokens: int) -> Plan:
    """Every row in one micro-batch, as many micro-batches for each rank; a function of its arguments.

    A micro-batch has at most `micro_rows` rows and, padded to its longest, `micro_tokens` tokens; a longer row goes
    alone. Rows of like length go together and ranks have like lengths at the same time. Where the count does not come
    out even the largest micro-batches are halved, and where they are single rows, `filler` copies of the shortest row
    make it up. Without rows every rank has none.
    """
    for name, value in (("ranks", ranks), ("micro_rows", micro_rows), ("micro_tokens", micro_tokens)):
        if value < 1:
            raise MedSegError(f"{name}={value}; wanted 1 or more")
    ordered = sorted(rows, key=lambda row: -_length(row))
    micros: list[list[Row]] = []
    start = 0
    while start < len(ordered):
        most = max(1, min(micro_rows, micro_tokens // max(1, _length(ordered[start]))))
        micros.append(ordered[start : start + most])
        start += most
    while len(micros) % ranks and any(len(micro) > 1 for micro in micros):
        largest = max((i for i, m in enumerate(micros) if len(m) > 1), key=lambda i: (_padded(micros[i]), -i))
        half = (len(micros[largest]) + 1) // 2
        micros[largest : largest + 1] = [micros[largest][:half], micros[largest][half:]]
    micros += [[filler(ordered[-1])] for _ in range(-len(micros) % ranks)]
    micros.sort(key=lambda micro: -_padded(micro))
    return [micros[rank::ranks] for rank in range(ranks)]


def flatten(rows: Sequence[Row]) -> Flat:
    """The rows' trained tokens, as `loss.token_losses` takes them; rows that differ in what they hold raise."""
    chosen = tuple(row.weights != 0 for row in rows)
    engine = [row.sequence.logprobs[mask] for row, mask in zip(rows, chosen, strict=True)]
    weights = [row.weights[mask] for row, mask in zip(rows, chosen, strict=True)]
    optional: dict[str, NDArray[np.float32] | None] = {}
    for name in ("advantages", "old", "reference"):
        given = [getattr(row, name) for row in rows]
        if any(value is None for value in given) and any(value is not None for value in given):
            raise BadDataError(f"some rows have {name} and some have not; a step's rows have it all or none")
        there = [value[mask] for value, mask in zip(given, chosen, strict=True) if value is not None]
        optional[name] = np.concatenate(there) if there else None
    return Flat(chosen, np.concatenate(weights), engine_logprobs=np.concatenate(engine), **optional)


def _row(sequence: TokenSequence, advantages: NDArray[np.floating], weight: float) -> Row:
    trained = sequence.loss_mask
    turns = sequence.turns[trained]
    if turns.min() < 0 or turns.max() >= len(advantages):
        raise BadDataError(f"a chat trains turn {turns.max()} of an episode of {len(advantages)} turns")
    values = np.zeros(len(trained), np.float32)
    values[trained] = advantages[turns]
    return Row(sequence, np.where(trained, np.float32(weight), np.float32(0)), values)


def _tokens(rollout: Rollout) -> int:
    return sum(int(sequence.loss_mask.sum()) for sequence in rollout.sequences)


def _length(row: Row) -> int:
    return len(row.weights)


def _padded(micro: Sequence[Row]) -> int:
    return len(micro) * max(_length(row) for row in micro)
