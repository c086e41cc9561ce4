"""The errors users meet, and the "did you mean" helper that words them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class MedSegError(Exception):
    """Base of all errors that are the caller's to mend; its text says what came, what was wanted, and the next move."""


class UnknownNameError(MedSegError, ValueError):
    """A name that is not in the catalogue, the registry or the list of keywords."""


class DataMissingError(MedSegError, FileNotFoundError):
    """The dataset is not prepared on this machine."""


class WeightsMissingError(MedSegError, FileNotFoundError):
    """The tool's weights are not on this machine."""


class BadDataError(MedSegError, ValueError):
    """A file or record that does not hold what it should."""


class InvalidActionError(MedSegError, ValueError):
    """An action outside the action space."""


class PolicyUnavailableError(MedSegError):
    """Whoever answers for the policy is gone: the run ends here, and the same command goes on with it later."""


class ToolUnavailableError(MedSegError):
    """The tool's server or actor is gone, or is another's now: the run ends here, and the same command goes on."""


def unknown(kind: str, name: object, known: Iterable[str]) -> UnknownNameError:
    """The error for an unknown name, with the closest known ones."""
    names = sorted(known)
    folded = {n.casefold(): n for n in names}
    close = [folded[c] for c in difflib.get_close_matches(str(name).casefold(), list(folded), n=3, cutoff=0.5)]
    if close:
        hint = "did you mean " + " or ".join(repr(c) for c in close) + "?"
    else:
        hint = "known: " + ", ".join(names[:30]) + (", ..." if len(names) > 30 else "")
    return UnknownNameError(f"unknown {kind} {name!r}; {hint}")


def check_keywords(kind: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Raises UnknownNameError for the first keyword that is not known."""
    known = list(known)
    for name in given:
        if name not in known:
            raise unknown(f"{kind} keyword", name, known)
