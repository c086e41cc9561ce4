"""Colonoscopy: a lit height map of folded mucosa around a dark lumen, with one polyp, glare and vessels."""

from __future__ import annotations

import cv2
import numpy as np

from medseg_gym.datasets.phantoms.draw import Scene, blur, colour, distance, frame, grain, noise, smoothstep, wobbly
from medseg_gym.types import Mask


def render(rng: np.random.Generator, size: int, difficulty: float, absent: frozenset[str]) -> Scene:
    """The polyp is the dome's footprint, seen from above; where absent the same gut is drawn without it."""
    x, y = frame(size)
    lumen = rng.uniform(0.25, 0.75) * np.array([np.cos(a := rng.uniform(0, 2 * np.pi)), np.sin(a)])
    height, far = _folds(rng, x, y, lumen)
    dome, polyp = _polyp(rng, x, y, lumen, difficulty)
    field = _field(rng, x, y)
    patches = noise(rng, size, 5)
    ripples = noise(rng, size, 16) * np.float32(0.12)
    knobs = noise(rng, size, 34)
    paler = rng.uniform(-1, 1)
    if "polyp" in absent:
        polyp = np.zeros_like(polyp)
        dome = np.zeros_like(dome)
    edge = blur(polyp.astype(np.float32), 1.4)
    height = height * (1 - np.float32(0.75) * edge) + dome
    height += knobs * np.float32(0.0022) * (1 + edge * (1.5 - difficulty))

    # Light sits at the camera, a little above: slopes that face away darken, steep gleam spots burn out.
    scale = size / 2
    slope_x = cv2.Sobel(height, cv2.CV_32F, 1, 0, scale=scale / 8)
    slope_y = cv2.Sobel(height, cv2.CV_32F, 0, 1, scale=scale / 8)
    wet_x, wet_y = slope_x + ripples, slope_y + ripples.T
    tilt_x, tilt_y = x * np.float32(0.35), y * np.float32(0.35) + np.float32(0.12)
    normal = 1 / np.sqrt(1 + slope_x * slope_x + slope_y * slope_y)
    diffuse = np.clip((1 - slope_x * tilt_x - slope_y * tilt_y) * normal, 0, 1.3)
    gleam = 1 / (1 + ((wet_x + tilt_x) ** 2 + (wet_y + tilt_y) ** 2) * 90)
    glare = smoothstep(0.80, 0.97, gleam * (0.72 + 0.28 * diffuse) + np.float32(0.015) * knobs)
    depth = smoothstep(0.02, 0.62, far)
    light = diffuse * (0.10 + 0.90 * depth) * (1.10 - 0.38 * smoothstep(0.45, 1.3, distance(x, y)))
    light *= 1 - np.float32(0.22 - 0.12 * difficulty) * (blur(edge, 5) * (1 - edge))  # the gap about it

    base = np.array([0.88, 0.50, 0.42]) * rng.uniform(0.94, 1.06, 3)
    own = np.array([0.03, -0.07 + 0.05 * paler, -0.05 + 0.04 * paler]) * (1.5 - difficulty)
    vessels = np.exp(-np.abs(noise(rng, size, 9)) / np.float32(0.05)) * smoothstep(-0.2, 0.9, patches)
    vessels = vessels * (1 - edge) * depth * np.float32(0.55)
    planes = []
    shine = glare * depth
    for c in range(3):
        tone = (
            float(base[c]) + patches * (0.018, 0.036, 0.033)[c] + edge * float(own[c]) - vessels * (0.10, 0.20, 0.14)[c]
        )
        planes.append(1.06 * tone * cv2.pow(light, (0.85, 1.15, 1.25)[c]) + shine * (0.55, 0.75, 0.80)[c])
    speckle = grain(rng, size, 0.6) * np.float32(0.006 + 0.018 * difficulty)
    gain = blur(field.astype(np.float32), 0.6)
    image = colour(planes, 0.55 + 0.5 * difficulty, gain, speckle, noise(rng, size, 90) * np.float32(0.004))
    return Scene(image, {"polyp": polyp & field}, None)


def _folds(rng: np.random.Generator, x: np.ndarray, y: np.ndarray, lumen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ridges that ring the lumen, sharper on the near side, broken into arcs; and the distance from the lumen."""
    size = x.shape[0]
    stretch = rng.uniform(0.75, 1.3)
    dx, dy = (x - np.float32(lumen[0])) * np.float32(stretch), y - np.float32(lumen[1])
    # noise has no bounds: once in a thousand images it would make the distance negative
    far = distance(dx, dy) * np.maximum(1 + 0.17 * noise(rng, size, 3), np.float32(0.2)) + np.float32(1e-3)
    phase = np.log(far + np.float32(0.10)) * np.float32(rng.uniform(1.5, 2.2)) + noise(rng, size, 3) * np.float32(0.10)
    phase = phase + np.float32(rng.uniform(0, 1))
    saw = phase - np.floor(phase)
    ridge = np.where(saw < 0.78, saw / 0.78, (1 - saw) / 0.22).astype(np.float32)
    ridge = ridge**2 * (3 - 2 * ridge)
    arcs = smoothstep(-0.6, 0.8, noise(rng, size, 3))
    height = ridge * arcs * np.float32(0.19) * np.minimum(far, 1) * np.float32(rng.uniform(0.7, 1.3))
    height += noise(rng, size, 6) * np.float32(0.018)
    return blur(height, 1.6), far


def _polyp(
    rng: np.random.Generator, x: np.ndarray, y: np.ndarray, lumen: np.ndarray, difficulty: float
) -> tuple[np.ndarray, Mask]:
    """Height and footprint of a dome away from the lumen, its outline wobbling; flatter is harder."""
    way = np.arctan2(-lumen[1], -lumen[0]) + rng.normal(0, 0.7)
    at = np.clip(lumen + rng.uniform(0.55, 0.85) * np.array([np.cos(way), np.sin(way)]), -0.48, 0.48)
    radius = rng.uniform(0.22, 0.38) * (1 + rng.normal(0, 0.12) * difficulty)
    turn, squash = rng.uniform(0, np.pi), rng.uniform(0.7, 1.0)
    c, s = np.float32(np.cos(turn)), np.float32(np.sin(turn))
    dx, dy = x - np.float32(at[0]), y - np.float32(at[1])
    u, v = dx * c + dy * s, (dy * c - dx * s) * np.float32(1 / squash)
    angle = cv2.phase(u, v)  # 0..2 pi, to a third of a degree, and five times as fast as np.arctan2
    outline = wobbly(rng, 720, 0.025 + 0.045 * difficulty).astype(np.float32)
    wave = outline[(angle * np.float32(720 / (2 * np.pi))).astype(np.int32) % 720]
    rho = distance(u, v) / (np.float32(radius) * wave)
    inside = rho < 1
    flat = rng.uniform(0.55, 0.95) * (1.15 - 0.55 * difficulty)
    cap = np.clip(1 - rho * rho, 0, 1)
    dome = (0.45 * np.sqrt(cap) + 0.55 * cap) * np.float32(radius * flat)
    return blur(dome, 1.8), inside


def _field(rng: np.random.Generator, x: np.ndarray, y: np.ndarray) -> Mask:
    """The endoscope's picture: a square with cut corners, or a disc with flat sides."""
    if rng.random() < 0.6:
        return (np.abs(x) < 0.97) & (np.abs(y) < 0.95) & (np.abs(x) + np.abs(y) < rng.uniform(1.50, 1.62))
    return (distance(x, y) < rng.uniform(1.02, 1.10)) & (np.abs(y) < 0.93) & (np.abs(x) < 0.97)
