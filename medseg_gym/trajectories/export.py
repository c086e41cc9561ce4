"""What all exports of trajectories share: chats cut so that nothing marked is trained, pictures written once, folders
that are there whole or not at all.

`per="chat"` gives a row a chat, in which a trainer learns every answer; `per="turn"` a row for each answer that is to
be learned, which is the last of its row. No trainer exported to can leave a single answer of a chat out of the loss, so
trajectories with marked turns (self-correction, wrong start) call for "turn" where the protocol keeps its history.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from medseg_gym.errors import MedSegError, unknown
from medseg_gym.images import image_hash
from medseg_gym.policies import chat
from medseg_gym.policies.protocols.base import ChatProtocol
from medseg_gym.trajectories.chats import Chat, chats, unspeakable
from medseg_gym.trajectories.records import Trajectory
from medseg_gym.trajectories.shard import flush
from medseg_gym.trajectories.store import Pair
from medseg_gym.types import Image

PER = ("chat", "turn")
Told = tuple[Trajectory, Sequence[chat.Message]]  # a row: whose it is, and its messages up to its last answer


@dataclass(slots=True)
class Exported:
    """What was written, and what was not."""

    folder: Path
    rows: int = 0
    trajectories: int = 0
    pictures: int = 0
    left_out: Counter[str] = field(default_factory=Counter)  # trajectories, by reason: "words", "marked", "env"
    differing: int = 0  # trajectories that came out differently when they were played again

    def __str__(self) -> str:
        said = f"{self.rows} rows of {self.trajectories} trajectories in {self.folder}"
        reasons = ", ".join(f"{count} ({reason})" for reason, count in sorted(self.left_out.items()))
        said += f"; {self.differing} came out differently here" if self.differing else ""
        return said + (f"; left out: {reasons}" if reasons else "")


def choose_per(pairs: Iterator[Trajectory], protocol: ChatProtocol, per: str | None) -> str:
    """The way rows are cut: the one asked for, else "turn" where a marked turn stands in a chat with others."""
    if per is None:
        return "turn" if protocol.history and any(any(trajectory.marked) for trajectory in pairs) else "chat"
    if per not in PER:
        raise unknown("per", per, PER)
    return per


def rows(
    pairs: Iterator[Pair], protocol: ChatProtocol, size: int, per: str, done: Exported, *, thoughts: bool | None
) -> Iterator[Told]:
    """The rows of trajectories in order. What was left out is counted in `done`.

    With per "chat" a trajectory whose chat has a marked turn beside others is left out: it could not be kept from being
    learned.
    """
    for trajectory, image in pairs:
        if unspeakable(trajectory, protocol):
            done.left_out["words"] += 1
            continue
        told = chats(trajectory, image, protocol, size, thoughts=thoughts)
        if per == "chat" and any(any(one.trained) and not all(one.trained) for one in told):
            done.left_out["marked"] += 1
            continue
        cut = [messages for one in told for messages in answers(one, per)]
        done.trajectories += bool(cut)
        done.rows += len(cut)
        for messages in cut:
            yield trajectory, messages


def answers(one: Chat, per: str) -> Iterator[Sequence[chat.Message]]:
    """The rows of a chat: itself where all of it is trained, or all up to each answer that is."""
    if per == "chat":
        if all(one.trained):
            yield one.messages
        return
    places = [place for place, message in enumerate(one.messages) if message["role"] == "assistant"]
    for place, trained in zip(places, one.trained, strict=True):
        if trained:
            yield one.messages[: place + 1]


class Pictures:
    """PNG files under `folder`/images, each picture once, named by its hash."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._written = folder, set[str]()

    def __len__(self) -> int:
        return len(self._written)

    def path(self, image: Image) -> str:
        """Where the picture lies, relative to the folder; written if it is new."""
        sha = image_hash(image)
        name = f"images/{sha[:2]}/{sha[2:32]}.png"
        if sha not in self._written:
            path = self._folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(chat.png(image))
            self._written.add(sha)
        return name


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """A folder to write into, which gets its name when the block is left without an error; else nothing is left."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise MedSegError(f"{out} is there already; remove it, or choose another folder")
    part = out.with_name(f".{out.name}.part")
    try:
        shutil.rmtree(part, ignore_errors=True)  # a killed run's
        part.mkdir(parents=True)
        yield part
        for path in part.rglob("*"):
            flush(path)
        if out.exists():
            out.rmdir()
        part.rename(out)
        flush(out.parent)
    except OSError as error:
        raise MedSegError(f"cannot write {out}: {error.strerror or error}; nothing was left behind") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def write_lines(path: Path, records: Iterator[dict[str, Any]]) -> None:
    """JSON lines; half surrogate pairs, which a text may hold, are spelled out."""
    with path.open("w", encoding="utf-8", errors="backslashreplace", newline="\n") as file:
        for record in records:
            file.write(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n")


def write_note(folder: Path, done: Exported, **more: Any) -> None:
    """export.json: what was written, what was left out, and how the files want to be trained on."""
    record = {
        "rows": done.rows,
        "trajectories": done.trajectories,
        "pictures": done.pictures,
        "left_out": dict(sorted(done.left_out.items())),
        **more,
    }
    (folder / "export.json").write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def parts(message: chat.Message) -> list[dict[str, Any]]:
    """A message's parts, text alone as one part."""
    content = message["content"]
    return [{"type": "text", "text": content}] if isinstance(content, str) else list(content)


def with_placeholders(message: chat.Message) -> dict[str, str]:
    """A message as role and text, <image> where its pictures stand: the words of a chat hold none (chat.plain)."""
    text = "".join("<image>" if part["type"] == "image" else part["text"] for part in parts(message))
    return {"role": message["role"], "content": text}


def images_of(messages: Sequence[chat.Message]) -> list[Image]:
    """The pictures of messages, in order."""
    return [part["image"] for message in messages for part in parts(message) if part["type"] == "image"]
