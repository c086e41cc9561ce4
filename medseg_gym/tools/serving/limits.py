"""What a tool server accepts: every number that bounds memory, work or patience, in one record."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

MIB = 1024**2


@dataclass(frozen=True, slots=True)
class Limits:
    """Bytes, counts and seconds; what is over is refused before it is read or computed."""

    body_bytes: int = 64 * MIB  # of one request
    answer_bytes: int = 256 * MIB  # of one answer
    flight_bytes: int = 1024 * MIB  # of all requests and answers under way
    pixels: int = 2**24  # of one image
    queries: int = 256  # in one request, images to encode too
    prompts: int = 64  # in one query
    requests: int = 128  # under way at once
    connections: int = 512
    queue: int = 1024  # queries that wait for their turn
    image_bytes: int = 1024 * MIB  # of images kept; the least recently used leave, and are sent again when needed
    prior_bytes: int = 256 * MIB  # of priors kept, likewise
    json_bytes: int = MIB
    receive_s: float = 60.0  # from a connection's first byte of a request to its last
    send_s: float = 60.0  # that a client may leave an answer unread

    def __post_init__(self) -> None:
        for field in fields(self):
            if not getattr(self, field.name) > 0:
                raise ValueError(f"limit {field.name} is {getattr(self, field.name)!r}; wanted more than 0")

    def told(self) -> dict[str, Any]:
        """Those that a client has to keep to, for the server's description."""
        return {name: value for name, value in asdict(self).items() if name in TOLD}


TOLD = ("body_bytes", "answer_bytes", "pixels", "queries", "prompts", "image_bytes")
