"""What every engine does with what it is asked and what it answers: a request is checked, versions become spans."""

from __future__ import annotations

from collections.abc import Sequence

from medseg_gym.errors import BadDataError
from medseg_gym.rl.engines.base import GenRequest
from medseg_gym.rl.tokens import ChatTokens, TokenPrompt
from medseg_gym.rl.types import Span


def check_request(request: GenRequest, tokens: ChatTokens) -> None:
    """BadDataError, naming the request, where its image tokens do not fit its images or its settings make no sense."""
    if request.max_tokens < 1 or request.temperature < 0:
        raise BadDataError(
            f"request {request.id}: max_tokens={request.max_tokens}, temperature={request.temperature}; "
            "wanted at least one token and a temperature of 0 or more"
        )
    try:
        tokens.check(TokenPrompt(request.ids, tuple(image.pixels for image in request.images)))
    except BadDataError as error:
        raise BadDataError(f"request {request.id}: {error}") from None


def spans(versions: Sequence[int]) -> tuple[Span, ...]:
    """The runs of equal versions, one version a token, as (version, first token, one past the last)."""
    edges = [i for i in range(len(versions)) if i == 0 or versions[i] != versions[i - 1]]
    return tuple((versions[a], a, b) for a, b in zip(edges, [*edges[1:], len(versions)], strict=True))
