"""Chats as JSON lines in ShareGPT form with PNG files beside them, as LLaMA-Factory reads them.

The folder is a `dataset_dir`: it holds dataset_info.json, train.jsonl and images/. LLaMA-Factory has no mask for single
answers: a chat trains all of its own, or with `mask_history: true` the last alone. So rows cut per turn (export.json
says which they are) have to be trained with `mask_history: true`; otherwise marked turns would be learned. Its template
is `qwen3_vl_nothink`, as `qwen3_vl` puts empty thoughts before answers that have none. Checked against the published
schema by loading the files, and by their token ids; LLaMA-Factory itself was not run.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from medseg_gym.policies import chat
from medseg_gym.policies.protocols.base import ChatProtocol
from medseg_gym.trajectories.export import (
    Exported,
    Pictures,
    choose_per,
    images_of,
    rows,
    whole_folder,
    with_placeholders,
    write_lines,
    write_note,
)
from medseg_gym.trajectories.store import Trajectories

TAGS: Mapping[str, str] = {
    "role_tag": "role",
    "content_tag": "content",
    "user_tag": "user",
    "assistant_tag": "assistant",
    "system_tag": "system",
}


def export_sharegpt(
    trajectories: Trajectories,
    out: str | PathLike[str],
    protocol: ChatProtocol,
    size: int = chat.SIZE,
    *,
    per: str | None = None,
    name: str = "medseg_gym",
    thoughts: bool | None = None,
) -> Exported:
    """Writes the kept trajectories into a new folder; `name` is the dataset's in dataset_info.json.

    `per` is "chat" or "turn" (export.py); None takes "turn" where a marked turn calls for it.
    """
    kept = trajectories.kept()
    per = choose_per(kept.records(), protocol, per)
    done = Exported(Path(out))
    with whole_folder(done.folder) as folder:
        pictures = Pictures(folder)
        write_lines(folder / "train.jsonl", _records(kept, protocol, size, per, thoughts, done, pictures))
        done.pictures = len(pictures)
        columns = {"messages": "messages", "images": "images"}
        entry = {"file_name": "train.jsonl", "formatting": "sharegpt", "columns": columns, "tags": dict(TAGS)}
        (folder / "dataset_info.json").write_text(json.dumps({name: entry}, indent=1) + "\n", encoding="utf-8")
        train = {"dataset": name, "template": "qwen3_vl_nothink", "mask_history": per == "turn"}
        write_note(folder, done, format="sharegpt", per=per, protocol=protocol.name, size=size, llama_factory=train)
    return done


def _records(
    kept: Trajectories,
    protocol: ChatProtocol,
    size: int,
    per: str,
    thoughts: bool | None,
    done: Exported,
    pictures: Pictures,
) -> Iterator[dict[str, Any]]:
    for _, messages in rows(iter(kept), protocol, size, per, done, thoughts=thoughts):
        yield {
            "messages": [with_placeholders(message) for message in messages],
            "images": [pictures.path(image) for image in images_of(messages)],
        }
