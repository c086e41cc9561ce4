"""What a tool server accepts: every number that bounds memory, work or patience, in one record."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from medseg_gym.web.limits import MIB, WebLimits


@dataclass(frozen=True, slots=True)
class Limits(WebLimits):
    """Bytes, counts and seconds; what is over is refused before it is read or computed."""

    answer_bytes: int = 256 * MIB  # of one answer
    pixels: int = 2**24  # of one image
    queries: int = 256  # in one request, images to encode too
    prompts: int = 64  # in one query
    queue: int = 1024  # queries that wait for their turn
    image_bytes: int = 1024 * MIB  # of images kept; the least recently used leave, and are sent again when needed
    prior_bytes: int = 256 * MIB  # of priors kept, likewise

    def told(self) -> dict[str, Any]:
        """Those that a client has to keep to, for the server's description."""
        return {name: value for name, value in asdict(self).items() if name in TOLD}


TOLD = ("body_bytes", "answer_bytes", "pixels", "queries", "prompts", "image_bytes")
