"""RemoteTool: the tool behind an HTTP tool server, as a SegmentationTool of this process."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np

from medseg_gym.errors import MedSegError, unknown
from medseg_gym.tools.serving import wire
from medseg_gym.tools.serving.host import Ask, MissingError
from medseg_gym.tools.serving.remote import RefusedError, Remote, ServerError, UnreachableError
from medseg_gym.types import Image, Prediction
from medseg_gym.web.connection import BYTES, FIRST_RETRIES, TOKEN_VARIABLE, Connection
from medseg_gym.web.message import read_json

Upload = Literal["raw", "png"]


class RemoteTool(Remote):
    """The tool that `medseg-gym tools serve` serves at `url`; answers equal the served tool's bit for bit.

    token: needed beyond loopback; by default $MEDSEG_GYM_TOKEN. timeout: seconds until an answer, which may have to
    wait for other clients' encodes. retries: after a lost connection, a busy (429) or an unavailable (503) server,
    with growing waits; all requests are pure, so asking twice is safe. masks: "bits" or "rle" send masks instead of
    logits, for slow networks (wire.Masks says what is then exact). upload: "raw" or "png".
    """

    def __init__(
        self,
        url: str,
        *,
        token: str | None = None,
        timeout: float = 300.0,
        retries: int = 8,
        masks: wire.Masks = "logits",
        upload: Upload = "raw",
    ) -> None:
        if upload not in get_args(Upload):
            raise unknown("upload", upload, get_args(Upload))
        self._options: dict[str, Any] = {
            "token": token,
            "timeout": timeout,
            "retries": retries,
            "masks": wire.check_masks(masks),
            "upload": upload,
        }
        self._masks, self._upload = masks, upload
        self._connection = Connection(
            url,
            token=token,
            timeout=timeout,
            retries=retries,
            what="tool server",
            start="medseg-gym tools serve --tool NAME",
            unreachable=UnreachableError,
            refused=_error,
        )
        self.url = self._connection.url
        super().__init__()

    def __repr__(self) -> str:
        return f"RemoteTool({self.url!r})"

    def __reduce__(self) -> Any:
        return _remade, (self.url, self._options)

    def counters(self) -> dict[str, Any]:
        """The server's counters: batches, cache, what it keeps."""
        return dict(self._json("GET", "/v1/counters"))

    def _describe(self) -> Mapping[str, Any]:
        return read_json(self._connection.ask("GET", "/v1/tool", retries=FIRST_RETRIES))

    def _prior_shape(self, height: int, width: int) -> tuple[int, int]:
        told = self._json("GET", f"/v1/prior-shape?height={int(height)}&width={int(width)}")
        self._same(str(told.get("fingerprint")))
        h, w = told["shape"]
        return int(h), int(w)

    def _put(self, name: str, image: Image) -> None:
        height, width = image.shape[:2]
        if height * width > self.limits["pixels"] or image.nbytes > self.limits["body_bytes"]:
            raise RefusedError(
                f"{self} takes images of {self.limits['pixels']} pixels and {self.limits['body_bytes']} bytes at most, "
                f"not {width}x{height}"
            )
        if self._upload == "png":
            self._json("PUT", f"/v1/images/{name}", wire.write_png(image), "image/png")
        else:
            target = f"/v1/images/{name}?height={height}&width={width}"
            self._json("PUT", target, np.ascontiguousarray(image).data.cast("B"))

    def _encode(self, names: Sequence[str]) -> str:
        body = json.dumps({"images": list(names)}).encode()
        return str(self._json("POST", "/v1/encode", body, "application/json").get("fingerprint"))

    def _predict(
        self, asks: Sequence[Ask], sizes: Sequence[tuple[int, int]]
    ) -> tuple[list[Prediction], list[str], str]:
        body = self._connection.ask("POST", "/v1/predict", wire.pack_asks(asks, self._masks))
        return wire.unpack_answers(body, sizes)

    def _json(self, method: str, target: str, body: Any = None, kind: str = BYTES) -> dict[str, Any]:
        return read_json(self._connection.ask(method, target, body, kind))


def _remade(url: str, options: dict[str, Any]) -> RemoteTool:
    return RemoteTool(url, **options)


def _error(url: str, status: int, body: bytes) -> Exception:
    """What a refusal means for the caller."""
    try:
        told = read_json(body)
    except MedSegError:
        told = {}
    text = str(told.get("error", f"HTTP {status}"))[:2000]
    missing = told.get("missing")
    if status == 409 and isinstance(missing, dict):
        return MissingError([str(n) for n in missing.get("images", ())], [str(n) for n in missing.get("priors", ())])
    if status == 401:
        return UnreachableError(f"{url} wants a token: give token=, or set ${TOKEN_VARIABLE} to the server's")
    if status in (400, 413, 415, 422):
        return RefusedError(f"{url}: {text}")
    return (ServerError if status == 500 else UnreachableError)(f"{url}: {text}")  # 500: over this very request
