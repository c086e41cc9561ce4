"""SAM 2.1 on tiny random checkpoints: parity with transformers, buckets, priors, sizes, checkpoints on disk."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medseg_gym import tools
from medseg_gym.errors import BadDataError, UnknownNameError, WeightsMissingError
from medseg_gym.tools.base import advance, empty_state
from medseg_gym.tools.cache import CachedTool
from medseg_gym.tools.conformance import check_tool
from medseg_gym.tools.network import upsample
from medseg_gym.tools.sam2 import MEAN, STD, Sam2Tool, preprocess
from medseg_gym.tools.sam2_config import random_model, resized, sam2_config, sam21_config
from medseg_gym.types import Box, Click, Image, Prompt, Query, Sample

torch = pytest.importorskip("torch")

SIZE = 64
TOLERANCE = 1e-5  # of the largest logit: batched against one by one, and against transformers called directly


def tiny_config(size: int = SIZE) -> Any:
    return sam2_config(
        size,
        width=32,
        mlp_dim=64,
        hidden_size=8,
        num_attention_heads=1,
        embed_dim_per_stage=[8, 16, 32, 64],
        num_attention_heads_per_stage=[1, 1, 2, 4],
        blocks_per_stage=[1, 1, 2, 1],
        global_attention_blocks=[3],
        window_size_per_stage=[8, 4, 4, 2],
    )


@pytest.fixture(scope="module")
def tool() -> Sam2Tool:
    return Sam2Tool.from_config(tiny_config(), 0)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, tool: Sam2Tool) -> Path:
    folder = tmp_path_factory.mktemp("tiny-sam2")
    tool.model.save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def nothing_stays_loaded() -> Iterator[None]:
    yield
    tools.unload()


def image(height: int, width: int, seed: int = 0) -> Image:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def sample(pixels: Image) -> Sample:
    return Sample("s", pixels, np.zeros(pixels.shape[:2], np.bool_), "thing", "a thing", "1")


def close(a: np.ndarray, b: np.ndarray) -> bool:
    return bool(np.abs(a - b).max() <= TOLERANCE * max(np.abs(a).max(), 1))


def test_random_weights_give_logits_that_mean_something(tool: Sam2Tool) -> None:
    (embedding,) = tool.encode([image(40, 56)])
    one, two = tool.predict([Query(embedding, (Box(3, 4, 30, 35),)), Query(embedding, (Click(50, 5),))])
    assert one.logits.std() > 1 and two.logits.std() > 1
    assert np.abs(one.logits - two.logits).max() > 1
    assert 0 < one.predicted_iou < 1


def test_it_conforms(tool: Sam2Tool) -> None:
    check_tool(tool, tolerance=TOLERANCE)


def test_it_conforms_batched_cached_and_with_its_other_switches(tool: Sam2Tool) -> None:
    other = Sam2Tool(
        tool.model, max_batch=4, multimask=False, feed_prior=False, preprocess="hf", memory="latest", name="other"
    )
    check_tool(CachedTool(other, max_bytes=20_000), tolerance=TOLERANCE)


def test_a_batch_over_images_and_prompts_equals_one_by_one(tool: Sam2Tool) -> None:
    batched = Sam2Tool(tool.model, max_batch=16)
    cached = CachedTool(batched)
    pictures = [image(40, 56, 1), image(64, 64, 2), image(90, 33, 3)]
    embeddings = cached.encode(pictures)
    prior = np.random.default_rng(0).normal(0, 5, (16, 16)).astype(np.float32)
    sets: list[tuple[Prompt, ...]] = [
        (Click(5, 6),),
        (Click(5, 6), Click(20, 30, False)),
        (Box(2, 3, 25, 30),),
        (Box(2, 3, 25, 30), Click(9, 9)),
    ]
    queries = [Query(e, prompts, given) for prompts in sets for e in embeddings for given in (None, prior)]
    for query, together in zip(queries, cached.predict(queries), strict=True):
        pixels = pictures[embeddings.index(query.embedding)]
        (fresh,) = tool.encode([pixels])
        (alone,) = tool.predict([Query(fresh, query.prompts, query.prior)])
        assert close(alone.logits, together.logits) and close(alone.prior, together.prior)
        assert together.predicted_iou == pytest.approx(alone.predicted_iou, abs=1e-5)
    assert cached.counters()["encodes"] == 3


@pytest.mark.parametrize("multimask", [True, False])
def test_an_episode_equals_transformers_called_directly(tool: Sam2Tool, multimask: bool) -> None:
    """Box, then two clicks with the previous logits, on a 40x56 image; the inputs are written out by hand."""
    height, width = 40, 56
    pixels = image(height, width)
    ours = Sam2Tool(tool.model, multimask=multimask)
    states = [empty_state(sample(pixels))]
    for action in (Box(7, 10, 35, 30), Click(14, 20), Click(49, 5, False)):
        states += advance(ours, [sample(pixels)], states[-1:], [action])

    channels = torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 255
    shaped = torch.nn.functional.interpolate(
        channels[None], (SIZE, SIZE), mode="bilinear", align_corners=False, antialias=True
    )
    normal = (shaped - torch.tensor(MEAN).view(1, 3, 1, 1)) / torch.tensor(STD).view(1, 3, 1, 1)
    box = torch.tensor([[[8.0, 16.0, 40.0, 48.0]]])  # times 64/56 and 64/40
    clicks = torch.tensor([[[[16.0, 32.0], [56.0, 8.0]]]])
    labels = torch.tensor([[[1, 0]]])
    prior = None
    for turn, (points, marks) in enumerate(
        [(None, None), (clicks[:, :, :1], labels[:, :, :1]), (clicks, labels)], start=1
    ):
        with torch.no_grad():
            out = tool.model(
                pixel_values=normal,
                input_points=points,
                input_labels=marks,
                input_boxes=box,
                input_masks=prior,
                multimask_output=multimask,
            )
        best = int(out.iou_scores[0, 0].argmax())
        low = out.pred_masks[:, 0, best : best + 1]
        full = torch.nn.functional.interpolate(low, (height, width), mode="bilinear", align_corners=False)[0, 0]
        prior = low.clamp(-32, 32)
        prediction = states[turn].prediction
        assert prediction is not None
        assert close(full.numpy(), prediction.logits)
        assert close(prior[0, 0].numpy(), prediction.prior)
        assert prediction.predicted_iou == pytest.approx(float(out.iou_scores[0, 0, best]), abs=1e-5)
        assert np.array_equal(states[turn].mask, prediction.logits > 0)


def test_no_prompt_is_ever_padded(tool: Sam2Tool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Queries with 1 click, 2 clicks, box, box + click, each with and without prior: eight passes, none padded."""
    batched = Sam2Tool(tool.model, max_batch=16)
    (embedding,) = batched.encode([image(40, 56)])
    seen: list[tuple[int, int, bool, bool]] = []
    forward = batched.model.forward

    def spy(**inputs: Any) -> Any:
        points, labels = inputs.get("input_points"), inputs.get("input_labels")
        assert labels is None or set(labels.unique().tolist()) <= {0, 1}
        clicks = 0 if points is None else points.shape[2]
        seen.append((len(inputs["image_embeddings"][0]), clicks, "input_boxes" in inputs, "input_masks" in inputs))
        return forward(**inputs)

    monkeypatch.setattr(batched.model, "forward", spy)
    prior = np.zeros((16, 16), np.float32)
    box = Box(1, 2, 30, 31)
    sets: list[tuple[Prompt, ...]] = [(Click(1, 1),), (Click(1, 1), Click(2, 2)), (box,), (Click(3, 3), box)]
    batched.predict([Query(embedding, prompts, given) for prompts in sets * 3 for given in (None, prior)])
    expected = [(3, *kind, given) for kind in ((1, False), (2, False), (0, True), (1, True)) for given in (False, True)]
    assert seen == expected


def test_the_prior_is_fed_back_unless_switched_off(tool: Sam2Tool) -> None:
    (embedding,) = tool.encode([image(40, 56)])
    prior = np.random.default_rng(0).normal(0, 10, (16, 16)).astype(np.float32)
    bare, fed = Query(embedding, (Click(9, 9),)), Query(embedding, (Click(9, 9),), prior)
    without, with_prior = tool.predict([bare, fed])
    assert np.abs(without.logits - with_prior.logits).max() > 0.1
    deaf = Sam2Tool(tool.model, feed_prior=False)
    assert np.array_equal(deaf.predict([fed])[0].logits, without.logits)
    with pytest.raises(ValueError, match=r"prior is \(4, 4\); wanted \(16, 16\)"):
        tool.predict([Query(embedding, (Click(9, 9),), np.zeros((4, 4), np.float32))])


def test_the_prior_is_clamped_and_the_logits_are_not(tool: Sam2Tool) -> None:
    loud = random_model(tiny_config(), 0)
    for mlp in loud.mask_decoder.output_hypernetworks_mlps:
        mlp.proj_out.weight.data.mul_(100)
    louder = Sam2Tool(loud)
    (embedding,) = louder.encode([image(40, 56)])
    (prediction,) = louder.predict([Query(embedding, (Click(9, 9),))])
    assert np.abs(prediction.prior).max() == Sam2Tool.prior_limit < np.abs(prediction.logits).max()


def test_multimask_answers_with_the_mask_of_largest_predicted_iou(
    tool: Sam2Tool, monkeypatch: pytest.MonkeyPatch
) -> None:
    (embedding,) = tool.encode([image(40, 56)])
    forward = tool.model.forward

    def fixed(**inputs: Any) -> Any:
        out = forward(**inputs)
        out.iou_scores = torch.tensor([[[0.2, 0.9, 0.9]]])
        out.pred_masks = torch.arange(3.0).view(1, 1, 3, 1, 1).expand(1, 1, 3, 16, 16)
        return out

    monkeypatch.setattr(tool.model, "forward", fixed)
    (prediction,) = tool.predict([Query(embedding, (Click(9, 9),))])
    assert np.allclose(prediction.logits, 1) and prediction.predicted_iou == pytest.approx(0.9)


@pytest.mark.parametrize("prompts", [(), (Box(0, 0, 1, 1), Box(0, 0, 2, 2))])
def test_no_prompt_or_two_boxes_are_refused(tool: Sam2Tool, prompts: tuple[Prompt, ...]) -> None:
    (embedding,) = tool.encode([image(40, 56)])
    with pytest.raises(ValueError, match="one prompt or more and at most one box"):
        tool.predict([Query(embedding, prompts)])


@pytest.mark.parametrize("shape", [(1, 1), (3000, 4096)])
def test_tiny_and_huge_images_are_answered_at_their_own_size(tool: Sam2Tool, shape: tuple[int, int]) -> None:
    (embedding,) = tool.encode([np.full((*shape, 3), 90, np.uint8)])
    (prediction,) = tool.predict([Query(embedding, (Click(shape[1] - 1, shape[0] - 1),))])
    assert prediction.logits.shape == shape and prediction.prior.shape == (16, 16)
    assert np.isfinite(prediction.logits).all()


def test_an_embedding_owns_its_memory(tool: Sam2Tool) -> None:
    batched = Sam2Tool(tool.model, max_batch=8)
    embeddings = batched.encode([image(40, 56, seed) for seed in range(3)])
    # Levels of 16x16x4, 8x8x8 and 4x4x32 float32.
    assert [e.nbytes for e in embeddings] == [4096 + 2048 + 2048] * 3
    for feature in embeddings[1].features.values():
        assert feature.untyped_storage().nbytes() == feature.nbytes


def test_half_precision_halves_the_embedding_and_stays_close(tool: Sam2Tool) -> None:
    half = Sam2Tool(tool.model, dtype="bfloat16")
    (full_e,), (half_e,) = tool.encode([image(40, 56)]), half.encode([image(40, 56)])
    assert 2 * half_e.nbytes == full_e.nbytes
    (a,), (b,) = tool.predict([Query(full_e, (Click(9, 9),))]), half.predict([Query(half_e, (Click(9, 9),))])
    assert 0 < np.abs(a.logits - b.logits).mean() < 0.2 * np.abs(a.logits).mean()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_on_a_cpu_half_precision_is_the_float32_embedding_rounded(tool: Sam2Tool, dtype: Any) -> None:
    """A CPU's encoder takes ten times as long in float16, which `tools embed --dtype float16` is not to pay."""
    (full,), (half,) = (t.encode([image(40, 56)]) for t in (tool, Sam2Tool(tool.model, dtype=dtype)))
    assert all(torch.equal(full.features[name].to(getattr(torch, dtype)), half.features[name]) for name in tool.levels)


def test_the_two_preprocessings_differ_by_a_grey_level_at_most() -> None:
    pixels = image(50, 70)
    std = torch.tensor(STD).view(1, 3, 1, 1)
    apart = ((preprocess(pixels, 64, "sam2") - preprocess(pixels, 64, "hf")) * std * 255).abs().max()
    assert 0 < apart <= 1.01


def test_preprocessing_at_the_inputs_own_size_only_normalises() -> None:
    pixels = np.zeros((64, 64, 3), np.uint8)
    pixels[..., 0] = 255
    x = preprocess(pixels, 64)
    assert x.shape == (1, 3, 64, 64) and x.dtype == torch.float32
    expected = [(1 - 0.485) / 0.229, -0.456 / 0.224, -0.406 / 0.225]
    assert np.allclose(x[0, :, 5, 5].numpy(), expected, atol=1e-6)


def test_upsampling_is_bilinear_between_pixel_centres() -> None:
    logits = upsample(torch.tensor([[0.0, 4.0]]), 1, 4)
    assert logits.tolist() == [[0.0, 1.0, 3.0, 4.0]]


def test_a_saved_checkpoint_loads_as_the_same_tool(tool: Sam2Tool, checkpoint: Path) -> None:
    again = Sam2Tool.from_pretrained(checkpoint)
    assert again.fingerprint == tool.fingerprint and again.size == SIZE
    (a,), (b,) = (t.encode([image(40, 56)]) for t in (tool, again))
    assert all(torch.equal(a.features[name], b.features[name]) for name in a.features)


def test_every_switch_and_every_weight_changes_the_fingerprint(tool: Sam2Tool) -> None:
    switches: list[dict[str, Any]] = [
        {},
        {"preprocess": "hf"},
        {"multimask": False},
        {"feed_prior": False},
        {"memory": "latest"},
        {"dtype": "bfloat16"},
    ]
    prints = {Sam2Tool(tool.model, **options).fingerprint for options in switches}
    other = Sam2Tool.from_config(tiny_config(), 1).fingerprint
    wider = Sam2Tool.from_config(tiny_config(96), 0).fingerprint
    assert len(prints | {other, wider}) == len(switches) + 2
    assert Sam2Tool(tool.model, max_batch=9).fingerprint == tool.fingerprint


def test_unknown_settings_say_what_was_meant(tool: Sam2Tool) -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'bfloat16'"):
        Sam2Tool(tool.model, dtype="bfloat")  # type: ignore[arg-type]
    with pytest.raises(UnknownNameError, match=r"unknown SAM 2\.1 size 'XL'"):
        sam21_config("XL")
    with pytest.raises(ValueError, match="max_batch is 0"):
        Sam2Tool(tool.model, max_batch=0)
    with pytest.raises(ValueError, match="multiple of 32"):
        resized(tiny_config(), 100)


def test_catalogue_tools_load_from_a_folder_and_from_the_data_home(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = tools.load("MedSAM2", weights=checkpoint)
    assert given.name == "MedSAM2" and given.prior_shape(10, 10) == (128, 128)  # it works at 512
    assert tools.load("MedSAM2", weights=str(checkpoint), size=64).prior_shape(10, 10) == (16, 16)
    monkeypatch.setenv("MEDSEG_GYM_HOME", str(tmp_path))
    assert not tools.available("SAM2.1T")
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "SAM2.1T").symlink_to(checkpoint)
    assert tools.available("SAM2.1T") and not tools.available("SAM2.1S")
    assert tools.load("SAM2.1T").fingerprint.startswith("SAM2.1T:")


def test_a_video_checkpoint_loads_and_one_position_matrix_is_enough(tool: Sam2Tool, tmp_path: Path) -> None:
    """Published SAM 2.1 folders say sam2_video, carry memory weights, and may hold the shared matrix once."""
    from safetensors.torch import load_file, save_file

    tool.model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"model_type": "sam2_video", "architectures": ["Sam2VideoModel"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    state = load_file(tmp_path / "model.safetensors")
    state["memory_attention.layers.0.linear1.weight"] = torch.zeros(2, 2)
    for name in ("shared_image_embedding.positional_embedding", "prompt_encoder.shared_embedding.positional_embedding"):
        save_file({k: v for k, v in state.items() if k != name}, tmp_path / "model.safetensors", {"format": "pt"})
        assert Sam2Tool.from_pretrained(tmp_path).fingerprint == tool.fingerprint


@pytest.mark.parametrize("damage", ["missing", "shape"])
def test_a_checkpoint_with_holes_is_refused(tool: Sam2Tool, tmp_path: Path, damage: str) -> None:
    from safetensors.torch import load_file, save_file

    tool.model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    name = "mask_decoder.iou_token.weight"
    if damage == "missing":
        del state[name]
    else:
        state[name] = torch.zeros(1, 7)
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(BadDataError, match=r"not a whole SAM 2.1 checkpoint.*mask_decoder\.iou_token\.weight"):
        Sam2Tool.from_pretrained(tmp_path)


def test_a_folder_of_another_published_size_is_not_taken_for_the_tools(tmp_path: Path) -> None:
    sam21_config("S").save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").touch()  # its config is enough
    with pytest.raises(BadDataError, match=r"is SAM 2\.1's size S, wanted T; name the tool of that size"):
        tools.load("SAM2.1T", weights=tmp_path)


def test_a_pickle_checkpoint_is_not_read(tool: Sam2Tool, tmp_path: Path) -> None:
    tool.model.config.save_pretrained(tmp_path)
    torch.save(tool.model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(WeightsMissingError, match=r"no model\.safetensors"):
        tools.load("SAM2.1T", weights=tmp_path)
    with pytest.raises(OSError, match="safetensors"):
        Sam2Tool.from_pretrained(tmp_path)


def test_the_published_sizes_have_their_parameter_counts() -> None:
    """38.9 M, 46.0 M, 80.8 M and 224.4 M with memory; the image model alone has a few million fewer."""
    from transformers import Sam2Model

    with torch.device("meta"):
        millions = [
            sum(p.numel() for p in Sam2Model(sam21_config(size)).parameters()) / 1e6
            for size in ("T", "S", "BPlus", "L")
        ]
    published = [38.9, 46.0, 80.8, 224.4]
    assert all(4 < whole - part < 10 for whole, part in zip(published, millions, strict=True)), millions


@pytest.mark.parametrize("max_batch", [1, 4])
def test_the_env_contracts_hold(max_batch: int) -> None:
    """Gymnasium's and Stable-Baselines3's checkers, twin seeds, and slots equal to single envs."""
    import gymnasium as gym
    from gymnasium.utils.env_checker import check_env

    from medseg_gym.envs import SegmentEnv, SegmentVectorEnv

    tool = Sam2Tool.from_config(tiny_config(), 0, max_batch=max_batch)
    options: dict[str, Any] = {"tool": tool, "size": 84, "structures": ("liver",), "dataset_options": {"size": 64}}
    check_env(SegmentEnv(render_mode="rgb_array", **options))
    checker = pytest.importorskip("stable_baselines3.common.env_checker")
    checker.check_env(SegmentEnv(render_mode="rgb_array", **options))
    vector, twin = SegmentVectorEnv(2, **options), SegmentVectorEnv(2, **options)
    singles: list[gym.Env[Any, Any]] = [SegmentEnv(**options) for _ in range(2)]
    obs, again = vector.reset(seed=3)[0], twin.reset(seed=3)[0]
    np.testing.assert_array_equal(obs, again)
    vector.action_space.seed(0)
    for i, env in enumerate(singles):
        np.testing.assert_array_equal(obs[i], env.reset(seed=3 + i)[0])
    ended = [False, False]
    for _ in range(8):
        actions = vector.action_space.sample()
        obs, rewards, terminated, truncated, _ = vector.step(actions)
        np.testing.assert_array_equal(obs, twin.step(actions)[0])
        for i, env in enumerate(singles):
            alone = (env.reset()[0], 0.0, False, False) if ended[i] else env.step(actions[i])[:4]
            if max_batch == 1:  # bit for bit; batches may round differently
                np.testing.assert_array_equal(obs[i], alone[0])
            assert rewards[i] == pytest.approx(alone[1], abs=1e-3)
            assert (terminated[i], truncated[i]) == alone[2:]
            ended[i] = bool(terminated[i] or truncated[i])
