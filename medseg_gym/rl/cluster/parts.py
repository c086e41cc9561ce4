"""cluster_parts: what the GRPO loop drives, as actors of a Ray cluster, each with its share and its place."""

from __future__ import annotations

import asyncio
import math
import os
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from typing import Any

from medseg_gym.errors import MedSegError, unknown
from medseg_gym.rl import sync
from medseg_gym.rl.cluster.engines import EngineRemote, RemoteEngine
from medseg_gym.rl.cluster.learners import RankActors
from medseg_gym.rl.cluster.session import connect, shares
from medseg_gym.rl.cluster.workers import RemoteWorker
from medseg_gym.rl.config import GRPOConfig
from medseg_gym.rl.engines.builds import LOCKSTEP, build_of
from medseg_gym.rl.parts import Parts, check_slots
from medseg_gym.rl.ranks import learner
from medseg_gym.rl.tokens import ChatTokens


async def cluster_parts(config: GRPOConfig) -> Parts:
    """Actors for everything but the loop: `workers` envs, `engines` engines, `ranks` learners, `tool_actors` tools.

    The model's folder and the run's are paths that every node sees. Env workers that find no place yet, as their node
    has not joined, are waited for while others play.
    """
    check_slots(config)
    ours = connect(config.cluster, cpus=_cpus(config))
    held = _Held(ours)
    try:
        return await _made(config, held)
    except BaseException:
        held.leave()
        raise


class _Held:
    """What has to be given back to the cluster beside the actors that are closed as parts."""

    def __init__(self, ours: bool) -> None:
        self.ours, self.tools, self.places = ours, list[Any](), None

    def leave(self) -> None:
        """Ends the tool actors, frees the places, and ends the cluster where it was started for this run."""
        import ray

        if self.ours:
            ray.shutdown()
            return
        if not ray.is_initialized():
            return
        for tool in self.tools:
            with suppress(Exception):  # it may be gone
                ray.kill(tool.actor)
        if self.places is not None:
            from ray.util.placement_group import remove_placement_group

            remove_placement_group(self.places)


async def _made(config: GRPOConfig, held: _Held) -> Parts:
    from medseg_gym.policies import protocols
    from medseg_gym.rl.start import starting_folder

    build, arguments = build_of(config, folder := starting_folder(config).resolve())
    tokens = ChatTokens.from_pretrained(folder)
    # These wait for room, in threads, so that a stop is heard meanwhile.
    places = await asyncio.to_thread(_places, config, held)
    tools = await asyncio.to_thread(_tools, config, held)
    settings: dict[str, Any] = {"timeout": config.call_timeout, "patience": config.patience_s}
    workers = [
        RemoteWorker(
            f"env worker {number}",
            {
                "env": config.env,
                "protocol": config.protocol,
                "size": config.size,
                "options": dict(config.env_options),
                "protocol_options": dict(config.protocol_options),
                **({"questions": config.questions} if config.questions else {}),
                **({"tool_actor": tools[number % len(tools)]} if tools else {}),
            },
            slots=config.slots // config.workers,
            history=protocols.make(config.protocol, None, **config.protocol_options).history,
            options=shares(config.worker_cpus, 0, scheduling_strategy="SPREAD"),
            **settings,
        )
        for number in range(config.workers)
    ]
    engines = [
        EngineRemote(
            f"engine {number}",
            build,
            arguments,
            options=shares(config.engine_cpus, config.engine_gpus, **_in(places, number)),
            **settings,
        )
        for number in range(config.engines)
    ]
    ranks = RankActors(
        config,
        folder,
        config.iterations,
        config.call_timeout,
        [shares(config.learner_cpus, config.learner_gpus, **_in(places, rank)) for rank in range(config.ranks)],
        config.patience_s,
    )
    return Parts(
        workers=workers,
        engine=RemoteEngine(engines, lockstep=config.engine in LOCKSTEP),
        learner=await learner(config, folder, config.iterations, processes=ranks),
        tokens=tokens,
        publish=partial(sync.publish, folder=config.weights_folder or None),
        dataset=_dataset(config),
        leave=held.leave,
    )


def _cpus(config: GRPOConfig) -> int:
    """How many CPUs a cluster of this machine says it has: no fewer than the actors are given."""
    given = config.workers * config.worker_cpus + config.engines * config.engine_cpus
    given += config.ranks * config.learner_cpus + config.tool_actors * config.tool_cpus
    return max(os.cpu_count() or 1, math.ceil(given))


def _places(config: GRPOConfig, held: _Held) -> Any:
    """The placement group of engines and learner ranks that share bundles, one of each; None where they are apart."""
    if config.placement != "colocated":
        return None
    from ray.util.placement_group import placement_group

    bundle = {"CPU": config.engine_cpus + config.learner_cpus}
    if gpus := config.engine_gpus + config.learner_gpus:
        bundle["GPU"] = gpus
    group = placement_group([dict(bundle) for _ in range(max(config.engines, config.ranks))], strategy="PACK")
    held.places = group
    if not group.wait(config.patience_s):
        raise MedSegError(
            f"the cluster has no room for {max(config.engines, config.ranks)} bundles of {bundle}; give smaller shares "
            "(engine_cpus, learner_cpus, engine_gpus, learner_gpus) or fewer engines and ranks"
        )
    return group


def _in(places: Any, bundle: int) -> Mapping[str, Any]:
    if places is None:
        return {}
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    return {"scheduling_strategy": PlacementGroupSchedulingStrategy(places, placement_group_bundle_index=bundle)}


def _tools(config: GRPOConfig, held: _Held) -> list[Any]:
    """The tools of the tool actors, which all workers share with their embeddings."""
    if not config.tool_actors:
        return []
    from medseg_gym.tools.serving.actor import start_actor

    options = dict(config.env_options.get("tool_options") or {})
    name = config.env_options.get("tool", _made_of(config)["tool"])
    for _ in range(config.tool_actors):
        tool = start_actor(
            name,
            max_restarts=-1,
            timeout=config.patience_s,
            ray_options=shares(config.tool_cpus, config.tool_gpus),
            **options,
        )
        tool.timeout = config.call_timeout
        held.tools.append(tool)
    return held.tools


def _made_of(config: GRPOConfig) -> Mapping[str, Any]:
    """The dataset and tool of the env's id."""
    import gymnasium as gym

    known = gym.registry.get(config.env)
    if known is None:
        raise unknown("env", config.env, (name for name in gym.registry if name.startswith("MedSeg-")))
    return known.kwargs


def _dataset(config: GRPOConfig) -> Any:
    """The dataset for the gallery's pictures, where this node has it."""
    from medseg_gym import datasets

    name = config.env_options.get("dataset", _made_of(config).get("dataset"))
    try:
        return datasets.load(name, **(config.env_options.get("dataset_options") or {}))
    except MedSegError:
        return None
