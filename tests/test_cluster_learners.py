"""A learner whose ranks are Ray actors: the same weights as in one process, and what is said when a rank fails."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from grpo_parts import settings

from medseg_gym.errors import BadDataError, MedSegError
from medseg_gym.rl import batch
from medseg_gym.rl.cluster import learners
from medseg_gym.rl.cluster.learners import RankActor, RankActors
from medseg_gym.rl.loss import Objective
from medseg_gym.rl.ranks import learner
from medseg_gym.rl.worker import LostError, UnplacedError

ray = pytest.importorskip("ray")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
HERE = Path(__file__).parent


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    path = os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH", "")]))
    ray.init(
        address="local",
        num_cpus=4,
        include_dashboard=False,
        logging_level="ERROR",
        log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": path, "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"}},
    )
    yield
    ray.shutdown()


def test_two_ranks_on_a_cluster_make_the_updates_of_one_process(tmp_path: Path) -> None:
    """Trap 11: FSDP2 over gloo between two actors, two steps, against a learner in this process; then one rank is
    killed in a step, which is a LostError, and all begin again from what was saved."""
    import made_chats
    import torch

    from medseg_gym.rl.tiny_model import save_tiny_model

    folder = save_tiny_model(tmp_path / "model")
    chats = [made_chats.chat(made_chats.learner(folder).tokens, 1 + n % 3, seed=n) for n in range(7)]
    rows, sft = batch.supervised_rows(chats), Objective("sft")

    async def steps(handle: Any, ranks: int, count: int) -> list[dict[str, float]]:
        return [await handle.step(batch.plan(rows, ranks, 2, 16384), sft) for _ in range(count)]

    async def run() -> None:
        one = await learner(made_chats.config(folder, lr=1e-3), folder, 10)
        said = await steps(one, 1, 2)
        config = made_chats.config(folder, lr=1e-3, ranks=2)
        actors = RankActors(config, folder, 10, 240.0, [{"num_cpus": 1}] * 2)
        two = await learner(config, folder, 10, processes=actors)
        assert [numbers["loss"] for numbers in await steps(two, 2, 2)] == pytest.approx([n["loss"] for n in said])
        wanted, found = await one.weights(full=True), await two.weights(full=True)
        assert found.keys() == wanted.keys()
        for name, value in found.items():
            torch.testing.assert_close(value, wanted[name], atol=1e-5, rtol=0)
        for here, there in zip(
            await one.logprobs(chats, temperature=0.8), await two.logprobs(chats, temperature=0.8), strict=True
        ):
            assert abs(here - there).max() < 1e-5

        await two.save(tmp_path / "saved")
        process = await asyncio.wrap_future(
            actors.actors[1].__ray_call__.remote(lambda _: __import__("os").getpid()).future()
        )
        os.kill(process, signal.SIGSTOP)  # so that the first rank is in the step, waiting for it
        step = asyncio.ensure_future(steps(two, 2, 1))
        await asyncio.sleep(1)
        os.kill(process, signal.SIGKILL)
        with pytest.raises(LostError, match="rank 1 of the learner is gone"):
            await step
        with pytest.raises(LostError, match="load a checkpoint"):
            await steps(two, 2, 1)
        await two.load(tmp_path / "saved")
        await steps(two, 2, 1)
        await steps(one, 1, 1)
        wanted, found = await one.weights(full=False), await two.weights(full=False)
        for name, value in found.items():
            torch.testing.assert_close(value, wanted[name], atol=1e-5, rtol=0)
        await two.close()
        await one.close()

    asyncio.run(run())


class Rank(RankActor):
    """A rank without a model, which does as it is told."""

    def join(self, meeting: Any) -> None:
        self.learner = self

    def tell(self, what: str) -> int:
        if what == "bad data":
            raise BadDataError(f"rank {self.rank} was given bad data")
        if what == "fault":
            raise RuntimeError(f"rank {self.rank} has a fault")
        if what == "wait":
            time.sleep(60)
        if what == "die":
            time.sleep(1)
            os.kill(os.getpid(), signal.SIGKILL)
        return self.rank


@pytest.fixture
def ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RankActors]:
    monkeypatch.setattr(learners, "RankActor", Rank)
    made = RankActors(settings(tmp_path, ranks=2), tmp_path, 1, 40.0, [{"num_cpus": 0}] * 2)
    yield made
    made.kill()


@pytest.mark.parametrize(
    ("told", "error", "said"),
    [
        (("wait", "bad data"), BadDataError, "^rank 1 was given bad data$"),
        (("fault", "bad data"), BadDataError, "^rank 1 was given bad data$"),
        (("fault", "die"), LostError, "rank 1 of the learner is gone"),
        (("die", "wait"), LostError, "rank 0 of the learner is gone"),
        (("fault", "fault"), MedSegError, "rank . of the learner:(.|\n)*has a fault"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, tuple) else "",
)
def test_what_led_to_a_failure_is_told_and_no_rank_waits_for_one_that_failed(
    ranks: RankActors, told: tuple[str, str], error: type[Exception], said: str
) -> None:
    """A rank fails of another's silence before Ray says that the other is dead; one that only waits says nothing."""
    ranks.start()
    begun = time.monotonic()
    with pytest.raises(error, match=said) as caught:
        ranks.call("tell", [((what,), {}) for what in told])
    assert isinstance(caught.value, LostError) == (error is LostError)
    assert time.monotonic() - begun < 30 and not ranks.actors


def test_a_rank_that_gives_no_answer_is_taken_for_lost(ranks: RankActors) -> None:
    ranks.start()
    ranks._timeout = 1.0
    with pytest.raises(LostError, match=r"ranks \[1\] of the learner gave no answer within 1 s"):
        ranks.call("tell", [(("now",), {}), (("wait",), {})])


def test_ranks_that_find_no_place_say_what_to_do(tmp_path: Path) -> None:
    made = RankActors(settings(tmp_path, ranks=2), tmp_path, 1, 60.0, [{"num_cpus": 0}, {"num_cpus": 999}], 5.0)
    with pytest.raises(UnplacedError, match=r"ranks \[.*1\] of the learner found no place.*within 5 s.*learner_cpus"):
        made.start()
    assert not made.actors
