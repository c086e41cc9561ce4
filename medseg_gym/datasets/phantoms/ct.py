"""Abdomen CT, axial, seen from the feet: the patient's right is on the image's left. Drawn in Hounsfield units."""

# ruff: noqa: RUF005 - a tuple added to an array shifts it; nothing is concatenated

from __future__ import annotations

import numpy as np

from medseg_gym.datasets.phantoms.draw import (
    Contour,
    Scene,
    Sheet,
    Warp,
    blob,
    blur,
    branches,
    circle,
    grain,
    grey,
    line,
    mirrored,
    noise,
    oval,
    rotation,
    spline,
    tapered,
    wandering,
    wobbly,
)
from medseg_gym.types import Mask

LABELS = {"liver": 1, "right kidney": 2, "left kidney": 3, "spleen": 4, "aorta": 5, "stomach": 6}
WINDOW = (-150.0, 250.0)
AIR, FAT, SKIN, MUSCLE, WATER, CORTICAL = -1000.0, -105.0, 10.0, 58.0, 12.0, 700.0

_LIVER = [
    (0.20, -0.40), (-0.05, -0.56), (-0.40, -0.56), (-0.70, -0.36), (-0.86, 0.00), (-0.80, 0.22), (-0.66, 0.37),
    (-0.50, 0.30), (-0.40, 0.14), (-0.27, 0.10), (-0.20, 0.00), (-0.24, -0.11), (-0.10, -0.13), (0.02, -0.23),
    (0.16, -0.30),
]  # fmt: skip
_LIVER_VEINS = [
    [(-0.26, -0.02), (-0.70, -0.12)], [(-0.28, -0.05), (-0.60, 0.22)], [(-0.26, -0.12), (-0.46, -0.46)],
    [(-0.20, -0.20), (-0.08, -0.46)], [(-0.38, 0.08), (-0.74, 0.10)],
]  # fmt: skip
_RIDGE = [(-0.075, 0.39), (-0.03, 0.455), (-0.018, 0.56), (0.018, 0.56), (0.03, 0.455), (0.075, 0.39)]
_SPLEEN = [
    (0.58, -0.10), (0.72, -0.12), (0.86, 0.02), (0.84, 0.22), (0.68, 0.38), (0.58, 0.36), (0.62, 0.24), (0.64, 0.12),
    (0.58, 0.02),
]  # fmt: skip
_STOMACH = [
    (0.14, -0.18), (0.12, -0.32), (0.28, -0.42), (0.50, -0.38), (0.62, -0.22), (0.60, -0.04), (0.46, 0.02),
    (0.34, -0.06),
]  # fmt: skip
_PANCREAS = [
    (-0.24, 0.02), (-0.14, -0.08), (0.00, -0.07), (0.16, -0.10), (0.34, -0.04), (0.46, 0.06), (0.36, 0.08),
    (0.18, -0.01), (0.04, 0.00), (-0.10, 0.05), (-0.20, 0.09),
]  # fmt: skip


def render(rng: np.random.Generator, size: int, difficulty: float, absent: frozenset[str]) -> Scene:
    """One slice at the level of the kidneys; portal venous phase."""
    spacing = rng.uniform(340, 420) / size
    sheet = Sheet(size, AIR, Warp(rng, 0.015 + 0.04 * difficulty), turn=rng.normal(0, 0.03))
    wide = rng.uniform(0.80, 0.92)
    deep = wide * rng.uniform(0.68, 0.78)
    fat = rng.uniform(0.03, 0.10)
    cavity = _body(rng, sheet, wide, deep, fat)
    # Organs are laid out for a cavity of half axes 0.76 x 0.56 and grow with the patient's own.
    grow = np.array([(wide - fat - 0.05) / 0.76, (deep - 0.8 * fat - 0.05) / 0.56])
    phase = rng.uniform(0.55, 1.15) * (1.1 - 0.45 * difficulty)  # contrast agent: less is harder
    _bowel(rng, sheet, grow, cavity)
    _spine(rng, sheet, grow)
    _organs(rng, sheet, grow, cavity, phase, difficulty, absent)
    _vessels(rng, sheet, grow, phase, absent)
    values = sheet.values + noise(rng, size, 28) * 3
    values = blur(np.clip(values, -500, 600), 0.62)
    values += grain(rng, size, 0.62) * np.float32(5 + 20 * difficulty)
    image = grey((values - WINDOW[0]) / (WINDOW[1] - WINDOW[0]))
    return Scene(image, {name: sheet.labels == label for name, label in LABELS.items()}, (spacing, spacing))


def _body(rng: np.random.Generator, sheet: Sheet, wide: float, deep: float, fat: float) -> Mask:
    """Table, skin, fat, wall and ribs; returns the cavity's pixels."""
    x = np.linspace(-0.86, 0.86, 30)
    table = np.stack([x, deep + 0.17 - 0.13 * x**2], 1)
    sheet.stroke(table, 0.012, 60)
    sheet.stroke(table + (0, 0.055), 0.008, -60)
    pinch = 1 - 0.035 * np.exp(-((np.arccos(circle(120)[:, 1].clip(-1, 1)) / 0.28) ** 2))  # the furrow of the back

    def ring(inset: float, power: float = 2.35) -> Contour:
        return oval((0, 0.01), wide - inset, deep - 0.8 * inset, power=power, points=120) * pinch[:, None]

    sheet.fill(ring(0.0), SKIN)
    sheet.fill(ring(0.013), FAT)
    sheet.fill(ring(fat), MUSCLE)
    sheet.fill(ring(fat + 0.017), FAT + 25)
    sheet.fill(ring(fat + 0.023), MUSCLE - 5)
    inner = ring(fat + 0.055)
    sheet.fill(inner, FAT)
    cavity = sheet.region(ring(fat + 0.066))
    for side in (-1, 1):  # the recti: two straps beside the midline
        centre = (side * 0.22 * (wide - fat), 0.02 - 0.95 * (deep - 0.8 * fat))
        sheet.fill(oval(centre, 0.15, 0.030, turn=0.12 * side), MUSCLE)
    start = rng.uniform(0, 0.2)
    right = np.arange(-0.45, 1.2, 0.34) + start
    angle = np.concatenate([right, np.pi - right])
    at = np.stack([np.cos(angle), np.sin(angle)], 1)
    at *= (np.abs(at) ** 2.35).sum(1, keepdims=True) ** (-1 / 2.35)
    at *= (wide - fat - 0.034, deep - 0.8 * (fat + 0.034))
    along = np.arctan2(np.cos(angle) * deep, -np.sin(angle) * wide)
    length = rng.uniform(0.05, 0.085, len(angle))
    bones = [oval(c, k * size, t, turn=way, points=20) for k, t in ((1.0, 0.021), (0.7, 0.008))
             for c, size, way in zip(at, length, along, strict=True)]  # fmt: skip
    sheet.fill_all(np.stack(bones), np.repeat([CORTICAL, 190.0], len(angle)))
    return cavity


def _bowel(rng: np.random.Generator, sheet: Sheet, grow: np.ndarray, cavity: Mask) -> None:
    """Loops of gut with wall, content and sometimes gas, and the small vessels of the mesentery."""
    dots = rng.uniform((-0.45, -0.42), (0.6, 0.12), (26, 2)) * grow
    sheet.fill_all(circle(10) * rng.uniform(0.006, 0.014, (26, 1, 2)) + dots[:, None], rng.uniform(60, 130, 26))
    spots = [(-0.30, -0.22), (-0.12, -0.36), (0.04, -0.20), (-0.36, -0.02), (0.20, -0.02), (0.34, 0.10), (-0.12, -0.10),
             (0.10, -0.40), (0.48, 0.16), (0.62, -0.06)]  # fmt: skip
    for cx, cy in spots:
        at = (np.array([cx, cy]) + rng.normal(0, 0.03, 2)) * grow
        rx, ry = rng.uniform(0.065, 0.125), rng.uniform(0.05, 0.085)
        turn = rng.uniform(-0.7, 0.7)
        loop = blob(rng, (0, 0), rx, ry, turn, 0.1, 40)
        kind = rng.choice(4, p=(0.45, 0.2, 0.15, 0.2))
        content = (rng.uniform(15, 45), rng.uniform(120, 230), -850.0, rng.uniform(40, 70))[kind]
        sheet.fill_all(np.stack([loop, loop * 0.74]) + at, np.array([rng.uniform(70, 105), content]))
        if kind in (0, 3):  # folds and food
            dots = circle(10) * (0.015, 0.011) + at + rng.normal(0, 0.25, (3, 1, 2)) * (rx, ry)
            sheet.fill_all(dots, content + rng.normal(0, 45, 3))


def _spine(rng: np.random.Generator, sheet: Sheet, grow: np.ndarray) -> None:
    """Vertebra with bone ring, canal and processes, and the muscles about it."""
    low = np.array([0, 0.02 + 0.10 * (grow[1] - 1)])
    for flip in (lambda c: c, mirrored):
        psoas = blob(rng, (-0.195, 0.285), 0.075, 0.085, 0.3, 0.05, 36)
        back = blob(rng, (-0.165, 0.50), 0.155, 0.085, 0.12, 0.05, 40)
        square = blob(rng, (-0.36, 0.43), 0.10, 0.04, -0.35, 0.06, 36)
        sheet.fill(flip(square) + low, MUSCLE)
        sheet.fill(flip(back) + low, MUSCLE + 4)
        sheet.fill(flip(psoas) + low, MUSCLE + 6)
        streaks = oval((-0.17, 0.50), 0.030, 0.004, 0.3, points=10) + rng.uniform(-1, 1, (7, 1, 2)) * (0.10, 0.05)
        sheet.fill_all(flip(streaks) + low, rng.uniform(-60, 10, 7))
        wing = spline(np.array([(-0.05, 0.345), (-0.14, 0.345), (-0.235, 0.365), (-0.15, 0.39), (-0.06, 0.41)]))
        sheet.fill(flip(wing) + low, 430)
    width = rng.uniform(0.125, 0.145)
    ridge = spline(np.array(_RIDGE))
    sheet.fill(ridge + low, 480)
    sheet.fill(oval((0, 0.375), 0.085, 0.072) + low, 480)
    body = oval((0, 0.25), width, 0.105, power=2.4) + low
    sheet.fill(body, 520)
    marrow = (body - low - (0, 0.25)) * 0.87 + (0, 0.25) + low
    sheet.fill(marrow, rng.uniform(165, 215))
    sheet.values += noise(rng, sheet.size, 60) * sheet.region(marrow) * np.float32(24)
    sheet.fill(oval((0, 0.371), 0.057, 0.047) + low, 25)
    sheet.fill(oval((0, 0.371), 0.028, 0.024) + low, 45)


def _organs(
    rng: np.random.Generator,
    sheet: Sheet,
    grow: np.ndarray,
    cavity: Mask,
    phase: float,
    difficulty: float,
    absent: frozenset[str],
) -> None:
    jitter = 0.010 + 0.020 * difficulty

    def shape(points: list[tuple[float, float]], scale: float = 1.0) -> Contour:
        p = np.array(points)
        middle = p.mean(0)
        return spline(((p - middle) * scale + middle + rng.normal(0, jitter, p.shape)) * grow)

    liver = shape(_LIVER)
    stomach = shape(_STOMACH, rng.uniform(0.85, 1.05))
    spleen = shape(_SPLEEN, rng.uniform(0.9, 1.08))
    pancreas = shape(_PANCREAS)
    hu_liver = 62 + 52 * phase + rng.normal(0, 6)
    hu_spleen = hu_liver + rng.choice([-1, 1]) * rng.uniform(6, 26) * (1.2 - 0.7 * difficulty)
    sheet.fill(pancreas, 55 + 38 * phase, inside=cavity)
    _stomach(rng, sheet, stomach, cavity, "stomach" in absent)
    _liver(rng, sheet, liver, grow, cavity, hu_liver, difficulty, "liver" in absent)
    if "spleen" not in absent:
        rim = spleen.mean(0)
        sheet.fill((spleen - rim) * 1.06 + rim, FAT, inside=cavity)
        sheet.fill(spleen, hu_spleen, LABELS["spleen"], inside=cavity)
    for name, side in (("right kidney", -1), ("left kidney", 1)):
        _kidney(rng, sheet, grow, side, 90 + 100 * phase, difficulty, LABELS[name], name in absent)


def _stomach(rng: np.random.Generator, sheet: Sheet, contour: Contour, cavity: Mask, absent: bool) -> None:
    """Wall, fluid or oral contrast, and gas above a level: gas floats up, which is the front."""
    oral = rng.random() < 0.35
    content = rng.uniform(130, 220) if oral else rng.uniform(8, 40)
    middle = contour.mean(0)
    level = middle[1] + rng.uniform(-0.10, 0.0)
    gas = rng.random() < 0.75
    crumbs = circle(12) * (0.02, 0.014) + middle + rng.normal(0, 0.35, (9, 1, 2)) * np.ptp(contour, 0) / 2
    tones = rng.normal(0, 28, 9)
    wall = rng.uniform(80, 105)
    if absent:
        return
    label = LABELS["stomach"]
    sheet.fill((contour - middle) * 1.07 + middle, FAT, inside=cavity)
    sheet.fill(contour, wall, label, inside=cavity)
    lumen = sheet.region((contour - middle) * 0.88 + middle) & cavity
    sheet.values[lumen] = content
    for crumb, tone in zip(crumbs, tones, strict=True):
        sheet.fill(crumb, content + tone, label, inside=lumen)
    if gas:
        above = sheet.region(oval((middle[0], level - 1), 1.5, 1.0, power=12)) & lumen
        sheet.values[above] = -900


def _liver(
    rng: np.random.Generator,
    sheet: Sheet,
    contour: Contour,
    grow: np.ndarray,
    cavity: Mask,
    value: float,
    difficulty: float,
    absent: bool,
) -> None:
    """Parenchyma with portal and hepatic veins, the fissure, now and then a cyst, and the gall bladder below it."""
    ends = np.array(_LIVER_VEINS) * grow
    paths = wandering(rng, ends, 9, 0.012)
    widths = rng.uniform(0.018, 0.032, 5)
    veins = [*tapered(paths, widths, pieces=2), branches(rng, paths, widths, 3, (0.10, 0.22))]
    at = (np.array([-0.55, -0.12]) + rng.normal(0, 0.09, 2)) * grow
    spot = blob(rng, at, rng.uniform(0.025, 0.06), rng.uniform(0.025, 0.06), 0, 0.08, 30)
    cyst = rng.random() < 0.25 + 0.35 * difficulty
    gall = blob(rng, np.array([-0.32, -0.02]) * grow, rng.uniform(0.05, 0.08), rng.uniform(0.07, 0.11), 0.3, 0.05, 40)
    tone, gain = rng.uniform(-10, 40), rng.uniform(22, 42)
    if absent:
        return
    label = LABELS["liver"]
    sheet.fill(contour, value, label, inside=cavity)
    inside = sheet.labels == label
    sheet.values += sheet.layer(veins, 0.5) * inside * np.float32(gain)
    if cyst:
        sheet.values[sheet.region(spot) & inside] = tone
    cleft = spline(np.array([(-0.10, -0.13), (-0.14, -0.28), (-0.13, -0.42)]) * grow, closed=False)
    sheet.values -= sheet.layer(line(cleft, 0.016), 0.6) * inside * np.float32(110)
    sheet.fill(gall, 75, inside=cavity)
    middle = gall.mean(0)
    sheet.fill((gall - middle) * 0.86 + middle, WATER, inside=cavity)


def _kidney(
    rng: np.random.Generator,
    sheet: Sheet,
    grow: np.ndarray,
    side: int,
    cortex: float,
    difficulty: float,
    label: int,
    absent: bool,
) -> None:
    """A bean whose hilum looks to the middle and front: bright cortex, darker pyramids, fat and pelvis in the sinus."""
    angle = np.linspace(0, 2 * np.pi, 80, endpoint=False)
    hilum = -0.45 + rng.normal(0, 0.15)  # to the right in the kidney's own frame, and up
    off = np.abs((angle - hilum + np.pi) % (2 * np.pi) - np.pi)
    depth = rng.uniform(0.42, 0.58)
    radius = (1 - depth * np.exp(-((off / 0.42) ** 2))) * wobbly(rng, 80, 0.02 + 0.03 * difficulty)
    scale = rng.uniform(0.92, 1.12) * (1 + rng.normal(0, 0.10) * difficulty)
    bean = np.stack([np.cos(angle) * 0.128, np.sin(angle) * 0.158], 1) * radius[:, None] * scale
    at = np.array([-0.40, 0.27]) + rng.normal(0, 0.02, 2)
    turn = rotation(-0.35 + rng.normal(0, 0.12))
    spread = np.array([-2.2, -1.25, -0.4, 0.4, 1.25, 2.2]) * 0.72
    around = [(hilum + np.pi + k + rng.normal(0, 0.1), rng.uniform(0.026, 0.036)) for k in spread.tolist()]

    def put(shape: Contour) -> Contour:
        whole = shape @ turn + at * grow
        return whole if side < 0 else mirrored(whole)

    if absent:
        return
    sheet.fill(put(bean * 1.22), FAT)
    sheet.fill(put(bean), cortex, label)
    pyramids = []
    for way, size in around:
        centre = np.array([np.cos(way) * 0.128, np.sin(way) * 0.158]) * 0.60 * scale
        pyramids.append(put(oval(centre, size * 1.1 * scale, size * scale, way, points=16)))
    sheet.fill_all(np.stack(pyramids), np.full(6, cortex - 55), label)
    to_hilum = np.array([np.cos(hilum), np.sin(hilum)])
    sheet.fill(put(oval(to_hilum * 0.055, 0.045 * scale, 0.035 * scale, hilum, points=24)), 25 + 0.2 * cortex, label)
    sheet.fill(put(oval(to_hilum * 0.105, 0.045, 0.020, hilum, points=24)), FAT)
    sheet.fill(put(oval(to_hilum * 0.11, 0.075, 0.011, hilum, points=24)), cortex - 40)


def _vessels(rng: np.random.Generator, sheet: Sheet, grow: np.ndarray, phase: float, absent: frozenset[str]) -> None:
    """Inferior vena cava on the patient's right, aorta before the spine, and the mesenteric pair in front."""
    cava = blob(rng, np.array([-0.125, 0.125]) * grow, rng.uniform(0.055, 0.075), rng.uniform(0.038, 0.055), 0.1, 0.05)
    sheet.fill(cava, 65 + 70 * phase)
    radius = rng.uniform(0.042, 0.058)
    aorta = blob(rng, np.array([0.03 + rng.uniform(0, 0.04), 0.095]) * grow, radius, radius, 0, 0.02)
    calcified = rng.random() < 0.3
    way = rng.uniform(0, 2 * np.pi)
    if "aorta" not in absent:
        middle = aorta.mean(0)
        sheet.fill((aorta - middle) * 1.25 + middle, FAT)
        sheet.fill(aorta, 95 + 95 * phase, LABELS["aorta"])
        if calcified:
            spot = middle + 0.85 * radius * np.array([np.cos(way), np.sin(way)])
            sheet.fill(oval(spot, 0.007, 0.016, way, points=12), 500, LABELS["aorta"])
    for cx, r, tone in ((0.02, 0.020, 90 + 80 * phase), (-0.055, 0.026, 85 + 75 * phase)):
        at = np.array([cx, -0.015]) * grow
        sheet.fill(oval(at, r * 1.4, r * 1.4, points=24), FAT)
        sheet.fill(oval(at, r, r, points=24), tone)
