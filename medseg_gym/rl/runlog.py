"""What a training run says of itself: settings.json, metrics.jsonl, TensorBoard event files, W&B where wanted."""

from __future__ import annotations

import json
import math
import os
import re
import secrets
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from medseg_gym.bench.rundir import write_whole
from medseg_gym.errors import BadDataError, MedSegError
from medseg_gym.rl.checkpoint import binding
from medseg_gym.rl.config import Common
from medseg_gym.tools import locks
from medseg_gym.types import Image

SETTINGS, METRICS = "settings.json", "metrics.jsonl"
_SECRET = re.compile(r"(?i)(?:^|[_-])(?:api[_-]?key|auth\w*|credential\w*|passw\w*|pwd|secret\w*|token)$|^key$")
_USER = re.compile(r"(?<=://)[^/@\s]+@")


class RunLog:
    """Opens a run's folder for writing; one process at a time. The same settings go on with it, others are refused.

    resume_step: the step the run goes on from; what was written about later ones is cut off, as they come again.
    """

    def __init__(self, out: str | Path, config: Common, resume_step: int = 0) -> None:
        self.out = Path(out)
        try:
            self._lock = locks.take(self.out / ".lock")
        except OSError as error:
            raise MedSegError(f"cannot write into {self.out}: {error.strerror or error}; choose another") from None
        if self._lock is None:
            raise MedSegError(f"another run is writing into {self.out}; wait for it, or choose another --out")
        self._board: Any = None
        self._wandb: Any = None
        try:
            check_settings(self.out, config)
            write_whole(self.out / SETTINGS, json.dumps(shown(config), indent=1, ensure_ascii=False) + "\n")
            _cut(self.out / METRICS, resume_step)
            self._board = _tensorboard(self.out / "tensorboard", resume_step)
            if config.wandb:
                self._wandb = _wandb(self.out, config)
            self._file = (self.out / METRICS).open("a", encoding="utf-8")
        except BaseException:
            self.close()
            raise

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Adds the numbers of a step, by names such as "train/iou"; what is not finite is null in metrics.jsonl."""
        numbers = {name: float(value) for name, value in values.items()}
        plain = {name: value if math.isfinite(value) else None for name, value in numbers.items()}
        try:
            self._file.write(json.dumps({"step": step, **plain}) + "\n")
            self._file.flush()
        except OSError as error:
            raise MedSegError(
                f"cannot write {self.out / METRICS}: {error.strerror or error}; make room and give the same command "
                "again to go on"
            ) from error
        for name, value in numbers.items():
            self._board.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(numbers, step=step)

    def picture(self, step: int, name: str, image: Image) -> None:
        """Adds an (H, W, 3) uint8 picture to TensorBoard and W&B."""
        self._board.add_image(name, image, step, dataformats="HWC")
        if self._wandb is not None:
            import wandb

            self._wandb.log({name: wandb.Image(image)}, step=step)

    def close(self) -> None:
        """Ends all files; a closed log may be closed again."""
        if (file := getattr(self, "_file", None)) is not None:
            file.close()
        if self._board is not None:
            self._board.close()
            self._board = None
        if self._wandb is not None:
            self._wandb.finish()
            self._wandb = None
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def _begun(out: Path) -> bool:
    """Whether a run has left more than its settings: numbers or a checkpoint."""
    metrics, checkpoints = out / METRICS, out / "checkpoints"
    return (metrics.is_file() and metrics.stat().st_size > 0) or (checkpoints.is_dir() and any(checkpoints.iterdir()))


def check_settings(out: Path, config: Common) -> None:
    """MedSegError where a folder holds a run of other settings.

    One that ended before its first step holds none, but for the model that was made there.
    """
    file = out / SETTINGS
    if not file.exists():
        return
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("no JSON object")
    except (OSError, ValueError) as error:
        raise BadDataError(f"{file} does not hold a run's settings ({error}); choose another --out") from None
    names = list(binding(config)) if _begun(out) else ["model", "seed"] if (out / "model").exists() else []
    wanted = {name: shown(config)[name] for name in names}
    differs = [name for name, value in wanted.items() if found.get(name, value) != value]
    if differs:
        said = ", ".join(f"{name} was {found.get(name)!r}, is {wanted[name]!r}" for name in differs[:5])
        raise MedSegError(
            f"{out} holds another run: {said}; go on with its own settings, choose another --out, or remove the folder"
        )


def read_metrics(out: str | Path) -> list[dict[str, Any]]:
    """The records of a run's metrics.jsonl, a half-written last line left out; none without the file."""
    file = Path(out) / METRICS
    if not file.exists():
        return []
    lines = file.read_bytes().split(b"\n")[:-1]  # what comes after the last newline is not whole
    try:
        return [json.loads(line) for line in lines]
    except ValueError as error:
        raise BadDataError(f"{file} is not lines of JSON ({error}); choose another --out") from None


def recorded(out: Path, step: int, name: str) -> dict[str, float] | None:
    """The numbers of a step that are there already, of the record that has this name in it; None without one."""
    for record in read_metrics(out):
        if record["step"] == step and name in record:
            return {key: value for key, value in record.items() if key != "step"}
    return None


def shown(config: Common) -> dict[str, Any]:
    """The settings as they may be written down: values of secret-sounding options and passwords in URLs are "***"."""
    return {name: _without_secrets(value) for name, value in json.loads(json.dumps(asdict(config))).items()}


def _without_secrets(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: "***" if _SECRET.search(str(k)) else _without_secrets(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_without_secrets(item) for item in value]
    return _USER.sub("***@", value) if isinstance(value, str) else value


def _cut(file: Path, step: int) -> None:
    """Leaves only the records up to a step."""
    if file.exists():
        kept = [record for record in read_metrics(file.parent) if record["step"] <= step]
        write_whole(file, "".join(json.dumps(record) + "\n" for record in kept))


def _tensorboard(folder: Path, resume_step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise MedSegError("training writes TensorBoard files: pip install 'medseg-gym[rl]'") from None
    return SummaryWriter(str(folder), purge_step=resume_step + 1 if resume_step else None)


def _wandb(out: Path, config: Common) -> Any:
    """A W&B run that a continuation goes on with. It is told the settings as they are shown, and nothing else."""
    try:
        import wandb
    except ImportError:
        raise MedSegError(f"wandb={config.wandb!r} needs W&B: pip install wandb, or leave the setting out") from None
    file = out / "wandb-id"
    if not file.exists():
        write_whole(file, secrets.token_hex(8) + "\n")
    return wandb.init(
        project=config.wandb,
        id=file.read_text(encoding="utf-8").strip(),
        resume="allow",
        dir=str(out),
        config=shown(config),
        save_code=False,
    )
