"""Parquet files for verl: train.parquet for its multi-turn SFT and, with the dataset at hand, rl.parquet for its GRPO.

SFT rows have `messages` (role and text, <image> where a picture stands) and `images` ([{bytes}], PNG). verl trains
every assistant message of a row and has no mask for one, nor a way to train the last alone; trajectories whose marked
turns stand in a chat with others are therefore left out, and counted. RL rows, one a case, have MedSAM-Agent's columns:
`prompt` up to the first answer, `images`, `data_source`, `reward_model` with the target's mask as PNG, `extra_info`.
Checked against the published schema through `datasets`; verl itself was not run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from medseg_gym.errors import MedSegError
from medseg_gym.policies import chat
from medseg_gym.policies.protocols.base import ChatProtocol
from medseg_gym.trajectories.export import Exported, images_of, rows, whole_folder, with_placeholders, write_note
from medseg_gym.trajectories.store import Trajectories
from medseg_gym.types import Mask, View

BATCH = 64  # rows written at once


def export_verl(
    trajectories: Trajectories,
    out: str | PathLike[str],
    protocol: ChatProtocol,
    size: int = chat.SIZE,
    *,
    targets: Callable[[str], Mask] | None = None,
    thoughts: bool | None = None,
) -> Exported:
    """Writes the kept trajectories into a new folder. `targets` gives the (H, W) target of a key; None: no rl.parquet.

    The RL rows are the cases of all kept trajectories, each once, in the order they first come.
    """
    kept = trajectories.kept()
    done = Exported(Path(out))
    with whole_folder(done.folder) as folder:
        _write(folder / "train.parquet", _sft(kept, protocol, size, thoughts, done), _sft_schema())
        cases = 0
        if targets is not None:
            cases = _write(folder / "rl.parquet", _rl(kept, protocol, size, targets), _rl_schema())
        write_note(folder, done, format="verl", per="chat", protocol=protocol.name, size=size, rl_cases=cases)
    return done


def _sft(
    kept: Trajectories, protocol: ChatProtocol, size: int, thoughts: bool | None, done: Exported
) -> Iterator[dict[str, Any]]:
    for trajectory, messages in rows(iter(kept), protocol, size, "chat", done, thoughts=thoughts):
        images = [{"bytes": chat.png(image)} for image in images_of(messages)]
        done.pictures += len(images)
        yield {
            "messages": [with_placeholders(message) for message in messages],
            "images": images,
            "data_source": _source(trajectory.episode.key),
            "extra_info": {"id": trajectory.episode.key, "strategy": trajectory.strategy, "kind": trajectory.kind},
        }


def _rl(
    kept: Trajectories, protocol: ChatProtocol, size: int, targets: Callable[[str], Mask]
) -> Iterator[dict[str, Any]]:
    seen: set[str] = set()
    for trajectory, image in kept:
        episode = trajectory.episode
        if episode.key in seen:
            continue
        seen.add(episode.key)
        view = View(
            key=episode.key,
            image=image,
            mask=np.zeros(image.shape[:2], np.bool_),
            prompts=(),
            structure=episode.structure,
            instruction=episode.instruction,
            turn=0,
            horizon=episode.horizon,
        )
        messages = chat.messages(view, protocol, size)
        target = np.repeat(np.uint8(255) * targets(episode.key)[..., None], 3, axis=2)
        yield {
            "data_source": _source(episode.key),
            "prompt": [with_placeholders(message) for message in messages],
            "images": [{"bytes": chat.png(picture)} for picture in images_of(messages)],
            "ability": "segmentation",
            "reward_model": {"style": "rule", "ground_truth": {"bytes": chat.png(target)}},
            "extra_info": {
                "id": episode.key,
                "index": len(seen) - 1,
                "target_description": episode.instruction,
                "structure": episode.structure,
                "env": episode.env,
            },
        }


def _source(key: str) -> str:
    return key.split("/", 1)[0]


def _sft_schema() -> Any:
    pa = _arrow()
    message, image = pa.struct([("role", pa.string()), ("content", pa.string())]), pa.struct([("bytes", pa.binary())])
    extra = pa.struct([("id", pa.string()), ("strategy", pa.string()), ("kind", pa.string())])
    return pa.schema(
        [
            ("messages", pa.list_(message)),
            ("images", pa.list_(image)),
            ("data_source", pa.string()),
            ("extra_info", extra),
        ]
    )


def _rl_schema() -> Any:
    pa = _arrow()
    message, image = pa.struct([("role", pa.string()), ("content", pa.string())]), pa.struct([("bytes", pa.binary())])
    extra = [("id", pa.string()), ("index", pa.int64())]
    extra += [(name, pa.string()) for name in ("target_description", "structure", "env")]
    return pa.schema(
        [
            ("data_source", pa.string()),
            ("prompt", pa.list_(message)),
            ("images", pa.list_(image)),
            ("ability", pa.string()),
            ("reward_model", pa.struct([("style", pa.string()), ("ground_truth", image)])),
            ("extra_info", pa.struct(extra)),
        ]
    )


def _write(path: Path, records: Iterator[dict[str, Any]], schema: Any) -> int:
    pa = _arrow()
    from pyarrow import parquet

    count = 0
    with parquet.ParquetWriter(path, schema) as writer:
        while batch := list(islice(records, BATCH)):
            writer.write_table(pa.Table.from_pylist(batch, schema=schema))
            count += len(batch)
    return count


def _arrow() -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise MedSegError("parquet files are written by pyarrow: pip install 'medseg-gym[export]'") from None
    return pyarrow
