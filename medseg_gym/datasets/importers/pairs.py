"""Finds images and their masks by file patterns: "images/{id}.png" beside "masks/{id}__{target}.png".

A pattern is a path below the source. `{word}` stands for any text without "/", the same in image and mask; `*` for any
text, too, and is not compared, except that in patterns without any `{word}` the stars are paired in order. `{target}`
in the mask names the structure, `{patient}` and `{split}` in the image say what they are called.
"""

from __future__ import annotations

import os
import re
from bisect import bisect_left
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from medseg_gym.datasets.base import SPLITS
from medseg_gym.datasets.cards import DatasetCard
from medseg_gym.datasets.importers import Skipped, identify, inside, safe
from medseg_gym.errors import BadDataError, MedSegError

PATTERN_OPTIONS = {
    "image": "where the images are, as 'images/{id}.png'; {patient} and {split} are understood",
    "mask": "where an image's masks are, as 'masks/{id}__{target}.png'; {target} names the structure",
}
_SPLIT_NAMES = {
    "training": "train",
    "tr": "train",
    "validation": "val",
    "valid": "val",
    "testing": "test",
    "ts": "test",
}
_FIELD = re.compile(r"\{([A-Za-z_][A-Za-z0-9_]*)\}|\*")
_WORDLESS = re.compile(r"\*")


@dataclass(frozen=True, slots=True)
class Pair:
    """An image and its mask files with what each outlines; "" where the pattern does not say."""

    image: str
    masks: tuple[tuple[str, str], ...]
    patient: str
    name: str
    split: str | None


def find_pairs(
    source: Path,
    card: DatasetCard,
    patterns: Sequence[tuple[str, str]],
    suffixes: Collection[str],
) -> tuple[list[Pair], list[Skipped]]:
    """The pairs of the first patterns that find any; images without masks and masks without images are skipped."""
    files = [file for file in _files(source) if file.casefold().endswith(tuple(suffixes))]
    if not files:
        raise BadDataError(f"{source}: no file that ends in {', '.join(sorted(suffixes))}")
    for image, mask in patterns:
        pairs, skipped = _match(card, image, mask, files)
        if pairs:
            return pairs, skipped
    tried = "; ".join(f"--image '{image}' --mask '{mask}'" for image, mask in patterns)
    raise BadDataError(f"{source}: no image with a mask by {tried}. Its files are like {', '.join(files[:4])}")


def asked(image: str | None, mask: str | None, usual: Sequence[tuple[str, str]]) -> Sequence[tuple[str, str]]:
    """The patterns of the options, checked, or the usual ones where none is given."""
    if image is None and mask is None:
        return usual
    if image is None or mask is None:
        raise MedSegError(f"--{'image' if image is None else 'mask'} is missing; wanted both patterns or none")
    for text in (image, mask):
        try:
            inside(Path(), text.replace("*", "x"))
        except BadDataError as error:
            raise MedSegError(f"pattern {text!r}: {error}") from None
    image, mask = _named(image), _named(mask)
    words = [word for word in _FIELD.findall(image) if word]
    unknown = [word for word in _FIELD.findall(mask) if word and word not in (*words, "target")]
    if "target" in words:
        raise MedSegError(f"image pattern {image!r} holds {{target}}, which belongs to the mask's")
    if unknown or not words:
        raise MedSegError(
            f"patterns {image!r} and {mask!r}; wanted what they share in braces: 'images/{{id}}.png' 'masks/{{id}}.png'"
        )
    return [(image, mask)]


def _named(pattern: str) -> str:
    """A pattern whose stars are numbered words, where it has no words of its own but {target}."""
    if any(word not in ("", "target") for word in _FIELD.findall(pattern)):
        return pattern
    numbers = iter(range(1, 1000))
    return _WORDLESS.sub(lambda _: f"{{part_{next(numbers)}}}", pattern)


def _files(source: Path) -> Iterator[str]:
    """Every file below the source, relative and sorted; hidden ones are not looked at.

    Linked folders are followed, but no folder is listed twice: its real path counts, or else the first link to it.
    """
    found: list[str] = []
    seen = {_identity(source)}
    tops = [str(source)]
    for top in tops:  # the links found below one are added, so that what is real comes first
        if top != tops[0]:
            if (linked := _identity(top)) in seen:
                continue
            seen.add(linked)
        links = []
        for folder, folders, names in os.walk(top):
            real = []
            for name in folders:
                path = os.path.join(folder, name)
                if name.startswith("."):
                    continue
                if os.path.islink(path):
                    links.append(path)
                elif (identity := _identity(path)) not in seen:
                    seen.add(identity)
                    real.append(name)
            folders[:] = real
            where = Path(folder).relative_to(source).as_posix()
            found += [name if where == "." else f"{where}/{name}" for name in names if not name.startswith(".")]
        tops += sorted(links)
    yield from sorted(found)


def _identity(folder: str | Path) -> tuple[int, int] | str:
    """What tells a folder from others however it is reached; its path if it cannot be asked."""
    try:
        found = os.stat(folder)
    except OSError:
        return str(folder)
    return found.st_dev, found.st_ino


def _match(card: DatasetCard, image: str, mask: str, files: list[str]) -> tuple[list[Pair], list[Skipped]]:
    expression = _expression(image, {})
    candidates = [(file, found.groupdict()) for file in files if (found := expression.fullmatch(file))]
    fitting, several = _readings(mask, files)
    owner = _owners(candidates, mask, fitting, several)
    masks: dict[str, list[tuple[str, str]]] = {}
    for other, (_, file, target) in sorted(owner.items()):
        masks.setdefault(file, []).append((other, " ".join(re.split(r"[_+\s]+", target)).strip()))
    pairs, skipped = [], []
    for file, words in candidates:
        if file in owner and file not in masks:
            continue  # a mask whose name looks like an image's
        if file not in masks:
            skipped.append(Skipped(file, "no mask of this image", damaged=False))
            continue
        try:
            pairs.append(_pair(card, file, words, masks[file]))
        except BadDataError as error:
            skipped.append(Skipped(file, str(error)))
    images = {file for file, _ in candidates}
    skipped += [
        Skipped(file, "no image of this mask")
        for file in files
        if file in fitting and file not in owner and file not in images
    ]
    return pairs, skipped


def _readings(mask: str, files: list[str]) -> tuple[dict[str, dict[str, str]], list[str]]:
    """The words of every file that fits a mask pattern, and those of the files that fit it in several ways."""
    longest, shortest = _expression(mask, {}), _expression(mask, {}, lazy=True)
    fitting, several = {}, []
    for file in files:
        if (found := longest.fullmatch(file)) is None:
            continue
        fitting[file] = found.groupdict()
        # the first and the last way in the order of their fields' lengths: the same only if there is no other
        other = shortest.fullmatch(file)
        if other is None or other.groups() != found.groups():
            several.append(file)
    return fitting, several


def _owners(
    candidates: list[tuple[str, dict[str, str]]], mask: str, fitting: dict[str, dict[str, str]], several: list[str]
) -> dict[str, tuple[int, str, str]]:
    """Whose each mask file is: the length of what is fixed in its name, the image, the target.

    "a" and "a_b" may both fit a_b_c.png: the longer is meant. No image is its own mask.
    """
    shared = sorted({word for word in _FIELD.findall(mask) if word and word != "target"})
    best: dict[tuple[str, ...], list[tuple[int, str]]] = {}  # of the images with these words, the first two
    owner: dict[str, tuple[int, str, str]] = {}
    for file, words in candidates:
        length = sum(map(len, words.values()))
        key = tuple(words[word] for word in shared)
        best[key] = sorted([*best.get(key, ()), (length, file)], reverse=True)[:2]
        if not several:
            continue
        filled: re.Pattern[str] | None = None
        for other in _starting(several, _beginning(mask, words)):
            if other == file:
                continue
            texts = fitting[other]
            if any(words[word] != texts[word] for word in shared):
                filled = filled or _expression(mask, words)
                found = filled.fullmatch(other)
                if found is None:
                    continue
                texts = found.groupdict()
            owner[other] = max(owner.get(other, (-1, "", "")), (length, file, texts.get("target") or ""))
    for other in fitting.keys() - set(several):
        texts = fitting[other]
        for length, file in best.get(tuple(texts[word] for word in shared), ()):
            if file != other:
                owner[other] = (length, file, texts.get("target") or "")
                break
    return owner


def _pair(card: DatasetCard, file: str, words: dict[str, str], masks: list[tuple[str, str]]) -> Pair:
    split = words.get("split")
    if split is not None:
        split = _SPLIT_NAMES.get(split.casefold(), split.casefold())
        if split not in SPLITS:
            raise BadDataError(f"split {words['split']!r}; wanted train, val or test")
    stem = file.rsplit("/", 1)[-1].removesuffix(".gz").rsplit(".", 1)[0]
    own = "_".join(text for word, text in words.items() if word not in ("patient", "split")) or stem
    patient, name = identify(stem, card.patient, otherwise=words.get("patient") or own)
    return Pair(file, tuple(masks), patient, name if name != safe(stem) else safe(own), split)


def _expression(pattern: str, words: dict[str, str], *, lazy: bool = False) -> re.Pattern[str]:
    """The regular expression of a pattern with the words that are known filled in; each field takes all it can.

    Lazily it takes as little. Every field is a group, named if it is a word.
    """
    little = "?" if lazy else ""
    out, end = [], 0
    seen: set[str] = set()
    for found in _FIELD.finditer(pattern):
        out.append(re.escape(pattern[end : found.start()]))
        word, end = found.group(1), found.end()
        if not word:
            out.append(f"([^/]*{little})")
        elif word in words:
            out.append(re.escape(words[word]))
        elif word in seen:
            out.append(f"(?P={word})")
        else:
            out.append(f"(?P<{word}>[^/]+{little})")
            seen.add(word)
    return re.compile("".join(out) + re.escape(pattern[end:]))


def _beginning(pattern: str, words: dict[str, str]) -> str:
    """The text that every file of a pattern begins with."""
    out, end = "", 0
    for found in _FIELD.finditer(pattern):
        out += pattern[end : found.start()]
        word = found.group(1)
        if not word or word not in words:
            return out
        out, end = out + words[word], found.end()
    return out + pattern[end:]


def _starting(files: list[str], start: str) -> Iterator[str]:
    for index in range(bisect_left(files, start), len(files)):
        if not files[index].startswith(start):
            return
        yield files[index]
