"""Grouping of the image files of a raw data set into cases, from the list in dataset.json or from the folder imagesTr."""

import os
import re
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from nnssl.data.case_error import NOT_UTF8, SetAside, fault_of_name
from nnssl.data.dicom_series import SERIES_ENDING
from nnssl.data.image_files import ENDINGS, ending_of
from nnssl.errors import UserError
from nnssl.files import is_utf8, printable
from nnssl.log import logger

KNOWN_ENDINGS = (*ENDINGS, SERIES_ENDING)


def group_listed_files(content: dict[str, Any], folder: Path) -> tuple[str, dict[str, dict[int, Path]], list[SetAside]]:
    """Group the files listed in dataset.json, whose paths are relative to its folder as in nnU-Net."""
    groups: dict[str, dict[int, Path]] = {}
    set_aside = []
    for case, images in _listed_images(content, folder).items():
        files = [folder / os.path.expandvars(image) for image in images]
        fault = fault_of_name(case)
        missing = [file for file in files if not file.exists()]
        wrong = [file for file in files if not is_utf8(file)]
        if fault is not None:
            set_aside.append(SetAside(printable(case), printable(files[0]) if files else "dataset.json", fault))
        elif missing:
            set_aside.append(SetAside(case, printable(missing[0]), "is listed in dataset.json but does not exist"))
        elif wrong:
            set_aside.append(SetAside(case, printable(wrong[0]), NOT_UTF8))
        elif files:
            groups[case] = dict(enumerate(files))
        else:
            set_aside.append(SetAside(case, str(folder / "dataset.json"), "lists the case without images"))
    if not groups:
        raise UserError(f"{folder / 'dataset.json'}: none of the images listed under 'dataset' exists; check the paths")
    counts = Counter(ending_of(file.name, KNOWN_ENDINGS) for files in groups.values() for file in files.values())
    return content.get("file_ending") or str(counts.most_common(1)[0][0]), groups, set_aside


def _listed_images(content: dict[str, Any], folder: Path) -> dict[str, list[str]]:
    """Return the images that dataset.json lists, by case.

    Raises:
        UserError: If the list does not have nnU-Net's form.
    """
    listed = content["dataset"]
    images = {}
    for case, entry in listed.items() if isinstance(listed, dict) else [("", listed)]:
        own = entry.get("images") if isinstance(entry, dict) else None
        own = [own] if isinstance(own, str) else own
        if not isinstance(own, list) or not all(isinstance(image, str) for image in own):
            raise UserError(
                f"{folder / 'dataset.json'}: 'dataset' must have the form {{CASE: {{\"images\": [PATH, ...]}}, ...}}, got "
                f"{entry!r}{f' for {case}' if case else ''}; correct the file"
            )
        images[case] = own
    return images


def group_folder_files(content: dict[str, Any], folder: Path) -> tuple[str, dict[str, dict[int, Path]], list[SetAside]]:
    """Group the files in imagesTr by case and channel."""
    images = folder / "imagesTr"
    if not images.is_dir():
        raise UserError(f"{folder} has no folder imagesTr; create it with images named CASE_0000.nii.gz")
    files = sorted(
        path for path in images.iterdir() if not path.name.startswith(".") and ending_of(path.name, KNOWN_ENDINGS)
    )
    ending = _decide_ending(content, images, files)
    groups: dict[str, dict[int, Path]] = defaultdict(dict)
    set_aside = []
    for file in files:
        own = ending_of(file.name, KNOWN_ENDINGS)
        stem = file.name[: -len(own)]
        match = re.fullmatch(r"(.+)_(\d{4})", stem, re.DOTALL)
        case = match[1] if match else stem
        fault = fault_of_name(case) if is_utf8(file) else NOT_UTF8
        if fault is not None:
            set_aside.append(SetAside(printable(case), printable(file), fault))
        elif own != ending:
            set_aside.append(SetAside(case, str(file), f"ends in {own}, but the data set uses {ending}"))
        elif match is None:
            set_aside.append(SetAside(stem, str(file), "has no channel number such as _0000 in its name"))
        elif not file.exists():
            set_aside.append(SetAside(match[1], str(file), "is a link to a file that does not exist"))
        else:
            groups[match[1]][int(match[2])] = file
    if not groups:
        raise UserError(
            f"{images} contains no valid case ({Path(set_aside[0].file).name} {set_aside[0].reason}); "
            f"rename the images to CASE_0000{ending}"
        )
    return ending, dict(groups), set_aside


def _decide_ending(content: dict[str, Any], images: Path, files: list[Path]) -> str:
    """Return the file ending of a data set: that in dataset.json, otherwise the only one found."""
    counts = Counter(ending_of(path.name, KNOWN_ENDINGS) for path in files)
    found = " and ".join(f"{count} {ending}" for ending, count in sorted(counts.items()))
    if not files:
        raise UserError(
            f"{images} contains no image that nnU-Net can read ({' '.join(ENDINGS)}); copy the images there"
        )
    ending = content.get("file_ending")
    if ending is None:
        if len(counts) > 1:
            raise UserError(f"{images} contains {found} files; keep one format or set file_ending in dataset.json")
        ending = str(next(iter(counts)))
        logger.info(f"{images.parent.name}: detected the file ending {ending} from {len(files)} files in imagesTr")
    elif ending not in counts:
        raise UserError(
            f"{images} contains {found} files, but file_ending in dataset.json is {ending}; fix one of them"
        )
    return str(ending)
