"""Resample a labelled data set to coarse voxels, for studies that fit on two CPU cores.

Images are blurred by 0.4 of the new voxel size and interpolated linearly; labels take the nearest voxel. The result is written to
``nnUNet_raw`` in nnU-Net's raw format::

    python -m tools.coarse_dataset --dataset 17 --spacing 8 6 6 --name Dataset117_BTCVSmall
"""

import argparse
import shutil

import SimpleITK as sitk  # noqa: N813  the usual name

from nnssl.data.raw import find_dataset
from nnssl.paths import resolve_folders


def resample(image: sitk.Image, spacing_mm: list[float], interpolator: int, outside: float) -> sitk.Image:
    """Return an image on a grid with another spacing and the same origin corner.

    Args:
        image: Image with three dimensions.
        spacing_mm: New spacing along x, y, z.
        interpolator: SimpleITK's number of the interpolator.
        outside: Value outside the image.
    """
    own = image.GetSpacing()
    lengths = zip(image.GetSize(), own, spacing_mm, strict=True)
    size = [max(1, round(count * before / after)) for count, before, after in lengths]
    first = [0.5 * after / before - 0.5 for before, after in zip(own, spacing_mm, strict=True)]
    target = sitk.ResampleImageFilter()
    target.SetSize(size)
    target.SetOutputSpacing(spacing_mm)
    target.SetOutputOrigin(image.TransformContinuousIndexToPhysicalPoint(first))
    target.SetOutputDirection(image.GetDirection())
    target.SetInterpolator(interpolator)
    target.SetDefaultPixelValue(outside)
    return target.Execute(image)


def main() -> None:
    """Write the data set and print the shape of every case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--dataset", required=True, help="labelled data set with one channel in .nii.gz files, number or name"
    )
    parser.add_argument("--spacing", nargs=3, type=float, required=True, metavar="MM", help="new spacing, z y x")
    parser.add_argument("--name", required=True, help="name of the new data set, DatasetXXX_Name")
    args = parser.parse_args()
    folders = resolve_folders()
    source, target = folders.raw / find_dataset(args.dataset, folders), folders.raw / args.name
    for part in ("imagesTr", "labelsTr"):
        (target / part).mkdir(parents=True)
    spacing_mm = args.spacing[::-1]
    for path in sorted((source / "imagesTr").glob("*_0000.nii.gz")):
        name = path.name.removesuffix("_0000.nii.gz")
        image = sitk.ReadImage(str(path), sitk.sitkFloat32)
        labels = sitk.ReadImage(str(source / "labelsTr" / f"{name}.nii.gz"))
        lowest = float(sitk.GetArrayViewFromImage(image).min())
        blurred = sitk.SmoothingRecursiveGaussian(image, [0.4 * mm for mm in spacing_mm])
        coarse = resample(blurred, spacing_mm, sitk.sitkLinear, lowest)
        coarse_labels = resample(labels, spacing_mm, sitk.sitkNearestNeighbor, 0)
        sitk.WriteImage(sitk.Cast(sitk.Round(coarse), sitk.sitkInt16), str(target / "imagesTr" / path.name), True)
        sitk.WriteImage(sitk.Cast(coarse_labels, sitk.sitkUInt8), str(target / "labelsTr" / f"{name}.nii.gz"), True)
        print(f"{name}: {'x'.join(map(str, coarse.GetSize()[::-1]))}", flush=True)
    shutil.copyfile(source / "dataset.json", target / "dataset.json")


if __name__ == "__main__":
    main()
