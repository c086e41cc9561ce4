"""The OpenEnv adapter, through OpenEnv's own server and client; skipped where openenv-core is not installed."""

from __future__ import annotations

import base64
import threading
import time
from typing import Any

import cv2
import numpy as np
import pytest
from conftest import Blobs

from medseg_gym.envs.segment import SegmentEnv
from medseg_gym.tools.stub import Stub

pytest.importorskip("openenv.core.env_server")


def served(**options: Any) -> dict[str, Any]:
    return {"dataset": Blobs(), "tool": Stub(), "observation": "dict", "size": 32, **options}


def picture(observation: Any) -> np.ndarray:
    data = np.frombuffer(base64.b64decode(observation["overlay"]["png"]), np.uint8)
    return cv2.cvtColor(cv2.imdecode(data, cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)


def test_an_environment_plays_the_envs_own_episode() -> None:
    from openenv.core.env_server import Environment

    from medseg_gym.adapters import openenv as adapter

    one = adapter.environment("MedSeg-v0", **served())()
    assert isinstance(one, Environment)
    local = SegmentEnv(Blobs(), Stub(), observation="dict", size=32)
    obs, info = local.reset(seed=3)
    told = one.reset(seed=3, episode_id="e")
    assert (told.info["key"], told.done, one.state.episode_id) == (info["key"], False, "e")
    assert picture(told.observation).tobytes() == obs["overlay"].tobytes()
    obs, reward, *_ = local.step([2, 100, 100, 600, 600])
    told = one.step(adapter.SegmentAction(action={"box": [100, 100, 600, 600]}))
    assert (told.reward, one.state.step_count) == (reward, 1)
    assert picture(told.observation).tobytes() == obs["overlay"].tobytes()
    assert one.step(adapter.SegmentAction(action={"text": "?"})).unreadable.startswith("no <tool_call>")
    assert one.step(adapter.SegmentAction(action=[3, 0, 0, 0, 0])).done
    assert one.reset(sample="Blobs/train-0/bar").info["key"] == "Blobs/train-0/bar"


def test_openenvs_server_and_client_play_it() -> None:
    import uvicorn
    from openenv.core import GenericEnvClient

    from medseg_gym.adapters import openenv as adapter

    app = adapter.create_app("MedSeg-v0", hide_metrics=True, **served())
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.05)
            assert thread.is_alive()
        url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
        with GenericEnvClient(base_url=url).sync() as first, GenericEnvClient(base_url=url).sync() as second:
            keys = {client.reset(seed=seed).observation["info"]["key"] for client, seed in ((first, 0), (second, 0))}
            assert len(keys) == 1
            result = first.step({"action": {"box": [100, 100, 600, 600]}})
            assert (result.done, result.reward) == (False, None)
            assert "iou" not in result.observation["info"]
            assert first.step({"action": {"stop": True}}).done
            assert not second.step({"action": {"undo": True}}).done
            assert second.state()["step_count"] == 1
    finally:
        server.should_exit = True
        thread.join(30)
