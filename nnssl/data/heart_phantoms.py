"""Synthetic short-axis slices of a heart in a chest, which are hard to segment from few labels.

The place, direction, size and wall thickness of the heart differ between patients, as do the shape of the chest and the vessels
and lumps in it, which are as bright as blood and muscle. Contrast, shading and noise differ as between scanners. The ventricles
can be told from their surroundings only by their shape and by what lies around them, so that a network that has seen few
patients mistakes other things for them.

=====  ======================================================
label  structure
=====  ======================================================
0      background: air, fat, muscle, lungs, liver, vessels
1      right ventricle: a crescent beside the ring
2      myocardium: a ring that becomes smaller towards the apex
3      left ventricle: the blood inside the ring
=====  ======================================================

Source: written for nnssl, after the appearance of cine MRI. Coordinates run from -1 to 1 along each axis of the array, in the
order z, y, x; the apex lies towards z = -1.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float32, UInt8
from scipy.ndimage import gaussian_filter

from nnssl.data.phantom_fields import check_size, rician, warped_grid

LABELS = {"background": 0, "right_ventricle": 1, "myocardium": 2, "left_ventricle": 3}

NUM_DISTRACTORS = 14
"""Number of vessels and lumps around the heart."""
BLOOD = (350.0, 600.0)
"""Intensity of blood over patients, in arbitrary units."""
MUSCLE = (0.3, 0.6)
"""Intensity of muscle over patients, relative to that of blood."""
BIAS = 0.4
"""Largest deviation of the shading from 1."""
NOISE = 20.0
"""Standard deviation of the noise, in units of intensity."""
TEXTURE = 18.0
"""Standard deviation of the texture, in units of intensity."""

Parts = list[tuple[str, np.ndarray]]
"""Tissues and their masks (z, y, x) in the order in which they are painted."""


def make_heart_phantom(
    rng: np.random.Generator, shape: Sequence[int], spacing_mm: Sequence[float]
) -> tuple[Float32[np.ndarray, "z y x"], UInt8[np.ndarray, "z y x"]]:
    """Generate one synthetic patient.

    Args:
        rng: Source of everything random.
        shape: Shape (z, y, x) in voxels, at least 8 per axis; z runs along the heart's long axis.
        spacing_mm: Spacing (z, y, x) in mm.

    Returns:
        Intensities (z, y, x) and labels (z, y, x) as numbered in ``LABELS``.

    Raises:
        ValueError: If the shape or spacing does not have three valid entries.
    """
    check_size(shape, spacing_mm)
    z, y, x = warped_grid(rng, tuple(shape), np.asarray(shape) * np.asarray(spacing_mm))
    parts = [*_draw_chest(rng, z, y, x), *_draw_heart(rng, z, y, x)]
    labels = np.zeros(z.shape, np.uint8)
    for name, mask in parts:
        labels[mask] = LABELS.get(name, 0)
    return _paint(rng, parts), labels


def _draw_chest(rng: np.random.Generator, z: np.ndarray, y: np.ndarray, x: np.ndarray) -> Parts:
    """Return everything around the heart."""
    inside = (np.abs(x) / 0.8) ** 2.4 + (np.abs(y) / 0.68) ** 2.2 < 1
    height = ((y + 0.05) / 0.5) ** 2
    lungs = (((x + 0.48) / 0.34) ** 2 + height < 1) | (((x - 0.5) / 0.32) ** 2 + height < 1)
    parts = [
        ("fat", (np.abs(x) / 0.9) ** 2.4 + (np.abs(y) / 0.8) ** 2.2 < 1),
        ("muscle", inside),
        ("lungs", lungs & inside),
    ]
    for _ in range(NUM_DISTRACTORS):
        at_y, at_x = rng.uniform(-0.6, 0.6), rng.uniform(-0.75, 0.75)
        radius, stretch = rng.uniform(0.04, 0.15), rng.uniform(0.6, 1.6)
        drift_y, drift_x = rng.normal(0, 0.2, 2)
        distance = ((y - at_y - drift_y * z) / (radius * stretch)) ** 2
        distance = distance + ((x - at_x - drift_x * z) * stretch / radius) ** 2
        kind = rng.integers(3)  # a vessel, a lump, or a ring of muscle around something else
        parts.append(("vessel" if kind == 0 else "lump", (distance < 1) & inside))
        if kind == 2:
            parts.append(("content", (distance < 0.4) & inside))
    liver = ((x + 0.45) / 0.5) ** 2 + ((y - 0.35) / 0.4) ** 2 + ((z + 1) / 0.9) ** 2 < 1
    return [*parts, ("liver", liver & inside)]


def _draw_heart(rng: np.random.Generator, z: np.ndarray, y: np.ndarray, x: np.ndarray) -> Parts:
    """Return the fat around the heart, the two ventricles and the myocardium."""
    angle = rng.uniform(-np.pi, np.pi)
    at_y, at_x, size = rng.uniform(-0.25, 0.2), rng.uniform(-0.2, 0.3), rng.uniform(0.85, 1.2)
    cavity, wall, stretch = rng.uniform(0.13, 0.19), rng.uniform(0.07, 0.12), rng.uniform(0.9, 1.12)
    outer = cavity + wall
    narrower = np.sqrt(np.clip(1 - ((z - 0.5) / 1.5) ** 2, 0.02, 1)) * size  # towards the apex
    own_x, own_y = x - at_x - 0.05 * z, y - at_y - 0.08 * z
    along = own_x * np.cos(angle) + own_y * np.sin(angle)
    across = own_y * np.cos(angle) - own_x * np.sin(angle)
    from_centre = np.sqrt((along * stretch) ** 2 + (across / stretch) ** 2)
    myocardium = from_centre < outer * narrower
    crescent = ((along + 0.95 * outer) / (0.25 * size)) ** 2 + (across / (0.33 * size)) ** 2
    right = (crescent < np.clip(1.15 * narrower - 0.25, 0, 1)) & ~myocardium
    left = from_centre < cavity * narrower - 0.04 * (1 - narrower)
    around = (from_centre < (outer + 0.07) * narrower) | (crescent < 1.15 * narrower)
    return [("heart_fat", around), ("right_ventricle", right), ("myocardium", myocardium), ("left_ventricle", left)]


def _paint(rng: np.random.Generator, parts: Parts) -> np.ndarray:
    """Return intensities composed of the patient's tissue means, texture, blur, shading and noise."""
    blood = rng.uniform(*BLOOD)
    muscle = blood * rng.uniform(*MUSCLE)
    intensity = {
        "left_ventricle": blood,
        "right_ventricle": blood * rng.uniform(0.9, 1.1),
        "vessel": blood * rng.uniform(0.9, 1.1),
        "myocardium": muscle,
        "muscle": muscle * rng.uniform(0.85, 1.15),
        "lump": muscle * rng.uniform(0.85, 1.15),
        "content": rng.uniform(100, 600),
        "liver": rng.uniform(150, 500),
        "fat": rng.uniform(250, 600),
        "heart_fat": rng.uniform(250, 600),
        "lungs": rng.uniform(20, 80),
    }
    shape = parts[0][1].shape
    volume = np.zeros(shape, np.float32)
    for name, mask in parts:
        volume[mask] = intensity[name]
    texture = gaussian_filter(rng.standard_normal(shape, np.float32), (0.8, 1.0, 1.0))
    volume += np.where(parts[0][1], texture * np.float32(TEXTURE / max(float(texture.std()), 1e-6)), 0)
    return rician(rng, gaussian_filter(volume, (0.3, 0.5, 0.5)), BIAS, NOISE)
