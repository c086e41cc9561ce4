"""RemoteTool: the tool behind an HTTP tool server, as a SegmentationTool of this process."""

from __future__ import annotations

import json
import os
import random
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np

from medseg_gym.errors import MedSegError, unknown
from medseg_gym.tools.serving import wire
from medseg_gym.tools.serving.host import Ask, MissingError
from medseg_gym.tools.serving.remote import RefusedError, Remote, ServerError, UnreachableError
from medseg_gym.types import Image, Prediction

BYTES = "application/octet-stream"
TOKEN_VARIABLE = "MEDSEG_GYM_TOKEN"
Upload = Literal["raw", "png"]
POOL = 32  # connections kept open
LONGEST_WAIT = 10.0  # seconds between two tries
FIRST_RETRIES = 3  # a wrong address should not take half a minute to say so


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
        self.url = _checked_url(url)
        if upload not in get_args(Upload):
            raise unknown("upload", upload, get_args(Upload))
        self._options: dict[str, Any] = {
            "token": token,
            "timeout": timeout,
            "retries": retries,
            "masks": wire.check_masks(masks),
            "upload": upload,
        }
        self._timeout, self._retries, self._masks, self._upload = timeout, retries, masks, upload
        secret = os.environ.get(TOKEN_VARIABLE) if token is None else token
        self._headers = {"Authorization": f"Bearer {secret}"} if secret else {}
        self._pools = _Pools(self.url, timeout)
        super().__init__()

    def __repr__(self) -> str:
        return f"RemoteTool({self.url!r})"

    def __reduce__(self) -> Any:
        return _remade, (self.url, self._options)

    def counters(self) -> dict[str, Any]:
        """The server's counters: batches, cache, what it keeps."""
        return dict(self._json("GET", "/v1/counters"))

    def _describe(self) -> Mapping[str, Any]:
        return wire.read_json(self._ask("GET", "/v1/tool", retries=min(self._retries, FIRST_RETRIES)))

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
        body = self._ask("POST", "/v1/predict", wire.pack_asks(asks, self._masks))
        return wire.unpack_answers(body, sizes)

    def _json(self, method: str, target: str, body: Any = None, kind: str = BYTES) -> dict[str, Any]:
        return wire.read_json(self._ask(method, target, body, kind))

    def _ask(
        self,
        method: str,
        target: str,
        body: Any = None,
        kind: str = BYTES,
        retries: int | None = None,
    ) -> bytes:
        """The body of a successful answer. Lost connections and busy servers are tried again; the rest raises."""
        import urllib3.exceptions as broken

        retries = self._retries if retries is None else retries
        for attempt in range(retries + 1):
            last = attempt == retries
            try:
                answer = self._pools.mine().urlopen(
                    method,
                    self._pools.path + target,
                    body=body,
                    headers={**self._headers, "Content-Type": kind},
                    retries=False,
                    redirect=False,
                )
            except broken.ReadTimeoutError:
                raise UnreachableError(
                    f"{self.url} gave no answer within {self._timeout:g} s; is it overloaded? A larger timeout= waits "
                    "longer"
                ) from None
            except (broken.HTTPError, OSError) as error:
                if last:
                    raise UnreachableError(
                        f"no tool server answers at {self.url} ({_short(error)}); start one with "
                        "`medseg-gym tools serve --tool NAME`, or mend the address"
                    ) from None
                _wait(attempt)
                continue
            if answer.status in (429, 503) and not last:
                _wait(attempt, answer.headers.get("Retry-After"))
                continue
            if answer.status == 200:
                return bytes(answer.data)
            raise _error(self.url, answer.status, bytes(answer.data))
        raise AssertionError("unreachable")


class _Pools:
    """The connections of this process; a forked child gets its own."""

    def __init__(self, url: str, timeout: float) -> None:
        from urllib.parse import urlsplit

        self._url, self._timeout = url, timeout
        self.path = urlsplit(url).path.rstrip("/")
        self._pool: Any = None
        self._process = -1
        self._lock = threading.Lock()

    def mine(self) -> Any:
        if self._process != os.getpid():
            try:
                import urllib3
            except ImportError:
                raise MedSegError("a tool server is asked through urllib3: pip install 'medseg-gym[serve]'") from None
            with self._lock:
                wait = urllib3.Timeout(connect=min(10.0, self._timeout), read=self._timeout)
                self._pool = urllib3.connection_from_url(self._url, maxsize=POOL, timeout=wait)
                self._process = os.getpid()
        return self._pool


def _remade(url: str, options: dict[str, Any]) -> RemoteTool:
    return RemoteTool(url, **options)


def _checked_url(url: str) -> str:
    from urllib.parse import urlsplit

    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and parts.hostname and (parts.port is None or parts.port > 0)
    except ValueError:
        good = False
    if not good or parts.username is not None or parts.password is not None or parts.query or parts.fragment:
        raise MedSegError(
            f"not a tool server's address: {_without_secrets(url)!r}; wanted http://HOST:PORT, and a token by token= "
            f"or ${TOKEN_VARIABLE}"
        )
    return url.rstrip("/")


def _without_secrets(url: str) -> str:
    scheme, _, rest = url.partition("://")
    return f"{scheme}://{rest.rpartition('@')[2].partition('?')[0]}"


def _error(url: str, status: int, body: bytes) -> Exception:
    """What a refusal means for the caller."""
    try:
        told = wire.read_json(body)
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


def _wait(attempt: int, told: str | None = None) -> None:
    """Sleeps longer from try to try, with some chance in it so that clients do not come back all at once."""
    longest = min(LONGEST_WAIT, 0.1 * 2**attempt)
    if told is not None and told.isdigit():
        longest = min(LONGEST_WAIT, max(longest, float(told)))
    time.sleep(longest * random.uniform(0.5, 1.0))


def _short(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".split("(_ssl")[0][:200]
