"""Parts that are closed, or no longer waited for, while something is under way; neither Ray nor vLLM is needed."""

from __future__ import annotations

import asyncio
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from medseg_gym.errors import MedSegError
from medseg_gym.rl.cluster.host import Remote
from medseg_gym.rl.engines.base import GenRequest
from medseg_gym.rl.engines.vllm import VLLMEngine


def test_a_cancelled_wait_leaves_the_actor_that_has_begun_meanwhile() -> None:
    """Cancelled in the very turn of the event loop in which the actor began, as when another worker told the cases."""

    class Begins(Remote):
        async def _begin(self) -> None:
            self.life += 1

    async def run() -> None:
        remote = Begins("a part", "", {}, options={})
        waiting = asyncio.ensure_future(remote.alive())
        await asyncio.sleep(0)
        remote.begin().add_done_callback(lambda _: waiting.cancel())
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert remote.there and await remote.alive() == 1

    asyncio.run(run())


class Bare(VLLMEngine):
    """A VLLMEngine around nothing: only its own event loop, and what holds answers back in a pause."""

    def __init__(self, scratch: Path) -> None:
        async def nothing(**_: Any) -> None: ...

        self.tokens: Any = None
        self.engine = SimpleNamespace(pause_generation=nothing, shutdown=lambda: None)
        self._scratch, self._open = scratch, asyncio.Event()
        self._mode, self._broken, self._closed, self._running, self._count = "", "", False, set(), 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()


def test_a_vllm_that_is_closed_in_a_pause_tells_who_waits_to_begin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("vllm", "vllm.sampling_params"):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(SamplingParams=None, RequestOutputKind=None))

    async def run() -> None:
        engine = Bare(tmp_path / "scratch")
        await engine.pause("wait")
        request = GenRequest("r", (1,), (), 1.0, 1, 0, (2,))
        waiting = asyncio.ensure_future(engine._there(engine._generate(request)))
        await asyncio.sleep(0.1)
        assert not waiting.done()
        await engine.close()
        with pytest.raises(MedSegError, match="the engine was closed"):
            await asyncio.wait_for(waiting, 20)
        assert not engine._thread.is_alive()

    asyncio.run(run())
