"""Checkpoint folders of transformers: the model read from one, and a trained one written as its copy."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medseg_gym.errors import BadDataError, MedSegError

if TYPE_CHECKING:
    import torch

SHARD = "5GB"
LARGEST_SETTINGS = 64 * 2**20  # bytes of a file that is copied; a large vocabulary takes 11 MB


def load_model(folder: Path) -> Any:
    """The model of a local folder of safetensors, in float32, on the CPU; nothing is fetched and no code is run."""
    import torch
    from transformers import AutoModelForImageTextToText
    from transformers.utils import logging

    if not folder.is_dir():
        raise MedSegError(f"no checkpoint folder at {folder}; give the path of a local Qwen-VL checkpoint")
    bar = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model = AutoModelForImageTextToText.from_pretrained(
            folder, dtype=torch.float32, use_safetensors=True, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        raise BadDataError(f"{folder} holds no model that transformers loads: {error}") from None
    finally:
        if bar:
            logging.enable_progress_bar()
    inner = getattr(model, "model", None)
    if not hasattr(model, "lm_head") or not hasattr(inner, "get_rope_index") or not hasattr(inner, "language_model"):
        raise MedSegError(f"{folder} holds a {type(model).__name__}; wanted a model of the Qwen-VL family")
    return model


def saved_names(model: Any, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights under the names that transformers' `save_pretrained` gives them in a file."""
    from transformers.core_model_loading import revert_weight_conversion

    return dict(revert_weight_conversion(model, dict(weights)))


def write_checkpoint(weights: Mapping[str, torch.Tensor], source: Path, folder: Path) -> None:
    """Writes weights into a folder that is otherwise a copy of `source`: tokenizer, template, settings."""
    from huggingface_hub import save_torch_state_dict

    folder.mkdir(parents=True, exist_ok=True)
    dtypes = {str(value.dtype).removeprefix("torch.") for value in weights.values()}
    for file in sorted(source.iterdir()):
        if file.is_file() and _is_setting(file):
            shutil.copyfile(file, folder / file.name)
    save_torch_state_dict(
        dict(weights),
        folder,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=SHARD,
        metadata={"format": "pt"},
    )
    settings = json.loads((source / "config.json").read_text(encoding="utf-8"))
    _say_dtype(settings, dtypes.pop())
    (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _is_setting(file: Path) -> bool:
    weights = file.name.endswith((".safetensors", ".bin", ".pt", ".pth", ".index.json", ".py"))
    return not weights and not file.name.startswith(".") and file.stat().st_size <= LARGEST_SETTINGS


def _say_dtype(settings: dict[str, Any], dtype: str) -> None:
    for key in ("dtype", "torch_dtype"):
        if key in settings:
            settings[key] = dtype
    for value in settings.values():
        if isinstance(value, dict):
            _say_dtype(value, dtype)
