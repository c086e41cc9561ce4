"""Exact match: when a said answer is the true one. Normalisation is stated here, and nowhere else.

Both answers are normalised: Unicode NFKC, case folded, punctuation gone ("x-ray" and "x_ray" are "x ray"; a point or a
comma between digits stays, as do a sign before and a percent sign after one), articles gone, spaces single. Where the
truth is yes or no, "y", "n", "true" and "false" are read as such. Where the question has lettered choices, an answer
names one by its text, by its letter ("B", "b.", "(B)") or by both ("B. spleen"), which have to agree; a text that is a
choice comes before a letter. Nothing else is forgiven: "yes, there is" is not "yes".
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Sequence

MAX_ANSWER = 512  # characters of an answer that are looked at; a longer one is wrong
LETTERS = string.ascii_uppercase  # of choices, in order

_ARTICLES = frozenset(("a", "an", "the"))
_YES_NO = {"yes": "yes", "y": "yes", "true": "yes", "no": "no", "n": "no", "false": "no"}
_JOINED = re.compile(r"(?<=\d)[.,](?=\d)|(?<!\w)[-+](?=\d)|(?<=\d)%")  # what belongs to a number
_LETTER = re.compile(r"\(?([A-Za-z])(?:[).:]|\s*$)\s*(.*)", re.DOTALL)


def normalised(text: str) -> str:
    """An answer as exact match compares it; "" only where it has neither letter nor digit."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    kept = {match.start() for match in _JOINED.finditer(folded)}
    apart = "".join(
        c if c.isalnum() or unicodedata.category(c) == "Mn" or i in kept else "" if c in "'’" else " "
        for i, c in enumerate(folded)
    )
    words = apart.split()
    return " ".join([word for word in words if word not in _ARTICLES] or words)


def is_yes_no(answer: str) -> bool:
    """Whether an answer is yes or no, and nothing else."""
    return normalised(answer) in ("yes", "no")


def lettered(choices: Sequence[str]) -> bool:
    """Whether choices have letters: two or more, not only yes and no, and no more than there are letters."""
    return 2 <= len(choices) <= len(LETTERS) and not all(map(is_yes_no, choices))


def choice_of(said: str, choices: Sequence[str]) -> int | None:
    """Which of the lettered choices an answer names; None where none, several, or letter and text disagree."""
    texts = [normalised(choice) for choice in choices]

    def by_text(text: str) -> int | None:
        word = normalised(text)
        return texts.index(word) if word and texts.count(word) == 1 else None

    if (found := by_text(said)) is not None:
        return found
    match = _LETTER.fullmatch(said.strip())
    if match is None:
        return None
    place = LETTERS.find(match[1].upper())
    if place >= len(choices):
        return None
    rest = match[2].strip()
    return place if not rest or normalised(rest) == texts[place] else None


def exact_match(said: str, answer: str, choices: Sequence[str] = ()) -> bool:
    """Whether `said` is `answer`, by the rules above."""
    if len(said) > MAX_ANSWER:
        return False
    if lettered(choices):
        true = choice_of(answer, choices)
        if true is not None:
            return choice_of(said, choices) == true
    truth, word = normalised(answer), normalised(said)
    if truth in ("yes", "no"):
        word = _YES_NO.get(word, word)
    return bool(word) and word == truth
