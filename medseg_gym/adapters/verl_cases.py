"""Cases for verl's RL trainers: a parquet file with a row a case, which `adapters.verl.MedSegAgentLoop` plays.

verl itself is not needed to write it. `prompt` and `images` are what the env shows first, so that verl can leave out
what is too long; the agent loop goes by `extra_info`.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from medseg_gym.errors import MedSegError
from medseg_gym.policies import chat
from medseg_gym.rl.local_worker import LocalWorker
from medseg_gym.rl.sft import chosen
from medseg_gym.trajectories.export import images_of, with_placeholders

AGENT = "medseg_gym"
ROWS = 64  # written at once


def write_cases(
    env: str,
    file: str | Path,
    *,
    split: str = "train",
    cases: int = 0,
    seed: int = 0,
    protocol: str = "medsam-agent",
    protocol_options: Mapping[str, Any] | None = None,
    size: int = chat.SIZE,
    env_options: Mapping[str, Any] | None = None,
) -> int:
    """Writes `cases` of a split, drawn by the seed (0: all, in their order); how many. The file comes to be whole.

    Protocol, size and env_options are to be those of the agent loop. Columns: data_source, agent_name, prompt, images,
    ability, reward_model (empty: the reward is the env's), extra_info with id, index, env, instruction and structure.
    """
    try:
        from pyarrow import Table, parquet
    except ImportError:
        raise MedSegError("parquet files are written by pyarrow: pip install 'medseg-gym[export]'") from None
    file = Path(file)
    worker = LocalWorker(env, 1, protocol, size=size, options=env_options, protocol_options=protocol_options)
    part, count, writer = file.with_name(f".part-{file.name}"), 0, None
    with asyncio.Runner() as runner:
        try:
            keys = runner.run(worker.keys(split))
            keys = chosen(keys, cases, seed) if cases else keys
            if not keys:
                raise MedSegError(f"{env} has no cases in split {split!r}")
            file.parent.mkdir(parents=True, exist_ok=True)
            rows = (_row(runner, worker, env, key, at) for at, key in enumerate(keys))
            for batch in _batches(rows):
                table = Table.from_pylist(batch)
                writer = writer or parquet.ParquetWriter(part, table.schema)
                writer.write_table(table)
                count += len(batch)
            assert writer is not None
            writer.close()
            os.replace(part, file)
        finally:
            if writer is not None:
                writer.close()
            part.unlink(missing_ok=True)
            runner.run(worker.close())
    return count


def _row(runner: asyncio.Runner, worker: LocalWorker, env: str, key: str, index: int) -> dict[str, Any]:
    shown = runner.run(worker.reset(0, key, 0))
    sample = worker.env.engine.slot(0).sample
    messages = [dict(message) for message in shown.messages]
    return {
        "data_source": key.split("/", 1)[0],
        "agent_name": AGENT,
        "prompt": [with_placeholders(message) for message in messages],
        "images": [{"bytes": chat.png(picture)} for picture in images_of(messages)],
        "ability": "segmentation",
        "reward_model": {"style": "rule", "ground_truth": ""},
        "extra_info": {
            "id": key,
            "index": index,
            "env": env,
            "instruction": sample.instruction,
            "structure": sample.structure,
        },
    }


def _batches(rows: Iterator[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    batch: list[dict[str, Any]] = []
    for row in rows:
        batch.append(row)
        if len(batch) == ROWS:
            yield batch
            batch = []
    if batch:
        yield batch
