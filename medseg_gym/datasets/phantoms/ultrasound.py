"""B-mode ultrasound in a sector: echoes are drawn, seen along the beams as speckle with shadows, and scan-converted."""

# ruff: noqa: RUF005 - a tuple added to an array shifts it; nothing is concatenated

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from medseg_gym.datasets.phantoms.draw import (
    Contour,
    Field,
    Scene,
    Sheet,
    Warp,
    blob,
    branches,
    distance,
    frame,
    grey,
    line,
    noise,
    oval,
    spline,
    tapered,
    wandering,
)
from medseg_gym.types import Image, Mask

LESION = 1
VENTRICLE, MYOCARDIUM = 1, 2

# The four-chamber view: heart sac, left ventricle's muscle and pool, right ventricle, left and right atrium.
_HEART = [
    [(0.02, -0.66), (0.28, -0.50), (0.44, -0.10), (0.45, 0.25), (0.38, 0.62), (0.10, 0.74), (-0.28, 0.68),
     (-0.46, 0.42), (-0.45, 0.05), (-0.30, -0.35)],
    [(0.08, -0.62), (0.26, -0.46), (0.37, -0.14), (0.38, 0.14), (0.30, 0.20), (0.10, 0.20), (-0.07, 0.20),
     (-0.10, 0.12), (-0.09, -0.16), (-0.04, -0.46)],
    [(0.08, -0.48), (0.18, -0.38), (0.26, -0.12), (0.27, 0.12), (0.24, 0.20), (0.10, 0.22), (0.00, 0.20),
     (-0.005, 0.10), (0.00, -0.14), (0.03, -0.38)],
    [(-0.12, -0.32), (-0.14, 0.00), (-0.14, 0.16), (-0.24, 0.20), (-0.37, 0.16), (-0.36, -0.02), (-0.24, -0.24)],
    [(0.02, 0.30), (0.14, 0.27), (0.26, 0.30), (0.30, 0.46), (0.22, 0.62), (0.08, 0.62), (0.00, 0.48)],
    [(-0.10, 0.30), (-0.22, 0.27), (-0.36, 0.30), (-0.38, 0.46), (-0.28, 0.60), (-0.14, 0.60), (-0.07, 0.46)],
]  # fmt: skip
_CUSPS = [
    [(0.02, 0.24), (0.07, 0.23), (0.12, 0.20)], [(0.27, 0.24), (0.22, 0.22), (0.16, 0.20)],
    [(-0.12, 0.23), (-0.18, 0.24), (-0.24, 0.22)], [(-0.37, 0.23), (-0.32, 0.24), (-0.26, 0.22)],
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Probe:
    """Where the beams start and end, in unit coordinates and radians."""

    apex: float  # y of the point where all beams would meet
    near: float  # depth at which the picture starts
    far: float
    half: float  # half the opening angle


def render_liver(rng: np.random.Generator, size: int, difficulty: float, absent: frozenset[str]) -> Scene:
    """Liver under a curved probe: a cyst, a bright or a dark lesion among vessels, above the diaphragm."""
    spacing = rng.uniform(140, 180) / size
    probe = Probe(-1.0 - 0.42, 0.48, 2.34, rng.uniform(0.50, 0.60))
    sheet = Sheet(size, -19.0, Warp(rng, 0.02 + 0.03 * difficulty))
    loss = np.zeros((size, size), np.float32)  # dB per unit of depth, beyond the usual
    _wall(rng, sheet, probe)
    ends = np.stack([rng.uniform((-0.5, -0.1), (0.5, 0.6), (3, 2)), rng.uniform((-0.7, -0.4), (0.7, 0.3), (3, 2))], 1)
    paths = wandering(rng, ends, 13, 0.010)
    widths = rng.uniform(0.035, 0.065, 3)
    twigs = branches(rng, paths, widths, 2, (0.15, 0.32), thinner=(0.45, 0.7))
    tree = [*tapered(paths, widths, 0.7), twigs]
    wall, lumen = sheet.layer(tree, 0.8, 1.5), sheet.layer(tree, 0.6)
    sheet.values += noise(rng, size, 4) * np.float32(1.4)
    bright = rng.uniform(2, 7)
    sheet.values += wall * np.float32(bright) - lumen * np.float32(bright + 19)

    at = np.array([rng.uniform(-0.36, 0.36), rng.uniform(-0.15, 0.34)])
    r = rng.uniform(0.12, 0.25) * (1 + rng.normal(0, 0.10) * difficulty)
    lesion = blob(rng, at, r, r * rng.uniform(0.72, 1.0), rng.uniform(-0.5, 0.5), 0.04 + 0.09 * difficulty, 90)
    kind = rng.choice(3, p=(0.3, 0.35, 0.35))
    fine = 1.1 - 0.4 * difficulty
    lumps = noise(rng, size, 26)
    if "lesion" not in absent:
        region = sheet.region(lesion)
        if kind == 0:  # cyst: no echo, and more sound behind it
            sheet.fill(at + (lesion - at) * 1.08, -13)
            sheet.fill(lesion, -56, LESION)
            loss[region] -= 12
        elif kind == 1:  # dark, with a halo
            sheet.fill(at + (lesion - at) * 1.10, -21 - 3 * fine)
            sheet.fill(lesion, -19 - 12 * fine, LESION)
            loss[region] += 5
        else:  # bright
            sheet.fill(at + (lesion - at) * 1.07, -19 - 4 * fine)
            sheet.fill(lesion, -19 + 9 * fine, LESION)
        if kind:
            sheet.values += region * lumps * np.float32(1.5 + 1.5 * difficulty)
    _diaphragm(rng, sheet, loss)
    if rng.random() < 0.30 + 0.3 * difficulty:  # a rib or gas at the surface casts a shadow
        theta = rng.choice([-1, 1]) * rng.uniform(0.75, 0.95) * probe.half
        spot = np.array([np.sin(theta), np.cos(theta)]) * (probe.near + 0.13) + (0, probe.apex)
        rib = oval(spot, 0.06, 0.02, -theta)
        sheet.fill(rib, -2)
        loss[sheet.region(rib + (0, 0.015))] += 420
    image, inside = _scan(rng, sheet.values, loss, probe, difficulty, fall=3.0)
    return Scene(image, {"lesion": (sheet.labels == LESION) & inside}, (spacing, spacing))


def _wall(rng: np.random.Generator, sheet: Sheet, probe: Probe) -> None:
    """Skin, fat and muscle: bright and dark layers that follow the probe."""
    theta = np.linspace(-1.2, 1.2, 40) * probe.half
    depth = probe.near
    fat, muscle = rng.uniform(0.03, 0.07), rng.uniform(0.03, 0.06)
    for tone, thick in ((-12, 0.04), (-24, fat), (-9, 0.014), (-22, muscle), (-6, 0.012)):
        arcs = []
        for rho in (depth, depth + thick):
            ripple = 0.006 * np.sin(theta * rng.uniform(6, 14) + rng.uniform(0, 6))
            arcs.append(np.stack([np.sin(theta), np.cos(theta)], 1) * (rho + ripple)[:, None] + (0, probe.apex))
        sheet.fill(np.concatenate([arcs[0], arcs[1][::-1]]), tone)
        depth += thick


def _diaphragm(rng: np.random.Generator, sheet: Sheet, loss: np.ndarray) -> None:
    """A bright bow at the bottom; behind it the lung, dark but for haze."""
    low, tilt = rng.uniform(0.70, 0.84), rng.uniform(-0.22, 0.22)
    t = np.linspace(-1.1, 1.1, 30)
    path = np.stack([t, low + tilt * t - 0.34 * t**2 + 0.01 * np.sin(5 * t)], 1)
    beyond = np.concatenate([path, [(1.1, 1.4), (-1.1, 1.4)]])
    sheet.fill(beyond, -33)
    loss[sheet.region(beyond + (0, 0.04))] += 14
    sheet.values += sheet.layer(line(path, 0.030), 0.8) * np.float32(24)


def render_heart(rng: np.random.Generator, size: int, difficulty: float, absent: frozenset[str]) -> Scene:
    """Apical four-chamber view under a phased probe: left heart on the image's right, apex up."""
    spacing = rng.uniform(150, 180) / size
    probe = Probe(-0.97, 0.02, 1.90, rng.uniform(0.62, 0.72))
    sheet = Sheet(size, -30.0, Warp(rng, 0.02 + 0.035 * difficulty), turn=rng.normal(0, 0.08))
    loss = np.zeros((size, size), np.float32)
    jitter = 0.008 + 0.016 * difficulty

    def shape(points: list[tuple[float, float]]) -> Contour:
        return spline(np.array(points) * (wide, tall) + rng.normal(0, jitter, (len(points), 2)) + (0.04, 0))

    wide, tall = rng.uniform(1.05, 1.38), rng.uniform(0.98, 1.12)
    sac, muscle, pool, right, left_atrium, right_atrium = (shape(outline) for outline in _HEART)
    swing = rng.uniform(-0.06, 0.10)
    tone = -15.0 - 4 * difficulty
    blood = -47.0 + 7 * difficulty
    sheet.fill(sac, tone - 5)
    sheet.values += sheet.layer(line(np.concatenate([sac, sac[:1]]), 0.022), 0.6) * np.float32(9)
    for chamber in (right, right_atrium, left_atrium):
        sheet.fill(chamber, blood)
    if "left ventricle" not in absent:
        sheet.fill(muscle, tone, MYOCARDIUM)
        sheet.fill(pool, blood, VENTRICLE)
        # The mitral plane closes both; below it the atrium and the valve are drawn again.
        sheet.fill(left_atrium, blood)
    cusps = np.array(_CUSPS)
    cusps[:2, 1:, 1] += swing
    leaflets = spline(cusps * (wide, tall) + (0.04, 0), closed=False)
    valve = sheet.layer([(leaflets, np.full(4, 0.018))], 0.5)
    sheet.values = sheet.values * (1 - valve) + np.float32(-9) * valve
    sheet.values += noise(rng, size, 14) * np.float32(1.6) + noise(rng, size, 5) * np.float32(1.5 + 2.5 * difficulty)
    image, inside = _scan(rng, sheet.values, loss, probe, difficulty, fall=5.0, haze=0.35)
    targets = {
        "left ventricle": (sheet.labels == VENTRICLE) & inside,
        "myocardium": (sheet.labels == MYOCARDIUM) & inside,
    }
    return Scene(image, targets, (spacing, spacing))


def _scan(
    rng: np.random.Generator, echo: Field, loss: Field, probe: Probe, difficulty: float, fall: float, haze: float = 0.15
) -> tuple[Image, Mask]:
    """The picture of an echo map in dB, and the pixels the beams reach.

    Along the beams: fully developed speckle (Rayleigh amplitude, wider across than along), bright walls where the
    echo changes with depth, losses added up from the skin down, log compression; then polar to Cartesian.
    """
    size = echo.shape[0]
    depths, beams = max(32, size * 7 // 8), max(24, size * 5 // 8)
    rho = np.linspace(probe.near, probe.far, depths, dtype=np.float32)[:, None]
    theta = np.linspace(-probe.half, probe.half, beams, dtype=np.float32)[None]
    to_x = ((rho * np.sin(theta) + 1) * (size / 2) - 0.5).astype(np.float32)
    to_y = ((rho * np.cos(theta) + (probe.apex + 1)) * (size / 2) - 0.5).astype(np.float32)
    level = cv2.remap(echo, to_x, to_y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    lost = cv2.remap(loss, to_x, to_y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_CONSTANT)
    unit = size / 256
    level = cv2.GaussianBlur(level, (0, 0), 0.9 * unit, sigmaY=max(0.4 * unit, 0.2))
    edge = cv2.Sobel(level, cv2.CV_32F, 0, 1, scale=1 / (8 * max(unit, 0.5)))
    level += np.clip(np.abs(edge) - 1, 0, 6) * np.float32(1.2 - 0.5 * difficulty)

    power = np.zeros((depths, beams), np.float32)
    looks = 2 if difficulty < 0.7 else 1  # compounding: each look smooths the speckle
    for _ in range(2 * looks):
        wave = rng.standard_normal((depths, beams), np.float32)
        wave = cv2.GaussianBlur(wave, (0, 0), max(1.15 * unit, 0.3), sigmaY=max(0.80 * unit, 0.25))
        power += wave * wave
    power *= np.float32(1 / power.mean())
    travelled = (rho - probe.near) / (probe.far - probe.near)
    step = (probe.far - probe.near) / depths
    level -= np.cumsum(lost, 0) * np.float32(step) + np.float32(fall) * travelled * 2
    level += np.float32(2.2) * np.sin(travelled * np.float32(np.pi))  # focus
    amplitude = power * np.exp(level * np.float32(np.log(10) / 10))
    clutter = np.exp(-travelled * 9) * np.float32(haze * 10**-2.4) + np.float32(10 ** (-5.2 + 0.6 * difficulty))
    decibels = np.log(amplitude + clutter * (0.5 + 0.5 * power)) * np.float32(10 / np.log(10))
    tone = np.clip((decibels + 47) / 47, 0, 1) ** np.float32(1.15)

    x, y = frame(size)
    back_rho = distance(x, y - np.float32(probe.apex))
    back_theta = np.arctan2(x, y - np.float32(probe.apex))
    row = (back_rho - probe.near) * np.float32((depths - 1) / (probe.far - probe.near))
    column = (back_theta + probe.half) * np.float32((beams - 1) / (2 * probe.half))
    picture = cv2.remap(tone, column, row, cv2.INTER_LINEAR, borderMode=cv2.BORDER_CONSTANT)
    inside = (row >= 0) & (row <= depths - 1) & (column >= 0) & (column <= beams - 1)
    return grey(picture * inside), inside
