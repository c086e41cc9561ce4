"""Ways to ask for a structure: MedSAM-Agent's phrase, and IBISAgent's families of requests, filled and drawn by seed.

The families are IBISAgent's (appendix B.2): direct commands, goal-oriented statements, five styles of question
(conditional, compound, protocol, conversational, concise), and, during refinement, requests for the next step,
corrections and checks. The wording is our own. Templates speak of the image as their subject, so that they fit
structures in the singular and the plural alike.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from string import Formatter

import numpy as np

from medseg_gym.datasets.base import Around, Dataset, WithStartMasks
from medseg_gym.errors import UnknownNameError, check_keywords, unknown
from medseg_gym.types import Mask, Sample

PHRASE = "phrase"  # MedSAM-Agent's: "right kidney in abdomen CT"

TEMPLATES: Mapping[str, tuple[str, ...]] = {
    "direct": (
        "Outline the {structure} in this {modality}.",
        "Mark every pixel of the {structure}.",
        "Segment the {structure} shown in this {modality}.",
        "Draw a mask over the {structure}.",
        "Trace the {structure} in the {modality} before you.",
    ),
    "goal": (
        "The aim is a mask that covers the {structure} and nothing else.",
        "We are measuring the {structure}, for which an exact mask is needed.",
        "For planning, the extent of the {structure} in this {modality} has to be known to the pixel.",
        "Work towards a complete outline of the {structure}.",
        "What is wanted in the end is the {structure}, cleanly cut out of this {modality}.",
    ),
    "conditional": (
        "Does this {modality} show the {structure}? If it does, segment that region.",
        "Should this {modality} contain the {structure}, outline that region; if not, say so.",
        "Check this {modality} for the {structure} and, where found, draw the mask.",
    ),
    "compound": (
        "Could you locate the {structure} in this {modality} and then segment that region?",
        "Would you find the {structure} and give me the mask?",
        "Can you point out the {structure} here and outline that region precisely?",
    ),
    "protocol": (
        "Per protocol, presence and extent of the {structure} are to be documented; please delineate.",
        "Reading of this {modality} requires confirmation of the {structure} by a contour.",
        "For the record I have to confirm the {structure} on this {modality}; a segmentation is required.",
    ),
    "conversational": (
        "I keep wondering whether this {modality} shows the {structure}; could you mark that region for me?",
        "Looking at this {modality}, I would like to see where the {structure} would be.",
        "I am not quite sure about the {structure} here, so a mask would help me.",
    ),
    "concise": (
        "The {structure} in view? Mask, please.",
        "{Structure} here? Segment.",
        "Any sign of the {structure}? Outline it.",
    ),
    "next": (
        "This is the mask so far. Which action comes next?",
        "How would you go on from this mask of the {structure}?",
        "Choose the next correction.",
    ),
    "correction": (
        "The mask does not match the {structure} yet; put right what is wrong.",
        "Compare the mask's edge with the {structure} and mend where they part.",
        "Parts are missed or spilled over; correct the mask of the {structure}.",
    ),
    "verification": (
        "Does the mask cover the {structure} completely?",
        "Is this outline of the {structure} finished, or is there more to do?",
        "Judge whether the mask fits the {structure} and stop if it does.",
    ),
}
QUESTIONS = ("conditional", "compound", "protocol", "conversational", "concise")
OPENINGS = ("direct", "goal", *QUESTIONS)  # what asks for a structure from scratch
REFINEMENT = ("next", "correction", "verification")  # what asks for more once there is a mask
FAMILIES = (PHRASE, *OPENINGS, *REFINEMENT)


def draw(
    rng: np.random.Generator,
    structure: str,
    *,
    modality: str = "",
    phrase: str = "",
    families: Sequence[str] = OPENINGS,
) -> tuple[str, str]:
    """(family, text): a family is drawn, then one of its templates, so that families count alike.

    `modality` reads as in "this abdomen CT", and without one as "this image". `phrase` is what the family "phrase"
    gives; without one that is the structure's name.
    """
    check_families(families)
    family = families[int(rng.integers(len(families)))]
    if family == PHRASE:
        return family, phrase or structure
    templates = TEMPLATES[family]
    return family, fill(templates[int(rng.integers(len(templates)))], structure, modality)


def fill(template: str, structure: str, modality: str = "") -> str:
    """A template with its names put in: {structure}, {Structure} with a capital, {modality}."""
    check_keywords("template", (name for _, name, _, _ in Formatter().parse(template) if name is not None), _NAMES)
    capital = structure[:1].upper() + structure[1:]
    return template.format(structure=structure, Structure=capital, modality=modality or "image")


_NAMES = ("structure", "Structure", "modality")


def check_families(families: Sequence[str]) -> None:
    """Raises for an unknown family, and for none at all."""
    if isinstance(families, str) or not families:
        raise UnknownNameError(f"families={families!r}; wanted a list of some of: {', '.join(FAMILIES)}")
    for family in families:
        if family not in FAMILIES:
            raise unknown("family of instructions", family, FAMILIES)


def seeded(seed: int, *parts: str) -> np.random.Generator:
    """The generator of a seed and names: the same for the same case, whoever asks, in whatever order."""
    digest = hashlib.sha256("\0".join(parts).encode()).digest()
    return np.random.default_rng([seed, int.from_bytes(digest[:8], "big")])


class Worded(Around):
    """A dataset whose cases are asked for in other words. A case's words hang on `seed` and its key alone."""

    def __init__(self, dataset: Dataset, families: Sequence[str] = OPENINGS, *, seed: int = 0) -> None:
        check_families(families)
        self.dataset, self.families, self.seed = dataset, tuple(families), seed

    def keys(self, split: str, structures: Sequence[str] = ()) -> Sequence[str]:
        return self.dataset.keys(split, structures)

    def __getitem__(self, key: str) -> Sample:
        sample = self.dataset[key]
        # "right kidney in abdomen CT" -> "abdomen CT": the phrase is the one place where a case tells its modality
        modality = sample.instruction.removeprefix(f"{sample.structure} in ")
        rng = seeded(self.seed, "words", key)
        given = modality if modality != sample.instruction else ""
        _, text = draw(rng, sample.structure, modality=given, phrase=sample.instruction, families=self.families)
        return replace(sample, instruction=text)

    def start_mask(self, key: str) -> Mask | None:
        return self.dataset.start_mask(key) if isinstance(self.dataset, WithStartMasks) else None
