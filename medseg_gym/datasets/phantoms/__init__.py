"""The scenes a Phantom can draw: one row a kind of image, one file a modality."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

    from medseg_gym.datasets.phantoms.draw import Scene

    Render = Callable[[np.random.Generator, int, float, frozenset[str]], Scene]


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of image: what it is called in keys and instructions, and what can be outlined in it."""

    modality: str  # "ct": the word in the key, and the file that draws it
    place: str  # "abdomen CT": the end of the instruction
    groups: tuple[tuple[str, ...], ...]  # structures that are present or absent together
    view: str = "render"  # the function that draws it

    @property
    def structures(self) -> tuple[str, ...]:
        """In the order of their keys."""
        return tuple(sorted((name for group in self.groups for name in group), key=slug))

    def renderer(self) -> Render:
        """render(rng, size, difficulty, absent) -> Scene; imported on first use, because drawing needs OpenCV."""
        return getattr(importlib.import_module(f"{__name__}.{self.modality}"), self.view)


def slug(structure: str) -> str:
    """The structure as a key spells it: "right kidney" is "right-kidney"."""
    return structure.replace(" ", "-")


CT = Kind("ct", "abdomen CT", (("liver",), ("right kidney",), ("left kidney",), ("spleen",), ("aorta",), ("stomach",)))
MR = Kind("mr", "short-axis cardiac MR", (("left ventricle", "myocardium"), ("right ventricle",)))
LIVER_ULTRASOUND = Kind("ultrasound", "liver ultrasound", (("lesion",),), "render_liver")
HEART_ULTRASOUND = Kind("ultrasound", "heart ultrasound", (("left ventricle", "myocardium"),), "render_heart")
FUNDUS = Kind("fundus", "fundus photograph", (("optic disc", "optic cup"),))
XRAY = Kind("xray", "chest X-ray", (("left lung",), ("right lung",), ("heart",)))
POLYP = Kind("polyp", "colonoscopy", (("polyp",),))
CUE = Kind("cue", "cue image", (("target",),))

# Image i of a task is of kind i modulo the length: where a key stands can then be computed, not looked up.
TASKS: dict[str, tuple[Kind, ...]] = {
    "mixed": (CT, FUNDUS, MR, POLYP, LIVER_ULTRASOUND, XRAY, CT, FUNDUS, MR, POLYP, HEART_ULTRASOUND, XRAY),
    "ct": (CT,),
    "mr": (MR,),
    "ultrasound": (LIVER_ULTRASOUND, HEART_ULTRASOUND),
    "fundus": (FUNDUS,),
    "xray": (XRAY,),
    "polyp": (POLYP,),
    "cue": (CUE,),
}
