"""The envs: SegmentEnv, and SegmentVectorEnv for many episodes at once."""

from medseg_gym.envs.config import EnvConfig
from medseg_gym.envs.segment import SegmentEnv
from medseg_gym.envs.vector import SegmentVectorEnv

__all__ = ["EnvConfig", "SegmentEnv", "SegmentVectorEnv"]
