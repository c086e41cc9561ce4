"""What both envs share: how an engine is made from their arguments, its properties, its name and its pictures."""

from __future__ import annotations

from medseg_gym import datasets, tools
from medseg_gym.datasets.base import Dataset
from medseg_gym.envs.config import EnvConfig
from medseg_gym.envs.engine import Engine, Slot
from medseg_gym.errors import unknown
from medseg_gym.registration import env_id
from medseg_gym.tools.base import SegmentationTool
from medseg_gym.types import Image

RENDER_MODES = ("rgb_array",)


class OverEngine:
    """An env whose episodes live in `engine`."""

    engine: Engine

    @property
    def dataset(self) -> Dataset:
        return self.engine.dataset

    @property
    def tool(self) -> SegmentationTool:
        return self.engine.tool

    @property
    def verbs(self) -> tuple[str, ...]:
        return self.engine.codec.verbs

    @property
    def name(self) -> str:
        """The id that the env's dataset and tool have, or would have, in the catalogue."""
        return env_id(self.dataset.name, self.tool.name)


def make_engine(dataset: str | Dataset, tool: str | SegmentationTool, config: EnvConfig, slots: int) -> Engine:
    """The engine over a dataset and a tool, each given by name or ready."""
    data = datasets.load(dataset, **config.dataset_options)
    return Engine(data, tools.load(tool, **config.tool_options), config, slots)


def check_render_mode(mode: str | None) -> str | None:
    if mode is not None and mode not in RENDER_MODES:
        raise unknown("render_mode", mode, RENDER_MODES)
    return mode


def render_slot(slot: Slot, size: int) -> Image:
    from medseg_gym.render import frame

    return frame(slot.sample.image, slot.state.mask, slot.state.prompts, size)
