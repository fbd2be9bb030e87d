"""Synthetic anatomy with labels: a deformed torso with organs, a spine and a vessel, in the appearance of MR or CT.

Phantoms let users try nnssl, and tests run, without data. Every patient has the same anatomy under a smooth random
deformation, with individual organ sizes and intensities. Liver, spleen and the unlabelled kidneys share one intensity
range, and the stomach shares one with unlabelled muscle and bowel. Organs can therefore be recognised only by position
and shape, not by a threshold.

=====  ============================================================
label  structure
=====  ============================================================
0      background: air, fat, muscle, bowel, kidneys, spine
1      liver: a large wedge on one side
2      spleen: a crescent on the other side, as bright as the liver
3      stomach: a bent tube that becomes thinner
4      aorta: a curved tube along z
=====  ============================================================

Source: written for nnssl. Coordinates run from -1 to 1 along each axis of the array, in the order z, y, x; +z points up,
+y to the back, +x to the patient's left (nnU-Net's axis order for an image in LPS).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float32, UInt8
from scipy.ndimage import gaussian_filter

from nnssl.data.dataset_json import NO_LABELS
from nnssl.data.heart_phantoms import LABELS as HEART_LABELS
from nnssl.data.heart_phantoms import make_heart_phantom
from nnssl.data.phantom_fields import check_size, rician, smooth_field, warped_grid
from nnssl.draws import draw_seed
from nnssl.errors import UserError
from nnssl.files import whole_folder, write_json

Modality = Literal["MR", "CT"]
Anatomy = Literal["torso", "heart"]
"""Torso: this module; heart: ``nnssl.data.heart_phantoms``, which has no CT."""

LABELS = {"background": 0, "liver": 1, "spleen": 2, "stomach": 3, "aorta": 4}

# Mean and standard deviation over patients: HU for CT, arbitrary units for MR.
CT_INTENSITY = {
    "air": (-1000.0, 0.0), "fat": (-100.0, 8.0), "muscle": (50.0, 8.0), "bone": (420.0, 60.0),
    "bowel": (45.0, 12.0), "kidneys": (107.0, 10.0),
    "liver": (105.0, 10.0), "spleen": (108.0, 10.0), "stomach": (35.0, 20.0), "aorta": (150.0, 20.0),
}  # fmt: skip
MR_INTENSITY = {
    "air": (0.0, 0.0), "fat": (620.0, 40.0), "muscle": (240.0, 25.0), "bone": (130.0, 20.0),
    "bowel": (230.0, 30.0), "kidneys": (388.0, 30.0),
    "liver": (390.0, 30.0), "spleen": (385.0, 30.0), "stomach": (210.0, 60.0), "aorta": (520.0, 50.0),
}  # fmt: skip
NOISE = {"CT": 14.0, "MR": 22.0}
TEXTURE = {"CT": 7.0, "MR": 16.0}
BIAS = 0.22
"""Largest deviation of the MR bias field from 1."""


def make_phantom(
    generator: torch.Generator | int,
    shape: Sequence[int],
    spacing_mm: Sequence[float],
    modality: Modality = "MR",
) -> tuple[Float32[np.ndarray, "z y x"], UInt8[np.ndarray, "z y x"]]:
    """Generate one synthetic patient.

    Args:
        generator: CPU generator or seed; equal ones give equal volumes.
        shape: Shape (z, y, x) in voxels, at least 8 per axis.
        spacing_mm: Spacing (z, y, x) in mm; texture and deformation have the same size in mm along all axes.
        modality: ``"MR"`` (arbitrary units, air near 0, bias field) or ``"CT"`` (HU, air at -1000).

    Returns:
        Intensities (z, y, x) and labels (z, y, x) as numbered in ``LABELS``.

    Raises:
        ValueError: If the shape or spacing does not have three valid entries, or if the modality is unknown.
    """
    check_size(shape, spacing_mm)
    if modality not in NOISE:
        raise ValueError(f"modality must be MR or CT, got {modality}")
    if isinstance(generator, torch.Generator):
        generator = int(torch.randint(2**62, (), generator=generator))
    rng = np.random.default_rng(generator)
    extent_mm = np.asarray(shape) * np.asarray(spacing_mm)
    z, y, x = warped_grid(rng, tuple(shape), extent_mm)
    tissues, labels = _draw_anatomy(rng, z, y, x)
    volume = _paint(rng, tissues, modality, np.asarray(spacing_mm))
    return volume, labels


def _draw_anatomy(
    rng: np.random.Generator, z: np.ndarray, y: np.ndarray, x: np.ndarray
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Return tissue masks in painting order and the label map."""

    def ellipsoid(centre: Sequence[float], radii: Sequence[float], spread: float = 0.06) -> np.ndarray:
        scale = np.float32(1 + rng.uniform(-spread, spread))
        rz, ry, rx = (np.float32(radius) * scale for radius in radii)
        cz, cy, cx = (np.float32(place + rng.normal(0, 0.015)) for place in centre)
        return ((z - cz) / rz) ** 2 + ((y - cy) / ry) ** 2 + ((x - cx) / rx) ** 2

    # Body: wider than deep, cut off at both ends of the volume along z, flatter at the back
    outline = (np.abs(x) / 0.86) ** 2.4 + (np.abs(y + 0.04) / np.where(y > 0, 0.66, 0.74)) ** 2.2 + (0.35 * z) ** 2
    body, inside = outline < 1, outline < 0.76
    cavity = ellipsoid((0.05, -0.08, 0.0), (1.3, 0.47, 0.66)) < 1
    spine_y = 0.44 + 0.05 * np.cos(2 * z)
    spine = ((y - spine_y) / 0.13) ** 2 + ((x - 0.02) / 0.12) ** 2 < 1
    aorta = ((y - spine_y + 0.24) / 0.10) ** 2 + ((x - 0.10 - 0.06 * np.sin(2.5 * z)) / 0.10) ** 2 < 1
    # Liver: a big ellipsoid on the patient's right, cut obliquely
    liver = (ellipsoid((0.22, -0.10, -0.32), (0.58, 0.42, 0.42)) < 1) & (z + 0.55 * x > -0.46)
    # Spleen: a crescent, the difference of two ellipsoids
    hollow = ellipsoid((0.18, 0.08, 0.30), (0.46, 0.26, 0.16)) < 1
    spleen = (ellipsoid((0.22, 0.14, 0.44), (0.46, 0.32, 0.24)) < 1) & ~hollow
    # Stomach: a bent tube that becomes thinner towards its end, closed by half spheres
    along = np.clip((0.45 - z) / 0.8, 0, 1)
    bend_x, bend_y = 0.32 - 0.40 * along**2, -0.20 - 0.12 * np.sin(3 * along)
    radius = np.float32(0.22 * rng.uniform(0.85, 1.15)) * (1 - 0.4 * along)
    beyond = np.maximum(z - 0.45, 0) + np.minimum(z + 0.35, 0)
    stomach = (x - bend_x) ** 2 + (y - bend_y) ** 2 + beyond**2 < radius**2
    # Bowel: loops in the lower half, not labelled
    bowel = cavity & (smooth_field(rng, (9, 7, 9), z.shape) > 0.35) & (z < 0.15)

    # Kidneys: as bright as liver and spleen, not labelled
    right, left = ((-0.32, 0.22, -0.34), (0.42, 0.19, 0.15)), ((-0.30, 0.22, 0.36), (0.40, 0.18, 0.15))
    kidneys = (ellipsoid(*right) < 1) | (ellipsoid(*left) < 1)

    tissues = {"fat": body, "muscle": inside & ~cavity, "bowel": bowel, "kidneys": kidneys & inside}
    labels = np.zeros(z.shape, np.uint8)
    for name, mask in (("liver", liver), ("spleen", spleen), ("stomach", stomach), ("aorta", aorta)):
        tissues[name] = mask & inside & (labels == 0)
        labels[tissues[name]] = LABELS[name]
    tissues["bone"] = spine & inside & (labels == 0)
    return tissues, labels


def _paint(
    rng: np.random.Generator, tissues: dict[str, np.ndarray], modality: Modality, spacing_mm: np.ndarray
) -> np.ndarray:
    """Return intensities composed of the patient's tissue means, texture, scanner blur, bias field and noise."""
    means = CT_INTENSITY if modality == "CT" else MR_INTENSITY
    shape = tissues["fat"].shape
    volume = np.full(shape, means["air"][0], np.float32)
    for name, mask in tissues.items():
        volume[mask] = rng.normal(*means[name])
    fine = float(spacing_mm.min())
    sigma_vox = fine / spacing_mm
    texture = gaussian_filter(rng.standard_normal(shape, np.float32), 1.5 * sigma_vox, truncate=2.5)
    volume += np.where(tissues["fat"], texture * np.float32(TEXTURE[modality] / max(float(texture.std()), 1e-6)), 0)
    volume = gaussian_filter(volume, 0.5 * sigma_vox, truncate=2.5)
    if modality == "MR":
        return rician(rng, volume, BIAS, NOISE[modality])
    noise = rng.standard_normal(shape, np.float32) * np.float32(NOISE[modality])
    return np.clip(volume + noise, -1024, 3071).round()


def describe_phantoms(anatomy: Anatomy, seed: int, first_case: int) -> str:
    """Return the description in ``dataset.json``, which tells apart data sets of different phantoms.

    Args:
        anatomy: What is shown.
        seed: Random seed.
        first_case: Number of the first case.
    """
    return f"synthetic phantoms ({anatomy}) made by nnssl with seed {seed}, from number {first_case}"


def write_phantom_dataset(
    folder: Path,
    name: str,
    num_cases: int,
    seed: int,
    shape: Sequence[int] = (48, 64, 56),
    spacing_mm: Sequence[float] = (2.5, 1.5, 1.7),
    modality: Modality = "MR",
    labelled: bool = True,
    first_case: int = 0,
    anatomy: Anatomy = "torso",
) -> Path:
    """Write phantoms as a raw nnU-Net data set. The data set is either complete or absent.

    Args:
        folder: nnU-Net's raw folder, in which the folder of the data set is created.
        name: Full name, ``DatasetXXX_Name``.
        num_cases: Number of patients.
        seed: Random seed; it determines a patient together with the number of the case.
        shape: Shape (z, y, x) in voxels.
        spacing_mm: Spacing (z, y, x) in mm, written to the image headers.
        modality: ``"MR"`` or ``"CT"``, of the torso only; it also determines the name of the channel.
        labelled: Whether to write ``labelsTr``.
        first_case: Number of the first case, so that two data sets with one seed can have different patients.
        anatomy: What is shown.

    Returns:
        The folder of the data set.

    Raises:
        UserError: If the folder already contains files or cannot be written.
        ValueError: If there is no such anatomy in this modality.
    """
    import SimpleITK as sitk  # noqa: N813  the usual name; slow to import

    if (anatomy, modality) not in (("torso", "MR"), ("torso", "CT"), ("heart", "MR")):
        raise ValueError(f"anatomy and modality must be torso in MR or CT, or heart in MR, got {anatomy} in {modality}")
    target = folder / name
    if target.exists() and any(target.iterdir()):
        raise UserError(f"{target} already contains files; delete the folder or choose another name")
    folder.mkdir(parents=True, exist_ok=True)
    with whole_folder(target) as new:
        for part in ("imagesTr", "labelsTr") if labelled else ("imagesTr",):
            (new / part).mkdir()
        for number in range(first_case, first_case + num_cases):
            drawn = draw_seed(seed, "phantom", number)
            if anatomy == "heart":
                volume, labels = make_heart_phantom(np.random.default_rng(drawn), shape, spacing_mm)
            else:
                volume, labels = make_phantom(drawn, shape, spacing_mm, modality)
            outputs = [(np.rint(volume).astype(np.int16), new / "imagesTr" / f"phantom_{number:04d}_0000.nii.gz")]
            if labelled:
                outputs.append((labels, new / "labelsTr" / f"phantom_{number:04d}.nii.gz"))
            for array, path in outputs:
                image = sitk.GetImageFromArray(array)
                image.SetSpacing([float(mm) for mm in spacing_mm[::-1]])
                sitk.WriteImage(image, str(path), True)
        write_json(
            new / "dataset.json",
            {
                "name": name,
                "description": describe_phantoms(anatomy, seed, first_case),
                "channel_names": {"0": "CT" if modality == "CT" else "MRI"},
                "labels": (HEART_LABELS if anatomy == "heart" else LABELS) if labelled else NO_LABELS,
                "numTraining": num_cases,
                "file_ending": ".nii.gz",
            },
        )
    return target
