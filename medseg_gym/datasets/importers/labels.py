"""Which value, or colour, of a label image means which structure: from an option, the card or the dataset's listing."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from medseg_gym.datasets.cards import DatasetCard
from medseg_gym.datasets.importers.imis_bench import plain_name
from medseg_gym.errors import MedSegError
from medseg_gym.types import Mask

Colour = tuple[int, int, int]
STRUCTURE_HELP = "what is outlined: one name, or VALUE=NAME,VALUE=NAME for label images (1+2=NAME joins values)"
COLOURS: dict[str, Colour] = {
    "black": (0, 0, 0),
    "red": (255, 0, 0),
    "green": (0, 255, 0),
    "blue": (0, 0, 255),
    "yellow": (255, 255, 0),
    "cyan": (0, 255, 255),
    "magenta": (255, 0, 255),
    "white": (255, 255, 255),
}


@dataclass(frozen=True, slots=True)
class Part:
    """A structure and the label values or colours that mean it; none: everything but 0."""

    structure: str
    values: tuple[int, ...] = ()
    colours: tuple[Colour, ...] = ()


def parse_structures(text: str) -> tuple[Part, ...]:
    """The parts of an option's text: "polyp", "1=liver,2=tumor", "blue+red=kidney,#ff0000=kidney tumor"."""
    if "=" not in text:
        if not text.strip():
            raise MedSegError("structure is empty; wanted a name, or VALUE=NAME,VALUE=NAME")
        return (Part(text.strip()),)
    parts = []
    for piece in text.split(","):
        keys, equals, name = piece.partition("=")
        name = name.strip()
        if not equals or not name:
            raise MedSegError(f"structure {piece.strip()!r} in {text!r}; wanted VALUE=NAME")
        values: list[int] = []
        colours: list[Colour] = []
        for key in (k.strip() for k in keys.split("+")):
            if key.isascii() and key.isdigit():
                values.append(int(key))
            else:
                colours.append(parse_colour(key))
        if values and colours:
            raise MedSegError(f"structure {piece.strip()!r} mixes label values and colours; wanted one kind")
        parts.append(Part(name, tuple(values), tuple(colours)))
    names = [part.structure for part in parts]
    if len(set(names)) != len(names):
        raise MedSegError(f"structure {text!r} names one twice; join its values with +, as 1+2=NAME")
    return tuple(parts)


def parse_colour(text: str) -> Colour:
    """#rrggbb or a colour's name."""
    if text in COLOURS:
        return COLOURS[text]
    if re.fullmatch(r"#[0-9a-fA-F]{6}", text):
        return int(text[1:3], 16), int(text[3:5], 16), int(text[5:7], 16)
    raise MedSegError(f"label {text!r}; wanted a whole number, #rrggbb, or one of {', '.join(COLOURS)}")


def parts_of(option: str | None, card: DatasetCard, listed: Mapping[str, Iterable[int]] | None = None) -> list[Part]:
    """The parts by the option, else as the card words the values, else as the dataset's own listing names them.

    Where the listing has a value that the card does not know, the listing's name stands. [] where nobody names any.
    """
    if option is not None:
        return list(parse_structures(option))
    known = {s.label: s.name for s in card.structures if s.label is not None}
    if listed is None and not known and len(card.structures) == 1:
        return [Part(card.structures[0].name)]
    if listed is None:
        return [Part(name, (value,)) for value, name in sorted(known.items())]
    parts = []
    for name, values in listed.items():
        values = tuple(values)
        worded = known.get(values[0]) if len(values) == 1 else None
        parts.append(Part(worded or plain_name(name), values))
    return parts


def mask_of(labels: np.ndarray, part: Part) -> Mask:
    """Where (H, W) label values mean the part."""
    if not part.values:
        return labels != 0
    if len(part.values) == 1:
        return labels == part.values[0]
    return np.isin(labels, part.values)


def whole_numbers(labels: np.ndarray) -> np.ndarray | None:
    """The labels as integers; None if they are not whole numbers. Label volumes are often stored as floats."""
    if labels.dtype.kind in "biu":
        return labels
    with np.errstate(invalid="ignore"):
        rounded = np.rint(labels)
        if not np.isfinite(labels).all() or np.abs(labels - rounded).max(initial=0) > 1e-3:
            return None
        return rounded.astype(np.int32)
