"""What tool server and client say to each other, as messages of medseg_gym.web.message."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np

from medseg_gym.episodes import decode_action, decode_mask, encode_action, encode_mask
from medseg_gym.errors import BadDataError, unknown
from medseg_gym.tools.base import START_LOGIT
from medseg_gym.tools.serving.host import Ask
from medseg_gym.tools.serving.limits import Limits
from medseg_gym.types import Box, Click, Image, Logits, Prediction, Prompt
from medseg_gym.web.message import Message, pack

Masks = Literal["logits", "bits", "rle"]
"""How answers travel: "logits" bit for bit; "bits" (packed) and "rle" (COCO run lengths) the mask alone, whose logits
then read +10 and -10. Priors and predicted_iou are exact in all three, so masks and episodes are too."""

FLOATS: dict[str, np.dtype[Any]] = {"float32": np.dtype("<f4"), "float16": np.dtype("<f2")}
FAR = 1_000_000  # pixels; no image is as wide
HASH_LENGTH = 64


def check_masks(masks: object) -> Masks:
    """The name itself if it is one of Masks."""
    if masks not in get_args(Masks):
        raise unknown("masks", masks, get_args(Masks))
    return masks  # type: ignore[return-value]


def pack_asks(asks: Sequence[Ask], masks: Masks) -> bytes:
    """The body of a predict request."""
    queries: list[dict[str, Any]] = []
    arrays = []
    for ask in asks:
        prior: Any = ask.prior
        if prior is not None and not isinstance(prior, str):
            arrays.append(np.asarray(prior, FLOATS["float32"]))
            prior = {"shape": list(prior.shape), "dtype": "float32"}
        queries.append({"image": ask.image, "prompts": [encode_action(p) for p in ask.prompts], "prior": prior})
    return pack({"masks": masks, "queries": queries}, arrays)


def unpack_asks(body: bytes, limits: Limits) -> tuple[list[Ask], Masks]:
    """The queries of a predict request, and how the masks are wanted."""
    message = Message(body, limits.json_bytes)
    masks = check_masks(message.head.get("masks", "logits"))
    queries = _list(message.head, "queries", limits.queries)
    asks = [_ask(query, message, limits) for query in queries]
    message.end()
    return asks, masks


def pack_answers(answers: Sequence[Prediction], handles: Sequence[str], masks: Masks, fingerprint: str) -> bytes:
    """The body of a predict answer."""
    told: list[dict[str, Any]] = []
    arrays = []
    for answer, handle in zip(answers, handles, strict=True):
        row: dict[str, Any] = {
            "size": list(answer.logits.shape),
            "predicted_iou": float(answer.predicted_iou).hex(),  # exact, and nan has one too
            "prior": {"shape": list(answer.prior.shape), "handle": handle},
        }
        if masks == "logits":
            arrays.append(np.asarray(answer.logits, FLOATS["float32"]))
        elif masks == "bits":
            arrays.append(np.packbits(answer.logits > 0))
        else:
            row["mask"] = encode_mask(answer.logits > 0)["counts"]
        arrays.append(np.asarray(answer.prior, FLOATS["float32"]))
        told.append(row)
    return pack({"fingerprint": fingerprint, "masks": masks, "answers": told}, arrays)


def unpack_answers(body: bytes, sizes: Sequence[tuple[int, int]]) -> tuple[list[Prediction], list[str], str]:
    """Predictions, handles of their priors, and the answering tool's fingerprint; `sizes` are the images' (H, W)."""
    message = Message(body, len(body))
    try:
        masks = check_masks(message.head["masks"])
        rows = message.head["answers"]
        if len(rows) != len(sizes):
            raise BadDataError(f"{len(rows)} answers to {len(sizes)} queries")
        predictions, handles = [], []
        for row, size in zip(rows, sizes, strict=True):
            if tuple(row["size"]) != tuple(size):
                raise BadDataError(f"an answer of {row['size']} for an image of {size}")
            logits = _logits(row, message, masks, size)
            prior = message.array(_shape(row["prior"]["shape"], 2), FLOATS["float32"])
            predictions.append(Prediction(logits, float.fromhex(row["predicted_iou"]), prior.astype(np.float32)))
            prior = predictions[-1].prior
            prior.flags.writeable = False  # its handle stands for these very numbers
            handles.append(str(row["prior"]["handle"]))
        message.end()
        return predictions, handles, str(message.head["fingerprint"])
    except (KeyError, TypeError, AttributeError, OverflowError) as error:
        raise BadDataError(f"not an answer of a tool server ({error!r})") from None


def hashes(head: Mapping[str, Any], limits: Limits) -> list[str]:
    """The image names of an encode request."""
    return [image_name(name) for name in _list(head, "images", limits.queries)]


def image_name(name: object) -> str:
    """The sha256 that names an image, if it looks like one."""
    if not isinstance(name, str) or len(name) != HASH_LENGTH or not set(name) <= set("0123456789abcdef"):
        raise BadDataError("an image is named by 64 hex digits, its sha256")
    return name


def read_rgb(body: bytes, height: object, width: object, limits: Limits) -> Image:
    """The image in raw bytes, row by row, three a pixel; height and width are decimal texts."""
    try:
        shape = int(str(height)[:8]), int(str(width)[:8]), 3
    except ValueError:
        raise BadDataError("raw pixels need height= and width=") from None
    if min(shape) < 1 or shape[0] * shape[1] > limits.pixels:
        raise BadDataError(f"{shape[1]}x{shape[0]} pixels; wanted 1 to {limits.pixels} of them")
    if len(body) != math.prod(shape):
        raise BadDataError(f"{len(body)} bytes for an image of {shape}; wanted {math.prod(shape)}")
    return np.frombuffer(body, np.uint8).reshape(shape)


def read_png(body: bytes, limits: Limits) -> Image:
    """The image in a PNG of 8 bits a channel, as RGB; its size is looked at before it is unpacked."""
    from PIL import Image as pil

    from medseg_gym.images import DEEP_MODES

    try:
        with pil.open(io.BytesIO(body), formats=["PNG"]) as picture:
            if picture.width * picture.height > limits.pixels:
                raise BadDataError(f"{picture.width}x{picture.height} pixels; the limit is {limits.pixels}")
            if picture.mode in DEEP_MODES:
                raise BadDataError(f"{picture.mode} pixels; send 8 bits a channel")
            image = np.array(picture.convert("RGB"))
    except BadDataError:
        raise
    except Exception as error:  # a decoder fed by strangers raises anything
        raise BadDataError(f"not a PNG that can be read ({type(error).__name__})") from None
    image.flags.writeable = False
    return image


def write_png(image: Image) -> bytes:
    """The image as a PNG."""
    from PIL import Image as pil

    out = io.BytesIO()
    pil.fromarray(image).save(out, format="PNG", compress_level=3)
    return out.getvalue()


def _ask(query: Any, message: Message, limits: Limits) -> Ask:
    if not isinstance(query, dict) or set(query) - {"image", "prompts", "prior"}:
        raise BadDataError('a query is {"image": hash, "prompts": [...], "prior": null, handle or {"shape", "dtype"}}')
    prompts = tuple(_prompt(record) for record in _list(query, "prompts", limits.prompts))
    if not prompts or sum(isinstance(p, Box) for p in prompts) > 1:
        raise BadDataError("a query has one prompt or more, and one box at most")
    prior = query.get("prior")
    if isinstance(prior, dict):
        dtype = prior.get("dtype")
        if not isinstance(dtype, str) or dtype not in FLOATS:
            raise BadDataError(f"a prior's dtype is one of {', '.join(FLOATS)}")
        shape = _shape(prior.get("shape"), 2)
        prior = message.array(shape, FLOATS[dtype]).astype(np.float32)
    elif prior is not None and (not isinstance(prior, str) or len(prior) > HASH_LENGTH):
        raise BadDataError("a prior is null, a handle, or an array with shape and dtype")
    return Ask(image_name(query.get("image")), prompts, prior)


def _prompt(record: Any) -> Prompt:
    if not isinstance(record, dict):
        raise BadDataError('a prompt is {"do": "click", ...} or {"do": "box", ...}')
    prompt = decode_action(record)
    if not isinstance(prompt, Click | Box):
        raise BadDataError(f"{type(prompt).__name__} is no prompt; wanted a click or a box")
    numbers = (prompt.x, prompt.y) if isinstance(prompt, Click) else (prompt.x1, prompt.y1, prompt.x2, prompt.y2)
    if any(abs(number) > FAR for number in numbers):
        raise BadDataError(f"a prompt more than {FAR} pixels away")
    return prompt


def _list(record: Mapping[str, Any], name: str, most: int) -> list[Any]:
    values = record.get(name)
    if not isinstance(values, list) or len(values) > most:
        raise BadDataError(f"{name} is a list of at most {most}")
    return values


def _shape(value: Any, dimensions: int) -> tuple[int, ...]:
    good = isinstance(value, list) and len(value) == dimensions
    if not good or not all(type(n) is int and 0 < n <= FAR for n in value):
        raise BadDataError(f"a shape is {dimensions} whole numbers above 0")
    return tuple(value)


def _logits(row: Mapping[str, Any], message: Message, masks: Masks, size: tuple[int, int]) -> Logits:
    if masks == "logits":
        return message.array(size, FLOATS["float32"]).astype(np.float32)
    if masks == "bits":
        packed = message.array(((math.prod(size) + 7) // 8,), np.dtype(np.uint8))
        mask = np.unpackbits(packed, count=math.prod(size)).reshape(size).astype(np.bool_)
    else:
        mask = decode_mask({"size": list(size), "counts": row["mask"]})
    return np.where(mask, np.float32(START_LOGIT), np.float32(-START_LOGIT))
