"""What an env server accepts: every number that bounds memory, work or patience, in one record."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from medseg_gym.web.limits import MIB, WebLimits


@dataclass(frozen=True, slots=True)
class EnvLimits(WebLimits):
    """Bytes, counts and seconds; what is over is refused before it is done."""

    body_bytes: int = 4 * MIB  # of one request: a start mask is the largest thing in it
    sessions: int = 64  # at once
    session_ttl: float = 600.0  # seconds without a request after which a session is forgotten
    size: int = 1024  # side of an observation that a client may choose
    horizon: int = 200  # turns that a client may choose: all their masks are kept until the next reset
    keys: int = 1000  # in one answer
    chat_pixels: int = 2**25  # of all pictures of one chat: 128 of 512 x 512

    def told(self) -> dict[str, Any]:
        """Those that a client has to keep to, for the server's description."""
        return {name: value for name, value in asdict(self).items() if name in TOLD}


TOLD = ("body_bytes", "sessions", "session_ttl", "size", "horizon", "keys", "chat_pixels")
