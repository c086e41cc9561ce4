"""What must hold in every iteration of GRPO: checked in the run itself, so that a fault ends it with words."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

from medseg_gym.errors import BadDataError, MedSegError
from medseg_gym.rl.forward import check_images
from medseg_gym.rl.tokens import ChatTokens
from medseg_gym.rl.types import Rollout, Row, Segment, TokenSequence

# Mismatch KL between engine and learner. In float32 both compute the same numbers but for rounding (logs apart by 1e-5
# give 5e-11), so anything above means that they differ in weights, temperature or tokens. Half precision alone gives
# about 1e-3.
MOST_FLOAT32 = 1e-6
WARN_HALF = 0.02


class InvariantError(MedSegError):
    """Something that holds in every sound run does not: the iteration is not trained on, the last checkpoint stands."""


def check_group(group: Sequence[Rollout], tokens: ChatTokens, version: int) -> None:
    """InvariantError unless the members share case and first observation and each was sampled whole by one version.

    Per chat: image tokens fit the images, every sampled token has a finite log-probability and a version and may be
    sampled, an answer has one end of turn, sampled or injected. Dropped members are not looked at: they are not
    trained.
    """
    kept = [member for member in group if not member.dropped]
    if len({member.group for member in kept}) > 1 or len({member.member for member in kept}) != len(kept):
        raise InvariantError(f"members {[(m.group, m.member) for m in kept]} came back as one group")
    if len({member.episode.key for member in kept}) > 1:
        raise InvariantError(f"a group holds the cases {sorted({m.episode.key for m in kept})}; wanted one")
    first: tuple[Any, ...] | None = None
    for member in kept:
        where = f"group {member.group}, member {member.member}, case {member.episode.key}"
        if not member.sequences:
            continue
        shown = _first(member.sequences[0])
        if first is not None and shown != first:
            raise InvariantError(f"{where}: its first observation is not that of the members before it")
        first = shown
        turns = [segment.turn for chat in member.sequences for segment in chat.segments if segment.kind == "action"]
        if turns != list(range(len(turns))) or len(turns) != len(member.episode.turns):
            raise InvariantError(f"{where}: answers in turns {turns} of an episode of {len(member.episode.turns)}")
        for chat in member.sequences:
            try:
                check_images(tokens, chat)
            except BadDataError as error:
                raise InvariantError(f"{where}: {error}") from None
            _check_actions(chat, tokens, version, where)


def check_staleness(sampled: int, trained: int, most: int) -> None:
    """InvariantError unless groups sampled by one version are trained by weights at most `most` changes later."""
    if not 0 <= trained - sampled <= most:
        raise InvariantError(
            f"groups sampled by version {sampled} would be trained at version {trained}; wanted at most {most} later"
        )


def check_plan(plan: Sequence[Sequence[Sequence[Row]]], rows: Sequence[Row]) -> None:
    """InvariantError unless ranks have equal counts and every row is planned once, others weighing nothing.

    A row's weights lie on its trained tokens, and all of its numbers are finite there.
    """
    counts = [len(rank) for rank in plan]
    if len(set(counts)) > 1:
        raise InvariantError(f"ranks were planned {counts} micro-batches; unequal counts hang a collective")
    planned = [row for rank in plan for micro in rank for row in micro if row.weights.any()]
    wanted = [row for row in rows if row.weights.any()]
    if sorted(map(id, planned)) != sorted(map(id, wanted)):
        raise InvariantError(f"{len(wanted)} rows are to be trained, the plan holds {len(planned)} of them or others")
    for row in wanted:
        if row.weights[~row.sequence.loss_mask].any():
            raise InvariantError("a token that was not sampled has a weight in the loss")
        for name, values in (("weight", row.weights), ("advantage", row.advantages)):
            if values is not None and not all(map(math.isfinite, values.tolist())):
                raise InvariantError(f"a row has a token whose {name} is not a finite number")


def mismatch_fault(mismatch_kl: float, float32: bool) -> str:
    """What to say of a step's mismatch KL between engine and learner; "" while it is as it should be.

    In float32 it is a fault: InvariantError. In half precision the importance correction is there for it.
    """
    if float32 and not mismatch_kl <= MOST_FLOAT32:
        raise InvariantError(
            f"engine and learner disagree: mismatch KL {mismatch_kl:.3g}, at most {MOST_FLOAT32:g} in float32. They "
            "differ in weights, temperature, banned ids or tokens; this step should not be kept: resume from the last "
            "checkpoint once the cause is found"
        )
    if mismatch_kl > WARN_HALF:
        return f"mismatch KL {mismatch_kl:.3g} between engine and learner; above {WARN_HALF:g} ratios say little"
    return ""


def frozen_digest(full: Mapping[str, Any], trained: Mapping[str, Any]) -> str:
    """A hash of the weights that are in `full` and not in `trained`: names, shapes and bytes."""
    import torch

    digest = hashlib.sha256()
    for name in sorted(set(full) - set(trained)):
        tensor = full[name].detach().cpu().contiguous()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _first(chat: TokenSequence) -> tuple[Any, ...]:
    """The first prompt: its ids and its pictures."""
    segment = chat.segments[0]
    return segment.ids, tuple(image.sha for image in segment.images)


def _check_actions(chat: TokenSequence, tokens: ChatTokens, version: int, where: str) -> None:
    for at, segment in enumerate(chat.segments):
        if segment.kind != "action":
            continue
        where_turn = f"{where}, turn {segment.turn}"
        if len(segment.logprobs) != len(segment.ids) or not all(map(_logprob, segment.logprobs)):
            raise InvariantError(f"{where_turn}: {len(segment.ids)} sampled tokens with {segment.logprobs[:4]}...")
        if not _covers(segment, version):
            raise InvariantError(
                f"{where_turn}: sampled by {segment.versions}; wanted version {version} for all {len(segment.ids)} ids"
            )
        if banned := tokens.banned_ids.intersection(segment.ids):
            raise InvariantError(f"{where_turn}: the engine sampled the banned ids {sorted(banned)}")
        ends = segment.ids.count(tokens.end)
        if ends > 1 or (ends and segment.ids[-1] != tokens.end):
            raise InvariantError(f"{where_turn}: an answer with {ends} ends of turn; wanted one, at its end")
        after = chat.segments[at + 1] if at + 1 < len(chat.segments) else None
        injected = after is not None and after.kind == "injected" and tokens.end in after.ids
        if after is not None and bool(ends) == injected:
            raise InvariantError(f"{where_turn}: {ends + injected} ends of turn follow the answer; wanted one")


def _covers(segment: Segment, version: int) -> bool:
    at = 0
    for number, start, stop in segment.versions:
        if start != at or stop < start or number != version:
            return False
        at = stop
    return at == len(segment.ids)


def _logprob(value: float) -> bool:
    return math.isfinite(value) and value <= 1e-6
