"""Chats as JSON lines for TRL's SFTTrainer, PNG files beside them, and `load`, which gives the trainer its dataset.

Cut per chat the columns are "messages" and "images", to be trained with `assistant_only_loss=True`: TRL puts the marks
that this needs into Qwen-VL's chat templates by itself. Cut per turn they are "prompt", "completion" and "images":
there its default trains the completion alone, so marked turns are only ever context. Other than our own SFT, TRL also
trains the newline after an end of turn. Every content is a list of parts, as a column has one type.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from medseg_gym.errors import DataMissingError, MedSegError
from medseg_gym.policies import chat
from medseg_gym.policies.protocols.base import ChatProtocol
from medseg_gym.trajectories.export import (
    Exported,
    Pictures,
    choose_per,
    images_of,
    parts,
    rows,
    whole_folder,
    write_lines,
    write_note,
)
from medseg_gym.trajectories.store import Trajectories


def export_trl(
    trajectories: Trajectories,
    out: str | PathLike[str],
    protocol: ChatProtocol,
    size: int = chat.SIZE,
    *,
    per: str | None = None,
    thoughts: bool | None = None,
) -> Exported:
    """Writes the kept trajectories into a new folder: train.jsonl and images/. `per` as in export.py."""
    kept = trajectories.kept()
    per = choose_per(kept.records(), protocol, per)
    done = Exported(Path(out))
    with whole_folder(done.folder) as folder:
        pictures = Pictures(folder)
        write_lines(folder / "train.jsonl", _records(kept, protocol, size, per, thoughts, done, pictures))
        done.pictures = len(pictures)
        train = {"assistant_only_loss": True} if per == "chat" else {"completion_only_loss": True}
        write_note(folder, done, format="trl", per=per, protocol=protocol.name, size=size, sft_config=train)
    return done


def load(folder: str | PathLike[str]) -> Any:
    """The `datasets.Dataset` of an exported folder, its pictures decoded when a row is asked for."""
    try:
        from datasets import Image, Sequence, load_dataset
    except ImportError:
        raise MedSegError("TRL's data is read by datasets: pip install datasets") from None
    path = Path(folder).absolute()
    if not (path / "train.jsonl").is_file():
        raise DataMissingError(f"no train.jsonl in {path}; write it with `medseg-gym trajectories export --format trl`")
    data = load_dataset("json", data_files=str(path / "train.jsonl"), split="train")
    data = data.map(lambda row: {"images": [str(path / name) for name in row["images"]]})
    return data.cast_column("images", Sequence(Image()))


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
        told = _uniform(messages)
        words = {"messages": told} if per == "chat" else {"prompt": told[:-1], "completion": told[-1:]}
        yield {**words, "images": [pictures.path(image) for image in images_of(messages)]}


def _uniform(messages: Sequence[chat.Message]) -> list[dict[str, Any]]:
    """The messages with every content as parts, pictures as placeholders that TRL fills from "images"."""
    return [
        {
            "role": message["role"],
            "content": [{"type": "image"} if part["type"] == "image" else part for part in parts(message)],
        }
        for message in messages
    ]
