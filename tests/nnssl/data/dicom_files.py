"""DICOM series written slice by slice, for tests of the import."""

import contextlib
import locale

import numpy as np
import SimpleITK as sitk  # noqa: N813

CLASSES = {
    "CT": "1.2.840.10008.5.1.4.1.1.2",
    "MR": "1.2.840.10008.5.1.4.1.1.4",
    "PT": "1.2.840.10008.5.1.4.1.1.128",
}
SPACING_XYZ = (0.7, 0.9, 3.3)
ORIGIN = (-12.5, 30.25, 7.125)


@contextlib.contextmanager
def kept_locale():
    """Undo what GDCM does when it writes (not when it reads): it leaves the process in the locale "C", without UTF-8."""
    before = locale.setlocale(locale.LC_ALL)
    try:
        yield
    finally:
        locale.setlocale(locale.LC_ALL, before)


def oblique_directions() -> np.ndarray:
    """Columns: directions of x, y and z of the array; no axis of the patient is one of them."""
    a, b, c = 0.31, -0.42, 0.17
    about_x = np.array([[1, 0, 0], [0, np.cos(a), -np.sin(a)], [0, np.sin(a), np.cos(a)]])
    about_y = np.array([[np.cos(b), 0, np.sin(b)], [0, 1, 0], [-np.sin(b), 0, np.cos(b)]])
    about_z = np.array([[np.cos(c), -np.sin(c), 0], [np.sin(c), np.cos(c), 0], [0, 0, 1]])
    return about_x @ about_y @ about_z


def make_values(shape=(7, 20, 15), seed=0) -> np.ndarray:
    return np.random.default_rng(seed).integers(-1000, 1200, shape).astype(np.int16)


def write_series(
    folder,
    values,
    uid="1.2.3.4",
    patient="Anna 1",
    modality="CT",
    description="thorax  1.0 B30f",
    number=4,
    study="1.2.3",
    spacing=SPACING_XYZ,
    directions=None,
    positions=None,
    names=None,
    tags=None,
    tags_of_slice=None,
):
    """Write one file per slice, named in an order that is not that of their positions; returns the files by position."""
    folder.mkdir(parents=True, exist_ok=True)
    directions = oblique_directions() if directions is None else directions
    if positions is None:
        positions = [np.array(ORIGIN) + directions[:, 2] * spacing[2] * k for k in range(len(values))]
    names = names or [f"IM{place:04d}" for place in np.random.default_rng(5).permutation(len(values))]
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    writer.SetImageIO("GDCMImageIO")
    files = []
    for k, (plane, position) in enumerate(zip(values, positions, strict=True)):
        image = sitk.GetImageFromArray(plane)
        image.SetSpacing(spacing[:2])
        content = {
            "0008|0008": "ORIGINAL\\PRIMARY\\AXIAL",
            "0008|0016": CLASSES[modality],
            "0008|0018": f"{uid}.{k + 1}",
            "0008|0020": "20240131",
            "0008|0060": modality,
            "0008|103e": description,
            "0010|0020": patient,
            "0018|0050": str(spacing[2]),
            "0020|000d": study,
            "0020|000e": uid,
            "0020|0011": str(number),
            "0020|0013": str(k + 1),
            "0020|0032": "\\".join(f"{mm:.9f}" for mm in position),
            "0020|0037": "\\".join(f"{cosine:.9f}" for cosine in (*directions[:, 0], *directions[:, 1])),
            **(tags or {}),
            **(tags_of_slice(k) if tags_of_slice else {}),
        }
        for key, text in content.items():
            image.SetMetaData(key, text)
        file = folder / names[k]
        writer.SetFileName(str(file))
        with kept_locale():
            writer.Execute(image)
        files.append(file)
    return files
