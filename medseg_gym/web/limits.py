"""The limits that every server here has: what bounds memory and patience."""

from __future__ import annotations

from dataclasses import dataclass, fields

MIB = 1024**2


@dataclass(frozen=True, slots=True)
class WebLimits:
    """Bytes, counts and seconds; what is over is refused before it is read."""

    body_bytes: int = 64 * MIB  # of one request
    flight_bytes: int = 1024 * MIB  # of all requests and answers under way
    requests: int = 128  # under way at once
    connections: int = 512
    json_bytes: int = MIB
    receive_s: float = 60.0  # from a connection's first byte of a request to its last
    send_s: float = 60.0  # that a client may leave an answer unread

    def __post_init__(self) -> None:
        for field in fields(self):
            if not getattr(self, field.name) > 0:
                raise ValueError(f"limit {field.name} is {getattr(self, field.name)!r}; wanted more than 0")
