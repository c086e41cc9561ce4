"""SAM and MedSAM on tiny random weights, and SAM-B in full: parity with transformers, checkpoints, padding."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medseg_gym import tools
from medseg_gym.errors import BadDataError, UnknownNameError
from medseg_gym.frames import PaddedFrame
from medseg_gym.tools.base import advance, empty_state, given_state
from medseg_gym.tools.cache import CachedTool
from medseg_gym.tools.conformance import check_tool
from medseg_gym.tools.sam import MEAN, STD, MedSamTool, SamTool, padded_pixels, stretched_pixels
from medseg_gym.tools.sam_config import published, sam_config
from medseg_gym.tools.sam_original import model_of, rename
from medseg_gym.types import Box, Click, Image, MaskState, Prompt, Query, Sample

torch = pytest.importorskip("torch")

SIZE = 64
TOLERANCE = 1e-4  # of the largest logit: batched against one by one
KEYS = Path(__file__).parent / "data" / "sam_vit_b_keys.tsv"  # of the segment-anything package's own ViT-B
PARITY = 1e-4  # of the logits' standard deviation
GOLDEN = [
    [[170, 229, 176], [182, 232, 167], [106, 220, 202], [30, 208, 241]],
    [[80, 168, 9], [41, 133, 108], [109, 99, 169], [203, 105, 120]],
    [[115, 120, 64], [95, 131, 156], [52, 137, 234], [37, 130, 206]],
    [[16, 105, 193], [12, 130, 77], [22, 116, 44], [36, 79, 132]],
]


def tiny_config() -> Any:
    return sam_config(
        SIZE,
        width=32,
        mlp_dim=64,
        iou_width=32,
        hidden_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        window_size=3,
        global_attn_indexes=[2],
    )


@pytest.fixture(scope="module")
def tool() -> SamTool:
    return SamTool.from_config(tiny_config(), 0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tool: SamTool) -> Path:
    path = tmp_path_factory.mktemp("tiny-sam")
    tool.model.save_pretrained(path)
    return path


@pytest.fixture(autouse=True)
def nothing_stays_loaded() -> Iterator[None]:
    yield
    tools.unload()


def image(height: int, width: int, seed: int = 0) -> Image:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def keys() -> dict[str, tuple[int, ...]]:
    rows = [line.split("\t") for line in KEYS.read_text().splitlines()[1:]]
    return {name: tuple(int(n) for n in shape.split("x")) for name, shape in rows}


def original(tool: SamTool) -> dict[str, Any]:
    """The tool's weights under the segment-anything package's names."""
    state = tool.model.state_dict()
    named = {key: rename(key) for key in keys()}
    picked = {key: name if isinstance(name, str) else name[0] for key, name in named.items()}
    return {key: state[name].clone() for key, name in picked.items() if name in state}


class User:
    """SamModel asked as its documentation tells, with its own processor and no help of ours."""

    def __init__(self, model: Any, size: int, picture: Image) -> None:
        from transformers import SamProcessor
        from transformers.models.sam.image_processing_pil_sam import SamImageProcessorPil

        pad = {"height": size, "width": size}
        self.processor: Any = SamProcessor(SamImageProcessorPil(size={"longest_edge": size}, pad_size=pad))
        self.model, self.picture = model, picture
        self.pixels = self.processor(images=picture, return_tensors="pt")["pixel_values"]
        self.embedding = model.get_image_embeddings(self.pixels)

    def ask(self, prompts: tuple[Prompt, ...], prior: Any, multimask: bool = True) -> tuple[np.ndarray, float, Any]:
        clicks = [p for p in prompts if isinstance(p, Click)]
        given: dict[str, Any] = {}
        if clicks:
            given["input_points"] = [[[[p.x, p.y] for p in clicks]]]
            given["input_labels"] = [[[int(p.positive) for p in clicks]]]
        if boxes := [[p.x1, p.y1, p.x2, p.y2] for p in prompts if isinstance(p, Box)]:
            given["input_boxes"] = [boxes]
        inputs = self.processor(images=self.picture, return_tensors="pt", **given)
        sizes, reshaped = inputs.pop("original_sizes"), inputs.pop("reshaped_input_sizes")
        inputs.pop("pixel_values")
        for name in ("input_points", "input_boxes"):
            if name in inputs:
                inputs[name] = inputs[name].float()
        with torch.no_grad():
            output = self.model(
                **inputs, image_embeddings=self.embedding, input_masks=prior, multimask_output=multimask
            )
        full = self.processor.post_process_masks([output.pred_masks[0]], sizes, reshaped, binarize=False)[0][0]
        best = int(output.iou_scores[0, 0].argmax())
        return full[best].numpy(), float(output.iou_scores[0, 0, best]), output.pred_masks[:, 0, best][:, None]


def episode(width: int, height: int) -> list[Prompt]:
    """Turns of a case: clicks, a box, clicks, a newer box, a click."""
    x, y = width // 10, height // 10
    return [
        Click(3 * x, 4 * y),
        Click(7 * x, 2 * y, False),
        Box(x, 2 * y, 6 * x, 8 * y),
        Click(5 * x, 5 * y),
        Box(2 * x, y, 9 * x, 7 * y),
        Click(8 * x, 8 * y, False),
    ]


def check_episode(tool: CachedTool, user: User, multimask: bool = True) -> None:
    picture = user.picture
    sample = Sample("s", picture, np.zeros(picture.shape[:2], np.bool_), "thing", "a thing", "1")
    state, prior = empty_state(sample), None
    for action in episode(picture.shape[1], picture.shape[0]):
        (state,) = advance(tool, [sample], [state], [action])
        wanted, iou, prior = user.ask(state.prompts, prior, multimask)
        spread = float(prior.std())
        assert spread >= 1 and wanted.std() > 0.3
        assert state.prediction is not None
        assert np.abs(state.prediction.logits - wanted).max() <= PARITY * spread
        assert np.abs(state.prediction.prior - prior[0, 0].numpy()).max() <= PARITY * spread
        assert state.prediction.predicted_iou == pytest.approx(iou, abs=1e-4)
        near = np.abs(wanted) <= PARITY * spread
        np.testing.assert_array_equal(state.mask[~near], wanted[~near] > 0)
    assert tool.counters()["encodes"] == 1


@pytest.mark.parametrize("shape", [(40, 56), (90, 33), (64, 64)])
@pytest.mark.parametrize("multimask", [True, False])
def test_episodes_equal_transformers_called_directly(tool: SamTool, shape: tuple[int, int], multimask: bool) -> None:
    cached = CachedTool(SamTool(tool.model, multimask=multimask))
    check_episode(cached, User(tool.model, SIZE, image(*shape)), multimask)


@pytest.mark.slow
@pytest.mark.timeout(1200)  # 45 s of one core, and a shared machine may not give one
def test_episodes_of_the_full_size_equal_transformers_called_directly() -> None:
    tool = SamTool.from_config(published("B"), 0)
    check_episode(CachedTool(tool), User(tool.model, 1024, image(300, 451)))


def test_it_conforms(tool: SamTool) -> None:
    check_tool(tool, tolerance=TOLERANCE)


def test_it_conforms_batched_cached_and_with_its_other_switches(tool: SamTool) -> None:
    other = SamTool(tool.model, max_batch=4, multimask=False, feed_prior=False, memory="latest", name="other")
    check_tool(CachedTool(other, max_bytes=20_000), tolerance=TOLERANCE)


def test_medsam_conforms_and_takes_boxes_only(tool: SamTool) -> None:
    medsam = MedSamTool(tool.model, max_batch=4)
    check_tool(medsam, tolerance=TOLERANCE)
    assert medsam.prompts == {Box} and not medsam.options.multimask and not medsam.options.feed_prior
    (embedding,) = medsam.encode([image(20, 30)])
    with pytest.raises(ValueError, match=r"MedSAM cannot take .*Click.*; it takes Box"):
        medsam.predict([Query(embedding, (Click(1, 1),))])


def test_medsam_is_asked_as_its_authors_ask_it(tool: SamTool) -> None:
    """Box corners scaled per axis and nothing else; the single mask; the probabilities upsampled in one step."""
    from torch.nn.functional import interpolate

    medsam, picture = MedSamTool(tool.model), image(40, 56)
    (embedding,) = medsam.encode([picture])
    answer = medsam.predict([Query(embedding, (Box(7, 10, 28, 30),), np.full((16, 16), 9, np.float32))])[0]
    with torch.no_grad():
        output = tool.model(
            pixel_values=stretched_pixels(picture, SIZE),
            input_boxes=torch.tensor([[[7 * 64 / 56, 16.0, 32.0, 48.0]]]),
            multimask_output=False,
        )
    low = output.pred_masks[:, 0]
    share = interpolate(torch.sigmoid(low), (40, 56), mode="bilinear")[0, 0].numpy()
    np.testing.assert_allclose(1 / (1 + np.exp(-answer.logits)), share, atol=1e-5)
    np.testing.assert_allclose(answer.prior, low[0, 0].numpy(), atol=1e-4)


def test_a_batch_over_images_and_prompts_equals_one_by_one(tool: SamTool) -> None:
    batched = SamTool(tool.model, max_batch=16)
    embeddings = batched.encode([image(40, 56, 1), image(64, 64, 2), image(90, 33, 3)])
    prior = np.random.default_rng(0).normal(0, 5, (16, 16)).astype(np.float32)
    sets: list[tuple[Prompt, ...]] = [(Click(5, 6),), (Box(2, 3, 25, 30),), (Box(2, 3, 25, 30), Click(9, 9))]
    queries = [Query(e, prompts, given) for prompts in sets for e in embeddings for given in (None, prior)]
    for query, together in zip(queries, batched.predict(queries), strict=True):
        (alone,) = tool.predict([query])
        assert np.abs(alone.logits - together.logits).max() <= TOLERANCE * np.abs(alone.logits).max()


def test_the_longest_side_fills_the_input() -> None:
    wide = PaddedFrame(300, 400, 1024)
    assert wide.content == (768, 1024) and wide.to_tool(200, 75) == (512, 192)
    assert PaddedFrame(400, 300, 1024).content == (1024, 768)
    assert PaddedFrame(64, 64, 1024).content == (1024, 1024)
    assert PaddedFrame(3, 2000, 1024).content == (2, 1024)  # 1.536, rounded
    assert PaddedFrame(1, 5000, 1024).content == (1, 1024)  # .2 would be no row at all
    assert wide.from_tool(*wide.to_tool(123, 45)) == pytest.approx((123, 45))


def test_pixels_are_normalised_before_the_padding() -> None:
    x = padded_pixels(np.full((20, 40, 3), (255, 0, 128), np.uint8), SIZE)
    assert x.shape == (1, 3, SIZE, SIZE) and x.dtype == torch.float32
    wanted = [(255 - MEAN[0]) / STD[0], -MEAN[1] / STD[1], (128 - MEAN[2]) / STD[2]]
    assert np.allclose(x[0, :, 31, 63].numpy(), wanted, atol=1e-6)
    assert not x[0, :, 32:].any()


def test_upsampling_cuts_the_padding_off(tool: SamTool) -> None:
    """A 32x64 image fills the upper 8 of 16 rows: 1 there, -1 below. Between rows 7 and 8 lies 7.375: .625 - .375."""
    low = -torch.ones(16, 16)
    low[:8] = 1
    full = tool.upsample(low, 32, 64)
    assert full.shape == (32, 64)
    assert full[0, 0] == 1 and full[31, 0] == pytest.approx(0.25)
    assert tool.upsample(low, 16, 32).shape == (16, 32)


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_start_mask_lies_where_the_image_lies(tool: SamTool, wrapped: bool) -> None:
    """Right half of a 32x64 image: columns 8 to 15 of the upper 8 rows at 10, everything else at -10."""
    mask = np.zeros((32, 64), np.bool_)
    mask[:, 32:] = True
    state = given_state(CachedTool(tool) if wrapped else tool, mask)
    assert isinstance(state, MaskState) and state.prediction is not None
    wanted = np.full((16, 16), -10.0)
    wanted[:8, 8:] = 10
    np.testing.assert_array_equal(state.prediction.prior, wanted)
    stretched = given_state(MedSamTool(tool.model), mask)
    assert stretched.prediction is not None
    np.testing.assert_array_equal(stretched.prediction.prior, np.repeat([[-10.0, 10.0]], 8, axis=1).repeat(16, axis=0))


def test_medsams_resize_is_scikit_images() -> None:
    """Cubic, antialiased, cut to bytes: skimage 0.26's resize(order=3, preserve_range=True, anti_aliasing=True)."""
    picture = np.random.default_rng(5).integers(0, 256, (5, 3, 3), dtype=np.uint8)
    resized = np.array(GOLDEN, float)
    wanted = (resized - resized.min()) / (resized.max() - resized.min())
    np.testing.assert_allclose(stretched_pixels(picture, 4)[0].permute(1, 2, 0).numpy(), wanted, atol=1e-6)


def test_medsams_pixels_span_zero_to_one() -> None:
    x = stretched_pixels(image(20, 30), SIZE)
    assert x.shape == (1, 3, SIZE, SIZE) and x.dtype == torch.float32
    assert x.min() == 0 and x.max() == 1
    assert not stretched_pixels(np.full((20, 30, 3), 77, np.uint8), SIZE).any()


def test_medsam_upsamples_probabilities(tool: SamTool) -> None:
    """.99 and .3 to four pixels: .99, .8175, .4725, .3. Upsampled logits would put the third at .4 above zero."""
    low = torch.tensor([[math.log(99), math.log(3 / 7)]])
    full = MedSamTool(tool.model).upsample(low, 1, 4)[0]
    assert torch.sigmoid(full).tolist() == pytest.approx([0.99, 0.8175, 0.4725, 0.3], abs=1e-6)
    assert (full > 0).tolist() == [True, True, False, False]
    assert np.isfinite(MedSamTool(tool.model).upsample(torch.tensor([[400.0, -400.0]]), 1, 4).numpy()).all()


def test_every_key_of_the_authors_checkpoint_finds_its_own_place() -> None:
    """Key i is filled with i: every place then holds a number of its own, but for the matrix that is kept twice."""
    shapes = keys()
    assert len(shapes) == 314
    state = {name: torch.tensor(float(i)).expand(shape) for i, (name, shape) in enumerate(shapes.items())}
    model = model_of({**state, "pixel_mean": torch.zeros(3, 1, 1)}, published("B"))
    filled = {name: float(value.flatten()[0]) for name, value in model.state_dict().items()}
    assert sorted(set(filled.values())) == list(range(314)) and len(filled) == 315
    order = list(shapes)
    for place, key in {
        "vision_encoder.layers.3.layer_norm2.weight": "image_encoder.blocks.3.norm2.weight",
        "vision_encoder.neck.layer_norm2.bias": "image_encoder.neck.3.bias",
        "vision_encoder.neck.conv2.weight": "image_encoder.neck.2.weight",
        "prompt_encoder.point_embed.2.weight": "prompt_encoder.point_embeddings.2.weight",
        "prompt_encoder.mask_embed.layer_norm1.weight": "prompt_encoder.mask_downscaling.1.weight",
        "prompt_encoder.mask_embed.conv3.bias": "prompt_encoder.mask_downscaling.6.bias",
        "mask_decoder.transformer.layers.1.layer_norm4.bias": "mask_decoder.transformer.layers.1.norm4.bias",
        "mask_decoder.transformer.layer_norm_final_attn.bias": "mask_decoder.transformer.norm_final_attn.bias",
        "mask_decoder.upscale_conv2.weight": "mask_decoder.output_upscaling.3.weight",
        "mask_decoder.output_hypernetworks_mlps.2.proj_in.weight": (
            "mask_decoder.output_hypernetworks_mlps.2.layers.0.weight"
        ),
        "mask_decoder.output_hypernetworks_mlps.2.layers.0.weight": (
            "mask_decoder.output_hypernetworks_mlps.2.layers.1.weight"
        ),
        "mask_decoder.iou_prediction_head.proj_out.bias": "mask_decoder.iou_prediction_head.layers.2.bias",
    }.items():
        assert order[int(filled[place])] == key


def test_a_checkpoint_in_the_original_format_round_trips(tool: SamTool, tmp_path: Path) -> None:
    path = tmp_path / "sam.pth"
    torch.save(original(tool), path)
    again = SamTool.from_pretrained(path, config=tiny_config())
    assert again.fingerprint == tool.fingerprint
    queries = [Query(t.encode([image(40, 56)])[0], (Click(5, 6),)) for t in (tool, again)]
    a, b = tool.predict(queries[:1])[0], again.predict(queries[1:])[0]
    np.testing.assert_array_equal(a.logits, b.logits)


@pytest.mark.parametrize("damage", ["missing", "extra", "shape"])
def test_an_original_checkpoint_that_does_not_fit_is_refused(tool: SamTool, tmp_path: Path, damage: str) -> None:
    state = original(tool)
    name = "mask_decoder.iou_token.weight"
    if damage == "missing":
        del state[name]
    elif damage == "extra":
        state["mask_decoder.hq_token.weight"] = torch.zeros(1, 32)
    else:
        state[name] = torch.zeros(1, 7)
    torch.save(state, tmp_path / "sam.pth")
    with pytest.raises(BadDataError, match=r"sam\.pth does not fit: 1 .*mask_decoder\.(iou|hq)_token"):
        SamTool.from_pretrained(tmp_path / "sam.pth", config=tiny_config())


def test_catalogue_tools_load_from_folders(folder: Path, tool: SamTool) -> None:
    given = tools.load("SAML", weights=folder)
    assert given.name == "SAML" and given.prior_shape(10, 10) == (16, 16)
    medsam = tools.load("MedSAM", weights=folder)
    assert medsam.prompts == {Box} and medsam.tool.options.multimask is False  # type: ignore[attr-defined]
    assert tools.load("MedSAM", weights=folder, multimask=True).fingerprint != medsam.fingerprint
    assert SamTool.from_pretrained(folder).fingerprint == tool.fingerprint
    with pytest.raises(UnknownNameError, match="did you mean 'multimask'"):
        tools.load("SAMB", weights=folder, multimasks=True)


@pytest.mark.parametrize("tool", ["SAMB", "MedSAM"])
def test_a_folder_of_another_published_size_is_not_taken_for_the_tools(tmp_path: Path, tool: str) -> None:
    published("H").save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").touch()  # its config is enough
    with pytest.raises(BadDataError, match=r"is SAM's size H, wanted B; name the tool of that size"):
        tools.load(tool, weights=tmp_path)


def test_a_folder_with_holes_is_refused(folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    state = load_file(folder / "model.safetensors")
    del state["mask_decoder.iou_token.weight"]
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(BadDataError, match=r"not a whole SAM checkpoint.*mask_decoder\.iou_token\.weight"):
        SamTool.from_pretrained(tmp_path)


def test_every_switch_and_every_weight_changes_the_fingerprint(tool: SamTool) -> None:
    switches: list[dict[str, Any]] = [
        {},
        {"multimask": False},
        {"feed_prior": False},
        {"memory": "latest"},
        {"dtype": "bfloat16"},
    ]
    prints = {SamTool(tool.model, **options).fingerprint for options in switches}
    prints |= {SamTool.from_config(tiny_config(), 1).fingerprint, MedSamTool(tool.model).fingerprint}
    assert len(prints) == len(switches) + 2
    assert SamTool(tool.model, max_batch=9).fingerprint == tool.fingerprint


def test_the_published_sizes_have_their_parameter_counts() -> None:
    """93.7 M, 312.3 M and 641.1 M, as the segment-anything package's models."""
    from transformers import SamModel

    with torch.device("meta"):
        counts = [sum(p.numel() for p in SamModel(published(size)).parameters()) for size in "BLH"]
    # The package keeps the position matrix, 2 x 128, as a buffer.
    assert [count - 256 for count in counts] == [93_735_472, 312_342_832, 641_090_608]
    with pytest.raises(UnknownNameError, match="unknown SAM size 'XL'"):
        published("XL")
    with pytest.raises(ValueError, match="multiple of 16"):
        sam_config(100)
