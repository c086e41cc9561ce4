"""Cine heart MR, short axis: bright blood, dark muscle; the right ventricle is on the image's left."""

# ruff: noqa: RUF005 - a tuple added to an array shifts it; nothing is concatenated

from __future__ import annotations

import cv2
import numpy as np

from medseg_gym.datasets.phantoms.draw import (
    Contour,
    Scene,
    Sheet,
    Warp,
    blob,
    blur,
    branches,
    distance,
    frame,
    grain,
    grey,
    noise,
    oval,
    rotation,
    spline,
    tapered,
    wandering,
    wobbly,
)

POOL, RING, RIGHT = 1, 2, 3
LABELS = {"left ventricle": POOL, "myocardium": RING, "right ventricle": RIGHT}
LUNG, FAT, MUSCLE, BLOOD, LIVER, BONE = 0.05, 0.80, 0.27, 0.88, 0.34, 0.42

_MEDIASTINUM = [
    (-0.16, -0.75), (0.20, -0.75), (0.26, -0.40), (0.46, -0.10), (0.42, 0.30), (0.36, 1.1), (-0.38, 1.1), (-0.50, 0.2),
    (-0.34, -0.28), (-0.20, -0.5),
]  # fmt: skip
_DIAPHRAGM = [(-1.3, 0.10), (-0.86, -0.02), (-0.50, 0.06), (-0.20, 0.12), (0.10, 0.14), (0.36, 0.22), (0.30, 0.36)]
_UNDERSIDE = [(0.0, 0.84), (-0.30, 0.98), (-0.5, 1.3), (-1.3, 1.3)]
_CRESCENT = [
    (-0.10, -1.00), (-0.62, -1.20), (-1.16, -0.98), (-1.56, -0.48), (-1.66, 0.08), (-1.46, 0.52), (-1.08, 0.80),
    (-0.66, 0.88), (-0.50, 0.3), (-0.42, -0.4),
]  # fmt: skip


def render(rng: np.random.Generator, size: int, difficulty: float, absent: frozenset[str]) -> Scene:
    """One slice of a steady-state cine; the papillary muscles count as blood pool, as in the public data sets."""
    spacing = rng.uniform(300, 360) * 0.72 / size
    sheet = Sheet(size, LUNG, Warp(rng, 0.03 + 0.03 * difficulty), turn=rng.normal(0, 0.06))
    _chest(rng, sheet)
    _heart(rng, sheet, difficulty, absent)
    values = sheet.values * (1 + noise(rng, size, 18) * 0.05) + noise(rng, size, 40) * 0.012
    values = blur(values, 0.95)
    x, y = frame(size)
    way = rng.uniform(-0.5, 0.5)
    coil = 1.16 - (0.30 + 0.30 * difficulty) * (y + way * x + 0.35) * 0.8  # the coil lies on the chest: top is brighter
    values = values * np.clip(coil + 0.06 * noise(rng, size, 3), 0.25, 1.8)
    level = np.float32(0.016 + 0.055 * difficulty)  # noise of both channels of the magnitude: Rician
    values = distance(values + level * grain(rng, size, 0.45), level * grain(rng, size, 0.45))
    targets = {name: sheet.labels == label for name, label in LABELS.items()}
    return Scene(grey(values * 0.94), targets, (spacing, spacing))


def _chest(rng: np.random.Generator, sheet: Sheet) -> None:
    """Wall, lungs, liver, spine: what lies about the heart."""
    top = rng.uniform(-0.92, -0.80)
    fat = rng.uniform(0.04, 0.10)
    wall = oval((0.0, 1.02 + top), 1.45, 1.04, power=2.3, points=90)
    sheet.values[:] = 0.02
    sheet.fill(wall, FAT)
    sheet.fill(wall + (0, fat), MUSCLE)
    sheet.fill(wall * (0.98, 1) + (0, fat + 0.03), FAT - 0.25)
    sheet.fill(wall * (0.96, 1) + (0, fat + 0.055), MUSCLE - 0.03)
    sheet.fill(wall * (0.94, 1) + (0, fat + 0.11), FAT - 0.35)
    for k in np.arange(-3, 4):  # cartilage of the ribs
        at = np.array([k * 0.29 + rng.normal(0, 0.02), top + fat + 0.065 + 0.048 * k**2])
        sheet.fill(oval(at, 0.085, 0.020, turn=0.33 * k, points=24), BONE + 0.06)
    sheet.fill(oval((0.03, top + fat + 0.075), 0.12, 0.035, points=30), BONE + 0.12)  # sternum
    lungs = wall * (0.93, 1) + (0, fat + 0.13)
    inside = sheet.region(lungs)
    sheet.values[inside] = LUNG
    sheet.fill(spline(np.array(_MEDIASTINUM)), FAT - 0.36, inside=inside)
    sheet.values += noise(rng, sheet.size, 12) * (np.abs(sheet.values - (FAT - 0.36)) < 0.01) * np.float32(0.04)
    sides = np.array([-1, -1, 1, 1, 1])[:, None] * (1, 0) + (0, 1)
    ends = np.stack([rng.uniform((0.5, -0.1), (0.5, 0.2), (5, 2)), rng.uniform((0.85, -0.5), (1.1, 0.4), (5, 2))], 1)
    ends *= sides[:, None]
    paths = wandering(rng, ends, 9, 0.015)
    widths = rng.uniform(0.016, 0.030, 5)
    twigs = branches(rng, paths, widths, 4, (0.12, 0.26))
    vessels = [*tapered(paths, widths), twigs, branches(rng, *twigs, 2, (0.06, 0.14), thinner=(0.6, 0.9))]
    sheet.values += sheet.layer(vessels, 0.6) * inside * (sheet.values < 0.2) * np.float32(0.24)
    dome = rng.uniform(0.20, 0.40)
    liver = spline(np.array([(x, dome + y) for x, y in _DIAPHRAGM] + _UNDERSIDE))
    sheet.fill(liver, LIVER)
    in_liver = sheet.region(liver)
    starts = rng.uniform((-0.45, dome + 0.2), (-0.2, 0.8), (4, 2))
    ends = np.stack([starts, rng.uniform((-1.1, dome + 0.1), (-0.6, 1.0), (4, 2))], 1)
    paths = wandering(rng, ends, 9, 0.012)
    widths = rng.uniform(0.016, 0.034, 4)
    veins = [*tapered(paths, widths), branches(rng, paths, widths, 3, (0.10, 0.25))]
    sheet.values += sheet.layer(veins, 0.5) * in_liver * np.float32(0.26)
    stomach = blob(rng, (0.62, 0.66 + rng.uniform(-0.02, 0.08)), 0.27, 0.19, 0.3, 0.08)
    sheet.fill(stomach, 0.24)
    sheet.fill((stomach - (0.62, 0.68)) * 0.86 + (0.62, 0.68), rng.choice([0.04, 0.5, 0.62]))
    sheet.fill(oval((0.02, 1.02), 0.34, 0.22), MUSCLE + 0.02)
    sheet.fill(oval((0.0, 0.90), 0.17, 0.13, power=2.6), BONE)
    sheet.fill(oval((0.21, 0.80), 0.075, 0.075), MUSCLE)
    sheet.fill(oval((0.21, 0.80), 0.064, 0.064), BLOOD - 0.04)  # descending aorta
    sheet.fill(oval((-0.24, 0.66), 0.075, 0.055, 0.3), BLOOD - 0.15)  # inferior vena cava


def _heart(rng: np.random.Generator, sheet: Sheet, difficulty: float, absent: frozenset[str]) -> None:
    """Pericardial fat, right ventricle, muscle ring, blood pool with papillary muscles."""
    at = np.array([0.10, -0.02]) + rng.normal(0, 0.03, 2)
    pool = rng.uniform(0.175, 0.25) * (1 + rng.normal(0, 0.12) * difficulty)
    wall = rng.uniform(0.095, 0.135) * (1 + rng.normal(0, 0.12) * difficulty)
    squash = rng.uniform(0.92, 1.06)
    turn = rotation(rng.normal(0.12, 0.14))
    unit = oval((0, 0), 1, 1, points=96)
    endo = unit * (pool, pool * squash) * wobbly(rng, 96, 0.02 + 0.035 * difficulty)[:, None]
    way = np.arctan2(unit[:, 1], unit[:, 0])
    thick = wall * (1 + 0.13 * np.cos(way - np.pi + 0.4)) * wobbly(rng, 96, 0.03 + 0.05 * difficulty)
    epi = endo + unit * thick[:, None]
    r = pool + wall
    # The right ventricle wraps the septum: a crescent, its horns where the walls meet.
    wide = rng.uniform(0.85, 1.25)
    crescent = np.array(_CRESCENT) * r
    crescent[2:6, 0] *= wide
    rv = spline(crescent + rng.normal(0, 0.010 + 0.010 * difficulty, crescent.shape))
    sac = np.concatenate([rv, epi])
    fat = rng.uniform(1.10, 1.20)
    columns = rng.uniform([(0.5, 0.50, 0.16), (-1.0, 0.50, 0.13)], [(1.1, 0.66, 0.22), (-0.35, 0.66, 0.20)]).tolist()
    strands = [(rng.uniform(0.82, 1.0), rng.uniform(0, 2 * np.pi), rng.uniform(0.012, 0.022)) for _ in range(9)]
    bars = rng.uniform((-1.55, -0.8), (-0.75, 0.5), (6, 2)) * r

    def put(shape: Contour) -> Contour:
        return shape @ turn + at

    hull = cv2.convexHull(sac.astype(np.float32))[:, 0].astype(float)
    middle = hull.mean(0)
    sheet.fill(put((hull - middle) * fat + middle), FAT - 0.2)
    sheet.fill(put((hull - middle) * (fat - 0.045) + middle), FAT - 0.02)
    if "right ventricle" not in absent:
        centre = rv.mean(0)
        sheet.fill(put((rv - centre) * 1.10 + centre), MUSCLE)
        sheet.fill(put(rv), BLOOD - 0.05, RIGHT)
        for bar in bars:  # trabeculae
            along = float(np.arctan2(bar[1], bar[0]))
            sheet.fill(put(oval(bar, 0.035, 0.012, along, points=16)), 0.62, RIGHT, inside=sheet.labels == RIGHT)
    if "left ventricle" in absent:
        return
    sheet.fill(put(epi), MUSCLE - 0.03, RING)
    sheet.fill(put(endo), BLOOD, POOL)
    for share, angle, width in strands:
        c = np.array([np.cos(angle), np.sin(angle)]) * pool * share
        sheet.fill(put(oval(c, width * 1.3, width, angle, points=16)), 0.60, POOL, inside=sheet.labels == POOL)
    for angle, share, width in columns:
        c = np.array([np.cos(angle), np.sin(angle)]) * pool * (share + 0.1)
        column = oval(c, width * pool * 1.15, width * pool, angle, power=2.4, points=24)
        sheet.fill(put(column), MUSCLE + 0.04, POOL, inside=sheet.labels == POOL)
