"""The report's pictures: which cases are shown, and their episodes as vector drawings over one image a case."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from medseg_gym.episodes import decode_mask
from medseg_gym.filmstrip import Region, action_text, focus, in_force, signed
from medseg_gym.frames import Letterbox
from medseg_gym.render import contours
from medseg_gym.types import Box, Click, Episode, Image, Mask, Prompt, Sample, Turn, Unreadable

UNITS = 1000  # drawings are squares of this many units, whatever the image's size
ROUNDS = (("median", 0.5), ("worst", 1.0), ("best", 0.0), ("upper quarter", 0.25), ("lower quarter", 0.75))
LONGEST_TEXT = 4000  # characters of a completion that are kept


@dataclass(frozen=True, slots=True)
class Score:
    """What the choice of cases looks at: a case's mean final Dice over all policies."""

    key: str
    structure: str
    mean: float


@dataclass(frozen=True, slots=True)
class Mark:
    """A prompt in drawing units."""

    kind: str  # "positive", "negative" or "box"
    number: int
    new: bool
    x: int
    y: int
    width: int = 0
    height: int = 0


@dataclass(frozen=True, slots=True)
class Frame:
    """One turn: what was done, and how it stood afterwards."""

    turn: int
    action: str
    kind: str  # the action's class, for its looks
    mask: str  # SVG path
    marks: tuple[Mark, ...]
    iou: float
    change: float
    dice: float
    reward: float
    terms: tuple[tuple[str, str], ...]  # name, signed value; those that round to zero left out
    text: str
    alt: str
    beyond: bool  # the mask or a prompt reaches out of the part shown


@dataclass(frozen=True, slots=True)
class Strip:
    """One episode of a case."""

    label: str
    style: int
    score: float  # final Dice; 0 where the episode counts as 0
    ended: str
    error: str
    actions: int
    frames: tuple[Frame, ...]


@dataclass(frozen=True, slots=True)
class Case:
    """One case with an episode a policy."""

    number: int
    dataset: str
    key: str
    structure: str
    instruction: str
    patient: str
    reasons: tuple[str, ...]
    mean: float
    spread: float  # best minus worst final Dice: where policies differ
    picture: str  # data URLs; "" without the dataset
    overview: str
    window: tuple[int, int, int, int] | None  # x, y, width, height of the picture inside the overview
    target: str  # SVG paths
    target_overview: str
    strips: tuple[Strip, ...]
    nbytes: int


def pick(scores: Sequence[Score], count: int) -> dict[str, list[str]]:
    """Keys to show, best Dice first within each reason, with the reasons: a fixed rule, so that nobody chooses.

    First the median, best and worst case of all; then, structure by structure in turns, each one's median, worst, best,
    quarter and three-quarter cases; then the rest in order of their score. Ties go to the earlier case.
    """
    ranked = sorted(scores, key=lambda score: -score.mean)
    chosen: dict[str, list[str]] = {}

    def take(score: Score, reason: str) -> None:
        if score.key in chosen:
            chosen[score.key].append(reason)
        elif len(chosen) < count:
            chosen[score.key] = [reason]

    if ranked:
        for name, place in (("median", 0.5), ("best", 0.0), ("worst", 1.0)):
            take(_at(ranked, place), f"{name} of all")
    by_structure: dict[str, list[Score]] = {}
    for score in ranked:
        by_structure.setdefault(score.structure, []).append(score)
    if len(by_structure) > 1:
        for name, place in ROUNDS:
            for structure in sorted(by_structure):
                if len(chosen) == count:
                    break
                take(_at(by_structure[structure], place), f"{name} of {structure}")
    evenly = [round(float(place) * (len(ranked) - 1)) for place in np.linspace(0, 1, max(count, 2))] if ranked else []
    for position in (*evenly, *range(len(ranked))):
        if ranked[position].key not in chosen:
            take(ranked[position], f"rank {position + 1} of {len(ranked)}")
    return chosen


def _at(ranked: Sequence[Score], place: float) -> Score:
    return ranked[round(place * (len(ranked) - 1))]


def final_score(episode: Episode) -> float:
    """The episode's last Dice; failed and unreadable episodes count 0."""
    return 0.0 if episode.ended in ("failed", "unreadable") or not episode.dice else episode.dice[-1]


def draw_case(
    number: int,
    dataset: str,
    reasons: Sequence[str],
    episodes: Sequence[tuple[str, int, Episode]],
    sample: Sample | None,
) -> Case:
    """The case of these (label, style, episode) rows; without a sample the prompts and masks are drawn on black."""
    first = episodes[0][2]
    masks = [[decode_mask(turn.mask) for turn in episode.turns] for _, _, episode in episodes]
    shape = _shape(sample, masks)
    region = _region(shape, masks, [episode for _, _, episode in episodes], sample)
    zoomed = (region.x2 - region.x1, region.y2 - region.y1) != (shape[1], shape[0])
    whole = Region(0, 0, shape[1], shape[0])
    strips = tuple(
        _strip(label, style, episode, of_episode, region)
        for (label, style, episode), of_episode in zip(episodes, masks, strict=True)
    )
    scores = [strip.score for strip in strips]
    picture = overview = target = target_overview = ""
    if sample is not None:
        picture = _data_url(region.cut(sample.image), 288, 576)
        overview = _data_url(sample.image, 288, 320) if zoomed else picture
        target = svg_path(region.cut(sample.target))
        target_overview = svg_path(sample.target) if zoomed else target
    drawn = sum(len(frame.mask) + 60 * len(frame.marks) + len(frame.text) + 900 for s in strips for frame in s.frames)
    return Case(
        number=number,
        dataset=dataset,
        key=first.key,
        structure=first.structure,
        instruction=first.instruction,
        patient=first.patient,
        reasons=tuple(reasons),
        mean=sum(scores) / len(scores),
        spread=max(scores) - min(scores),
        picture=picture,
        overview=overview,
        window=_window(region, whole) if zoomed else None,
        target=target,
        target_overview=target_overview,
        strips=strips,
        nbytes=len(picture) + (len(overview) if zoomed else 0) + drawn,
    )


def _region(
    shape: tuple[int, int], masks: Sequence[Sequence[Mask]], episodes: Sequence[Episode], sample: Sample | None
) -> Region:
    """The square around all masks and prompts, but never wider than three targets: a spill would hide small ones."""
    shown = [mask for of_episode in masks for mask in of_episode]
    prompts = [turn.action for episode in episodes for turn in episode.turns if isinstance(turn.action, Click | Box)]
    if sample is None or not sample.target.any():
        return focus(shape, shown, prompts, margin=0.2)
    everything = focus(shape, [*shown, sample.target], prompts, margin=0.2)
    closer = focus(shape, [sample.target], (), margin=1.0)
    return min(everything, closer, key=lambda region: max(region.x2 - region.x1, region.y2 - region.y1))


def _shape(sample: Sample | None, masks: Sequence[Sequence[Mask]]) -> tuple[int, int]:
    if sample is not None:
        return sample.target.shape[0], sample.target.shape[1]
    for of_episode in masks:
        for mask in of_episode:
            return mask.shape[0], mask.shape[1]
    return 1, 1


def _strip(label: str, style: int, episode: Episode, masks: Sequence[Mask], region: Region) -> Strip:
    states = in_force([turn.action for turn in episode.turns])
    frames = tuple(
        _frame(number, episode, turn, mask, in_effect, numbers, region)
        for number, (turn, mask, (in_effect, numbers)) in enumerate(
            zip(episode.turns, masks, states, strict=True), start=1
        )
    )
    return Strip(label, style, final_score(episode), episode.ended, episode.error, len(episode.turns), frames)


def _frame(
    number: int,
    episode: Episode,
    turn: Turn,
    mask: Mask,
    prompts: Sequence[Prompt],
    numbers: Sequence[int],
    region: Region,
) -> Frame:
    action, text = turn.action, turn.text
    iou, before = episode.iou[number], episode.iou[number - 1]
    inside = region.cut(mask)
    beyond = np.count_nonzero(inside) < np.count_nonzero(mask) or any(not region.holds(prompt) for prompt in prompts)
    if isinstance(action, Unreadable):
        text = f"[unreadable: {action.reason}]\n{text}"
    if len(text) > LONGEST_TEXT:
        text = text[:LONGEST_TEXT] + f"\n… {len(text) - LONGEST_TEXT} more characters"
    return Frame(
        turn=number,
        action=action_text(action),
        kind=type(action).__name__.lower(),
        mask=svg_path(inside),
        marks=tuple(
            _mark(region.shift(prompt), n, n == number, region) for prompt, n in zip(prompts, numbers, strict=True)
        ),
        iou=iou,
        change=iou - before,
        dice=episode.dice[number],
        reward=turn.reward,
        terms=tuple((name, signed(value)) for name, value in turn.terms.items() if signed(value) != "0.00"),
        text=text,
        alt=f"{episode.policy} on {episode.structure}, turn {number}: {action_text(action)}, IoU {iou:.2f}",
        beyond=bool(beyond),
    )


def _mark(prompt: Prompt, number: int, new: bool, region: Region) -> Mark:
    letterbox = Letterbox(region.y2 - region.y1, region.x2 - region.x1, UNITS)
    if isinstance(prompt, Click):
        x, y = letterbox.to_view(prompt.x + 0.5, prompt.y + 0.5)
        return Mark("positive" if prompt.positive else "negative", number, new, round(x), round(y))
    left, top = letterbox.to_view(prompt.x1, prompt.y1)
    right, bottom = letterbox.to_view(prompt.x2 + 1, prompt.y2 + 1)
    return Mark("box", number, new, round(left), round(top), max(round(right - left), 1), max(round(bottom - top), 1))


def _window(region: Region, whole: Region) -> tuple[int, int, int, int]:
    letterbox = Letterbox(whole.y2, whole.x2, UNITS)
    left, top = letterbox.to_view(region.x1, region.y1)
    right, bottom = letterbox.to_view(region.x2, region.y2)
    return round(left), round(top), round(right - left), round(bottom - top)


def svg_path(mask: Mask) -> str:
    """The mask's outline, holes included, in drawing units; simplified by at most a thousandth of the side."""
    import cv2

    letterbox = Letterbox(mask.shape[0], mask.shape[1], UNITS // 4)
    pieces = []
    for loop in contours(mask, letterbox, scale=4):
        fine = cv2.approxPolyDP(loop.astype(np.float32), 0.9, True)
        if len(fine) > 2 or len(loop) <= 2:
            pieces.append(_loop(np.round(fine[:, 0]).astype(int)))
    return "".join(pieces)


def _loop(points: NDArray[np.int_]) -> str:
    """Relative steps: half the bytes of positions. A minus sign separates numbers by itself."""
    steps = " ".join(f"{dx} {dy}" for dx, dy in np.diff(points, axis=0).tolist()).replace(" -", "-")
    start = f"M{points[0][0]} {points[0][1]}"
    return f"{start}l{steps}z" if steps else f"{start}h1v1h-1z"


def _data_url(image: Image, least: int, most: int) -> str:
    """A letterboxed WebP of the image's own size, within these bounds."""
    import cv2

    side = min(max(*image.shape[:2], least), most)
    view = Letterbox(image.shape[0], image.shape[1], side).view_image(image)
    done, data = cv2.imencode(".webp", cv2.cvtColor(view, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_WEBP_QUALITY, 82])
    if not done:
        raise RuntimeError("OpenCV wrote no WebP")
    return "data:image/webp;base64," + base64.b64encode(data.tobytes()).decode("ascii")
