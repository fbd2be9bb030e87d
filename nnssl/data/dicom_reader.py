"""A reader of DICOM series with the interface of nnU-Net's readers, which requires a subclass of one of them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import SimpleITK as sitk  # noqa: N813  the usual name
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

from nnssl.data.dicom_series import SERIES_ENDING, find_slices


class DicomSeriesIO(SimpleITKIO):
    """A reader of series files (see ``nnssl.data.dicom_series``); it writes segmentations as ``SimpleITKIO`` does."""

    supported_file_endings: ClassVar[list[str]] = [SERIES_ENDING]

    def read_images(self, image_fnames: Sequence[str]) -> tuple[np.ndarray, dict[str, Any]]:
        """Read one series file per channel.

        Returns:
            Intensities (channel, z, y, x) as float32, and nnU-Net's properties: ``spacing`` (z, y, x) in mm, and
            ``sitk_stuff`` with spacing, origin (x, y, z) and direction as SimpleITK gives them.

        Raises:
            CaseError: If a slice is missing or has changed.
            RuntimeError: If SimpleITK cannot read a slice, or if the series differ in shape or spacing.
        """
        images = [_read(Path(file)) for file in image_fnames]
        first = images[0]
        for image, file in zip(images, image_fnames, strict=True):
            same_spacing = np.allclose(image.GetSpacing(), first.GetSpacing())
            if image.GetSize() != first.GetSize() or not same_spacing:
                raise RuntimeError(f"{Path(file).name} differs in shape or spacing from {Path(image_fnames[0]).name}")
        geometry = {"spacing": first.GetSpacing(), "origin": first.GetOrigin(), "direction": first.GetDirection()}
        volume = np.stack([sitk.GetArrayFromImage(image) for image in images])
        return volume, {"sitk_stuff": geometry, "spacing": list(first.GetSpacing()[::-1])}


def _read(file: Path) -> sitk.Image:
    reader = sitk.ImageSeriesReader()
    # rescale values differ between slices; the integer type of the first slice would truncate values of the others
    reader.SetOutputPixelType(sitk.sitkFloat32)
    reader.SetImageIO("GDCMImageIO")
    reader.SetFileNames([str(path) for path in find_slices(file)])
    return reader.Execute()
