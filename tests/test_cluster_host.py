"""Parts in Ray actors: what a handle says when its actor dies, hangs or cannot begin, and what a successor is told."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medseg_gym.errors import MedSegError, UnknownNameError
from medseg_gym.rl.cluster.engines import EngineRemote, RemoteEngine
from medseg_gym.rl.cluster.host import Remote
from medseg_gym.rl.cluster.workers import _own
from medseg_gym.rl.engines.base import EngineStatus, GenRequest, GenResult, WeightRef
from medseg_gym.rl.types import ImageRef
from medseg_gym.rl.worker import LostError, Observed

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.slow
HERE = Path(__file__).parent


class Echo:
    """A part that answers, fails and hangs as it is asked to."""

    def __init__(self, word: str) -> None:
        if word == "broken":
            raise UnknownNameError("unknown word 'broken'; did you mean 'spoken'?")
        self.word, self.history = word, True

    async def say(self) -> tuple[str, int]:
        return self.word, os.getpid()

    async def refuse(self, kind: str) -> None:
        raise MedSegError("this was refused") if kind == "ours" else ValueError("no number")

    async def hang(self) -> None:
        await asyncio.sleep(60)

    def plain(self) -> str:
        return "no coroutine"

    def lock(self) -> Any:
        return threading.Lock()

    async def close(self) -> None:
        Path(self.word).write_text("closed") if self.word.startswith("/") else None


class Engine:
    """A policy engine whose answers are its weights; the first answer of each process kills it where it is told to."""

    def __init__(self, dies: str = "") -> None:
        self.version, self.weight, self.paused, self.dies = 0, 0.0, False, dies

    async def generate(self, request: GenRequest) -> GenResult:
        if self.dies and not Path(self.dies).exists():
            Path(self.dies).write_text("once")
            os.kill(os.getpid(), signal.SIGKILL)
        return GenResult((request.seed,), (self.weight,), "stop", ((self.version, 0, 1),))

    async def generate_together(self, requests: list[GenRequest]) -> list[GenResult]:
        return [await self.generate(request) for request in requests]

    async def pause(self, mode: str) -> None:
        self.paused = True

    async def update_weights(self, source: WeightRef) -> None:
        assert self.paused and source.tensors is not None
        self.version, self.weight = source.version, self.weight + float(source.tensors["w"])

    async def resume(self) -> None:
        self.paused = False

    async def status(self) -> EngineStatus:
        return EngineStatus(self.version, self.paused, 0, {"requests": 1})

    async def close(self) -> None:
        pass


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    path = os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH", "")]))
    sys.path.insert(0, str(HERE))
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
    sys.path.remove(str(HERE))


def echo(word: str = "hello", **settings: Any) -> Remote:
    return Remote("the echo", "test_cluster_host:Echo", {"word": word}, options={"num_cpus": 0}, **settings)


def engine_remote(**arguments: Any) -> EngineRemote:
    return EngineRemote("an engine", "test_cluster_host:Engine", arguments, options={"num_cpus": 0})


def request(seed: int, episode: str = "a") -> GenRequest:
    return GenRequest(f"r{seed}", (1,), (), 1.0, 1, seed, (2,), episode=episode)


def test_a_dead_actor_is_told_of_and_the_next_call_has_another() -> None:
    async def run() -> None:
        remote = echo(attributes=("history",))
        word, process = await remote.ask("say")
        assert (word, remote.known, remote.life) == ("hello", {"history": True}, 1)
        os.kill(process, signal.SIGKILL)
        with pytest.raises(LostError, match="the echo is gone"):
            await remote.ask("say", life=1)
        word, second = await remote.ask("say")
        assert (word, remote.life) == ("hello", 2) and second != process
        with pytest.raises(LostError, match="was replaced"):
            await remote.ask("say", life=1)
        await remote.close()
        with pytest.raises(MedSegError, match="closed"):
            await remote.ask("say")

    asyncio.run(run())


def test_a_call_of_an_actor_that_is_gone_waits_for_no_successor() -> None:
    """One that finds no place: who held something in the dead one plays it elsewhere, at once."""

    async def run() -> None:
        remote = echo(patience=60.0)
        _, process = await remote.ask("say")
        os.kill(process, signal.SIGKILL)
        remote.options["num_cpus"] = 999
        with pytest.raises(LostError):
            await remote.ask("say", life=1)
        waiting = remote.begin()
        with pytest.raises(LostError, match="gone or was replaced"):
            await asyncio.wait_for(remote.ask("say", life=1), 20)
        assert not waiting.done()
        await remote.close()

    asyncio.run(run())


def test_an_answer_that_cannot_travel_is_an_error_with_words() -> None:
    async def run() -> None:
        remote = echo()
        with pytest.raises(MedSegError, match="^the echo, call: .*lock"):
            await remote.ask("lock")
        assert (await remote.ask("say"))[0] == "hello" and remote.life == 1
        await remote.close()

    asyncio.run(run())


def test_errors_come_as_themselves_and_leave_the_actor_alone() -> None:
    async def run() -> None:
        remote = echo()
        with pytest.raises(MedSegError, match="^this was refused$"):
            await remote.ask("refuse", "ours")
        with pytest.raises(MedSegError, match="^ValueError: no number$"):
            await remote.ask("refuse", "theirs")
        assert await remote.ask("plain") == "no coroutine"
        assert remote.life == 1
        await remote.close()

    asyncio.run(run())


def test_a_part_that_cannot_be_made_says_why_once() -> None:
    async def run() -> None:
        remote = echo("broken")
        with pytest.raises(UnknownNameError, match="did you mean 'spoken'"):
            await remote.ask("say")
        assert remote.life == 1

    asyncio.run(run())


def test_a_call_that_hangs_ends_the_actor() -> None:
    async def run() -> None:
        remote = echo(timeout=3.0)
        await remote.alive()
        with pytest.raises(LostError, match="no answer within 3 s"):
            await remote.ask("hang")
        assert (await remote.ask("say"))[0] == "hello" and remote.life == 2
        await remote.close()

    asyncio.run(run())


def test_an_actor_that_finds_no_place_in_time_is_an_error() -> None:
    async def run() -> None:
        remote = Remote("the giant", "test_cluster_host:Echo", {"word": "x"}, options={"num_cpus": 999}, patience=3.0)
        begun = time.monotonic()
        with pytest.raises(MedSegError, match="the giant could not be brought back"):
            await remote.alive()
        assert time.monotonic() - begun < 60

    asyncio.run(run())


def test_a_closed_part_was_told_to_close(tmp_path: Path) -> None:
    async def run() -> None:
        remote = echo(str(tmp_path / "said"))
        await remote.alive()
        await remote.close()

    asyncio.run(run())
    assert (tmp_path / "said").read_text() == "closed"


def test_an_engine_that_dies_has_its_successor_answer_with_the_newest_weights(tmp_path: Path) -> None:
    """Trap 17: full weights, then a part; the engine dies over a request, which is answered all the same."""
    import torch

    async def run() -> None:
        remote = engine_remote()
        engine = RemoteEngine([remote], lockstep=False)
        await remote.alive()  # or it is told the newest alone
        for version, full, value in ((1, True, 10.0), (2, False, 0.5), (3, False, 0.25)):
            await engine.pause("wait")
            await engine.update_weights(WeightRef(version, full, {"w": torch.tensor(value)}))
            await engine.resume()
        assert (await engine.generate(request(7))).logprobs == (10.75,)
        remote.arguments["dies"] = str(tmp_path / "died")  # the next actor dies over its first answer
        remote.kill()
        answer = await engine.generate(request(7))
        # the test engine adds what it is given: the newest full weights and the newest part alone
        assert answer.ids == (7,) and answer.logprobs == (10.25,) and answer.versions == ((3, 0, 1),)
        assert remote.life == 3 and (tmp_path / "died").exists()
        await engine.close()

    asyncio.run(run())


def test_a_paused_engines_successor_is_paused_too() -> None:
    async def run() -> None:
        remote = engine_remote()
        engine = RemoteEngine([remote], lockstep=False)
        await engine.pause("keep")
        remote.kill()
        assert (await engine.status()).paused
        await engine.resume()
        assert not (await engine.status()).paused
        await engine.close()

    asyncio.run(run())


def test_a_lost_engines_requests_go_to_another_and_it_is_told_all_when_it_is_back() -> None:
    """It finds no place for a while: its episodes go on elsewhere, new weights are published, nobody waits for it."""
    import torch

    async def run() -> None:
        remotes = [engine_remote(), engine_remote()]
        engine = RemoteEngine(remotes, lockstep=False)

        async def publish(version: int, value: float) -> None:
            await engine.pause("wait")
            await engine.update_weights(WeightRef(version, True, {"w": torch.tensor(value)}))
            await engine.resume()

        await publish(1, 10.0)
        await asyncio.gather(*(remote.alive() for remote in remotes))
        episode = next(e for e in "abcdefgh" if zlib.crc32(e.encode()) % 2 == 0)  # the first engine's
        remotes[0].options["num_cpus"] = 999
        remotes[0].kill()
        answer = await asyncio.wait_for(engine.generate(request(7, episode)), 60)
        assert answer.logprobs == (10.0,) and not remotes[0].there
        await asyncio.wait_for(publish(2, 0.5), 60)
        assert (await asyncio.wait_for(engine.status(), 60)).version == 2
        remotes[0].options["num_cpus"] = 0
        remotes[0].kill()  # what waits for a place, so that the next try is by the new options
        await remotes[0].alive()
        answer = await remotes[0].ask("generate", request(7, episode), life=remotes[0].life)
        assert answer.logprobs == (0.5,) and answer.versions == ((2, 0, 1),)
        await engine.close()

    asyncio.run(run())


def test_an_engine_that_cannot_be_made_is_said_though_another_is_there() -> None:
    async def run() -> None:
        remotes = [engine_remote(), engine_remote(speed="high")]
        engine = RemoteEngine(remotes, lockstep=False)
        await remotes[0].alive()
        remotes[1].begin()
        await asyncio.wait({remotes[1].begin()})
        with pytest.raises(MedSegError, match="unexpected keyword argument 'speed'"):
            await engine.generate(request(7))
        await engine.close()

    asyncio.run(run())


def test_pictures_from_elsewhere_are_kept_once_and_not_in_rays_store() -> None:
    pixels = np.frombuffer(bytes(48), np.uint8).reshape(4, 4, 3)  # a view, as of the store
    message = {"role": "user", "content": [{"type": "image", "image": pixels}, {"type": "text", "text": "where?"}]}
    system = {"role": "system", "content": "words"}
    found = _own(Observed([system, message], (ImageRef("a", pixels),), 0, 0.0, 0.0))
    kept = found.images[0].pixels
    assert kept.base is None and not kept.flags.writeable and (kept == pixels).all()
    assert found.messages[1]["content"][0]["image"] is kept and found.messages[0] == system


def test_an_episodes_requests_go_to_one_engine_and_all_engines_have_some() -> None:
    async def run() -> None:
        asked: list[list[str]] = [[], []]

        class Noting(EngineRemote):
            @property
            def there(self) -> bool:
                return True

            async def ask(self, method: str, *arguments: Any, life: int | None = None, **keywords: Any) -> Any:
                asked[int(self.name)].append(arguments[0].episode)
                return GenResult((), (), "stop", ())

        engine = RemoteEngine([Noting(str(i), "", {}, options={}) for i in range(2)], lockstep=False)
        for turn in range(3):
            for episode in range(16):
                await engine.generate(request(turn, f"train/0/{episode}/0"))
        assert all(asked) and not set(asked[0]) & set(asked[1])
        assert sorted(asked[0] + asked[1]) == sorted(f"train/0/{i}/0" for i in range(16) for _ in range(3))

    asyncio.run(run())
