"""The record of a dataset's card, and what it says in words: the instruction, the split rule, the patient rule."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

MEDSAM_AGENT = "MedSAM-Agent, Table 4"
IBISAGENT = "IBISAgent, Table 11"


@dataclass(frozen=True, slots=True)
class Structure:
    """What a dataset outlines, in the instruction's wording, and its value in the published label maps."""

    name: str
    label: int | None = None


@dataclass(frozen=True, slots=True)
class Expected:
    """A number of cases (image and mask) that a publication gives, and how a prepared dataset is held against it."""

    source: str
    cases: int
    rule: str = "equal"  # "equal"; "at least": the source drew from the dataset; "note": a count of several datasets
    what: str = ""  # the source's own name for the group, where it says more than the title


@dataclass(frozen=True, slots=True)
class DatasetCard:
    """All that is known of a dataset before its data is there. Ids hold letters, digits and dots only."""

    id: str
    title: str  # with the original punctuation
    modality: str  # as instructions word it; "" where it varies from image to image
    region: str  # as instructions word it; "" where it varies or says nothing
    layout: str = "biomedparse"  # the importer `medseg-gym data prepare` takes unless told otherwise
    structures: tuple[Structure, ...] = ()  # in label order; () where the files name them
    patient: str = ""  # regular expression over an image's file stem, groups `patient` and, for volumes, `slice`
    splits: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # patients of val and test; the others train
    expected: tuple[Expected, ...] = ()
    licence: str | None = None  # None: not known for sure; ask the source
    citation: str | None = None
    url: str | None = None
    access: str = ""  # how to get it, where the address does not say it all
    notes: str = ""

    @property
    def split_rule(self) -> str:
        """How patients are shared out, in words."""
        if self.splits:
            parts = (f"{split}: patients {', '.join(patients)}" for split, patients in self.splits.items())
            return f"by the card; {'; '.join(parts)}; train: all others"
        return "the source's own where its files tell one, else by a hash of the patient, train 70, val 10, test 20 %"

    @property
    def patient_rule(self) -> str:
        """How an image's patient is found, in words."""
        if self.patient:
            return f"read from the file stem by {self.patient}"
        return "as the layout's importer tells; images whose names tell no patient count as one each (see --patient)"


def instruction(card: DatasetCard, structure: str) -> str:
    """The phrase that names the target, MedSAM-Agent's wording: "right kidney in abdomen CT"."""
    where = " ".join(part for part in (card.region, card.modality) if part)
    return f"{structure} in {where}" if where else structure


def labels(*names: str, first: int = 1) -> tuple[Structure, ...]:
    """Structures whose label values count up from `first`."""
    return tuple(Structure(name, label) for label, name in enumerate(names, first))


def names(*names: str) -> tuple[Structure, ...]:
    """Structures without label values: each has a mask file of its own."""
    return tuple(Structure(name) for name in names)


def medsam_agent(cases: int) -> Expected:
    return Expected(MEDSAM_AGENT, cases)


def ibisagent(cases: int, rule: str = "at least", what: str = "") -> Expected:
    """IBISAgent's table counts the samples it drew for fine-tuning, so a dataset holds at least as many."""
    return Expected(IBISAGENT, cases, rule, what)
