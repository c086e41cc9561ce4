"""The benchmark of tools measures what it says, with a tool that takes no time."""

from __future__ import annotations

import pytest

from medseg_gym.bench.throughput_tools import measure_tools


@pytest.mark.slow
def test_every_way_of_asking_is_measured_in_one_run() -> None:
    row = measure_tools("Stub", device=None, envs=3, batch=2, actions=(2, 3), rounds=1, side=32)
    assert set(row["actions_per_s"]) == {
        *("encode_always", "cold_2", "cold_3", "warm", "served", "batched_1", "batched_2", "served_clients")
    }
    assert all(rate > 0 for rate in row["actions_per_s"].values())
    assert row["share_of_limit"] == pytest.approx(row["gain"] / row["limit"])
    # the server answered one action of warming up and five timed ones, and two times three clients
    assert row["server_batches"]["failed"] == 0
    assert row["server_batches"]["passes"] == 1 + 5 + 2 * 3
