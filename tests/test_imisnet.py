"""IMISNet: its checkpoint's keys, what its forward does with each token and prompt, its text, and its tool."""

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
from medseg_gym.types import Box, Click, Image, Query, Sample

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402

from medseg_gym.tools.imisnet import SENTENCE, IMISNetTool, nearest_pixels, tokenize  # noqa: E402
from medseg_gym.tools.imisnet_net import IMISNet, imisnet_config, model_of, random_model, rename  # noqa: E402

SIZE, WIDTH = 64, 32
TOLERANCE = 1e-4  # of the largest logit: batched against one by one
KEYS = Path(__file__).parent / "data" / "imisnet_keys.tsv"  # of the authors' checkpoint
BEGIN, END = 97, 98  # of the tiny text model


TEXT = {
    "vocab_size": 99,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 12,
    "bos_token_id": BEGIN,
    "eos_token_id": END,
    "pad_token_id": END,
}
LETTERS = {"vocab_size": 56, "max_position_embeddings": 77, "bos_token_id": 54, "eos_token_id": 55, "pad_token_id": 55}


def tiny_config(**text: int) -> Any:
    vision = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "window_size": 3}
    return imisnet_config(
        SIZE, width=WIDTH, neck=16, mlp_dim=64, iou_width=32, text=TEXT | text, global_attn_indexes=[2], **vision
    )


@pytest.fixture(scope="module")
def tool() -> IMISNetTool:
    return IMISNetTool.from_config(tiny_config(), 0)


@pytest.fixture
def net() -> Iterator[IMISNet]:
    """A network of one's own, under no_grad."""
    with torch.no_grad():
        yield random_model(tiny_config(), 0).eval()


@pytest.fixture(autouse=True)
def nothing_stays_loaded() -> Iterator[None]:
    yield
    tools.unload()


def image(height: int, width: int, seed: int = 0) -> Image:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def keys() -> dict[str, tuple[int, ...]]:
    rows = [line.split("\t") for line in KEYS.read_text().splitlines()[1:]]
    return {name: tuple(int(n) for n in shape.split("x")) for name, shape in rows}


def noise(*shape: int, seed: int = 0) -> Any:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def original(model: IMISNet) -> dict[str, Any]:
    """A tiny network's weights under the authors' names."""
    state = model.state_dict()
    places = {key: rename(key) for key in keys()}
    return {key: state[place].clone() for key, place in places.items() if place is not None and place in state}


def layer_norm(x: Any, norm: Any) -> Any:
    """Over the channels of (B, C, H, W), written out."""
    x = (x - x.mean(1, keepdim=True)) / torch.sqrt(x.var(1, keepdim=True, unbiased=False) + 1e-6)
    return x * norm.weight[:, None, None] + norm.bias[:, None, None]


def encoded(net: IMISNet, x: float, y: float) -> Any:
    """SAM's random Fourier features of a position of the input, written out."""
    at = 2 * torch.tensor([x / SIZE, y / SIZE]) - 1
    angles = 2 * torch.pi * at @ net.prompt_encoder.shared_embedding.positional_embedding
    return torch.cat([angles.sin(), angles.cos()])


class Unmixed(nn.Module):
    """In place of the transformer: tokens and features come out as they went in."""

    def forward(self, point_embeddings: Any, image_embeddings: Any, **_: Any) -> tuple[Any, Any]:
        return point_embeddings, image_embeddings.flatten(2).transpose(1, 2)[:, None]


def test_every_key_of_the_authors_checkpoint_finds_its_own_place() -> None:
    """Key i is filled with i, so that every place of the full network holds a number of its own."""
    shapes = keys()
    assert len(shapes) == 527
    state = {name: torch.tensor(float(i)).expand(shape) for i, (name, shape) in enumerate(shapes.items())}
    model = model_of(state, imisnet_config())
    filled = {name: float(value.flatten()[0]) for name, value in model.state_dict().items()}
    assert sorted(filled.values()) == list(range(527))
    order = list(shapes)
    for place, key in {
        "vision_encoder.neck.conv2.weight": "image_encoder.sam_encoder.neck.2.weight",
        "neck.conv1.weight": "image_encoder.neck.0.weight",
        "neck.layer_norm2.bias": "image_encoder.neck.3.bias",
        "vision_encoder.layers.4.mlp.lin2.bias": "image_encoder.sam_encoder.blocks.4.mlp.fc2.bias",
        "vision_encoder.layers.4.layer_norm1.bias": "image_encoder.sam_encoder.blocks.4.norm1.bias",
        "prompt_encoder.point_embed.3.weight": "prompt_encoder.point_embeddings.3.weight",
        "mask_decoder.semantic_prediction_head.layers.0.bias": "mask_decoder.semantic_prediction_head.layers.1.bias",
        "mask_decoder.semantic_prediction_head.proj_in.bias": "mask_decoder.semantic_prediction_head.layers.0.bias",
        "text_model.encoder.layers.7.mlp.fc1.bias": "text_model.encoder.layers.7.mlp.fc1.bias",
        "text_out_dim.weight": "text_out_dim.weight",
    }.items():
        assert order[int(filled[place])] == key


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_checkpoint_with_the_authors_names_round_trips(tool: IMISNetTool, tmp_path: Path, suffix: str) -> None:
    from safetensors.torch import save_file

    path, state = tmp_path / f"IMISNet-B{suffix}", original(tool.model)
    (torch.save if suffix == ".pth" else save_file)(state, path)
    again = IMISNetTool.from_pretrained(path, config=tiny_config())
    assert again.fingerprint == tool.fingerprint
    del state["mask_decoder.semantic_tokens.weight"]
    state["mask_decoder.semantic_token.weight"] = torch.zeros(4, WIDTH)
    (torch.save if suffix == ".pth" else save_file)(state, path)
    with pytest.raises(BadDataError, match=r"have no place .*semantic_token\..* are not in it .*semantic_tokens\."):
        IMISNetTool.from_pretrained(path, config=tiny_config())


def test_the_full_network_has_the_published_shapes() -> None:
    """At 1024: 64x64 features of width 768, four masks and scores at 256x256, four semantic features of width 512."""
    with torch.device("meta"), torch.no_grad():
        net = IMISNet(imisnet_config())
        features = net.image(torch.zeros(1, 3, 1024, 1024))
        masks, scores, semantic = net(features, None, None, torch.zeros(1, 4), torch.zeros(1, 256, 256))
        assert features.shape == (1, 768, 64, 64)
        assert net.mask_decoder.upscale_conv1(features).shape == (1, 192, 128, 128)
        assert net.mask_decoder.upscale(features).shape == (1, 96, 256, 256)
        assert net.text(torch.zeros(1, 5, dtype=torch.int64)).shape == (1, 768)
    assert masks.shape == (1, 4, 256, 256) and scores.shape == (1, 4) and semantic.shape == (1, 4, 512)


def test_the_image_goes_past_the_encoders_own_neck(net: IMISNet) -> None:
    """The same hidden states enter both necks: 1x1 convolution, LayerNorm2d, 3x3 convolution, LayerNorm2d."""
    pixels, seen = noise(2, 3, SIZE, SIZE), []
    features = net.image(pixels)
    handle = net.vision_encoder.neck.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    net.vision_encoder(pixels)  # transformers' own forward, to the own neck
    handle.remove()
    neck = net.neck
    x = layer_norm(F.conv2d(seen[0].permute(0, 3, 1, 2), neck.conv1.weight), neck.layer_norm1)
    x = layer_norm(F.conv2d(x, neck.conv2.weight, padding=1), neck.layer_norm2)
    torch.testing.assert_close(features, x, rtol=1e-4, atol=1e-4)
    net.vision_encoder.neck.conv1.weight.zero_()
    assert torch.equal(net.image(pixels), features)


def test_tokens_are_iou_masks_semantics_then_prompts(net: IMISNet) -> None:
    decoder, sparse = net.mask_decoder, noise(2, 3, WIDTH)
    tokens = decoder.tokens(sparse)
    assert tokens.shape == (2, 12, WIDTH)
    for row, given in zip(tokens, sparse, strict=True):
        assert torch.equal(row[0], decoder.iou_token.weight[0])
        assert torch.equal(row[1:5], decoder.mask_tokens.weight)
        assert torch.equal(row[5:9], decoder.semantic_tokens.weight)
        assert torch.equal(row[9:], given)


def test_each_answer_is_read_from_its_own_token(net: IMISNet) -> None:
    """With the transformer taken out, the answers are those of the tokens themselves."""
    decoder, features = net.mask_decoder, noise(1, WIDTH, 4, 4)
    decoder.transformer = Unmixed()  # type: ignore[assignment]
    masks, scores, semantic = decoder(features, net.positions(), noise(1, 2, WIDTH), None)
    up = F.conv_transpose2d(features, decoder.upscale_conv1.weight, decoder.upscale_conv1.bias, stride=2)
    up = F.gelu(layer_norm(up, decoder.upscale_layer_norm))
    up = F.gelu(F.conv_transpose2d(up, decoder.upscale_conv2.weight, decoder.upscale_conv2.bias, stride=2))
    for i, mlp in enumerate(decoder.output_hypernetworks_mlps):
        wanted = (mlp(decoder.mask_tokens.weight[i])[:, None, None] * up[0]).sum(0)
        torch.testing.assert_close(masks[0, i], wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(scores, decoder.iou_prediction_head(decoder.iou_token.weight))
    torch.testing.assert_close(semantic[0], decoder.semantic_prediction_head(decoder.semantic_tokens.weight))


def test_prompt_tokens_are_points_then_corners_then_text(net: IMISNet) -> None:
    """Positions are pixel centres; a positive point, a negative one, the two corners have embeddings 1, 0, 2, 3."""
    points, labels = torch.tensor([[[3.0, 5.0], [60.0, 7.0]]]), torch.tensor([[1, 0]])
    boxes, text = torch.tensor([[1.0, 2.0, 33.0, 44.0]]), noise(1, WIDTH)
    sparse, dense = net.prompts(points, labels, boxes, None, text)
    kinds = [embedding.weight[0] for embedding in net.prompt_encoder.point_embed]
    wanted = [
        encoded(net, 3.5, 5.5) + kinds[1],
        encoded(net, 60.5, 7.5) + kinds[0],
        encoded(net, 1.5, 2.5) + kinds[2],
        encoded(net, 33.5, 44.5) + kinds[3],
        text[0],
    ]
    torch.testing.assert_close(sparse[0], torch.stack(wanted), rtol=1e-4, atol=1e-4)
    assert dense.shape == (1, WIDTH, 4, 4)
    assert torch.equal(dense[0, :, 2, 1], net.prompt_encoder.no_mask_embed.weight[0])


def test_a_padding_point_goes_with_points_only_where_there_is_no_box(net: IMISNet) -> None:
    points, labels, boxes = torch.tensor([[[3.0, 5.0]]]), torch.tensor([[1]]), torch.tensor([[1.0, 2.0, 33.0, 44.0]])
    text = noise(1, WIDTH)
    padded = net.prompts(points, labels, None, None, text)[0][0]
    assert len(padded) == 3
    assert torch.equal(padded[1], net.prompt_encoder.not_a_point_embed.weight[0])
    assert torch.equal(padded[2], text[0])
    assert len(net.prompts(points, labels, boxes, None)[0][0]) == 3  # point, corners
    assert len(net.prompts(None, None, boxes, None)[0][0]) == 2
    assert len(net.prompts(None, None, None, None, text)[0][0]) == 1


def test_the_prior_becomes_the_dense_prompt(net: IMISNet) -> None:
    """Two convolutions of 2x2 at stride 2, each with LayerNorm2d and GELU, then one of 1x1."""
    boxes, prior = torch.tensor([[1.0, 2.0, 33.0, 44.0]]), 5 * noise(1, 16, 16)
    dense = net.prompts(None, None, boxes, prior)[1]
    mask = net.prompt_encoder.mask_embed
    x = F.gelu(layer_norm(F.conv2d(prior[:, None], mask.conv1.weight, mask.conv1.bias, stride=2), mask.layer_norm1))
    x = F.gelu(layer_norm(F.conv2d(x, mask.conv2.weight, mask.conv2.bias, stride=2), mask.layer_norm2))
    x = F.conv2d(x, mask.conv3.weight, mask.conv3.bias)
    assert x.shape == (1, WIDTH, 4, 4)
    torch.testing.assert_close(dense, x, rtol=1e-4, atol=1e-4)


def test_positions_are_the_patches_centres(net: IMISNet) -> None:
    """At stride 16 the patch in row 2, column 1 has its centre at x = 24, y = 40."""
    positions = net.positions()
    assert positions.shape == (1, WIDTH, 4, 4)
    torch.testing.assert_close(positions[0, :, 2, 1], encoded(net, 24, 40), rtol=1e-4, atol=1e-4)


def test_the_text_has_the_same_share_in_every_mask(net: IMISNet) -> None:
    """text_output(text) times the upscaled features, added to all four."""
    decoder, features, sparse, text = net.mask_decoder, noise(1, WIDTH, 4, 4), noise(1, 2, WIDTH), noise(1, WIDTH)
    decoder.transformer = Unmixed()  # type: ignore[assignment]
    plain = decoder(features, net.positions(), sparse, None)
    told = decoder(features, net.positions(), sparse, text)
    share = (decoder.text_output(text)[0][:, None, None] * decoder.upscale(features)[0]).sum(0)
    assert share.std() > 0.1
    for before, after in zip(plain[0][0], told[0][0], strict=True):
        torch.testing.assert_close(after - before, share, rtol=1e-3, atol=1e-3)
    assert torch.equal(plain[1], told[1]) and torch.equal(plain[2], told[2])


def test_the_text_is_clips_pooled_output(net: IMISNet) -> None:
    """The hidden state at the end-of-text, whatever pads the row after it, through text_out_dim."""
    tokens = torch.tensor([[BEGIN, 3, 5, END], [BEGIN, 4, END, END]])
    text = net.text(tokens)
    hidden = net.text_model(input_ids=tokens).last_hidden_state
    wanted = torch.stack([hidden[0, 3], hidden[1, 2]]) @ net.text_out_dim.weight.T + net.text_out_dim.bias
    torch.testing.assert_close(text, wanted)
    torch.testing.assert_close(net.text(tokens[1:, :3]), text[1:], rtol=1e-4, atol=1e-4)


def test_pixels_are_the_nearest_per_axis() -> None:
    """3x5 pixels at side 8: row i is floor(3 i / 8), column i is floor(5 i / 8); then SAM's mean and deviation."""
    picture = image(3, 5)
    wanted = picture[[0, 0, 0, 1, 1, 1, 2, 2]][:, [0, 0, 1, 1, 2, 3, 3, 4]]
    wanted = (wanted - np.array([123.675, 116.28, 103.53])) / np.array([58.395, 57.12, 57.375])
    pixels = nearest_pixels(picture, 8)
    assert pixels.dtype == torch.float32
    np.testing.assert_allclose(pixels[0].permute(1, 2, 0).numpy(), wanted, atol=1e-5)


def test_of_three_masks_the_one_of_largest_predicted_iou_answers_and_is_the_prior(net: IMISNet) -> None:
    """Prompts scale per axis: in a 32x128 image, x by one half and y by two. The single mask's own score is no bid."""
    net.mask_decoder.iou_prediction_head.proj_out.bias[0] = 100
    tool, single = IMISNetTool(net), IMISNetTool(net, multimask=False)
    (embedding,) = tool.encode([image(32, 128)])
    prior = None
    for x in (10, 60, 110):
        query = Query(embedding, (Click(x, 8), Box(4, 6, 100, 30)), prior)
        (answer,), (first,) = tool.predict([query]), single.predict([query])
        with torch.no_grad():
            masks, scores, _ = tool.model(
                tool.model.image(nearest_pixels(image(32, 128), SIZE)),
                torch.tensor([[[x / 2, 16.0]]]),
                torch.tensor([[1]]),
                torch.tensor([[2.0, 12.0, 50.0, 60.0]]),
                None if prior is None else torch.tensor(prior)[None],
            )
        best = 1 + int(scores[0, 1:].argmax())
        np.testing.assert_allclose(answer.prior, masks[0, best].numpy(), atol=1e-3)
        np.testing.assert_allclose(first.prior, masks[0, 0].numpy(), atol=1e-3)
        assert answer.predicted_iou == pytest.approx(float(scores[0, best]), abs=1e-4)
        low = torch.tensor(answer.prior)[None, None]
        full = F.interpolate(F.interpolate(low, (SIZE, SIZE), mode="bilinear"), (32, 128), mode="bilinear")[0, 0]
        np.testing.assert_array_equal(answer.logits > 0, torch.sigmoid(full).numpy() > 0.5)
        prior = answer.prior
    assert prior is not None and prior.std() >= 1


def test_it_conforms(tool: IMISNetTool) -> None:
    check_tool(tool, tolerance=TOLERANCE)


def test_it_conforms_batched_cached_and_with_a_text(tool: IMISNetTool) -> None:
    other = IMISNetTool(
        tool.model, tokens=[BEGIN, 3, END], max_batch=4, multimask=False, feed_prior=False, memory="latest"
    )
    check_tool(CachedTool(other, max_bytes=20_000), tolerance=TOLERANCE)


def test_a_text_changes_answers_and_fingerprint_but_no_embedding(tool: IMISNetTool) -> None:
    liver, spleen = (IMISNetTool(tool.model, tokens=[BEGIN, token, END]) for token in (3, 4))
    assert len({tool.fingerprint, liver.fingerprint, spleen.fingerprint}) == 3
    (embedding,) = tool.encode([image(40, 56)])
    assert torch.equal(liver.encode([image(40, 56)])[0].features["image"], embedding.features["image"])
    answers = [t.predict([Query(embedding, (Click(5, 6),))])[0].logits for t in (tool, liver, spleen)]
    assert np.abs(answers[0] - answers[1]).max() > 0.1 and np.abs(answers[1] - answers[2]).max() > 0.1


def test_text_tokens_that_clip_cannot_read_are_refused(tool: IMISNetTool) -> None:
    with pytest.raises(BadDataError, match="end-of-text token 98"):
        IMISNetTool(tool.model, tokens=[BEGIN, 3])
    with pytest.raises(BadDataError, match="13 text tokens; wanted at most 12"):
        IMISNetTool(tool.model, tokens=[BEGIN, *[3] * 11, END])
    with pytest.raises(UnknownNameError, match="did you mean 'multimask'"):
        IMISNetTool(tool.model, multimasks=True)


def write_tokenizer(folder: Path) -> None:
    """CLIP's tokenizer with single letters for words."""
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)] + ["."]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")


def test_a_structures_name_is_put_into_the_authors_sentence(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    a, b = tokenize("liver", tmp_path), tokenize("spleen", tmp_path)
    begin, end = LETTERS["bos_token_id"], LETTERS["eos_token_id"]
    assert a[0] == b[0] == begin and a[-1] == b[-1] == end
    letters = SENTENCE.format("liver").lower().replace(" ", "")
    assert len(a) == len(letters) + 2 and a.count(end) == 1 and a != b
    assert len(tokenize("x" * 200, tmp_path)) == 77 and tokenize("x" * 200, tmp_path)[-1] == end


def test_a_text_needs_the_tokenizers_files(tool: IMISNetTool, tmp_path: Path) -> None:
    weights, elsewhere = tmp_path / "weights", tmp_path / "clip"
    weights.mkdir()
    elsewhere.mkdir()
    path = weights / "IMISNet-B.pth"
    config = tiny_config(**LETTERS)
    torch.save(original(random_model(config, 0)), path)
    with pytest.raises(WeightsMissingError, match=r"has no tokenizer\.json or vocab\.json and merges\.txt.*tokenizer="):
        IMISNetTool.from_pretrained(path, config=config, text="liver")
    write_tokenizer(elsewhere)
    told = IMISNetTool.from_pretrained(path, config=config, text="liver", tokenizer=elsewhere)
    write_tokenizer(weights)
    beside = IMISNetTool.from_pretrained(path, config=config, text="liver")
    assert told.fingerprint == beside.fingerprint
    assert told.fingerprint != IMISNetTool.from_pretrained(path, config=config).fingerprint
    with pytest.raises(ValueError, match="there is no text="):
        IMISNetTool.from_pretrained(path, config=config, tokenizer=elsewhere)


def test_the_catalogue_names_it(tmp_path: Path) -> None:
    assert tools.TOOLS["IMISNet"].factory
    with pytest.raises(WeightsMissingError, match="IMISNet needs its weights"):
        tools.load("IMISNet", weights=tmp_path)


def test_episodes_run_and_encode_once(tool: IMISNetTool) -> None:
    picture, cached = image(48, 80), CachedTool(tool)
    sample = Sample("s", picture, np.zeros((48, 80), np.bool_), "thing", "a thing", "1")
    state = empty_state(sample)
    for action in (Click(20, 20), Box(5, 5, 60, 40), Click(70, 40, False)):
        (state,) = advance(cached, [sample], [state], [action])
    assert state.mask.shape == (48, 80) and cached.counters()["encodes"] == 1
