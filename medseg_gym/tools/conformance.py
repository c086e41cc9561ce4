"""The conformance kit: what every segmentation tool has to honour, checked from outside."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from medseg_gym.images import image_hash
from medseg_gym.tools.base import SegmentationTool, advance, empty_state, given_state
from medseg_gym.types import Box, Click, Embedding, Image, MaskState, Prediction, Prompt, Query, Sample


def check_tool(
    tool: SegmentationTool,
    images: Sequence[Image] | None = None,
    *,
    rng_seed: int = 0,
    tolerance: float = 1e-4,
) -> None:
    """Raises AssertionError with the reason unless the tool honours the SegmentationTool protocol.

    `images` are (H, W, 3) uint8; by default discs on noise, wide, tall and 1x1. `tolerance` is the largest difference
    of logits between a batch and one by one, as a share of the largest logit; repeated calls have to be equal exactly.
    """
    images = list(images) if images is not None else example_images(np.random.default_rng(rng_seed))
    rng = np.random.default_rng(rng_seed)
    _check_attributes(tool)
    embeddings = _check_encode(tool, images, tolerance)
    queries = [
        query
        for embedding in embeddings
        for query in example_queries(embedding, tool.prompts, tool.prior_shape(embedding.height, embedding.width), rng)
    ]
    _check_predict(tool, queries, tolerance, rng)
    for image in images:
        _check_chain(tool, image, rng)
    _check_refusals(tool, images[0])
    _require(tool.encode([]) == [] and tool.predict([]) == [], "no images and no queries give empty lists")


def example_images(rng: np.random.Generator) -> list[Image]:
    """A bright disc on noise, wide and tall; a colour one; a black image; one pixel."""
    return [
        _disc(rng, 48, 80, False),
        _disc(rng, 90, 33, False),
        _disc(rng, 64, 64, True),
        np.zeros((20, 30, 3), np.uint8),
        np.full((1, 1, 3), 128, np.uint8),
    ]


def example_queries(
    embedding: Embedding, prompts: frozenset[type], prior_shape: tuple[int, int], rng: np.random.Generator
) -> list[Query]:
    """Queries of every kind the tool takes: a box, one to three clicks, both, each without and with a prior."""
    height, width = embedding.height, embedding.width

    def click(positive: bool) -> Click:
        return Click(int(rng.integers(width)), int(rng.integers(height)), positive)

    box = Box(width // 4, height // 4, max(width // 4, 3 * width // 4), max(height // 4, 3 * height // 4))
    sets: list[tuple[Prompt, ...]] = []
    if Box in prompts:
        sets.append((box,))
    if Click in prompts:
        sets += [(click(True),), (click(True), click(False)), (click(True), click(True), click(False))]
    if Box in prompts and Click in prompts:
        sets += [(box, click(True)), (click(False), box, click(True))]
    prior = rng.normal(0, 5, prior_shape).astype(np.float32)
    return [Query(embedding, given, old) for given in sets for old in (None, prior)]


def _check_attributes(tool: SegmentationTool) -> None:
    _require(isinstance(tool, SegmentationTool), "it has all attributes of SegmentationTool")
    _require(isinstance(tool.name, str) and bool(tool.name), f"name is a text, not {tool.name!r}")
    fingerprint = tool.fingerprint
    _require(isinstance(fingerprint, str) and bool(fingerprint), f"fingerprint is a text, not {fingerprint!r}")
    _require(tool.fingerprint == fingerprint, "the fingerprint is stable")
    _require(bool(tool.prompts) and tool.prompts <= {Box, Click}, f"prompts are Box, Click or both: {tool.prompts}")
    _require(tool.memory in ("cumulative", "latest"), f"memory is cumulative or latest, not {tool.memory!r}")
    _require(isinstance(tool.max_batch, int) and tool.max_batch >= 1, f"max_batch is 1 or more, not {tool.max_batch!r}")


def _check_encode(tool: SegmentationTool, images: list[Image], tolerance: float) -> list[Embedding]:
    before = [image.copy() for image in images]
    fingerprint = tool.fingerprint
    embeddings = tool.encode(images)
    _require(len(embeddings) == len(images), f"{len(images)} images give {len(embeddings)} embeddings")
    for image, kept, embedding in zip(images, before, embeddings, strict=True):
        shape = image.shape[:2]
        _require(np.array_equal(image, kept), f"encode changed its {shape} image")
        _require((embedding.height, embedding.width) == shape, f"the embedding of a {shape} image says {embedding}")
        _require(embedding.image == image_hash(image), "an embedding names its image by image_hash")
        _require(embedding.nbytes >= 0, "every feature of an embedding has nbytes, which the cache counts")
    frozen = [image.copy() for image in images]
    for image in frozen:
        image.flags.writeable = False
    _same_features(tool.encode(frozen), embeddings, 0.0, "encode twice, the second time read-only, gives the same")
    single = [tool.encode([image])[0] for image in images]
    _same_features(single, embeddings, tolerance, "encode one by one gives what a batch gives")
    turned = tool.encode(images[::-1])[::-1]
    _same_features(turned, embeddings, tolerance, "the order of images does not matter to encode")
    _require(tool.fingerprint == fingerprint, "encode leaves the fingerprint alone")
    return embeddings


def _check_predict(tool: SegmentationTool, queries: list[Query], tolerance: float, rng: np.random.Generator) -> None:
    priors = [None if query.prior is None else query.prior.copy() for query in queries]
    features = [_arrays(query.embedding) for query in queries]
    batch = tool.predict(queries)
    _require(len(batch) == len(queries), f"{len(queries)} queries give {len(batch)} predictions")
    for query, prediction in zip(queries, batch, strict=True):
        _check_prediction(tool, query, prediction)
    for query, prior, arrays in zip(queries, priors, features, strict=True):
        same = prior is None or (query.prior is not None and np.array_equal(prior, query.prior))
        _require(same, "predict changed a prior it was given")
        unchanged = all(np.array_equal(a, b) for a, b in zip(arrays, _arrays(query.embedding), strict=True))
        _require(unchanged, "predict changed an embedding it was given")
    for query, first, second in zip(queries, batch, tool.predict(queries), strict=True):
        _same_prediction(first, second, 0.0, query, "predict twice gives the same")
    for query, first in zip(queries, batch, strict=True):
        _same_prediction(first, tool.predict([query])[0], tolerance, query, "one by one gives what a batch gives")
    order = rng.permutation(len(queries))
    for position, second in zip(order, tool.predict([queries[i] for i in order]), strict=True):
        first, query = batch[position], queries[position]
        _same_prediction(first, second, tolerance, query, "the order of queries does not matter")


def _check_prediction(tool: SegmentationTool, query: Query, prediction: Prediction) -> None:
    size = query.embedding.height, query.embedding.width
    told = f"for {query.prompts} on a {size} image"
    logits, prior = prediction.logits, prediction.prior
    _require(logits.shape == size, f"logits are {logits.shape} {told}")
    _require(logits.dtype == np.float32, f"logits are {logits.dtype}, not float32, {told}")
    _require(bool(np.isfinite(logits).all()), f"logits are finite {told}")
    _require(prior.shape == tool.prior_shape(*size), f"the prior is {prior.shape}, not prior_shape, {told}")
    _require(prior.dtype == np.float32, f"the prior is {prior.dtype}, not float32, {told}")
    _require(bool(np.isfinite(prior).all()), f"the prior is finite {told}")
    _require(isinstance(prediction.predicted_iou, float), f"predicted_iou is {prediction.predicted_iou!r} {told}")


def _check_chain(tool: SegmentationTool, image: Image, rng: np.random.Generator) -> None:
    """Box, then clicks, each on the state before; the states before stay as they were."""
    sample = _sample(image)
    height, width = image.shape[:2]
    actions: list[Prompt] = []
    if Box in tool.prompts:
        actions.append(Box(width // 4, height // 4, max(width // 4, 3 * width // 4), max(height // 4, 3 * height // 4)))
    if Click in tool.prompts:
        actions += [Click(int(rng.integers(width)), int(rng.integers(height)), turn % 2 == 0) for turn in range(3)]
    for start in (empty_state(sample), given_state(tool, rng.random((height, width)) > 0.5)):
        states = [start]
        for action in actions:
            states += advance(tool, [sample], states[-1:], [action])
        masks = [state.mask.copy() for state in states]
        again: list[MaskState] = [start]
        for action in actions:
            again += advance(tool, [sample], again[-1:], [action])
        for turn, (state, mask, twin) in enumerate(zip(states, masks, again, strict=True)):
            _require(state.mask.shape == (height, width), f"the mask of turn {turn} is {state.mask.shape}")
            _require(np.array_equal(state.mask, mask), f"a later turn changed the mask of turn {turn}")
            _require(np.array_equal(state.mask, twin.mask), f"turn {turn} of {actions} repeated gives another mask")
        _require(states[-1].prompts == tuple(actions), "the prompts in force are those given")


def _check_refusals(tool: SegmentationTool, image: Image) -> None:
    sample = _sample(image)
    for kind, prompt in ((Box, Box(0, 0, 1, 1)), (Click, Click(0, 0))):
        if kind in tool.prompts:
            continue
        try:
            advance(tool, [sample], [empty_state(sample)], [prompt])
        except ValueError:
            continue
        raise AssertionError(f"{tool.name} does not list {kind.__name__} among its prompts; advance has to refuse it")


def _same_features(a: Sequence[Embedding], b: Sequence[Embedding], tolerance: float, what: str) -> None:
    for first, second in zip(a, b, strict=True):
        _require(set(first.features) == set(second.features), f"{what}: the features' names differ")
        for name, left, right in zip(sorted(first.features), _arrays(first), _arrays(second), strict=True):
            _close(left, right, tolerance, f"{what}: feature {name} of a {first.height}x{first.width} image")


def _same_prediction(first: Prediction, second: Prediction, tolerance: float, query: Query, what: str) -> None:
    size = query.embedding.height, query.embedding.width
    told = f"{what}: {query.prompts}, {'no' if query.prior is None else 'a'} prior, {size} image"
    _close(first.logits, second.logits, tolerance, f"{told}: logits")
    _close(first.prior, second.prior, tolerance, f"{told}: prior")
    ious = np.array([first.predicted_iou]), np.array([second.predicted_iou])
    _close(*ious, tolerance, f"{told}: predicted_iou")


def _close(a: np.ndarray, b: np.ndarray, tolerance: float, what: str) -> None:
    _require(a.shape == b.shape, f"{what}: {a.shape} and {b.shape}")
    if np.array_equal(a, b, equal_nan=True):
        return
    scale = float(np.max(np.abs(a), initial=1e-12))
    apart = float(np.max(np.abs(a.astype(np.float64) - b.astype(np.float64)))) / scale
    _require(apart <= tolerance, f"{what} differ by {apart:.2g} of their scale; the tolerance is {tolerance:.2g}")


def _arrays(embedding: Embedding) -> list[np.ndarray]:
    """Copies of an embedding's features in name order; torch tensors of any device and dtype as float32."""
    arrays = []
    for name in sorted(embedding.features):
        value = embedding.features[name]
        arrays.append(np.array(value if isinstance(value, np.ndarray) else value.float().cpu().numpy()))
    return arrays


def _sample(image: Image) -> Sample:
    target = np.zeros(image.shape[:2], np.bool_)
    return Sample("check/1", image, target, "thing", "the thing", "1")


def _disc(rng: np.random.Generator, height: int, width: int, colour: bool) -> Image:
    noise = rng.integers(0, 60, (height, width, 3 if colour else 1))
    rows, columns = np.ogrid[:height, :width]
    inside = (rows - height / 2) ** 2 + (columns - width / 2) ** 2 <= (min(height, width) / 3) ** 2
    tint = np.array([150, 60, 40] if colour else [120])
    return np.broadcast_to(noise + inside[..., None] * tint, (height, width, 3)).astype(np.uint8)


def _require(condition: bool, what: str) -> None:
    if not condition:
        raise AssertionError(what)
