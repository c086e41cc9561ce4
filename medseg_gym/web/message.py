"""A message's bytes: a JSON head with its length in front, then the arrays it speaks of."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from medseg_gym.errors import BadDataError


def pack(head: Mapping[str, Any], arrays: Iterable[np.ndarray] = ()) -> bytes:
    """One message: uint32 length of the head, the head as JSON, the arrays' bytes."""
    text = json.dumps(head, separators=(",", ":"), allow_nan=False).encode()
    return b"".join([struct.pack("<I", len(text)), text, *(np.ascontiguousarray(a).data.cast("B") for a in arrays)])


class Message:
    """A received message: its head, and its arrays in the order they were packed. Whatever is wrong: BadDataError."""

    def __init__(self, body: bytes, max_head: int) -> None:
        length = struct.unpack_from("<I", body)[0] if len(body) >= 4 else -1
        if not 0 <= length <= min(max_head, len(body) - 4):
            raise BadDataError("not a message: its head is longer than the message, or than may be")
        self.head = read_json(body[4 : 4 + length])
        self._rest = memoryview(body)[4 + length :]

    def array(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
        """The next array, read-only."""
        size = math.prod(shape) * dtype.itemsize
        if size > len(self._rest):
            raise BadDataError(f"the message ends before its array of {shape} {dtype}")
        array = np.frombuffer(self._rest[:size], dtype).reshape(shape)
        self._rest = self._rest[size:]
        return array

    def end(self) -> None:
        if len(self._rest):
            raise BadDataError(f"the message goes on for {len(self._rest)} bytes after its last array")


def read_json(text: bytes) -> dict[str, Any]:
    """The object in a JSON text; BadDataError for anything else, nesting without end included."""
    try:
        value = json.loads(text.decode("utf-8"), parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise BadDataError(f"not JSON: {type(error).__name__}") from None
    if not isinstance(value, dict):
        raise BadDataError(f"wanted a JSON object, not a {type(value).__name__}")
    return value


def _no_number(constant: str) -> None:
    raise ValueError(constant)
