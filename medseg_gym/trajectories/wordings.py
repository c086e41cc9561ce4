"""What the template writer says: thoughts by situation, answers by style, and the words that no thought may hold.

{structure} and {modality} are the case's, {where} is a place in words. Structures come in the singular and the plural,
so no verb has one as its subject. The five styles of answers are IBISAgent's idea; the wording is our own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

THOUGHTS: Mapping[str, tuple[str, ...]] = {
    "first click": (
        "Nothing is marked yet. I see the {structure} {where}, so I begin with a positive point well inside.",
        "There is no mask so far. A positive point {where}, deep within the {structure}, is a safe start.",
        "I look for the {structure} and find it {where}. One positive point at its core should bring up most of it.",
        "The picture is still unmarked. I place the first positive point on the {structure}, {where}.",
    ),
    "first box": (
        "Nothing is marked yet. I see the {structure} {where} and can enclose all of it with a box.",
        "There is no mask so far. A box around the {structure}, {where}, gives the outline in one step.",
        "I find the {structure} {where}; its borders are clear enough for a box.",
        "The picture is still unmarked. A close box {where} should bring up the whole {structure}.",
    ),
    "click again": (
        "The last step is taken back and nothing is marked. I set a positive point {where}, on the {structure} itself.",
        "With a clean picture again I look more closely: the {structure} lies {where}. A positive point goes there.",
        "Back at the beginning. This time the positive point goes {where}, well inside the {structure}.",
    ),
    "box again": (
        "The last step is taken back and nothing is marked. I enclose the {structure} with a box {where}.",
        "With a clean picture again I look more closely: the {structure} lies {where}. A box around it comes next.",
        "Back at the beginning. This time a box {where} encloses the {structure} as a whole.",
    ),
    "missed": (
        "The mask covers part of the {structure}, but tissue of the same kind is left out {where}. I add a positive "
        "point there.",
        "Comparing the green edge with the {structure}, I see a missed part {where}. A positive point should bring it "
        "in.",
        "The outline stops short {where}. The {structure} goes on there, so I click positively.",
        "Most of it is there. What is still missing lies {where}; a positive point is needed.",
    ),
    "spilled": (
        "The mask goes beyond the border of the {structure} {where}. A negative point there should pull it back.",
        "Some of the green lies outside the {structure}, {where}. I take it away with a negative point.",
        "Comparing the green edge with the {structure}, I see it spill over {where}. I click negatively there.",
        "The mask covers too much: {where} there is tissue of another kind. A negative point removes it.",
    ),
    "new box": (
        "The present mask does not follow the {structure} well. A new box {where} describes it better.",
        "Rather than mending the mask piece by piece I enclose the {structure} anew with a box {where}.",
        "The green area and the {structure} differ in extent. I set the box again, {where}.",
    ),
    "undo": (
        "The last step made the mask worse: it no longer follows the {structure}. I take it back.",
        "That was not the {structure}. I undo the last step before going on.",
        "The mask after my last step covers the wrong tissue, so I return to the state before it.",
    ),
    "discard": (
        "The mask that was given shows something other than the {structure}. I discard it and start over.",
        "What is marked here does not match the request for the {structure}. I take this mask back first.",
        "The given green area lies on other tissue than the {structure}, so it has to go.",
    ),
    "fits": (
        "The green edge follows the {structure} all around. Nothing is left out and nothing beside it is covered.",
        "I go along the border once more: the mask fits the {structure}, so I finish.",
        "Inside and outside look right now. More points would not improve the mask of the {structure}.",
        "The mask and the {structure} agree. This is the moment to stop.",
    ),
    "absent": (
        "I have looked over the whole picture and cannot find the {structure}. No mask is right here, so I finish.",
        "Nothing in this {modality} looks like the {structure}. Leaving the picture unmarked is correct.",
        "There is no mask, and no sign of the {structure} that would call for one. I stop here.",
    ),
}

STYLES = ("direct", "report", "confirming", "conversational", "concise")

ANSWERS: Mapping[tuple[str, bool], tuple[str, ...]] = {
    ("direct", True): (
        "The {structure} in this {modality} is segmented as shown in the mask.",
        "Here is the mask of the {structure}.",
    ),
    ("report", True): (
        "Finding: {structure} delineated in the {modality}. The mask gives the full extent.",
        "Segmentation of the {structure} completed; the contour was checked along its whole length.",
    ),
    ("confirming", True): (
        "Yes, this {modality} shows the {structure}; the mask marks the region.",
        "The request can be met: the {structure} is visible and has been outlined.",
    ),
    ("conversational", True): (
        "I found the {structure} and outlined it for you; the green area is what you asked for.",
        "There it is: the mask now covers the {structure} and leaves its surroundings free.",
    ),
    ("concise", True): ("{structure}: segmented.", "Done. The mask shows the {structure}."),
    ("direct", False): (
        "The {structure} is not visible in this {modality}; the mask stays empty.",
        "There is nothing to outline: no {structure} in this {modality}.",
    ),
    ("report", False): (
        "Finding: no {structure} in the {modality}. No segmentation was made.",
        "The {modality} was searched for the {structure} without result; the mask is empty.",
    ),
    ("confirming", False): (
        "No, this {modality} does not show the {structure}.",
        "The request cannot be met: the {structure} is not visible here.",
    ),
    ("conversational", False): (
        "I looked everywhere, but this {modality} does not seem to show the {structure}, so I left it unmarked.",
        "I could not find the {structure} here, and an empty mask is my answer.",
    ),
    ("concise", False): ("{structure}: not present.", "No {structure} here."),
}

# IBISAgent's words (red, blue, cross, TP, FP, FN, ground truth), their forms, and the colours of our own oracle view.
FORBIDDEN = re.compile(
    r"(?<!\w)(?:"
    r"redd?(?:s|ish|er|est|ness)?|blu(?:e|es|er|est|ish|eish)|orange(?:s|ish)?|yellow(?:s|ish)?|vermill?ion"
    r"|cross(?![\s-]?section)(?:es|ed|ing|ings|hairs?)?"
    r"|(?:tp|fp|fn|gt)['’]?s?|(?:true|false)[\s_-]+(?:positive|negative)s?"
    r"|ground[\s_-]*truths?"
    r")(?!\w)",
    re.IGNORECASE,
)


def forbidden(text: str, *allowed: str) -> str:
    """The first forbidden word of a text, "" without one. Whole words only, in any case.

    Phrases in `allowed`, such as a structure's name, may stand: a case may be about red blood cells.
    """
    for phrase in allowed:
        if phrase:
            text = re.sub(re.escape(phrase), " ", text, flags=re.IGNORECASE)
    found = FORBIDDEN.search(text)
    return found[0] if found else ""
