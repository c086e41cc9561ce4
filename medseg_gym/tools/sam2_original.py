"""SAM 2.1 checkpoints as the sam2 package and MedSAM2 write them: their key names beside transformers' ones."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from medseg_gym.errors import BadDataError
from medseg_gym.tools.checkpoints import fill
from medseg_gym.tools.weights import read_state

# All that a SAM 2.1 checkpoint may hold beyond what an image needs: how frames of a video are remembered.
VIDEO_KEYS = (
    "memory_attention.*",  # attends from a frame to the remembered ones
    "memory_encoder.*",  # makes a memory of a frame and its mask
    "maskmem_tpos_enc",  # age of a memory
    "no_mem_pos_enc",  # its place where there is no memory; only no_mem_embed is added to a single image
    "mask_downsample.*",  # brings a given mask into the object pointer's size
    "obj_ptr_proj.*",  # object pointers: what an object looked like
    "obj_ptr_tpos_proj.*",  # their age; new in 2.1
    "no_obj_ptr",  # the pointer of an object that is hidden
    "no_obj_embed_spatial",  # the memory of one; new in 2.1
)

POINTS = "prompt_encoder.point_embed.weight"  # four rows: negative, positive, box corners; four weights in the original
POSITION_KEYS = ("shared_image_embedding.positional_embedding", "prompt_encoder.shared_embedding.positional_embedding")

# From transformers' names to the original ones, in order; `\g<1>` and the like as in re.sub.
_RULES = tuple(
    (re.compile(pattern), name)
    for pattern, name in (
        (r"^no_memory_embedding$", "no_mem_embed"),
        (r"^shared_image_embedding\.", "prompt_encoder.shared_embedding."),
        (r"^vision_encoder\.backbone\.", "image_encoder.trunk."),
        (r"^vision_encoder\.neck\.convs\.(\d+)\.", r"image_encoder.neck.convs.\1.conv."),
        (r"^prompt_encoder\.", "sam_prompt_encoder."),
        (r"^mask_decoder\.", "sam_mask_decoder."),
        (r"patch_embed\.projection", "patch_embed.proj"),
        (r"shared_embedding\.positional_embedding", "pe_layer.positional_encoding_gaussian_matrix"),
        (r"mask_embed\.conv1", "mask_downscaling.0"),
        (r"mask_embed\.layer_norm1", "mask_downscaling.1"),
        (r"mask_embed\.conv2", "mask_downscaling.3"),
        (r"mask_embed\.layer_norm2", "mask_downscaling.4"),
        (r"mask_embed\.conv3", "mask_downscaling.6"),
        (r"upscale_conv1", "output_upscaling.0"),
        (r"upscale_layer_norm", "output_upscaling.1"),
        (r"upscale_conv2", "output_upscaling.3"),
        (r"layer_norm_final_attn", "norm_final_attn"),
        (r"layer_norm(\d)", r"norm\1"),
        (r"\.o_proj\.", ".out_proj."),
        (r"\.mlp\.proj_in\.", ".mlp.layers.0."),  # of a block: two layers
        (r"\.mlp\.proj_out\.", ".mlp.layers.1."),
        (r"(_mlps\.\d+|_head)\.layers\.0\.", r"\1.layers.1."),  # of a head: three layers
        (r"(_mlps\.\d+|_head)\.proj_in\.", r"\1.layers.0."),
        (r"(_mlps\.\d+|_head)\.proj_out\.", r"\1.layers.2."),
    )
)


def original_name(name: str) -> str:
    """The sam2 package's name of a weight of transformers' Sam2Model; that of the four points lacks `.0.weight`."""
    if name == POINTS:
        return "sam_prompt_encoder.point_embeddings"
    for pattern, replacement in _RULES:
        name = pattern.sub(replacement, name)
    return name


def fill_original(model: Any, state: Mapping[str, Any], source: str) -> None:
    """Puts a state dict with the sam2 package's names into a Sam2Model; BadDataError unless all of it but VIDEO_KEYS
    fits, and fills the model."""
    names: dict[str, list[str]] = {}
    for name in model.state_dict():
        names.setdefault(original_name(name), []).append(name)
    if any(key.startswith("vision_encoder.") for key in state):
        raise BadDataError(f"{source} has transformers' key names; name the folder that holds it and its config.json")
    try:
        fill(model, _points_joined(state), names.get, ignore=VIDEO_KEYS, source=source)
    except BadDataError as error:
        size = size_of(state)
        seen = "no SAM 2 checkpoint" if size is None else f"a checkpoint of SAM 2's size {size}"
        raise BadDataError(f"{error}. It looks like {seen}") from None


def to_original(state: Mapping[str, Any]) -> dict[str, Any]:
    """A Sam2Model's state dict under the sam2 package's names, without the video's weights."""
    renamed = {original_name(name): value for name, value in state.items()}
    rows = renamed.pop(original_name(POINTS))
    return renamed | {f"{original_name(POINTS)}.{row}.weight": rows[row : row + 1].clone() for row in range(len(rows))}


def size_of(state: Mapping[str, Any]) -> str | None:
    """Which published size ("T", "S", "BPlus", "L") an original state dict is of, told by width and depth."""
    stem = state.get("image_encoder.trunk.patch_embed.proj.weight")
    blocks = len({key.split(".")[3] for key in state if key.startswith("image_encoder.trunk.blocks.")})
    width = int(stem.shape[0]) if stem is not None else 0
    return {(96, 12): "T", (96, 16): "S", (112, 24): "BPlus", (144, 48): "L"}.get((width, blocks))


def read_original(path: Path, hiera: str | None, image_size: int) -> Any:
    """The Sam2Model of an original checkpoint file, of the published size `hiera` or of the one its weights tell."""
    import torch
    from transformers import Sam2Model

    from medseg_gym.tools.sam2_config import sam21_config

    state = read_state(path)
    config = sam21_config(hiera or size_of(state) or "T", image_size)
    with torch.device("meta"):  # initialising what is replaced at once takes longer than reading it
        model: Any = Sam2Model(config)
    fill_original(model, state, str(path))
    return model


def _points_joined(state: Mapping[str, Any]) -> dict[str, Any]:
    """The four point embeddings as the rows of one weight; as they are unless all four are there."""
    import torch

    base = original_name(POINTS)
    rows = [f"{base}.{row}.weight" for row in range(4)]
    if not all(isinstance(state.get(row), torch.Tensor) and state[row].ndim == 2 for row in rows):
        return dict(state)
    rest = {key: value for key, value in state.items() if key not in rows}
    return rest | {base: torch.cat([state[row] for row in rows])}
