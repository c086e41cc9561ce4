"""Colour photograph of the retina: vessel tree, optic disc with its cup, macula."""

# ruff: noqa: RUF005 - a tuple added to an array shifts it; nothing is concatenated

from __future__ import annotations

import cv2
import numpy as np

from medseg_gym.datasets.phantoms.draw import (
    Field,
    Lines,
    Scene,
    Sheet,
    blob,
    blur,
    branches,
    colour,
    distance,
    frame,
    grain,
    noise,
    smoothstep,
    spline,
    tapered,
)

FIELD = 0.95  # radius of the camera's round field


def render(rng: np.random.Generator, size: int, difficulty: float, absent: frozenset[str]) -> Scene:
    """A right or left eye; where disc and cup are absent the vessels still meet, in pale retina without a rim."""
    x, y = frame(size)
    side = rng.choice([-1.0, 1.0])  # where the disc is; the macula is on the other side
    disc = np.array([side * rng.uniform(0.36, 0.52), rng.uniform(-0.10, 0.06)])
    macula = disc + (-side * rng.uniform(0.66, 0.78), rng.uniform(0.04, 0.14))
    radius = rng.uniform(0.125, 0.165) * (1 + rng.normal(0, 0.06) * difficulty)
    ratio = rng.uniform(0.32, 0.72)
    tall = rng.uniform(1.02, 1.16)
    rim = blob(rng, disc, radius, radius * tall, 0, 0.015 + 0.03 * difficulty)
    shift = rng.normal(0, 0.015, 2) * radius / 0.15
    cup = blob(rng, (disc + shift), radius * ratio, radius * ratio * tall, 0, 0.03 + 0.05 * difficulty)

    red, green, blue = _retina(rng, x, y, disc, macula, difficulty)
    sheet = Sheet(size, 0.0)
    contrast = np.float32(1.35 - 0.6 * difficulty)
    in_disc, in_cup = sheet.region(rim), sheet.region(cup)
    streaks, dark = (1 + 0.05 * noise(rng, size, 40)) * contrast, rng.uniform(0.6, 1.0)
    if "optic disc" not in absent:
        soft = blur(in_disc.astype(np.float32), 1.3 + 1.2 * difficulty)
        depth = blur(in_cup.astype(np.float32), 1.8 + 1.6 * difficulty)
        halo = blur(soft, 5) * (1 - soft) * dark
        soft, depth = soft * streaks, depth * streaks
        for channel, lift, deep, ring in ((red, 0.22, 0.13, 0.10), (green, 0.27, 0.26, 0.05), (blue, 0.11, 0.24, 0.03)):
            channel += lift * soft + deep * depth - ring * halo
    else:
        in_disc, in_cup = np.zeros_like(in_disc), np.zeros_like(in_cup)
        pale = np.exp(distance(x - float(disc[0]), y - float(disc[1])) ** 2 / -0.05)
        green += np.float32(0.03) * pale

    arteries, veins = _tree(rng, disc, macula, side)
    thin = sheet.layer(arteries, 0.45)
    thick = sheet.layer(veins, 0.45)
    shine = sheet.layer([(p, w) for p, w in arteries + veins if w.mean() > 0.016], 0.3, 0.3)
    fade = (1.0 - 0.35 * difficulty) * (1 - 0.35 * blur(in_disc.astype(np.float32), 2))
    thin, thick = thin * fade, thick * fade
    red *= 1 - 0.15 * thin - 0.29 * thick
    green *= 1 - 0.42 * thin - 0.58 * thick
    blue *= 1 - 0.34 * thin - 0.42 * thick
    red += 0.07 * shine
    green += 0.045 * shine

    _lesions(rng, sheet, disc, macula, difficulty, red, green, blue)
    middle = distance(x, y)
    light = 1.06 - 0.42 * smoothstep(0.35, 1.05, distance(x - rng.normal(0, 0.12), y - rng.normal(0, 0.12)))
    light *= 1 + (0.03 + 0.07 * difficulty) * noise(rng, size, 4)
    light *= smoothstep(FIELD, FIELD - 0.02, middle)
    height = rng.choice([0.86, 1.0])
    light[np.abs(y[:, 0]) > height] = 0
    speckle = grain(rng, size, 0.6) * np.float32(0.007 + 0.019 * difficulty)
    tint = noise(rng, size, 90) * np.float32(0.004 + 0.006 * difficulty)
    image = colour([red, green, blue], 0.5 + 0.5 * difficulty, light, speckle, tint)
    inside = middle < FIELD - 0.02
    return Scene(image, {"optic disc": in_disc & inside, "optic cup": in_cup & in_disc & inside}, None)


def _retina(
    rng: np.random.Generator, x: Field, y: Field, disc: np.ndarray, macula: np.ndarray, difficulty: float
) -> list[Field]:
    """The three channels of the bare retina: tone, choroid, macula, sheen of the nerve fibres."""
    size = x.shape[0]
    tone = (np.array([0.80, 0.40, 0.20]) * rng.uniform(0.92, 1.08, 3) * rng.uniform(0.86, 1.06)).tolist()
    tigroid = np.abs(noise(rng, size, 24))
    cloud = noise(rng, size, 6) * np.float32(0.03)
    dx: Field = x - float(macula[0])  # a NumPy float64 would turn the whole field into float64
    dy: Field = y - float(macula[1])
    far = dx * dx + dy * dy
    fovea = np.exp(far / -0.029) + 0.7 * np.exp(far / -0.0025)
    from_x: Field = x - float(disc[0])
    from_y: Field = y - float(disc[1])
    sheen: Field = np.exp((distance(0.9 * from_x, from_y) - 0.34) ** 2 / -0.045)
    depth = rng.uniform(0.02, 0.09)
    channels: list[Field] = [
        level * (1 + shade * cloud - depth * stripe * tigroid - dark * fovea + glow * sheen)
        for level, shade, stripe, dark, glow in (
            (tone[0], 1.0, 0.4, 0.10, 0.02),
            (tone[1], 1.4, 1.0, 0.26, 0.10),
            (tone[2], 1.0, 1.1, 0.30, 0.12),
        )
    ]
    return channels


def _tree(rng: np.random.Generator, disc: np.ndarray, macula: np.ndarray, side: float) -> tuple[Lines, Lines]:
    """Arteries and veins: four arcades leave the disc, the temporal two arch about the macula; each branches."""
    arches, nasal, small = [], [], []
    for kind, up in ((0, -1.0), (0, 1.0), (1, -1.0), (1, 1.0)):
        spread = rng.uniform(0.44, 0.54) + 0.09 * kind
        start = disc + (side * rng.uniform(0, 0.03) + rng.normal(0, 0.01), up * 0.01)
        arch = np.array([
            start,
            disc + (side * (0.01 - 0.05 * kind), up * spread * 0.46),
            disc + (-side * 0.15, up * spread * 0.84),
            (disc + macula) / 2 + (-side * 0.03, up * spread * 1.05),
            macula + (-side * 0.12, up * spread * 0.82),
            macula + (-side * 0.44, up * spread * rng.uniform(0.35, 0.6)),
        ])  # fmt: skip
        arch[2:] += rng.normal(0, 0.022, (4, 2))
        arches.append(arch)
        reach = rng.uniform(0.8, 1.1)
        fan = np.array([
            (0.11, rng.uniform(0.13, 0.20)),
            (0.28, rng.uniform(0.26, 0.40) * reach),
            (0.56, rng.uniform(0.44, 0.70) * reach),
        ])  # fmt: skip
        nasal.append([start, *(disc + fan * (side, up))])
    for _ in range(6):  # small ones, straight towards the macula
        end = disc + (macula - disc) * rng.uniform(0.40, 0.64) + (0, rng.choice([-1, 1]) * rng.uniform(0.05, 0.17))
        small.append([disc, (disc + end) / 2 + rng.normal(0, 0.03, 2), end])
    wide = np.array([0.021, 0.021, 0.029, 0.029]) * rng.uniform(0.92, 1.1)
    main = spline(np.array(arches), closed=False, steps=8)
    main = main + np.cumsum(rng.normal(0, 0.004, main.shape), 1) * np.linspace(0, 1, main.shape[1])[:, None]
    other = spline(np.array(nasal), closed=False, steps=8)
    both: Lines = [(spline(np.array(small), closed=False), np.full(6, 0.008))]
    for paths, widths, counts in ((main, wide, (9, 3)), (other, wide * 0.8, (5, 2))):
        both += tapered(paths, widths, 0.35, 5)
        first = branches(rng, paths, widths, counts[0], (0.22, 0.52))
        both += tapered(*first, pieces=2)
        both.append(branches(rng, *first, counts[1], (0.10, 0.24)))
    # Everything was laid out with the arteries in the first half and the veins in the second.
    halves = [(paths, widths, len(paths) // 2) for paths, widths in both]
    return [(p[:n], w[:n]) for p, w, n in halves], [(p[n:], w[n:]) for p, w, n in halves]


def _lesions(
    rng: np.random.Generator,
    sheet: Sheet,
    disc: np.ndarray,
    macula: np.ndarray,
    difficulty: float,
    red: Field,
    green: Field,
    blue: Field,
) -> None:
    """Some eyes have exudates and small bleedings: bright and dark spots that are not the disc."""
    if rng.random() > 0.25 + 0.4 * difficulty:
        return
    for dark in (False, True):
        spots = np.zeros((sheet.size, sheet.size), np.uint8)
        count = int(rng.integers(4, 14))
        for _ in range(count):
            at = macula + rng.normal(0, 0.26, 2)
            if np.hypot(*(at - disc)) < 0.26:
                continue
            r = rng.uniform(0.008, 0.028)
            points = sheet.pixels(blob(rng, at, r, r * rng.uniform(0.6, 1), rng.uniform(0, 3), 0.15, 14))
            cv2.fillPoly(spots, [points], 255, cv2.LINE_AA, 4)
        soft: Field = blur(spots.astype(np.float32) * np.float32(1 / 255), 0.5)
        if dark:
            red -= soft * 0.22
            green -= soft * 0.20
            blue -= soft * 0.09
        else:
            red += soft * 0.12
            green += soft * 0.30
            blue += soft * 0.12
