"""The catalogue of datasets: one card each, by the paper that uses them; `DATASETS` has them all by id."""

from __future__ import annotations

from medseg_gym.datasets.cards import decathlon, ibisagent, medsam_agent, others
from medseg_gym.datasets.cards.record import DatasetCard, Expected, Structure, instruction

__all__ = ["DATASETS", "DatasetCard", "Expected", "Structure", "instruction"]

DATASETS: dict[str, DatasetCard] = {
    card.id: card
    for card in (
        others.PHANTOM,
        *medsam_agent.CARDS,
        *ibisagent.CARDS,
        *decathlon.CARDS,
        ibisagent.MECOVQA,
        *others.CARDS,
    )
}
