"""An engine's slot as an Episode, the one record that is stored."""

from __future__ import annotations

from medseg_gym.envs.engine import Engine
from medseg_gym.episodes import encode_mask
from medseg_gym.rewards import describe
from medseg_gym.types import Episode


def episode_of(engine: Engine, index: int, *, env: str, policy: str, seed: int, case: int, error: str = "") -> Episode:
    """The record of a slot's episode so far. One that has not ended, or comes with an error, is "failed"."""
    slot = engine.slot(index)
    ended = "failed" if error or slot.ended is None else slot.ended
    episode = Episode(
        env=env,
        tool=engine.tool.fingerprint,
        policy=policy,
        case=case,
        key=slot.sample.key,
        structure=slot.sample.structure,
        instruction=slot.sample.instruction,
        patient=slot.sample.patient,
        seed=seed,
        horizon=engine.config.horizon,
        reward=engine.reward.name,
        turns=engine.turns(index),
        iou=tuple(slot.iou),
        dice=tuple(slot.dice),
        ended=ended,
        start=None if slot.start is None else encode_mask(slot.start),
        spacing_mm=slot.sample.spacing_mm,
        error=error or slot.error,
        extra={"reward": describe(engine.reward)},
    )
    return engine.recorded(index, episode)
