"""SegmentEnv: the engine with one slot, as a Gymnasium env."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from medseg_gym.datasets.base import Dataset
from medseg_gym.envs.config import EnvConfig
from medseg_gym.envs.record import episode_of
from medseg_gym.envs.shared import RENDER_MODES, OverEngine, check_render_mode, make_engine, render_slot
from medseg_gym.tools.base import SegmentationTool
from medseg_gym.types import Action, Episode, Image, View


class SegmentEnv(OverEngine, gym.Env[Any, Any]):
    """Outline one structure in one image by prompting a segmentation tool.

    ## Action space
    `MultiDiscrete([5, 1000, 1000, 1000, 1000])`: a verb (0 positive click, 1 negative click, 2 box, 3 stop, 4 undo),
    then x1 y1 x2 y2 on a 0-999 grid over the image's padded square. A click uses x1 y1; a box's corners may come in
    any order. `verbs=` restricts the first number to a choice of verbs, in the given order. `step` also takes the
    typed records `Click`, `Box` (pixels of the image; snapped to the grid), `Stop`, `Undo` and `Unreadable`.

    ## Observation space
    `Box(0, 255, (size, size, 3), uint8)`: the letterboxed image with the mask as a translucent green overlay; with
    `observation="dict"` image, overlay, mask, target (index into `structures`) and turn.

    ## Rewards
    `reward="shaped"` (default), `"medsam-agent"`, `"ibis"` or a `RewardSpec`; `info["reward_terms"]` adds up to it.

    ## Episodes
    `reset` draws a case of the split, or takes `options={"sample": key}`; `options={"start_mask": mask}` begins from a
    given (H, W) bool mask. Stop terminates, the horizon truncates (its last action is executed).

    ## Arguments
    `dataset` is a catalogue id, a prepared dataset's name, a path to a store or a Dataset; `tool` a tool id or a
    SegmentationTool. All others are the fields of `EnvConfig`. Unknown ones raise UnknownNameError.
    """

    metadata = {"render_modes": list(RENDER_MODES), "render_fps": 1}  # noqa: RUF012 - Gymnasium's own form

    def __init__(
        self,
        dataset: str | Dataset = "Phantom",
        tool: str | SegmentationTool = "Nano",
        *,
        render_mode: str | None = None,
        **options: Any,
    ) -> None:
        self.engine = make_engine(dataset, tool, EnvConfig.of(options), slots=1)
        self.render_mode = check_render_mode(render_mode)
        self.observation_space = self.engine.observation_space
        self.action_space = self.engine.codec.space

    # Gymnasium's interface

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.engine.reset(0, self.np_random, options)
        return self.engine.observe(0), self.engine.info(0)

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.engine.step([0], [action])
        return self.engine.observe(0), self.engine.reward_of(0), *self.engine.flags(0), self.engine.info(0)

    def render(self) -> Image | None:  # type: ignore[override]
        """The current picture for people: mask, prompts in order and the latest one highlighted, (size, size, 3)."""
        if self.render_mode is None:
            gym.logger.warn('render() without a render mode; use gym.make(..., render_mode="rgb_array")')
            return None
        return render_slot(self.engine.slot(0), self.engine.config.size)

    # what policies and recorders use

    def view(self) -> View:
        """What a policy may see now; the target is not in it."""
        return self.engine.view(0)

    def encode_action(self, action: Action) -> NDArray[np.int64]:
        """The action vector of a typed action on the current image."""
        return self.engine.codec.encode(action, self.engine.slot(0).grid)

    def episode(self, policy: str = "", seed: int = 0, case: int = 0) -> Episode:
        """The record of the episode so far."""
        return episode_of(self.engine, 0, env=self.name, policy=policy, seed=seed, case=case)
