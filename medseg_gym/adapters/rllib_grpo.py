"""GRPO as an RLlib `Algorithm`, for Ray Tune: settings in, numbers and checkpoints out, and nothing else of its own.

`train()` is one iteration of `medseg_gym.rl.grpo`, to the same bits. RLlib's EnvRunners, Learners and RLModules are
not used, so their settings are refused, and so is PBT's trick of giving one trial another's checkpoint: a run is not
gone on with by other settings. Checkpoints are the run's own, without pickles.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from medseg_gym.bench.rundir import write_whole
from medseg_gym.errors import BadDataError, MedSegError, check_keywords, unknown
from medseg_gym.rl import config as rl_config
from medseg_gym.rl.grpo_check import check
from medseg_gym.rl.start import TINY
from medseg_gym.rl.stepwise import Stepwise

try:
    from ray.rllib.algorithms.algorithm import Algorithm
    from ray.rllib.algorithms.algorithm_config import AlgorithmConfig
    from ray.rllib.utils import force_list
    from ray.tune import PlacementGroupFactory, register_trainable
except ImportError as error:
    raise MedSegError(f"this is an Algorithm of RLlib's: pip install 'medseg-gym[rl,rllib]' ({error})") from None

NAME = "MedSegGRPO"  # what Tune knows it by
RUN = "grpo"  # the run's folder in the algorithm's own
SAVED, MARK = "settings.json", "rllib_checkpoint.json"
OURS = frozenset(entry.name for entry in fields(rl_config.GRPOConfig)) - {"env", "seed"} | {"preset"}
PATHS = ("model", "out", "keys_file", "weights_folder")  # a trial has a working directory of its own
MEANT = frozenset(  # RLlib's settings that have a meaning here, the callbacks that are called among them
    (
        *("env", "env_config", "seed", "algo_class", "class", "grpo", "log_level", "log_sys_usage"),
        *("num_cpus_for_main_process", "num_gpus_per_learner", "custom_resources_for_main_process"),
        *("placement_strategy", "callbacks_class", "callbacks_on_algorithm_init", "callbacks_on_train_result"),
        *("callbacks_on_checkpoint_loaded", "_is_frozen"),
    )
)
logger = logging.getLogger(__name__)


class GRPOConfig(AlgorithmConfig):
    """`.environment(id, env_config={...})` with gym.make's keywords, `.training(...)` with GRPO's settings.

    The settings are those of `medseg_gym.rl.config.GRPOConfig` and `preset`; those that are not given are the
    preset's. `.debugging(seed=)` is the run's seed. Without `out` the run's folder is in the algorithm's own; under
    Tune `out` gets a folder a trial.
    """

    def __init__(self, algo_class: type | None = None) -> None:
        super().__init__(algo_class=algo_class or GRPO)
        for name in ("lr", "grad_clip", "model"):  # RLlib's values of settings that we have too
            setattr(self, name, None)
        self.grpo: dict[str, Any] = {}

    def training(self, **settings: Any) -> GRPOConfig:
        """GRPO's settings; unknown ones raise. A value may be Tune's, such as tune.loguniform(1e-7, 1e-5)."""
        check_keywords("training", settings, OURS)
        for name, value in settings.items():
            local = name in PATHS and isinstance(value, str | Path) and value not in ("", TINY)
            self.grpo = {**self.grpo, name: str(Path(value).expanduser().absolute()) if local else value}
        return self

    def to_dict(self) -> dict[str, Any]:
        """What was given, and no default of RLlib's: Tune writes it down, and goes on from it without being told it."""
        default, ours = AlgorithmConfig.to_dict(type(self)()), super().to_dict()
        ours.pop("class", None)
        always = ("env", "env_config", "seed", "grpo")
        return {k: v for k, v in ours.items() if k in always or k not in default or v != default[k]}

    def update_from_dict(self, config_dict: Mapping[str, Any]) -> GRPOConfig:
        """Takes a dict as Tune gives it; GRPO's settings may stand in it by their own names."""
        plain, known = dict(config_dict), {*vars(self), *AlgorithmConfig().to_dict()}
        flat = {name: plain.pop(name) for name in OURS & set(plain)}
        for name in plain:
            if name.startswith("__"):
                continue  # Tune's own, of its trial
            if self._translate_special_keys(name, warn_deprecated=False) not in known:
                raise unknown("setting", name, {*OURS, *MEANT})
        if not plain.get("optimizer"):
            plain.pop("optimizer", None)  # RLlib hands it to `training`
        super().update_from_dict(plain)
        return self.training(**{name: value for name, value in flat.items() if value is not None})

    def settings(self, out: str | Path) -> rl_config.GRPOConfig:
        """The run's settings; MedSegError for what no run can have."""
        given = {name: value.item() if hasattr(value, "item") else value for name, value in self.grpo.items()}
        options = {**given.pop("env_options", {}), **self.env_config}
        seed: dict[str, Any] = {} if self.seed is None else {"seed": self.seed}
        env: dict[str, Any] = {"env": self.env} if self.env else {}
        if options:
            given["env_options"] = options
        return rl_config.read(rl_config.GRPOConfig, **{**given, **env, **seed, "out": str(out)})

    def validate(self) -> None:
        """MedSegError for what no run can have, and for RLlib's settings that would have no effect."""
        default = type(self)().get_state()
        idle = sorted(k for k, v in self.get_state().items() if k not in MEANT and k in default and v != default[k])
        if idle:
            raise MedSegError(
                f"{', '.join(idle)}: RLlib's settings without an effect here; take .training(): workers, slots, "
                "engines, ranks, validate_every, cluster, ..."
            )
        check(self.settings("."))


class GRPO(Algorithm):
    """One GRPO run; `train()` is an iteration and gives its numbers, flat: "train/reward", "val/iou", ...

    RLlib's names for two of them are there too: env_runners/episode_return_mean and episode_len_mean.
    """

    config: GRPOConfig

    def __repr__(self) -> str:
        return type(self).__name__  # Ray asks for it where `setup` failed, and RLlib's would hide why

    @classmethod
    def get_default_config(cls) -> GRPOConfig:
        return GRPOConfig()

    @classmethod
    def default_resource_request(cls, config: Mapping[str, Any] | AlgorithmConfig) -> PlacementGroupFactory:
        """A trial's bundles: its process and, with `cluster`, the actors that have no place of their own."""
        given = config if isinstance(config, GRPOConfig) else cls.get_default_config().update_from_dict(dict(config))
        run = given.settings(".")
        bundles = [
            {
                "CPU": given.num_cpus_for_main_process,
                "GPU": given.num_gpus_per_learner,
                **given.custom_resources_for_main_process,
            }
        ]
        if run.cluster:
            bundles += [{"CPU": run.tool_cpus, "GPU": run.tool_gpus}] * run.tool_actors
            if run.placement != "colocated":
                bundles += [{"CPU": run.engine_cpus, "GPU": run.engine_gpus}] * run.engines
                bundles += [{"CPU": run.learner_cpus, "GPU": run.learner_gpus}] * run.ranks
        return PlacementGroupFactory(bundles, strategy=given.placement_strategy)

    def setup(self, config: AlgorithmConfig) -> None:  # type: ignore[override]
        self._set_up_metrics()
        self.callbacks = [kind() for kind in force_list(self.config.callbacks_class)]
        self.env_runner_group = None
        out = Path(self.config.grpo.get("out") or Path(self.logdir) / RUN)
        if "out" in self.config.grpo and self._storage is not None:
            out /= str(self._storage.trial_dir_name)
        self.run = Stepwise(self.config.settings(out), say=logger.info)

    def step(self) -> dict[str, Any]:
        numbers = self.run.step()
        self._iteration = self.run.state.step - 1  # a run that went on from its folder began later than this object
        known = {"episode_return_mean": "train/reward", "episode_len_mean": "train/turns"}
        theirs = {name: numbers[ours] for name, ours in known.items() if ours in numbers}
        return {**numbers, "env_runners": theirs, "done": self.run.done}

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        folder = Path(checkpoint_dir)
        step = self.run.save(folder)
        given = {"env": self.config.env, "env_config": dict(self.config.env_config), "seed": self.config.seed}
        saved = {"step": step, "config": {**given, "grpo": self.config.grpo}}
        write_whole(folder / MARK, json.dumps({"type": "Algorithm", "checkpoint_version": "2.1"}) + "\n")
        write_whole(folder / SAVED, json.dumps(saved, indent=1) + "\n")

    def load_checkpoint(self, checkpoint_dir: str) -> None:  # type: ignore[override]
        folder = Path(checkpoint_dir)
        step = int(_saved(folder)["step"])
        self.run.load(folder, step)
        self._iteration = step

    def save_to_path(self, path: str | Path | None = None, **options: Any) -> str:
        """RLlib's newer name for `save`."""
        if options.pop("state", None) is not None or path is None:
            raise MedSegError("save_to_path takes a folder, and no state")
        Path(path).mkdir(parents=True, exist_ok=True)
        self.save_checkpoint(str(path))
        return str(path)

    def restore_from_path(self, path: str | Path, *args: Any, **options: Any) -> None:
        """RLlib's newer name for `restore`."""
        self.load_checkpoint(str(path))

    @classmethod
    def from_checkpoint(cls, path: Any, filesystem: Any = None, *, out: str | Path = "", **options: Any) -> GRPO:
        """An algorithm that goes on from a checkpoint folder, in a run's folder of its own (`out`)."""
        folder = Path(path if isinstance(path, str | Path) else path.to_directory())
        config = GRPOConfig().update_from_dict(_saved(folder)["config"])
        config.grpo.pop("out", None)
        algorithm: GRPO = config.training(**({"out": out} if out else {})).build_algo()  # type: ignore[assignment]
        algorithm.load_checkpoint(str(folder))
        return algorithm

    def cleanup(self) -> None:
        if (run := getattr(self, "run", None)) is not None:
            run.close()


def _saved(folder: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads((folder / SAVED).read_text(encoding="utf-8"))
        return {"step": found["step"], "config": found["config"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadDataError(f"{folder} is no checkpoint of this algorithm: {error}") from None


def register() -> None:
    """Tells Tune the name. Importing this file does it for the next cluster; a later one needs it again."""
    register_trainable(NAME, GRPO)


register()
