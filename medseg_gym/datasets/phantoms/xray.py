"""Chest X-ray, frontal: what lies on the way of the rays adds up; the patient's right is on the image's left."""

from __future__ import annotations

import cv2
import numpy as np

from medseg_gym.datasets.phantoms.draw import (
    Lines,
    Scene,
    Sheet,
    Warp,
    blur,
    branches,
    frame,
    grain,
    grey,
    line,
    mirrored,
    noise,
    oval,
    smoothstep,
    spline,
    tapered,
    wandering,
)

_RIGHT_LUNG = [
    (-0.17, -0.66), (-0.30, -0.80), (-0.46, -0.72), (-0.60, -0.46), (-0.68, -0.10), (-0.71, 0.24), (-0.70, 0.50),
    (-0.56, 0.36), (-0.38, 0.28), (-0.22, 0.32), (-0.13, 0.42), (-0.14, 0.20), (-0.15, -0.05), (-0.15, -0.40),
]  # fmt: skip
_HEART = [
    (0.00, -0.20), (0.10, -0.24), (0.19, -0.16), (0.25, -0.02), (0.37, 0.16), (0.47, 0.33), (0.45, 0.45), (0.30, 0.50),
    (0.06, 0.50), (-0.14, 0.47), (-0.22, 0.36), (-0.23, 0.16), (-0.16, -0.02), (-0.10, -0.14),
]  # fmt: skip
_TORSO = [
    (-0.17, -1.2), (-0.18, -0.92), (-0.36, -0.84), (-0.66, -0.78), (-0.86, -0.66), (-1.02, -0.34), (-1.2, 0.1),
    (-1.2, 0.9), (-1.0, 0.55), (-0.86, 0.05), (-0.83, 0.4), (-0.85, 1.2), (-0.4, 1.4),
]  # fmt: skip


def render(rng: np.random.Generator, size: int, difficulty: float, absent: frozenset[str]) -> Scene:
    """Lungs are the aerated fields beside heart and diaphragm; the heart is its whole shadow."""
    spacing = rng.uniform(360, 430) / size
    marker = rng.uniform(0.05, 0.08), rng.uniform(0.11, 0.14)
    sheet = Sheet(size, 0.0, Warp(rng, 0.012 + 0.028 * difficulty), turn=rng.normal(0, 0.02))
    grow = np.array([rng.uniform(1.00, 1.14), rng.uniform(1.00, 1.12)])
    jitter = 0.006 + 0.014 * difficulty
    half = np.array(_RIGHT_LUNG)
    right = spline((half + rng.normal(0, jitter, half.shape)) * grow)
    lower = (half[:, 1:] > 0.2) * np.array([0, 0.035])  # the left half of the diaphragm stands lower
    left = spline((mirrored(half) + lower + rng.normal(0, jitter, half.shape)) * grow)
    heart = np.array(_HEART)
    ratio = rng.uniform(0.84, 1.16)
    heart = spline((heart * (ratio, 1.0) + (0.0, -0.01) + rng.normal(0, jitter, heart.shape)) * grow)
    body = np.array(_TORSO)
    body = spline(np.concatenate([body, mirrored(body[::-1])]))

    pixels = {"left lung": sheet.region(left), "right lung": sheet.region(right), "heart": sheet.region(heart)}
    if "heart" in absent:
        pixels["heart"] = np.zeros_like(pixels["heart"])
    for name in ("left lung", "right lung"):
        pixels[name] &= ~pixels["heart"]
        if name in absent:  # a white lung: no air in that half of the chest
            pixels[name] = np.zeros_like(pixels[name])

    x, y = frame(size)
    torso = blur(sheet.region(body).astype(np.float32), 1.5)
    lungs = pixels["left lung"] | pixels["right lung"]
    air = blur(lungs.astype(np.float32), 0.9)
    flank = np.exp(((np.abs(x[:1]) - np.float32(0.84)) / np.float32(0.09)) ** 2 * -1)
    column = np.exp((x[:1] / np.float32(0.125)) ** 4 * -1)
    belly = smoothstep(0.30, 0.56, y[:, :1])
    shade = 0.60 + 0.06 * smoothstep(0.2, 0.7, y[:, :1]) + 0.10 * flank + 0.17 * column + 0.16 * belly * (1 - air)
    deep = 0.30 + 0.025 * noise(rng, size, 4) - 0.05 * smoothstep(0.0, 0.5, y[:, :1])

    # All that casts a shadow with an edge adds up on the sheet and is blurred once.
    sheet.values += pixels["heart"] * np.float32(0.15)
    sheet.add(oval((0.135 * grow[0], -0.36 * grow[1]), 0.075, 0.085), 0.10)  # aortic knob
    sheet.add(oval((-0.12 * grow[0], -0.50 * grow[1]), 0.05, 0.22), 0.03)  # superior vena cava
    gas = oval((0.36 * grow[0], 0.56 * grow[1]), rng.uniform(0.07, 0.15), rng.uniform(0.05, 0.08), -0.2)
    bubble = sheet.region(gas)
    if rng.random() < 0.8:
        sheet.values -= (bubble & ~lungs & ~pixels["heart"]) * np.float32(0.14)
    fine = _bones(rng, sheet, grow)
    shade += blur(sheet.values, 1.0) + blur(fine, 0.7) * (1 - 0.7 * belly)
    shade += air * (_hila(rng, sheet, grow) * np.float32(0.10) - deep)
    _airways(sheet, shade, grow)
    shade = shade * torso
    shade += (noise(rng, size, 9) * 0.010 + noise(rng, size, 48) * 0.006) * torso
    shade = blur(shade, 0.55)
    contrast = 1.0 - 0.35 * difficulty
    value = 0.46 + (shade - 0.56) * np.float32(1.45 * contrast)
    value = 1 / (1 + np.exp(-(value - 0.5) * np.float32(4.4)))
    value = value * smoothstep(0.0, 0.25, torso) + 0.02
    value += grain(rng, size, 0.5) * np.float32(0.008 + 0.030 * difficulty) * (0.4 + value)
    image = _marked(value, marker)
    return Scene(image, pixels, (spacing, spacing))


def _marked(value: np.ndarray, corner: tuple[float, float]) -> np.ndarray:
    """Grey picture with the radiographer's R beside the patient's right shoulder."""
    size = value.shape[0]
    image = grey(value)
    at = (round(size * corner[0]), round(size * corner[1]))
    if size >= 96:  # below that it would be a smudge
        font, stroke = cv2.FONT_HERSHEY_SIMPLEX, max(1, size // 256)
        cv2.putText(image, "R", at, font, size / 512, (235, 235, 235), stroke, cv2.LINE_AA)
    return image


def _airways(sheet: Sheet, shade: np.ndarray, grow: np.ndarray) -> None:
    """Windpipe and main bronchi: a dark Y in the middle."""
    split = np.array([0.02, -0.26]) * grow
    trachea = spline(np.array([(0.0, -1.1), (0.005, -0.7), split]), closed=False)
    bronchi = np.array([[split, (-0.09, -0.15), (-0.19, -0.06)], [split, (0.10, -0.17), (0.22, -0.11)]])
    sides = spline(bronchi, closed=False)
    shade -= sheet.layer([*line(trachea, 0.085), (sides, np.full(2, 0.055))], 1.8) * np.float32(0.10)


def _bones(rng: np.random.Generator, sheet: Sheet, grow: np.ndarray) -> np.ndarray:
    """Puts spine, shoulder blades and arms on the sheet, and returns ribs and collar bones: bright at their edges."""
    lift = rng.uniform(-0.03, 0.03)
    behind, front = [], []
    for k in range(9):
        top = -0.80 + 0.135 * k + lift
        reach = 0.40 + 0.34 * np.sqrt(min(k + 0.4, 7) / 7)
        turn = top + 0.17 + 0.008 * k  # where the rib turns to the front
        slope = top + 0.012 * k
        behind.append([(0.07, top), (0.45 * reach, slope - 0.055), (0.86 * reach, slope + 0.05), (reach, turn)])
        if 1 <= k <= 6:
            end = (0.36 + 0.01 * k, turn + 0.25)
            front.append([(reach, turn - 0.02), (0.90 * reach, turn + 0.12), (0.66 * reach, turn + 0.22), end])
    fine = np.zeros_like(sheet.values)
    clavicle = [[(0.07, -0.60), (0.28, -0.68), (0.55, -0.76), (0.76, -0.72)]]
    for curves, gain, width in ((behind, 0.095, 0.056), (front, 0.055, 0.062), (clavicle, 0.14, 0.062)):
        one = spline(np.array(curves) * grow, closed=False, steps=6)
        paths = np.concatenate([one, mirrored(one) + rng.normal(0, 0.004, (len(one), 1, 2))])
        lines: Lines = [(paths, np.full(len(paths), width))]
        fine += (sheet.layer(lines) - np.float32(0.35) * sheet.layer(lines, 0.0, 0.62)) * np.float32(gain)
    blade = spline(np.array([(0.62, -0.70), (0.80, -0.62), (0.78, -0.30), (0.68, 0.02), (0.62, -0.25)]) * grow)
    for side in (blade, mirrored(blade)):
        sheet.add(side, 0.05)
        sheet.add((side - side.mean(0)) * 0.88 + side.mean(0), -0.025)
    for hand in (-1, 1):
        sheet.add(oval((hand * 0.90, -0.60), 0.085, 0.09), 0.12)  # head of the humerus
    levels = np.arange(-0.98 + lift, 1, 0.115)[:, None, None] * (0, 1)
    discs = sheet.region(oval((0, 0), 0.066, 0.010, points=16) + levels)
    processes = sheet.region(oval((0, 0.08), 0.012, 0.024, points=16) + levels)
    sheet.values += processes * np.float32(0.05) - discs * np.float32(0.04)
    return fine


def _hila(rng: np.random.Generator, sheet: Sheet, grow: np.ndarray) -> np.ndarray:
    """Vessels that fan out from both hila and thin towards the edge."""
    ends = []
    for side in (-1, 1):
        for angle in np.linspace(-1.15, 1.25, 8) + rng.normal(0, 0.08, 8):
            start = np.array([side * 0.17, -0.06 + 0.07 * angle])
            far = rng.uniform(0.32, 0.50) * (1 + 0.25 * abs(angle) / 1.2)
            ends.append([start, start + far * np.array([side * np.cos(angle), np.sin(angle)])])
    lines = np.array(ends) * grow
    paths = wandering(rng, lines, 13, 0.008)
    widths = rng.uniform(0.024, 0.040, 16)
    twigs = branches(rng, paths, widths, 4, (0.12, 0.28), (0.35, 0.7))
    tree = [*tapered(paths, widths, 0.3), twigs, branches(rng, *twigs, 2, (0.06, 0.14), thinner=(0.5, 0.8))]
    return sheet.layer(tree, 0.8)
