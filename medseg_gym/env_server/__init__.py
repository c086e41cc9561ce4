"""Envs over HTTP: `medseg-gym serve` plays them, `connect` gives a Gymnasium env that is played there."""

from medseg_gym.env_server.client import RemoteEnv, connect

__all__ = ["RemoteEnv", "connect"]
