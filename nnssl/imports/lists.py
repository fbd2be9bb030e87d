"""Cases from a list of files or from a ``pretrain_data.json`` collection.

The collection is the format of the OpenMind benchmark: collection -> datasets -> subjects -> sessions -> images. Keys that
the import does not need (infos, associated masks) are optional.
"""

import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from nnssl.data.raw import UNKNOWN_CHANNEL
from nnssl.errors import ArgumentError, UserError
from nnssl.files import read_json
from nnssl.imports.case_names import clean_name, common_stem, name_by_path, subject_labels
from nnssl.imports.folders import CHANNEL_NUMBER, split_channels
from nnssl.imports.sources import (
    COLLECTION_FILE,
    Candidate,
    Choices,
    Found,
    choose_modalities,
    stem_of,
    volume_ending,
)

NO_SESSION = "ses-DEFAULT"
"""Name in collections for the session of a subject without sessions."""


class _Image(NamedTuple):
    """An image of a collection."""

    dataset: str
    subject: str
    session: str
    name: str
    modality: str
    path: Path


def find_in_list(source: Path, choices: Choices) -> Found:
    """Find the cases in a list with one case per line: a path, or the paths of its channels separated by tabs or commas.

    Paths are absolute or relative to the folder of the list; ``~`` and ``$VARIABLE`` are expanded. Empty lines and lines
    that start with ``#`` are skipped.

    Raises:
        ArgumentError: If the channels are not valid.
        UserError: If the list cannot be read or is empty.
    """
    try:
        lines = [line.strip() for line in source.read_text().splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{source} cannot be read as a list ({error}); provide a text file with one path per line"
        ) from error
    rows = [_split_line(line, source.parent) for line in lines if line and not line.startswith("#")]
    if not rows:
        raise UserError(f"{source} lists no files; write one path per line")
    named = split_channels(choices.channels)
    if any(named.values()):
        raise ArgumentError(
            f"channels must be names without =SUFFIX for a list, one per column, got {' '.join(choices.channels)}",
            "channels",
        )
    columns = Counter(len(row) for row in rows).most_common(1)[0][0]
    # with a single column, the names are those of the channels inside each file
    channels = len(named) if named and columns > 1 else columns
    found = Found(channel_names=tuple(named) or (UNKNOWN_CHANNEL,) * channels)
    kept = []
    for row in rows:
        if len(row) != channels:
            found.refuse(row[0], f"is in a line with {len(row)} path(s), but the data set has {channels} channel(s)")
        elif wrong := next((path for path in row if not volume_ending(path)), None):
            found.refuse(wrong, "does not end in an image format that nnU-Net can read")
        else:
            kept.append(row)
    names = name_by_path([(*row[0].parent.parts[1:], _case_stem(row)) for row in kept])
    found.candidates = [Candidate(name, row) for name, row in zip(names, kept, strict=True)]
    return found


def _split_line(line: str, folder: Path) -> tuple[Path, ...]:
    whole = _resolve(line, folder)
    if whole.exists():  # a comma can be part of a name
        return (whole,)
    return tuple(_resolve(part.strip(), folder) for part in re.split(r"[\t,]", line) if part.strip())


def _resolve(text: str, folder: Path) -> Path:
    return Path(os.path.abspath(folder / Path(os.path.expandvars(text)).expanduser()))


def _case_stem(row: tuple[Path, ...]) -> str:
    if len(row) > 1:
        return common_stem([stem_of(path) for path in row])
    match = CHANNEL_NUMBER.fullmatch(stem_of(row[0]))
    return match[1] if match else stem_of(row[0])


def find_in_collection(source: Path, choices: Choices) -> Found:
    """Find the cases in a ``pretrain_data.json`` collection by modality.

    With one modality, or with ``choices.mixed``, every image is a case. With several modalities, every session that has
    one image of each is a case.

    Raises:
        ArgumentError: If modalities have to be chosen, or if a chosen one does not exist.
        UserError: If the file is not a collection.
    """
    path = source / COLLECTION_FILE if source.is_dir() else source
    content = read_json(path, "collection")
    if not isinstance(content, dict) or "datasets" not in content:
        raise UserError(f"{path} is not a collection because it has no key 'datasets'; provide a {COLLECTION_FILE}")
    found = Found()
    images = list(_read_images(content, path, found))
    wanted = choose_modalities(Counter(image.modality for image in images), choices, path)
    for image in images:
        if image.modality not in wanted:
            found.refuse(image.path, f"has the modality {image.modality}, which was not chosen")
    images = [image for image in images if image.modality in wanted]
    several = len({image.dataset for image in images}) > 1
    labels = subject_labels(_subject_of(image, several) for image in images)
    if choices.mixed or len(wanted) == 1:
        found.channel_names = ("mixed",) if choices.mixed and len(wanted) > 1 else wanted[:1]
        for image in images:
            name = f"{_session_name(image, labels[_subject_of(image, several)])}_{_rest_of(image)}".strip("_")
            found.candidates.append(Candidate(name, (image.path,)))
        return found
    found.channel_names = wanted
    sessions: dict[str, list[_Image]] = {}
    for image in images:
        sessions.setdefault(_session_name(image, labels[_subject_of(image, several)]), []).append(image)
    for name, group in sessions.items():
        counts = Counter(image.modality for image in group)
        odd = [f"{counts[modality]} {modality}" for modality in wanted if counts[modality] != 1]
        if odd:
            found.refuse(group[0].path, f"is in a session with {', '.join(odd)}; a case needs exactly one of each")
            continue
        by_modality = {image.modality: image.path for image in group}
        found.candidates.append(Candidate(name, tuple(by_modality[modality] for modality in wanted)))
    return found


def _read_images(content: dict[str, Any], path: Path, found: Found) -> Iterator[_Image]:
    """Yield the images of a collection; incomplete entries are rejected."""
    for dataset_key, dataset in _entries(content, "datasets", str(path), found):
        for subject_key, subject in _entries(dataset, "subjects", f"{path}: dataset {dataset_key}", found):
            for session_key, session in _entries(subject, "sessions", f"{path}: subject {subject_key}", found):
                where = f"{path}: subject {subject_key}, session {session_key}"
                for _, image in _entries(session, "images", where, found):
                    if not isinstance(image, dict) or not isinstance(image.get("image_path"), str):
                        found.refuse(where, "has an image without image_path")
                        continue
                    text = os.path.expandvars(image["image_path"])
                    if text.startswith("$"):
                        found.refuse(text, f"starts with {text.split('/')[0]}, which is not set in the environment")
                        continue
                    file = _resolve(text, path.parent)
                    if not volume_ending(file):
                        found.refuse(file, "does not end in an image format that nnU-Net can read")
                        continue
                    name, modality = image.get("name"), image.get("modality")
                    yield _Image(
                        dataset=str(dataset_key),
                        subject=str(subject_key),
                        session=str(session_key),
                        name=name if isinstance(name, str) and name else file.name,
                        modality=modality if isinstance(modality, str) and modality else UNKNOWN_CHANNEL,
                        path=file,
                    )


def _entries(parent: Any, key: str, where: str, found: Found) -> list[tuple[Any, Any]]:
    """Return the named or numbered entries under a key; if there are none, the parent is rejected."""
    entries = parent[key] if isinstance(parent, dict) and key in parent else None
    if isinstance(entries, dict):
        return list(entries.items())
    if isinstance(entries, list):
        return list(enumerate(entries))
    found.refuse(where, f"has no {key}")
    return []


def _subject_of(image: _Image, several: bool) -> str:
    """Return what identifies a patient; it includes the dataset if subjects of several datasets can have the same name."""
    subject = image.subject.removeprefix("sub-")
    return f"{image.dataset}x{subject}" if several else subject


def _session_name(image: _Image, label: str) -> str:
    if image.session in ("", NO_SESSION):
        return f"sub-{label}"
    return f"sub-{label}_ses-{clean_name(image.session.removeprefix('ses-'))}"


def _rest_of(image: _Image) -> str:
    """Return an image's name without subject and session."""
    ending = volume_ending(image.name)
    words = clean_name(image.name.removesuffix(ending)).split("_")
    return "_".join(word for word in words if not word.startswith(("sub-", "ses-")))
