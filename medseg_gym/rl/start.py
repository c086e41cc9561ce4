"""The checkpoint folder that a run begins with: a local one, or a tiny random one made in the run's own folder."""

from __future__ import annotations

from pathlib import Path

from medseg_gym.errors import MedSegError
from medseg_gym.rl.checkpoint import replace_folder
from medseg_gym.rl.config import Common

TINY = "tiny"
SPREAD = 0.05  # of its random weights: it sees the cue task's cue after half as many steps as at .02


def starting_folder(config: Common) -> Path:
    """The folder of `config.model`; MedSegError where there is none. "tiny" is made in out/model from the seed."""
    if config.model != TINY:
        folder = Path(config.model).expanduser()
        if not (folder / "config.json").is_file():
            raise MedSegError(
                f"model={config.model!r}: no checkpoint folder with a config.json there; give the path of a local "
                f'Qwen-VL checkpoint, or "{TINY}" for a random small one'
            )
        return folder
    from medseg_gym.rl.tiny_model import save_tiny_model

    folder = Path(config.out) / "model"
    if not folder.is_dir():  # it gets its name when it is whole
        replace_folder(folder, lambda part: save_tiny_model(part, config.seed, spread=SPREAD))
    return folder
