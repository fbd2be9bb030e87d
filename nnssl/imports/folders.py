"""Grouping of image files in a folder or a BIDS tree into cases."""

import fnmatch
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

from nnssl.data.image_files import ending_of
from nnssl.data.raw import UNKNOWN_CHANNEL
from nnssl.errors import ArgumentError
from nnssl.imports.case_names import name_by_path
from nnssl.imports.sources import (
    FOREIGN_ENDINGS,
    Candidate,
    Choices,
    Found,
    choose_modalities,
    stem_of,
    volume_ending,
    walk_files,
)

SEGMENTATION = re.compile(r"(^|[_.-])(seg|segmentation|mask|label|labels|labelmap|dseg|probseg|roi)s?$", re.IGNORECASE)
"""Endings of file names that indicate segmentations."""
SEGMENTATION_FOLDERS = ("labelstr", "labelsts", "labels", "masks", "segmentations")
CHANNEL_NUMBER = re.compile(r"(.+)_(00\d\d)")
"""nnU-Net's names with a channel number; the pattern excludes years."""
NOT_RAW = ("derivatives", "sourcedata", "code", "stimuli")
"""Folders of a BIDS tree that do not contain its raw images."""


def find_in_folder(source: Path, choices: Choices) -> Found:
    """Find the cases in a folder of image files, at any depth.

    Each file is one case. A case has several channels if ``choices.channels`` gives suffixes of file names, or if all
    files end in nnU-Net's ``_0000``, ``_0001``.

    Raises:
        ArgumentError: If the channels are not valid.
    """
    found = Found()
    files = _list_images(source, found, choices.pattern, ())
    named = split_channels(choices.channels)
    numbers = {match[2] for file in files if (match := CHANNEL_NUMBER.fullmatch(stem_of(file)))}
    if not any(named.values()) and "0000" in numbers and all(CHANNEL_NUMBER.fullmatch(stem_of(f)) for f in files):
        numbered = sorted(numbers)
        names = tuple(named) or (UNKNOWN_CHANNEL,) * len(numbered)
        if len(names) != len(numbered):
            raise ArgumentError(
                f"channels must be {len(numbered)} names, one per number in the file names ({', '.join(numbered)}), "
                f"got {' '.join(names)}",
                "channels",
            )
        suffixes = {f"_{number}": name for number, name in zip(numbered, names, strict=True)}
        _group_by_suffix(files, suffixes, source, found)
        found.channel_names = names
    elif any(named.values()):
        _group_by_suffix(files, {str(suffix): name for name, suffix in named.items()}, source, found)
        found.channel_names = tuple(named)
    else:
        paths = [(*file.relative_to(source).parent.parts, stem_of(file)) for file in files]
        names_of_cases = name_by_path(paths)
        found.candidates = [Candidate(name, (file,)) for name, file in zip(names_of_cases, files, strict=True)]
        found.channel_names = tuple(named) or (UNKNOWN_CHANNEL,)
    return found


def split_channels(channels: Sequence[str]) -> dict[str, str | None]:
    """Parse ``NAME`` or ``NAME=SUFFIX`` for each channel.

    Returns:
        Suffix (or None) of each name, in the given order; either all names have suffixes or none do.

    Raises:
        ArgumentError: If a name or suffix is empty or repeated, or if only some names have suffixes.
    """
    parts = [channel.partition("=") for channel in channels]
    named = {name: suffix if sign else None for name, sign, suffix in parts}
    suffixes = [suffix for suffix in named.values() if suffix is not None]
    empty = "" in named or "" in suffixes
    if empty or len(named) < len(parts) or len(set(suffixes)) < len(suffixes) or len(suffixes) not in (0, len(named)):
        raise ArgumentError(
            f"channels must be either all NAME or all NAME=SUFFIX (such as T1=_t1 T2=_t2), without repetitions, "
            f"got {' '.join(channels)}",
            "channels",
        )
    return named


def find_in_bids(source: Path, choices: Choices) -> Found:
    """Find the cases in a BIDS tree: files below ``sub-*``, whose suffix (``T1w``, ``bold``, ...) is the modality.

    Raises:
        ArgumentError: If there are several suffixes and none was chosen, or if a chosen one does not exist.
    """
    found = Found()
    for name in NOT_RAW:
        if (source / name).is_dir():
            found.passed_over[f"folder {name}"] += 1
    files = []
    for file in _list_images(source, found, choices.pattern, NOT_RAW):
        if not file.relative_to(source).parts[0].startswith("sub-"):
            found.refuse(file, "is not in a folder sub-*")
        elif "_" not in stem_of(file):
            found.refuse(file, "has no BIDS suffix such as _T1w")
        else:
            files.append(file)
    wanted = choose_modalities(Counter(_suffix(file) for file in files), choices, source)
    for file in [file for file in files if _suffix(file) not in wanted]:
        found.refuse(file, f"has the suffix {_suffix(file)}, which was not chosen")
    files = [file for file in files if _suffix(file) in wanted]
    if choices.mixed or len(wanted) == 1:
        found.channel_names = ("mixed",) if choices.mixed and len(wanted) > 1 else wanted[:1]
        found.candidates = [Candidate(stem_of(file), (file,)) for file in files]
    else:
        found.channel_names = wanted
        _group_by_suffix(files, {f"_{name}": name for name in wanted}, source, found)
    return found


def _suffix(file: Path) -> str:
    """Return the suffix of a BIDS file, which is the last part of its name."""
    return stem_of(file).rpartition("_")[2]


def _list_images(source: Path, found: Found, pattern: str | None, leave_out: tuple[str, ...]) -> list[Path]:
    """Return the image files below a folder, and record all files that are not images or do not match."""
    files = []
    for file in walk_files(source, leave_out):
        below = file.relative_to(source)
        if found.refuse_name(file):
            continue
        if not volume_ending(file):
            foreign = ending_of(file, FOREIGN_ENDINGS)
            if foreign:
                found.refuse(file, f"ends in {foreign}, which nnU-Net's readers do not support; convert it to .nii.gz")
            else:
                found.passed_over[file.suffix or "without ending"] += 1
        elif pattern is not None:
            if fnmatch.fnmatchcase(below.as_posix(), pattern) or fnmatch.fnmatchcase(file.name, pattern):
                files.append(file)
            else:
                found.refuse(file, f"does not match the pattern {pattern}")
        elif SEGMENTATION.search(stem_of(file)) or any(part.lower() in SEGMENTATION_FOLDERS for part in below.parts):
            found.refuse(file, "is a segmentation according to its name; if it is an image, choose it with a pattern")
        else:
            files.append(file)
    return files


def _group_by_suffix(files: Sequence[Path], suffixes: dict[str, str], source: Path, found: Found) -> None:
    """Form cases from files in one folder whose names differ only in the suffix.

    Args:
        files: Image files.
        suffixes: Channel name for each file-name suffix, in channel order.
        source: Folder to which paths in case names are relative.
        found: Object to which cases and rejected files are added.
    """
    longest_first = sorted(suffixes, key=len, reverse=True)
    groups: dict[tuple[str, ...], dict[str, Path]] = defaultdict(dict)
    for file in files:
        stem = stem_of(file)
        suffix = next((each for each in longest_first if stem.endswith(each)), None)
        if suffix is None:
            found.refuse(file, f"has a name that ends in none of {' '.join(suffixes)}")
            continue
        case = (*file.relative_to(source).parent.parts, stem.removesuffix(suffix))
        if suffix in groups[case]:
            found.refuse(
                file, f"is a second {suffixes[suffix]} of one case, in addition to {groups[case][suffix].name}"
            )
        else:
            groups[case][suffix] = file
    complete = {case: group for case, group in groups.items() if len(group) == len(suffixes)}
    for case, group in groups.items():
        if case not in complete:
            missing = ", ".join(f"{name} ({suffix})" for suffix, name in suffixes.items() if suffix not in group)
            found.refuse(next(iter(group.values())), f"belongs to a case without {missing}")
    for name, group in zip(name_by_path(list(complete)), complete.values(), strict=True):
        found.candidates.append(Candidate(name, tuple(group[suffix] for suffix in suffixes)))
