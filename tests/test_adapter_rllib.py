"""GRPO as RLlib's Algorithm: the same bits as our own loop, its checkpoints, what it refuses, and Ray Tune over it."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ray.rllib")
pytest.importorskip("torch")

from grpo_parts import CUE
from safetensors.numpy import load_file

from medseg_gym.adapters.rllib_grpo import GRPO as Facade
from medseg_gym.adapters.rllib_grpo import NAME, GRPOConfig, register
from medseg_gym.errors import BadDataError, MedSegError, UnknownNameError
from medseg_gym.rl import grpo
from medseg_gym.rl.config import GRPOConfig as OwnConfig
from medseg_gym.rl.runlog import read_metrics
from medseg_gym.rl.stepwise import Stepwise

ROOT = Path(__file__).resolve().parents[1]
ENV = "MedSeg-Phantom-Stub-v0"
TIMED = ("time/", "idle/", "speed/")
SMALL: dict[str, Any] = {
    "protocol": "tiny",
    "size": 64,
    "device": "cpu",
    "dtype": "float32",
    "gradient_checkpointing": False,
    "max_new_tokens": 8,
    "max_chat_tokens": 512,
    "slots": 4,
    "save_every": 100,
    "gallery_every": 0,
    "iterations": 3,
    "prompts": 2,
    "rollouts": 4,
    "lr": 1e-3,
    "validate_every": 3,
    "validate_cases": 2,
    "validate_temperature": 1.0,
}


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that answers three times in four with something that can be read: groups have some spread."""
    spec = importlib.util.spec_from_file_location("learn_cue", ROOT / "baselines" / "learn_cue.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    folder: Path = module.supervised(0, tmp_path_factory.mktemp("cue"), {"steps": 45, "batch": 8, "lr": 3e-3}, 64)
    return folder


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    import ray

    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        yield ray.get_runtime_context().gcs_address
    finally:
        ray.shutdown()


def own(taught: Path, out: Path, **given: Any) -> dict[str, Any]:
    """The final weights of `grpo.train`."""
    settings = {**SMALL, "env": ENV, "env_options": CUE, "seed": 5, "model": str(taught), "out": str(out), **given}
    grpo.train(OwnConfig(**settings))
    return load_file(out / "final" / "model.safetensors")


def facade(taught: Path, **given: Any) -> GRPOConfig:
    config = GRPOConfig().environment(ENV, env_config=CUE).training(**{**SMALL, "model": taught, **given})
    return config.debugging(seed=5)


def same(found: dict[str, Any], wanted: dict[str, Any]) -> bool:
    return found.keys() == wanted.keys() and all((found[name] == wanted[name]).all() for name in wanted)


def numbers(out: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in record.items() if not k.startswith(TIMED)} for record in read_metrics(out)]


def test_the_core_loads_no_rllib() -> None:
    code = (
        "import sys, medseg_gym, medseg_gym.adapters, medseg_gym.rl.grpo, medseg_gym.rl.stepwise;"
        "print([name for name in sys.modules if name.startswith('ray')])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


@pytest.mark.slow
def test_a_run_through_the_facade_equals_our_own_and_so_does_one_from_its_checkpoint(
    cluster: str, taught: Path, tmp_path: Path
) -> None:
    """Trap 10, through RLlib: train() is an iteration, save() is written between two, and another object goes on."""
    wanted = own(taught, tmp_path / "own")
    algorithm = facade(taught, out=tmp_path / "facade").build_algo()
    results = [algorithm.train()]
    algorithm.save(str(tmp_path / "checkpoint"))
    results += [algorithm.train(), algorithm.train()]
    with pytest.raises(MedSegError, match="is done: iterations=3"):
        algorithm.train()
    algorithm.restore(str(tmp_path / "checkpoint"))  # one that has gone further takes itself back
    assert [algorithm.train()["training_iteration"] for _ in range(2)] == [2, 3]
    algorithm.stop()
    assert [result["training_iteration"] for result in results] == [1, 2, 3]
    assert [result["done"] for result in results] == [False, False, True]
    records = [record for record in read_metrics(tmp_path / "facade") if "train/reward" in record]
    assert [result["train/reward"] for result in results] == [record["train/reward"] for record in records]
    assert "val/iou" in results[2] and "val/iou" not in results[1]
    assert results[0]["env_runners"] == {"episode_return_mean": results[0]["train/reward"], "episode_len_mean": 2.0}
    assert numbers(tmp_path / "facade") == numbers(tmp_path / "own")
    assert same(load_file(tmp_path / "facade" / "final" / "model.safetensors"), wanted)

    again = Facade.from_checkpoint(str(tmp_path / "checkpoint"), out=tmp_path / "again")
    assert again.train()["training_iteration"] == 2
    assert again.train()["done"]
    again.stop()
    assert numbers(tmp_path / "again") == numbers(tmp_path / "own")
    assert same(load_file(tmp_path / "again" / "final" / "model.safetensors"), wanted)
    assert not list((tmp_path / "checkpoint").rglob("*.pkl"))


@pytest.mark.slow
def test_an_interrupt_within_an_iteration_keeps_those_before_it_and_the_next_call_goes_on(
    taught: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {**SMALL, "env": ENV, "env_options": CUE, "seed": 5, "model": str(taught), "validate_every": 0}
    stepwise = Stepwise(OwnConfig(**settings, out=str(tmp_path / "out")))
    stepwise.step()
    play = grpo.GRPO._play

    async def interrupted(*given: Any) -> Any:
        monkeypatch.setattr(grpo.GRPO, "_play", play)
        os.kill(os.getpid(), signal.SIGINT)
        return await play(*given)

    monkeypatch.setattr(grpo.GRPO, "_play", interrupted)
    with pytest.raises(KeyboardInterrupt):
        stepwise.step()
    assert [path.name for path in (tmp_path / "out" / "checkpoints").iterdir()] == ["step-00000001"]
    stepwise.step()
    stepwise.step()
    assert stepwise.done and stepwise.state.step == 3
    stepwise.close()
    stepwise.close()
    with pytest.raises(MedSegError, match="was closed"):
        stepwise.step()
    own(taught, tmp_path / "own", validate_every=0)
    assert numbers(tmp_path / "out") == numbers(tmp_path / "own")


SEARCH = """
import sys
import ray
from ray import tune
from medseg_gym.adapters.rllib_grpo import NAME, GRPOConfig

ray.init(address=sys.argv[1], log_to_driver=False)
config = GRPOConfig().environment({env!r}, env_config={cue!r}).debugging(seed=5)
config.training(**{{**{small!r}, "model": sys.argv[2], "lr": tune.grid_search([1e-3, 2e-3])}})
tune.Tuner(
    NAME,
    param_space=config,
    tune_config=tune.TuneConfig(max_concurrent_trials=1, metric="train/reward", mode="max"),
    run_config=tune.RunConfig(
        name="search",
        storage_path=sys.argv[3],
        verbose=0,
        checkpoint_config=tune.CheckpointConfig(checkpoint_frequency=1),
    ),
).fit()
"""


@pytest.mark.slow
@pytest.mark.timeout(1200)  # four processes that load Ray and torch: minutes where others share the processor
def test_a_search_of_tune_that_is_killed_goes_on_and_ends_with_the_same_bits(
    cluster: str, taught: Path, tmp_path: Path
) -> None:
    """Trap 10, through Tune: SIGKILL when the first of two trials has a checkpoint, then Tuner.restore.

    Weights and moments are compared; torch's random state, which nothing here draws from, is each process's own.
    """
    from ray import tune

    code = SEARCH.format(env=ENV, cue=CUE, small={**SMALL, "validate_every": 0})
    typed = [sys.executable, "-c", code, cluster, str(taught), str(tmp_path)]
    environment = {**os.environ, "TUNE_GLOBAL_CHECKPOINT_S": "0"}  # Tune writes down where its trials are at once
    process = subprocess.Popen(typed, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    begun = time.monotonic()
    first = "checkpoint_000000/settings.json"
    while process.poll() is None and time.monotonic() - begun < 600:
        if list((tmp_path / "search").glob(f"*/{first}")):
            break
        time.sleep(0.05)
    process.kill()
    assert process.wait() == -signal.SIGKILL, process.communicate()[1]
    assert not list((tmp_path / "search").glob("*/checkpoint_000002")), "the first trial was done before the kill"

    assert tune.Tuner.can_restore(str(tmp_path / "search"))
    register()  # other tests' clusters came before this one
    results = tune.Tuner.restore(str(tmp_path / "search"), trainable=NAME).fit()
    assert len(results) == 2 and not results.errors
    for result in results:
        assert result.metrics is not None and result.checkpoint is not None and result.config is not None
        assert result.metrics["training_iteration"] == 3 and result.metrics["done"]
        rate = result.config["grpo"]["lr"]
        own(taught, tmp_path / f"own-{rate}", lr=rate, validate_every=0)
        assert numbers(Path(result.checkpoint.path)) == numbers(tmp_path / f"own-{rate}")
        learned = next(Path(result.checkpoint.path).glob("checkpoints/step-00000003/learner/learner.safetensors"))
        again = next((tmp_path / f"own-{rate}").glob("checkpoints/step-00000003/learner/learner.safetensors"))
        assert same(*({k: v for k, v in load_file(file).items() if k != "rng/cpu"} for file in (learned, again)))
    went_on = min(results, key=lambda result: result.config["grpo"]["lr"])  # type: ignore[index]
    assert went_on.metrics is not None and went_on.metrics["iterations_since_restore"] < 3


def test_settings_that_would_have_no_effect_are_refused_before_anything_is_loaded() -> None:
    config = GRPOConfig().environment(ENV).training(model="tiny").env_runners(num_env_runners=4)
    with pytest.raises(MedSegError, match=r"num_env_runners: RLlib's settings without an effect.*workers"):
        config.validate()
    with pytest.raises(UnknownNameError, match="did you mean 'rollouts'"):
        GRPOConfig().training(rolouts=4)
    with pytest.raises(UnknownNameError, match="learning_rate"):
        GRPOConfig().update_from_dict({"learning_rate": 1e-6})
    with pytest.raises(MedSegError, match="rollouts=1; wanted 2"):
        GRPOConfig().environment(ENV).training(model="tiny", rollouts=1).validate()
    with pytest.raises(MedSegError, match="give an id as env"):
        GRPOConfig().training(model="tiny").validate()


def test_settings_come_from_calls_from_a_preset_and_from_a_dict_as_tune_gives_it(tmp_path: Path) -> None:
    called = GRPOConfig().environment(ENV, env_config={"horizon": 3}).training(preset="paper", model="m", lr=2e-6)
    found = called.debugging(seed=9).settings(tmp_path)
    assert (found.env, found.env_options["horizon"], found.seed, found.lr) == (ENV, 3, 9, 2e-6)
    assert found.std and found.model == str(Path("m").absolute())  # the paper's; a path that a trial finds too
    flat = GRPOConfig().update_from_dict({"env": ENV, "seed": 9, "preset": "paper", "model": "m", "lr": 1e-3})
    assert flat.settings(tmp_path).lr == 1e-3  # RLlib's own default, given all the same
    assert flat.settings(tmp_path).rollouts == 8
    told = GRPOConfig().update_from_dict(called.to_dict())
    assert told.settings(tmp_path) == found


def test_a_trial_asks_for_its_process_and_for_the_actors_of_its_run() -> None:
    plain = GRPOConfig().environment(ENV).training(model="tiny")
    assert Facade.default_resource_request(plain.to_dict()).bundles == [{"CPU": 1}]
    spread = plain.copy().training(cluster="auto", engines=2, engine_gpus=1.0, ranks=2, learner_gpus=0.5)
    spread.learners(num_gpus_per_learner=0)
    bundles = Facade.default_resource_request(spread.to_dict()).bundles
    assert bundles == [{"CPU": 1}, *[{"CPU": 1, "GPU": 1}] * 2, *[{"CPU": 1, "GPU": 0.5}] * 2]


def test_a_folder_that_is_no_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadDataError, match="no checkpoint of this algorithm"):
        Facade.from_checkpoint(str(tmp_path))
