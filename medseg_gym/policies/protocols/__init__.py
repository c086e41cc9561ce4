"""Protocols between env and language model: medsam-agent, ibis and tiny, and `make`, which finds them by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from inspect import signature
from typing import Any

from medseg_gym.errors import check_keywords, unknown
from medseg_gym.policies.protocols.base import ChatProtocol, Moment
from medseg_gym.policies.protocols.ibis import IBIS
from medseg_gym.policies.protocols.medsam_agent import MedSAMAgent
from medseg_gym.policies.protocols.tiny import Tiny

PROTOCOLS: dict[str, Callable[..., ChatProtocol]] = {kind.name: kind for kind in (MedSAMAgent, IBIS, Tiny)}


def make(protocol: str | ChatProtocol, verbs: Sequence[str] | None = None, **options: Any) -> ChatProtocol:
    """The protocol of a name for an env with these verbs (None: all it has words for); a ready one as it is.

    `options` are the protocol's own: ibis has history, thinking and several. Unknown names and options raise.
    """
    if not isinstance(protocol, str):
        return protocol
    if protocol not in PROTOCOLS:
        raise unknown("protocol", protocol, PROTOCOLS)
    build = PROTOCOLS[protocol]
    check_keywords(f"protocol {protocol}", options, signature(build).parameters)
    return build(**options) if verbs is None else build(verbs, **options)


__all__ = ["IBIS", "PROTOCOLS", "ChatProtocol", "MedSAMAgent", "Moment", "Tiny", "make"]
