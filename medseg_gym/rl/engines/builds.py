"""Policy engines by their names in the settings, made in this process or, of the same arguments, in an actor."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from medseg_gym.errors import check_keywords, unknown
from medseg_gym.rl.config import GRPOConfig
from medseg_gym.rl.engines.base import PolicyEngine

BUILDS = {"hf": "medseg_gym.rl.engines.builds:hf", "vllm": "medseg_gym.rl.engines.builds:vllm"}
LOCKSTEP = ("hf",)  # see PolicyEngine.lockstep


def build_of(config: GRPOConfig, folder: Path) -> tuple[str, dict[str, Any]]:
    """What makes the engine of a run, "package.module:callable", and its arguments; `engine_options` stand above."""
    if config.engine not in BUILDS:
        raise unknown("engine", config.engine, BUILDS)
    arguments: dict[str, Any] = {"folder": str(folder), "dtype": config.dtype}
    arguments |= {"device": config.device} if config.engine == "hf" else {"max_model_len": config.max_chat_tokens}
    return BUILDS[config.engine], {**arguments, **config.engine_options}


def make(config: GRPOConfig, folder: Path) -> PolicyEngine:
    """The engine of a run, in this process."""
    build, arguments = build_of(config, folder)
    module, _, name = build.partition(":")
    engine: PolicyEngine = getattr(importlib.import_module(module), name)(**arguments)
    return engine


def hf(folder: str, **options: Any) -> PolicyEngine:
    from medseg_gym.rl.engines.hf import HFEngine

    check_keywords("engine_options", options, ("device", "dtype", "max_batch"))
    return HFEngine(folder, **options)


def vllm(folder: str, **options: Any) -> PolicyEngine:
    from medseg_gym.rl.engines.vllm import VLLMEngine

    return VLLMEngine(folder, **options)
