"""What the sam2 package itself says: its key names for all four sizes, its modules, and the tool that runs on it."""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from medseg_gym.tools.conformance import check_tool
from medseg_gym.tools.sam2 import Sam2Tool
from medseg_gym.tools.sam2_config import sam2_config, sam21_config
from medseg_gym.tools.sam2_original import VIDEO_KEYS, read_original, size_of, to_original
from medseg_gym.tools.sam2_package import Sam2PackageTool, build
from medseg_gym.types import Box, Click, Query

pytest.importorskip("sam2", reason="the sam2 package is not here; `make test-parity` has it")

from sam2_reference import YAMLS, package_model

KEYS = Path(__file__).parent / "sam2.1_hiera_t_keys.tsv"


def tiny_config() -> Any:
    """A small encoder; the package's neck and decoder have one width."""
    return sam2_config(
        64,
        hidden_size=8,
        num_attention_heads=1,
        embed_dim_per_stage=[8, 16, 32, 64],
        num_attention_heads_per_stage=[1, 2, 4, 8],
        blocks_per_stage=[1, 1, 2, 1],
        global_attention_blocks=[3],
        window_size_per_stage=[8, 4, 4, 2],
    )


def lines(state: Any) -> str:
    return "".join(f"{key}\t{'x'.join(map(str, value.shape))}\n" for key, value in sorted(state.items()))


def test_the_committed_key_list_is_the_packages() -> None:
    """tests/test_checkpoints.py makes its checkpoints from this list, where the package is not installed."""
    assert KEYS.read_text() == lines(package_model("T").state_dict())


@pytest.fixture(scope="module", params=YAMLS)
def published(request: pytest.FixtureRequest) -> tuple[str, Any]:
    return request.param, package_model(request.param)


def test_a_checkpoint_of_each_size_loads_with_nothing_left_over(published: tuple[str, Any], tmp_path: Path) -> None:
    """The package's own random model, saved as its authors save it, comes back bit by bit but for the video's part."""
    hiera, model = published
    state = model.state_dict()
    torch.save({"model": state}, tmp_path / "sam2.1.pt")
    back = to_original(read_original(tmp_path / "sam2.1.pt", None, 1024).state_dict())
    (tmp_path / "sam2.1.pt").unlink()
    assert size_of(state) == hiera
    assert all(torch.equal(state[key], value) for key, value in back.items())
    left = [key for key in state if key not in back]
    assert left and all(any(fnmatchcase(key, pattern) for pattern in VIDEO_KEYS) for key in left)


def test_the_engine_builds_what_each_sizes_yaml_builds(published: tuple[str, Any]) -> None:
    """Module by module, and block by block what no weight's shape tells: windows and strides."""
    hiera, theirs = published
    ours = build(sam21_config(hiera))
    assert repr(ours) == repr(theirs)
    for a, b in zip(ours.image_encoder.trunk.blocks, theirs.image_encoder.trunk.blocks, strict=True):
        assert (a.window_size, a.q_stride, a.attn.num_heads) == (b.window_size, b.q_stride, b.attn.num_heads)
    assert list(ours.image_encoder.trunk.stage_ends) == list(theirs.image_encoder.trunk.stage_ends)


def test_the_package_tool_conforms_and_agrees_with_the_other_engine() -> None:
    ours, theirs = Sam2Tool.from_config(tiny_config(), 0), Sam2PackageTool.from_config(tiny_config(), 0, max_batch=4)
    check_tool(theirs, tolerance=1e-5)
    assert ours.fingerprint != theirs.fingerprint
    assert theirs.fingerprint == Sam2PackageTool.from_config(tiny_config(), 0).fingerprint
    image = np.random.default_rng(0).integers(0, 256, (40, 56, 3), dtype=np.uint8)
    prior = np.random.default_rng(1).normal(0, 5, (16, 16)).astype(np.float32)
    for prompts in ((Click(9, 9),), (Box(2, 3, 30, 31),), (Box(2, 3, 30, 31), Click(9, 9, False))):
        (a,), (b,) = (t.predict([Query(t.encode([image])[0], prompts, prior)]) for t in (ours, theirs))
        assert np.abs(a.logits - b.logits).max() <= 1e-4 * a.logits.std()
        assert a.predicted_iou == pytest.approx(b.predicted_iou, abs=1e-5)
