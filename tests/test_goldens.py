"""Goldens: Stub episodes as they were first stored. A change here is a change of behaviour, to be stated in CHANGELOG.

Made by `python tests/test_goldens.py`, which writes tests/goldens/stub.jsonl anew.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import Blobs

from medseg_gym.envs import SegmentEnv
from medseg_gym.episodes import from_json, to_json
from medseg_gym.types import Action, Box, Click, Stop, Undo, Unreadable

FILE = Path(__file__).parent / "goldens" / "stub.jsonl"
SCRIPTS: dict[str, list[Action | Unreadable]] = {
    "box-stop": [Box(11, 4, 31, 24), Stop()],
    "clicks": [Click(21, 14), Click(24, 16), Click(5, 40, False), Stop()],
    "undo": [Box(0, 0, 63, 47), Undo(), Undo(), Box(11, 4, 31, 24), Stop()],
    "unreadable": [Unreadable("no tool call"), Click(21, 14), Unreadable("x out of range"), Stop()],
    "horizon": [Click(21, 14), Click(22, 14), Click(23, 14), Click(24, 14), Click(25, 14)],
}
REWARDS = ("shaped", "medsam-agent", "ibis")


def episodes() -> list[str]:
    lines = []
    for reward in REWARDS:
        env = SegmentEnv(dataset=Blobs(), tool="Stub", reward=reward, observation="dict", size=32)
        for case, (name, script) in enumerate(SCRIPTS.items()):
            env.reset(seed=0, options={"sample": "Blobs/train-0/disc"})
            for action in script:
                env.step(action)
            lines.append(to_json(env.episode(policy=name, seed=0, case=case)))
    return lines


def test_stub_episodes_are_those_stored() -> None:
    stored = FILE.read_text(encoding="utf-8").splitlines()
    made = episodes()
    assert len(stored) == len(made) == len(SCRIPTS) * len(REWARDS)
    for old, new in zip(stored, made, strict=True):
        before, after = json.loads(old), json.loads(new)
        for floats in ("iou", "dice"):
            assert after.pop(floats) == pytest.approx(before.pop(floats), abs=1e-12)
        for turn_before, turn_after in zip(before["turns"], after["turns"], strict=True):
            assert turn_after.pop("reward") == pytest.approx(turn_before.pop("reward"), abs=1e-12)
            assert turn_after.pop("terms") == pytest.approx(turn_before.pop("terms"), abs=1e-12)
        assert after == before


def test_stored_rewards_are_recomputed_from_the_stored_episode_alone() -> None:
    """What a stored episode says is enough for its rewards, bit for bit: IoU, Dice and actions."""
    from medseg_gym import rewards
    from medseg_gym.episodes import decode_mask

    for line in FILE.read_text(encoding="utf-8").splitlines():
        episode = from_json(line)
        spec = rewards.PRESETS[episode.reward]
        target = Blobs()[episode.key].target
        mask = np.zeros_like(target)
        now = rewards.start(episode.iou[0], episode.dice[0])
        for t, turn in enumerate(episode.turns):
            hit = None
            if isinstance(turn.action, Click):
                x, y = turn.action.x, turn.action.y
                hit = (
                    bool(target[y, x] and not mask[y, x])
                    if turn.action.positive
                    else bool(mask[y, x] and not target[y, x])
                )
            mask = decode_mask(turn.mask)
            later = rewards.after(now, turn.action, episode.iou[t + 1], episode.dice[t + 1], hit=hit)
            terms = spec.terms_of_turn(now, later, ends=t == len(episode.turns) - 1)
            assert terms == dict(turn.terms)
            assert sum(terms.values()) == turn.reward
            now = later


if __name__ == "__main__":
    FILE.write_text("\n".join(episodes()) + "\n", encoding="utf-8")
    print(f"wrote {FILE}")
